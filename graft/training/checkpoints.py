"""Checkpoints of a training run: everything needed to continue it, never half-written.

    checkpoints/0000100/arrays.safetensors   adapter and optimizer
    checkpoints/0000100/state.json           everything else: position in the data, options, ...
    checkpoints/0000100/checksums.json       SHA-256 of the two
    checkpoints/LATEST                       the name of the newest one

A checkpoint is written under another name, flushed and renamed. If one is damaged later, its
checksums show it and the previous one is used. Knows nothing of the contents of `state`.
"""

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from graft.errors import InputError
from graft.storage.atomic import new_file, new_folder, remove_leftovers
from graft.storage.json_file import read_json_file

import mlx.core as mx

ARRAYS, STATE, CHECKSUMS, LATEST = "arrays.safetensors", "state.json", "checksums.json", "LATEST"


@dataclass(frozen=True)
class Checkpoint:
    """What was saved at a step."""

    step: int
    arrays: dict[str, mx.array]
    state: dict[str, Any]


class CheckpointStore:
    """The checkpoints of one run.

    Args:
        folder: where they are.
        keep: how many to keep, the newest ones.
    """

    def __init__(self, folder: Path, *, keep: int = 2) -> None:
        self._folder = folder
        self._keep = keep

    def save(self, step: int, arrays: Mapping[str, mx.array], state: Mapping[str, Any]) -> None:
        """Write a checkpoint, name it in LATEST and remove the oldest beyond `keep`.

        Raises:
            InputError: the folder cannot be written.
            OSError: the disk is full; earlier checkpoints stay intact.
        """
        place = self._folder / f"{step:07d}"
        with new_folder(place, replace=True) as temporary:
            mx.save_safetensors(str(temporary / ARRAYS), dict(arrays))
            (temporary / STATE).write_text(json.dumps(state), encoding="utf-8")
            sums = {name: _sha256(temporary / name) for name in (ARRAYS, STATE)}
            (temporary / CHECKSUMS).write_text(json.dumps(sums), encoding="utf-8")
        with new_file(self._folder / LATEST) as temporary:
            temporary.write_text(place.name + "\n", encoding="utf-8")
        # Newer ones are damaged, or left from before the run was rolled back.
        older = [each for each in self._places() if each.name <= place.name]
        for other in {*self._places()} - {*older[-self._keep :]}:
            shutil.rmtree(other)
        remove_leftovers(self._folder, of_anyone=True)

    def load(self) -> tuple[Checkpoint, list[str]]:
        """The newest intact checkpoint, and what is wrong with newer ones.

        Raises:
            InputError: there is no intact checkpoint.
        """
        complaints: list[str] = []
        for place in reversed(self._places()):
            if (problem := _problem(place)) is None:
                return _read(place), complaints
            complaints.append(f"{place}: {problem}")
        found = f" ({'; '.join(complaints)})" if complaints else ""
        raise InputError(f"there is no checkpoint to resume from in {self._folder}{found}")

    def newest(self) -> Checkpoint | None:
        """The newest intact checkpoint, or `None`."""
        try:
            return self.load()[0]
        except InputError:
            return None

    def clear(self) -> None:
        """Remove the checkpoints of an earlier run."""
        (self._folder / LATEST).unlink(missing_ok=True)
        for place in self._places():
            shutil.rmtree(place)
        remove_leftovers(self._folder, of_anyone=True)

    def stamps(self) -> set[tuple[str, int]]:
        """Names and times of the checkpoints, to tell later ones from them."""
        return {(place.name, place.stat().st_mtime_ns) for place in self._places()}

    def _places(self) -> list[Path]:
        """The folders of checkpoints, oldest first."""
        return sorted(path for path in self._folder.glob("[0-9]*") if path.name.isdigit())


def _problem(place: Path) -> str | None:
    try:
        sums = read_json_file(place / CHECKSUMS)
        wrong = [name for name in (ARRAYS, STATE) if _sha256(place / name) != sums[name]]
    except (InputError, OSError, KeyError) as error:
        return f"incomplete ({error})"
    return f"{' and '.join(wrong)} damaged" if wrong else None


def _read(place: Path) -> Checkpoint:
    arrays = mx.load(str(place / ARRAYS))
    assert isinstance(arrays, dict)
    mx.eval(arrays)
    state = json.loads((place / STATE).read_text(encoding="utf-8"))
    return Checkpoint(int(place.name), arrays, state)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
