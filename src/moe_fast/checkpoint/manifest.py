"""The manifest of an output, `moe_fast.json`: what was asked for, what it was made of, what it is.

Whoever reads it trusts nothing: every type in it is checked, and it names files only to compare.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from dataclasses import asdict, field
from pathlib import Path
from typing import Any

from moe_fast import checkpoint
from moe_fast.errors import CheckpointError, MoeConfigError
from moe_fast.plain import plain, typed
from moe_fast.records import dataclass
from moe_fast.request import Request
from moe_fast.storage.files import SourceFile
from moe_fast.storage.strict_json import LONGEST_INDEX, brief, json_text, read_json
from moe_fast.storage.writer import FileRecord
from moe_fast.version import __version__

MANIFEST = "moe_fast.json"
MANIFEST_VERSION = 1


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
    """What the writer knew: the request, and what came of it.

    `facts` tell people more than the request does. `decisions` are what `design_of` cannot decide
    again in the same way with certainty, and takes from here.
    """

    request: Request
    family: str
    facts: Mapping[str, Any] = field(default_factory=dict)
    decisions: Mapping[str, Any] = field(default_factory=dict)
    source_files: tuple[SourceRecord, ...] = ()
    files: Mapping[str, FileRecord] = field(default_factory=dict)
    moe_fast: str = __version__

    def text(self) -> str:
        """The manifest as JSON; digests that were not computed are left out."""
        request = plain(self.request)
        value = {
            "manifest_version": MANIFEST_VERSION,
            "moe_fast": self.moe_fast,
            "operation": self.request.operation,
            "request": {key: item for key, item in request.items() if item not in (None, [])},
            "family": self.family,
            "facts": plain(self.facts),
            "decisions": plain(self.decisions),
            "source_files": plain(self.source_files),
            "files": {
                name: {key: item for key, item in asdict(record).items() if item is not None}
                for name, record in self.files.items()
            },
        }
        return json_text({key: item for key, item in value.items() if item != {}})


@dataclass(frozen=True)
class Stored:
    """The keys of a manifest apart from its request, as the file has them."""

    manifest_version: int
    moe_fast: str
    operation: str
    family: str
    source_files: tuple[SourceRecord, ...]
    files: dict[str, FileRecord]
    facts: dict[str, Any] = field(default_factory=dict)
    decisions: dict[str, Any] = field(default_factory=dict)


def read_manifest(folder: Path) -> Manifest:
    """The manifest of an output folder.

    Raises
    ------
    CheckpointError
        If there is none, if it is of another version, or if a value is not of its kind.
    """
    path = folder / MANIFEST
    value = read_json(path, limit=LONGEST_INDEX)
    if not isinstance(value, dict):
        raise CheckpointError("must be a JSON object", file=path)
    version = value.get("manifest_version")
    if version != MANIFEST_VERSION:
        raise CheckpointError(
            f"manifest_version is {brief(version)}, this version of moe_fast reads "
            f"{MANIFEST_VERSION}; build the output again, or check it without the file",
            file=path,
        )
    rest = {key: item for key, item in value.items() if key != "request"}
    try:
        stored: Stored = typed(rest, Stored, str(path))
        request: Request = typed(
            value.get("request"), request_type(stored.operation, path), f"{path}.request"
        )
        request.validate()
    except MoeConfigError as error:
        where = "" if str(error).startswith(str(path)) else f"{path}.request: "
        raise CheckpointError(f"{where}{error}") from None
    return Manifest(
        request, stored.family, stored.facts, stored.decisions, stored.source_files, stored.files,
        stored.moe_fast,
    )  # fmt: skip


def request_type(operation: str, path: Path) -> type[Request]:
    """The class of an operation's requests: that of the file of this package named like it."""
    known = {module.name for module in pkgutil.iter_modules(checkpoint.__path__)}
    if operation in known:
        importlib.import_module(f"{checkpoint.__name__}.{operation}")
    for kind in Request.__subclasses__():
        if kind.operation == operation:
            return kind
    raise CheckpointError(f"the operation {brief(operation)} is not known here", file=path)
