"""Where rows come from: JSONL, Parquet and text files, folders of them, Hugging Face datasets.

A folder with files train, valid and test is divided as they say. Anything else is one pile, of
which a fraction is set aside for validation by a hash of each row's content: equal rows stay
together, and a row stays where it is when others are added. Knows no tokenizers.
"""

import functools
import hashlib
import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from graft.data.readers import (
    READERS,
    SUFFIXES,
    TEXT_SUFFIXES,
    import_extra,
    known_columns,
    rows_of_table,
)
from graft.data.rows import Row, place_number
from graft.errors import InputError

SPLITS = ("train", "valid", "test")
_NAMES = {"train": "train", "valid": "valid", "validation": "valid", "test": "test"}
_SPLIT_FILE = re.compile(r"(train|valid|validation|test)(-\d+-of-\d+)?")
_DATASET_NAME = re.compile(r"([\w.-]+/[\w.-]+)(?::([\w.-]+))?")


@dataclass(frozen=True)
class Source:
    """Rows that belong together, not read yet.

    Attributes:
        name: what a person calls it.
        digest: a hash of its content, wherever it lies.
        documents: how many files of text, each a row that is to be cut into windows; 0 for
            other rows.
        read: gives the rows.
    """

    name: str
    digest: str
    documents: int
    read: Callable[[], list[Row]]


@dataclass(frozen=True)
class Part:
    """A source, or what is left of it for training or set aside for validation.

    Attributes:
        source: where the rows come from.
        share: "train" or "valid"; `None` takes all rows.
        fraction: how much is set aside for validation.
    """

    source: Source
    share: str | None = None
    fraction: float = 0.0

    @property
    def documents(self) -> bool:
        """Whether the rows are whole documents, to be cut into windows."""
        return self.source.documents > 0

    @property
    def key(self) -> tuple[str, ...]:
        """What makes the rows, without reading them."""
        return (self.source.digest, str(self.documents), str(self.share), str(self.fraction))

    @property
    def origin(self) -> str:
        """Where the rows come from, for people."""
        if self.share is None:
            return self.source.name
        share = self.fraction if self.share == "valid" else 1 - self.fraction
        if self.source.documents == 1:
            end = "last" if self.share == "valid" else "first"
            return f"the {end} {share:.0%} of {self.source.name}"
        return f"{share:.0%} of {self.source.name}, chosen by content"

    def rows(self) -> list[Row]:
        """Read the rows.

        Raises:
            InputError: they cannot be read, or none is left.
        """
        rows = self.source.read()
        if self.share is None:
            return rows
        train, valid = divide(rows, self.fraction, documents=self.documents)
        chosen = train if self.share == "train" else valid
        if not chosen:
            raise InputError(
                f"--valid-fraction {self.fraction} leaves no row of {self.source.name} to "
                f"{'train on' if self.share == 'train' else 'validate on'}: it has "
                f"{len(rows)}; give another fraction, or a folder with train.jsonl and valid.jsonl"
            )
        return chosen


def find_parts(data: str, needed: Sequence[str], *, valid_fraction: float) -> dict[str, Part]:
    """What makes up each split.

    Data that is divided has to have `train` and `test` where they are needed; `valid` is set aside
    from `train` where it is missing. Of data that is one pile, `train` and `valid` are made, and
    `test` is the same as `valid`: the rows that are not trained on.

    Args:
        data: a file, a folder, or a Hugging Face dataset as OWNER/NAME or OWNER/NAME:CONFIG.
        needed: which of `SPLITS`.
        valid_fraction: how much to set aside, where it has to be.

    Raises:
        InputError: nothing is there, it is not readable, or a split is missing.
    """
    sources = find_sources(data)
    pile = sources.get("")
    if pile is not None:
        shares = {"train": "train", "valid": "valid", "test": "valid"}
        return {name: Part(pile, shares[name], valid_fraction) for name in needed}
    whole = {name: Part(source) for name, source in sources.items()}
    if "train" in sources and "valid" not in sources:
        whole["train"] = Part(sources["train"], "train", valid_fraction)
        whole["valid"] = Part(sources["train"], "valid", valid_fraction)
    missing = [name for name in needed if name not in whole]
    if missing:
        wanted = [
            str(Path(data) / f"{name}.jsonl") if Path(data).is_dir() else name for name in missing
        ]
        verb = "is" if len(missing) == 1 else "are"
        there = ", ".join(source.name for source in sources.values())
        raise InputError(f"{' and '.join(wanted)} {verb} missing; {data} has {there}")
    return {name: whole[name] for name in needed}


def find_sources(data: str) -> dict[str, Source]:
    """The splits that data is divided into, or all of it under the empty name.

    Raises:
        InputError: nothing is there, or nothing that can be read.
    """
    check_place(data)
    path = Path(data)
    if path.is_dir():
        return _sources_of_folder(path)
    if path.is_file():
        return {"": file_source([path])}
    named = _DATASET_NAME.fullmatch(data)
    assert named is not None
    return _sources_of_dataset(_load_dataset(data, named[1], named[2]), data)


def check_place(data: str) -> None:
    """Refuse early, before anything is loaded, what can be no data.

    Raises:
        InputError: it is neither a file of a known kind, nor a folder, nor the name of a dataset.
    """
    path = Path(data)
    if path.is_file() and path.suffix not in SUFFIXES:
        raise InputError(f"{data} ends in none of {', '.join(SUFFIXES)}; --data takes these")
    # With a folder of the first name here, OWNER/NAME is a mistaken path.
    local = path.parent.is_dir() or path.suffix in SUFFIXES
    if not path.exists() and (local or not _DATASET_NAME.fullmatch(data)):
        raise InputError(
            f"there is no file or folder {data}; make a folder with `graft dataset`, or name a "
            "Hugging Face dataset as OWNER/NAME"
        )


def file_source(paths: Sequence[Path], name: str | None = None) -> Source:
    """One source of files of one kind."""
    name = name or ", ".join(map(str, paths))
    digests = [_digest(path) for path in paths]
    digest = hashlib.sha256("\n".join([paths[0].suffix, *digests]).encode()).hexdigest()
    reader = READERS[paths[0].suffix]

    @functools.cache
    def read() -> list[Row]:
        rows = [row for path in paths for row in reader(path)]
        if not rows:
            raise InputError(f"{name} is empty")
        return rows

    return Source(name, digest, len(paths) if paths[0].suffix in TEXT_SUFFIXES else 0, read)


def divide(
    rows: Sequence[Row], fraction: float, *, documents: bool = False
) -> tuple[list[Row], list[Row]]:
    """Set rows aside for validation by what they hold: (train, valid).

    Neither is empty unless all rows are equal, or `fraction` is 0 or 1: where no row falls below
    the fraction, the lowest is set aside. A single document has no rows to choose from and is
    divided at a line near its end.
    """
    if documents and len(rows) == 1:
        return _divide_document(rows[0], fraction)
    numbers = [place_number(row.fields) for row in rows]
    bar = fraction
    if 0 < fraction < 1:
        bar = min(max(bar, math.nextafter(min(numbers), 1)), max(numbers))
    train = [row for row, number in zip(rows, numbers, strict=True) if number >= bar]
    return train, [row for row, number in zip(rows, numbers, strict=True) if number < bar]


def _sources_of_folder(folder: Path) -> dict[str, Source]:
    files = sorted(path for path in folder.iterdir() if path.suffix in SUFFIXES and path.is_file())
    splits: dict[str, list[Path]] = {}
    for path in files:
        if named := _SPLIT_FILE.fullmatch(path.stem):
            splits.setdefault(_NAMES[named[1]], []).append(path)
    for name, paths in splits.items():
        whole = [path for path in paths if not _SPLIT_FILE.fullmatch(path.stem)[2]]  # type: ignore[index]
        if len({path.suffix for path in paths}) > 1 or (whole and len(paths) > 1):
            raise InputError(
                f"{folder} has {', '.join(path.name for path in paths)} for {name}: keep one"
            )
    if splits:
        return {name: file_source(paths) for name, paths in splits.items()}
    if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
        return _sources_of_dataset(_load_dataset(str(folder), None, None), str(folder))
    documents = sorted(
        path
        for path in folder.rglob("*")
        if path.suffix in TEXT_SUFFIXES
        and path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )
    tables = [path.name for path in files if path.suffix not in TEXT_SUFFIXES]
    if tables or not documents:
        there = f"has only {', '.join(tables)}: name one of them with --data" if tables else ""
        raise InputError(
            f"{folder / 'train.jsonl'} is missing; {folder} "
            + (there or "has neither JSONL nor Parquet nor text files")
        )
    many = f"the {len(documents)} documents in {folder}" if len(documents) > 1 else None
    return {"": file_source(documents, many)}


def _divide_document(row: Row, fraction: float) -> tuple[list[Row], list[Row]]:
    text = row.fields["text"]
    cut = round(len(text) * (1 - fraction))
    if 0 < cut < len(text):
        line = text.find("\n", cut) + 1
        cut = line if 0 < line < len(text) else cut
    train = Row({"text": text[:cut]}, row.place, ends=cut == len(text))
    valid = Row({"text": text[cut:]}, row.place, ends=row.ends)
    return [train] if cut else [], [valid] if cut < len(text) else []


def _load_dataset(data: str, name: str | None, configuration: str | None) -> Any:
    """A dataset of the Hub, or one that `save_to_disk` wrote where there is no name."""
    datasets = import_extra("datasets")
    try:
        if name is None:
            return datasets.load_from_disk(data)
        return datasets.load_dataset(name, configuration)
    except Exception as error:  # Its readers raise whatever the formats' libraries do.
        reason = " ".join(str(error).split())
        raise InputError(
            f"there is no file or folder {data}, and no such dataset: {reason}"
        ) from error


def _sources_of_dataset(dataset: Any, name: str) -> dict[str, Source]:
    if not isinstance(dataset, dict):
        return {"": _dataset_source(dataset, name)}
    known = {split: _NAMES[split] for split in dataset if split in _NAMES}
    if not known:
        raise InputError(
            f"{name} is divided into {', '.join(dataset)}; needed are train, validation and test"
        )
    return {
        mine: _dataset_source(dataset[split], f"{name} ({split})") for split, mine in known.items()
    }


def _dataset_source(dataset: Any, name: str) -> Source:
    columns = known_columns(dataset.column_names, name)
    rows = rows_of_table(dataset.select_columns(columns).with_format("arrow")[:], name)
    if not rows:
        raise InputError(f"{name} is empty")
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row.fields, sort_keys=True, default=str).encode() + b"\n")
    return Source(name, digest.hexdigest(), 0, lambda: rows)


def _digest(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
