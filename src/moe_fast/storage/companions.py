"""The files of a model folder besides its weights: tokenizer, templates, settings, code.

All are copied as they are. Copying code runs nothing; whoever loads the copy decides about that.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from moe_fast.checks import collect
from moe_fast.errors import CheckpointError
from moe_fast.storage.files import is_plain_name, open_regular
from moe_fast.storage.strict_json import LONGEST_INDEX, read_json

# What belongs to a model besides config.json and weights, by patterns of paths in its folder.
COMPANIONS = (
    "tokenizer*.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "*.model",  # sentencepiece
    "*.model.v*",  # Mistral's versions of it
    "*.spm",
    "*.tiktoken",
    "tekken.json",
    "chat_template.json",
    "*.jinja",
    "generation_config.json",
)
# What reads pictures and sound, for models that have more than a language model.
PROCESSORS = ("processor_config.json", "*preprocessor_config.json")
TEMPLATES = "additional_chat_templates/*.jinja"
CODE = "*.py"
TOKENIZER_CONFIG = "tokenizer_config.json"
# Any one of these is a tokenizer that llama.cpp could convert.
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "spiece.model", "tekken.json", "vocab.json")


def find_companions(
    folder: Path, config: Mapping[str, Any] | None = None, *, processors: bool = True
) -> dict[str, Path]:
    """The companions of a model folder by their path in it, each one readable.

    Those of pictures and sound only with `processors`. If the tokenizer's configuration, or
    `config`, names code of the folder, all code that lies there is among them: what is named may
    import the rest.
    """
    patterns = [*COMPANIONS, TEMPLATES, *(PROCESSORS if processors else ())]
    if named_code(folder, config):
        patterns.append(CODE)
    files = [file for pattern in patterns for file in sorted(folder.glob(pattern))]
    files = [file for file in dict.fromkeys(files) if not file.is_dir()]
    collect(lambda file: open_regular(file).close(), files)
    return {file.relative_to(folder).as_posix(): file for file in files}


def find_missing_code(folder: Path, config: Mapping[str, Any] | None = None) -> Iterator[str]:
    """Code that is named in the folder and is not in it, a sentence for each file."""
    for file, names in named_code(folder, config).items():
        for name in sorted(names):
            if not (folder / name).is_file():
                yield (
                    f"{folder / file}: auto_map names code in {name}, which is not beside it; "
                    "readers that need it fail without"
                )


def named_code(folder: Path, config: Mapping[str, Any] | None = None) -> dict[str, set[str]]:
    """The files of code that each configuration of a folder says are beside it."""
    try:
        path = folder / TOKENIZER_CONFIG
        tokenizer = read_json(path, limit=LONGEST_INDEX) if path.is_file() else None
    except CheckpointError:  # copied as it is; whoever reads it will say so
        tokenizer = None
    named = {TOKENIZER_CONFIG: code_beside(tokenizer), "config.json": code_beside(config)}
    return {file: names for file, names in named.items() if names}


def code_beside(config: Any) -> set[str]:
    """The files that the `auto_map` of a configuration expects in its own folder.

    `"module.Class"` is in `module.py`, `"repository--module.Class"` in another repository.
    """
    auto_map = config.get("auto_map") if isinstance(config, Mapping) else None
    values: Iterable[Any] = auto_map.values() if isinstance(auto_map, Mapping) else ()
    references = [each for v in values for each in (v if isinstance(v, list) else [v])]
    files = {
        f"{reference.partition('.')[0]}.py"
        for reference in references
        if isinstance(reference, str) and "--" not in reference and "." in reference
    }
    return {file for file in files if file != ".py" and is_plain_name(file)}


def has_tokenizer(folder: Path) -> bool:
    """Whether a model folder holds a tokenizer that llama.cpp could convert."""
    return any((folder / name).is_file() for name in TOKENIZERS)
