"""A design: every tensor and every file of an output, before any is written.

An operation turns its request into a design, and registers how with `design_of.register`. Writing,
dry runs, resuming, the manifest and `check_moe` act on the design alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import field, replace
from functools import cached_property, singledispatch
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from moe_fast.checkpoint.card import CARD
from moe_fast.checkpoint.manifest import Manifest, SourceRecord
from moe_fast.checkpoint.output import (
    Writing,
    find_lack_of_space,
    find_obstacles,
    planned_records,
    write_output,
)
from moe_fast.checks import as_path
from moe_fast.config import Dtype
from moe_fast.dtypes import DTYPE_CODES, DTYPE_NAMES, as_stored_dtype
from moe_fast.errors import ArgumentTypeError, CheckpointError, MoeConfigError
from moe_fast.records import dataclass
from moe_fast.request import DEFAULT_SHARD_SIZE, ModelPath, Request
from moe_fast.storage.files import SourceFile
from moe_fast.storage.safetensors_header import Tensor
from moe_fast.storage.strict_json import json_text
from moe_fast.storage.tensors import (
    FORMAT,
    Shard,
    Weight,
    index_json,
    plan_shards,
    whole_bytes,
)
from moe_fast.storage.writer import FileRecord

Facts = Mapping[str, Any]


@dataclass(frozen=True)
class Design:
    """A checkpoint that is not written: its tensors can be listed, read, and written to disk.

    Examples
    --------
    >>> from moe_fast import MoeConfig, design_moe, make_dense_model
    >>> import tempfile
    >>> folder = tempfile.mkdtemp()
    >>> make_dense_model(f"{folder}/dense", seed=0)
    >>> design = design_moe(f"{folder}/dense", MoeConfig(num_experts=4))
    >>> design.names()[:2]
    ['model.embed_tokens.weight', 'model.layers.0.self_attn.q_proj.weight']
    >>> router = "model.layers.0.block_sparse_moe.gate.weight"
    >>> design.shape(router), design.dtype(router)
    ((4, 64), 'float32')
    >>> design.read(router, rows=slice(0, 2)).shape
    (2, 64)
    """

    weights: Mapping[str, Weight] = field(repr=False)
    """Each tensor's bytes by its name, in the order in which they will be stored."""
    config: Mapping[str, Any] = field(repr=False)
    """The output's config.json."""
    companions: Mapping[str, Path] = field(repr=False)
    """Files to copy as they are, by their path in the output: the tokenizer, for instance."""
    sources: Sequence[Mapping[str, Tensor]] = field(repr=False)
    """The tensors of every model that it is made from."""
    family: str
    """The output's model_type."""
    num_experts: int
    """In all layers together."""
    manifest: Manifest = field(repr=False)
    """What the output's manifest will say, without its files."""
    reference: Path
    """The model that the output should compute like."""
    reason_to_differ: str | None = field(default=None, repr=False)
    """Why the output need not compute what the reference does; `None` if it must."""
    card: str | None = field(default=None, repr=False)
    """The output's README.md, if it gets a new one."""
    warnings: tuple[str, ...] = ()
    metadata: Mapping[str, str] = field(default_factory=lambda: FORMAT, repr=False)
    """What every file of weights says of itself."""
    max_shard_size: int = DEFAULT_SHARD_SIZE
    """Bytes of weights per file, at most, unless a single tensor is larger."""
    also_read: Sequence[Path] = field(default=(), repr=False)
    """Other files that it is made from, which no output may replace."""

    def names(self) -> list[str]:
        """Return the names of the tensors, in the order in which they will be stored."""
        return list(self.weights)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor."""
        return self.weight(name).shape

    def dtype(self, name: str) -> str:
        """Return the dtype of a tensor as NumPy and torch name it, such as `"bfloat16"`."""
        dtype = self.weight(name).dtype
        return DTYPE_NAMES.get(dtype, dtype)

    def read(self, name: str, rows: slice | None = None) -> npt.NDArray[Any]:
        """Read a tensor, or some of its rows, as an array; no other bytes are read or computed.

        Parameters
        ----------
        name : str
            One of `names()`.
        rows : slice, optional
            Along the first axis, with a step of 1.

        Returns
        -------
        ndarray of `dtype(name)`, shape `shape(name)`
            With `rows`, those rows of it.

        Raises
        ------
        TypeError, MoeConfigError
            If there is no such tensor, or `rows` is not a slice of its first axis.
        CheckpointError
            If a source has changed since.
        ImportError
            If NumPy does not have the dtype (bfloat16, float8) and `ml_dtypes` is not installed;
            `read_bytes` returns the bytes of every dtype.
        """
        weight = self.weight(name)
        dtype = as_stored_dtype(weight.dtype)
        start, stop = self.row_range(weight, rows)
        data = bytearray().join(weight.read(start, stop))
        return np.frombuffer(data, dtype).reshape(self.shape_of_rows(weight, rows))

    def read_bytes(self, name: str, rows: slice | None = None) -> bytes:
        """Return the bytes of a tensor, or of some of its rows, as they will be stored.

        The arguments and errors are those of `read`, except that every dtype can be read.
        """
        weight = self.weight(name)
        return b"".join(weight.read(*self.row_range(weight, rows)))

    def weight(self, name: str) -> Weight:
        if name not in self.weights:
            raise MoeConfigError(
                f"must be that of a tensor of the design, got {name!r}", argument="name"
            )
        return self.weights[name]

    def shape_of_rows(self, weight: Weight, rows: slice | None) -> tuple[int, ...]:
        if rows is None:
            return weight.shape
        if not isinstance(rows, slice):
            raise ArgumentTypeError(
                f"must be a slice, such as slice(0, 2), got {rows!r}", argument="rows"
            )
        if not weight.shape or rows.step not in (None, 1):
            raise MoeConfigError(
                f"must be a slice of the first axis, step 1, got {rows}", argument="rows"
            )
        return (len(range(*rows.indices(weight.shape[0]))), *weight.shape[1:])

    def row_range(self, weight: Weight, rows: slice | None) -> tuple[int, int]:
        """Where the bytes of some rows begin in the tensor, and where they end."""
        nbytes = whole_bytes(weight.dtype, self.shape_of_rows(weight, rows))
        if rows is None:
            return 0, nbytes
        before = rows.indices(weight.shape[0])[0]
        start = whole_bytes(weight.dtype, (before, *weight.shape[1:]))
        return start, start + nbytes

    @cached_property
    def shards(self) -> Sequence[Shard]:
        """The files of weights."""
        return plan_shards(self.weights.items(), self.max_shard_size, self.metadata)

    @property
    def texts(self) -> dict[str, str]:
        """The text of each small file that is made for the output, by name."""
        card = {} if self.card is None else {CARD: self.card}
        return {"config.json": json_text(self.config), **index_json(self.shards), **card}

    @property
    def num_bytes(self) -> int:
        """The size of the files of weights in bytes."""
        return sum(shard.nbytes for shard in self.shards)

    @property
    def num_parameters(self) -> int:
        return sum(weight.num_parameters for weight in self.weights.values())

    def source_files(self) -> Iterator[SourceFile]:
        """Every file of weights that it is made from, once."""
        yield from dict.fromkeys(t.file for tensors in self.sources for t in tensors.values())

    def write(self, output: ModelPath, writing: Writing | None = None) -> dict[str, FileRecord]:
        """Write all files to a new folder, the manifest last; it appears when it is complete.

        Return the record of each file by its name. With `dry_run`, only look for problems, and
        return no records.

        Raises
        ------
        CheckpointError
            If the output cannot be written, with every reason.
        OSError
            If the disk is full, or a file cannot be read or written.
        """
        writing = Writing() if writing is None else writing
        output = as_path(output, "output")
        files = list(self.source_files())
        sources = tuple(SourceRecord.of(file) for file in files)

        def manifest(records: Mapping[str, FileRecord]) -> str:
            return replace(self.manifest, source_files=sources, files=records).text()

        planned = planned_records(self.shards, self.texts, self.companions)
        sizes = [*(record.size for record in planned.values()), len(manifest(planned).encode())]
        problems = [
            *find_obstacles(output, files, writing, self.also_read),
            *find_lack_of_space(output, sizes),
        ]
        if problems:
            raise CheckpointError(*problems)
        if writing.dry_run:
            return {}
        return write_output(
            output,
            self.shards,
            self.texts,
            self.companions,
            manifest,
            writing,
        )


def make_design(request: Request, output: ModelPath, writing: Writing) -> Design:
    """The design of a request that is to be written to `output`.

    Raises
    ------
    CheckpointError
        With every reason why there is none, and what stands in the way of the output.
    """
    try:
        return design_of(request)
    except CheckpointError as error:
        obstacles = find_obstacles(Path(output), (), writing)
        raise CheckpointError(*error.problems, *obstacles) from None


@singledispatch
def design_of(request: Request, decisions: Facts | None = None) -> Design:
    """The design that a request asks for; each operation registers its own.

    `decisions` are those that an output's manifest keeps: what could not be decided in the same way
    again with certainty.

    Raises
    ------
    CheckpointError
        With every reason why there is none.
    """
    raise TypeError(f"no operation takes a {type(request).__name__}")


def find_rounding(dtype: Dtype | None, tensors: Mapping[str, Tensor]) -> str | None:
    """That weights are rounded, as a reason to differ; `None` where all keep their numbers."""
    if dtype in (None, Dtype.FLOAT32):  # which holds every number of the others
        return None
    if {tensor.dtype for tensor in tensors.values()} == {DTYPE_CODES[dtype]}:
        return None
    return f"weights were rounded to {dtype}"
