"""What every report can do: become plain values, JSON and data frames, and come back."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Any, Self

from moe_fast.plain import plain, typed

if TYPE_CHECKING:
    from pandas import DataFrame

__all__ = ["Report", "frame_of", "pandas_frame"]


class Report:
    """Base of the frozen dataclasses that say what was done or found.

    Reports compare by their values and can be pickled. In a notebook, a report shows itself as a
    table; those that hold a table give it to pandas by `to_frame`.

    Examples
    --------
    >>> import json
    >>> from moe_fast import MoeReport, plan_moe_construction
    >>> report = plan_moe_construction(5, 3).report(64, 128, 8)
    >>> MoeReport.from_dict(json.loads(report.to_json())) == report
    True
    """

    def to_dict(self) -> dict[str, Any]:
        """The report in plain values: dicts, lists, strings, numbers, `None`."""
        values = plain(self)
        assert isinstance(values, dict)
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The report that `to_dict` gave, or that JSON has kept.

        Raises
        ------
        MoeConfigError
            A key that is missing or unknown, or a value of another type: the message names it.
        """
        report: Self = typed(values, cls, cls.__name__)
        return report

    def to_json(self, indent: int | None = 2) -> str:
        """The report as JSON text."""
        import json

        return json.dumps(self.to_dict(), indent=indent, ensure_ascii=False, allow_nan=False)

    def _repr_html_(self) -> str:
        from moe_fast.drawing.html import pairs_table

        names = [field.name for field in fields(self)]  # type: ignore[arg-type]
        return pairs_table({name.replace("_", " "): getattr(self, name) for name in names})


def frame_of(rows: Iterable[Any], kind: type) -> DataFrame:
    """A pandas data frame, one row for each dataclass of this `kind`, a column for each field."""
    rows = list(rows)
    return pandas_frame({f.name: [getattr(row, f.name) for row in rows] for f in fields(kind)})


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
