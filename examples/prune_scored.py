"""Prune a trained MoE by what its experts are worth, by how often they are used, and at random.

    python examples/prune_scored.py work                # a small model, trained on the way
    python examples/prune_scored.py work path/to/dense/model --steps 200

Makes three kinds of text of what comes with Python (its source code, its manual, the history of
IDLE), trains an MoE of the dense model on them by `train_upcycled.py`, scores its experts on the
same text, prunes them, and prints each model's loss on text that was held out. Needs
`moe-fast[all,calibration]`.
"""

from __future__ import annotations

import argparse
import json
import pydoc_data.topics
import subprocess
import sys
import sysconfig
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from moe_fast import prune_moe, score_experts
from moe_fast.models.moe import open_moe_model

LIBRARY = Path(sysconfig.get_path("stdlib"))
MODULES = ("argparse", "ast", "copy", "dataclasses", "difflib", "fractions", "heapq", "inspect")


def make_texts(characters: int) -> dict[str, str]:
    """Three kinds of text, so many characters of each."""
    code = "".join((LIBRARY / f"{name}.py").read_text("utf-8") for name in MODULES)
    manual = "".join(text for _, text in sorted(pydoc_data.topics.topics.items()))
    history = "".join(
        (LIBRARY / "idlelib" / f"{name}.txt").read_text("utf-8", "replace")
        for name in ("NEWS", "NEWS2x", "HISTORY")
    )
    return {kind: text[:characters] for kind, text in
            (("code", code), ("manual", manual), ("history", history))}  # fmt: skip


def split_texts(work: Path, characters: int) -> dict[str, str]:
    """Write what is trained on, and the part of it that is scored on; what is held out."""
    held_out, training = {}, []
    for kind, text in make_texts(characters).items():
        cut = len(text) * 9 // 10
        (work / f"{kind}.txt").write_text(text[:10_000], "utf-8")
        training += [text[start : start + 2000] for start in range(0, cut, 2000)]
        held_out[kind] = text[cut:]
    np.random.default_rng(0).shuffle(training)
    (work / "train.txt").write_text("".join(training), "utf-8")
    return held_out


def losses(folder: Path, texts: dict[str, str], length: int) -> list[float]:
    """The mean loss of a model on each text, read in pieces of this length."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    found = []
    for text in texts.values():
        tokens = tokenizer(text, return_tensors="pt", verbose=False).input_ids[0]
        pieces = tokens[: len(tokens) // length * length].view(-1, length)
        with torch.inference_mode():
            each = [model(p[None], labels=p[None], use_cache=False).loss for p in pieces]
        found.append(float(torch.stack(each).mean()))
    return found


def random_scores(folder: Path, seed: int) -> dict[str, object]:
    draws = np.random.default_rng(seed)
    layers = open_moe_model(folder).layers
    name = f"random {seed}"
    return {"layers": {e.key: {name: draws.random(len(e.experts)).tolist()} for e in layers}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("work", type=Path, help="a folder for texts, models and scores")
    parser.add_argument("dense", nargs="?", help="a dense model: a folder, or on the Hub")
    parser.add_argument("--steps", type=int, default=400, help="to train the MoE")
    parser.add_argument("--dense-steps", type=int, default=400, help="to train the small model")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--low-memory", action="store_true", help="Adafactor")
    parser.add_argument("--characters", type=int, default=100_000, help="of each kind of text")
    options = parser.parse_args()
    options.work.mkdir(exist_ok=True)
    held_out = split_texts(options.work, options.characters)
    moe = options.work / "moe"
    if not moe.exists():
        script = Path(__file__).with_name("train_upcycled.py")
        arguments = {
            "text": options.work / "train.txt", "output": moe, "steps": options.steps,
            "dense-steps": options.dense_steps, "batch-size": options.batch_size,
            "length": options.length, "routers": "normal", "learning-rate": options.learning_rate,
            "balance": 0.02,
        }  # fmt: skip
        words = [f"--{name}={value}" for name, value in arguments.items()]
        words += ["--low-memory"] * options.low_memory + [options.dense] * bool(options.dense)
        subprocess.run([sys.executable, script, *words], check=True)
    texts = [options.work / f"{kind}.txt" for kind in held_out]
    file = options.work / "scores.json"
    if not file.exists():
        report = score_experts(moe, file, texts=texts, length=options.length)
        print(f"scored on {report.num_tokens:,} tokens in {report.seconds:.0f} s")
    draws = {f"random {seed}": random_scores(moe, seed) for seed in range(3)}
    scores = {"reap": file, "frequency": file, **draws}
    results = {"all 8": losses(moe, held_out, options.length)}
    print("experts kept   by         " + "".join(f"{kind:>10}" for kind in held_out))
    print("all 8                     " + "".join(f"{loss:10.3f}" for loss in results["all 8"]))
    for number in (6, 4):
        for by, given in scores.items():
            pruned = options.work / "pruned"
            prune_moe(moe, pruned, num_experts=number, scores=given, by=by, overwrite=True)
            found = losses(pruned, held_out, options.length)
            results[f"{number} by {by}"] = found
            print(f"{number:<14} {by:<11}" + "".join(f"{loss:10.3f}" for loss in found), flush=True)
    (options.work / "losses.json").write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
