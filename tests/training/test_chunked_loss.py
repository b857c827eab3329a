"""Cross-entropy without whole logits equals the plain one, and says where it cannot be used."""

import json
from pathlib import Path
from typing import Any

import lora
from graft.training import chunked_loss as graft_loss
from graft.training.chunked_loss import find_head, summed_cross_entropy

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from support.fast_cases import (
    ARCHITECTURES,
    arrays,
    assert_same_gradients,
    make_adapted,
    make_batch,
    mean_loss,
)
from support.tiny import TEXTS, write_model, write_rows

CAPPED = ("gemma2",)
WITH_HEAD = [name for name in ARCHITECTURES if name not in CAPPED]


def gradients(model: nn.Module) -> tuple[float, int, Any]:
    model.train()
    (mean, tokens), tree = nn.value_and_grad(model, mean_loss)(model, arrays(make_batch()))
    return mean.item(), int(tokens.item()), tree


@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("name", WITH_HEAD)
def test_loss_and_gradients_are_those_of_whole_logits(
    name: str, bits: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graft_loss, "SMALLEST_CHUNK", 5)
    monkeypatch.setattr(graft_loss, "CHUNK_VALUES", 1)
    model = make_adapted(name, bits=bits)
    mean, tokens, expected = gradients(model)
    model.loss_head, reason = find_head(model)
    assert model.loss_head is not None, reason
    fast_mean, fast_tokens, found = gradients(model)
    assert fast_mean == pytest.approx(mean, rel=1e-5)
    assert fast_tokens == tokens
    assert_same_gradients(found, expected)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("bits", [None, 4])
def test_tied_and_untied_heads_are_found(tied: bool, bits: int | None) -> None:
    model = make_adapted("llama", bits=bits, tie_word_embeddings=tied)
    head, _ = find_head(model)
    assert head is not None
    wanted = model.model.embed_tokens if tied else model.lm_head
    assert head._module is wanted


@pytest.mark.parametrize("name", WITH_HEAD)
def test_an_evaluation_gives_the_same_loss(name: str) -> None:
    model = make_adapted(name)
    model.eval()
    mean, tokens = mean_loss(model, arrays(make_batch()))
    model.loss_head = find_head(model)[0]
    found, same = mean_loss(model, arrays(make_batch()))
    assert found.item() == pytest.approx(mean.item(), rel=1e-5)
    assert same.item() == tokens.item()


def test_a_model_is_as_it_was_after_the_search_and_after_a_loss() -> None:
    model = make_adapted("qwen2")
    tokens = mx.array([[1, 2, 3]])
    types = [type(module) for module in model.modules()]
    before = model(tokens)
    model.loss_head = find_head(model)[0]
    mx.eval(mean_loss(model, arrays(make_batch())))
    assert mx.array_equal(model(tokens), before)
    assert [type(module) for module in model.modules()] == types


def test_capped_logits_are_left_to_the_plain_path_even_where_the_cap_hardly_shows() -> None:
    # tanh(z / cap) * cap with logits near 0.1: a difference of 1e-8.
    model = make_adapted("gemma2", final_logit_softcapping=30.0)
    assert mx.abs(model(mx.array([[1, 2, 3]]))).max().item() < 20
    head, reason = find_head(model)
    assert head is None
    assert "no layer outputs the logits unchanged" in reason


@pytest.mark.parametrize(
    ("targets", "changes", "named"),
    [
        (("lm_head", "q_proj"), {}, "lm_head is adapted"),
        (("embed_tokens", "q_proj"), {"tie_word_embeddings": True}, "embed_tokens"),
    ],
)
def test_an_adapted_head_is_left_to_the_plain_path(
    targets: tuple[str, ...], changes: dict[str, Any], named: str
) -> None:
    head, reason = find_head(make_adapted("llama", targets=targets, **changes))
    assert head is None
    assert named in reason and "is adapted" in reason


def test_an_adapted_embedding_under_a_head_of_its_own_does_not_matter() -> None:
    model = make_adapted("llama", targets=("embed_tokens", "q_proj"))
    expected = gradients(model)[2]
    model.loss_head = find_head(model)[0]
    assert model.loss_head is not None
    assert_same_gradients(gradients(model)[2], expected)


def test_the_loss_is_that_of_mlx_for_any_chunk() -> None:
    weight = mx.random.normal((50, 8), key=mx.random.key(0))
    hidden = mx.random.normal((13, 8), key=mx.random.key(1))
    targets = mx.arange(13) % 50
    loss_mask = mx.arange(13) % 3 != 0

    def plain(hidden: mx.array) -> mx.array:
        return (nn.losses.cross_entropy(hidden @ weight.T, targets) * loss_mask).sum()

    expected, gradient = mx.value_and_grad(plain)(hidden)
    for chunk in (1, 4, 13, 100):

        def fast(hidden: mx.array, chunk: int = chunk) -> mx.array:
            return 3 * summed_cross_entropy(
                lambda x: x @ weight.T, hidden, targets, loss_mask, chunk=chunk
            )

        value, found = mx.value_and_grad(fast)(hidden)
        assert value.item() == pytest.approx(3 * expected.item(), rel=1e-6)
        np.testing.assert_allclose(np.array(found), 3 * np.array(gradient), atol=1e-5)


def test_extreme_logits_stay_finite() -> None:
    # A wrong target 2000 nats below the likeliest: the loss is exactly that.
    hidden = mx.array([[1.0]])
    head = mx.array([[1000.0], [-1000.0]])
    value = summed_cross_entropy(
        lambda x: x @ head.T, hidden, mx.array([1]), mx.array([True]), chunk=1
    )
    assert value.item() == 2000.0


def test_half_precision_holds_the_gradient_over_a_large_vocabulary() -> None:
    # Float16 ends at 65,504, and the exponentials of equal logits sum to more.
    weight = mx.zeros((70_000, 2), mx.float16)
    hidden, targets, loss_mask = mx.ones((1, 2), mx.float16), mx.array([3]), mx.array([True])
    value, gradient = mx.value_and_grad(
        lambda x: summed_cross_entropy(lambda x: x @ weight.T, x, targets, loss_mask)
    )(hidden)
    assert value.item() == pytest.approx(np.log(70_000))
    assert mx.array_equal(gradient, mx.zeros((1, 2)))


def test_nothing_to_train_gives_no_loss_and_no_gradient() -> None:
    model = make_adapted("llama")
    model.loss_head = find_head(model)[0]
    batch = arrays(make_batch())
    batch["loss_mask"] = mx.zeros_like(batch["loss_mask"])
    model.train()
    (mean, tokens), tree = nn.value_and_grad(model, mean_loss)(model, batch)
    assert (mean.item(), tokens.item()) == (0, 0)
    assert tree


@pytest.mark.usefixtures("exact_memory")
def test_memory_is_that_of_a_chunk() -> None:
    rows, dims, vocabulary = 2048, 8, 20_000
    weight = mx.random.normal((vocabulary, dims))
    hidden = mx.random.normal((rows, dims))
    mx.eval(weight, hidden)
    targets, loss_mask = mx.zeros((rows,), mx.int32), mx.ones((rows,), mx.bool_)

    def peak(loss: Any) -> int:
        mx.reset_peak_memory()
        mx.eval(mx.value_and_grad(loss)(hidden))
        return mx.get_peak_memory()

    whole = peak(lambda x: nn.losses.cross_entropy(x @ weight.T, targets).sum())
    chunked = peak(lambda x: summed_cross_entropy(lambda x: x @ weight.T, x, targets, loss_mask))
    assert whole > 2 * 4 * rows * vocabulary
    assert chunked < 0.4 * whole


def test_a_training_from_whole_logits_has_the_same_losses(tmp_path: Path) -> None:
    write_model(tmp_path / "model", bits=4)
    write_rows(tmp_path / "data", train=TEXTS * 2, valid=TEXTS)
    both = []
    for name, options in (("fast", []), ("plain", ["--full-logits"])):
        place = ["--adapter-file", str(tmp_path / name / "a.npz"), "--steps-per-report", "1"]
        source = ["--model", str(tmp_path / "model"), "--data", str(tmp_path / "data")]
        assert lora.main(["--train", "--iters", "5", *source, *place, *options]) == 0
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        both.append([line["loss"] for line in map(json.loads, lines) if "loss" in line])
    assert len(both[0]) == 7
    assert both[0] == pytest.approx(both[1], rel=1e-4)
