"""Builds a dataset of questions and answers from the documentation of installed packages.

Each public object with a docstring becomes one row: a question that names the object, and its path
and docstring as the answer. `graft.corpus.package_reading` reads the packages,
`graft.corpus.public_names` decides which paths are public, and `graft.corpus.near_duplicates`
divides the rows into splits.
"""

import json
import os
import shlex
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from graft.console import progress_bar, say
from graft.corpus import near_duplicates as splits
from graft.corpus.card import dataset_card
from graft.corpus.docstring_text import clean, shorten
from graft.corpus.package_reading import Documentation, ReadingProgress, read_package
from graft.corpus.packages import Package, find_packages
from graft.errors import InputError
from graft.storage.atomic import check_free, check_writable, new_folder

_LEAST_CHARS = 200  # room for a question, a path and a sentence
_FILES = {*(f"{split}.jsonl" for split in splits.DATASET_SPLITS), "README.md"}


@dataclass(frozen=True)
class DocumentationRow:
    """One question and its answer.

    Attributes:
        package: the package that documents the object.
        path: the object's public path.
        name: the object's name in the question.
        kind: "module", "class", "function", "method", "property" or "attribute".
        answer: the docstring, cleaned and shortened.
    """

    package: Package
    path: str
    name: str
    kind: str
    answer: str

    @property
    def source(self) -> dict[str, str]:
        """Where the answer comes from."""
        return {
            "package": self.package.name,
            "version": self.package.version,
            "path": self.path,
            "kind": self.kind,
        }

    def as_json(self) -> str:
        """The row as a line of JSON."""
        text = _head(self.package, self.path, self.name) + self.answer
        return json.dumps({"text": text, "source": self.source}, ensure_ascii=False)


@dataclass
class BuiltDataset:
    """The rows of all packages, and what was left out.

    Attributes:
        rows: the rows of all packages.
        splits: the same rows by split.
        left_out: from what was left out to the reason.
        shortened: the number of rows that were shortened.
    """

    rows: list[DocumentationRow] = field(default_factory=list)
    splits: dict[str, list[DocumentationRow]] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    shortened: int = 0


def build_dataset(
    names: Sequence[str],
    folder: Path,
    *,
    max_chars: int = 2048,
    test_fraction: float = 0.1,
    seed: int = 42,
    workers: int = 1,
    force: bool = False,
) -> BuiltDataset:
    """Build a dataset from the docstrings of packages and write it to a folder.

    Args:
        names: installed packages, modules of the standard library, or parts of either.
        folder: the dataset's folder: `train.jsonl`, `valid.jsonl`, `test.jsonl` and `README.md`.
        max_chars: the longest text of a row, in characters.
        test_fraction: the fraction of rows in the test split, and again in the valid split.
        seed: the seed of the division into splits.
        workers: the number of processes that read files at the same time.
        force: replace an existing dataset.

    Raises:
        InputError: an option is out of range, a package is not installed or has no docstrings, or
            the folder cannot be written; the message lists all problems of a kind.
    """
    out = Path(os.path.abspath(folder))
    packages, missing = find_packages(names)
    problems = [
        *_option_problems(missing, max_chars, test_fraction, workers),
        *_place_problems(out, force),
    ]
    if problems:
        raise InputError("; ".join(problems))
    dataset = BuiltDataset()
    for package in packages:
        with _progress(package) as report:
            documentation = read_package(package, workers=workers, report=report)
        count = _add_rows(dataset, documentation, max_chars)
        say(f"{package.root} {package.version}: {count} rows from {documentation.modules} modules")
    dataset.splits = _divide(dataset.rows, packages, fraction=test_fraction, seed=seed)
    # A card may be published, so it names no folder of this machine.
    place = Path(out.name) if folder.is_absolute() else folder
    card = _card(place, dataset, max_chars=max_chars, test_fraction=test_fraction, seed=seed)
    _write(out, dataset.splits, card, replace=force)
    return dataset


def _option_problems(
    missing: Sequence[str], max_chars: int, test_fraction: float, workers: int
) -> Iterator[str]:
    if missing:
        names = ", ".join(map(repr, missing))
        yield f"not installed: {names}; install with pip or correct the spelling"
    if not 0 < test_fraction < 0.5:
        yield f"--test-fraction {test_fraction}: give more than 0, less than 0.5"
    if max_chars < _LEAST_CHARS:
        yield f"--max-chars {max_chars}: give at least {_LEAST_CHARS}"
    if workers < 1:
        yield f"--workers {workers}: give at least 1"


def _place_problems(out: Path, force: bool) -> Iterator[str]:
    try:
        check_free(out, replace=force)
        check_writable(out / "train.jsonl")
        _check_is_dataset(out)
    except InputError as error:
        yield str(error)


def _check_is_dataset(out: Path) -> None:
    """Refuse to replace a folder that holds anything besides a dataset."""
    foreign = sorted({entry.name for entry in out.iterdir()} - _FILES) if out.exists() else []
    if foreign:
        raise InputError(
            f"{out} is not a dataset: --force would delete {', '.join(foreign[:3])}; choose "
            "another folder"
        )


def _add_rows(dataset: BuiltDataset, documentation: Documentation, max_chars: int) -> int:
    """Add a row for each documented object; returns the number of rows added."""
    package = documentation.package
    count_before = len(dataset.rows)
    dataset.left_out |= documentation.skipped
    signatures = 0
    for described in documentation.objects:
        text = clean(described.doc)
        signatures += bool(described.doc and not text)
        room = max_chars - len(_head(package, described.path, described.name))
        answer = shorten(text, room)
        dataset.shortened += bool(answer) and answer != text
        if answer:
            row = DocumentationRow(package, described.path, described.name, described.kind, answer)
            dataset.rows.append(row)
        elif text:
            dataset.left_out[described.path] = f"no sentence ends within {max_chars} characters"
    if signatures:
        dataset.left_out[f"{package.root}: objects ({signatures})"] = (
            "their docstrings are only signatures"
        )
    return len(dataset.rows) - count_before


def _head(package: Package, path: str, name: str) -> str:
    return f"Q: What is {name} in {package.name}?\nA: {path} "


def _divide(
    rows: Sequence[DocumentationRow], packages: Sequence[Package], *, fraction: float, seed: int
) -> dict[str, list[DocumentationRow]]:
    """The rows by split; equal questions and nearly equal answers share a split."""
    undocumented = {package.root for package in packages} - {row.package.root for row in rows}
    if undocumented:
        raise InputError(
            f"no docstrings in {', '.join(sorted(undocumented))}; leave these packages out"
        )
    questions = [(row.package.name, row.name.replace("_", "").lower()) for row in rows]
    grouped = splits.group_near_duplicates([row.answer for row in rows], questions)
    if len(grouped) < len(splits.DATASET_SPLITS):
        raise InputError(
            f"too few rows for train, valid and test: {len(rows)}, with {len(grouped)} different "
            "answers; add more packages"
        )
    divided = splits.assign_splits(
        grouped, [row.path for row in rows], fraction=fraction, seed=seed
    )
    return {split: [rows[number] for number in numbers] for split, numbers in divided.items()}


@contextmanager
def _progress(package: Package) -> Iterator[ReadingProgress]:
    """On a terminal, show a progress bar over the modules of a package."""
    with progress_bar(f"modules of {package.root}", None) as update:
        yield lambda done, total: update(completed=done, total=total)


def _write(
    out: Path, divided: Mapping[str, Sequence[DocumentationRow]], card: str, *, replace: bool
) -> None:
    with new_folder(out, replace=replace) as folder:
        for split, rows in divided.items():
            lines = "".join(f"{row.as_json()}\n" for row in rows)
            (folder / f"{split}.jsonl").write_text(lines, encoding="utf-8", newline="\n")
        (folder / "README.md").write_text(card, encoding="utf-8", newline="\n")


def _card(
    folder: Path, dataset: BuiltDataset, *, max_chars: int, test_fraction: float, seed: int
) -> str:
    packages = {row.package.root: row.package for row in dataset.rows}
    counts = {
        split: Counter(row.package.root for row in rows) for split, rows in dataset.splits.items()
    }
    command = (
        f"python -m graft dataset {shlex.join(packages)} --out {shlex.quote(str(folder))} "
        f"--max-chars {max_chars} --test-fraction {test_fraction} --seed {seed}"
    )
    return dataset_card(
        Path(os.path.abspath(folder)).name,
        command,
        packages=list(packages.values()),
        counts=counts,
        example=dataset.splits["train"][0].source,
        max_chars=max_chars,
        shortened=dataset.shortened,
        left_out=dataset.left_out,
    )
