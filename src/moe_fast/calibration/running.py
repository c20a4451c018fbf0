"""Models run by transformers on this processor: without noise, and with one error if they fail."""

from __future__ import annotations

import contextlib
import ctypes
import sys
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from moe_fast.errors import CheckpointError, MoeFastError

LONGEST_REASON = 300
# What config.json may name and every processor has.
ATTENTION = ("eager", "sdpa")
ATTENTION_KEYS = ("attn_implementation", "_attn_implementation", "_attn_implementation_internal")


def read_settings(folder: Path, config: Mapping[str, Any]) -> Any:
    """transformers' own configuration of a model folder; `config` is that of config.json.

    Where it asks for attention that some graphics cards have, it gets the one that all have.
    """
    from transformers import AutoConfig

    settings = AutoConfig.from_pretrained(
        str(folder), local_files_only=True, trust_remote_code=False
    )
    inner = (value for value in config.values() if isinstance(value, Mapping))
    asked = [each.get(key) for each in (config, *inner) for key in ATTENTION_KEYS]
    if any(value is not None and value not in ATTENTION for value in asked):
        settings._attn_implementation = "eager"
    return settings


def return_memory() -> None:
    """Return memory that is free in this process to the system, where glibc is asked for it.

    glibc before 2.38 seldom uses aligned memory again, as torch takes it: without this, a model's
    memory would grow from layer to layer.
    """
    if sys.platform != "linux":
        return
    with contextlib.suppress(OSError, AttributeError):  # another library of C
        ctypes.CDLL(None).malloc_trim(0)


@contextlib.contextmanager
def running(where: Path, what: str) -> Iterator[None]:
    """Turn whatever transformers raises into one error about `where`, in one line.

    Raises
    ------
    CheckpointError
        `what`, such as `"transformers does not run it"`, and the reason.
    """
    try:
        with quiet_transformers():
            yield
    except (MoeFastError, MemoryError):
        raise
    except Exception as error:  # models raise what they like
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        if len(reason) > LONGEST_REASON:
            reason = f"{reason[:LONGEST_REASON]}..."
        raise CheckpointError(f"{what}: {reason}", file=where) from None


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """No progress bars and no warnings: what did not fit is asked for."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
