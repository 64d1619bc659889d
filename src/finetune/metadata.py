"""metadata.jsonl and metadata.csv, line by line: a bad line costs that line, and is told with its number.

Hostile or broken files are expected here: bytes that are no text, NUL characters, deep nesting, a field without end.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from finetune.errors import DataError


def records(path: Path) -> Iterator[tuple[int, dict[str, Any] | str]]:
    """(line number, record) for each row of a .jsonl or .csv file; a str in place of the record says what is wrong.

    Raises DataError if the file cannot be opened, or the first line of a .csv file does not name its columns.
    """
    try:
        lines = path.open(encoding="utf-8-sig", errors="surrogateescape", newline="" if path.suffix == ".csv" else None)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None
    with lines:
        for number, record in _csv_records(path, lines) if path.suffix == ".csv" else _json_records(lines):
            yield number, record if isinstance(record, str) else _not_text(record) or record


def _json_records(lines: TextIO) -> Iterator[tuple[int, dict[str, Any] | str]]:
    for number, line in enumerate(lines, start=1):
        if line.strip():
            yield number, _json_record(line)


def _json_record(line: str) -> dict[str, Any] | str:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        return f"not JSON: {error.msg}"
    except (ValueError, RecursionError) as error:  # a number of too many digits; too many brackets
        return f"not JSON: {error}"
    return record if isinstance(record, dict) else 'not an object, such as {"file_name": "a.png"}'


def _csv_records(path: Path, lines: TextIO) -> Iterator[tuple[int, dict[str, Any] | str]]:
    reader = csv.reader(lines, strict=True)  # else a quote that is never closed takes all that follows for its text
    columns: list[str] | None = None
    while True:
        first = reader.line_num + 1
        try:
            row = next(reader, None)
        except csv.Error as error:
            row = f"not CSV: {error}"
        if row is None and columns is not None:
            return
        if columns is None:
            columns = row if isinstance(row, list) else []
            if "file_name" not in columns or len(set(columns)) < len(columns):
                raise DataError(f"{path}:1: the first line must name the columns, each once, one of them file_name")
        elif isinstance(row, str):
            yield first, row
        elif row and len(row) != len(columns):
            yield first, f"not {len(columns)} values as in the first line"
        elif row:
            yield first, dict(zip(columns, row, strict=True))


def _not_text(record: dict[str, Any]) -> str | None:
    """Why the strings of a record are not text, or None."""
    for text in _strings(record):
        if "\0" in text:
            return "holds a NUL character"
        try:
            text.encode()
        except UnicodeEncodeError:
            return "is not UTF-8 text"
    return None


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for name, inner in value.items():
            yield name
            yield from _strings(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _strings(inner)
