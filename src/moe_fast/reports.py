"""What every report can do: become plain values, and JSON."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pandas import DataFrame

__all__ = ["Report", "pandas_frame"]


class Report:
    """Base of the frozen dataclasses that say what was done or found.

    In a notebook, a report shows itself as a table.
    """

    def to_dict(self) -> dict[str, Any]:
        """The report in plain values: dicts, lists, strings, numbers, `None`."""
        values = plain(self)
        assert isinstance(values, dict)
        return values

    def to_json(self, indent: int | None = 2) -> str:
        """The report as JSON text."""
        import json

        return json.dumps(self.to_dict(), indent=indent, ensure_ascii=False, allow_nan=False)

    def _repr_html_(self) -> str:
        from moe_fast.html import pairs_table

        names = [field.name for field in fields(self)]  # type: ignore[arg-type]
        return pairs_table({name.replace("_", " "): getattr(self, name) for name in names})


def pandas_frame(columns: Mapping[str, Any]) -> DataFrame:
    """A pandas data frame; `ModuleNotFoundError` says how to install pandas."""
    try:
        from pandas import DataFrame
    except ModuleNotFoundError as error:
        if error.name != "pandas":
            raise
        raise ModuleNotFoundError(
            "to_frame needs pandas: pip install pandas", name="pandas"
        ) from None
    return DataFrame(columns)


def plain(value: Any) -> Any:
    if is_dataclass(value):
        return {field.name: plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [plain(item) for item in value]
    return value
