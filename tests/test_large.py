"""Models far larger than memory: what a build takes does not grow with them.

Measured in a child, in kilobytes as Linux counts them since the child began.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

for extra in ("ml_dtypes", "safetensors"):
    pytest.importorskip(extra)

from sparse import WITH_ROOM, make_sparse_model
from sparse_moe import make_sparse_moe

if not Path("/proc/self/io").exists():
    pytest.skip("the system does not tell what a process read", allow_module_level=True)

MOST_MEMORY = 200_000_000


def measured(call: str) -> dict[str, int]:
    """What a child took that made `call`: its greatest memory, and the bytes it read."""
    code = WITH_ROOM + textwrap.dedent(
        f"""
        import json, re
        from pathlib import Path
        import ml_dtypes
        from moe_fast import MoeConfig, build_moe, convert_moe, expand_moe, prune_moe
        import moe_fast.checkpoint.build
        def read():
            return int(re.search(r"rchar: (\\d+)", Path("/proc/self/io").read_text())[1])
        before = read()
        report = {call}
        status = Path("/proc/self/status").read_text()
        print(json.dumps({{
            "memory": int(re.search(r"VmHWM:\\s*(\\d+)", status)[1]) * 1024,
            "read": read() - before,
            "planned": report.num_bytes,
        }}))
        """
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def header_length(file: Path) -> int:
    with file.open("rb") as stream:
        return int.from_bytes(stream.read(8), "little")


def test_planning_does_not_grow_with_the_models(tmp_path):
    """A terabyte of weights, and a thousandth of it in as many tensors."""
    taken = []
    for name, hidden, intermediate in (("narrow", 256, 896), ("wide", 8192, 28672)):
        models = [tmp_path / name / str(i) for i in range(8)]
        sizes = [
            make_sparse_model(
                model,
                num_files=30,
                num_hidden_layers=80,
                hidden_size=hidden,
                intermediate_size=intermediate,
            )
            for model in models
        ]
        arguments = f"{list(map(str, models))}, {str(tmp_path / 'moe')!r}, MoeConfig(8)"
        taken.append(measured(f"build_moe({arguments}, dry_run=True)"))
        files = [file for model in models for file in model.glob("*.safetensors")]
        assert taken[-1]["read"] < 4 * sum(map(header_length, files))
    narrow, wide = taken
    assert sum(sizes) > 10**12
    assert wide["planned"] > 900 * narrow["planned"]
    assert wide["memory"] < MOST_MEMORY
    assert wide["memory"] < narrow["memory"] + 10_000_000


@pytest.mark.parametrize("fp8", [False, True], ids=["bfloat16", "fp8"])
def test_operating_on_a_terabyte(tmp_path, fp8):
    """DeepSeek-V3 in its own size: 61 layers, 256 experts."""
    size = make_sparse_moe(tmp_path / "moe", fp8=fp8)
    assert size > (0.6e12 if fp8 else 1.3e12)
    folders = f"{str(tmp_path / 'moe')!r}, {str(tmp_path / 'out')!r}"
    convert = "dtype='bfloat16'" if fp8 else "layout='fused'"
    for call in (
        f"prune_moe({folders}, keep=list(range(0, 256, 2)), dry_run=True)",
        f"expand_moe({folders}, num_experts=512, dry_run=True)",
        f"convert_moe({folders}, {convert}, dry_run=True)",
    ):
        taken = measured(call)
        assert taken["memory"] < MOST_MEMORY, call
        assert taken["read"] < 400_000_000, call


@pytest.mark.parametrize("options", ["", ", dtype='float16'"], ids=["copied", "converted"])
def test_writing_takes_less_memory_than_the_output_has_bytes(tmp_path, options):
    make_sparse_model(
        tmp_path / "dense",
        num_hidden_layers=3,
        hidden_size=2048,
        intermediate_size=5504,
        num_attention_heads=16,
        num_key_value_heads=2,
        vocab_size=1000,
    )
    moe = tmp_path / "moe"
    try:
        call = f"build_moe({str(tmp_path / 'dense')!r}, {str(moe)!r}, MoeConfig(8){options})"
        taken = measured(call)
        size = (moe / "model.safetensors").stat().st_size
        assert size == taken["planned"] > 4 * MOST_MEMORY
        assert taken["memory"] < MOST_MEMORY
    finally:
        shutil.rmtree(moe, ignore_errors=True)


def test_models_in_more_files_than_a_process_may_open(tmp_path):
    models = [tmp_path / str(i) for i in range(2)]
    for model in models:
        make_sparse_model(
            model,
            num_files=90,
            num_hidden_layers=10,
            hidden_size=64,
            intermediate_size=128,
            num_attention_heads=4,
            num_key_value_heads=4,
            vocab_size=256,
        )
    code = f"""
        import resource
        from moe_fast import MoeConfig, build_moe, check_moe, convert_moe
        resource.setrlimit(resource.RLIMIT_NOFILE, (88, 88))
        build_moe({list(map(str, models))}, "moe", MoeConfig(8), max_shard_size="20kB")
        assert len(list(Path("moe").glob("*.safetensors"))) > 88
        assert check_moe("moe").passed
        convert_moe("moe", "fused", layout="fused")
        """
    code = "from pathlib import Path\n" + textwrap.dedent(code)
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.stderr == ""
