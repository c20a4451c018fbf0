"""Adapters that PEFT trained and saved, against what its own merge_and_unload makes of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from families import make_model
from moe_fast import CheckpointError, MoeConfig, build_moe, check_moe

# PEFT asks transformers for what it calls by another name now.
pytestmark = pytest.mark.filterwarnings(
    "ignore::FutureWarning:transformers", "ignore::UserWarning:peft"
)

FFN = ["gate_proj", "up_proj", "down_proj"]
OPTIONS = {
    "plain": {},
    "rslora": {"use_rslora": True, "r": 8},
    "patterns": {
        "rank_pattern": {"up_proj": 2, r"^model.layers.1.mlp.gate_proj": 6},
        "alpha_pattern": {"down_proj": 32, r"layers\.0\.mlp\..*": 5, "up_proj": 7},
    },
    "some layers": {"layers_to_transform": [1], "target_modules": ["up_proj"]},
    "gaussian": {"init_lora_weights": "gaussian"},
    "attention": {"target_modules": "all-linear"},
}


def save_adapter(base: Path, folder: Path, dtype: Any, **options: Any) -> dict[str, Any]:
    """Save an adapter with random factors; the weights of the model that PEFT merges it into."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    config = peft.LoraConfig(
        **{"task_type": "CAUSAL_LM", "target_modules": FFN, "r": 4, "lora_alpha": 16, **options}
    )
    torch.manual_seed(0)
    adapted = peft.get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if ".lora_" in name:
                parameter.normal_(std=0.1)
    adapted.save_pretrained(folder)
    return adapted.merge_and_unload().state_dict()


def assert_merged(moe: Path, weights: dict[str, Any], tolerance: float, rest: bool) -> None:
    names = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
    compared = 0
    for name, tensor in load_file(moe / "model.safetensors").items():
        parts = name.split(".")
        if "experts" in parts and parts[5] == "1":
            expected = weights[f"model.layers.{parts[2]}.mlp.{names[parts[6]]}.weight"]
        elif rest and name in weights:
            expected = weights[name]
        else:
            continue
        compared += 1
        scale = expected.float().abs().max()
        assert (tensor.float() - expected.float()).abs().max() <= tolerance * scale, name
    assert compared >= 6


@pytest.mark.parametrize("name", OPTIONS)
def test_peft_merges_the_same(tmp_path: Path, name: str) -> None:
    base = make_model(tmp_path / "base", "llama")
    weights = save_adapter(base, tmp_path / "adapter", torch.float32, **OPTIONS[name])
    backbone = (0, 1) if name == "attention" else "base"
    build_moe([base, tmp_path / "adapter"], tmp_path / "moe", MoeConfig(2), backbone=backbone)
    assert_merged(tmp_path / "moe", weights, 1e-6, rest=name == "attention")
    assert check_moe(tmp_path / "moe").passed


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_dora": True}, "DoRA divides each row"),
        ({"bias": "lora_only"}, "it trains biases"),
        ({"init_lora_weights": "pissa"}, "such a start changes the model's own weights"),
    ],
)
def test_what_peft_saves_and_is_no_plain_lora(
    tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    base = make_model(tmp_path / "base", "llama")
    save_adapter(base, tmp_path / "adapter", torch.float32, **options)
    with pytest.raises(CheckpointError, match=message):
        build_moe([base, tmp_path / "adapter"], tmp_path / "moe", MoeConfig(2))


def test_smollm2(smollm2: Path, tmp_path: Path) -> None:
    """In bfloat16 PEFT rounds the change before it adds it; here the sum is rounded once."""
    weights = save_adapter(smollm2, tmp_path / "adapter", torch.bfloat16, r=16)
    build_moe([smollm2, tmp_path / "adapter"], tmp_path / "moe", MoeConfig(2))
    assert_merged(tmp_path / "moe", weights, 2**-7, rest=False)
