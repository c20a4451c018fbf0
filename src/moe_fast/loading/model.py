"""A model filled with the weights of a design, no file between."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from moe_fast.checkpoint.design import Design
from moe_fast.dtypes import ITEM_SIZES
from moe_fast.errors import CheckpointError
from moe_fast.loading.names import match_weights
from moe_fast.loading.shards import find_ranges, is_distributed
from moe_fast.loading.tensors import fill
from moe_fast.models.buffers import initialize_buffers
from moe_fast.storage.files import OpenFiles, open_regular
from moe_fast.wording import format_count


def load_into(
    model: nn.Module, design: Design, *, device: torch.device | str | None = None
) -> None:
    """Fill a model's parameters with the weights of a design; nothing is written.

    The model is one of transformers, on the meta device or already allocated, whole or sharded: by
    FSDP2's `fully_shard`, by transformers' expert parallelism, or by any other placement of
    DTensors. Each process reads only the bytes of its own shards, and needs no additional memory.
    Wrap a model in DDP, or compile it, afterwards.

    The key mapping of transformers assigns tensors to parameters. They are converted to the
    parameters' dtypes, as by `from_pretrained`. Weights are tied as the model's configuration says.
    Buffers that no checkpoint holds, such as the frequencies of rotary embeddings, are computed as
    transformers computes them.

    Parameters
    ----------
    model : torch.nn.Module
        A model with the parameter names and shapes of the design.
    design : Design
        What `design_moe` returns.
    device : torch.device or str, optional
        The device for parameters that are on the meta device: by default, the device of their mesh
        for shards, and torch's default device for all others. Other parameters stay on their
        device.

    Raises
    ------
    CheckpointError
        If sources have changed since the design was made, tensors or parameters have no
        counterpart, or shapes differ; nothing has been filled then. If a source changes while it is
        read, parameters on the meta device stay there.

    Examples
    --------
    >>> import moe_fast.torch, torch
    >>> from moe_fast import MoeConfig, design_moe, make_dense_model
    >>> from transformers import AutoConfig, AutoModelForCausalLM
    >>> make_dense_model("dense", seed=0)
    >>> design = design_moe("dense", MoeConfig(num_experts=4))
    >>> config = AutoConfig.for_model(**design.config)
    >>> with torch.device("meta"):
    ...     model = AutoModelForCausalLM.from_config(config)
    >>> moe_fast.torch.load_into(model, design)
    >>> model.model.layers[0].mlp.experts.gate_up_proj.shape
    torch.Size([4, 256, 64])
    """
    if hasattr(model, "tie_weights"):
        model.tie_weights()  # what was made or sharded without, as transformers does after loading
    state = {
        name: value
        for name, value in model.state_dict(keep_vars=True).items()
        if isinstance(value, Tensor)
    }
    check_sources(design)
    weights = match_weights(model, state, design)
    beside = next(filter(is_distributed, state.values()), next(iter(state.values())))
    initialize_buffers(model, state, choose_device(beside, device))

    filled: dict[int, Tensor] = {}
    with OpenFiles() as files, noting_a_half_filled_model(state):
        for name, weight in weights.items():
            parameter = state[name]
            held = allocate(parameter, device)
            overflow = fill(held, weight, find_ranges(parameter, ITEM_SIZES[weight.dtype]), files)
            if overflow:
                warnings.warn(
                    f"parameter {name!r}: {format_count(overflow, 'finite weight')} became "
                    f"infinite in {parameter.dtype}",
                    stacklevel=2,
                )
            filled[id(parameter)] = parameter if has_memory(parameter) else wrap(held, parameter)
        files.check_unchanged()
    # FSDP2 takes note of parameters that are given to the model this way.
    fresh = {name: filled[id(value)] for name, value in state.items() if not has_memory(value)}
    model.load_state_dict(fresh, strict=False, assign=True)


def check_sources(design: Design) -> None:
    """Raise `CheckpointError` for every source that is no longer as it was."""
    problems: list[str] = []
    for file in design.source_files():
        try:
            stream = open_regular(Path(file.path))
        except CheckpointError as error:
            problems += error.problems
            continue
        with stream:
            try:
                file.check_unchanged(stream)
            except CheckpointError:
                problems.append(f"{file.path}: changed since the design was made")
    if problems:
        raise CheckpointError(*problems)


@contextmanager
def noting_a_half_filled_model(state: Mapping[str, Tensor]) -> Iterator[None]:
    """Adds to an error that parameters which had memory before may hold new weights."""
    try:
        yield
    except BaseException as error:
        if any(has_memory(value) for value in state.values()):
            error.add_note("Some parameters of the model may hold new weights, others old ones.")
        raise


def held_part(parameter: Tensor) -> Tensor:
    """What this process holds of a parameter, in the same memory."""
    detached = parameter.detach()
    return detached.to_local() if is_distributed(detached) else detached


def has_memory(parameter: Tensor) -> bool:
    return not held_part(parameter).is_meta


def allocate(parameter: Tensor, device: torch.device | str | None) -> Tensor:
    """The part that this process holds: the memory that it has, or new one."""
    part = held_part(parameter)
    if not part.is_meta:
        return part
    return torch.empty(part.shape, dtype=part.dtype, device=choose_device(parameter, device))


def choose_device(parameter: Tensor, device: torch.device | str | None) -> torch.device:
    """Where memory is made for a parameter, or for what stands beside it."""
    if device is not None:
        return torch.device(device)
    if has_memory(parameter):
        return held_part(parameter).device
    if is_distributed(parameter):
        return torch.device(parameter.device_mesh.device_type)
    default = torch.get_default_device()
    return torch.device("cpu") if default.type == "meta" else default


def wrap(held: Tensor, parameter: Tensor) -> Tensor:
    """The part that this process holds, as the same kind of tensor as the parameter."""
    whole = held
    if is_distributed(parameter):
        from torch.distributed.tensor import DTensor

        whole = DTensor.from_local(
            held,
            parameter.device_mesh,
            parameter.placements,
            run_check=False,
            shape=parameter.shape,
            stride=parameter.stride(),
        ).to(held.device)  # back from the mesh's device, where FSDP keeps weights on the CPU
    if isinstance(parameter, nn.Parameter):
        return nn.Parameter(whole, requires_grad=parameter.requires_grad)
    return whole
