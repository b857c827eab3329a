"""Cross-entropy over the tokens of the loss mask."""

from graft.data.collate import collate
from graft.data.examples import Split

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from support.fast_cases import arrays, mean_loss


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
