"""Data sources: what `--data` names, divided into the splits train, valid and test.

Data is a file, a folder of files, or a Hugging Face dataset. If it is not divided into splits, rows
are held out for validation by a hash of their content: equal rows stay together, and a row stays in
its split when others are added. Knows no tokenizers.
"""

import functools
import hashlib
import itertools
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from graft.console import note, one_line
from graft.data.readers import FILE_READERS, content_columns, import_extra, rows_of_table
from graft.data.rows import Row, content_fraction
from graft.errors import InputError
from graft.pretrained.hub import is_repo_name

_SPLIT_NAMES = {
    "train": "train",
    "valid": "valid",
    "val": "valid",
    "validation": "valid",
    "test": "test",
}
_SPLIT_FILE = re.compile(rf"({'|'.join(_SPLIT_NAMES)})(-\d+-of-\d+(?:-[0-9a-f]+)?)?")
# Files that are probably data, but of types that are not read.
_OTHER_DATA = (
    *(".json", ".csv", ".tsv", ".arrow", ".feather", ".avro", ".orc", ".xlsx", ".pdf", ".docx"),
    *(".gz", ".bz2", ".xz", ".zst", ".zip", ".tar", ".tgz", ".7z", ".db", ".sqlite", ".pkl"),
)
_METADATA = ("dataset_info.json", "dataset_infos.json", "state.json", "dataset_dict.json")
# Names of folders for data; OWNER/NAME that starts with one is not looked for on the Hub.
_LOCAL_FOLDERS = ("build", "data", "dataset", "datasets")
_MOST_NAMED = 5
# The default data, in a checkout and in an installation.
DEFAULT_DATA = "datasets/mlx-docs"
INSTALLED_DATA = Path(__file__).parents[1] / "assets" / "mlx-docs"


@dataclass(frozen=True)
class DataSource:
    """Rows of some files or of one split of a dataset, not read yet.

    Attributes:
        name: what to call it in messages.
        digest: a hash of its content, independent of its path.
        document_count: number of text files, each of which is a row to be cut into windows; 0 for
            other rows.
        read: returns the rows.
    """

    name: str
    digest: str
    document_count: int
    read: Callable[[], list[Row]]


@dataclass(frozen=True)
class SplitSource:
    """The rows of one split: a data source, or what is held out of it or left for training.

    Attributes:
        source: where the rows come from.
        share: "train" or "valid"; `None` takes all rows.
        fraction: of the rows, held out for validation.
    """

    source: DataSource
    share: str | None = None
    fraction: float = 0.0

    @property
    def whole_documents(self) -> bool:
        """Whether the rows are documents, to be cut into windows."""
        return self.source.document_count > 0

    @property
    def key(self) -> tuple[str, ...]:
        """Identifies the rows without reading them."""
        return (self.source.digest, str(self.whole_documents), str(self.share), str(self.fraction))

    @property
    def origin(self) -> str:
        """Where the rows come from, for messages."""
        if self.share is None:
            return self.source.name
        fraction = self.fraction if self.share == "valid" else 1 - self.fraction
        if self.source.document_count == 1:
            end = "last" if self.share == "valid" else "first"
            return f"the {end} {fraction:.0%} of {self.source.name}"
        return f"{fraction:.0%} of {self.source.name}, chosen by content"

    def rows(self) -> list[Row]:
        """Read the rows.

        Raises:
            InputError: they cannot be read, or there are none.
        """
        rows = self.source.read()
        if self.share is None:
            return rows
        train, valid = hold_out(rows, self.fraction, documents=self.whole_documents)
        split = train if self.share == "train" else valid
        if not split:
            raise InputError(
                f"--valid-fraction {self.fraction} leaves no row of {self.source.name} to "
                f"{'train on' if self.share == 'train' else 'validate on'}: it has "
                f"{len(rows)}; give another fraction, or a folder with train.jsonl and valid.jsonl"
            )
        return split


def find_split_sources(
    data: str, needed: Sequence[str], *, valid_fraction: float
) -> dict[str, SplitSource]:
    """Find the rows of each split.

    Data that is divided must have `train` and `test` if they are needed; without `valid`, rows of
    `train` are held out. Of data that is not divided, rows are held out for `valid`, and `test` is
    the same rows: those that are not trained on.

    Args:
        data: a file, a folder, or a Hugging Face dataset as OWNER/NAME or OWNER/NAME:CONFIG.
        needed: which of train, valid and test.
        valid_fraction: of the rows, to hold out if there is no `valid`.

    Raises:
        InputError: the data does not exist, cannot be read, or lacks a split.
    """
    sources = _find_sources(data)
    if isinstance(sources, DataSource):
        undivided = sources
        shares = {"train": "train", "valid": "valid", "test": "valid"}
        return {name: SplitSource(undivided, shares[name], valid_fraction) for name in needed}
    splits = {name: SplitSource(source) for name, source in sources.items()}
    if "train" in sources and "valid" not in sources:
        for share in ("train", "valid"):
            splits[share] = SplitSource(sources["train"], share, valid_fraction)
    missing = [name for name in needed if name not in splits]
    if missing:
        raise InputError(_missing_splits(data, missing, sources))
    return {name: splits[name] for name in needed}


def check_data_name(data: str) -> str:
    """Refuse, before anything is loaded, a name that cannot be data.

    Returns:
        The name; outside a checkout, the default data is the copy that comes with Graft.

    Raises:
        InputError: it is neither a file of a known type, nor a folder, nor the name of a dataset.
    """
    path = Path(data)
    if data == DEFAULT_DATA and not path.exists():
        return str(INSTALLED_DATA)
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise InputError(f"{data} is neither a file nor a folder; --data takes these")
    if path.is_file() and path.suffix not in FILE_READERS:
        raise InputError(f"{data} ends in none of {', '.join(FILE_READERS)}; --data takes these")
    # If a folder OWNER exists here, OWNER/NAME is a misspelled path.
    is_path = (
        path.parent.is_dir()
        or path.parts[0] in _LOCAL_FOLDERS
        or path.suffix.lower() in (*FILE_READERS, *_OTHER_DATA)
    )
    if not path.exists() and (is_path or _dataset_name(data) is None):
        raise InputError(
            f"there is no file or folder {data}; make a folder with `graft dataset`, or name a "
            "Hugging Face dataset as OWNER/NAME, where OWNER is no folder here and none of "
            f"{', '.join(_LOCAL_FOLDERS)}"
        )
    return data


def hold_out(
    rows: Sequence[Row], fraction: float, *, documents: bool = False
) -> tuple[list[Row], list[Row]]:
    """Divide rows into (train, valid) by a hash of their content.

    Each side gets at least one row, unless all rows are equal or `fraction` is 0 or 1: if no hash
    is below the fraction, the row with the lowest is held out. A single document is divided at the
    end of a line.

    Args:
        rows: to divide.
        fraction: of the rows, to hold out, 0 to 1.
        documents: whether the rows are documents.
    """
    if documents and len(rows) == 1:
        return _divide_document(rows[0], fraction)
    hashes = [content_fraction(row.fields) for row in rows]
    threshold = fraction
    if 0 < fraction < 1:
        threshold = min(max(threshold, math.nextafter(min(hashes), 1)), max(hashes))
    pairs = list(zip(rows, hashes, strict=True))
    train = [row for row, number in pairs if number >= threshold]
    return train, [row for row, number in pairs if number < threshold]


def _find_sources(data: str) -> DataSource | dict[str, DataSource]:
    """The data as one source, or one for each split that it is divided into."""
    data = check_data_name(data)
    path = Path(data)
    if path.is_dir():
        return _folder_sources(path)
    if path.is_file():
        return _file_source([path])
    dataset = _dataset_name(data)
    assert dataset is not None
    note(f"there is no file or folder {data} here: loading the Hugging Face dataset of this name")
    return _dataset_sources(_load_dataset(data, *dataset), data)


def _dataset_name(data: str) -> tuple[str, str | None] | None:
    """Name and configuration of OWNER/NAME or OWNER/NAME:CONFIG; `None` if it is neither."""
    name, colon, config = data.partition(":")
    if not is_repo_name(name) or (colon and not re.fullmatch(r"[\w.-]+", config)):
        return None
    return name, config or None


def _missing_splits(data: str, missing: Sequence[str], sources: Mapping[str, DataSource]) -> str:
    if Path(data).is_dir():
        missing = [str(Path(data) / f"{name}.jsonl") for name in missing]
    verb = "is" if len(missing) == 1 else "are"
    names = ", ".join(source.name for source in sources.values())
    return f"{' and '.join(missing)} {verb} missing; {data} has {names}"


def _file_source(paths: Sequence[Path], name: str | None = None) -> DataSource:
    """One source of files of one type."""
    name = name or ", ".join(map(str, paths))
    suffix = paths[0].suffix
    reader = FILE_READERS[suffix]
    digests = [_digest(path) for path in paths]
    digest = hashlib.sha256("\n".join([suffix, *digests]).encode()).hexdigest()

    @functools.cache
    def read() -> list[Row]:
        rows = [row for path in paths for row in reader.read(path)]
        if not rows:
            raise InputError(f"{name} is empty")
        return rows

    return DataSource(name, digest, len(paths) if reader.whole_documents else 0, read)


def _folder_sources(folder: Path) -> DataSource | dict[str, DataSource]:
    # Downloaded datasets have their files in a folder `data`.
    files = [_files_in(folder), _files_in(folder / "data")]
    for found in files:
        if splits := _split_files(folder, [path for path in found if _is_read(path)]):
            used = {path for paths in splits.values() for path in paths}
            _report_unused(folder, [path for path in itertools.chain(*files) if path not in used])
            return {name: _file_source(paths) for name, paths in splits.items()}
    if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
        return _dataset_sources(_load_dataset(str(folder), None, None), str(folder))
    below = _files_below(folder)
    documents = [path for path in below if _is_document(path)]
    others = [str(path.relative_to(folder)) for path in below if _is_data(path)]
    if others or not documents:
        raise InputError(_no_splits(folder, others, documents))
    name = f"the {len(documents)} documents in {folder}" if len(documents) > 1 else None
    return _file_source(documents, name)


def _no_splits(folder: Path, others: Sequence[str], documents: Sequence[Path]) -> str:
    *types, last = dict.fromkeys(reader.name for reader in FILE_READERS.values())
    if not others:
        reason = f"has no {', '.join(types)} or {last} files"
    else:
        rest = len(others) - _MOST_NAMED
        names = ", ".join(others[:_MOST_NAMED]) + (f" and {rest} more" if rest > 0 else "")
        beside = ", beside text files" if documents else ""
        reason = (
            f"has only {names}{beside}: name one file with --data, of type "
            f"{', '.join(FILE_READERS)}, or rename the files to train, valid and test"
        )
    return f"{folder / 'train.jsonl'} is missing; {folder} {reason}"


def _files_in(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*") if path.is_file())


def _is_read(path: Path) -> bool:
    return path.suffix in FILE_READERS


def _is_document(path: Path) -> bool:
    return _is_read(path) and FILE_READERS[path.suffix].whole_documents


def _is_data(path: Path) -> bool:
    """Whether a file that is no document is probably data, in a type that is read or not."""
    is_known = path.suffix.lower() in (*FILE_READERS, *_OTHER_DATA)
    return is_known and not _is_document(path) and path.name not in _METADATA


def _report_unused(folder: Path, files: Sequence[Path]) -> None:
    names = [str(path.relative_to(folder)) for path in files if _is_data(path)]
    if names:
        note(f"not used: {', '.join(names)} in {folder}; the names of files are train, valid, test")


def _split_files(folder: Path, files: Sequence[Path]) -> dict[str, list[Path]]:
    """The files named after each split: a single file, or shards of one type."""
    splits: dict[str, list[Path]] = {}
    unsharded: set[str] = set()
    for path in files:
        if match := _SPLIT_FILE.fullmatch(path.stem):
            name = _SPLIT_NAMES[match[1]]
            splits.setdefault(name, []).append(path)
            unsharded |= set() if match[2] else {name}
    for name, paths in splits.items():
        if len({path.suffix for path in paths}) > 1 or (name in unsharded and len(paths) > 1):
            names = ", ".join(path.name for path in paths)
            raise InputError(f"{folder} has {names} for {name}: keep only one")
    return splits


def _files_below(folder: Path) -> list[Path]:
    """All files at any depth, except in hidden folders."""
    return sorted(
        path
        for path in folder.rglob("*")
        if path.is_file()
        and not any(name.startswith(".") for name in path.relative_to(folder).parts)
    )


def _divide_document(row: Row, fraction: float) -> tuple[list[Row], list[Row]]:
    text = row.fields["text"]
    cut = round(len(text) * (1 - fraction))
    if 0 < cut < len(text):
        line_start = text.find("\n", cut) + 1
        cut = line_start if 0 < line_start < len(text) else cut
    train = Row({"text": text[:cut]}, row.location, ends=cut == len(text))
    valid = Row({"text": text[cut:]}, row.location, ends=row.ends)
    return [train] if cut else [], [valid] if cut < len(text) else []


def _load_dataset(data: str, name: str | None, configuration: str | None) -> Any:
    """A dataset of the Hub, or without a name, one that `save_to_disk` wrote."""
    datasets = import_extra("datasets")
    try:
        if name is None:
            return datasets.load_from_disk(data)
        return datasets.load_dataset(name, configuration)
    except Exception as error:  # It raises whatever the libraries of the formats do.
        raise InputError(
            f"there is no file or folder {data}, and no such dataset: {one_line(error)}"
        ) from error


def _dataset_sources(dataset: Any, name: str) -> DataSource | dict[str, DataSource]:
    if not isinstance(dataset, dict):
        return _dataset_source(dataset, name)
    known = {split: _SPLIT_NAMES[split] for split in dataset if split in _SPLIT_NAMES}
    if not known:
        raise InputError(
            f"{name} has the splits {', '.join(dataset)}; needed are train, validation and test"
        )
    return {
        split_name: _dataset_source(dataset[split], f"{name} ({split})")
        for split, split_name in known.items()
    }


def _dataset_source(dataset: Any, name: str) -> DataSource:
    columns = content_columns(dataset.column_names, name)
    rows = rows_of_table(dataset.select_columns(columns).with_format("arrow")[:], name)
    if not rows:
        raise InputError(f"{name} is empty")
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row.fields, sort_keys=True, default=str).encode() + b"\n")
    return DataSource(name, digest.hexdigest(), 0, lambda: rows)


def _digest(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
