"""A new family and a new operation are one file each: both are made up here, and work."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

FAMILY = '''
"""A made-up family: Llama's blocks, experts under names of its own."""

from moe_fast.families.moe import MoeFamily
from moe_fast.families.rules import Rules


class MadeUp(MoeFamily):
    name = "made_up_moe"
    title = "Made-up MoE"
    architecture = "MadeUpMoeForCausalLM"
    dense_twin = "llama"
    expert_names = (("first", "gate_proj"), ("third", "up_proj"), ("second", "down_proj"))
    rules = Rules("num_experts", 8, 1e4)

    def own_config(self, parts):
        return {"num_experts": parts.num_experts}


MOE = (MadeUp(),)
'''

OPERATION = '''
"""A made-up operation: every tensor of a model, in the opposite order."""

from dataclasses import dataclass, replace
from typing import ClassVar

from moe_fast.checkpoint.design import Design, design_of
from moe_fast.checkpoint.manifest import Manifest
from moe_fast.models.moe import open_moe_model
from moe_fast.request import Request
from moe_fast.storage.companions import find_companions
from moe_fast.storage.tensors import Weight


@dataclass(frozen=True)
class TurnRequest(Request):
    operation: ClassVar[str] = "turn"

    model: str

    def folders(self):
        return [self.model]

    def moved(self, now):
        return replace(self, model=now[self.model])


@design_of.register
def design_turn(request: TurnRequest, decisions=None) -> Design:
    model = open_moe_model(request.model)
    return Design(
        weights={name: Weight.of(model.tensors[name]) for name in reversed(model.tensors)},
        config=model.config,
        companions=find_companions(model.path),
        sources=[model.tensors],
        family=model.model_type,
        num_experts=model.num_experts * len(model.layers),
        manifest=Manifest(request=request, family=model.model_type),
        reference=model.path,
    )
'''


def run(script: str, folder: Path) -> str:
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], cwd=folder, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_a_family_is_one_file(tmp_path):
    (tmp_path / "added").mkdir()
    (tmp_path / "added" / "made_up.py").write_text(FAMILY)
    output = run(
        """
        import moe_fast
        from moe_fast import families
        families.__path__.append("added")
        moe_fast.make_dense_model("dense", seed=0)
        moe_fast.build_moe("dense", "moe", moe_fast.MoeConfig(3), target="made_up_moe")
        checked = moe_fast.check_moe("moe")
        print(checked["structure"].summary)
        print(sum(finding.status == "failed" for finding in checked.findings))
        print(moe_fast.inspect_model("moe").model_type)
        """,
        tmp_path,
    )
    assert output.splitlines() == [
        "names, shapes and config.json are those of Made-up MoE",
        "0",
        "made_up_moe",
    ]


@pytest.mark.parametrize("damaged", [False, True])
def test_an_operation_is_one_file(tmp_path, damaged):
    (tmp_path / "added").mkdir()
    (tmp_path / "added" / "turn.py").write_text(OPERATION)
    run(
        """
        import moe_fast
        from moe_fast import checkpoint
        checkpoint.__path__.append("added")
        from moe_fast.checkpoint.design import design_of
        from moe_fast.checkpoint.turn import TurnRequest
        moe_fast.make_dense_model("dense", seed=0)
        moe_fast.build_moe("dense", "moe", moe_fast.MoeConfig(3))
        design_of(TurnRequest("moe")).write("turned")
        """,
        tmp_path,
    )
    if damaged:
        file = tmp_path / "turned" / "model.safetensors"
        data = bytearray(file.read_bytes())
        length = int.from_bytes(data[:8], "little")
        _, end = json.loads(data[8 : 8 + length])["model.embed_tokens.weight"]["data_offsets"]
        data[8 + length + end - 1] ^= 1
        file.write_bytes(data)
    output = run(
        """
        import moe_fast
        from moe_fast import checkpoint
        checkpoint.__path__.append("added")
        checked = moe_fast.check_moe("turned")
        print(checked.passed, checked["experts"].summary)
        print(next(iter(checked["other weights"].problems), ""))
        """,
        tmp_path,
    )
    passed, problem = output.splitlines()
    if damaged:
        assert passed.startswith("False")
        assert "model.embed_tokens.weight" in problem
    else:
        assert passed == "True 6 experts equal their sources, byte for byte"
