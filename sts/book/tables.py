"""Rows as HTML tables: the columns are listed where the table stands, in the notebook. All text is escaped."""

from __future__ import annotations

import dataclasses
import html
import math
import string
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pandas

Column = str | Callable[[dict], Any]


class Absent(Exception):
    """A field that a row does not have, or that is None or NaN; its cell stays empty."""


class _Formats(string.Formatter):
    """`str.format`, strict about absent values, and never "-0.00"."""

    def get_field(self, name: str, args, kwargs):
        try:
            value, first = super().get_field(name, args, kwargs)
        except (KeyError, TypeError, AttributeError) as error:
            raise Absent(name) from error
        return known(value), first

    def format_field(self, value, spec):
        text = super().format_field(value, spec)
        return text.lstrip("+-") if isinstance(value, float) and not any(digit in "123456789" for digit in text) else text


def known(value: Any) -> Any:
    """The value; `Absent` where it is None or NaN."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        raise Absent
    return value


def rows_of(rows: pandas.DataFrame | Sequence[Any] | Mapping[str, Any]) -> list[dict]:
    """A frame, a list of dicts or dataclasses, or a single one of these, as dicts."""
    if isinstance(rows, pandas.DataFrame):
        return rows.to_dict("records")
    listed = [rows] if isinstance(rows, Mapping) or dataclasses.is_dataclass(rows) else rows
    return [dataclasses.asdict(row) if dataclasses.is_dataclass(row) else dict(row) for row in listed]


def field(row: Mapping[str, Any], path: str) -> Any:
    """The value of a field; dots reach into dicts ("pearson_interval.low"). `Absent` where it is not there."""
    if path in row:
        return known(row[path])
    value: Any = row
    for part in path.split("."):
        if not isinstance(value, Mapping) or part not in value:
            raise Absent(path)
        value = value[part]
    return known(value)


def number(value: Any) -> str:
    """A value as text: floats with three significant digits, whole numbers with commas."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value + 0.0:,.0f}" if abs(value) >= 1000 else f"{value + 0.0:.3g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def cell(row: dict, column: Column) -> str:
    """What a column shows of a row: a field, a format (anything with a brace) or what a function returns."""
    try:
        if callable(column):
            return number(known(column(row)))
        return _Formats().vformat(column, (), row) if "{" in column else number(field(row, column))
    except Absent:
        return ""


def folded(title: str, content: str) -> str:
    """HTML that opens on a click."""
    return f"<details><summary>{html.escape(title)}</summary>{content}</details>"


def table(rows: Any, columns: Mapping[str, Column] | None = None, fold: str | None = None) -> str:
    """An HTML table that scrolls inside its own box.

    Args:
        rows: see `rows_of`.
        columns: heading -> column, see `cell`; by default every field of the first row.
        fold: title of the block in which the table is folded shut.
    """
    listed = rows_of(rows)
    columns = columns or {name: name for name in (listed[0] if listed else ())}
    head = "".join(f"<th>{html.escape(heading)}</th>" for heading in columns)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell(row, column))}</td>" for column in columns.values())
                   + "</tr>" for row in listed)
    found = (f'<div class="sts-scroll"><table class="dataframe"><thead><tr>{head}</tr></thead>'
             f"<tbody>{body}</tbody></table></div>")
    return folded(fold, found) if fold else found
