"""The public Python API: what `import graft` offers, and training from a notebook."""

import copy
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import graft
from graft.errors import InputError

import mlx.core as mx
import pytest

from support.paths import ROOT
from support.tiny import LLAMA, TEXTS, write_model, write_rows


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    write_model(tmp_path / "model", {**LLAMA, "num_hidden_layers": 1})
    write_rows(tmp_path / "data", train=TEXTS * 2, valid=TEXTS, test=TEXTS)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_every_name_is_there_and_nothing_heavy_is_imported_before() -> None:
    code = (
        "import graft, sys\n"
        "assert not {'mlx.core', 'mlx_lm', 'numpy', 'rich'} & set(sys.modules)\n"
        "assert all(getattr(graft, name) for name in graft.__all__)\n"
        "assert set(graft.__all__) <= set(dir(graft))\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        graft.trian  # noqa: B018


def test_training_takes_five_lines_and_returns_the_run(here: Path) -> None:
    model, tokenizer, _ = graft.load_model("model")
    before = graft.evaluate(model, tokenizer, "data")
    run = graft.train(
        model, tokenizer, "data", iters=8, learning_rate=1e-2, steps_per_report=2, steps_per_eval=4
    )
    after = graft.evaluate(model, tokenizer, "data")
    assert (run.steps, run.finished) == (8, True)
    assert [step for step, _ in run.losses] == [2, 4, 6, 8]
    assert [step for step, _ in run.valid_losses] == [0, 4, 8]
    assert run.best_loss == min(loss for step, loss in run.valid_losses if step)
    assert dict(run.valid_losses)[run.best_step] == run.best_loss
    assert run.losses[-1][1] < run.losses[0][1] and after.loss < before.loss
    assert all(path.exists() for path in (run.adapter, run.best_adapter, run.metrics, run.folder))
    # What was trained is what was saved.
    again, _, _ = graft.load_model("model")
    graft.apply_adapter(again, graft.load_adapter(run.adapter), name="adapter")
    assert graft.evaluate(again, tokenizer, "data").loss == pytest.approx(after.loss, rel=1e-6)
    answer = graft.generate(model, tokenizer, "The", max_tokens=4)
    assert answer == graft.generate(again, tokenizer, "The", max_tokens=4)


def test_an_attached_adapter_is_the_one_that_is_trained(here: Path) -> None:
    model, tokenizer, _ = graft.load_model("model")
    graft.attach(model, graft.plan(model, ["q_proj"], rank=2))
    run = graft.train(model, tokenizer, "data", iters=1)
    adapter = graft.load_adapter(run.adapter)
    assert [path.rpartition(".")[2] for path in adapter.layers] == ["q_proj"]
    graft.detach(model)


def test_the_base_model_is_recorded(here: Path) -> None:
    model, tokenizer, _ = graft.load_model("model")
    run = graft.train(model, tokenizer, "data", iters=1)
    assert graft.load_adapter(run.adapter).base_model == "model"
    result = graft.fuse(graft.load_adapter(run.adapter), "fused", max_kl=1.0)
    assert result.comparison.tokens > 0 and (here / "fused" / "config.json").exists()


def test_options_of_a_new_adapter_are_refused_where_there_is_one(here: Path) -> None:
    model, tokenizer, _ = graft.load_model("model")
    graft.train(model, tokenizer, "data", iters=1)
    with pytest.raises(InputError, match=r"has an adapter already.* rank; .* graft\.detach"):
        graft.train(model, tokenizer, "data", iters=1, rank=2)


def test_a_base_model_is_evaluated_in_chunks(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, tokenizer, _ = graft.load_model("model")
    graft.evaluate(model, tokenizer, "data")
    assert model.loss_head is not None and capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ({"objective": "x"}, "--objective x: give one of sft"),
        ({"batch_size": 0}, "--batch-size 0: give at least 1"),
        ({"num_batches": 0}, "give at least 1, or -1 for all"),
        ({"max_seq_length": 0}, "--max-seq-length 0"),
    ],
)
def test_arguments_of_an_evaluation_are_checked(
    here: Path, argument: dict[str, Any], words: str
) -> None:
    model, tokenizer, _ = graft.load_model("model")
    with pytest.raises(InputError, match=words):
        graft.evaluate(model, tokenizer, "data", **argument)


def test_a_loaded_model_can_be_pickled_and_copied(here: Path) -> None:
    model, _, _ = graft.load_model("model")
    tokens = mx.arange(40)[None]
    for twin in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        assert type(twin).__name__ == type(model).__name__
        assert mx.array_equal(twin(tokens), model(tokens))


def test_options_are_checked_by_name(here: Path) -> None:
    model, tokenizer, _ = graft.load_model("model")
    with pytest.raises(InputError, match=r"unknown option 'itres' \(did you mean 'iters'\?\)"):
        graft.train(model, tokenizer, "data", itres=3)
    with pytest.raises(InputError, match="--restarts can only be used on the command line"):
        graft.train(model, tokenizer, "data", restarts=2)
    with pytest.raises(InputError, match="no file or folder nowhere"):
        graft.train(model, tokenizer, "nowhere", iters=3)


def test_a_stopped_run_goes_on(here: Path) -> None:
    model, tokenizer, _ = graft.load_model("model")
    graft.train(model, tokenizer, "data", iters=2)
    model, tokenizer, _ = graft.load_model("model")
    run = graft.train(model, tokenizer, "data", iters=4, resume=True)
    assert run.steps == 4 and [step for step, _ in run.valid_losses][-1] == 4


def test_a_model_without_its_lower_blocks_is_refused(here: Path) -> None:
    write_model(here / "deep", LLAMA)
    model, tokenizer, _ = graft.load_model("deep")
    graft.train(model, tokenizer, "data", iters=1, lora_layers=1, activation_cache="memory")
    for use in (graft.evaluate, graft.train):
        with pytest.raises(InputError, match="load it again"):
            use(model, tokenizer, "data")


def test_training_works_outside_the_main_thread(here: Path) -> None:
    def train() -> int:
        mx.set_default_device(mx.default_device())
        model, tokenizer, _ = graft.load_model("model")
        return graft.train(model, tokenizer, "data", iters=1, workers=1).steps

    with ThreadPoolExecutor(1) as thread:
        assert thread.submit(train).result() == 1
