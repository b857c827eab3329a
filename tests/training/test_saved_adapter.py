"""A checkpoint holds its adapter: what a run started from may change or go."""

import json
import shutil
from pathlib import Path

import lora
from graft.adapters.attach import attach, base_parameters, lora_layers
from graft.adapters.targets import plan
from graft.pretrained.load import fingerprint
from graft.pretrained.mlx_names import parameters_of
from graft.training.run import Run

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import yaml

from support import tiny
from support.lora_runs import run, train

SHORT = ("--iters", "4", "--save-every", "2", "--val-batches", "1", "--targets", "q_proj")


class Killed(BaseException):
    """Stands for the end of a process."""


def killed_at(step: int, *arguments: str, model: str) -> None:
    save = Run.save_checkpoint

    def saving(self: Run) -> None:
        save(self)
        if self.progress.step == step:
            raise Killed

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Run, "save_checkpoint", saving)
        train(*arguments, model=model)


def adapter_bytes(folder: str) -> bytes:
    return Path(folder, "adapters.npz").read_bytes()


def resumed_like_undisturbed(*start: str, model: str, change: object) -> None:
    """Killed after two steps, resumed after a change: the bits of a run that nobody disturbed."""
    assert callable(change)
    arguments = (*SHORT, "--dropout", "0.3", *start)
    assert train(*arguments, "--adapter-file", "whole-run/adapters.npz", model=model) == 0
    killed_at(2, *arguments, "--adapter-file", "killed/adapters.npz", model=model)
    change()
    assert lora.main(["--resume", "--adapter-file", "killed/adapters.npz"]) == 0
    assert adapter_bytes("killed") == adapter_bytes("whole-run")


def rewrite_record(**changes: float) -> None:
    """Another rank or alpha in the record of the adapter that a run started from."""
    path = Path("start/adapter_config.json")
    record = json.loads(path.read_text())
    for layer in record["layers"].values():
        layer |= changes
    path.write_text(json.dumps(record))


CHANGES = {
    "gone": lambda: shutil.rmtree("start"),
    "other alpha": lambda: rewrite_record(alpha=3.0),
    "other rank": lambda: rewrite_record(rank=5),
}


@pytest.mark.parametrize(
    ("method", "change"),
    [
        ("pissa", "gone"),
        *(pytest.param("lora", change, marks=pytest.mark.slow) for change in CHANGES),
        pytest.param("dora", "gone", marks=pytest.mark.slow),
    ],
)
def test_the_adapter_that_a_run_started_from_may_change_or_go(
    here: Path, method: str, change: str
) -> None:
    settings = ("--method", method, "--rank", "4", "--alpha", "6")
    assert train(*SHORT, *settings, "--adapter-file", "start/adapters.npz") == 0
    start = ("--resume-adapter-file", "start/adapters.npz")
    resumed_like_undisturbed(*start, model="whole", change=CHANGES[change])


def test_loftq_needs_the_original_model_only_once(here: Path) -> None:
    tiny.write_model(Path("original"))
    start = ("--method", "loftq", "--original-model", "original")
    resumed_like_undisturbed(*start, model="quantized", change=lambda: shutil.rmtree("original"))


@pytest.mark.slow
def test_a_new_pissa_adapter_resumes_with_its_start(here: Path) -> None:
    resumed_like_undisturbed("--method", "pissa", model="whole", change=lambda: None)


def test_a_change_anywhere_in_the_weights_is_refused_by_name(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tiny.write_model(Path("own"))
    killed_at(2, *SHORT, model="own")
    weights = mx.load(str(folder / "model.safetensors"))
    assert isinstance(weights, dict)
    weights["model.layers.0.mlp.up_proj.weight"][100, 30] += 0.1
    mx.save_safetensors(str(folder / "model.safetensors"), weights)
    assert lora.main(["--resume", "--adapter-file", "adapters/adapters.npz"]) == 2
    assert "other contents of the model" in capsys.readouterr().err
    shutil.rmtree(folder)
    assert lora.main(["--resume", "--adapter-file", "adapters/adapters.npz"]) == 2
    assert "own" in capsys.readouterr().err


def test_the_data_that_a_run_started_from_has_gone(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree("data", "mine")
    killed_at(2, *SHORT, "--data", "mine", model="whole")
    Path("mine/valid.jsonl").write_text('{"text": "something else"}\n')
    assert lora.main(["--resume", "--adapter-file", "adapters/adapters.npz"]) == 2
    assert "other contents of valid data" in capsys.readouterr().err
    shutil.rmtree("mine")
    assert lora.main(["--resume", "--adapter-file", "adapters/adapters.npz"]) == 2
    assert "mine" in capsys.readouterr().err


CONTRADICTIONS = {
    ("--rank", "8"): "--rank 8, but it has 4",
    ("--alpha", "16"): "--alpha 16.0, but it has 6.0",
    ("--method", "dora"): "--method dora, but it has lora",
    ("--targets", "v_proj"): "--targets v_proj would adapt 3 layers, other than its 3",
    ("--lora-layers", "1"): "--lora-layers 1 would adapt",
    ("--rank-pattern", "q_proj=2"): "--rank-pattern q_proj=2, but it has 4",
}


def test_options_that_contradict_the_adapter_are_refused(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = ("--rank", "4", "--alpha", "6", "--targets", "q_proj")
    assert train(*own, "--adapter-file", "start/adapters.npz") == 0
    start = ("--train", "--resume-adapter-file", "start/adapters.npz", "--iters", "1")
    for given, said in CONTRADICTIONS.items():
        assert run(*start, *given) == 2
        assert said in capsys.readouterr().err


def test_the_record_of_a_run_from_an_adapter_is_true(here: Path) -> None:
    own = ("--rank", "4", "--alpha", "6", "--targets", "q_proj", "--method", "dora")
    assert train(*own, "--adapter-file", "start/adapters.npz") == 0
    start = ("--train", "--resume-adapter-file", "start/adapters.npz", "--iters", "1")
    assert run(*start) == 0
    content = json.loads(Path("adapters/adapter_config.json").read_text())
    for record in (content["options"], yaml.safe_load(Path("adapters/run.yaml").read_text())):
        assert [record[name] for name in ("rank", "alpha", "method", "targets")] == [None] * 4
    assert {layer["rank"] for layer in content["layers"].values()} == {4}
    assert run(*start, *own, "--lora-layers", "3") == 0
    record = yaml.safe_load(Path("adapters/run.yaml").read_text())
    assert [record[name] for name in ("rank", "method")] == [4, "dora"]
    assert yaml.safe_load(Path("start/run.yaml").read_text())["rank"] == 4


@pytest.mark.parametrize("method", ["lora", "pissa", "vera", "ia3"])
def test_the_fingerprint_of_a_base_does_not_depend_on_an_adapter(method: str) -> None:
    model = tiny.make_model(tiny.LLAMA)
    before = fingerprint(parameters_of(model))
    attach(model, plan(model, method=method, rank=2))
    assert fingerprint(base_parameters(model)) == before
    assert fingerprint(parameters_of(model)) != before


def test_every_type_of_array_has_a_fingerprint() -> None:
    types = (mx.bool_, mx.uint8, mx.int16, mx.bfloat16, mx.float32)
    arrays = {str(kind): mx.zeros((3, 5), kind) for kind in types}
    assert fingerprint(arrays) == fingerprint(dict(reversed(arrays.items())))
    assert fingerprint({"scalar": mx.array(1.0)}) != fingerprint({"scalar": mx.array(2.0)})


@pytest.mark.slow
def test_a_model_with_an_adapter_attached_resumes_in_a_new_process(here: Path) -> None:
    """From Python: the checkpoint attaches the adapter again, and the base is still the same."""
    import graft

    def fresh(*, adapted: bool) -> nn.Module:
        model, _, _ = graft.load_model("whole")
        if adapted:
            attach(model, plan(model, "v_proj", rank=3))
        return model

    _, tokenizer, _ = graft.load_model("whole")
    options = {"iters": 4, "save_every": 2, "val_batches": 1, "learning_rate": 1e-2}
    whole = graft.train(fresh(adapted=True), tokenizer, "data", adapter_file="w/a.npz", **options)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        save = Run.save_checkpoint

        def saving(self: Run) -> None:
            save(self)
            if self.progress.step == 2:
                raise Killed

        patch.setattr(Run, "save_checkpoint", saving)
        graft.train(fresh(adapted=True), tokenizer, "data", adapter_file="k/a.npz", **options)
    model = fresh(adapted=False)
    graft.train(model, tokenizer, "data", adapter_file="k/a.npz", resume=True)
    assert {layer.rank for _, layer in lora_layers(model)} == {3}
    assert np.array_equal(Path("k/a.npz").read_bytes(), whole.adapter.read_bytes())
