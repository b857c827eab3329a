"""Runs of `lora.py` on tiny models, for the tests that need one."""

import hashlib
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import lora
from graft.adapters.files import load_adapter
from graft.data.examples import Example, Split, tokenize_rows
from graft.data.readers import read_jsonl
from graft.data.rows import Row
from graft.pretrained.load import load_model

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from support import tiny
from support.paths import ROOT

TRAIN = tiny.TEXTS * 3


# Three rows: a batch of four is never full.
TEST = [*tiny.TEXTS[:2], "The lazy dog."]


# The keys of a line in metrics.jsonl, by its kind.
KEYS = {
    "train": [
        *("kind", "step", "loss", "tokens", "tokens_per_second", "learning_rate", "grad_norm"),
        *("peak_memory_bytes", "seconds"),
    ],
    "eval": ["kind", "split", "step", "loss", "perplexity", "tokens", "seconds"],
    "event": ["kind", "step", "event", "seconds"],
}


def run(*arguments: str, model: str = "whole") -> int:
    """The exit status of `lora.py` in this process."""
    return lora.main(["--model", model, "--data", "data", *arguments])


def train(*arguments: str, model: str = "whole") -> int:
    return run("--train", "--iters", "3", "--learning-rate", "1e-2", *arguments, model=model)


def execute(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """`python lora.py` as a person runs it."""
    command = [sys.executable, str(ROOT / "lora.py"), *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=60)


def metrics(folder: str = "adapters") -> list[dict[str, Any]]:
    lines = Path(folder, "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line, parse_constant=no_such_constant) for line in lines]


def no_such_constant(name: str) -> None:
    raise AssertionError(f"{name} is not JSON")


def losses(folder: str = "adapters", **wanted: Any) -> list[float]:
    """The losses in the metrics lines that have these values."""
    return [m["loss"] for m in metrics(folder) if "loss" in m and wanted.items() <= m.items()]


def digest(model: nn.Module) -> dict[str, str]:
    """The bytes of every base tensor, by its path without the adapter's wrapping."""
    return {
        name.replace(".linear.", "."): hashlib.sha256(np.array(array).tobytes()).hexdigest()
        for name, array in tree_flatten(model.parameters())
        if not name.endswith(("lora_a", "lora_b"))
    }


def snapshot(folder: Path) -> dict[str, bytes | None]:
    """Every path under a folder with its content; `None` for a folder."""
    return {str(path): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def same_tensors(one: str, two: str) -> None:
    first, second = load_adapter(Path(one)).tensors, load_adapter(Path(two)).tensors
    assert first.keys() == second.keys()
    assert all(mx.array_equal(first[name], second[name]).item() for name in first)


def rows_of(name: str) -> list[Example]:
    """The tokenized rows of a split in the working folder."""
    _, tokenizer, _ = load_model("whole")
    return tokenize_rows(
        read_jsonl(Path("data", f"{name}.jsonl")), tokenizer, max_length=512
    ).examples


def wait_for(path: Path, child: "subprocess.Popen[bytes]") -> None:
    """Until the file is there; a child that ends before is a failure."""
    end = time.monotonic() + 60
    while not path.exists():
        assert child.poll() is None and time.monotonic() < end
        time.sleep(0.05)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models `whole` and `quantized` and a data folder, for all tests to read."""
    folder = tmp_path_factory.mktemp("lora")
    tiny.write_model(folder / "whole")
    tiny.write_model(folder / "quantized", bits=4)
    tiny.write_rows(folder / "data", train=TRAIN, valid=tiny.TEXTS, test=TEST)
    return folder


@pytest.fixture
def here(shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder, from which `whole`, `quantized` and `data` can be reached."""
    for name in ("whole", "quantized", "data"):
        (tmp_path / name).symlink_to(shared / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def model(shared: Path) -> nn.Module:
    return load_model(shared / "whole")[0]


@pytest.fixture(scope="module")
def split(shared: Path) -> Split:
    """Rows of many lengths, their number no multiple of a batch size."""
    _, tokenizer, _ = load_model(shared / "whole")
    text = "".join(tiny.TEXTS)
    rows = [Row({"text": text[: 7 * n]}, str(n)) for n in range(1, 12)]
    return tokenize_rows(rows, tokenizer, max_length=512)
