"""lora.py: training, evaluation and generation as a person meets them."""

import hashlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import lora
from graft.adapters.attach import lora_layers
from graft.adapters.files import load_adapter
from graft.data.batches import TrainingBatches
from graft.data.collate import collate
from graft.data.examples import Example, Split, tokenize_rows
from graft.data.readers import read_jsonl
from graft.data.rows import Row
from graft.pretrained.load import load_model
from graft.pretrained.tokenizer import SentencePieceTokenizer
from graft.storage import atomic
from graft.training.evaluate import evaluate_split
from graft.training.metrics import Evaluation, RunLog
from graft.training.options import Options
from graft.training.setup import load_data, start_adapter, use_adapter

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from support import tiny
from support.fast_cases import arrays, mean_loss
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


class TestLoss:
    def test_padding_and_neighbours_do_not_change_a_loss(
        self, model: nn.Module, split: Split
    ) -> None:
        """A row's loss alone, padded to 256, and as part of a batch of other lengths."""
        means, counts = [], []
        for row in range(len(split)):
            alone = collate(split.examples, [row])
            mean, tokens = mean_loss(model, arrays(alone))
            wide = {
                name: mx.array(np.pad(array, ((0, 0), (0, 256 - array.shape[1]))))
                for name, array in alone.arrays.items()
            }
            padded, same = mean_loss(model, wide)
            assert padded.item() == pytest.approx(mean.item(), rel=1e-5)
            assert tokens.item() == same.item() == len(split.examples[row]) - 1
            means.append(mean.item())
            counts.append(tokens.item())
        together, tokens = mean_loss(model, arrays(collate(split.examples, range(len(split)))))
        assert tokens.item() == sum(counts)
        assert together.item() == pytest.approx(np.average(means, weights=counts), rel=1e-5)

    def test_what_stands_on_padding_does_not_matter(self, model: nn.Module, split: Split) -> None:
        batch = arrays(collate(split.examples, [0, 5]))
        mean, _ = mean_loss(model, batch)
        loss_mask = batch["loss_mask"]
        garbage = {
            "inputs": mx.where(loss_mask, batch["inputs"], 9),
            "targets": mx.where(loss_mask, batch["targets"], 7),
        }
        other, _ = mean_loss(model, batch | garbage)
        assert other.item() == pytest.approx(mean.item(), rel=1e-6)

    def test_a_batch_without_trained_tokens_has_loss_zero(
        self, model: nn.Module, split: Split
    ) -> None:
        batch = arrays(collate(split.examples, [0]))
        nothing = {"loss_mask": mx.zeros_like(batch["loss_mask"])}
        mean, tokens = mean_loss(model, batch | nothing)
        assert (mean.item(), tokens.item()) == (0.0, 0)


class TestEvaluate:
    @pytest.mark.parametrize("batch_size", [1, 2, 3, 4, 11, 64])
    def test_the_batch_size_does_not_matter(
        self, model: nn.Module, split: Split, batch_size: int
    ) -> None:
        """Expected by hand: the token-weighted mean of the rows' own losses."""
        total = tokens = 0.0
        for row in range(len(split)):
            mean, count = mean_loss(model, arrays(collate(split.examples, [row])))
            total, tokens = total + mean.item() * count.item(), tokens + count.item()
        result = evaluate_split(model, split, batch_size)
        assert result.tokens == tokens == sum(len(example) - 1 for example in split.examples)
        assert result.loss == pytest.approx(total / tokens, rel=1e-5)
        assert result.perplexity == pytest.approx(math.exp(result.loss))

    def test_a_number_of_batches_takes_the_same_rows_every_time(
        self, model: nn.Module, split: Split
    ) -> None:
        first, second = (evaluate_split(model, split, 2, num_batches=2) for _ in range(2))
        assert (first.loss, first.tokens) == (second.loss, second.tokens)
        assert 0 < first.tokens < evaluate_split(model, split, 2).tokens

    def test_dropout_is_off(self, here: Path, split: Split) -> None:
        model, _, _ = load_model("whole")
        start_adapter(model, Options(dropout=0.9))
        for _, layer in lora_layers(model):
            layer.lora_b = mx.ones_like(layer.lora_b)
        model.train()
        assert evaluate_split(model, split, 4).loss == evaluate_split(model, split, 4).loss


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
        assert base.err == "no adapter at adapters/adapters.npz: this is the base model\n"
        assert run("--prompt", "The", "--temp", "0", "--adapter-file", "none") == 0
        none = capsys.readouterr()
        assert none.err == "no adapter: this is the base model\n"
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

    def test_an_adapter_of_another_base_model_is_said(
        self, here: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert train() == 0
        assert run("--test", model="quantized") == 0
        said = capsys.readouterr().err
        assert said == "note: adapters/adapters.npz was trained on whole\n"


class Recorder:
    """Standard output that remembers what had been written at each flush."""

    def __init__(self) -> None:
        self.text = ""
        self.flushed: list[str] = []

    def write(self, text: str) -> int:
        self.text += text
        return len(text)

    def flush(self) -> None:
        self.flushed.append(self.text)


def answer(model: nn.Module, tokenizer: Any, prompt: str, **settings: Any) -> str:
    """What `lora.print_answer` prints."""
    with pytest.MonkeyPatch.context() as patch:
        recorder = Recorder()
        patch.setattr(sys, "stdout", recorder)
        lora.print_answer(model, tokenizer, Options(prompt=prompt, **{"temp": 0.0, **settings}))
    return recorder.text


class TestGenerate:
    def test_at_temperature_0_each_token_is_the_likeliest(self, here: Path) -> None:
        """Against whole forward passes without a cache."""
        model, tokenizer, _ = load_model("whole")
        ids = tokenizer.encode("The quick")
        for _ in range(12):
            ids.append(mx.argmax(model(mx.array([ids]))[0, -1]).item())
        assert tokenizer.eos_token_id not in ids
        expected = tokenizer.decode(ids) + "\n"
        for seed in (0, 1):
            assert answer(model, tokenizer, "The quick", num_tokens=12, seed=seed) == expected

    def test_sampling_is_repeatable_with_a_seed(self, here: Path) -> None:
        model, tokenizer, _ = load_model("whole")
        first, second, other = (
            answer(model, tokenizer, "The", temp=0.8, seed=seed, num_tokens=20)
            for seed in (3, 3, 4)
        )
        assert first == second != other

    @pytest.mark.parametrize("every", [1, 4])
    def test_the_answer_appears_while_it_is_made(
        self, here: Path, monkeypatch: pytest.MonkeyPatch, every: int
    ) -> None:
        model, tokenizer, _ = load_model("whole")
        recorder = Recorder()
        monkeypatch.setattr(sys, "stdout", recorder)
        options = Options(prompt="The", temp=0.0, num_tokens=12, write_every=every)
        lora.print_answer(model, tokenizer, options)
        assert recorder.flushed[0] == "The"
        assert recorder.flushed[-1] == recorder.text
        # The prompt, every so many of the 12 tokens, and the end.
        assert len(recorder.flushed) >= 1 + 12 // every + 1

    def test_as_many_tokens_as_asked_for(self, here: Path) -> None:
        model, tokenizer, _ = load_model("whole")
        short = answer(model, tokenizer, "The", num_tokens=3).rstrip("\n")
        assert answer(model, tokenizer, "The", num_tokens=6).startswith(short)

    def test_an_empty_prompt_starts_from_the_start_token(
        self, here: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert run("--prompt", "", "--temp", "0", "--num-tokens", "4") == 0
        assert capsys.readouterr().out.strip()

    def test_ids_above_the_tokenizers_vocabulary_have_no_text(self, shared: Path) -> None:
        """As models with a padded embedding may give."""
        _, tokenizer, _ = load_model(shared / "whole")
        ids = tokenizer.encode("The fox")
        assert tokenizer.decode([*ids, 400, 511]) == tokenizer.decode(ids)

    def test_the_reader_of_a_pipe_may_leave(self, here: Path) -> None:
        command = [sys.executable, str(ROOT / "lora.py"), "--model", "whole", "-p", "The\n"]
        options = ["-n", "5000", "--write-every", "1", "--adapter-file", "none"]
        child = subprocess.Popen(
            [*command, *options], stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=here
        )
        assert child.stdout is not None and child.stderr is not None
        assert child.stdout.readline() == b"The\n"
        child.stdout.close()
        assert child.stderr.read() == b"no adapter: this is the base model\n"
        child.stderr.close()
        assert child.wait(timeout=60) == 1


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_every_quantization_loads_trains_a_step_and_generates(
    here: Path, capsys: pytest.CaptureFixture[str], bits: int, group_size: int
) -> None:
    config = {**tiny.LLAMA, "hidden_size": 128, "num_hidden_layers": 1}
    tiny.write_model(Path("model"), config, bits=bits, group_size=group_size)
    arguments = ("--iters", "1", "--val-batches", "1", "--prompt", "The", "--num-tokens", "3")
    assert train(*arguments, model="model") == 0
    assert losses(step=1, kind="eval") < losses(step=0, kind="eval")
    assert capsys.readouterr().out.splitlines()[-1].startswith("The")


class TestOptions:
    def test_the_mlx_examples_options_are_taken(self, here: Path) -> None:
        """Names as in mlx-examples/lora/lora.py, both its first and its last version."""
        parser = lora.build_parser()
        text = (
            "--model m --max-tokens 5 -m 6 --num-tokens 7 -n 8 --write-every 1 --temp 0.5 "
            "--prompt a -p b --train --add-eos-token 1 --data d --lora-layers 4 --batch-size 2 "
            "--iters 9 --val-batches -1 --learning-rate 1e-5 --steps-per-report 3 "
            "--steps-per-eval 4 --resume-adapter-file r.npz --adapter-file a.npz --save-every 5 "
            "--test --test-batches 500 --seed 1"
        )
        given = parser.parse_args(text.split())
        assert (given.num_tokens, given.prompt, given.val_batches) == (8, "b", -1)
        assert {"train", "test", "adapter_file", "resume_adapter_file"} <= set(vars(given))

    def test_the_command_line_wins_over_a_config_file(self, here: Path) -> None:
        Path("run.yaml").write_text("train: true\niters: 2\nlearning-rate: 0.01\nrank: 4\n")
        assert run("--config", "run.yaml", "--rank", "2") == 0
        record = load_adapter(Path("adapters/adapters.npz"))
        assert {setting.rank for setting in record.layers.values()} == {2}
        assert [m["step"] for m in metrics() if m["kind"] == "eval"] == [0, 2]
        assert record.options["learning_rate"] == 0.01

    def test_a_saved_records_options_are_a_config_file(self, here: Path) -> None:
        assert train("--rank", "4") == 0
        saved = json.loads(Path("adapters/adapter_config.json").read_text())["options"]
        Path("again.yaml").write_text(json.dumps({**saved, "adapter_file": "again/a.npz"}))
        assert lora.main(["--config", "again.yaml"]) == 0
        same_tensors("adapters/adapters.npz", "again/a.npz")

    def test_everything_in_one_go(self, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
        arguments = ("--test", "--prompt", "The", "--temp", "0", "--num-tokens", "4")
        assert train("--iters", "20", *arguments) == 0
        together = capsys.readouterr()
        assert together.err == ""
        assert run(*arguments) == 0
        apart = capsys.readouterr().out.splitlines()
        assert together.out.splitlines()[-1] == apart[-1]

    def test_help_answers_without_the_slow_imports(self) -> None:
        code = (
            "import sys, lora\n"
            "try: lora.main(['--help'])\n"
            "except SystemExit as end: assert end.code == 0\n"
            "slow = {'mlx_lm', 'transformers', 'torch', 'huggingface_hub', 'sentencepiece'}\n"
            "assert not slow & set(sys.modules), slow & set(sys.modules)\n"
        )
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
        assert (done.returncode, done.stderr) == (0, "")
        assert "--learning-rate" in done.stdout

    def test_output_that_is_no_terminal_is_plain_lines(
        self, here: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert train("--test") == 0
        said = capsys.readouterr()
        assert said.err == "" and "\x1b" not in said.out and "\r" not in said.out
        lines = said.out.splitlines()
        assert [line.split(":")[0] for line in lines[:4]] == ["train", "valid", "test", "adapter"]
        assert [line.split(":")[0] for line in lines[4:6]] == ["training", "memory"]
        assert lines[6].startswith("step     0  valid loss 6.")
        assert lines[-1].startswith("step     3  test loss")


class TestInterruption:
    def test_ctrl_c_saves_the_adapter(self, here: Path) -> None:
        arguments = ["--train", "--iters", "100000", "--save-every", "1", "--val-batches", "1"]
        command = [sys.executable, str(ROOT / "lora.py"), "--model", "whole", "--data", "data"]
        child = subprocess.Popen(
            [*command, *arguments], cwd=here, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )  # fmt: skip
        wait_for(Path("adapters/adapter_config.json"), child)
        child.send_signal(signal.SIGINT)
        _, errors = child.communicate(timeout=60)
        assert (child.returncode, errors) == (130, b"")
        assert not [name for name in os.listdir("adapters") if name.startswith(".tmp")]
        assert run("--test") == 0

    def test_ctrl_c_ends_an_answer_with_one_line(self, here: Path) -> None:
        tiny.write_model(Path("long"), {**tiny.LLAMA, "max_position_embeddings": 1_000_000})
        command = [sys.executable, str(ROOT / "lora.py"), "--model", "long", "-p", "The\n"]
        options = ["-n", "1000000", "--temp", "0", "--adapter-file", "none"]
        child = subprocess.Popen(
            [*command, *options], cwd=here, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )  # fmt: skip
        assert child.stdout is not None and child.stdout.readline() == b"The\n"
        child.stdout.read(1)  # of the answer, which is then under way
        child.send_signal(signal.SIGINT)
        _, errors = child.communicate(timeout=60)
        assert errors == b"no adapter: this is the base model\ninterrupted\n"
        assert child.returncode == 130

    def test_a_crash_while_saving_leaves_the_previous_adapter(
        self, here: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        assert train() == 0
        before = load_adapter(Path("adapters/adapters.npz")).tensors

        def crash(path: Path) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(atomic, "_flush", crash)
        assert train() == 130
        monkeypatch.undo()
        os.chdir(here)
        after = load_adapter(Path("adapters/adapters.npz")).tensors
        assert all(mx.array_equal(before[name], after[name]).item() for name in before)
        assert not [name for name in os.listdir("adapters") if name.startswith(".tmp")]


# What is wrong -> the options, and words that the one line must have.
MISTAKES: dict[str, tuple[list[str], list[str]]] = {
    "nothing to do": ([], ["nothing to do", "--train, --test or --prompt"]),
    "no such option": (["--trian"], ["--trian"]),
    "no number": (["--train", "--rank", "four"], ["--rank", "'four'"]),
    "no value": (["--test", "--prompt"], ["--prompt"]),
    "no data folder": (["--train", "--data", "nowhere"], ["nowhere", "graft dataset"]),
    "data is a file": (["--train", "--data", "whole/config.json"], ["whole/config.json"]),
    "no model folder": (["--test", "--model", "./nowhere"], ["nowhere"]),
    "model is a file": (["--test", "--model", "whole/config.json"], ["whole/config.json", "file"]),
    "rank 0": (["--train", "--rank", "0"], ["--rank 0", "at least 1"]),
    "rank too large": (["--train", "--rank", "65"], ["rank 65", "model.layers.0", "64"]),
    "layers too many": (["--train", "--lora-layers", "4"], ["--lora-layers 4", "3 layers"]),
    "layers 0": (["--train", "--lora-layers", "0"], ["--lora-layers 0", "1 to 3"]),
    "layers -2": (["--train", "--lora-layers", "-2"], ["--lora-layers -2", "-1 for all"]),
    "no such target": (["--train", "--targets", "q_prjo,k_proj"], ["q_prjo", "q_proj, up_proj"]),
    "dropout 1": (["--train", "--dropout", "1"], ["--dropout 1", "below 1"]),
    "dropout below 0": (["--train", "--dropout", "-0.1"], ["--dropout -0.1", "at least 0"]),
    "batch size 0": (["--train", "--batch-size", "0"], ["--batch-size 0", "at least 1"]),
    "iters 0": (["--train", "--iters", "0"], ["--iters 0", "at least 1"]),
    "rate nan": (["--train", "--learning-rate", "nan"], ["--learning-rate nan"]),
    "temperature below 0": (["--prompt", "a", "--temp", "-1"], ["--temp -1", "at least 0"]),
    "seed too large": (["--train", "--seed", "4294967296"], ["--seed 4294967296", "4294967295"]),
    "no validation": (["--train", "--val-batches", "0"], ["--val-batches", "-1 for all"]),
    "two mistakes": (["--train", "--rank", "0", "--iters", "0"], ["--rank 0", "--iters 0"]),
    "training without a place": (["--train", "--adapter-file", "none"], ["--adapter-file none"]),
    "no format": (["--train", "--adapter-file", "out/a.bin"], ["out/a.bin", ".npz"]),
    "below a file": (
        ["--train", "--adapter-file", "whole/config.json/a.npz"],
        ["cannot write whole/config.json/a.npz", "is a file"],
    ),
    "over a folder": (["--train", "--adapter-file", "folder.npz"], ["folder.npz", "folder"]),
    "no such adapter": (["--test", "--adapter-file", "out/a.npz"], ["no adapter out/a.npz"]),
    "resume nothing": (["--train", "--resume-adapter-file", "a.npz"], ["no adapter a.npz"]),
    "resume without training": (
        ["--test", "--resume-adapter-file", "a.npz"],
        ["--resume-adapter-file", "--train"],
    ),
    "no config file": (["--config", "nowhere.yaml"], ["nowhere.yaml"]),
}  # fmt: skip


def refused(
    arguments: list[str], words: list[str], capsys: pytest.CaptureFixture[str], where: Path
) -> None:
    """`lora.py` says one line with these words, ends with 2 and writes nothing."""
    before = snapshot(where)
    capsys.readouterr()
    assert lora.main(["--model", "whole", "--data", "data", *arguments]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1, said
    assert all(word in said for word in words), said
    assert snapshot(where) == before


class TestBadInput:
    @pytest.mark.parametrize("mistake", MISTAKES)
    def test_a_mistaken_option(
        self, here: Path, capsys: pytest.CaptureFixture[str], mistake: str
    ) -> None:
        Path("folder.npz").mkdir()
        arguments, words = MISTAKES[mistake]
        refused(arguments, words, capsys, here)

    @pytest.mark.parametrize(
        ("content", "words"),
        [
            (None, ["bad/train.jsonl is missing"]),
            ("", ["bad/train.jsonl is empty"]),
            ("\n  \n", ["bad/train.jsonl is empty"]),
            ('{"text": "a"}\n{"text": \n', ["bad/train.jsonl:2", "broken JSON"]),
            ('{"text": "a"}\n\n{"question": "b"}\n', ["bad/train.jsonl:3", "'question'"]),
            ('["a"]\n{"text": 5}\n', ["bad/train.jsonl:1", "list", "bad/train.jsonl:2", "5"]),
            (b'{"text": "\xff"}\n', ["bad/train.jsonl", "utf-8"]),
        ],
        ids=["missing", "empty", "blank", "broken", "no text", "two rows", "not UTF-8"],
    )
    def test_data_that_cannot_be_read(
        self,
        here: Path,
        capsys: pytest.CaptureFixture[str],
        content: str | bytes | None,
        words: list[str],
    ) -> None:
        tiny.write_rows(Path("bad"), valid=["a"])
        if content is not None:
            raw = content if isinstance(content, bytes) else content.encode()
            Path("bad/train.jsonl").write_bytes(raw)
        refused(["--train", "--data", "bad"], words, capsys, here)

    @pytest.mark.parametrize("split", ["train", "test"])
    def test_a_missing_split(
        self, here: Path, capsys: pytest.CaptureFixture[str], split: str
    ) -> None:
        shutil.copytree("data", "less")
        Path("less", f"{split}.jsonl").unlink()
        arguments = ["--train", "--test", "--data", "less"]
        refused(arguments, [f"less/{split}.jsonl is missing"], capsys, here)

    @pytest.mark.parametrize("form", ["safetensors", "npz"])
    @pytest.mark.parametrize("kept", [0.0, 0.001, 0.5, 0.999])
    def test_truncated_weights(
        self, here: Path, capsys: pytest.CaptureFixture[str], form: str, kept: float
    ) -> None:
        tiny.write_model(Path("torn"), form=form)
        (file,) = [*Path("torn").glob("*.safetensors"), *Path("torn").glob("*.npz")]
        with file.open("r+b") as opened:
            opened.truncate(int(file.stat().st_size * kept))
        refused(["--train", "--model", "torn"], [file.name, "damaged"], capsys, here)

    @pytest.mark.parametrize(
        ("change", "words"),
        [
            ({"model_type": "nonesuch"}, ["nonesuch", "architecture"]),
            ({"model_type": None}, ["architecture"]),
            ({"num_hidden_layers": 4}, ["model.layers.3.mlp.up_proj.weight is missing"]),
            ({"num_hidden_layers": 2}, ["model.layers.2.mlp.up_proj.weight is not of"]),
            ({"intermediate_size": 96}, ["model.layers.0.mlp.up_proj.weight", "(128, 64)", "96"]),
            ({"hidden_size": None}, ["config.json"]),
            ({"quantization": {"group_size": 32}}, ["quantization", "bits"]),
        ],
        ids=["architecture", "no type", "missing", "left over", "shape", "no size", "bits"],
    )
    def test_a_configuration_that_does_not_fit(
        self,
        here: Path,
        capsys: pytest.CaptureFixture[str],
        change: dict[str, Any],
        words: list[str],
    ) -> None:
        shutil.copytree("whole", "other")
        Path("other/config.json").write_text(json.dumps({**tiny.LLAMA, **change}))
        refused(["--train", "--model", "other"], words, capsys, here)

    @pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.model"])
    def test_a_folder_that_lacks_a_file(
        self, here: Path, capsys: pytest.CaptureFixture[str], name: str
    ) -> None:
        shutil.copytree("whole", "less")
        Path("less", name).unlink()
        refused(["--train", "--model", "less"], ["less", name.split(".")[0]], capsys, here)

    def test_an_adapter_that_does_not_fit(
        self, here: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """Another width, fewer layers: every tensor is named, whatever it is wanted for."""
        tiny.write_model(Path("wide"), {**tiny.LLAMA, "intermediate_size": 160})
        tiny.write_model(Path("flat"), {**tiny.LLAMA, "num_hidden_layers": 1})
        assert train("--targets", "up_proj", "--lora-layers", "2") == 0
        both = ["model.layers.1.mlp.up_proj", "model.layers.2.mlp.up_proj"]
        name = "adapters/adapters.npz"
        refused(["--test", "--model", "wide"], [*both, "(8, 128)", "(8, 160)"], capsys, here)
        refused(["--prompt", "a", "--model", "flat"], [*both, name], capsys, here)
        resume = ["--train", "--resume-adapter-file", name, "--adapter-file", "out/a.npz"]
        refused([*resume, "--model", "flat"], [*both, name], capsys, here)

    def test_a_damaged_adapter(self, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
        for form in ("npz", "safetensors"):
            assert train("--adapter-file", f"{form}/a.{form}") == 0
            file = Path(form, f"a.{form}")
            whole, record = file.read_bytes(), file.with_name("adapter_config.json").read_text()
            file.write_bytes(whole[: len(whole) // 2])
            arguments = ["--test", "--adapter-file", str(file)]
            refused(arguments, [str(file), "damaged"], capsys, here)
            file.write_bytes(whole)
            file.with_name("adapter_config.json").write_text(record[: len(record) // 2])
            refused(arguments, [f"{form}/adapter_config.json", "JSON"], capsys, here)
            file.with_name("adapter_config.json").unlink()
            if form == "safetensors":  # an npz without a record is the MLX example's
                refused(arguments, [f"{form}/adapter_config.json is missing"], capsys, here)

    @pytest.mark.parametrize(
        ("content", "words"),
        [
            ("itres: 5\nrank: big\n", ["itres", "iters", "rank", "'big'", "int"]),
            ("train: [\n", ["bad.yaml", "YAML"]),
            ("just words\n", ["bad.yaml", "no options"]),
            ("rank: 0\n", ["--rank 0"]),
        ],
        ids=["names and types", "no YAML", "no options", "out of range"],
    )
    def test_a_config_file(
        self, here: Path, capsys: pytest.CaptureFixture[str], content: str, words: list[str]
    ) -> None:
        Path("bad.yaml").write_text(content)
        refused(["--train", "--config", "bad.yaml"], words, capsys, here)

    def test_an_empty_prompt_without_a_start_token(
        self, here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert train() == 0
        monkeypatch.setattr(SentencePieceTokenizer, "encode", lambda self, text: [])
        refused(["--prompt", ""], ["the prompt is empty"], capsys, here)

    @pytest.mark.parametrize(
        "arguments",
        [
            ["--train", "--data", "bad"],
            ["--train", "--data", "data", "--targets", "nonesuch"],
            ["--train", "--data", "data", "--model", "torn"],
            ["--train", "--data", "data", "--adapter-file", "whole/config.json/a.npz"],
        ],
        ids=["row", "target", "weights", "output"],
    )
    def test_as_a_person_meets_it(self, here: Path, arguments: list[str]) -> None:
        tiny.write_rows(Path("bad"), valid=["a"])
        Path("bad/train.jsonl").write_text('{"text": "a"}\n{"txt": "b"}\n')
        shutil.copytree("whole", "torn")
        Path("torn/model.safetensors").write_bytes(b"\x08\0\0")
        before = snapshot(here)
        done = execute("--model", "whole", *arguments, cwd=here)
        assert done.returncode == 2
        assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
        assert snapshot(here) == before


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
