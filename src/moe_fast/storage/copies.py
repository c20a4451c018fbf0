"""Which weights are copies of each other, told by their bytes and nothing else."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Sequence

from moe_fast.storage.files import OpenFiles
from moe_fast.storage.safetensors_header import Tensor

SAMPLE = 512
MEMORY = 64 * 1024 * 1024
Weights = Sequence[Tensor]


def equal_groups(candidates: Sequence[Weights]) -> list[list[int]]:
    """Which of the candidates, each a sequence of tensors, hold the same bytes.

    Groups of two or more indices, in order. Sizes are compared first, then a few bytes of each
    tensor, and only what is still alike is read through: side by side, each byte once, in chunks
    that take 64 MiB together, dropping whatever turns out to differ.

    Raises
    ------
    CheckpointError
        A file that ends while being read.
    """
    with OpenFiles() as files:
        by_sample: dict[Hashable, list[int]] = defaultdict(list)
        for index, weights in enumerate(candidates):
            by_sample[sample(weights, files)].append(index)
        groups = [group for group in by_sample.values() if len(group) > 1]
        for position in range(max((len(weights) for weights in candidates), default=0)):
            groups = [
                [members[i] for i in part]
                for members in groups
                for part in refined([candidates[m][position] for m in members], files)
            ]
    return sorted(groups)


def sample(weights: Weights, files: OpenFiles) -> Hashable:
    """The shape and a few bytes of each tensor: its start, its middle and its end."""
    parts: list[Hashable] = []
    for tensor in weights:
        parts += [tensor.dtype, tensor.shape]
        for start in (0, tensor.nbytes // 2, max(tensor.nbytes - SAMPLE, 0)):
            count = min(SAMPLE, tensor.nbytes - start)
            parts.append(bytes(files.read(tensor.file, tensor.offset + start, count)))
    return tuple(parts)


def refined(tensors: Weights, files: OpenFiles) -> list[list[int]]:
    """Indices of tensors of one size, in groups of two or more with equal bytes."""
    groups = [list(range(len(tensors)))]
    nbytes = tensors[0].nbytes
    chunk = max(MEMORY // len(tensors), 64 * 1024)
    for start in range(0, nbytes, chunk):
        count = min(chunk, nbytes - start)
        parts: list[list[int]] = []
        for group in groups:
            distinct: list[tuple[bytearray, list[int]]] = []
            for index in group:
                tensor = tensors[index]
                data = files.read(tensor.file, tensor.offset + start, count)
                for seen, members in distinct:
                    if seen == data:
                        members.append(index)
                        break
                else:
                    distinct.append((data, [index]))
            parts += [members for _, members in distinct if len(members) > 1]
        groups = parts
    return groups
