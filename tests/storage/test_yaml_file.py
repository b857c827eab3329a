"""Untrusted YAML is read, or refused in one line."""

import os
from pathlib import Path

from graft.errors import InputError
from graft.storage.yaml_file import read_yaml_file

import pytest

MERGES = "a: &a {x: 1}\n" + "".join(
    f"{name}: &{name} {{<<: [{', '.join([f'*{before}'] * 9)}]}}\n"
    for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)


def test_names_and_values_are_read(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("rank: 8\n2: yes\ndata: 2024-01-31x\n")
    assert read_yaml_file(tmp_path / "a.yaml") == {"rank": 8, "2": True, "data": "2024-01-31x"}


@pytest.mark.parametrize(
    "text",
    [
        "a: 2024-99-99",
        "a: !!python/object/apply:os.system ['true']",
        "a: !!int x",
        "a: !!bool x",
        "a: !!timestamp x",
        "a: !!binary é",
        "a: !nothing x",
        "a: " + "9" * 5000,
        "a: 0x" + "f" * 5000,
        "0x" + "f" * 5000 + ": 1",
        "a: " + "[" * 3000,
        "a: &a [*a]",
        MERGES,
        "? [a, b]\n: c",
        "a: \x00",
        'a: "\\ud800"',
        "- a",
        "",
        "%YAML 9.9\n---\n",
    ],
)
def test_what_is_no_mapping_of_plain_values_is_refused_in_one_line(
    tmp_path: Path, text: str
) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match=str(path)) as refusal:
        read_yaml_file(path)
    assert "\n" not in str(refusal.value)


def test_a_huge_file_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").touch()
    os.truncate(tmp_path / "a.yaml", 1 << 40)
    with pytest.raises(InputError, match="bytes are more than"):
        read_yaml_file(tmp_path / "a.yaml")
