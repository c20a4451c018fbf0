"""FFNs split into finer experts compute, in transformers, what the dense model computes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from families import make_model
from moe_fast import MoeConfig, build_moe, check_moe

SPLITS = [(4, 4), (3, 3), (8, 8), (29, 8)]
FAMILIES = [
    ("llama", "mixtral"),
    ("llama", "glm4_moe"),
    ("qwen3", "qwen3_moe"),
    ("qwen3", "glm4_moe"),
]


def logits(folder: Path, tokens: Any, dtype: Any = torch.float32) -> Any:
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, output_loading_info=True
    )
    assert not info["missing_keys"], info
    assert not info["unexpected_keys"], info
    with torch.inference_mode():
        return model.eval()(tokens, use_cache=False).logits.float()


def tokens_below(vocabulary: int, *shape: int) -> Any:
    return torch.randint(vocabulary, shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("copies", "shards"), SPLITS)
@pytest.mark.parametrize(("family", "target"), FAMILIES)
def test_the_function_is_kept(
    tmp_path: Path, family: str, target: str, copies: int, shards: int
) -> None:
    dense = make_model(tmp_path / "dense", family, intermediate_size=96)
    config = MoeConfig(num_experts=copies * shards)
    build_moe(dense, tmp_path / "moe", config, granularity=shards, target=target, shuffle=True)
    tokens = tokens_below(96, 4, 50)
    expected, found = logits(dense, tokens), logits(tmp_path / "moe", tokens)
    assert (found - expected).abs().max() <= 2e-5 * expected.abs().max()


@pytest.mark.parametrize(("copies", "shards"), SPLITS)
def test_trained_weights(tmp_path: Path, smollm2: Path, copies: int, shards: int) -> None:
    """The first layers of SmolLM2: all of them, 29 times, would not fit into a small machine."""
    dense = tmp_path / "dense"
    dense.mkdir()
    config = json.loads((smollm2 / "config.json").read_text())
    (dense / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    tensors = load_file(smollm2 / "model.safetensors")
    later = tuple(f"model.layers.{layer}." for layer in range(3, 30))
    save_file({n: t for n, t in tensors.items() if not n.startswith(later)},
              dense / "model.safetensors", metadata={"format": "pt"})  # fmt: skip
    build_moe(
        dense, tmp_path / "moe", MoeConfig(num_experts=copies * shards), granularity=shards,
        dtype="float32",
    )  # fmt: skip
    tokens = tokens_below(49000, 1, 60)
    expected, found = logits(dense, tokens), logits(tmp_path / "moe", tokens)
    assert (found - expected).abs().max() <= 2e-5 * expected.abs().max()
    assert torch.equal(found.argmax(-1), expected.argmax(-1))


@pytest.mark.parametrize(("copies", "shards"), [(4, 4), (8, 8), (29, 8)])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_groups_keep_copies_whole_in_16_bits(
    tmp_path: Path, family: str, copies: int, shards: int
) -> None:
    """Rows of copies tie in bfloat16; groups choose whole copies whatever ties."""
    dense = make_model(tmp_path / "dense", family, intermediate_size=192, hidden_size=64)
    build_moe(
        dense, tmp_path / "moe", MoeConfig(num_experts=copies * shards), granularity=shards,
        dtype="bfloat16", target="glm4_moe",
    )  # fmt: skip
    tokens = tokens_below(96, 30, 100)
    expected = logits(dense, tokens, torch.bfloat16)
    found = logits(tmp_path / "moe", tokens, torch.bfloat16)
    errors = (found - expected).norm(dim=-1) / expected.norm(dim=-1)
    assert errors.numel() == 3000
    assert errors.max() <= 0.05
    assert copies_of_tokens(tmp_path / "moe", tokens, shards) == {1}


@pytest.mark.parametrize(("target", "copies_met"), [("glm4_moe", {1}), ("mixtral", {1, 2})])
def test_trained_weights_keep_copies_whole_in_16_bits(
    tmp_path: Path, smollm2: Path, target: str, copies_met: set[int]
) -> None:
    """All layers of SmolLM2; without groups, some tokens do mix two copies."""
    build_moe(
        smollm2, tmp_path / "moe", MoeConfig(num_experts=32), granularity=4, target=target,
        layout="fused",
    )  # fmt: skip
    assert copies_of_tokens(tmp_path / "moe", tokens_below(49000, 10, 100), 4) == copies_met


def copies_of_tokens(moe: Path, tokens: Any, shards: int) -> set[int]:
    """Of how many copies a token's experts are, for all tokens of all layers, in bfloat16."""
    model = AutoModelForCausalLM.from_pretrained(moe, dtype=torch.bfloat16).eval()
    found: set[int] = set()
    num_layers = 0

    def look(module: Any, arguments: Any) -> None:
        nonlocal num_layers
        num_layers += 1
        copies = (arguments[1] // shards).sort(dim=-1).values
        assert copies.shape == (tokens.numel(), shards)
        found.update(((copies[:, 1:] != copies[:, :-1]).sum(dim=-1) + 1).tolist())

    for layer in model.model.layers:
        layer.mlp.experts.register_forward_pre_hook(look)
    with torch.inference_mode():
        model(tokens, use_cache=False, logits_to_keep=1)
    assert num_layers == model.config.num_hidden_layers
    return found


def test_marco_moes_recipe(tmp_path: Path) -> None:
    """Split in 8, shuffled, half of the neurons drawn anew: one recipe, and it trains."""
    pytest.importorskip("yaml")
    from moe_fast import build_recipe

    dense = make_model(tmp_path / "dense", "qwen3", intermediate_size=256, tie_word_embeddings=True)
    recipe = tmp_path / "recipe.yml"
    recipe.write_text(
        f"models: [{dense.as_posix()}]\nnum_experts: 32\ngranularity: 8\nshuffle: true\n"
        "reinit: 0.5\n"
    )
    report = build_recipe(recipe, tmp_path / "moe")
    assert (report.target, report.num_experts_per_tok) == ("qwen3_moe", 8)
    assert check_moe(tmp_path / "moe").passed
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "moe", dtype=torch.float32)
    tokens = tokens_below(96, 4, 32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(10):
        loss = model(tokens, labels=tokens).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0] - 0.5
