"""An MoE in another layout is the same MoE: the same bytes, in both directions."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

for extra in ("safetensors", "ml_dtypes", "typer"):
    pytest.importorskip(extra)

from safetensors import safe_open
from safetensors.numpy import load_file

from command import run
from families import make_model
from folders import config_of, edit_config, rewrite
from forward import Model
from moe_fast import CheckpointError, MoeConfig, MoeConfigError, build_moe, check_moe, convert_moe
from moe_fast.demo import make_dense_model

CONFIG = MoeConfig(num_experts=4)
TARGETS = {
    "mixtral": ("llama", {}),
    "qwen2_moe": ("qwen2", {}),
    "qwen3_moe": ("qwen3", {}),
    "flex_olmo": ("olmo2", {}),
    "qwen2_moe, shared": ("qwen2", {"shared": 1}),
}


def built(tmp_path: Path, name: str, layout: str | None = None, **options) -> Path:
    family, extra = TARGETS[name]
    dense = tmp_path / "dense"
    if not dense.exists():
        make_model(dense, family)
    shared = [dense] * extra.get("shared", 0)
    output = tmp_path / f"built-{layout}"
    target = name.partition(",")[0]
    build_moe(dense, output, CONFIG, target=target, layout=layout, shared_experts=shared, **options)
    return output


def contents(folder: Path) -> dict[str, bytes]:
    """Every file but the manifest and the card, which tell of other sources."""
    others = ("moe_fast.json", "README.md")
    return {f.name: f.read_bytes() for f in folder.iterdir() if f.name not in others}


@pytest.fixture
def moe(tmp_path: Path) -> Path:
    make_dense_model(tmp_path / "dense", seed=0)
    make_dense_model(tmp_path / "other", seed=1)
    build_moe([tmp_path / "dense", tmp_path / "other"], tmp_path / "moe", CONFIG)
    return tmp_path / "moe"


@pytest.mark.parametrize("name", TARGETS)
def test_there_and_back_is_the_identity(tmp_path, name):
    moe = built(tmp_path, name)
    convert_moe(moe, tmp_path / "fused", layout="fused")
    convert_moe(tmp_path / "fused", tmp_path / "back", layout="per-expert")
    assert contents(tmp_path / "back") == contents(moe)


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("layout", ["fused", "per-expert"])
def test_a_conversion_is_what_a_build_gives(tmp_path, name, layout):
    other = {"fused": "per-expert", "per-expert": "fused"}[layout]
    convert_moe(built(tmp_path, name, other), tmp_path / "converted", layout=layout)
    expected = contents(built(tmp_path, name, layout))
    assert contents(tmp_path / "converted") == expected


def test_a_conversion_passes_its_check(moe, tmp_path):
    convert_moe(moe, tmp_path / "fused", layout="fused")
    assert check_moe(tmp_path / "fused").passed
    moved = shutil.move(moe, tmp_path / "elsewhere")
    report = check_moe(tmp_path / "fused")
    assert "moe: is not a folder with a model" in report["experts"].summary
    report = check_moe(tmp_path / "fused", against=moved)
    assert report["experts"].summary == "8 experts equal their sources, byte for byte"
    with (tmp_path / "fused" / "model.safetensors").open("r+b") as stream:
        stream.seek(-1, 2)
        last = stream.read()[0]
        stream.seek(-1, 2)
        stream.write(bytes([last ^ 1]))
    assert not check_moe(tmp_path / "fused", against=moved).passed


@pytest.mark.parametrize("target", ["granitemoe", "granitemoeshared", "deepseek"])
def test_families_of_one_layout_are_rewritten_in_it(tmp_path, target):
    make_model(tmp_path / "dense", "llama")
    shared = [] if target == "granitemoe" else tmp_path / "dense"
    build_moe(tmp_path / "dense", tmp_path / "moe", CONFIG, target=target, shared_experts=shared)
    report = convert_moe(tmp_path / "moe", tmp_path / "again")
    assert report.layout == report.layout_before
    assert contents(tmp_path / "again") == contents(tmp_path / "moe")
    other = {"fused": "per-expert", "per-expert": "fused"}[report.layout]
    title = {"granitemoe": "GraniteMoE", "granitemoeshared": "GraniteMoE Shared"}
    title = title.get(target, "DeepSeek-MoE")
    message = f"^layout must be '{report.layout}' for {title}, got '{other}'$"
    with pytest.raises(MoeConfigError, match=message):
        convert_moe(tmp_path / "moe", tmp_path / "no", layout=other)


def test_the_function_stays(tmp_path):
    moe = built(tmp_path, "qwen3_moe", "fused")
    convert_moe(moe, tmp_path / "per-expert", layout="per-expert")
    tokens = np.arange(20)
    expected = Model(tmp_path / "dense").logits(tokens)
    tolerance = 1e-12 * np.abs(expected).max()
    found = Model(tmp_path / "per-expert").logits(tokens)
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance)


def test_shards_in_and_out(moe, tmp_path):
    report = convert_moe(moe, tmp_path / "sharded", max_shard_size="300kB")
    assert report.num_files > 2
    convert_moe(tmp_path / "sharded", tmp_path / "fused", layout="fused", max_shard_size="400kB")
    convert_moe(tmp_path / "fused", tmp_path / "back", layout="per-expert")
    assert contents(tmp_path / "back") == contents(moe)
    with safe_open(next((tmp_path / "sharded").glob("*.safetensors")), "numpy") as file:
        assert file.metadata()["experts"] == "0, 2: dense; 1, 3: other"


def test_the_card_names_the_readers_of_the_new_layout(moe, tmp_path):
    convert_moe(moe, tmp_path / "fused", layout="fused")
    card = (tmp_path / "fused" / "README.md").read_text()
    assert "Readers: transformers 5.\n" in card
    assert "| 0, 2 | dense | the same | none |" in card
    assert "OUTPUT` made what this was converted from, with models of these names:" in card
    convert_moe(tmp_path / "fused", tmp_path / "back", layout="per-expert")
    back, before = ((f / "README.md").read_text() for f in (tmp_path / "back", moe))
    assert back == before.replace("makes it again", "made what this was converted from")
    (moe / "README.md").write_bytes(b"# Mine \xff")
    convert_moe(moe, tmp_path / "with-mine", layout="fused")
    assert (tmp_path / "with-mine" / "README.md").read_bytes() == b"# Mine \xff"


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {"num_experts": "absent", "torch_dtype": "absent"},
            {"num_experts": 4, "num_local_experts": 4, "torch_dtype": "float32"},
        ),
        (
            {"rope_theta": "absent", "rope_scaling": "absent"},
            {"rope_theta": 10000.0, "rope_scaling": None},
        ),
        (
            {
                "rope_theta": "absent",
                "rope_scaling": "absent",
                "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5.0},
            },
            {"rope_theta": 5.0, "rope_scaling": {"rope_type": "linear", "factor": 2.0}},
        ),
        (
            {"rope_parameters": "absent", "rope_scaling": {"type": "linear", "factor": 2.0}},
            {
                "rope_scaling": {"rope_type": "linear", "type": "linear", "factor": 2.0},
                "rope_parameters": {
                    "rope_type": "linear",
                    "type": "linear",
                    "factor": 2.0,
                    "rope_theta": 10000.0,
                },
            },
        ),
        (
            {"rope_theta": "absent", "rope_scaling": "absent", "rope_parameters": "absent"},
            {"num_experts": 4},
        ),
    ],
    ids=["number", "transformers 5", "scaled", "transformers 4", "silent"],
)
def test_the_configuration_gets_both_spellings(moe, tmp_path, changes, expected):
    edit_config(moe, **changes)
    before = config_of(moe)
    convert_moe(moe, tmp_path / "fused", layout="fused")
    config = config_of(tmp_path / "fused")
    assert config.items() >= expected.items()
    kept = before.keys() - expected.keys()
    assert {key: config[key] for key in kept} == {key: before[key] for key in kept}


def test_mixed_dtypes_stay(moe, tmp_path):
    def change(tensors):
        name = "model.layers.0.block_sparse_moe.gate.weight"
        return tensors | {name: tensors[name].astype(np.float16)}

    rewrite(moe, change)
    convert_moe(moe, tmp_path / "fused", layout="fused")
    found = load_file(tmp_path / "fused" / "model.safetensors")
    assert found["model.layers.0.mlp.gate.weight"].dtype == np.float16
    assert found["model.layers.1.mlp.gate.weight"].dtype == np.float32


def test_what_cannot_be_converted(moe, tmp_path):
    output = tmp_path / "out"
    with pytest.raises(CheckpointError, match="dense: holds no experts; it is not an MoE"):
        convert_moe(tmp_path / "dense", output)
    with pytest.raises(CheckpointError, match="absent: is not a folder with a model"):
        convert_moe(tmp_path / "absent", output)
    with pytest.raises(MoeConfigError, match="layout must be one of 'per-expert', 'fused'"):
        convert_moe(moe, output, layout="stacked")
    with pytest.raises(CheckpointError, match="exists already"):
        convert_moe(moe, tmp_path / "dense")
    for place in (moe, moe.parent):
        with pytest.raises(
            CheckpointError, match=rf"would replace {re.escape(str(moe))}, which it"
        ):
            convert_moe(moe, place, overwrite=True)
    with pytest.raises(CheckpointError, match=rf"moe: lies in {re.escape(str(moe))}, which it is"):
        convert_moe(moe, moe / "moe")
    assert not (moe / "moe").exists()
    edit_config(moe, num_local_experts=5)
    with pytest.raises(CheckpointError, match=r"holds 4 experts, config\.json has 5"):
        convert_moe(moe, output)
    edit_config(moe, model_type="olmoe", num_local_experts=4)
    with pytest.raises(MoeConfigError, match="layout must be 'per-expert' for olmoe"):
        convert_moe(moe, output, layout="fused")  # for these are not the names of an OLMoE
    assert not output.exists()


def test_experts_of_two_dtypes_do_not_fuse(moe, tmp_path):
    edit_tensors(
        moe, layers__1__block_sparse_moe__experts__2__w3__weight=lambda t: t.astype(np.float16)
    )
    with pytest.raises(CheckpointError, match=r"experts.2.w3.weight' is F16, others .* are F32"):
        convert_moe(moe, tmp_path / "fused", layout="fused")


ONE_LAYOUT = {
    "granitemoe": ("granite", {}),
    "granitemoeshared": ("granite", {"shared": 1}),
    "deepseek": ("llama", {"shared": 1}),
}
CASES = [(name, layout) for name in TARGETS for layout in ("fused", "per-expert")]
CASES += [(name, None) for name in ONE_LAYOUT]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize(("name", "layout"), CASES)
def test_a_conversion_to_a_dtype_is_what_a_build_in_it_gives(tmp_path, name, layout, dtype):
    family, extra = (TARGETS | ONE_LAYOUT)[name]
    dense = make_model(tmp_path / "dense", family)
    options = {
        "target": name.partition(",")[0],
        "routers": "random",  # balanced leaves its base out of 16 bits
        "shared_experts": [dense] * extra.get("shared", 0),
    }
    build_moe(dense, tmp_path / "moe", CONFIG, **options)
    report = convert_moe(tmp_path / "moe", tmp_path / "converted", layout=layout, dtype=dtype)
    assert report.warnings == ()
    assert report.dtypes_before == ("F32",)
    assert report.dtypes == ({"bfloat16": "BF16", "float16": "F16"}[dtype],)
    build_moe(dense, tmp_path / "expected", CONFIG, layout=layout, dtype=dtype, **options)
    assert contents(tmp_path / "converted") == contents(tmp_path / "expected")
    checked = check_moe(tmp_path / "converted")
    assert checked.passed, checked.problems
    assert "byte for byte" in checked["experts"].summary


def test_dtypes_are_those_of_ml_dtypes(moe, tmp_path):
    from ml_dtypes import bfloat16

    convert_moe(moe, tmp_path / "out", dtype="bfloat16", max_shard_size="300kB")
    before = load_file(moe / "model.safetensors")
    shards = sorted((tmp_path / "out").glob("*.safetensors"))
    after = {name: tensor for shard in shards for name, tensor in load_file(shard).items()}
    assert len(shards) == 2
    assert after.keys() == before.keys()
    for name, tensor in before.items():
        np.testing.assert_array_equal(after[name], tensor.astype(bfloat16))
    convert_moe(tmp_path / "out", tmp_path / "back", dtype="float32")
    for name, tensor in load_file(tmp_path / "back" / "model.safetensors").items():
        np.testing.assert_array_equal(tensor, after[name].astype(np.float32))
    config = config_of(tmp_path / "back")
    assert config["dtype"] == config["torch_dtype"] == "float32"


def edit_tensors(folder: Path, **changes) -> None:
    """Replace tensors whose names end as the keys say, by what the values make of them."""

    def changed(tensors):
        for ending, change in changes.items():
            (name,) = (name for name in tensors if name.endswith(ending.replace("__", ".")))
            tensors[name] = np.ascontiguousarray(change(tensors[name]))
        return tensors

    rewrite(folder, changed)


def test_what_float16_does_not_hold_is_counted(moe, tmp_path):
    def large(tensor):
        tensor[3, :5] = 1e6
        return tensor

    edit_tensors(moe, layers__1__block_sparse_moe__experts__2__w3__weight=large)
    report = convert_moe(moe, tmp_path / "half", dtype="float16")
    (warning,) = report.warnings
    assert warning.startswith("model.safetensors: 5 weights of 1 tensors are beyond the dtype")
    manifest = json.loads((tmp_path / "half" / "moe_fast.json").read_text())
    overflow = manifest["files"]["model.safetensors"]["overflow"]
    assert overflow == {"model.layers.1.block_sparse_moe.experts.2.w3.weight": 5}
    assert convert_moe(moe, tmp_path / "upper", dtype="bfloat16").warnings == ()
    done = run("convert", moe, "-o", tmp_path / "again", "--dtype", "float16")
    assert done.returncode == 0
    assert "F32 to F16" in done.stdout
    assert "5 weights of 1 tensors" in done.stderr


def test_routers_that_rounding_would_make_tie_are_told(moe, tmp_path):
    noise = np.random.default_rng(0).normal(size=(4, 64)).astype(np.float32)
    gate = {"layers__1__block_sparse_moe__gate__weight": lambda _: 0.25 + 1e-5 * noise}
    edit_tensors(moe, **gate)
    (warning,) = convert_moe(moe, tmp_path / "half", dtype="bfloat16", dry_run=True).warnings
    assert warning == (
        "layer 1: rounded to bfloat16, the router weights of experts 0-3 are equal, so their "
        "logits tie; build the MoE in bfloat16 instead, or convert it after training"
    )
    assert convert_moe(moe, tmp_path / "half", dtype="float32", dry_run=True).warnings == ()


def test_a_dtype_lets_mixed_experts_fuse_and_others_are_refused(moe, tmp_path):
    edit_tensors(
        moe, layers__1__block_sparse_moe__experts__2__w3__weight=lambda t: t.astype(np.float16)
    )
    report = convert_moe(moe, tmp_path / "fused", layout="fused", dtype="float32")
    assert (report.dtypes_before, report.dtypes) == (("F32", "F16"), ("F32",))
    edit_tensors(moe, model__norm__weight=lambda t: t.astype(np.float64))
    message = r"tensor 'model.norm.weight' is F64; F32, F16, BF16 can be converted"
    with pytest.raises(CheckpointError, match=message):
        convert_moe(moe, tmp_path / "no", dtype="float16")
    with pytest.raises(MoeConfigError, match="dtype must be one of 'float32', 'bfloat16', 'float"):
        convert_moe(moe, tmp_path / "no", dtype="int8")


def test_an_empty_folder_becomes_the_output(moe, tmp_path):
    (tmp_path / "fused").mkdir()
    convert_moe(moe, tmp_path / "fused", layout="fused")
    assert check_moe(tmp_path / "fused").passed


def test_a_dry_run_writes_nothing(moe, tmp_path):
    report = convert_moe(moe, tmp_path / "fused", layout="fused", dry_run=True)
    assert report.num_tensors == 20
    assert not (tmp_path / "fused").exists()


def test_command(moe, tmp_path):
    done = run("convert", moe, "-o", tmp_path / "fused", "--layout", "fused")
    assert (done.returncode, done.stderr) == (0, "")
    assert "per-expert to fused" in done.stdout
    assert "transformers 5 loads it" in done.stdout
    done = run("convert", moe, "-o", tmp_path / "fused", "--json")
    assert done.returncode == 1
    assert "exists already" in done.stderr
    done = run("convert", tmp_path / "fused", "-o", tmp_path / "back", "--json")
    assert json.loads(done.stdout)["layout"] == "fused"
