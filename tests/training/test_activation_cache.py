"""Training from what enters the first adapted block equals training the whole model."""

import errno
import json
from pathlib import Path
from typing import Any

import lora
from graft.data.collate import collate
from graft.data.examples import Split
from graft.training import activation_cache as trunk
from graft.training.activation_cache import (
    cache_activations,
    cached_bytes,
)
from graft.training.chunked_loss import use_chunked_loss
from graft.training.evaluate import evaluate_split
from graft.training.frozen_prefix import prefix_length, prefix_removed
from graft.training.objectives.sft import objective as sft

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from support.fast_cases import (
    ARCHITECTURES,
    arrays,
    assert_same_gradients,
    make_adapted,
    make_examples,
    mean_loss,
)
from support.tiny import LLAMA, TEXTS, write_model, write_rows

SETTINGS: dict[str, Any] = {"mode": "memory", "repeated": True, "model_key": "a model"}


def make_splits() -> dict[str, Split]:
    return {"train": Split(make_examples()), "valid": Split(make_examples([5, 31, 12]))}


def gradients(model: nn.Module, split: Split) -> tuple[float, Any]:
    batch = collate(split.examples, range(len(split)))
    model.train()
    (mean, _), tree = nn.value_and_grad(model, mean_loss)(model, arrays(batch))
    return mean.item(), tree


@pytest.mark.parametrize("mode", ["memory", "disk"])
@pytest.mark.parametrize("num_layers", [1, 2])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_loss_and_gradients_are_those_of_the_whole_model(
    name: str, num_layers: int, mode: str, tmp_path: Path
) -> None:
    model = make_adapted(name, num_layers=num_layers)
    use_chunked_loss(model)
    splits = make_splits()
    expected = {split: gradients(model, splits[split]) for split in splits}
    evaluated = evaluate_split(model, splits["valid"], 2)
    cached = cache_activations(model, splits, sft, folder=tmp_path, **SETTINGS | {"mode": mode})
    assert prefix_removed(model)
    for split, (loss, tree) in expected.items():
        found_loss, found = gradients(model, cached[split])
        assert found_loss == pytest.approx(loss, rel=1e-5)
        assert_same_gradients(found, tree)
    assert evaluate_split(model, cached["valid"], 2).loss == pytest.approx(evaluated.loss, rel=1e-5)


def test_a_quantized_trunk_gives_the_same_losses(tmp_path: Path) -> None:
    model, splits = make_adapted("qwen2", num_layers=1, bits=4), make_splits()
    loss, tree = gradients(model, splits["train"])
    cached = cache_activations(model, splits, sft, folder=tmp_path, workers=2, **SETTINGS)
    found_loss, found = gradients(model, cached["train"])
    assert found_loss == pytest.approx(loss, rel=1e-5)
    assert_same_gradients(found, tree)


def test_the_blocks_below_leave_the_model_and_paths_stay(tmp_path: Path) -> None:
    model = make_adapted("llama", num_layers=1)
    trained = [path for path, _ in tree_flatten(model.trainable_parameters())]
    assert prefix_length(model) == 2
    cache_activations(model, make_splits(), sft, folder=tmp_path, **SETTINGS)
    paths = [path for path, _ in tree_flatten(model.parameters())]
    assert not [path for path in paths if path.startswith(("model.layers.0", "model.layers.1"))]
    assert [path for path, _ in tree_flatten(model.trainable_parameters())] == trained


def test_states_are_of_half_precision_where_the_model_is(tmp_path: Path) -> None:
    model = make_adapted("llama", num_layers=1)
    model.set_dtype(mx.bfloat16)
    splits = make_splits()
    loss, _ = gradients(model, splits["train"])
    cached = cache_activations(model, splits, sft, folder=tmp_path, **SETTINGS)
    assert prefix_removed(model)
    assert cached["train"].examples[0].states.dtype == "uint16"
    assert gradients(model, cached["train"])[0] == pytest.approx(loss, rel=2e-2)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"mode": "off"}, ""),
        ({"mode": "auto", "repeated": False}, ""),
        ({"mode": "auto"}, "in memory"),
    ],
)
def test_auto_is_for_rows_that_are_seen_again(
    settings: dict[str, Any], told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, splits = make_adapted("llama", num_layers=1), make_splits()
    cached = cache_activations(model, splits, sft, folder=tmp_path, **SETTINGS | settings)
    assert prefix_removed(model) == bool(told)
    assert told in capsys.readouterr().out
    if not told:
        assert cached == splits


def test_auto_takes_the_disk_where_memory_is_short_and_neither_where_both_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(trunk, "machine_bytes", lambda: 1000)
    model = make_adapted("llama", num_layers=1)
    cache_activations(model, make_splits(), sft, folder=tmp_path, **SETTINGS | {"mode": "auto"})
    assert "on disk" in capsys.readouterr().out
    assert len(list(tmp_path.glob("activations-*.npy"))) == 1
    monkeypatch.setattr(trunk, "DISK_SHARE", 0)
    model = make_adapted("llama", num_layers=1)
    cache_activations(model, make_splits(), sft, folder=tmp_path, **SETTINGS | {"mode": "auto"})
    assert "would not fit in memory or on disk" in capsys.readouterr().out
    assert not prefix_removed(model)


def test_a_budget_leaves_states_less_memory_and_tells_what_they_take(tmp_path: Path) -> None:
    auto = SETTINGS | {"mode": "auto", "folder": tmp_path}
    expected = cache_activations(make_adapted("llama", num_layers=1), make_splits(), sft, **auto)
    taken = sum(example.states.nbytes for split in expected.values() for example in split.examples)
    assert sum(map(cached_bytes, expected.values())) == taken > 0
    model, tight = make_adapted("llama", num_layers=1), {**auto, "budget": 3 * taken}
    found = cache_activations(model, make_splits(), sft, **tight)
    assert sum(map(cached_bytes, found.values())) == 0
    assert len(list(tmp_path.glob("activations-*.npy"))) == 1
    for name, split in expected.items():
        for ours, theirs in zip(found[name].examples, split.examples, strict=True):
            np.testing.assert_allclose(ours.states, theirs.states, rtol=1e-4, atol=1e-5)


def test_a_file_is_used_again_for_the_same_model_data_and_cut_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    computed = []
    compute = trunk._compute
    monkeypatch.setattr(
        trunk, "_compute", lambda *a, **k: computed.append(a[1]) or compute(*a, **k)
    )

    def cache(num_layers: int = 1, key: str = "a model", **splits: Split) -> None:
        model = make_adapted("llama", num_layers=num_layers)
        settings = SETTINGS | {"mode": "disk", "model_key": key}
        cache_activations(model, make_splits() | splits, sft, folder=tmp_path, **settings)

    cache()
    cache()
    assert computed == [2]
    cache(num_layers=2)
    cache(key="another")
    cache(valid=Split(make_examples([3, 4])))
    assert computed == [2, 1, 2, 2]
    assert len(list(tmp_path.glob("activations-*.npy"))) == 1


def test_a_disk_that_is_too_full_for_the_file_leaves_the_whole_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its space is taken first: a mapped file without any would end the process."""

    def full(path: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(trunk, "reserve", full)
    model, splits = make_adapted("llama", num_layers=1), make_splits()
    cached = cache_activations(model, splits, sft, folder=tmp_path, **SETTINGS | {"mode": "disk"})
    assert all(row.states is None for split in cached.values() for row in split.examples)
    assert not prefix_removed(model)
    assert "cannot be written (No space left on device)" in capsys.readouterr().out
    assert not list(tmp_path.glob("*.npy"))


def test_nothing_lies_below_an_adapter_on_every_block(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = make_adapted("llama")
    cache_activations(model, make_splits(), sft, folder=tmp_path, **SETTINGS)
    assert not prefix_removed(model)
    assert "no block is below" in capsys.readouterr().out


def test_an_adapted_embedding_is_seen_and_keeps_the_whole_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = make_adapted("llama", num_layers=1, targets=("embed_tokens", "q_proj"))
    splits = make_splits()
    expected = gradients(model, splits["train"])
    cached = cache_activations(model, splits, sft, folder=tmp_path, **SETTINGS)
    assert not prefix_removed(model)
    assert "activation cache: off because this model fails with it" in capsys.readouterr().out
    loss, found = gradients(model, cached["train"])
    assert loss == expected[0]
    assert_same_gradients(found, expected[1], tolerance=0)


@pytest.mark.parametrize("extra", [[], ["--grad-checkpoint", "--dropout", "0.2"]])
def test_a_run_with_the_cache_has_the_losses_of_one_without(
    tmp_path: Path, extra: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    write_model(tmp_path / "model", LLAMA, bits=4)
    write_rows(tmp_path / "data", train=TEXTS * 2, valid=TEXTS, test=TEXTS[:2])
    both = []
    for mode in ("off", "auto", "disk"):
        place = ["--adapter-file", str(tmp_path / mode / "a.npz"), "--activation-cache", mode]
        source = ["--model", str(tmp_path / "model"), "--data", str(tmp_path / "data")]
        rest = ["--lora-layers", "1", "--steps-per-report", "1", "--iters", "6", "--test", *extra]
        prompt = ["--prompt", "The", "--num-tokens", "4", "--temp", "0", "--learning-rate", "1e-2"]
        assert lora.main(["--train", *source, *place, *rest, *prompt]) == 0
        lines = map(json.loads, (tmp_path / mode / "metrics.jsonl").read_text().splitlines())
        both.append([line["loss"] for line in lines if "loss" in line])
        assert ("activation cache: 2 of 3 blocks" in capsys.readouterr().out) == (mode != "off")
    assert len(both[0]) == 9
    assert both[0] == pytest.approx(both[1], rel=1e-4)
    assert both[1] == both[2]
