"""The benchmark of serving runs the same requests on both servers; no test asserts a time."""

import json
import os
import subprocess
import sys
from pathlib import Path

from graft.adapters.files import load_adapter
from graft.bench.serving import body_for, decode_figures, serving, write_adapters

import mlx.core as mx
import pytest

from support.paths import ROOT
from support.tiny import write_hugging_face_tokenizer, write_model


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = write_model(tmp_path / "model")
    (folder / "tokenizer.model").unlink()
    write_hugging_face_tokenizer(folder)
    return folder


def test_adapters_are_of_all_layers_and_each_another(model: Path, tmp_path: Path) -> None:
    paths = write_adapters(model, tmp_path / "adapters", 11)
    assert list(paths) == sorted(paths)
    both = (load_adapter(paths[name]) for name in (min(paths), max(paths)))
    first, last = (adapter.tensors for adapter in both)
    assert len(first) == 2 * 3 * 7
    name = "model.layers.0.self_attn.q_proj.lora_b"
    assert mx.abs(first[name]).max().item() > 0 and not mx.array_equal(first[name], last[name])


def test_both_servers_are_asked_the_same_of_each_adapter_in_turn() -> None:
    paths = [Path("/a/one"), Path("/a/two")]
    ours, theirs = (body_for(tool, 3, adapters=paths, tokens=7) for tool in ("graft", "mlx-lm"))
    assert ours.pop("model") == "two" and theirs.pop("adapters") == "/a/two"
    assert ours == theirs and ours["max_tokens"] == 7


def test_what_sharing_costs_is_measured(model: Path, tmp_path: Path) -> None:
    figures = decode_figures(model, write_adapters(model, tmp_path / "adapters", 2), tokens=12)
    assert set(figures) == {"mixed_over_single", "longest_step_while_loading"}
    assert all(value > 0 for value in figures.values())


def test_a_server_that_does_not_start_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="does not answer"), serving(["false"]):
        pytest.fail("nothing serves")


@pytest.mark.slow
@pytest.mark.parametrize("tool", ["graft", "mlx-lm"])
def test_a_server_is_measured_at_once_and_one_by_one(
    tool: str, model: Path, tmp_path: Path
) -> None:
    pytest.importorskip("uvicorn")
    command = [sys.executable, "-m", "graft.bench.serving", tool, str(model), str(tmp_path)]
    few = ["--requests", "4", "--adapters", "2", "--tokens", "4"]
    root = str(ROOT)
    environment = {**os.environ, "PYTHONPATH": root}
    done = subprocess.run(
        [*command, *few], env=environment, capture_output=True, text=True, check=True
    )
    figures = json.loads(done.stdout.splitlines()[-1])
    assert {"tokens_per_second", "one_by_one_tokens_per_second"} <= set(figures)
    assert ("mixed_over_single" in figures) == (tool == "graft")
    assert all(value > 0 for value in figures.values())
