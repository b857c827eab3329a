import random
import sys
from pathlib import Path
from typing import Any

import graft  # noqa: F401
from graft.data.rows import Row
from graft.data.sources import check_data_name, find_split_sources, hold_out
from graft.errors import InputError

import pytest

from support.tiny import TEXTS, write_rows


def refused(data: Path | str, *needed: str, fraction: float = 0.1) -> str:
    with pytest.raises(InputError) as error:
        for part in find_split_sources(
            str(data), needed or ("train",), valid_fraction=fraction
        ).values():
            part.rows()
    assert "\n" not in str(error.value)
    return str(error.value)


def contents(data: Path | str, *needed: str, fraction: float = 0.1) -> dict[str, list[Any]]:
    parts = find_split_sources(str(data), needed, valid_fraction=fraction)
    return {name: [row.fields for row in part.rows()] for name, part in parts.items()}


def numbered(count: int) -> list[Row]:
    return [Row({"text": f"row {number}"}, f"x:{number}") for number in range(count)]


def hub_datasets() -> Any:
    """The package; without it, the checkout's folder of that name would be imported."""
    pytest.importorskip("datasets.arrow_dataset")
    return sys.modules["datasets"]


def test_a_divided_folder_is_taken_as_it_is(tmp_path: Path) -> None:
    write_rows(tmp_path, train=["a"], valid=["b"], test=["c"])
    (tmp_path / "README.md").write_text("a card, not a document")
    assert contents(tmp_path, "train", "valid", "test") == {
        "train": [{"text": "a"}],
        "valid": [{"text": "b"}],
        "test": [{"text": "c"}],
    }


def test_validation_and_shards_go_by_hugging_face_s_names_too(tmp_path: Path) -> None:
    write_rows(tmp_path, **{"train-00000-of-00002": ["a"], "train-00001-of-00002": ["b"]})
    write_rows(tmp_path, validation=["c"], other=["d"])
    found = contents(tmp_path, "train", "valid")
    assert found == {"train": [{"text": "a"}, {"text": "b"}], "valid": [{"text": "c"}]}


def test_val_is_validation_and_other_files_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_rows(tmp_path, train=["a"], val=["b"], dev=["c"])
    for name in ("more.csv", "README.md", "dataset_info.json"):
        (tmp_path / name).write_text("{}")
    assert contents(tmp_path, "train", "valid") == {
        "train": [{"text": "a"}],
        "valid": [{"text": "b"}],
    }
    assert f"not used: dev.jsonl, more.csv in {tmp_path}" in capsys.readouterr().err


def test_a_downloaded_dataset_is_used_and_not_its_readme(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("# A card")
    write_rows(tmp_path / "data", **{"train-00000-of-00001-0a1b": ["a"], "test": ["b"]})
    found = contents(tmp_path, "train", "test")
    assert found == {"train": [{"text": "a"}], "test": [{"text": "b"}]}


@pytest.mark.parametrize(
    "name", ["all.csv", "all.json", "all.jsonl.gz", "deep/er/all.parquet", "ALL.JSONL", "x.zip"]
)
def test_documents_beside_data_that_is_not_used_are_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "README.md").write_text("# A card")
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text("{}")
    assert f"has only {name}, beside text files: name one file" in refused(tmp_path)


def test_a_path_that_is_missing_is_not_looked_for_on_the_hub(tmp_path: Path) -> None:
    for data in ("data/mine", "datasets/mine", "owner/all.csv", "./mine", "~/mine", "a/b/c"):
        assert f"there is no file or folder {data}" in refused(data)
    assert check_data_name("owner/name-v1.5") == "owner/name-v1.5"


@pytest.mark.parametrize("place", ["folder", "file"])
def test_missing_validation_rows_are_set_aside_by_content(tmp_path: Path, place: str) -> None:
    rows = [f"row {number % 300}" for number in range(600)]  # each text twice
    write_rows(tmp_path, train=rows)
    data = tmp_path if place == "folder" else tmp_path / "train.jsonl"
    found = contents(data, "train", "valid", fraction=0.2)
    train, valid = ({row["text"] for row in found[name]} for name in ("train", "valid"))
    assert train.isdisjoint(valid)
    assert len(found["train"]) + len(found["valid"]) == 600
    assert 0.15 < len(found["valid"]) / 600 < 0.25
    parts = find_split_sources(str(data), ["train", "valid"], valid_fraction=0.2)
    assert parts["valid"].origin == f"20% of {tmp_path / 'train.jsonl'}, chosen by content"
    assert parts["train"].origin.startswith("80% of ")


def test_rows_stay_where_they_are_when_others_are_added() -> None:
    rows = numbered(400)
    shuffled = random.Random(0).sample(rows, 200)
    train, valid = hold_out(rows, 0.1)
    some_train, some_valid = hold_out(shuffled, 0.1)
    assert {row.location for row in some_train} <= {row.location for row in train}
    assert {row.location for row in some_valid} <= {row.location for row in valid}


def test_what_stands_beside_the_content_does_not_move_a_row() -> None:
    rows = numbered(200)
    told = [Row({"source": {"page": row.location}, **row.fields}, row.location) for row in rows]
    one, two = hold_out(rows, 0.3)[1], hold_out(told, 0.3)[1]
    assert [row.location for row in one] == [row.location for row in two]


@pytest.mark.parametrize("count", [2, 3, 5])
def test_few_rows_still_give_both(count: int) -> None:
    for fraction in (0.001, 0.5, 0.999):
        train, valid = hold_out(numbered(count), fraction)
        assert train and valid and len(train) + len(valid) == count


def test_all_or_nothing_can_be_set_aside(tmp_path: Path) -> None:
    write_rows(tmp_path, data=["a", "b", "c"])
    data = tmp_path / "data.jsonl"
    assert len(contents(data, "test", fraction=1)["test"]) == 3
    assert len(contents(data, "train", fraction=0)["train"]) == 3
    assert "leaves no row of" in refused(data, "train", "valid", fraction=0)
    assert "to train on" in refused(data, "train", fraction=1)
    write_rows(tmp_path, data=["same", "same"])
    assert "to validate on: it has 2" in refused(data, "valid")


def test_one_pile_is_tested_on_the_rows_that_are_not_trained_on(tmp_path: Path) -> None:
    write_rows(tmp_path, data=[f"row {number}" for number in range(50)])
    found = contents(tmp_path / "data.jsonl", "train", "valid", "test")
    assert found["test"] == found["valid"]
    assert not any(row in found["train"] for row in found["test"])


def test_documents_of_a_folder_are_a_row_each(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / ".hidden").mkdir()
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "b" / "c.md").write_text("# two")
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / ".hidden" / "d.txt").write_text("no")
    (tmp_path / "code.py").write_text("no")
    found = contents(tmp_path, "train", fraction=0)
    assert found == {"train": [{"text": "one"}, {"text": "# two"}]}
    assert all(
        p.whole_documents
        for p in find_split_sources(str(tmp_path), ["train"], valid_fraction=0).values()
    )


def test_a_single_document_is_divided_at_a_line(tmp_path: Path) -> None:
    text = "".join(f"line {number}\n" for number in range(100))
    path = tmp_path / "book.txt"
    path.write_text(text)
    parts = find_split_sources(str(path), ["train", "valid"], valid_fraction=0.1)
    (train,), (valid,) = parts["train"].rows(), parts["valid"].rows()
    assert train.fields["text"] + valid.fields["text"] == text
    assert valid.fields["text"].startswith("line ")
    assert 0.05 < len(valid.fields["text"]) / len(text) < 0.1
    assert (train.ends, valid.ends) == (False, True)
    assert parts["valid"].origin == f"the last 10% of {path}"


def test_split_files_of_text_are_documents(tmp_path: Path) -> None:
    for name in ("train", "valid"):
        (tmp_path / f"{name}.txt").write_text(name)
    assert contents(tmp_path, "train", "valid") == {
        "train": [{"text": "train"}],
        "valid": [{"text": "valid"}],
    }


def test_the_key_is_of_the_content_not_the_place(tmp_path: Path) -> None:
    for name, rows in {"a": ["x"], "b": ["x"], "c": ["y"]}.items():
        write_rows(tmp_path / name, train=rows, valid=["v"])
    keys = [
        find_split_sources(str(tmp_path / name), ["train"], valid_fraction=0.1)["train"].key
        for name in "abc"
    ]
    assert keys[0] == keys[1] != keys[2]
    write_rows(tmp_path / "d", train=["x"])
    shares = [
        find_split_sources(str(tmp_path / "d"), ["train", "valid"], valid_fraction=fraction)
        for fraction in (0.1, 0.2)
    ]
    assert len({part.key for parts in shares for part in parts.values()} | {keys[0]}) == 5


@pytest.mark.parametrize(
    ("make", "needed", "words"),
    [
        ({}, "train", "has no JSONL, Parquet or text files"),
        ({"other.jsonl": "{}"}, "train", "has only other.jsonl: name one file with --data"),
        ({"valid.jsonl": '{"text": "a"}'}, "train", "train.jsonl is missing; "),
        ({"train.jsonl": '{"text": "a"}', "train.txt": "a"}, "train", "for train: keep only one"),
        ({"train.txt": " "}, "train", "train.txt is empty"),
    ],
    ids=["nothing", "other names", "only valid", "two forms", "blank text"],
)
def test_a_folder_that_lacks_what_is_needed(
    tmp_path: Path, make: dict[str, str], needed: str, words: str
) -> None:
    for name, content in make.items():
        (tmp_path / name).write_text(content)
    assert words in refused(tmp_path, needed)


def test_a_place_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "datasets").mkdir()
    (tmp_path / "rows.json").write_text("[]")
    for data in ("datasets/none", "nothing", "./a/b", "/a/b", "no/rows.jsonl"):
        assert f"there is no file or folder {data}; make a folder" in refused(data)
    assert "ends in none of .jsonl" in refused("rows.json")


# Parquet and Hugging Face datasets

CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo", "name": "A"}]


def test_parquet_gives_the_rows_that_were_written(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = [{"messages": CHAT, "score": 1.5, "tools": None}, {"messages": CHAT[:1], "score": 2}]
    parquet.write_table(arrow.Table.from_pylist(rows), tmp_path / "train.parquet")
    # Fields that are null in a table are those that the row never had; other columns stay unread.
    expected = [{"messages": CHAT}, {"messages": CHAT[:1]}]
    assert contents(tmp_path / "train.parquet", "train", fraction=0)["train"] == expected
    write_rows(tmp_path, valid=["v"])
    assert contents(tmp_path, "train", "valid") == {
        "train": expected,
        "valid": [{"text": "v"}],
    }


def test_parquet_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "data.parquet"
    path.write_bytes(b"PAR1 not really PAR1")
    assert f"cannot read {path}" in refused(path)
    parquet.write_table(arrow.Table.from_pylist([{"prompt": "a", "answer": "b"}]), path)
    assert "this one has 'prompt', 'answer'" in refused(path)
    parquet.write_table(arrow.Table.from_pylist([{"text": "a"}, {"text": None}]), path)
    assert refused(path).startswith(f"{path} row 2: a row needs 'text'")


def test_a_dataset_of_the_hub_is_asked_for_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    datasets = hub_datasets()
    asked = []

    def load_dataset(*arguments: Any) -> Any:
        asked.append(arguments)
        rows = {"train": [f"row {n}" for n in range(30)], "validation": ["v"], "extra": ["x"]}
        splits = {name: [{"text": text, "n": 1} for text in some] for name, some in rows.items()}
        return datasets.DatasetDict(
            {name: datasets.Dataset.from_list(some) for name, some in splits.items()}
        )

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    found = contents("someone/rows:small", "train", "valid")
    assert asked == [("someone/rows", "small")]
    assert found["train"] == [{"text": f"row {n}"} for n in range(30)]
    assert found["valid"] == [{"text": "v"}]
    said = refused("someone/rows", "test")
    assert (
        said == "test is missing; someone/rows has someone/rows (train), someone/rows (validation)"
    )


def test_a_dataset_that_is_not_to_be_had_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = hub_datasets()

    def load_dataset(*arguments: Any) -> Any:
        raise ConnectionError("no network\nhere")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert refused("someone/rows").endswith("and no such dataset: no network here")


@pytest.mark.parametrize("divided", [True, False])
def test_a_saved_dataset_reads_as_it_was(tmp_path: Path, divided: bool) -> None:
    datasets = hub_datasets()
    rows = datasets.Dataset.from_list([{"text": text} for text in TEXTS]).select([2, 0])
    whole = datasets.DatasetDict({"test": rows}) if divided else rows
    whole.save_to_disk(str(tmp_path / "saved"))
    found = contents(tmp_path / "saved", "test", fraction=1)["test"]
    assert found == [{"text": TEXTS[2]}, {"text": TEXTS[0]}]


@pytest.mark.parametrize("package", ["datasets", "pyarrow"])
def test_a_missing_package_is_named_with_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    (tmp_path / "a.parquet").write_bytes(b"")
    said = refused("someone/rows" if package == "datasets" else tmp_path / "a.parquet")
    assert f"needs the package {package}; install it with `pip install 'graft-mlx[data]'`" in said
