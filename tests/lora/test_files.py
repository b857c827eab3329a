"""The files of a run, and which adapter is used."""

import math
import os
import time
from pathlib import Path
from typing import Any

import lora
from graft.adapters.files import load_adapter
from graft.data.batches import TrainingBatches
from graft.data.examples import Split
from graft.pretrained.load import load_model
from graft.training.evaluate import evaluate_split
from graft.training.metrics import Evaluation, RunLog
from graft.training.options import Options
from graft.training.setup import use_adapter

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from support import tiny
from support.fast_cases import arrays, mean_loss
from support.lora_runs import KEYS, execute, losses, metrics, rows_of, run, snapshot, train


class TestFiles:
    @pytest.mark.parametrize("name", ["adapters.npz", "adapters.safetensors"])
    def test_a_run_leaves_its_adapter_record_and_metrics_and_nothing_else(
        self, here: Path, name: str
    ) -> None:
        assert train("--adapter-file", f"out/{name}", "--rank", "4", "--alpha", "6") == 0
        best = name.replace("adapters", "adapters.best")
        wanted = [name, best, "adapter_config.json", "checkpoints", "metrics.jsonl", "run.yaml"]
        assert sorted(os.listdir("out")) == sorted(wanted)
        adapter = load_adapter(Path("out", name))
        assert sorted(adapter.tensors) == sorted(
            f"{path}.{half}" for path in adapter.layers for half in ("lora_a", "lora_b")
        )
        assert adapter.tensors["model.layers.0.self_attn.k_proj.lora_a"].shape == (64, 4)
        assert adapter.tensors["model.layers.0.self_attn.k_proj.lora_b"].shape == (4, 32)
        assert adapter.base_model == "whole"
        assert {(s.rank, s.alpha) for s in adapter.layers.values()} == {(4, 6.0)}
        assert adapter.options["learning_rate"] == 1e-2

    def test_without_a_name_the_adapter_is_at_the_default_place(self, here: Path) -> None:
        assert train() == 0
        assert Path("adapters/adapters.npz").is_file()

    def test_metrics_have_the_documented_keys_and_run_on(self, here: Path) -> None:
        before = time.perf_counter()
        arguments = ("--iters", "6", "--steps-per-report", "2", "--steps-per-eval", "3")
        assert train(*arguments, "--test") == 0
        elapsed = time.perf_counter() - before
        lines = metrics()
        assert all(sorted(line) == sorted(KEYS[line["kind"]]) for line in lines)
        reports = [line for line in lines if line["kind"] == "train"]
        assert [line["step"] for line in reports] == [2, 4, 6]
        # Twelve rows in batches of four: six steps are two epochs.
        rows = sum(len(row.tokens) - 1 for row in rows_of("train"))
        assert reports[-1]["tokens"] == 2 * rows
        assert all(line["tokens_per_second"] > 0 and line["grad_norm"] > 0 for line in reports)
        assert all(line["learning_rate"] == pytest.approx(1e-2) for line in reports)
        for name in ("step", "seconds"):
            values = [line[name] for line in lines]
            assert values == sorted(values)
        assert 0 < lines[-1]["seconds"] <= elapsed
        counts = [line["tokens"] for line in reports]
        assert counts == sorted(set(counts))
        last = lines[-1]
        assert (last["split"], last["step"]) == ("test", 6)
        assert last["tokens"] == sum(len(row.tokens) - 1 for row in rows_of("test"))
        assert last["perplexity"] == pytest.approx(math.exp(last["loss"]))

    def test_a_report_is_the_mean_over_the_tokens_since_the_last(self, here: Path) -> None:
        """The rows of each batch from the iterator; at learning rate 0 the model stays."""
        model, _, _ = load_model("whole")
        rows = rows_of("train")
        assert train("--iters", "5", "--steps-per-report", "2", "--learning-rate", "0") == 0
        batches = TrainingBatches(rows, 4, seed=0)
        singles = [mean_loss(model, arrays(batch)) for _ in range(5) for batch in next(batches)]
        means, weights = zip(*[(m.item(), t.item()) for m, t in singles], strict=True)
        expected = [
            np.average(means[a:b], weights=weights[a:b]) for a, b in ((0, 2), (2, 4), (4, 5))
        ]
        assert losses(kind="train") == pytest.approx(expected, rel=1e-5)

    def test_a_loss_that_is_not_finite_is_null(self, here: Path) -> None:
        with RunLog(Path("adapters/metrics.jsonl")) as log:
            log.evaluation(3, "valid", Evaluation(math.nan, tokens=1, seconds=0.0))
            log.evaluation(4, "valid", Evaluation(1000.0, tokens=1, seconds=0.0))
        assert [(m["loss"], m["perplexity"]) for m in metrics()] == [(None, None), (1000.0, None)]

    def test_a_second_run_starts_its_metrics_anew(self, here: Path) -> None:
        assert train() == 0
        first = len(metrics())
        assert train() == 0
        assert len(metrics()) == first

    def test_a_test_alone_leaves_the_files_of_the_training(self, here: Path) -> None:
        assert train() == 0
        before = snapshot(Path("adapters"))
        assert run("--test") == 0
        assert snapshot(Path("adapters")) == before

    @pytest.mark.parametrize("suffix", ["npz", "safetensors"])
    def test_a_saved_adapter_gives_the_loss_that_training_ended_with(
        self, here: Path, suffix: str
    ) -> None:
        name = f"out/a.{suffix}"
        assert train("--test", "--adapter-file", name) == 0
        model, _, _ = load_model("whole")
        use_adapter(model, Options(model="whole", adapter_file=name, test=True))
        measured = evaluate_split(model, Split(rows_of("test")), 4).loss
        assert [measured] == losses("out", split="test")

    def test_another_process_measures_what_training_measured(
        self, here: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert train("--test") == 0
        together = capsys.readouterr().out.splitlines()[-1]
        apart = execute("--model", "whole", "--data", "data", "--test", cwd=here)
        assert (apart.returncode, apart.stderr) == (0, "")
        said = apart.stdout.splitlines()[-1].split(" (")[0]
        assert said.startswith("test loss") and said in together

    def test_resuming_starts_from_the_saved_weights(
        self, here: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert train("--rank", "4", "--targets", "q_proj", "--adapter-file", "one/a.npz") == 0
        resume = ("--resume-adapter-file", "one/a.npz", "--adapter-file", "two/a.safetensors")
        assert train(*resume, "--dropout", "0.25") == 0
        assert losses("two", step=0, kind="eval") == losses("one", step=3, kind="eval")
        assert losses("two", step=3, kind="eval") < losses("two", step=0, kind="eval")
        assert "starting from one/a.npz" in capsys.readouterr().out
        adapter = load_adapter(Path("two/a.safetensors"))
        assert adapter.layers == load_adapter(Path("one/a.npz")).layers
        assert adapter.dropout == 0.25

    def test_an_adapter_can_be_resumed_in_its_own_place(self, here: Path) -> None:
        assert train() == 0
        saved = losses(step=3, kind="eval")
        assert train("--resume-adapter-file", "adapters/adapters.npz") == 0
        assert losses(step=0, kind="eval") == saved

    @pytest.mark.reference
    def test_mlx_lm_loads_a_run_folder_and_answers_alike(self, here: Path) -> None:
        from mlx_lm.utils import load_adapters

        assert train("--adapter-file", "out/adapters.safetensors") == 0
        ids = mx.array([[1, 20, 30, 40]])
        ours, _, _ = load_model("whole")
        use_adapter(ours, Options(model="whole", adapter_file="out/adapters.safetensors"))
        theirs = load_adapters(load_model("whole")[0], "out")
        theirs.eval()
        base = load_model("whole")[0](ids)
        np.testing.assert_allclose(ours(ids), theirs(ids), rtol=1e-5, atol=1e-6)
        assert mx.abs(ours(ids) - base).max().item() > 1e-3


class TestAdapterChoice:
    def test_nothing_at_the_default_place_is_the_base_model_and_is_said(
        self, here: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert run("--prompt", "The", "--temp", "0") == 0
        base = capsys.readouterr()
        assert base.err == "note: no adapter at adapters/adapters.npz: this is the base model\n"
        assert run("--prompt", "The", "--temp", "0", "--adapter-file", "none") == 0
        none = capsys.readouterr()
        assert none.err == "note: no adapter: this is the base model\n"
        assert base.out == none.out

    def test_an_adapter_at_the_default_place_is_used_without_a_word(
        self, here: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert train("--iters", "20") == 0
        assert run("--test", "--adapter-file", "none") == 0
        base = capsys.readouterr().out.splitlines()[-1]
        assert run("--test") == 0
        adapted = capsys.readouterr()
        assert adapted.err == ""
        assert adapted.out.splitlines()[-1] != base

    @pytest.mark.parametrize("name", ["whole", "quantized"])
    def test_the_base_alone_is_measured_without_all_logits_at_once(
        self, here: Path, name: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        heads: list[bool] = []
        evaluate = lora.evaluate_split

        def noting(model: nn.Module, *given: Any, **named: Any) -> Evaluation:
            heads.append(getattr(model, "loss_head", None) is not None)
            return evaluate(model, *given, **named)

        monkeypatch.setattr(lora, "evaluate_split", noting)
        assert run("--test", "--adapter-file", "none", model=name) == 0
        assert heads == [True]

    def test_an_adapter_of_another_base_model_is_said(
        self, here: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert train() == 0
        assert run("--test", model="quantized") == 0
        said = capsys.readouterr().err
        assert said == "note: adapters/adapters.npz was trained on whole\n"


def test_an_old_npz_is_measured_with_the_scale_that_alpha_says(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The MLX example's file, which tells neither rank nor scale."""
    base = tiny.write_model(tmp_path / "base")
    tiny.write_rows(tmp_path / "data", test=tiny.TEXTS)
    name = "model.layers.0.self_attn.q_proj"
    a, b = (mx.random.normal(s, key=mx.random.key(3)) for s in ((64, 4), (4, 64)))
    mx.savez(str(tmp_path / "a.npz"), **{f"{name}.lora_a": a, f"{name}.lora_b": b})

    def run(*arguments: str) -> tuple[str, str]:
        files = ["--model", str(base), "--data", str(tmp_path / "data")]
        file = ["--adapter-file", str(tmp_path / "a.npz")]
        assert lora.main([*files, *file, "--test", *arguments]) == 0
        printed = capsys.readouterr()
        line = next(line for line in printed.out.splitlines() if "loss" in line)
        return line.split("loss")[1].split()[0], printed.err

    default, said = run()
    assert "rank 4 from the shapes, scale 20, the default then" in said
    same, said = run("--alpha", "80")  # 80 / 4 is the default scale
    assert "alpha 80" in said and same == default
    other, _ = run("--alpha", "1")
    assert other != default
