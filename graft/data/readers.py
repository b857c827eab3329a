"""File readers: rows of JSONL, Parquet and text files.

A reader is one entry of `FILE_READERS`; the suffixes that `--data` takes follow from it. Knows
neither splits nor tokenizers.
"""

import importlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from graft.data.rows import (
    Row,
    content_keys,
    expected_keys,
    find_shape,
    raise_problems,
    row_problem,
)
from graft.errors import InputError, first_line
from graft.storage.json_file import parse_json
from graft.storage.plain_file import read_plain_text


@dataclass(frozen=True)
class FileReader:
    """How files of one type are read.

    Attributes:
        name: the type of file.
        read: returns the rows of a file, checked by `graft.data.rows.row_problem`.
        whole_documents: whether each file is one row, a document to be cut into windows.
    """

    name: str
    read: Callable[[Path], list[Row]]
    whole_documents: bool = False


def read_jsonl(path: Path) -> list[Row]:
    """Read a JSONL file, one JSON object per line; blank lines are skipped.

    Raises:
        InputError: the file is missing or empty, or lines are not rows; names the first five.
    """
    rows: list[Row] = []
    problems = []
    # Not splitlines(): JSON strings may contain U+2028 and other line separators as they are.
    for number, line in enumerate(read_plain_text(path).split("\n"), 1):
        if line.strip():
            fields, problem = _parse_line(line)
            rows.append(Row(fields, f"{path}:{number}"))
            problems += [(f"{path}:{number}", problem)] if problem else []
    raise_problems(problems, noun="lines")
    if not rows:
        raise InputError(f"{path} is empty")
    return rows


def read_parquet(path: Path) -> list[Row]:
    """Read a Parquet file, one row of the table each.

    Raises:
        InputError: pyarrow is missing, the file cannot be read, or rows are not of a known shape.
    """
    parquet = import_extra("pyarrow.parquet")
    try:
        columns = content_columns(parquet.read_schema(path).names, str(path))
        table = parquet.read_table(path, columns=columns)
    except InputError:
        raise
    except Exception as error:  # pyarrow has an error type for each way to be damaged
        raise InputError(f"cannot read {path}: {first_line(error)}") from error
    return rows_of_table(table, str(path))


def read_document(path: Path) -> list[Row]:
    """Read a text file as one row; a blank file has none.

    Raises:
        InputError: the file is missing or is not UTF-8.
    """
    text = read_plain_text(path)
    return [Row({"text": text}, str(path))] if text.strip() else []


FILE_READERS: dict[str, FileReader] = {
    ".jsonl": FileReader("JSONL", read_jsonl),
    ".parquet": FileReader("Parquet", read_parquet),
    ".txt": FileReader("text", read_document, whole_documents=True),
    ".md": FileReader("text", read_document, whole_documents=True),
}


def rows_of_table(table: Any, name: str) -> list[Row]:
    """The rows of a pyarrow table.

    Args:
        table: with the columns of `content_columns`.
        name: what to call it in messages.

    Raises:
        InputError: rows are not of a known shape; names the first five.
    """
    numbered = enumerate(_without_nulls(table.to_pylist()), 1)
    rows = [Row(fields, f"{name} row {number}") for number, fields in numbered]
    problems = [(row.location, row_problem(row.fields)) for row in rows]
    raise_problems([(location, text) for location, text in problems if text], noun="rows")
    return rows


def content_columns(names: Sequence[str], table: str) -> list[str]:
    """The columns that rows are made of; others, such as images, are not read.

    Args:
        names: of the columns.
        table: what to call it in messages.

    Raises:
        InputError: the columns are those of no row shape.
    """
    if find_shape(dict.fromkeys(names, "")) is None:
        columns = ", ".join(map(repr, names)) or "none"
        raise InputError(
            f"{table}: a table needs columns {expected_keys()}; this one has {columns}"
        )
    return [name for name in names if name in content_keys()]


def import_extra(module: str) -> Any:
    """Import a module that the extra `data` installs.

    Raises:
        InputError: it is not installed.
    """
    package = module.partition(".")[0]
    try:
        imported = importlib.import_module(module)
    except ImportError:
        imported = None
    # Without the package, a folder named `datasets` is imported as a namespace package.
    if imported is None or getattr(imported.__spec__, "origin", None) is None:
        raise InputError(
            f"this --data needs the package {package}; install it with "
            "`pip install 'graft-mlx[data]'`"
        )
    return imported


def _parse_line(line: str) -> tuple[dict[str, Any], str | None]:
    """The fields of a row, and what is wrong with them."""
    try:
        fields = parse_json(line, allow_surrogates=True)  # outside the content they do no harm
    except json.JSONDecodeError as error:
        return {}, f"broken JSON: {error.msg} at column {error.colno}"
    except ValueError as error:
        return {}, f"broken JSON: {error}"
    if not isinstance(fields, dict):
        return {}, f"a {type(fields).__name__}, not a JSON object"
    return fields, row_problem(fields)


def _without_nulls(value: Any) -> Any:
    """The value without null fields: in a table every object has the keys of all objects."""
    if isinstance(value, list):
        return [_without_nulls(item) for item in value]
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return value
