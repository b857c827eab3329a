"""The predicted memory of a training run against its peak, and budgets against what they hold."""

import gc
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lora
from graft.adapters.attach import attach
from graft.adapters.targets import plan as plan_targets
from graft.data.examples import Example, Split
from graft.pretrained.load import build_model
from graft.runtime.cpu import suit_backend
from graft.runtime.memory import peak_bytes, reset_peak
from graft.runtime.workers import choose_workers
from graft.training import dry_run
from graft.training.chunked_loss import use_chunked_loss
from graft.training.dry_run import MemoryTrial, saved_plan
from graft.training.evaluate import evaluate_split
from graft.training.memory_plan import MemoryPlan
from graft.training.objectives.sft import objective as sft
from graft.training.optimizers import make_optimizer, set_learning_rate
from graft.training.options import Options, record

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from support import tiny
from support.fast_cases import ARCHITECTURES

SIZES: dict[str, Any] = {
    "hidden_size": 128,
    "num_hidden_layers": 3,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "rms_norm_eps": 1e-5,
    "vocab_size": 2048,
    "rope_theta": 10000.0,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
}


@pytest.fixture(autouse=True)
def limits() -> Iterator[None]:
    """Budgets hold for the process: put its limits back."""
    memory, cache = mx.set_memory_limit(2**40), mx.set_cache_limit(2**40)
    yield
    mx.set_memory_limit(memory)
    mx.set_cache_limit(cache)


def let_go() -> None:
    """Give back what earlier runs hold."""
    gc.collect()


def prepared(
    name: str,
    *,
    bits: int = 0,
    top: int = -1,
    method: str = "lora",
    dropout: float = 0.0,
    whole: bool = False,
    sizes: dict[str, Any] | None = None,
    **options: Any,
) -> MemoryTrial:
    """An adapted model and 16 rows of 64 to 256 tokens to train it on."""
    mx.random.seed(0)
    config = {**SIZES, "model_type": name, **ARCHITECTURES[name], **(sizes or {})}
    model = build_model(config)
    if bits:
        nn.quantize(model, group_size=32, bits=bits)
    suit_backend(model)
    rank = 2 if method == "lora" else 1
    settings = plan_targets(model, ("all-linear",), rank=rank, num_layers=top, method=method)
    attach(model, settings, dropout=dropout)
    if not whole:
        use_chunked_loss(model)
    mx.eval(model.parameters())
    split = make_split(16, vocabulary=config["vocab_size"])
    chosen = Options(**{"batch_size": 4, "workers": 1, **options})
    splits = {"train": split, "valid": make_split(3, vocabulary=config["vocab_size"])}
    return MemoryTrial(model, splits, chosen, make_optimizer("adam"), sft)


def make_split(rows: int, *, vocabulary: int) -> Split:
    generator = np.random.default_rng(rows)
    lengths = generator.integers(64, 257, rows)
    lengths[0] = 257
    examples = [
        Example(generator.integers(0, vocabulary, n).astype(np.int32), np.ones(n, dtype=np.bool_))
        for n in lengths
    ]
    return Split(examples)


def bytes_of_an_epoch(prepare: MemoryTrial, plan: MemoryPlan) -> int:
    """The peak of real steps over all rows and of measuring."""
    batches, update = prepare.build(plan)
    set_learning_rate(prepare.optimizer, 1e-4)
    reset_peak()
    for _ in range(batches.steps_per_epoch):
        prepare.model.train()
        assert update([batch.to_mlx() for batch in next(batches)]).finite
    workers = choose_workers(prepare.options.workers, plan.rows)
    evaluate_split(prepare.model, prepare.splits["valid"], plan.rows, workers=workers)
    return peak_bytes()


CASES: dict[str, tuple[str, dict[str, Any], MemoryPlan]] = {
    "llama": ("llama", {}, MemoryPlan(4, False)),
    "two workers": ("llama", {"workers": 2}, MemoryPlan(4, False)),
    "one row of four": ("llama", {"workers": 2}, MemoryPlan(1, False)),
    "accumulated": ("llama", {"grad_accumulation_steps": 2}, MemoryPlan(2, False)),
    "recomputed": ("llama", {"sizes": {"num_hidden_layers": 8}}, MemoryPlan(4, True)),
    "recomputed, 4 bits, two workers": ("llama", {"bits": 4, "workers": 2}, MemoryPlan(4, True)),
    "4 bits": ("llama", {"bits": 4}, MemoryPlan(4, False)),
    "wide, 4 bits": (
        "llama",
        {"bits": 4, "sizes": {"hidden_size": 384, "intermediate_size": 1024}},
        MemoryPlan(2, False),
    ),
    "many words": ("llama", {"sizes": {"vocab_size": 32768}}, MemoryPlan(2, False)),
    "whole logits": ("llama", {"sizes": {"vocab_size": 8192}, "whole": True}, MemoryPlan(4, False)),
    "top layer": ("llama", {"top": 1}, MemoryPlan(4, False)),
    "dropout": ("llama", {"dropout": 0.1}, MemoryPlan(4, False)),
    "dora": ("llama", {"method": "dora"}, MemoryPlan(4, False)),
    "full": ("llama", {"method": "full"}, MemoryPlan(1, False)),
    "full, two workers": ("llama", {"method": "full", "workers": 2}, MemoryPlan(4, False)),
    "qwen2, tied": ("qwen2", {}, MemoryPlan(4, False)),
    "gemma": ("gemma", {}, MemoryPlan(4, False)),
    "gemma2, logits capped": ("gemma2", {}, MemoryPlan(4, False)),
    "experts": ("mixtral", {}, MemoryPlan(4, False)),
    "experts, 4 bits, recomputed": ("mixtral", {"bits": 4}, MemoryPlan(4, True)),
}


QUICK_CASES = ("two workers", "recomputed, 4 bits, two workers", "gemma2, logits capped")


@pytest.mark.parametrize(
    "case",
    [pytest.param(c, marks=() if c in QUICK_CASES else pytest.mark.slow) for c in CASES],
)
def test_a_rehearsal_tells_what_training_takes(case: str) -> None:
    """Within 15 %, counting only what this model takes.

    MLX runs further ahead of workers that other processes hold up, so a difference has to show
    three times in a row.
    """
    name, how, plan = CASES[case]
    for _ in range(3):
        let_go()
        before = mx.get_active_memory()
        trial = prepared(name, **how)
        told = trial.dry_run(plan, 1) - before
        taken = bytes_of_an_epoch(trial, plan) - before
        if told == pytest.approx(taken, rel=0.15):
            return
        del trial
    pytest.fail(f"a dry run takes {told:,} bytes and training {taken:,}, three times")


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model `m` and a folder `data` with rows of up to 200 tokens."""
    folder = tmp_path_factory.mktemp("dry_run")
    tiny.write_model(folder / "m", {**tiny.LLAMA, "hidden_size": 128, "intermediate_size": 512})
    texts = ["".join(tiny.TEXTS[n:] + tiny.TEXTS[:n]) * (1 + n % 3) for n in range(12)]
    tiny.write_rows(folder / "data", train=texts, valid=texts[:5], test=texts[:3])
    return folder


def run(shared: Path, out: Path, *arguments: str, status: int = 0) -> list[dict[str, Any]]:
    """Train with four rows a step; the lines of the metrics."""
    let_go()
    where = ["--model", str(shared / "m"), "--data", str(shared / "data"), "--train"]
    files = ["--adapter-file", str(out / "adapters.npz"), "--steps-per-report", "1"]
    rates = [
        "--learning-rate",
        "1e-2",
        "--val-batches",
        "1",
        "--workers",
        "1",
        "--lora-layers",
        "-1",
    ]
    assert lora.main([*where, *files, *rates, *arguments]) == status
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def losses(lines: list[dict[str, Any]]) -> list[float]:
    return [line["loss"] for line in lines if "loss" in line]


def tokens(lines: list[dict[str, Any]]) -> list[int]:
    return [line["tokens"] for line in lines if "tokens" in line]


@pytest.mark.slow
def test_a_budget_is_kept_and_changes_no_result(
    shared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    let_go()
    rest = mx.get_active_memory()
    free = run(shared, tmp_path / "free", "--iters", "4")
    most = max(line.get("peak_memory_bytes", 0) for line in free)
    told = capsys.readouterr().out
    assert "memory: about " in told
    seen: set[str] = set()
    # Two rows take about half, one 0.3, and 0.2 where its blocks are recomputed.
    for share in (0.7, 0.42, 0.25):
        budget = round(rest + share * (most - rest))
        out = tmp_path / str(share)
        lines = run(shared, out, "--iters", "4", "--memory-budget", f"{budget}B")
        assert max(line.get("peak_memory_bytes", 0) for line in lines) <= budget
        assert losses(lines) == pytest.approx(losses(free), rel=1e-4)
        assert tokens(lines) == tokens(free)
        seen |= set(
            re.findall(
                r"memory: micro-batch (\d of 4, gradient checkpointing \w+), ",
                capsys.readouterr().out,
            )
        )
    assert seen == {
        "2 of 4, gradient checkpointing off",
        "1 of 4, gradient checkpointing off",
        "1 of 4, gradient checkpointing on",
    }


def test_a_budget_too_small_is_one_line_with_one_that_does(
    shared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "metrics.jsonl").touch()
    run(shared, tmp_path, "--iters", "1", "--memory-budget", "1KB", status=2)
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    (enough,) = re.findall(r"needs at least (.+?);", error)
    assert run(shared, tmp_path, "--iters", "1", "--memory-budget", enough)


@pytest.mark.slow
def test_a_resumed_run_keeps_its_plan_and_its_bits(
    shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    let_go()
    rest = mx.get_active_memory()
    most = max(
        line.get("peak_memory_bytes", 0) for line in run(shared, tmp_path / "free", "--iters", "1")
    )
    budget = ["--memory-budget", f"{round(rest + 0.45 * (most - rest))}B"]
    run(shared, tmp_path / "whole", "--iters", "4", *budget)
    run(shared, tmp_path / "parts", "--iters", "2", *budget)
    monkeypatch.setattr(dry_run, "choose_plan", pytest.fail)
    run(shared, tmp_path / "parts", "--iters", "4", "--resume")
    whole, parts = (mx.load(str(tmp_path / name / "adapters.npz")) for name in ("whole", "parts"))
    assert all(mx.array_equal(whole[key], parts[key]) for key in whole)


def test_a_plan_is_kept_until_rows_or_budget_are_to_be_others() -> None:
    options = Options(batch_size=4, memory_budget="1GB")
    saved = {"options": record(options), "plan": {"rows": 2, "recompute": True, "peak_bytes": 9}}
    assert saved_plan(saved, options) == MemoryPlan(2, True)
    assert saved_plan(saved, Options(batch_size=4, memory_budget="2GB")) is None
    fewer = Options(batch_size=2, grad_accumulation_steps=2, memory_budget="1GB")
    assert saved_plan(saved, fewer) is None
    assert saved_plan({"options": record(options)}, options) is None


@pytest.mark.parametrize(
    "arguments, told",
    [
        (
            ["--train", "--memory-budget", "many"],
            "--memory-budget 'many' is not a size: give",
        ),
        (["--train", "--memory-budget", "900TB"], "--memory-budget 900TB: this machine has "),
        (["--test", "--memory-budget", "1GB"], "--memory-budget 1GB only applies to --train"),
    ],
)
def test_a_budget_that_is_none_is_refused_before_anything_is_loaded(
    arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert lora.main([*arguments, "--model", "nowhere"]) == 2
    assert told in capsys.readouterr().err
