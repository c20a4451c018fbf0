"""Loads models with whatever transformers runs this file; writes logits and what did not fit.

    python logits.py JOBS.json OUTPUT.npz

`JOBS.json` lists `[model, tokens]`. A file of its own, so that another version of transformers can
do it, in its own environment.
"""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path

import numpy as np
import torch
import transformers
from transformers import AutoModelForCausalLM

PROBLEMS = ("missing_keys", "unexpected_keys", "mismatched_keys")


def compute_logits(folder: str | Path, tokens: list[int]) -> tuple[np.ndarray, list[str]]:
    """The float32 logits `[T, vocab]` of a model folder, and every tensor that did not fit."""
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    problems = [f"{kind}: {name}" for kind in PROBLEMS for name in sorted(info[kind])]
    with torch.no_grad():
        logits = model.eval()(torch.tensor([tokens])).logits
    return logits[0].numpy(), problems


def log_softmax(logits: np.ndarray) -> np.ndarray:
    below = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    return below - np.log(np.exp(below).sum(-1, keepdims=True))


def assert_same(logits: np.ndarray, expected: np.ndarray, tolerance: float) -> None:
    """Equal up to `tolerance` times the largest, and so is what is most likely everywhere."""
    assert np.abs(logits - expected).max() < tolerance * np.abs(expected).max()
    assert np.array_equal(logits.argmax(-1), expected.argmax(-1))


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    jobs, output = sys.argv[1:]
    results = {"version": np.array(transformers.__version__)}
    for i, (model, tokens) in enumerate(json.loads(Path(jobs).read_text())):
        logits, problems = compute_logits(model, tokens)
        results |= {f"logits{i}": logits, f"problems{i}": np.array(problems, str)}
    np.savez(output, **results)
