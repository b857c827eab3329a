"""graft/quantization/divergence.py: one model beside another on the same text."""

from pathlib import Path

import graft  # noqa: F401
from graft.data.examples import Example
from graft.quantization.divergence import compare, take_sample

import mlx.core as mx
import numpy as np
import pytest

from support.tiny import make_model

CONFIG = {"model_type": "llama", "hidden_size": 32, "num_hidden_layers": 1, "vocab_size": 64}
CONFIG |= {"intermediate_size": 32, "num_attention_heads": 2, "rms_norm_eps": 1e-5}


def rows(*lengths: int) -> list[Example]:
    """Random tokens, the first of which is masked."""
    tokens = [np.random.default_rng(n).integers(0, 64, n).astype(np.int32) for n in lengths]
    return [Example(row, np.arange(len(row)) > 1) for row in tokens]


def test_a_model_does_not_differ_from_itself(tmp_path: Path) -> None:
    model = make_model(CONFIG)
    found = compare(take_sample(model, rows(9, 5, 7), tmp_path), model)
    assert (found.kl, found.agreement, found.tokens) == (0, 1, 7 + 3 + 5)
    assert found.adapter_loss == found.fused_loss > 0


def test_divergence_agreement_and_losses_by_hand(tmp_path: Path) -> None:
    """Two models that say the same wherever they are: the bias of the head alone is left."""
    texts = rows(6, 4)
    logits = np.random.default_rng(0).normal(size=(2, 64)).astype(np.float32)
    p, q = (np.exp(row) / np.exp(row).sum() for row in logits)

    def model(row: np.ndarray) -> object:
        return lambda inputs: mx.broadcast_to(mx.array(row), (*inputs.shape, 64))

    found = compare(take_sample(model(logits[0]), texts, tmp_path), model(logits[1]))
    targets = np.concatenate([text.tokens[2:] for text in texts])
    assert found.kl == pytest.approx((p * np.log(p / q)).sum(), rel=1e-5)
    assert found.agreement == float(p.argmax() == q.argmax())
    assert found.adapter_loss == pytest.approx(-np.log(p[targets]).mean(), rel=1e-5)
    assert found.fused_loss == pytest.approx(-np.log(q[targets]).mean(), rel=1e-5)


@pytest.mark.parametrize(("count", "left"), [(1, 1), (3, 1), (4, 1), (16, 4), (17, 5)])
def test_a_part_of_a_sample_is_one_row_of_four_and_at_least_one(
    count: int, left: int, tmp_path: Path
) -> None:
    sample = take_sample(make_model(CONFIG), rows(*range(3, 3 + count)), tmp_path)
    part = sample.part(4)
    assert len(part.batches) == len(part.files) == left
    assert set(part.files) <= set(sample.files)
