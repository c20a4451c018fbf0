"""Upcycle a dense model into a Mixture of Experts and go on training it, on CPU.

    python examples/train_upcycled.py                        # a small model, trained on the way
    python examples/train_upcycled.py path/to/dense/model    # any Llama or Mistral model

Needs `moe-fast[all]`, torch and transformers. Prints, step by step, the loss and how evenly the
tokens spread over the experts: the coefficient of variation of the tokens per expert (0 is even),
averaged over the layers.
"""

from __future__ import annotations

import argparse
import random
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from moe_fast import MoeConfig, build_moe
from moe_fast.demo import make_dense_model
from moe_fast.torch import RoutingTensors, route

NAMES = ("Ada", "Emmy", "Grace", "Sofia")
THINGS = ("apples", "books", "lamps", "maps")


def make_text(lines: int, seed: int) -> str:
    """Sums, sentences that count, definitions of functions: three kinds to divide."""
    chance = random.Random(seed)

    def line() -> str:
        a, b = chance.randrange(50), chance.randrange(50)
        return chance.choice(
            [
                f"{a} + {b} = {a + b}",
                f"{chance.choice(NAMES)} has {a} {chance.choice(THINGS)}.",
                f"def add_{a}(x): return x + {a}",
            ]
        )

    return "\n".join(line() for _ in range(lines))


def batches(tokens: torch.Tensor, size: int, length: int, seed: int) -> Iterator[torch.Tensor]:
    """Random windows of the text, `(size, length)`, without end."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        starts = torch.randint(len(tokens) - length, (size, 1), generator=generator)
        yield tokens[starts + torch.arange(length)]


def mean_cv(routings: Sequence[RoutingTensors]) -> float:
    """Standard deviation over mean of the tokens per expert, averaged over the layers."""
    counts = [routing.routing.tokens_per_expert for routing in routings]
    return float(np.mean([np.std(count) / np.mean(count) for count in counts]))


def train(
    model: PreTrainedModel,
    stream: Iterator[torch.Tensor],
    steps: int,
    learning_rate: float,
    config: MoeConfig | None = None,
    balance: float = 0.0,
) -> None:
    """Optimisation steps; with a `config`, of an MoE whose experts are kept balanced."""
    optimizer = torch.optim.AdamW(model.parameters(), learning_rate, weight_decay=0.01)
    for step in range(steps):
        batch = next(stream)
        output = model(batch, labels=batch, output_router_logits=config is not None)
        loss, line = output.loss, f"step {step:4d}  loss {output.loss:.3f}"
        if config is not None:
            routings = [route(logits, config) for logits in output.router_logits]
            # transformers' own loss pools the layers first, so that one can hide another.
            balancing = torch.stack([routing.load_balancing_loss() for routing in routings]).mean()
            loss = loss + balance * balancing
            line += f"  load cv {mean_cv(routings):.3f}"
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        print(line, flush=True)


def held_out_loss(model: PreTrainedModel, tokens: torch.Tensor, length: int) -> float:
    """Mean loss per token of a text that was not trained on."""
    windows = tokens[: len(tokens) // length * length].view(-1, length)
    with torch.no_grad():
        return float(model(windows, labels=windows).loss)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("dense", nargs="?", type=Path, help="a dense model's folder")
    parser.add_argument("--text", type=Path, help="a text file, in place of a text made here")
    parser.add_argument("--output", type=Path, help="where to keep the trained model")
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--experts-per-token", type=int, default=2)
    parser.add_argument("--dense-steps", type=int, default=60, help="to train the small model")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--length", type=int, default=64, help="tokens per sequence")
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--balance", type=float, default=0.1, help="weight of the balancing loss")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        small = options.dense is None
        dense_folder = folder / "dense" if small else options.dense
        if small:
            make_dense_model(dense_folder, seed=options.seed)

        tokenizer = AutoTokenizer.from_pretrained(dense_folder)
        if options.text is None:
            text, held_out = make_text(3000, options.seed), make_text(100, options.seed + 1)
        else:
            text = options.text.read_text(encoding="utf-8")
            text, held_out = text[: len(text) * 9 // 10], text[len(text) * 9 // 10 :]
        tokens, held_out = (
            tokenizer(t, return_tensors="pt", verbose=False).input_ids[0] for t in (text, held_out)
        )
        stream = batches(tokens, options.batch_size, options.length, options.seed)

        dense = AutoModelForCausalLM.from_pretrained(dense_folder, dtype=torch.float32)
        if small:
            print("training the dense model")
            train(dense, stream, options.dense_steps, learning_rate=5e-3)
            dense.save_pretrained(dense_folder)
        print(f"held-out loss, dense model: {held_out_loss(dense, held_out, options.length):.4f}")
        del dense

        config = MoeConfig(options.experts, options.experts_per_token)
        report = build_moe(dense_folder, folder / "moe", config)
        print(f"built {report.num_parameters:,} parameters in {report.seconds:.2f} s")

        model = AutoModelForCausalLM.from_pretrained(
            folder / "moe", dtype=torch.float32, router_aux_loss_coef=0.0
        )
        print(f"held-out loss, upcycled: {held_out_loss(model, held_out, options.length):.4f}")
        train(model, stream, options.steps, options.learning_rate, config, options.balance)
        print(f"held-out loss, trained: {held_out_loss(model, held_out, options.length):.4f}")
        if options.output is not None:
            model.save_pretrained(options.output)
            tokenizer.save_pretrained(options.output)


if __name__ == "__main__":
    main()
