"""What was asked for: everything that decides the bytes of an output, and nothing else.

The output's manifest keeps the request as JSON. Whoever reads it back gets the same table of pieces
from it, so `check_moe` compares an output with what the builder would write today.
"""

from __future__ import annotations

import types
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass
from enum import StrEnum
from typing import Any, Union, get_args, get_origin, get_type_hints

from moe_fast.config import MoeConfig, RouterInit
from moe_fast.errors import CheckpointError, MoeConfigError


@dataclass(frozen=True)
class BuildRequest:
    """One MoE to build, in plain values: strings, numbers, tuples, enumerations, dataclasses.

    `models` and `base` are folders. A new field needs no code here to be kept and read back.
    """

    models: tuple[str, ...]
    base: str
    config: MoeConfig = field(default_factory=MoeConfig)
    router_init: RouterInit = RouterInit.BALANCED
    max_shard_size: int = 5_000_000_000

    def to_dict(self) -> dict[str, Any]:
        """The request as JSON has it."""
        return asdict(self)

    @classmethod
    def from_dict(cls, value: Any, where: str) -> BuildRequest:
        """The request that `to_dict` gave, every type checked; `where` begins each error."""
        request: BuildRequest = typed(value, cls, where)
        try:
            request.config.validate()
        except MoeConfigError as error:
            raise CheckpointError(f"{where}.config: {error}") from None
        return request


def typed(value: Any, kind: Any, where: str) -> Any:
    """`value`, fresh from JSON, as `kind`; `CheckpointError` beginning with `where` if it is none.

    `kind` is a dataclass, `tuple[X, ...]`, `dict[str, X]`, a `StrEnum`, `X | None` or one of `str`,
    `int`, `float`, `bool`.
    """
    arguments = get_args(kind)
    if get_origin(kind) in (types.UnionType, Union):
        if value is None and types.NoneType in arguments:
            return value
        (kind,) = (argument for argument in arguments if argument is not types.NoneType)
        return typed(value, kind, where)
    if get_origin(kind) is tuple and isinstance(value, list):
        return tuple(typed(item, arguments[0], f"{where}[{i}]") for i, item in enumerate(value))
    if get_origin(kind) is dict and isinstance(value, dict):
        return {key: typed(item, arguments[1], f"{where}.{key}") for key, item in value.items()}
    if is_dataclass(kind) and isinstance(value, dict):
        return typed_fields(value, kind, where)
    if isinstance(kind, type) and issubclass(kind, StrEnum) and isinstance(value, str):
        if value in list(kind):
            return kind(value)
        raise CheckpointError(f"{where}: {value!r} is none of {', '.join(kind)}")
    if type(value) is kind or (kind is float and type(value) is int):
        return value
    expected = "an object" if is_dataclass(kind) else str(kind) if arguments else kind.__name__
    raise CheckpointError(f"{where}: {value!r} is not {expected}")


def typed_fields(value: dict[str, Any], kind: Any, where: str) -> Any:
    known = {each.name: each for each in fields(kind)}
    for key in value:
        if key not in known:
            raise CheckpointError(f"{where}: unknown key {key!r}; known are {', '.join(known)}")
    for name, each in known.items():
        if name not in value and each.default is MISSING and each.default_factory is MISSING:
            raise CheckpointError(f"{where}: the key {name!r} is missing")
    hints = get_type_hints(kind)
    read = {name: typed(item, hints[name], f"{where}.{name}") for name, item in value.items()}
    try:
        return kind(**read)
    except (TypeError, MoeConfigError) as error:
        raise CheckpointError(f"{where}: {error}") from None
