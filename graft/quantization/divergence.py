"""How far a fused model is from its adapter: KL divergence, agreement and loss on sample text.

Reference: the mean over tokens of KL(p || q) = sum p (log p - log q), where p is what the adapter
gives and q what the fused model gives.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from graft.data.batches import Batch, group_rows, pad
from graft.data.examples import Example

import mlx.core as mx
import mlx.nn as nn


@dataclass(frozen=True)
class Comparison:
    """Two models on the same tokens.

    Attributes:
        kl: mean divergence of the fused model from the adapter, in nats a token.
        agreement: share of tokens for which both hold the same token likeliest.
        adapter_loss: mean cross-entropy of the adapter, in nats a token.
        fused_loss: that of the fused model.
        tokens: how many there were.
    """

    kl: float
    agreement: float
    adapter_loss: float
    fused_loss: float
    tokens: int


@dataclass(frozen=True)
class Sample:
    """What the adapter says on sample text, to be compared with.

    A vocabulary of 150,000 takes 0.6 MB a token, so what it says is kept on disk.

    Attributes:
        batches: the text, a row each.
        files: of the adapter's log-probabilities, for each batch (1, tokens, vocabulary), float32.
    """

    batches: Sequence[Batch]
    files: Sequence[Path]

    def part(self, share: int) -> "Sample":
        """One batch of `share`, at least one: a sample that is sooner compared with."""
        start = len(self.batches) // 2 % share
        return Sample(self.batches[start::share], self.files[start::share])


def take_sample(model: nn.Module, examples: Sequence[Example], folder: Path) -> Sample:
    """Run a model on sample text and keep what it says in a folder."""
    batches = [pad(examples, rows) for rows in group_rows(examples, 1)]
    files = [folder / f"sample-{number}.npy" for number in range(len(batches))]
    for batch, file in zip(batches, files, strict=True):
        mx.save(str(file), _log_probs(model, batch))
    return Sample(batches, files)


def compare(sample: Sample, model: nn.Module) -> Comparison:
    """Compare what a model says with a sample of another."""
    sums = mx.zeros(4)
    tokens = 0.0
    for batch, file in zip(sample.batches, sample.files, strict=True):
        expected, found = cast(mx.array, mx.load(str(file))), _log_probs(model, batch)
        counts = mx.array(batch.loss_mask)
        targets = mx.array(batch.targets)[..., None]
        divergence = (mx.exp(expected) * (expected - found)).sum(axis=-1)
        same = expected.argmax(axis=-1) == found.argmax(axis=-1)
        losses = [-mx.take_along_axis(p, targets, axis=-1)[..., 0] for p in (expected, found)]
        sums = sums + mx.stack([(values * counts).sum() for values in (divergence, same, *losses)])
        mx.eval(sums)
        tokens += float(batch.loss_mask.sum())
    means = cast(list[float], (sums / max(tokens, 1)).tolist())
    return Comparison(means[0], means[1], means[2], means[3], int(tokens))


def _log_probs(model: nn.Module, batch: Batch) -> mx.array:
    logits = model(mx.array(batch.inputs)).astype(mx.float32)
    found = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    mx.eval(found)
    return found
