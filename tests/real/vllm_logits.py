"""Runs models with vLLM on the CPU; writes what it finds likely.

    python vllm_logits.py JOBS.json OUTPUT.npz

`JOBS.json` lists `[model, tokens]`. A file of its own, for the environment that has vLLM.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from pathlib import Path

import numpy as np

# In this process, with little memory for the cache.
os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1"}
os.environ |= {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1"}

from vllm import LLM, SamplingParams, __version__
from vllm.distributed import cleanup_dist_env_and_memory


def log_probabilities(folder: str, tokens: list[int]) -> np.ndarray:
    """Float32 `[T, vocab]`, after each of the tokens."""
    model = LLM(
        folder,
        dtype="float32",
        enforce_eager=True,
        # As where it is not eager, which takes longer: its own kernel for the processor takes
        # queries of three dimensions for those of two.
        compilation_config={"custom_ops": ["all", "-rotary_embedding"]},
        max_model_len=64,
        max_logprobs=-1,
        skip_tokenizer_init=True,
        trust_remote_code=True,
    )
    asked = SamplingParams(
        max_tokens=1, temperature=0, prompt_logprobs=-1, logprobs=-1, detokenize=False
    )
    (answer,) = model.generate([{"prompt_token_ids": tokens}], asked, use_tqdm=False)
    after = [*answer.prompt_logprobs[1:], *answer.outputs[0].logprobs]
    return np.array([[row[i].logprob for i in range(len(row))] for row in after], np.float32)


if __name__ == "__main__":
    jobs, output = sys.argv[1:]
    results = {"version": np.array(__version__)}
    for i, (folder, tokens) in enumerate(json.loads(Path(jobs).read_text())):
        try:
            results[f"likely{i}"] = log_probabilities(folder, tokens)
        except Exception as error:  # what vLLM raises where a model does not fit is its own affair
            results[f"error{i}"] = np.array(f"{type(error).__name__}: {error}")
        cleanup_dist_env_and_memory()
        gc.collect()
    np.savez(output, **results)
