"""The loss of a model as fine-grained experts, by how the shards are scaled.

    python -m benchmarks.fine_grained MODEL [--copies 2] [--texts examples/kinds.yml]
    python -m benchmarks.fine_grained MODEL --function 4x4 8x8

Prints a Markdown table of the mean loss in nats per token on held-out texts, in float32: the dense
model; its shards as `granularity` scales them; with the cube root of G on gate, up and down (He et
al. 2024, equation 2, for weights that sum to one); and unscaled. With `--function`, how far the
logits of copies x shards are from the dense model's: in float32 over 60 tokens, and the worst of
3,000 in bfloat16 with groups. Needs torch and transformers.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from moe_fast import MoeConfig, build_moe

GRANULARITIES = (4, 8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--copies", type=int, default=2)
    parser.add_argument(
        "--texts", type=Path, default=Path(__file__).parents[1] / "examples" / "kinds.yml"
    )
    parser.add_argument("--function", nargs="+", metavar="COPIESxSHARDS")
    options = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if options.function:
        for split in options.function:
            print_function(options.model, *map(int, split.split("x")))
        return
    kinds = yaml.safe_load(options.texts.read_text())["held_out"]
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    texts = [
        tokenizer(text, return_tensors="pt").input_ids for each in kinds.values() for text in each
    ]
    dense = evaluate(load(options.model), texts)
    print(f"{len(texts)} texts, {sum(t.shape[1] - 1 for t in texts):,} tokens\n")
    print("| granularity | dense | exact | cube root | unscaled |\n|--:|--:|--:|--:|--:|")
    for shards in GRANULARITIES:
        losses = [dense, *scaled_losses(options.model, options.copies, shards, texts)]
        print(f"| {shards} | {' | '.join(f'{loss:.4f}' for loss in losses)} |", flush=True)


def print_function(dense: Path, copies: int, shards: int) -> None:
    """The greatest difference from the dense model, over its greatest logit or a token's norm."""
    generator = torch.Generator().manual_seed(0)
    config = MoeConfig(copies * shards)
    found = []
    for dtype, target, shape in (
        ("float32", "mixtral", (1, 60)), ("bfloat16", "glm4_moe", (30, 100))
    ):  # fmt: skip
        tokens = torch.randint(49_000, shape, generator=generator)
        with tempfile.TemporaryDirectory(prefix="moe_fast_benchmark") as folder:
            moe = Path(folder, "moe")
            build_moe(
                dense, moe, config, granularity=shards, dtype=dtype, target=target, layout="fused"
            )
            found.append((logits(dense, tokens, dtype), logits(moe, tokens, dtype)))
    (expected, exact), (whole, grouped) = found
    single = float((exact - expected).abs().max() / expected.abs().max())
    worst = float(((grouped - whole).norm(dim=-1) / whole.norm(dim=-1)).max())
    print(f"{copies} x {shards}: {single:.1e} in float32, {worst:.2%} in bfloat16", flush=True)


def logits(folder: Path, tokens: Any, dtype: str) -> Any:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
    with torch.inference_mode():
        return torch.cat([model(t, use_cache=False).logits.float() for t in tokens.split(10)])


def scaled_losses(dense: Path, copies: int, shards: int, texts: list[Any]) -> Iterator[float]:
    """With exact factors, with the cube root of `shards` in all three matrices, and with none."""
    with tempfile.TemporaryDirectory(prefix="moe_fast_benchmark") as folder:
        config = MoeConfig(copies * shards, shards)
        moe = Path(folder, "moe")
        build_moe(dense, moe, config, granularity=shards, dtype="float32", target="mixtral")
        model = load(moe)
    yield evaluate(model, texts)
    up = 1 << (shards.bit_length() - 1) // 2  # what the build has put on up; the rest is on down
    down, root = shards / up, shards ** (1 / 3)
    scale(model, gate=root, up=root / up, down=root / down)
    yield evaluate(model, texts)
    scale(model, gate=1 / root, up=1 / root, down=1 / root)
    yield evaluate(model, texts)


def scale(model: Any, gate: float, up: float, down: float) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("experts.gate_up_proj"):
                width = parameter.shape[1] // 2
                parameter[:, :width] *= gate
                parameter[:, width:] *= up
            elif name.endswith("experts.down_proj"):
                parameter *= down


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def evaluate(model: Any, texts: list[Any]) -> float:
    """The mean loss of a token, in nats."""
    total, count = 0.0, 0
    with torch.inference_mode():
        for tokens in texts:
            predicted = tokens.shape[1] - 1
            total += float(model(tokens, labels=tokens).loss) * predicted
            count += predicted
    return total / count


if __name__ == "__main__":
    main()
