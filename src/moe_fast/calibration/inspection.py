"""`inspect_model`: what is in a model folder, and what its routers do with text."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from moe_fast.calibration.rerouted import stream_moe_inputs
from moe_fast.calibration.selection import select_tokens
from moe_fast.calibration.texts import TokenArrays, TokenSequences, both_given
from moe_fast.checks import as_index
from moe_fast.errors import MoeConfigError
from moe_fast.models.inspection import ModelReport, look_into
from moe_fast.models.moe import MoeModel, require_experts
from moe_fast.request import as_texts

__all__ = ["inspect_model"]


def inspect_model(
    path: str | os.PathLike[str],
    *,
    copies: bool = True,
    hidden_states: npt.ArrayLike | None = None,
    texts: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] = (),
    tokens: TokenArrays | None = None,
    tokens_used: int | None = None,
    device: str = "cpu",
) -> ModelReport:
    """Inspect a model folder, MoE or dense, made by any tool.

    Nearly everything comes from headers; routers are read completely. Experts are read only to find
    copies, as far as they are equal, and to run text through the model.

    Parameters
    ----------
    path : path
        The folder.
    copies : bool
        Whether to look for experts that are copies of each other.
    hidden_states : array_like, shape (T, H) or (L, T, H), optional
        The inputs of the routers of the L layers with experts, on which their load is predicted; by
        default those of 1024 random tokens.
    texts, tokens, tokens_used, device
        Instead of hidden states, texts to run the model on, as in `build_moe`. transformers runs
        it, with one layer's attention and one expert in memory at a time.

    Returns
    -------
    ModelReport

    Raises
    ------
    CheckpointError
        If the folder contains no model, or a header is invalid.
    MoeConfigError
        If `hidden_states` do not have the shape of the routers' inputs, or are given together with
        text.
    ModuleNotFoundError
        If text is given, but torch or transformers is not installed.

    Examples
    --------
    >>> from moe_fast import MoeConfig, build_moe, inspect_model, make_dense_model
    >>> import tempfile
    >>> folder = tempfile.mkdtemp()
    >>> make_dense_model(f"{folder}/dense", seed=0)
    >>> _ = build_moe(f"{folder}/dense", f"{folder}/moe", MoeConfig(num_experts=4))
    >>> report = inspect_model(f"{folder}/moe")
    >>> report.model_type, report.num_experts, report.num_moe_layers
    ('mixtral', 4, 2)
    >>> report.copies[0]
    ((0, 0), (0, 1), (0, 2), (0, 3))
    """
    found = as_texts(texts)
    if not found and tokens is None:
        return look_into(path, copies=copies, hidden_states=hidden_states)
    if hidden_states is not None:
        raise MoeConfigError("hidden_states, or texts or tokens, are what the routers read")
    if found and tokens is not None:
        raise both_given()
    used = None if tokens_used is None else as_index(tokens_used, "tokens_used", minimum=1)

    def read_inputs(model: MoeModel) -> Iterator[npt.NDArray[np.float32]]:
        require_experts(model)
        chosen: Any = select_tokens(
            model.path, model.language_config, 0, texts=found, tokens=tokens, tokens_used=used
        )
        sequences = TokenSequences(chosen.sequences)
        stream = stream_moe_inputs(model, sequences, {}, device=device, needed_by="reading texts")
        return (inputs for _, inputs in stream)

    return look_into(path, copies=copies, read_inputs=read_inputs)
