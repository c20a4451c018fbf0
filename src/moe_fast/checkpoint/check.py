"""Is what was written right? Reads a built checkpoint back and compares it with its sources."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from moe_fast.checkpoint.build import MANIFEST
from moe_fast.checkpoint.header import Tensor, read_checkpoint, read_json
from moe_fast.checkpoint.source import open_dense_model
from moe_fast.checkpoint.targets import TARGETS
from moe_fast.errors import CheckpointError

__all__ = ["CheckReport", "check_moe"]

CHUNK = 8 * 1024 * 1024


@dataclass(frozen=True)
class CheckReport:
    """How many tensors were compared, byte for byte, and every difference found."""

    num_tensors: int
    num_experts_compared: int
    problems: tuple[str, ...]

    @property
    def passed(self) -> bool:
        return not self.problems


def check_moe(output: str | os.PathLike[str]) -> CheckReport:
    """Compare every expert of a checkpoint that `build_moe` wrote with its source, byte for byte.

    Raises
    ------
    CheckpointError
        A folder without the manifest, headers that do not hold, sources that are gone.
    """
    folder = Path(output)
    manifest = read_json(folder / MANIFEST)
    if not isinstance(manifest, dict) or manifest.get("target") not in TARGETS:
        raise CheckpointError(f"{folder / MANIFEST}: names no known target")
    target = TARGETS[manifest["target"]]
    tensors = read_checkpoint(folder)
    opened = {path: open_dense_model(path) for path in set(manifest["sources"])}
    sources = [opened[path] for path in manifest["sources"]]
    problems = []
    compared = 0
    layers = zip(manifest["source_model"], manifest["source_layer"], strict=True)
    for layer, (models, source_layers) in enumerate(layers):
        for expert, (model, source_layer) in enumerate(zip(models, source_layers, strict=True)):
            for name, role in target.expert_tensor_names(layer, expert):
                source = sources[model].ffn(source_layer, role)
                if name not in tensors:
                    problems.append(f"{folder}: tensor {name!r} is missing")
                elif not same_bytes(tensors[name], source):
                    problems.append(
                        f"{tensors[name].file.path}: tensor {name!r} differs from {source.name!r} "
                        f"of {source.file.path}"
                    )
            compared += 1
    return CheckReport(len(tensors), compared, tuple(problems))


def same_bytes(left: Tensor, right: Tensor) -> bool:
    if (left.dtype, left.shape) != (right.dtype, right.shape):
        return False
    return all(a == b for a, b in zip(chunks(left), chunks(right), strict=True))


def chunks(tensor: Tensor) -> Iterator[bytes]:
    with Path(tensor.file.path).open("rb") as stream:
        stream.seek(tensor.offset)
        left = tensor.nbytes
        while left:
            chunk = stream.read(min(left, CHUNK))
            if not chunk:
                raise CheckpointError(f"{tensor.file.path}: ended inside tensor {tensor.name!r}")
            left -= len(chunk)
            yield chunk
