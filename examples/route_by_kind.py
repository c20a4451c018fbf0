"""Grow an MoE whose experts are for prose, code and numbers; draw where new text goes.

    python examples/route_by_kind.py path/to/dense/model picture.png

Routers are made from the prompts in `kinds.yml`, by what they will read of them. Then the MoE,
untrained, reads other texts of the same kinds, and each kind's load is a panel of the picture.
Needs `moe-fast[all]`, torch and transformers.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch
import yaml
from matplotlib import pyplot
from transformers import AutoModelForCausalLM, AutoTokenizer

from moe_fast import ExpertSource, MoeConfig, RoutingStats, build_moe
from moe_fast.drawing.plotting import plot_load


def main(dense: str, picture: str) -> None:
    kinds = yaml.safe_load(Path(__file__).with_name("kinds.yml").read_text(encoding="utf-8"))
    experts = [ExpertSource(dense, positive_prompts=texts) for texts in kinds["prompts"].values()]
    config = MoeConfig(num_experts=len(experts), num_experts_per_tok=1)
    with tempfile.TemporaryDirectory() as folder:
        report = build_moe(experts, f"{folder}/moe", config, routers="hidden")
        model = AutoModelForCausalLM.from_pretrained(f"{folder}/moe", dtype=torch.float32).eval()
        tokenizer = AutoTokenizer.from_pretrained(f"{folder}/moe")

    figure, panels = pyplot.subplots(1, len(experts), figsize=(12, 6.4), layout="constrained")
    for expert, (kind, texts) in enumerate(kinds["held_out"].items()):
        stats = RoutingStats(config, num_layers=report.num_layers)
        for text in texts:
            tokens = tokenizer(text, return_tensors="pt").input_ids
            with torch.inference_mode():
                router_logits = model(tokens, output_router_logits=True).router_logits
            for layer, logits in enumerate(router_logits):
                # What stands first in a text reads the same whatever the text is about.
                stats.update(logits[1:].numpy(), layer)
        plot_load(stats.counts, panels[expert])
        panels[expert].set_title(
            f"{kind}: {100 * stats.load[:, expert].mean():.0f} % to expert {expert}"
        )
        print(
            f"{kind}: {100 * stats.load[:, expert].mean():.1f} % of the choices fall on its expert"
        )
    figure.savefig(picture, dpi=80)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(*sys.argv[1:])
