"""Training, and how its losses are reported."""

from pathlib import Path
from typing import Any

import lora
from graft.adapters.attach import lora_layers
from graft.adapters.files import load_adapter
from graft.pretrained.load import load_model
from graft.training.options import Options
from graft.training.setup import load_data

import mlx.core as mx
import mlx.nn as nn
import pytest

from support import tiny
from support.lora_runs import digest, losses, metrics, run, same_tensors, snapshot, train


class TestTraining:
    @pytest.mark.parametrize("name", ["whole", "quantized"])
    def test_training_lowers_the_loss(self, here: Path, name: str) -> None:
        """By half a nat on rows that are also in train."""
        assert train("--iters", "30", model=name) == 0
        first, last = losses(kind="eval", split="valid")
        assert last < first - 0.5
        reports = losses(kind="train")
        assert reports[-1] < reports[0]

    @pytest.mark.parametrize("name", ["whole", "quantized"])
    def test_base_weights_stay_as_they_are_to_the_byte(
        self, here: Path, monkeypatch: pytest.MonkeyPatch, name: str
    ) -> None:
        before = digest(load_model(name)[0])
        loaded: list[nn.Module] = []

        def load_and_keep(*arguments: Any) -> Any:
            result = load_model(*arguments)
            loaded.append(result[0])
            return result

        monkeypatch.setattr(lora, "load_model", load_and_keep)
        assert train("--dropout", "0.1", model=name) == 0
        assert digest(loaded[0]) == before
        assert all(mx.any(layer.lora_b != 0).item() for _, layer in lora_layers(loaded[0]))

    def test_the_model_on_disk_is_not_touched(self, here: Path) -> None:
        before = snapshot(Path("whole").resolve())
        assert train("--test") == 0
        assert snapshot(Path("whole").resolve()) == before

    def test_the_same_command_twice_gives_the_same_bits(self, here: Path) -> None:
        for folder in ("one", "two"):
            assert train("--seed", "5", "--test", "--adapter-file", f"{folder}/a.npz") == 0
        same_tensors("one/a.npz", "two/a.npz")
        assert losses("one") == losses("two")

    def test_another_seed_gives_another_adapter(self, here: Path) -> None:
        for seed in ("5", "6"):
            assert train("--seed", seed, "--adapter-file", f"{seed}/a.npz") == 0
        one = load_adapter(Path("5/a.npz")).tensors
        two = load_adapter(Path("6/a.npz")).tensors
        assert all(not mx.array_equal(one[name], two[name]).item() for name in one)

    def test_dropout_changes_training_repeatably_and_evaluation_not_at_all(
        self, here: Path
    ) -> None:
        for folder, rate in (("none", "0"), ("one", "0.5"), ("two", "0.5")):
            assert train("--dropout", rate, "--adapter-file", f"{folder}/a.npz") == 0
        same_tensors("one/a.npz", "two/a.npz")
        assert losses("none", step=0) == losses("one", step=0)
        assert losses("none", kind="train") != losses("one", kind="train")

    def test_a_model_learns_where_texts_end(
        self, here: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """Trained on one text, it says the rest of it and stops."""
        text = "The lazy dog jumps."
        tiny.write_rows(Path("one"), train=[text], valid=[text])
        settings = ("--batch-size", "1", "--iters", "200", "--learning-rate", "3e-3")
        assert train("--data", "one", *settings) == 0
        capsys.readouterr()
        assert run("--prompt", "The lazy", "--temp", "0", "--num-tokens", "200") == 0
        assert capsys.readouterr().out == text + "\n"

    def test_without_eos_a_text_does_not_end(self, here: Path) -> None:
        options = Options(train=True, data="data", add_eos_token=0)
        _, tokenizer, _ = load_model("whole")
        rows = load_data(options, tokenizer, context=None)["train"].examples
        assert all(tokenizer.eos_token_id not in row.tokens for row in rows)

    def test_training_ends_with_an_evaluation_and_a_save_wherever_it_ends(self, here: Path) -> None:
        assert train("--iters", "5", "--steps-per-eval", "2", "--save-every", "3") == 0
        evaluated = [m["step"] for m in metrics() if m["kind"] == "eval"]
        saved = [m["step"] for m in metrics() if m["kind"] == "event"]
        assert (evaluated, saved) == ([0, 2, 4, 5], [3, 5])

    def test_a_row_too_long_is_cut_counted_and_said(
        self, here: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert train("--max-seq-length", "10") == 0
        said = capsys.readouterr().out
        assert "train: 12 rows, 120 tokens, 12 truncated to 10 tokens" in said

    def test_no_row_is_longer_than_the_model_was_made_for(
        self, here: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        tiny.write_model(Path("short"), {**tiny.LLAMA, "max_position_embeddings": 8})
        assert train(model="short") == 0
        assert "12 truncated to 8 tokens" in capsys.readouterr().out
