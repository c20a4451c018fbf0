"""The manifest of an output, `moe_fast.json`: what was asked for, what it was made of, what it is.

Whoever reads it trusts nothing: every type in it is checked, and it names files only to compare.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

from moe_fast.checkpoint.files import SourceFile
from moe_fast.checkpoint.header import LONGEST_INDEX, json_text, read_json
from moe_fast.checkpoint.request import BuildRequest, ConvertRequest
from moe_fast.errors import CheckpointError, MoeConfigError
from moe_fast.plain import typed

MANIFEST = "moe_fast.json"


@dataclass(frozen=True)
class FileRecord:
    """One file of the output: its bytes, and SHA-256 digests in hexadecimal.

    `header_sha256` is that of a safetensors file up to its data; `sha256`, of the whole file, is
    there where the build was asked for checksums. `overflow` counts by tensor the finite weights
    that became infinite in the output's dtype; where none did, it is not there.
    """

    size: int
    header_sha256: str | None = None
    sha256: str | None = None
    overflow: dict[str, int] | None = None


@dataclass(frozen=True)
class SourceRecord:
    """One safetensors file that the output was made from, as it was then."""

    path: str
    size: int
    mtime_ns: int
    header_sha256: str

    @classmethod
    def of(cls, file: SourceFile) -> SourceRecord:
        return cls(*file)


@dataclass(frozen=True)
class Manifest:
    """What the writer knew: the request to build, or to convert, and what came of it.

    `source_model` and `source_layer` are the plan's, per layer. `gate_sha256` has a digest for the
    router of each layer that has one, and then for each gate of shared experts, where running a
    model made them: nobody can make the same bytes again with certainty.
    """

    moe_fast: str
    target: str
    source_files: tuple[SourceRecord, ...]
    files: dict[str, FileRecord]
    request: BuildRequest | None = None
    conversion: ConvertRequest | None = None
    source_model: tuple[tuple[int, ...], ...] = ()
    source_layer: tuple[tuple[int, ...], ...] = ()
    gate_sha256: tuple[str, ...] = ()

    @property
    def asked(self) -> BuildRequest | ConvertRequest:
        """The one of `request` and `conversion` that is there."""
        asked = self.request or self.conversion
        assert asked is not None
        return asked

    def text(self) -> str:
        """The manifest as JSON; digests that were not computed are left out."""
        value = {key: item for key, item in asdict(self).items() if item not in (None, ())}
        value["files"] = {
            name: {key: item for key, item in record.items() if item is not None}
            for name, record in value["files"].items()
        }
        return json_text(value)


def read_manifest(folder: Path) -> Manifest:
    """The manifest of an output folder.

    Raises
    ------
    CheckpointError
        Where there is none, or a value in it is not of its kind: with its key.
    """
    path = folder / MANIFEST
    value = read_json(path, limit=LONGEST_INDEX)
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: must be a JSON object")
    try:
        manifest: Manifest = typed(value, Manifest, str(path))
    except MoeConfigError as error:
        raise CheckpointError(str(error)) from None
    if (manifest.request is None) == (manifest.conversion is None):
        raise CheckpointError(f"{path}: must have one of the keys 'request' and 'conversion'")
    if manifest.request is not None:
        try:
            manifest.request.config.validate()
        except MoeConfigError as error:
            raise CheckpointError(f"{path}.request.config: {error}") from None
    return manifest
