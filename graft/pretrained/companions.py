"""Lists the files that are copied along with weights: the tokenizer's and a few more, never code.

This is the only such list. Whatever else is in a model's folder (notes, data, records of a run)
stays there when the model is converted or fused.
"""

import shutil
from collections.abc import Iterable
from pathlib import Path

from graft.errors import InputError

# Each of the first group is a tokenizer by itself; the second group only adds to one.
TOKENIZERS = ("tokenizer.json", "*.model", "vocab.json", "vocab.txt", "*.tiktoken")
TOKENIZER_EXTRAS = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "merges.txt",
    "chat_template*",
    "generation_config.json",
)
COMPANIONS = (*TOKENIZERS, *TOKENIZER_EXTRAS)


def find_companions(folder: Path) -> list[Path]:
    """The files of a folder that go along with its weights."""
    return _matching(folder, COMPANIONS)


def find_tokenizer(folder: Path, *, fallback: Path | None = None) -> list[Path]:
    """The files that go along with weights, with a tokenizer among them.

    Args:
        folder: the model's folder.
        fallback: a tokenizer file outside it, used if the folder has none.

    Raises:
        InputError: there is no tokenizer.
    """
    tokenizers = _matching(folder, TOKENIZERS)
    if not tokenizers and fallback is not None and fallback.is_file():
        tokenizers = [fallback]
    if not tokenizers:
        raise InputError(f"{folder} has no tokenizer ({', '.join(TOKENIZERS)}); copy it there")
    return tokenizers + _matching(folder, TOKENIZER_EXTRAS)


def copy_companions(source: Path, folder: Path) -> None:
    """Copy what goes along with the weights from one model folder to another."""
    copy_files(find_companions(source), folder)


def copy_files(files: Iterable[Path], folder: Path) -> None:
    """Copy files into a folder under their own names."""
    for file in files:
        shutil.copyfile(file, folder / file.name)


def _matching(folder: Path, patterns: Iterable[str]) -> list[Path]:
    files = [file for pattern in patterns for file in sorted(folder.glob(pattern))]
    return [file for file in files if file.is_file() and file.suffix != ".py"]
