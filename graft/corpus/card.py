"""Writes the README of a dataset built from documentation."""

import json
import platform
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata

from graft.corpus import near_duplicates as splits
from graft.corpus.packages import Package


def dataset_card(
    name: str,
    command: str,
    *,
    packages: Sequence[Package],
    counts: Mapping[str, Mapping[str, int]],
    example: Mapping[str, str],
    max_chars: int,
    shortened: int,
    left_out: Mapping[str, str],
) -> str:
    """The dataset's README: its contents, sources, licences and how it was made.

    Args:
        name: the dataset's name.
        command: the command that builds it.
        packages: the packages whose documentation it holds.
        counts: the number of rows by split, then by the root of the package.
        example: the `source` of one row.
        max_chars: the longest text of a row, in characters.
        shortened: the number of rows that were shortened.
        left_out: from what was left out to the reason.
    """
    return _CARD.format(
        name=name,
        packages=", ".join(package.root for package in packages),
        rows=sum(sum(by_package.values()) for by_package in counts.values()),
        command=command,
        table="\n".join(_table(packages, counts)),
        example=json.dumps(example),
        python=platform.python_version(),
        system=platform.system(),
        griffe=metadata.version("griffelib"),
        max_chars=max_chars,
        shortened=shortened,
        percent=f"{splits.NEARLY_EQUAL:.0%}",
        left_out="\n".join(f"- {what}: {why}" for what, why in left_out.items()) or "Nothing.",
    )


def _table(packages: Sequence[Package], counts: Mapping[str, Mapping[str, int]]) -> Iterator[str]:
    for package in packages:
        cells = [package.root, package.version, package.licence]
        cells += [str(counts[split].get(package.root, 0)) for split in splits.DATASET_SPLITS]
        yield f"| {' | '.join(cells)} |"
    totals = [str(sum(counts[split].values())) for split in splits.DATASET_SPLITS]
    yield f"| all | | | {' | '.join(totals)} |"


_CARD = """\
# {name}

Questions and answers from the documentation of {packages}: {rows} rows, built with

    {command}

| package | version | licence | train | valid | test |
|---|---|---|---:|---:|---:|
{table}

Each text remains under the licence of its package.

Each line of `train.jsonl`, `valid.jsonl` and `test.jsonl` is a JSON object with two fields.
`text` is `Q: What is NAME in PACKAGE?`, a line break and `A: PATH DOCSTRING`.
`source` names the origin: `{example}`.

## How it was made

- Python sources and stubs were parsed, not executed (griffe {griffe}).
- Compiled modules were imported in separate processes (Python {python}, {system}).
- Each public object with a docstring is one row, under its shortest public path.
- Objects that a package imports from other packages are skipped.
- Signatures at the start of docstrings were removed.
- {shortened} texts longer than {max_chars} characters were cut at a paragraph or sentence end.
- Rows that ask the same question, ignoring case and underscores, are in the same split.
- So are rows with nearly equal answers, which share {percent} of the words of the longer answer
  or of the three-word sequences of the shorter one.
- A hash of the seed and the path assigns rows to splits.
- The same packages and seed produce the same files.

## Left out

{left_out}
"""
