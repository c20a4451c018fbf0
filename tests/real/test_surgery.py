"""What operations on experts make of tiny random models, run by transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from transformers import AutoModelForCausalLM

from moe_fast import convert_moe, expand_moe, prune_moe
from moe_fast.families.registry import expert_axes
from moe_fast.models.moe import open_moe_model
from moe_models import NUM_EXPERTS, OWN, TOP_K, save_random_moe

TOKENS = torch.arange(1, 25).reshape(2, 12)
NOT_OPERATED_ON = ("jetmoe", "longcat_flash")
FAMILIES = [family for family in OWN if family not in NOT_OPERATED_ON]
KEPT = ((0, 2, 3, 5), (1, 2, 3, 4), (0, 1, 3, 5))


def load(folder: Path) -> Any:
    """The model, with every weight where it belongs."""
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not info["missing_keys"], info
    assert not info["unexpected_keys"], info
    assert not info["mismatched_keys"], info
    return model.eval()


def logits(model: Any) -> Any:
    with torch.inference_mode():
        return model(TOKENS, use_cache=False).logits


def assert_equal(found: Any, expected: Any) -> None:
    scale = expected.abs().max()
    assert scale > 1e-3
    assert (found - expected).abs().max() <= 1e-5 * scale


def drop(model: Any, layers: dict[int, tuple[int, ...]]) -> int:
    """Set the selection scores of all experts but these to minus infinity; how many routers.

    Where the router's rows alone decide, those of dropped experts become so small that no softmax
    and no sigmoid of theirs is ever chosen: a large negative component along what it reads would
    depend on the tokens, so the module's own output is masked in place of its weights.
    """
    changed = 0
    for number, kept in layers.items():
        for name, module in model.named_modules():
            if f"layers.{number}." in f"{name}." and is_router(module):
                mask(module, [e for e in range(NUM_EXPERTS) if e not in kept])
                changed += 1
    return changed


def is_router(module: Any) -> bool:
    weight = getattr(module, "weight", None)
    return weight is not None and weight.ndim == 2 and weight.shape[0] == NUM_EXPERTS


def mask(module: Any, dropped: list[int]) -> None:
    """Make `torch.nn.functional.linear` of this module's weight give minus infinity there."""
    module.weight.data = module.weight.data.clone()
    MASKED[id(module.weight)] = dropped


MASKED: dict[int, list[int]] = {}
linear = torch.nn.functional.linear


@pytest.fixture
def masked(monkeypatch):
    """Logits of dropped experts are minus infinity, wherever a router's weight is multiplied."""
    MASKED.clear()

    def masked_linear(states: Any, weight: Any, bias: Any = None) -> Any:
        found = linear(states, weight, bias)
        if id(weight) in MASKED:
            found[..., MASKED[id(weight)]] = -torch.inf
        return found

    monkeypatch.setattr(torch.nn.functional, "linear", masked_linear)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_pruned_model_is_the_full_one_without_the_dropped_experts(tmp_path, family, masked):
    full = save_random_moe(tmp_path / "moe", family)
    layers = open_moe_model(tmp_path / "moe").layers
    kept = {layer.number: KEPT[i % len(KEPT)] for i, layer in enumerate(layers)}
    prune_moe(tmp_path / "moe", tmp_path / "pruned", keep={"layers": kept})
    before = logits(full)
    assert drop(full, kept) == len(layers)
    for name, tensor in (*full.named_parameters(), *full.named_buffers()):
        if tensor.shape in ((NUM_EXPERTS,), (1, NUM_EXPERTS)) and "bias" in name:
            number = int(name.partition("layers.")[2].partition(".")[0])
            dropped = [e for e in range(NUM_EXPERTS) if e not in kept[number]]
            with torch.no_grad():
                tensor[..., dropped] = -torch.inf
    expected = logits(full)
    assert torch.isfinite(expected).all()
    assert (expected - before).abs().max() > 1e-3 * before.abs().max()
    assert TOP_K <= 4
    assert_equal(logits(load(tmp_path / "pruned")), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_expanded_model_is_the_model(tmp_path, family):
    full = save_random_moe(tmp_path / "moe", family)
    report = expand_moe(tmp_path / "moe", tmp_path / "expanded", 3 * NUM_EXPERTS)
    assert report.num_experts_per_tok == 3 * TOP_K
    expected, found = logits(full), logits(load(tmp_path / "expanded"))
    if report.warnings:
        assert (found - expected).abs().max() > 1e-3 * expected.abs().max()
    else:
        assert_equal(found, expected)


@pytest.mark.parametrize("family", [f for f in FAMILIES if len(expert_axes()[f].layouts) == 2])
def test_a_fused_model_is_the_model(tmp_path, family):
    full = save_random_moe(tmp_path / "moe", family)
    convert_moe(tmp_path / "moe", tmp_path / "fused", layout="fused")
    assert_equal(logits(load(tmp_path / "fused")), logits(full))
