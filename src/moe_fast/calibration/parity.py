"""What a model makes of a text, and how far that is from what another one makes of it.

transformers runs the models, one after the other, in float32 on the processor: rounding in 16 bits
would hide small mistakes. That takes memory for 4 bytes a parameter.
"""

from __future__ import annotations

import gc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from moe_fast.calibration.running import read_settings, running
from moe_fast.calibration.tokenizer import PromptTokenizer
from moe_fast.errors import CheckpointError
from moe_fast.models.folder import read_config
from moe_fast.records import dataclass

MOST_TOKENS = 512
MOST_NAMES = 3
NOT_FITTING = ("missing_keys", "unexpected_keys", "mismatched_keys")


@dataclass(frozen=True)
class Difference:
    """How far the logits of two models are apart, over all tokens of a text."""

    num_tokens: int
    greatest: float
    scale: float
    """The greatest absolute logit of the first model."""
    same_choices: int
    """The tokens of the text for which both find the same next token the most likely."""

    @property
    def relative(self) -> float:
        """The greatest difference, relative to the scale."""
        return self.greatest / self.scale if self.scale else float(self.greatest > 0)

    def __str__(self) -> str:
        return (
            f"over {self.num_tokens} tokens, logits differ by at most {self.greatest:.2g} at a "
            f"scale of {self.scale:.3g}, the likeliest next token is the same for "
            f"{self.same_choices} of {self.num_tokens}"
        )


def installed_transformers() -> str:
    """The reader that the installed transformers is, such as `"transformers 5"`.

    Raises
    ------
    ModuleNotFoundError
        Without transformers or torch.
    """
    try:
        import torch  # noqa: F401
        import transformers
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"running models needs {error.name}: pip install torch transformers", name=error.name
        ) from None
    return f"transformers {transformers.__version__.partition('.')[0]}"


def tokens_of(text: str, model: Path, reference: Path) -> list[int]:
    """The first 512 tokens of a text, by the tokenizer of a model, or else of its reference.

    Raises
    ------
    CheckpointError
        Without a tokenizer, or a token in the text.
    ModuleNotFoundError
        Without tokenizers.
    """
    tokenizer = PromptTokenizer(model if (model / "tokenizer.json").is_file() else reference)
    tokens = tokenizer.tokens(text)[:MOST_TOKENS]
    if not tokens:
        raise CheckpointError("finds no token in the text", file=tokenizer.file)
    return tokens


def compare_logits(reference: Path, model: Path, tokens: Sequence[int]) -> Difference:
    """Run some tokens through two model folders.

    Raises
    ------
    CheckpointError
        A model that transformers does not load whole.
    """
    expected, found = compute_logits(reference, tokens), compute_logits(model, tokens)
    if expected.shape != found.shape:
        raise CheckpointError(
            f"gives {found.shape[1]} logits a token, {reference} {expected.shape[1]}", file=model
        )
    return Difference(
        num_tokens=len(tokens),
        greatest=float(np.abs(found - expected).max()),
        scale=float(np.abs(expected).max()),
        same_choices=int((found.argmax(axis=1) == expected.argmax(axis=1)).sum()),
    )


def compute_logits(folder: Path, tokens: Sequence[int]) -> npt.NDArray[np.float32]:
    """The logits of a model folder, `(T, vocab_size)`."""
    import torch
    from transformers import AutoModelForCausalLM

    load: Any = AutoModelForCausalLM.from_pretrained
    with running(folder, "transformers does not load it"):
        model, info = load(
            str(folder),
            config=read_settings(folder, read_config(folder)),
            dtype=torch.float32,
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    problems = [f"{kind.partition('_')[0]} {name}" for kind in NOT_FITTING for name in info[kind]]
    if problems:
        more = f" and {len(problems) - MOST_NAMES} more" if len(problems) > MOST_NAMES else ""
        raise CheckpointError(
            f"transformers does not load it whole: "
            f"{', '.join(sorted(problems)[:MOST_NAMES])}{more}",
            file=folder,
        )
    with running(folder, "transformers does not run it"), torch.inference_mode():
        logits: npt.NDArray[np.float32] = (
            model.eval()(torch.tensor([tokens]), use_cache=False).logits[0].numpy()
        )
    del model
    gc.collect()  # before the next one is loaded
    return logits
