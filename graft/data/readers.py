"""File readers: JSONL, Parquet and text files to rows.

Knows neither splits nor tokenizers.
"""

import importlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from graft.data.rows import KEYS, Row, problem, refuse, shape
from graft.errors import InputError, first_line

TEXT_SUFFIXES = (".txt", ".md")
SUFFIXES = (".jsonl", ".parquet", *TEXT_SUFFIXES)


def read_jsonl(path: Path) -> list[Row]:
    """The rows of a JSONL file; blank lines are skipped.

    Raises:
        InputError: the file is missing or empty, or rows cannot be trained on; the first five
            by line.
    """
    # Not splitlines(): JSON strings may hold U+2028 and its like as they are.
    lines = _read_text(path).split("\n")
    rows: list[Row] = []
    problems = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            fields, reason = _parse(line)
            rows.append(Row(fields, f"{path}:{number}"))
            problems += [(f"{path}:{number}", reason)] if reason else []
    refuse(problems, of="lines")
    if not rows:
        raise InputError(f"{path} is empty")
    return rows


def _read_document(path: Path) -> list[Row]:
    text = _read_text(path)
    return [Row({"text": text}, str(path))] if text.strip() else []


def _read_parquet(path: Path) -> list[Row]:
    parquet = import_extra("pyarrow.parquet")
    try:
        names = parquet.read_schema(path).names
        columns = known_columns(names, str(path))
        table = parquet.read_table(path, columns=columns)
    except (OSError, ValueError) as error:  # pyarrow's own errors are of these types.
        raise InputError(f"cannot read {path}: {first_line(error)}") from error
    return rows_of_table(table, str(path))


READERS: dict[str, Callable[[Path], list[Row]]] = {
    ".jsonl": read_jsonl,
    ".parquet": _read_parquet,
    **dict.fromkeys(TEXT_SUFFIXES, _read_document),
}


def _parse(line: str) -> tuple[dict[str, Any], str | None]:
    """A row's fields, and what is wrong with them."""
    try:
        fields = json.loads(line)
    except json.JSONDecodeError as error:
        return {}, f"broken JSON: {error.msg} at column {error.colno}"
    except RecursionError:
        return {}, "broken JSON: nested too deeply"
    if not isinstance(fields, dict):
        return {}, f"a {type(fields).__name__}, not a JSON object"
    return fields, problem(fields)


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise InputError(f"{path} is missing") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read {path}: {error}") from error


def rows_of_table(table: Any, name: str) -> list[Row]:
    numbered = enumerate(_without_nulls(table.to_pylist()), 1)
    rows = [Row(fields, f"{name} row {number}") for number, fields in numbered]
    found = [(row.place, problem(row.fields)) for row in rows]
    refuse([(place, reason) for place, reason in found if reason], of="rows")
    return rows


def known_columns(names: Sequence[str], place: str) -> list[str]:
    """The columns that rows are made of; others may hold images and what not, and stay unread."""
    refuse([(place, reason)] if (reason := _problem_of_columns(names)) else [], of="tables")
    return [name for name in names if name in KEYS]


def _problem_of_columns(names: Sequence[str]) -> str | None:
    if shape(dict.fromkeys(names, "")) is not None:
        return None
    return (
        "no column 'text', no 'prompt' with 'completion' and no 'messages'; "
        f"it has {', '.join(map(repr, names)) or 'none'}"
    )


def _without_nulls(value: Any) -> Any:
    """Leave out null fields: in a table every object has the keys of all others."""
    if isinstance(value, list):
        return [_without_nulls(one) for one in value]
    if isinstance(value, dict):
        return {key: _without_nulls(one) for key, one in value.items() if one is not None}
    return value


def import_extra(module: str) -> Any:
    """Import what the extra `data` installs.

    Raises:
        InputError: it is not installed.
    """
    package = module.partition(".")[0]
    try:
        imported = importlib.import_module(module)
    except ImportError:
        imported = None
    # Without the package, a folder of data that is named datasets counts as a namespace package.
    if imported is None or getattr(imported.__spec__, "origin", None) is None:
        raise InputError(
            f"this --data needs the package {package}; install it with "
            "`pip install 'graft-mlx[data]'`"
        )
    return imported
