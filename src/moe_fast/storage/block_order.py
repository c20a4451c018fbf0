"""The order of a file's tensors in which most bytes lie in blocks as in their source.

Only such bytes can be moved by whole pages, and shared by file systems that share blocks. Behind a
tensor of whole blocks, the next one begins at the same place of a block; a norm of 576 numbers in
16 bits moves that by 1152 bytes. The format allows no gaps, so tensors that begin at the same place
of a block stand together here, and small ones between the groups.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Sequence

from moe_fast.storage.pieces import FileRange, Piece

BLOCK = 4096  # bytes: the page of most processors and the block of most file systems
ALIGNMENT = 8  # of where the data of a file begins, as the format asks
LEAST_GAIN = 1 << 20  # bytes, for less of which tensors stay in the order given
MOST_SEARCHES = 256  # for the next group, each of at most BLOCK / ALIGNMENT places

Pieces = Sequence[Piece]
"""What a tensor consists of, one after the other."""


def find_start(tensors: Iterable[Pieces]) -> tuple[int, int]:
    """Where in a block the data best begins, and how many bytes then lie as in their source."""
    votes: Counter[int] = Counter()
    position = 0
    for pieces in tensors:
        for piece in pieces:
            if isinstance(piece, FileRange) and piece.nbytes >= BLOCK:
                votes[(piece.offset - position) % BLOCK] += piece.nbytes
            position += piece.nbytes
    aligned = {start: nbytes for start, nbytes in votes.items() if start % ALIGNMENT == 0}
    start = max(aligned, key=lambda start: aligned[start], default=0)
    return start, votes[start]


def find_block_order(tensors: Sequence[Pieces]) -> list[int]:
    """The numbers of the tensors in an order in which most bytes lie as in their source.

    The order given, if all but a few do so there.
    """
    given = list(range(len(tensors)))
    _, nbytes = find_start(tensors)
    wanted = [find_place(pieces) for pieces in tensors]
    if sum(nbytes for _, nbytes in wanted) < nbytes + LEAST_GAIN:
        return given
    order = arrange([sum([piece.nbytes for piece in pieces]) for pieces in tensors], wanted)
    _, ordered = find_start([tensors[number] for number in order])
    return order if ordered >= nbytes + LEAST_GAIN else given


def find_place(pieces: Pieces) -> tuple[int, int]:
    """`find_start` of one tensor, which mostly is one piece."""
    first, *others = pieces
    if others:
        return find_start([pieces])
    if not isinstance(first, FileRange) or first.nbytes < BLOCK or first.offset % ALIGNMENT:
        return 0, 0
    return first.offset % BLOCK, first.nbytes


def arrange(lengths: Sequence[int], wanted: Sequence[tuple[int, int]]) -> list[int]:
    """The numbers of the tensors, those that begin at the same place of a block together.

    `lengths` are their bytes; `wanted` has the place of each, and how many of its bytes lie right
    there: if none, it may stand anywhere.
    """
    steps = [length % BLOCK for length in lengths]
    groups: dict[int, deque[int]] = {}
    fillers: dict[int, deque[int]] = {}  # by how far they move what follows
    sizes: Counter[int] = Counter()
    # In a group, those that move the place come last: they lead to another group.
    for number in sorted(range(len(lengths)), key=lambda number: steps[number] != 0):
        place, nbytes = wanted[number]
        kind, key = (groups, place) if nbytes else (fillers, steps[number])
        kind.setdefault(key, deque()).append(number)
        sizes[place] += nbytes
    order = list(fillers.pop(0, ()))
    place = max(sizes, key=sizes.__getitem__)
    for _ in range(MOST_SEARCHES):
        while group := groups.get(place, deque()):
            order.append(group.popleft())
            place = (place + steps[order[-1]]) % BLOCK
        path = find_path(place, groups, fillers)
        if path is None:
            break
        for step in path:
            order.append(fillers[step].popleft())
            place = (place + step) % BLOCK
    return order + sorted({*range(len(lengths))} - {*order})


def find_path(
    place: int, groups: dict[int, deque[int]], fillers: dict[int, deque[int]]
) -> list[int] | None:
    """The fewest steps of fillers to a place where a group of tensors wants to begin."""
    paths: dict[int, list[int]] = {place: []}
    queue = deque([place])
    while queue:
        here = queue.popleft()
        path = paths[here]
        if groups.get(here):
            return path
        for step, left in fillers.items():
            there = (here + step) % BLOCK
            if there not in paths and path.count(step) < len(left):
                paths[there] = [*path, step]
                queue.append(there)
    return None
