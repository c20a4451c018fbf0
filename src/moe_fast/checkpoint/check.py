"""Is what was written right? Reads a built checkpoint back and compares it with its sources."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from moe_fast.checkpoint.build import prepare
from moe_fast.checkpoint.header import Tensor, read_checkpoint
from moe_fast.checkpoint.manifest import read_manifest
from moe_fast.checkpoint.pieces import FileRange
from moe_fast.checkpoint.table import Weight
from moe_fast.errors import CheckpointError
from moe_fast.reports import Report

__all__ = ["CheckReport", "check_moe"]


@dataclass(frozen=True)
class CheckReport(Report):
    """How many tensors were compared, byte for byte, and every difference found."""

    num_tensors: int
    num_experts_compared: int
    problems: tuple[str, ...]

    @property
    def passed(self) -> bool:
        return not self.problems


def check_moe(output: str | os.PathLike[str]) -> CheckReport:
    """Compare a checkpoint that `build_moe` wrote with what its sources give, byte for byte.

    Raises
    ------
    CheckpointError
        A folder without the manifest, headers that do not hold, sources that are gone.
    """
    folder = Path(output)
    blueprint = prepare(read_manifest(folder).request)
    tensors = read_checkpoint(folder)
    expected = dict(blueprint.tensors)
    problems = [f"{folder}: tensor {name!r} is missing" for name in expected if name not in tensors]
    for name, tensor in tensors.items():
        where = f"{tensor.file.path}: tensor {name!r}"
        if name not in expected:
            problems.append(f"{where} is none that was asked for")
        elif (difference := first_difference(tensor, expected[name])) is not None:
            problems.append(f"{where}: {difference}")
    plan = blueprint.construction.plan
    return CheckReport(len(tensors), plan.num_layers * plan.num_experts, tuple(problems))


def first_difference(tensor: Tensor, weight: Weight) -> str | None:
    """How a written tensor differs from the pieces it was made of; `None` where it does not."""
    if (tensor.dtype, tensor.shape) != (weight.dtype, weight.shape):
        return (
            f"{tensor.dtype} of shape {list(tensor.shape)} where "
            f"{weight.dtype} of shape {list(weight.shape)} was asked for"
        )
    position = 0
    with Path(tensor.file.path).open("rb", buffering=0) as stream:
        stream.seek(tensor.offset)
        for piece in weight.pieces:
            for chunk in piece.chunks():
                written = read_exactly(stream, len(chunk), tensor.file.path)
                if written != chunk:  # a bytearray on the left compares with anything by memcmp
                    pairs = enumerate(zip(written, chunk, strict=True), start=position)
                    byte = next(i for i, (left, right) in pairs if left != right)
                    origin = piece.file.path if isinstance(piece, FileRange) else "what was made"
                    return f"differs from {origin} at byte {byte} of {tensor.nbytes}"
                position += len(chunk)
    return None


def read_exactly(stream: BinaryIO, count: int, path: str) -> bytearray:
    data = bytearray(count)
    view = memoryview(data)
    while view:
        read = stream.readinto(view)  # type: ignore[attr-defined]
        if not read:
            raise CheckpointError(f"{path}: ended at byte {stream.tell()} while being read")
        view = view[read:]
    return data
