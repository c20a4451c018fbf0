"""The files of a model folder besides its weights: tokenizer, templates, settings."""

from __future__ import annotations

from pathlib import Path

from moe_fast.checks import collect
from moe_fast.storage.files import open_regular

# What belongs to a model besides config.json and weights, and is copied as it is.
COMPANIONS = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "*.model",  # sentencepiece
    "tekken.json",
    "chat_template.*",
    "generation_config.json",
)
# Any one of these is a tokenizer that llama.cpp could convert.
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "spiece.model", "tekken.json", "vocab.json")


def find_companions(folder: Path) -> list[Path]:
    """The companions of a model folder, each one readable."""
    files = [file for pattern in COMPANIONS for file in sorted(folder.glob(pattern))]
    files = [file for file in dict.fromkeys(files) if not file.is_dir()]
    return list(collect(lambda file: open_regular(file).close(), files))


def has_tokenizer(folder: Path) -> bool:
    """Whether a model folder holds a tokenizer that llama.cpp could convert."""
    return any((folder / name).is_file() for name in TOKENIZERS)
