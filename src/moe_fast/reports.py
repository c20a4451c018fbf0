"""What every report can do: become plain values, JSON and data frames, and come back."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Any, Self

from moe_fast.errors import MoeConfigError
from moe_fast.plain import plain, typed
from moe_fast.wording import brief

if TYPE_CHECKING:
    from pandas import DataFrame

__all__ = ["JSON_VERSION", "Report", "frame_of", "json_document", "pandas_frame", "without_version"]
# Of the keys of JSON documents. Keys may be added to a version; one that goes or means another
# thing makes a new version.
JSON_VERSION = 1


class Report:
    """Base of the frozen dataclasses that say what was done or found.

    Reports compare by their values and can be pickled. In a notebook, a report shows itself as a
    table. Reports that hold a table have a method `to_frame`, which returns it as a pandas data
    frame.

    Examples
    --------
    >>> import json
    >>> from moe_fast import MoeReport, plan_moe_construction
    >>> report = plan_moe_construction(5, 3).report(64, 128, 8)
    >>> MoeReport.from_dict(json.loads(report.to_json())) == report
    True
    """

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain values: dicts, lists, strings, numbers, `None`."""
        values = plain(self)
        assert isinstance(values, dict)
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Create a report from the result of `to_dict`, or from its JSON after `json.loads`.

        Raises
        ------
        MoeConfigError
            If a key is missing or unknown, or a value has the wrong type; the message names it.
        """
        report: Self = typed(without_version(values), cls, cls.__name__)
        return report

    def to_json(self, indent: int | None = 2) -> str:
        """Return the JSON that the command prints: the key `version`, then those of `to_dict`."""
        return json_document(self.to_dict(), indent)

    def _repr_html_(self) -> str:
        from moe_fast.drawing.html import pairs_table

        # What is too long for a line of text is left out, and what says nothing.
        names = [field.name for field in fields(self) if field.repr]  # type: ignore[arg-type]
        pairs = {as_words(name): getattr(self, name) for name in names}
        return pairs_table({n: v for n, v in pairs.items() if v or (v == 0 and v is not False)})


def as_words(name: str) -> str:
    """A field's name as people read it: `experts per token` for `num_experts_per_tok`."""
    if name == "load_balance":  # the reference's name; people take it for the load of the experts
        return "use of models (0 is even)"
    words = name.removeprefix("num_").split("_")
    return " ".join("token" if word == "tok" else word for word in words)


def json_document(values: Mapping[str, Any], indent: int | None = 2) -> str:
    """JSON whose first key is the version of its keys."""
    import json

    document = {"version": JSON_VERSION, **values}
    return json.dumps(document, indent=indent, ensure_ascii=False, allow_nan=False)


def without_version(values: Mapping[str, Any]) -> dict[str, Any]:
    """The other values of a JSON document; `MoeConfigError` if its keys are another version's."""
    version = values.get("version", JSON_VERSION)
    if version != JSON_VERSION:
        raise MoeConfigError(
            f"version {brief(version)} of the keys is not known here, only {JSON_VERSION}"
        )
    return {key: value for key, value in values.items() if key != "version"}


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
