"""Reads untrusted JSON: any text is either read or refused with a one-line reason.

What is returned can be converted, nested into other values and written again without surprises:
its depth and its numbers are limited.
"""

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NoReturn

from graft.errors import InputError
from graft.storage.plain_file import LARGEST_SETTINGS_BYTES, read_plain_bytes

MOST_NESTED = 100
# Every integer of so many digits is also a float. Python itself refuses more than 4,300.
MOST_DIGITS = 300
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def parse_json(text: str, *, allow_surrogates: bool = False, allow_constants: bool = True) -> Any:
    """The value of a JSON text; of equal keys in an object, the last counts.

    Args:
        text: the JSON.
        allow_surrogates: return strings with half of a surrogate pair, which UTF-8 cannot encode.
        allow_constants: read NaN and the infinities, which configurations of some models hold.

    Raises:
        ValueError: the text is not JSON, or has a number of more than `MOST_DIGITS` digits, values
            nested more than `MOST_NESTED` deep, or half of a surrogate pair. A
            `json.JSONDecodeError` if it is not JSON.
    """
    try:
        refuse = None if allow_constants else _refuse_constant
        value = json.loads(text, parse_int=_parse_int, parse_constant=refuse)
    except RecursionError:
        raise ValueError(f"nested more than {MOST_NESTED} deep") from None
    _check_depth(value)
    if not allow_surrogates and _SURROGATE.search(text):
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise ValueError("half of a surrogate pair, which is not a character") from None
    return value


def read_json_file(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        InputError: the file is missing, is not valid JSON or holds something else.
    """
    try:
        raw = read_plain_bytes(path, most_bytes=LARGEST_SETTINGS_BYTES)
        content = parse_json(raw.decode("utf-8-sig"))
    except ValueError as error:
        raise InputError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} holds a {type(content).__name__}, not a JSON object")
    return content


def _parse_int(digits: str) -> int:
    if len(digits) > MOST_DIGITS:
        raise ValueError(f"a number of {len(digits):,} digits")
    return int(digits)


def _refuse_constant(word: str) -> NoReturn:
    raise ValueError(f"{word} is not allowed")


def _check_depth(value: Any) -> None:
    level = [value]
    for _ in range(MOST_NESTED + 1):
        level = [child for parent in level for child in _children(parent)]
        if not level:
            return
    raise ValueError(f"nested more than {MOST_NESTED} deep")


def _children(value: Any) -> Iterable[Any]:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()
