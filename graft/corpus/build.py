"""The command that turns the documentation of installed packages into a dataset.

Each public object with a docstring becomes one row: a question that names it, and its path and
docstring as the answer. Reading the packages is `graft.corpus.package_reading`'s, which paths are
public
`graft.corpus.public_names`', and what may stand in which split `graft.corpus.near_duplicates`' to
know.
"""

import argparse
import json
import os
import platform
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

from graft.cli.command import command
from graft.corpus import near_duplicates as splits
from graft.corpus.docstring_text import clean, shorten
from graft.corpus.package_reading import Documentation, Report, read_package
from graft.corpus.packages import Package, find_packages
from graft.errors import InputError
from graft.storage.atomic import check_free, check_writable, new_folder

_LEAST_CHARS = 200  # a question, a path and a sentence
_FILES = {*(f"{split}.jsonl" for split in splits.SPLITS), "README.md"}


@dataclass(frozen=True)
class Row:
    """One question and its answer.

    Attributes:
        package: the package it is about.
        path: the object's public path.
        name: the object as the question calls it.
        kind: "module", "class", "function", "method", "property" or "attribute".
        answer: its docstring, cleaned and shortened.
    """

    package: Package
    path: str
    name: str
    kind: str
    answer: str

    @property
    def source(self) -> dict[str, str]:
        """Where the answer is from."""
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
class Rows:
    """The rows of all packages, what they leave out, and why."""

    rows: list[Row] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)
    shortened: int = 0


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Build a dataset from the docstrings of packages.

    Raises:
        InputError: options out of range, packages that are not installed or document nothing, or a
            place that cannot be written; all of one kind named at once.
    """
    options = _parser().parse_args(argv)
    out = Path(os.path.abspath(options.out))
    packages, missing = find_packages(options.packages)
    _check(options, out, missing)
    made = Rows()
    for package in packages:
        with _progress(package) as report:
            documentation = read_package(package, workers=options.workers, report=report)
        count = _add_rows(made, documentation, options.max_chars)
        print(
            f"{package.root} {package.version}: {count} rows from {documentation.modules} modules"
        )
    divided = _divide(made, packages, fraction=options.test_fraction, seed=options.seed)
    card = _card(out.name, made, divided, options)
    _write(out, divided, card, replace=options.force)
    _print_summary(options.out, made, divided)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Build a dataset from the documentation of installed packages."
    )
    parser.add_argument(
        "packages",
        nargs="+",
        metavar="PACKAGE",
        help="an installed package, a module of the standard library, or a part such as mlx.nn",
    )
    parser.add_argument("--out", required=True, metavar="FOLDER", help="the folder to write")
    default = " (default: %(default)s)"
    parser.add_argument(
        "--max-chars", type=int, default=2048, metavar="N", help=f"longest text of a row{default}"
    )
    parser.add_argument(
        "--test-fraction",
        type=float,
        default=0.1,
        metavar="X",
        help=f"share of the rows in test, and as many in valid{default}",
    )
    parser.add_argument(
        "--seed", type=int, default=42, metavar="N", help=f"decides the splits{default}"
    )
    parser.add_argument(
        "--workers",
        type=int,
        default=os.cpu_count() or 1,
        metavar="N",
        help=f"processes at once{default}",
    )
    parser.add_argument("--force", action="store_true", help="replace an existing dataset")
    return parser


def _check(options: argparse.Namespace, out: Path, missing: Sequence[str]) -> None:
    problems = []
    if missing:
        names = ", ".join(map(repr, missing))
        problems.append(f"not installed: {names}; install with pip or correct the spelling")
    if not 0 < options.test_fraction < 0.5:
        problems.append(f"--test-fraction {options.test_fraction}: give more than 0, less than 0.5")
    if options.max_chars < _LEAST_CHARS:
        problems.append(f"--max-chars {options.max_chars}: give at least {_LEAST_CHARS}")
    if options.workers < 1:
        problems.append(f"--workers {options.workers}: give at least 1")
    try:
        check_free(out, replace=options.force)
        check_writable(out / "train.jsonl")
        _check_is_dataset(out)
    except InputError as error:
        problems.append(str(error))
    if problems:
        raise InputError("; ".join(problems))


def _check_is_dataset(out: Path) -> None:
    """Refuse to replace a folder that holds anything but a dataset."""
    others = sorted({entry.name for entry in out.iterdir()} - _FILES) if out.exists() else []
    if others:
        raise InputError(
            f"{out} is no dataset, it holds {', '.join(others[:3])}: --force would delete that; "
            "name another place"
        )


def _add_rows(made: Rows, documentation: Documentation, max_chars: int) -> int:
    """Turn documentation into rows; returns how many."""
    package = documentation.package
    before = len(made.rows)
    made.left_out |= documentation.skipped
    signatures = 0
    for described in documentation.objects:
        text = clean(described.doc)
        signatures += bool(described.doc and not text)
        room = max_chars - len(_head(package, described.path, described.name))
        answer = shorten(text, room)
        made.shortened += bool(answer) and answer != text
        if answer:
            row = Row(package, described.path, described.name, described.kind, answer)
            made.rows.append(row)
        elif text:
            made.left_out[described.path] = f"no sentence ends within {max_chars} characters"
    if signatures:
        made.left_out[f"{package.root}: objects ({signatures})"] = "a signature is all they have"
    return len(made.rows) - before


def _head(package: Package, path: str, name: str) -> str:
    return f"Q: What is {name} in {package.name}?\nA: {path} "


def _divide(
    made: Rows, packages: Sequence[Package], *, fraction: float, seed: int
) -> dict[str, list[Row]]:
    """The rows by split: equal questions and nearly equal answers in the same."""
    rows = made.rows
    silent = {package.root for package in packages} - {row.package.root for row in rows}
    if silent:
        raise InputError(f"no docstrings in {', '.join(sorted(silent))}; leave them out")
    questions = [(row.package.name, row.name.replace("_", "").lower()) for row in rows]
    grouped = splits.groups([row.answer for row in rows], questions)
    if len(grouped) < len(splits.SPLITS):
        raise InputError(
            f"too few rows for train, valid and test: {len(rows)}, with {len(grouped)} different "
            "answers; name more packages"
        )
    divided = splits.assign(grouped, [row.path for row in rows], fraction=fraction, seed=seed)
    return {split: [rows[number] for number in numbers] for split, numbers in divided.items()}


def _write(out: Path, divided: Mapping[str, Sequence[Row]], card: str, *, replace: bool) -> None:
    with new_folder(out, replace=replace) as folder:
        for split, rows in divided.items():
            lines = "".join(f"{row.as_json()}\n" for row in rows)
            (folder / f"{split}.jsonl").write_text(lines, encoding="utf-8", newline="\n")
        (folder / "README.md").write_text(card, encoding="utf-8", newline="\n")


def _card(
    name: str, made: Rows, divided: Mapping[str, Sequence[Row]], options: argparse.Namespace
) -> str:
    """The dataset's README: what is in it, from where, under which licences, and how made."""
    packages = {row.package.root: row.package for row in made.rows}
    return _CARD.format(
        name=name,
        packages=", ".join(packages),
        rows=len(made.rows),
        command=f"python -m graft dataset {' '.join(packages)} --out datasets/{name} "
        f"--max-chars {options.max_chars} --test-fraction {options.test_fraction} "
        f"--seed {options.seed}",
        table="\n".join(_table(packages.values(), divided)),
        example=json.dumps(divided["train"][0].source),
        python=platform.python_version(),
        system=platform.system(),
        griffe=metadata.version("griffelib"),
        max_chars=options.max_chars,
        shortened=made.shortened,
        percent=f"{splits.NEARLY_EQUAL:.0%}",
        left_out="\n".join(f"- {what}: {why}" for what, why in made.left_out.items()) or "Nothing.",
    )


def _table(packages: Iterable[Package], divided: Mapping[str, Sequence[Row]]) -> Iterator[str]:
    counts = {split: Counter(row.package.root for row in rows) for split, rows in divided.items()}
    for package in packages:
        cells = [package.root, package.version, package.licence]
        cells += [str(counts[split][package.root]) for split in splits.SPLITS]
        yield f"| {' | '.join(cells)} |"
    totals = [str(len(divided[split])) for split in splits.SPLITS]
    yield f"| all | | | {' | '.join(totals)} |"


_CARD = """\
# {name}

Questions and answers from the documentation of {packages}: {rows} rows, made with

    {command}

| package | version | licence | train | valid | test |
|---|---|---|---:|---:|---:|
{table}

The texts stay under the licences of their packages.

Each line of `train.jsonl`, `valid.jsonl` and `test.jsonl` is a JSON object. Its `text` is
`Q: What is NAME in PACKAGE?`, a line break and `A: PATH DOCSTRING`; its `source` tells where from:
`{example}`.

## How it was made

- Python and stub files were read without running them (griffe {griffe}); compiled modules were
  imported in processes of their own (Python {python}, {system}).
- Each public object with a docstring is one row, under its shortest public path. What a package
  imports from others is not its own. Signatures at the head of docstrings were removed.
- Texts above {max_chars} characters end at a paragraph or sentence end; {shortened} do.
- Rows that ask the same question, case and underscores aside, stay in one split, as do nearly equal
  answers: those with {percent} of the longer one's words in common, or of the shorter one's runs of
  three words.
- The groups were divided by a hash of the seed and the path: the same packages and seed give the
  same files.

## Left out

{left_out}
"""


@contextmanager
def _progress(package: Package) -> Iterator[Report]:
    """A bar over the modules of a package on a terminal, nothing elsewhere."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as bar:
        task = bar.add_task(f"modules of {package.root}", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _print_summary(out: str, made: Rows, divided: Mapping[str, Sequence[Row]]) -> None:
    print(f"{out}: " + ", ".join(f"{len(divided[split])} {split}" for split in splits.SPLITS))
    if made.shortened:
        print(f"shortened at a paragraph or sentence end: {made.shortened}")
    if made.left_out:
        print("left out:")
    for what, why in made.left_out.items():
        print(f"  {what}: {why}")
