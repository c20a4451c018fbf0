"""Neurons of one feed-forward network in clusters of equal size, by what their gates read.

Balanced k-means as in LLaMA-MoE (Zhu et al. 2024, arXiv 2406.16554): rows of `gate_proj`, each of
length 1; every cluster takes as many. The sums are those of our own kernel, in a fixed order, and
the assignment is one of integers, so that every machine finds the same clusters.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from moe_fast import kernels
from moe_fast.checkpoint.neurons import shuffle
from moe_fast.dtypes import ITEM_SIZES
from moe_fast.errors import CheckpointError
from moe_fast.storage.floats import decode
from moe_fast.storage.pieces import CHUNK, read_in_blocks
from moe_fast.storage.tensors import Weight

Labels = npt.NDArray[np.int64]
Rows = npt.NDArray[np.float32]
MOST_ROUNDS = 10
# Distances of rows of length 1 are at most 4; as integers of this unit their sums are exact.
UNITS = 2.0**40


def cluster_neurons(gate: Weight, num_clusters: int, stream: int) -> Labels:
    """The cluster of each neuron, `(intermediate_size,)`.

    `gate` is a `gate_proj`; it is read a block of rows at a time, twice a round. The first
    centroids are rows that `stream` chooses.
    """
    width, hidden = gate.shape
    lengths = np.concatenate([row_lengths(block) for block in read_rows(gate)])
    scales = np.divide(1, lengths, out=np.zeros_like(lengths), where=lengths > 0)
    first = np.sort(shuffle(width, stream)[:num_clusters])
    centroids = np.empty((num_clusters, hidden), np.float32)
    for start, block in unit_rows(gate, scales):
        here = (first >= start) & (first < start + len(block))
        centroids[here] = block[first[here] - start]
    labels: Labels | None = None
    for _ in range(MOST_ROUNDS):
        costs = np.empty((width, num_clusters), np.float32)
        squares = row_lengths(centroids) ** 2
        across = np.ascontiguousarray(centroids.T)
        for start, block in unit_rows(gate, scales):
            cost = np.tile(squares.astype(np.float32), (len(block), 1))
            kernels.compiled.add_product(block, across, -2.0, cost)
            costs[start : start + len(block)] = cost
        found = assign_evenly(costs)
        if labels is not None and (found == labels).all():
            break
        labels = found
        members = np.zeros((num_clusters, width), np.float32)
        members[labels, np.arange(width)] = num_clusters / width
        centroids = np.zeros_like(centroids)
        for start, block in unit_rows(gate, scales):
            part = np.ascontiguousarray(members[:, start : start + len(block)])
            kernels.compiled.add_product(part, block, 1.0, centroids)
    assert labels is not None
    return labels


def read_rows(gate: Weight) -> Iterator[Rows]:
    """The rows of a matrix, some at a time."""
    row = gate.shape[1] * ITEM_SIZES[gate.dtype]
    for block in read_in_blocks(gate.pieces, max(1, CHUNK // row) * row):
        yield decode(block, gate.dtype).reshape(-1, gate.shape[1])


def unit_rows(gate: Weight, scales: npt.NDArray[np.float64]) -> Iterator[tuple[int, Rows]]:
    """The same with each row of length 1, behind the number of the first."""
    start = 0
    for block in read_rows(gate):
        block *= scales[start : start + len(block), np.newaxis].astype(np.float32)
        yield start, block
        start += len(block)


def row_lengths(rows: Rows) -> npt.NDArray[np.float64]:
    """The Euclidean lengths, their squares added up in the order of the columns."""
    squares = np.add.accumulate(rows.astype(np.float64) ** 2, axis=1)[:, -1]
    lengths: npt.NDArray[np.float64] = np.sqrt(squares)
    return lengths


def assign_evenly(costs: Rows) -> Labels:
    """The column of each row, every column as often, at the least sum of costs.

    Successive shortest paths (Ahuja, Magnanti and Orlin 1993, section 9.7) over the columns: all
    rows begin at their best one, and those that are too full hand rows on to those that are not. An
    edge from a column to another costs what the row that moves most cheaply loses.
    """
    count, columns = costs.shape
    size = count // columns
    units = np.round(np.nan_to_num(costs.astype(np.float64)) * UNITS).astype(np.int64)
    labels: Labels = units.argmin(axis=1)
    far = np.int64(2**61)
    edges = np.full((columns, columns), far)
    movers = np.zeros((columns, columns), np.int64)

    def renew(column: int) -> None:
        rows = np.flatnonzero(labels == column)
        edges[column] = far
        if len(rows):
            losses = units[rows] - units[rows, column][:, np.newaxis]
            best = losses.argmin(axis=0)
            edges[column] = losses[best, np.arange(columns)]
            movers[column] = rows[best]
        edges[column, column] = far

    for column in range(columns):
        renew(column)
    counts = np.bincount(labels, minlength=columns)
    while (counts > size).any():
        distances = np.where(counts > size, np.int64(0), far)
        before = np.full(columns, -1)
        for _ in range(columns):
            sums = np.minimum(distances[:, np.newaxis] + edges, far)
            shorter = sums.min(axis=0) < distances
            if not shorter.any():
                break
            before[shorter] = sums.argmin(axis=0)[shorter]
            distances = np.where(shorter, sums.min(axis=0), distances)
        to = int(np.where(counts < size, distances, far).argmin())
        counts[to] += 1
        path = [to]
        while before[path[-1]] >= 0:
            path.append(int(before[path[-1]]))
        for column, origin in itertools.pairwise(path):
            labels[movers[origin, column]] = column
        counts[path[-1]] -= 1
        for column in path:
            renew(column)
    return labels


def write_labels(labels: Labels) -> str:
    """The clusters as a manifest keeps them."""
    return " ".join(map(str, labels.tolist()))


def read_labels(text: object, width: int, num_clusters: int) -> Labels:
    """The clusters that a manifest keeps, which may hold anything."""
    try:
        labels = np.array([int(part) for part in str(text).split()], np.int64)
    except (ValueError, OverflowError):
        labels = np.zeros(0, np.int64)
    even = np.full(num_clusters, width // num_clusters)
    inside = labels.size == width and labels.min() >= 0 and labels.max() < num_clusters
    if not inside or (np.bincount(labels, minlength=num_clusters) != even).any():
        raise CheckpointError(
            f"clusters must give each of {width} neurons one of {num_clusters}, all as often"
        )
    return labels
