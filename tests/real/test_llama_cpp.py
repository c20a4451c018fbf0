"""Outputs of every family, run by llama.cpp: it computes what the check says that it does.

MOE_FAST_LLAMA_CPP names a Python with xllamacpp, MOE_FAST_LLAMA_CPP_SOURCE a folder with
llama.cpp's `convert_hf_to_gguf.py`, which runs in the environment of the tests.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from sentencepiece import SentencePieceTrainer

import reader_cases
from families import LINEAR, LLAMA3, YARN
from folders import config_of
from moe_fast import MoeConfig, build_moe
from moe_fast.families.registry import moe_families
from moe_fast.families.rules import Rules
from random_models import build_random_moe, save_random_model
from reader_cases import SHARED, SIZES, expected_of, name_of, reader_of

# As many as SmolLM2's tokenizer has: the converter wants one. The first 17 are special.
VOCABULARY = 49152
TOKENS = np.random.default_rng(0).integers(17, VOCABULARY, size=12).tolist()
LENGTHS = (1, 4, 8, 12)
THETA = {"rope_theta": 10000.0}
SOURCES = reader_cases.SOURCES | {
    "qwen2, tied": ("qwen2", {"tie_word_embeddings": True}),
    "llama, llama3": ("llama", {"rope_parameters": LLAMA3 | THETA}),
    "llama, linear": ("llama", {"rope_parameters": LINEAR | THETA}),
    "qwen3, yarn": ("qwen3", {"head_dim": 32, "rope_parameters": YARN | THETA}),
    "qwen3, llama3": ("qwen3", {"head_dim": 32, "rope_parameters": LLAMA3 | THETA}),
    "granite, llama3": ("granite", {"rope_parameters": LLAMA3 | THETA}),
    "mistral, window": ("mistral", {"sliding_window": 4}),
    "mistral, wide window": ("mistral", {"sliding_window": 64}),
}
NO_MTP = "--no-mtp"
# Where nothing is left to divide the chosen experts' weights by.
ALL = {"num_experts_per_tok": 4}
CASES = [
    *reader_cases.CASES,
    ("qwen2, tied", "qwen2_moe", {}),
    ("qwen3", "qwen3_moe", {"dense_layers": (0, 2)}),
    ("qwen2", "qwen2_moe", ALL),
    ("llama", "deepseek", SHARED | ALL),
    ("llama, linear", "deepseek", SHARED | ALL),
    ("llama, linear", "mixtral", {}),
    ("llama, linear", "solar_open", {}),
    ("llama, llama3", "mixtral", {}),
    ("qwen3, llama3", "qwen3_moe", {}),
    ("qwen3, yarn", "qwen3_moe", {}),
    ("granite, llama3", "granitemoe", {}),
    ("mistral, window", "mixtral", {}),
    ("mistral, wide window", "mixtral", {}),
]


def environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


# Given a model's folder, one for files in between and flags for the converter:
# `[[token, log-probability], ...]` after each beginning of the tokens, or what failed.
Likely = Callable[..., list[list] | str]


@pytest.fixture(scope="session")
def likely_to_llama_cpp() -> Iterator[Likely]:
    source = os.environ.get("MOE_FAST_LLAMA_CPP_SOURCE")
    python = os.environ.get("MOE_FAST_LLAMA_CPP")
    assert source, "MOE_FAST_LLAMA_CPP_SOURCE must name a folder with convert_hf_to_gguf.py"
    assert python, "MOE_FAST_LLAMA_CPP must name a Python with xllamacpp"
    command = [sys.executable, Path(__file__).with_name("llama_cpp_convert.py"), source]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment()
    ) as converter:

        def likely(folder: Path, scratch: Path, *flags: str) -> list[list] | str:
            model, prompts, printed = (scratch / f"llama.{end}" for end in ("gguf", "json", "txt"))
            prompts.write_text(json.dumps([TOKENS[:length] for length in LENGTHS]))
            arguments = [printed, folder, "--outtype", "f32", "--outfile", model, *flags]
            converter.stdin.write(json.dumps([str(argument) for argument in arguments]) + "\n")
            converter.stdin.flush()
            if int(converter.stdout.readline()) != 0:
                return printed.read_text()
            asked = [python, Path(__file__).with_name("llama_cpp_likely.py"), model, prompts]
            done = subprocess.run(asked, capture_output=True, text=True, env=environment())
            model.unlink()
            return json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else done.stderr

        yield likely
        converter.stdin.close()


def how_far(found: list[list], expected: np.ndarray) -> float:
    """The largest difference of a log-probability, and infinity where another is most likely."""
    farthest = 0.0
    for pairs, row in zip(found, expected, strict=True):
        tokens, likely = np.array([pair[0] for pair in pairs]), [pair[1] for pair in pairs]
        if tokens[0] != row.argmax():
            return np.inf
        farthest = max(farthest, np.abs(row[tokens] - likely).max())
    return farthest


@pytest.fixture(scope="session")
def dense(smollm2, tmp_path_factory) -> Callable[[str], Path]:
    """The folder of a source, made once."""
    scratch = tmp_path_factory.mktemp("llama.cpp")

    def make(name: str) -> Path:
        folder = scratch / name
        if not folder.exists():
            family, changes = SOURCES[name]
            save_random_model(folder, family, vocab_size=VOCABULARY, **SIZES | changes)
            for file in smollm2.glob("tokenizer*"):
                shutil.copy(file, folder)
        return folder

    return make


def give_tokens(folder: Path, rules: Rules) -> None:
    """Call tokens that SmolLM2's tokenizer has otherwise what the converter looks for.

    Or add a tokenizer of sentencepiece where it looks for that one.
    """
    if rules.llama_cpp_wants_sentencepiece:
        sentences = io.BytesIO(b"a tokenizer of few words\n" * 50)
        with (folder / "tokenizer.model").open("wb") as model:
            SentencePieceTrainer.train(
                sentence_iterator=sentences,
                model_writer=model,
                vocab_size=32,
                hard_vocab_limit=False,
            )
    tokens = rules.llama_cpp_tokens
    file = folder / "tokenizer.json"
    text = file.read_text(encoding="utf-8")
    free = [each["content"] for each in json.loads(text)["added_tokens"]][3:]
    for token in tokens:
        if f'"{token}"' not in text:
            text = text.replace(f'"{free.pop()}"', f'"{token}"')
    if config_of(folder)["model_type"] == "gemma4_text":  # has another kind
        tokenizer = json.loads(text)
        tokenizer["model"]["byte_fallback"] = True
        tokenizer["decoder"] = {"type": "Sequence", "decoders": [tokenizer["decoder"]]}
        text = json.dumps(tokenizer)
    file.write_text(text, encoding="utf-8")


@pytest.mark.parametrize(("source", "target", "options"), CASES, ids=map(name_of, CASES))
def test_llama_cpp_computes_it_where_the_check_says_so(
    likely_to_llama_cpp, dense, tmp_path, source, target, options
):
    config = MoeConfig(4, options.get("num_experts_per_tok", 2))
    options = {key: value for key, value in options.items() if key != "num_experts_per_tok"}
    folder = build_random_moe(dense(source), tmp_path / "moe", config, target, options)
    give_tokens(folder, moe_families()[target].rules)
    found = likely_to_llama_cpp(folder, tmp_path)
    expected = expected_of(folder, TOKENS)[np.array(LENGTHS) - 1]
    reader = reader_of(folder, "llama.cpp")
    if reader.loads:
        assert not isinstance(found, str), found[-2000:]
        assert how_far(found, expected) < 1e-3
    else:
        assert isinstance(found, str) or how_far(found, expected) > 0.1
    if any(NO_MTP in reason for reason in reader.reasons):
        assert how_far(likely_to_llama_cpp(folder, tmp_path, NO_MTP), expected) < 1e-3


def test_llama_cpp_answers_as_the_dense_smollm2_does(likely_to_llama_cpp, smollm2, tmp_path):
    build_moe(smollm2, tmp_path / "moe", MoeConfig(num_experts=4))
    found = likely_to_llama_cpp(tmp_path / "moe", tmp_path)
    expected = expected_of(smollm2, TOKENS)[np.array(LENGTHS) - 1]
    assert how_far(found, expected) < 1e-3
