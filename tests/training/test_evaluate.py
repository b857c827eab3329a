"""The loss over a split."""

import math
from pathlib import Path

from graft.adapters.attach import lora_layers
from graft.data.collate import collate
from graft.data.examples import Split
from graft.pretrained.load import load_model
from graft.training.evaluate import evaluate_split
from graft.training.options import Options
from graft.training.setup import start_adapter

import mlx.core as mx
import mlx.nn as nn
import pytest

from support.fast_cases import arrays, mean_loss


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
