"""The order of a file's tensors: most bytes lie in blocks as in their sources."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from moe_fast.storage.block_order import BLOCK, find_start
from moe_fast.storage.files import SourceFile
from moe_fast.storage.pieces import FileRange, Zeros
from moe_fast.storage.tensors import OutputTensor, Weight, in_block_order

WHOLE = 512 * BLOCK  # bytes of a matrix
FILE = SourceFile("source", 10**12, 0, "")


def of_file(name: str, offset: int, *sizes: int) -> OutputTensor:
    """A tensor of bytes, of pieces that stand one after the other in the source."""
    pieces = []
    for size in sizes:
        pieces.append(FileRange(FILE, offset, size))
        offset += size
    return OutputTensor(name, Weight("U8", (sum(sizes),), tuple(pieces)))


def made(name: str, size: int) -> OutputTensor:
    return OutputTensor(name, Weight("U8", (size,), (Zeros(size),)))


def count_in_place(tensors) -> int:
    """The bytes that lie in their blocks as in the source, counted one tensor after the other."""
    position, _ = find_start(tensor.weight.pieces for tensor in tensors)
    count = 0
    for tensor in tensors:
        for piece in tensor.weight.pieces:
            if isinstance(piece, FileRange) and piece.nbytes >= BLOCK:
                count += piece.nbytes * ((piece.offset - position) % BLOCK == 0)
            position += piece.nbytes
    return count


def model(norm: int, layers: int, matrices: int = 5) -> list[OutputTensor]:
    """A source's tensors in their order, matrices of whole blocks and norms between them."""
    tensors, offset = [], 904
    for layer in range(layers):
        for number in range(matrices):
            tensors.append(of_file(f"{layer}.{number}", offset, 3 * WHOLE))
            offset += 3 * WHOLE
        tensors.append(of_file(f"{layer}.norm", offset, norm))
        offset += norm
    return tensors


def test_a_source_in_its_own_order_stays_in_it():
    tensors = model(1152, 40)
    assert in_block_order(tensors) == tensors
    assert count_in_place(tensors) == 40 * 5 * 3 * WHOLE


@pytest.mark.parametrize("norm", [1152, 640, 2048, 8])
def test_copies_of_matrices_share_their_blocks(norm):
    """As in a build: each matrix several times, and routers between."""
    tensors = []
    for tensor in model(norm, 40):
        layer, _, number = tensor.name.partition(".")
        copies = 1 if number == "norm" else 3
        tensors += [OutputTensor(f"{tensor.name}.{i}", tensor.weight) for i in range(copies)]
        if number == "norm":
            tensors.append(made(f"{layer}.router", 1024))
    ordered = in_block_order(tensors)
    assert sorted(t.name for t in ordered) == sorted(t.name for t in tensors)
    assert count_in_place(tensors) < 40 * 15 * 3 * WHOLE
    assert count_in_place(ordered) == 40 * 15 * 3 * WHOLE


def test_whole_blocks_stay_as_they_are():
    tensors = [*model(BLOCK, 9), made("router", 2 * BLOCK), *model(BLOCK, 2)]
    assert in_block_order(tensors) == tensors


def test_a_tensor_of_several_pieces_begins_as_its_first():
    tensors = [made("a", 3000), of_file("b", 4096 + 512, WHOLE, WHOLE), made("c", 584)]
    tensors.append(of_file("d", 8192, WHOLE))
    ordered = in_block_order(tensors)
    assert count_in_place(ordered) == 3 * WHOLE


@pytest.mark.parametrize("seed", range(20))
def test_any_tensors_are_all_there_and_lie_no_worse(seed):
    rng = random.Random(seed)
    tensors = []
    for number in range(rng.randrange(1, 60)):
        size = rng.choice([2, 24, 1000, BLOCK, 3 * WHOLE, 5000, 2 * WHOLE + 8])
        offset = rng.choice([0, 8, 512, 1024, 4104, 3])
        name = str(number)
        tensors.append(of_file(name, offset, size) if rng.random() < 0.7 else made(name, size))
    ordered = in_block_order(tensors)
    assert sorted(t.name for t in ordered) == sorted(t.name for t in tensors)
    assert count_in_place(ordered) >= count_in_place(tensors)


def test_a_few_blocks_change_no_order():
    """A checkpoint of a tiny model is the same whatever it was made from."""
    tensors = [of_file("a", 8, BLOCK), of_file("b", 512, BLOCK), made("c", 504)]
    assert in_block_order(tensors) == tensors


def test_no_tensors():
    assert in_block_order([]) == []


def test_the_search_ends(tmp_path: Path):
    """Sizes that lead nowhere: some groups are not reached."""
    tensors = [of_file(str(i), 8 * i, WHOLE) for i in range(500)]
    ordered = in_block_order(tensors)
    assert len(ordered) == 500
    assert count_in_place(ordered) == WHOLE
