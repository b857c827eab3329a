"""Tiny adapted models and batches on which a fast path is held against the plain one."""

from typing import Any

import graft  # noqa: F401
from graft.adapters.attach import attach
from graft.adapters.targets import plan
from graft.data.collate import Batch, collate
from graft.data.examples import Example
from graft.pretrained.load import build_model
from graft.runtime.cpu import suit_backend
from graft.training.objectives.sft import objective as sft

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_map_with_path

# Grouped-query attention throughout. 3 blocks, so that there is one below any two.
SMALL: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "rms_norm_eps": 1e-5,
    "vocab_size": 512,
    "rope_theta": 10000.0,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
}
TIED = {"tie_word_embeddings": True}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": TIED,
    "qwen3": TIED,
    "gemma": {},
    "phi3": {},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "olmo2": {},
    "gemma2": {
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
        "query_pre_attn_scalar": 8.0,
    },
    "cohere": {"layer_norm_eps": 1e-5, "logit_scale": 0.25, **TIED},
    "granite": {
        "logits_scaling": 4.0,
        "attention_multiplier": 0.25,
        "embedding_multiplier": 2.0,
        "residual_multiplier": 0.5,
        "attention_bias": False,
        "mlp_bias": False,
    },
}
LENGTHS = [19, 9, 25, 2, 14]


def make_adapted(
    name: str,
    *,
    bits: int | None = None,
    num_layers: int = -1,
    targets: tuple[str, ...] = ("all-linear",),
    dropout: float = 0.0,
    seed: int = 0,
    **changes: Any,
) -> nn.Module:
    """A random model of an architecture with an adapter whose update is not zero."""
    mx.random.seed(seed)
    model = build_model({**SMALL, "model_type": name, **ARCHITECTURES[name], **changes})
    if bits is not None:
        nn.quantize(model, group_size=32, bits=bits)
    suit_backend(model)
    attach(model, plan(model, targets, rank=4, num_layers=num_layers), dropout=dropout)
    model.update(tree_map_with_path(_moved, model.trainable_parameters()))
    mx.eval(model.parameters())
    return model


def _moved(path: str, array: mx.array) -> mx.array:
    key = mx.random.key(sum(map(ord, path)))
    return array + 0.05 * mx.random.normal(array.shape, key=key).astype(array.dtype)


def make_examples(lengths: list[int] = LENGTHS, *, masked: bool = True) -> list[Example]:
    """Rows of random tokens; of every second one, if `masked`, only the second half is trained."""
    generator = np.random.default_rng(0)
    examples = []
    for number, length in enumerate(lengths):
        tokens = generator.integers(1, SMALL["vocab_size"], length).astype(np.int32)
        loss_mask = np.arange(length) > (length // 2 if masked and number % 2 else 0)
        examples.append(Example(tokens, loss_mask))
    return examples


def make_batch() -> Batch:
    """Rows of several lengths with padding and masked prompts."""
    examples = make_examples()
    return collate(examples, range(len(examples)))


def arrays(batch: Batch) -> dict[str, mx.array]:
    return batch.to_mlx()


def mean_loss(model: nn.Module, batch: dict[str, mx.array]) -> tuple[mx.array, mx.array]:
    """Mean loss of supervised fine-tuning, and the tokens it is over."""
    total, tokens, _ = sft(model, batch)
    return total / mx.maximum(tokens, 1), tokens


def assert_same_gradients(found: Any, expected: Any, *, tolerance: float = 1e-4) -> None:
    """Each gradient equals the other to a share of its largest value."""
    found, expected = dict(tree_flatten(found)), dict(tree_flatten(expected))
    assert found.keys() == expected.keys() and expected
    assert all(mx.abs(gradient).max().item() > 0 for gradient in expected.values())
    for path, gradient in expected.items():
        largest = mx.abs(gradient).max().item()
        difference = mx.abs(found[path] - gradient).max().item()
        assert difference <= tolerance * largest, (path, difference, largest)
