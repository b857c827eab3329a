import csv
import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import graft  # noqa: F401
from graft.data import readers
from graft.data.readers import read_jsonl
from graft.data.rows import Row
from graft.data.sources import check_data_name, find_split_sources
from graft.errors import InputError
from graft.training.options import Options

import pytest

from support.paths import ROOT
from support.tiny import TEXTS, write_rows


def texts(path: Path) -> list[str]:
    return [row.fields["text"] for row in read_jsonl(path)]


def message(path: Path) -> str:
    with pytest.raises(InputError) as error:
        read_jsonl(path)
    assert "\n" not in str(error.value)
    return str(error.value)


def write(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def test_the_texts_come_in_the_order_of_the_file(tmp_path: Path) -> None:
    assert texts(write_rows(tmp_path, train=TEXTS) / "train.jsonl") == TEXTS


def test_other_keys_are_left_alone_and_blank_lines_skipped(tmp_path: Path) -> None:
    path = write(
        tmp_path / "a.jsonl", "", '{"text": "a", "source": {"x": 1}}', "  ", '{"text":"b"}'
    )
    assert texts(path) == ["a", "b"]


@pytest.mark.parametrize("character", ["\u2028", "\u2029", "\u0085", "\u000b", "\u001c", "\x0c"])
def test_line_separators_of_unicode_within_a_string_divide_no_rows(
    tmp_path: Path, character: str
) -> None:
    # JSON allows U+2028, U+2029 and U+0085 in strings as they are; str.splitlines() divides there.
    as_it_is = character if character > "\x20" else json.dumps(character)[1:-1]
    path = write(tmp_path / "a.jsonl", f'{{"text": "one{as_it_is}two"}}', '{"text": "three"}')
    assert texts(path) == [f"one{character}two", "three"]


def test_lines_may_end_as_windows_ends_them(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "a\\r\\nb"}\r\n{"text": "c"}\r\n')
    assert texts(tmp_path / "a.jsonl") == ["a\r\nb", "c"]


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    assert str(tmp_path / "train.jsonl") in message(tmp_path / "train.jsonl")


def test_a_folder_in_place_of_a_file_is_named(tmp_path: Path) -> None:
    assert str(tmp_path) in message(tmp_path)


@pytest.mark.parametrize("content", ["", "\n", "  \n\n"])
def test_an_empty_file_is_named(tmp_path: Path, content: str) -> None:
    path = write(tmp_path / "valid.jsonl", content)
    assert message(path) == f"{path} is empty"


def test_a_file_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes('{"text": "é"}'.encode("latin-1"))
    assert str(tmp_path / "a.jsonl") in message(tmp_path / "a.jsonl")


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ('{"text": "a"', "broken JSON"),
        ("text", "broken JSON"),
        ('{"text": "a"} {"text": "b"}', "broken JSON"),
        ('["a"]', "a list, not a JSON object"),
        ('"a"', "a str, not a JSON object"),
        (
            '{"txt": "a", "source": 1}',
            "a row needs 'text', or 'prompt' with 'completion', or 'messages'; "
            "this one has 'txt', 'source'",
        ),
        ("{}", "this one has no keys"),
        ('{"text": 5}', "must be a string that is not empty, not 5"),
        ('{"text": null}', "this one has 'text' (null)"),
        ('{"text": ""}', "must be a string that is not empty"),
        (r'{"text": "a\ud83d"}', "surrogate"),
    ],
)
def test_a_bad_row_is_named_with_file_and_line(tmp_path: Path, line: str, problem: str) -> None:
    path = write(tmp_path / "a.jsonl", '{"text": "good"}', "", line)
    assert f"{path}:3: " in message(path)
    assert problem in message(path)


def test_all_bad_rows_are_told_the_first_five_by_line(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", *['{"text": "good"}', "{"] * 7)
    text = message(path)
    assert [f"{path}:{number}:" in text for number in (2, 4, 6, 8, 10, 12)] == [True] * 5 + [False]
    assert "2 more lines" in text


def test_whole_surrogate_pairs_are_characters(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", r'{"text": "\ud83d\ude42"}')
    assert texts(path) == ["🙂"]


def test_a_folder_named_datasets_is_not_the_package(tmp_path: Path) -> None:
    # Where the package is missing, Python takes any folder of that name for it.
    (tmp_path / "datasets").mkdir()
    code = (
        "import sys; from graft.data import readers\n"
        f"sys.path = [{str(tmp_path)!r}]; sys.modules.pop('datasets', None)\n"
        "readers.import_extra('datasets')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(readers.__file__).parents[2],
        capture_output=True,
        text=True,
    )
    assert "InputError: this --data needs the package datasets" in done.stderr


def test_a_reader_is_added_by_one_entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read_csv(path: Path) -> list[Row]:
        with path.open(newline="") as file:
            return [Row(fields, f"{path}") for fields in csv.DictReader(file)]

    path = tmp_path / "train.csv"
    path.write_text("text,score\na,1\nb,2\n")
    with pytest.raises(InputError, match=r"ends in none of \.jsonl, \.parquet, \.txt, \.md; "):
        check_data_name(str(path))
    with pytest.raises(InputError, match=r"has only train\.csv: name one file with --data"):
        find_split_sources(str(tmp_path), ["train"], valid_fraction=0.5)
    monkeypatch.setitem(readers.FILE_READERS, ".csv", readers.FileReader("CSV", read_csv))
    for data in (path, tmp_path):
        splits = find_split_sources(str(data), ["train", "valid"], valid_fraction=0.5)
        texts = [row.fields["text"] for split in splits.values() for row in split.rows()]
        assert sorted(texts) == ["a", "b"]


def test_the_documentation_names_every_suffix() -> None:
    text = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
    assert [suffix for suffix in readers.FILE_READERS if f"`{suffix}`" not in text] == []


def test_the_help_of_data_names_every_suffix() -> None:
    text = next(field for field in dataclasses.fields(Options) if field.name == "data").metadata
    assert [suffix for suffix in readers.FILE_READERS if suffix not in text["help"]] == []
