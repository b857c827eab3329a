"""Packed rows train as their segment_ids do alone, and no document sees another."""

import json
import re
from pathlib import Path
from typing import Any

import lora
from graft.data.batches import TrainingBatches
from graft.data.collate import Batch, collate, collate_packed
from graft.data.examples import Split
from graft.runtime import cpu as backend
from graft.runtime.cpu import runs_on_cpu
from graft.training import chunked_loss as loss_module
from graft.training.activation_cache import cache_activations
from graft.training.chunked_loss import use_chunked_loss
from graft.training.frozen_prefix import prefix_removed
from graft.training.grad_checkpoint import checkpoint_blocks
from graft.training.objectives.sft import objective as sft
from graft.training.optimizers import make_optimizer, set_learning_rate
from graft.training.packing import SegmentMask, find_capacity, forward
from graft.training.step import UpdateStep, adapter_parameters

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from support import fast_cases
from support.fast_cases import arrays, assert_same_gradients, make_adapted, make_examples, mean_loss
from support.tiny import LLAMA, TEXTS, write_model, write_rows

WINDOWED = {
    "sliding_window": 8,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}
# Some without change, some with a window shorter than the segment_ids, one with experts of its own.
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in ("llama", "qwen2", "qwen3", "gemma", "phi3", "mixtral")},
    **{name: (name, {}) for name in ("olmo2", "cohere", "granite", "starcoder2")},
    "windowed llama": ("llama", WINDOWED),
    "gemma3_text": (
        "gemma3_text",
        {"sliding_window": 8, "sliding_window_pattern": 2, "query_pre_attn_scalar": 16},
    ),
    "qwen3_moe": (
        "qwen3_moe",
        {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            "moe_intermediate_size": 32,
            "norm_topk_prob": True,
            "tie_word_embeddings": True,
        },
    ),
}
GPT2 = {
    "n_embd": 64,
    "n_head": 4,
    "n_layer": 3,
    "n_positions": 512,
    "n_ctx": 512,
    "layer_norm_epsilon": 1e-5,
}
MAMBA = {
    "state_size": 16,
    "conv_kernel": 4,
    "use_bias": False,
    "use_conv_bias": True,
    "time_step_rank": 4,
    "tie_word_embeddings": True,
}
LENGTHS = [19, 9, 25, 2, 14, 30]
# With padding in each row, and a row that is one document.
PACKS = [[0, 1, 3], [2, 4], [5]]
WIDTH = 48


def make(name: str, monkeypatch: pytest.MonkeyPatch, **settings: Any) -> nn.Module:
    architecture, changes = ARCHITECTURES[name]
    before = fast_cases.ARCHITECTURES.get(architecture, {})
    monkeypatch.setitem(fast_cases.ARCHITECTURES, architecture, {**before, **changes})
    return make_adapted(architecture, **settings)


def batches() -> tuple[Batch, Batch]:
    """The same rows alone and packed."""
    examples = make_examples(LENGTHS)
    return collate(examples, range(len(examples))), collate_packed(examples, PACKS, WIDTH)


def gradients(model: nn.Module, batch: Batch) -> tuple[float, int, Any]:
    model.train()
    mx.random.seed(3)
    (mean, tokens), tree = nn.value_and_grad(model, mean_loss)(model, arrays(batch))
    return mean.item(), int(tokens.item()), tree


@pytest.mark.parametrize("full_logits", [False, True], ids=["head", "full logits"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_loss_and_gradients_are_those_of_the_documents_alone(
    name: str, full_logits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With padding, masked prompts, grouped-query attention, tied heads and windows."""
    model = make(name, monkeypatch)
    assert find_capacity(model, 512) == 512
    if not full_logits:
        use_chunked_loss(model)
    alone, packed = batches()
    loss, tokens, tree = gradients(model, alone)
    found_loss, found_tokens, found = gradients(model, packed)
    assert found_tokens == tokens
    assert found_loss == pytest.approx(loss, rel=1e-6)
    assert_same_gradients(found, tree)


def test_without_the_mask_it_would_be_another_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make("llama", monkeypatch)
    alone, packed = batches()
    loss, _, _ = gradients(model, alone)
    mean, _ = mean_loss(model, arrays(packed.without("segment_ids")))
    assert abs(mean.item() - loss) > 1e-4


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_quantized_layers_too(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make("qwen2", monkeypatch, bits=bits)
    loss, _, tree = gradients(model, batches()[0])
    found_loss, _, found = gradients(model, batches()[1])
    assert found_loss == pytest.approx(loss, rel=1e-6)
    assert_same_gradients(found, tree)


def test_half_precision_can_pack(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make("llama", monkeypatch)
    model.set_dtype(mx.bfloat16)
    assert find_capacity(model, 512) == 512
    loss, found = (gradients(model, batch)[0] for batch in batches())
    assert found == pytest.approx(loss, rel=2e-2)


@pytest.mark.parametrize("changed", [0, 1, 2])
@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma", "windowed llama"])
def test_a_document_changes_no_bit_of_another(
    name: str, changed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make(name, monkeypatch)
    model.eval()
    _, packed = batches()
    inputs, segment_ids = mx.array(packed["inputs"]), mx.array(packed["segment_ids"])
    there = segment_ids == changed + 1
    before = forward(model, inputs, segment_ids)
    after = forward(model, mx.where(there, (inputs + 7) % 512, inputs), segment_ids)
    same = np.array(mx.all(before == after, axis=-1))
    assert same[~np.array(there)].all()
    assert not same[np.array(there)].any()


def test_the_mask_by_hand() -> None:
    segment_mask = SegmentMask(mx.array([[1, 1, 2, 2, 2, 3]]))
    mask = segment_mask.make_mask(6)
    assert mask.dtype == mx.bool_ and mask.shape == (1, 1, 6, 6)
    assert np.array(mask[0, 0]).astype(int).tolist() == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [0, 0, 1, 0, 0, 0],
        [0, 0, 1, 1, 0, 0],
        [0, 0, 1, 1, 1, 0],
        [0, 0, 0, 0, 0, 1],
    ]
    windowed = np.array(segment_mask.make_mask(6, window_size=2)[0, 0]).astype(int)
    assert windowed[4].tolist() == [0, 0, 0, 1, 1, 0]


@pytest.mark.parametrize(("name", "changes"), [("gpt2", GPT2), ("mamba", MAMBA), ("gemma2", None)])
def test_what_cannot_pack_says_so(
    name: str,
    changes: dict[str, Any] | None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Positions from the start of a row, a state instead of keys, scores of another shape."""
    if changes is not None:
        monkeypatch.setitem(fast_cases.ARCHITECTURES, name, changes)
    assert find_capacity(make_adapted(name), 512) is None
    off = r"packing: off because (it changes this model's results|this model fails with it: \w+)\n"
    assert re.fullmatch(off, capsys.readouterr().out)


class FarPositions(nn.Module):
    """Scales what stands at position 100 and beyond, as some do with long texts."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.layers = model, model.layers

    def __call__(self, inputs: mx.array, cache: Any = None) -> mx.array:
        offset = cache[0].offset if cache else 0
        scales = mx.where(mx.arange(inputs.shape[1]) + offset < 100, 1.0, 1.1)
        return self.model(inputs, cache=cache) * scales[:, None]


def test_positions_are_tried_up_to_the_end_of_a_row() -> None:
    model = FarPositions(make_adapted("llama"))
    assert find_capacity(model, 100) == 100
    assert find_capacity(model, 101) is None


def test_a_packed_row_is_no_longer_than_what_the_model_was_made_for() -> None:
    model = make_adapted("llama")
    assert find_capacity(model, 100) == 100
    assert find_capacity(model, 10_000) == 512


def train(
    *, accumulation: int = 1, workers: int = 1, epochs: int = 1, blocks: int | None = None
) -> tuple[list[float], UpdateStep, dict[str, mx.array]]:
    """Losses, step and adapter after packed steps of four rows."""
    model = make_adapted("llama", num_layers=blocks)
    use_chunked_loss(model)
    optimizer = make_optimizer("sgd")
    examples = make_examples(LENGTHS * 4)
    steps_of = TrainingBatches(
        examples, 4 // accumulation, accumulation=accumulation, workers=workers, capacity=WIDTH
    )
    update = UpdateStep(model, sft, optimizer, workers=workers)
    set_learning_rate(optimizer, 1e-2)
    model.train()
    losses = []
    for _ in range(steps_of.steps_in(epochs)):
        losses.append(update([arrays(batch) for batch in next(steps_of)]).loss)
    return losses, update, adapter_parameters(model)


on_cpu = pytest.mark.skipif(not runs_on_cpu(), reason="only a CPU has several workers")


@pytest.mark.parametrize(
    "division",
    [{"accumulation": 4}, {"accumulation": 2}, pytest.param({"workers": 2}, marks=on_cpu)],
)
def test_dividing_packed_batches_changes_nothing(division: dict[str, int]) -> None:
    """By accumulation, which weighs gradients by their tokens, and by workers."""
    losses, _, adapter = train()
    found, _, parts = train(**division)
    assert found == pytest.approx(losses, rel=1e-5)
    for path, array in adapter.items():
        assert mx.allclose(parts[path], array, rtol=1e-4, atol=1e-6), path


@pytest.mark.slow
def test_compiled_steps_pack_as_plain_ones_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU; one trace for each shape, and one for the update."""
    losses, plain, _ = train(blocks=1, epochs=2)
    assert plain.traces == (0, 0)
    for module in (backend, loss_module):
        monkeypatch.setattr(module, "runs_on_cpu", lambda: False)
    found, compiled, _ = train(blocks=1, epochs=2)
    assert found == pytest.approx(losses, rel=1e-5)
    traces, needed = compiled.traces
    # Of the three parts of a step, only one has shapes that change.
    assert 3 <= traces == needed < 2 + len(losses)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("name", ["llama", "windowed llama", "mixtral"])
def test_recomputed_blocks_get_the_same_mask(
    name: str, dropout: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make(name, monkeypatch, dropout=dropout)
    _, packed = batches()
    loss, _, tree = gradients(model, packed)
    checkpoint_blocks(model)
    found_loss, _, found = gradients(model, packed)
    assert found_loss == pytest.approx(loss, rel=1e-6)
    assert_same_gradients(found, tree)


@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma", "mixtral"])
def test_states_of_a_cached_trunk_are_packed_too(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    model = make(name, monkeypatch, num_layers=1)
    use_chunked_loss(model)
    splits = {"train": Split(make_examples(LENGTHS))}
    loss, _, tree = gradients(model, collate_packed(splits["train"].examples, PACKS, WIDTH))
    settings: dict[str, Any] = {"mode": "memory", "repeated": True, "model_key": "a model"}
    splits = cache_activations(model, splits, sft, folder=tmp_path, **settings)
    assert prefix_removed(model)
    found_loss, _, found = gradients(model, collate_packed(splits["train"].examples, PACKS, WIDTH))
    assert found_loss == pytest.approx(loss, rel=1e-5)
    assert_same_gradients(found, tree)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """With a `model`, a `gpt2` and `data`."""
    write_model(tmp_path / "model", LLAMA, bits=4)
    sizes = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "vocab_size": 512}
    write_model(tmp_path / "gpt2", {**GPT2, **sizes, "num_key_value_heads": 4})
    write_rows(tmp_path / "data", train=TEXTS * 5, valid=TEXTS)
    return tmp_path


def run(folder: Path, name: str, *arguments: str, model: str = "model") -> list[float]:
    """The losses of a run, by reports and validations."""
    sources = ["--model", str(folder / model), "--data", str(folder / "data")]
    place = ["--adapter-file", str(folder / name / "a.npz")]
    rest = ["--steps-per-report", "1", "--batch-size", "2", "--learning-rate", "1e-2"]
    assert lora.main(["--train", *sources, *place, *rest, *arguments]) == 0
    lines = (folder / name / "metrics.jsonl").read_text().splitlines()
    return [line["loss"] for line in map(json.loads, lines) if "loss" in line]


def test_a_run_says_how_many_rows_went_where(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    losses = run(folder, "out", "--pack", "--epochs", "2", "--max-seq-length", "128")
    said = capsys.readouterr().out
    assert "packing: 20 rows in " in said
    assert "of 2 packed rows" in said
    assert losses[-1] < losses[0]


@pytest.mark.slow
def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(folder: Path) -> None:
    settings = ["--pack", "--dropout", "0.2", "--max-seq-length", "128", "--save-every", "3"]
    whole = run(folder, "whole", *settings, "--iters", "14")
    run(folder, "parts", *settings, "--iters", "6")
    parts = run(folder, "parts", "--resume", "--iters", "14")
    # The first part ended with a validation of its own.
    assert [parts[0], *parts[1:7], *parts[8:]] == whole


@pytest.mark.parametrize("extra", [[], ["--grad-checkpoint"], ["--lora-layers", "1"]])
def test_everything_of_an_epoch_in_one_step_is_what_it_is_unpacked(
    folder: Path, extra: list[str]
) -> None:
    """Full-batch descent: packed or not, each step sees all rows."""
    settings = ["--batch-size", "32", "--iters", "4", "--max-seq-length", "128", *extra]
    plain = run(folder, "plain", *settings)
    assert run(folder, "packed", "--pack", *settings) == pytest.approx(plain, rel=1e-4)


def test_a_model_that_cannot_pack_trains_as_without_the_option(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = ["--iters", "4", "--max-seq-length", "128"]
    plain = run(folder, "plain", *settings, model="gpt2")
    assert run(folder, "packed", "--pack", *settings, model="gpt2") == plain
    assert "packing: off" in capsys.readouterr().out
