"""The README of a dataset made from documentation."""

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
    """The dataset's README: what is in it, from where, under which licences, and how made.

    Args:
        name: of the dataset.
        command: that makes it.
        packages: that it documents.
        counts: rows by split, then by the root of the package.
        example: the source of a row.
        max_chars: longest text of a row.
        shortened: how many rows were shortened.
        left_out: what is left out, and why.
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
