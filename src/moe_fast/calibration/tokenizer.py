"""Prompts as tokens, by the tokenizer that lies beside a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from moe_fast.errors import CheckpointError
from moe_fast.storage.strict_json import read_json

LONGEST_TOKENIZER = 200_000_000  # bytes; it is read whole. The largest known have 35 MB.


class PromptTokenizer:
    """The tokenizer of a model folder, which neither cuts nor pads; `what` it is needed for.

    Raises
    ------
    CheckpointError
        A folder whose tokenizer is missing or cannot be read.
    ModuleNotFoundError
        Without the tokenizers library.
    """

    def __init__(self, folder: Path, what: str = "prompts") -> None:
        try:
            from tokenizers import Tokenizer
        except ModuleNotFoundError:
            raise ModuleNotFoundError(
                f"{what} need tokenizers: pip install 'moe-fast[recipes]'", name="tokenizers"
            ) from None
        self.file = folder / "tokenizer.json"
        if not self.file.is_file():
            raise CheckpointError(
                f"is missing, and {what} need it "
                "(AutoTokenizer.from_pretrained(...).save_pretrained(...) writes one)",
                file=self.file,
            )
        size = self.file.stat().st_size
        if size > LONGEST_TOKENIZER:
            raise CheckpointError(
                f"{self.file}: has {size:,} bytes; no tokenizer has more than {LONGEST_TOKENIZER:,}"
            )
        try:
            self.tokenizer = Tokenizer.from_file(str(self.file))
        except Exception as error:  # the library raises nothing narrower
            raise CheckpointError(f"is not a tokenizer: {error}", file=self.file) from None
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        self.start = beginning_of_text(folder)

    def tokens(self, prompt: str) -> list[int]:
        """The prompt's tokens, after the token that begins a text where the model has one."""
        encoded = self.tokenizer.encode(self.start + prompt, add_special_tokens=False)
        return list(encoded.ids)


def beginning_of_text(folder: Path) -> str:
    """The token that begins a text, or nothing, as the tokenizer's configuration says."""
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        file = folder / name
        config: Any = read_json(file) if file.is_file() else {}
        if isinstance(config, dict) and "bos_token" in config:
            token = config["bos_token"]
            if isinstance(token, dict):
                token = token.get("content")
            if token is not None and not isinstance(token, str):
                raise CheckpointError(
                    f"bos_token is {token!r}; it must be a string or null", file=file
                )
            return token or ""
    return ""
