"""What comes from outside is checked here, once: text files, and every row of a question set. What can be meant one way
only is read so (a byte-order mark, numbers as text); all else is a line with file, row, column and what would work."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sts.errors import StsError, one_of

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def read_text(path: Path) -> str:
    """A UTF-8 text file, with or without byte-order mark; line ends become "\\n"."""
    try:
        text, at = (content := path.read_bytes()).decode("utf-8-sig"), content.find(0)
    except OSError as error:
        raise StsError(f"{path} cannot be read: {error.strerror}. Name a text file that can be.") from error
    except UnicodeDecodeError as error:
        text, at, content = "", error.start, error.object
    if at >= 0:
        raise StsError(f"{path}, row {content.count(10, 0, at) + 1}: not UTF-8 (UTF-16, as PowerShell's > writes, or "
                       "Windows-1252?). Save the file as UTF-8.")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def json_lines(path: Path) -> Iterator[Row]:
    """The rows of a file with one JSON object a line; empty lines are left out."""
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if line.strip():
            try:
                values = json.loads(line)
            except (ValueError, RecursionError):  # the latter of brackets inside brackets by the thousand
                values = None
            if not isinstance(values, dict):
                raise StsError(f"{path}, row {number}: not JSON of one row: {line[:40]!r}. Write one object a line.")
            yield Row(values, str(path), number)


@dataclass(frozen=True)
class Row:
    """One row of a question set; each getter checks presence, type and range of a column."""

    values: Mapping[str, Any]
    file: str
    number: int

    def wrong(self, column: str, what: str) -> StsError:
        """The error for a column of this row."""
        return StsError(f"{self.file}, row {self.number}, column {column!r}: {what}")

    def value(self, column: str) -> Any:
        if column not in self.values:
            raise self.wrong(column, f"missing; the row has {', '.join(map(str, self.values))}. Add or rename one.")
        return self.values[column]

    def text(self, column: str, *, empty: bool = False, of: Collection[str] | None = None) -> str:
        """A text, its blanks as they are; a number as its digits. `empty`: it may be "", null or missing; `of`: one of
        a few."""
        value = "" if empty and self.values.get(column) is None else self.value(column)
        if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
            value = str(value)
        if not isinstance(value, str) or re.search("[\ud800-\udfff\U0010e000-\U0010fffd]", value):
            raise self.wrong(column, f"{ascii(str(value)[:60])} is no text. Write Unicode text in quotes.")
        if not (value.strip() or empty):
            raise self.wrong(column, "empty. Write a text, or leave the row out.")
        if of is not None and value not in of:
            raise self.wrong(column, str(one_of("value", value, of)))
        return value

    def texts(self, column: str) -> tuple[str, ...]:
        """A list of texts."""
        values = self.value(column)
        if not isinstance(values, (list, tuple)):
            raise self.wrong(column, f'{str(values)[:60]!r} is no list of texts. Write a list: ["one", "two"].')
        return tuple(Row({column: value}, self.file, self.number).text(column) for value in values)

    def options(self, column: str) -> tuple[str, ...]:
        """Two to 26 texts to choose from."""
        options = self.texts(column)
        if not 2 <= len(options) <= len(LETTERS):
            raise self.wrong(column, f"{len(options)} options. A question needs 2 to {len(LETTERS)}, or no column.")
        return options

    def index(self, column: str, options: tuple[str, ...]) -> int:
        """Which option is right: a whole number from 0, or a letter."""
        value = self.value(column)
        text = str(value).strip().removesuffix(".0")
        if isinstance(value, bool) or not re.fullmatch(r"-?\d+|[A-Z]", text):
            raise self.wrong(column, f"{value!r} is no index of an option. Write a whole number from 0.")
        index = LETTERS.index(text) if text in LETTERS else int(text)
        if not 0 <= index < len(options):
            raise self.wrong(column, f"{value!r} of {len(options)} options. Write 0 to {len(options) - 1}; where "
                                     "labels are hidden (-1), use a split that has them.")
        return index
