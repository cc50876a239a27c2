"""Rows as HTML tables, whose columns are listed where the table stands, in the notebook. All text is escaped."""

from __future__ import annotations

import dataclasses
import html
import string
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pandas

Column = str | Callable[[dict], Any]


class Absent(Exception):
    """A field that a row does not have, or that is None or NaN."""


class _Formats(string.Formatter):
    """`str.format`, with `Absent` for what is not known, and never "-0.00"."""

    def get_field(self, name, args, kwargs):
        try:
            value, first = super().get_field(name, args, kwargs)
        except (KeyError, TypeError, AttributeError) as error:
            raise Absent(name) from error
        return _known(value), first

    def format_field(self, value, spec):
        text = super().format_field(value, spec)
        zero = isinstance(value, float) and not set("123456789") & set(text)
        return text.lstrip("+-") if zero else text


def _known(value: Any) -> Any:
    if value is None or (isinstance(value, float) and value != value):
        raise Absent
    return value


def rows_of(rows: Any) -> list[dict]:
    """A frame, a list of dicts or dataclasses, or a single one of these, as dicts."""
    if isinstance(rows, pandas.DataFrame):
        return rows.to_dict("records")
    listed: Sequence[Any] = [rows] if isinstance(rows, Mapping) or dataclasses.is_dataclass(rows) else rows
    return [dataclasses.asdict(row) if dataclasses.is_dataclass(row) else dict(row) for row in listed]


def field(row: Mapping[str, Any], path: str) -> Any:
    """The value of a field; dots reach into dicts ("pearson_interval.low"). `Absent` where it is not there."""
    value: Any = row
    for part in [path] if path in row else path.split("."):
        if not isinstance(value, Mapping) or part not in value:
            raise Absent(path)
        value = value[part]
    return _known(value)


def value_of(row: Mapping[str, Any], path: str | None) -> Any:
    """`field`, or None where it is not there."""
    try:
        return field(row, path) if path else None
    except Absent:
        return None


def shown(text: str, **values: Any) -> str:
    """`text.format(**values)`, "" where one of the values is absent."""
    try:
        return _Formats().vformat(text, (), values)
    except Absent:
        return ""


def cell(row: dict, column: Column) -> str:
    """What a column shows of a row: a field, a format (anything with a brace) or what a function returns."""
    if isinstance(column, str) and "{" in column:
        return shown(column, **row)
    value = column(row) if callable(column) else value_of(row, column)
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is not None and not isinstance(value, int | float):
        return str(value)
    return shown("{value:,.3g}" if isinstance(value, float) and abs(value) < 1000 else "{value:,.0f}", value=value)


def table(rows: Any, columns: Mapping[str, Column] | None = None, fold: str | None = None) -> str:
    """An HTML table that scrolls inside its own box; see `rows_of` and, for columns by heading, `cell`."""
    listed = rows_of(rows)
    columns = columns or {name: name for name in (listed[0] if listed else ())}
    head = "".join(f"<th>{html.escape(heading)}</th>" for heading in columns)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell(row, column))}</td>" for column in columns.values())
                   + "</tr>" for row in listed)
    found = (f'<div class="sts-scroll"><table class="dataframe"><thead><tr>{head}</tr></thead>'
             f"<tbody>{body}</tbody></table></div>")
    return folded(fold, found) if fold else found


def folded(title: str, content: str, kind: str = "") -> str:
    """HTML that opens on a click."""
    return f'<details class="{kind}"><summary>{html.escape(title)}</summary>{content}</details>'
