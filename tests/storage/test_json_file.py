"""Untrusted JSON is read, or refused in one line."""

import json
from pathlib import Path
from typing import Any

from graft.errors import InputError
from graft.storage.json_file import MOST_NESTED, parse_json, read_json_file

import pytest


def nested(depth: int) -> str:
    return "[" * depth + "]" * depth


@pytest.mark.parametrize(
    ("text", "value"),
    [
        (nested(1), []),
        ('{"a": 1, "a": 2}', {"a": 2}),
        ("[0.0, Infinity]", [0.0, float("inf")]),  # time_step_limit of Mamba 2
        (r'"\ud83d\ude00 \\ud83d"', "😀 \\ud83d"),
        ("9" * 300, int("9" * 300)),
    ],
)
def test_what_python_can_handle_is_read(text: str, value: Any) -> None:
    assert parse_json(text) == value
    json.dumps(parse_json(nested(MOST_NESTED + 1)))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "Expecting value"),
        ("9" * 301, "a number of 301 digits"),
        ("-" + "9" * 100_000, "a number of 100,001 digits"),
        (nested(MOST_NESTED + 2), "nested more than 100 deep"),
        (nested(200_000), "nested more than 100 deep"),
        ('{"a":' * 100_000, "nested more than 100 deep"),
        (r'{"\ud83d": 1}', "half of a surrogate pair"),
        (r'["\uDE00"]', "half of a surrogate pair"),
    ],
)
def test_what_would_fail_later_is_refused(text: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason) as refusal:
        parse_json(text)
    assert "\n" not in str(refusal.value)


def test_what_a_caller_handles_itself_can_be_allowed_or_refused() -> None:
    assert parse_json(r'"\ud83d"', allow_surrogates=True) == "\ud83d"
    with pytest.raises(ValueError, match="NaN is not allowed"):
        parse_json("NaN", allow_constants=False)


@pytest.mark.parametrize("content", [b"\xff", b"[]", b"{", b'{"a": ' + b"9" * 5000 + b"}"])
def test_a_file_without_an_object_is_refused_with_its_name(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(InputError, match=str(path)):
        read_json_file(path)
