"""Runs a GGUF file with llama.cpp; prints what it finds most likely.

    python llama_cpp_likely.py MODEL.gguf TOKENS.json

`TOKENS.json` lists prompts, each a list of tokens. Prints `[[token, log-probability], ...]` for
each, most likely first. A file of its own, for the environment that has llama.cpp.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import xllamacpp as llama

MOST_LIKELY = 50


def run(model: str) -> llama.Server:
    """In float32 wherever it is to be had."""
    parameters = llama.CommonParams()
    parameters.model.path = model
    parameters.n_ctx = 64
    parameters.warmup = False
    parameters.cache_type_k = parameters.cache_type_v = llama.ggml_type.GGML_TYPE_F32
    parameters.flash_attn_type = llama.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    return llama.Server(parameters)


if __name__ == "__main__":
    model, prompts = sys.argv[1:]
    server = run(model)
    found = []
    for prompt in json.loads(Path(prompts).read_text()):
        asked = {"prompt": prompt, "n_predict": 1, "n_probs": MOST_LIKELY, "temperature": 0.0}
        answer = server.handle_completions(asked | {"cache_prompt": False})
        (place,) = answer["choices"][0]["logprobs"]["content"]
        found.append([[likely["id"], likely["logprob"]] for likely in place["top_logprobs"]])
    print(json.dumps(found))
