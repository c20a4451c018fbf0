"""How evenly routers made from text send other text to experts, counted by transformers' routers.

    python -m benchmarks.router_load DENSE FILE... [--experts 8 --experts-per-token 2]

DENSE is a folder with a dense model. Of each file the first 90 % make the routers, and the rest is
counted; with `--mixed`, every tenth piece of 256 tokens is. The experts are copies of one
feed-forward network, so that all of them share its memory.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from moe_fast import Design, MoeConfig, design_moe
from moe_fast.request import RouterMethod

LENGTH = 256
METHODS: tuple[RouterMethod, ...] = ("balanced", "normal", "calibrated", "clustered")


def load(design: Design, dense: Path) -> Any:
    """The model of a design in float32, each layer's experts in the memory of one."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(**design.config), dtype=torch.float32
        )
    source = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32)
    weights = source.state_dict()
    experts = model.config.num_local_experts
    for number, layer in enumerate(model.model.layers):
        prefix = f"model.layers.{number}.mlp."
        gate, up, down = (weights.pop(f"{prefix}{r}_proj.weight") for r in ("gate", "up", "down"))
        router = design.read(f"model.layers.{number}.block_sparse_moe.gate.weight")
        weights |= {
            f"{prefix}gate.weight": torch.from_numpy(router.astype(np.float32)),
            f"{prefix}experts.gate_up_proj": torch.cat([gate, up])[None].expand(experts, -1, -1),
            f"{prefix}experts.down_proj": down[None].expand(experts, -1, -1),
        }
        del layer
    model.load_state_dict(weights, assign=True, strict=False)
    model.model.rotary_emb = source.model.rotary_emb
    model.lm_head = torch.nn.Identity()  # nobody counts what follows the last layer
    return model.eval()


def count(model: Any, tokens: torch.Tensor) -> np.ndarray:
    """How many of the tokens each expert of each layer gets."""
    k, counts = model.config.num_experts_per_tok, 0
    for batch in tokens.split(4):
        with torch.inference_mode():
            logits = model.model(batch, output_router_logits=True).router_logits
        chosen = [layer.topk(k, dim=-1).indices.flatten() for layer in logits]
        experts = logits[0].shape[-1]
        counts = counts + np.stack([torch.bincount(c, minlength=experts).numpy() for c in chosen])
    return np.asarray(counts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("dense", type=Path)
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--experts-per-token", type=int, default=2)
    parser.add_argument("--tokens", type=int, help="that make the routers")
    parser.add_argument("--mixed", action="store_true", help="hold out every tenth piece")
    parser.add_argument("--methods", nargs="+", default=METHODS)
    options = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(options.dense)
    used, held_out = [], []
    for file in options.files:
        ids = tokenizer(file.read_text(encoding="utf-8"), return_tensors="np").input_ids[0]
        pieces = ids[: len(ids) // LENGTH * LENGTH].reshape(-1, LENGTH)
        numbers = np.arange(len(pieces))
        chosen = numbers % 10 == 9 if options.mixed else numbers >= len(pieces) * 9 // 10
        used.append(pieces[~chosen])
        held_out.append(pieces[chosen])
    tokens = torch.from_numpy(np.concatenate(held_out))
    for method in options.methods:
        begin = time.perf_counter()
        design = design_moe(
            options.dense,
            MoeConfig(options.experts, options.experts_per_token),
            routers=method,
            tokens=np.concatenate(used),
            tokens_used=options.tokens,
            target="mixtral",
        )
        seconds = time.perf_counter() - begin
        load_of = count(load(design, options.dense), tokens)
        cv = load_of.std(axis=1) / load_of.mean(axis=1)
        starving = int((load_of < load_of.mean(axis=1, keepdims=True) / 4).sum())
        print(
            f"{method}: {tokens.numel():,} tokens, load cv {np.median(cv):.3f} median, "
            f"{cv.max():.3f} greatest, {starving} experts below a quarter; {seconds:.0f} s",
            flush=True,
        )


if __name__ == "__main__":
    main()
