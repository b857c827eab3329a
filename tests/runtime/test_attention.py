"""Attention and sigmoid for the CPU give what MLX's own give, and their gradients."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import graft  # noqa: F401
from graft.runtime import attention as module
from graft.runtime.attention import attention, fast_functions, sigmoid, use_fast_functions
from graft.training.grad_checkpoint import checkpoint_blocks

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.models import activations, llama

from support.fast_cases import ARCHITECTURES, make_adapted
from support.paths import ROOT

on_cpu = pytest.mark.skipif(
    mx.default_device().type != mx.DeviceType.cpu, reason="speaks of the CPU backend"
)
# (batch, heads, groups, queries, keys, dims)
SHAPES = [
    (1, 8, 8, 64, 64, 32),
    (2, 8, 4, 150, 150, 32),
    (2, 4, 1, 40, 90, 16),
    (3, 6, 2, 33, 33, 8),
]


def normal(*shape: int, seed: int) -> mx.array:
    return mx.array(np.random.default_rng(seed).normal(size=shape).astype(np.float32))


def inputs(shape: tuple[int, ...]) -> list[mx.array]:
    batch, heads, groups, queries, keys, dims = shape
    return [
        normal(batch, heads, queries, dims, seed=0),
        normal(batch, groups, keys, dims, seed=1),
        normal(batch, groups, keys, dims, seed=2),
    ]


def outcome(function: Any, arrays: list[mx.array], mask: Any) -> list[mx.array]:
    """The output, and the gradients of a weighted sum of it, of an additive mask too."""
    weights = normal(*arrays[0].shape, seed=3)
    scale = arrays[0].shape[-1] ** -0.5
    additive = isinstance(mask, mx.array) and mask.dtype == mx.float32

    def weighted(q: mx.array, k: mx.array, v: mx.array, mask: Any) -> mx.array:
        return (function(q, k, v, scale=scale, mask=mask) * weights).sum()

    gradients = mx.grad(weighted, argnums=(0, 1, 2, 3) if additive else (0, 1, 2))(*arrays, mask)
    return [function(*arrays, scale=scale, mask=mask), *gradients]


def assert_as_mlx_has_it(shape: tuple[int, ...], mask: Any) -> None:
    arrays = inputs(shape)
    expected = outcome(module._mlx_attention, arrays, mask)
    for found, array in zip(outcome(attention, arrays, mask), expected, strict=True):
        assert found.shape == array.shape
        assert mx.abs(found - array).max() <= 1e-5 * mx.abs(array).max()


@on_cpu
@pytest.mark.parametrize("mask", [None, "causal"])
@pytest.mark.parametrize("shape", SHAPES)
def test_attention_and_its_gradients_are_those_of_mlx(shape: tuple[int, ...], mask: Any) -> None:
    assert_as_mlx_has_it(shape, mask)


@on_cpu
@pytest.mark.parametrize("kind", ["bool", "additive"])
@pytest.mark.parametrize("of", ["keys", "queries", "batch", "heads"])
def test_masks_of_every_shape_count_as_for_mlx(kind: str, of: str) -> None:
    shape = batch, heads, _, queries, keys, _ = SHAPES[1]
    sizes = {
        "keys": (1, keys),
        "queries": (queries, keys),
        "batch": (batch, 1, queries, keys),
        "heads": (batch, heads, queries, keys),
    }[of]
    mask = normal(*sizes, seed=4)
    if kind == "bool":
        # Every query sees at least the first key.
        mask = (mask > 0) | (mx.arange(keys) == 0)
    assert_as_mlx_has_it(shape, mask)


@on_cpu
@pytest.mark.parametrize("mask", [None, "causal", "bool", "additive", "additive for keys"])
@pytest.mark.parametrize("kept", [True, False])
def test_blocks_of_queries_give_what_all_of_them_give(
    monkeypatch: pytest.MonkeyPatch, mask: Any, kept: bool
) -> None:
    monkeypatch.setattr(module, "BLOCK_VALUES", 1)
    monkeypatch.setattr(module, "KEPT_VALUES", 2**40 if kept else 0)
    if mask == "bool":
        mask = mx.tril(mx.ones((150, 150), mx.bool_))
    elif mask in ("additive", "additive for keys"):
        mask = normal(2, 8, 150 if mask == "additive" else 1, 150, seed=4)
    assert_as_mlx_has_it(SHAPES[1], mask)


@on_cpu
def test_the_gradient_of_an_additive_mask_is_the_quotient_of_differences() -> None:
    """Multi-head latent attention passes scores as the mask: what makes them is trained."""
    q, k, v = inputs((1, 2, 2, 40, 40, 16))
    mask, direction = normal(1, 2, 40, 40, seed=4), normal(1, 2, 40, 40, seed=5)

    def total(step: Any) -> mx.array:
        y = attention(q, k, v, scale=0.25, mask=mask + step * direction)
        return mx.square(y).sum()

    found = mx.grad(total)(mx.array(0.0)).item()
    quotient = (total(1e-2) - total(-1e-2)).item() / 2e-2
    assert abs(found) > 1 and found == pytest.approx(quotient, rel=1e-3)


@pytest.mark.slow
@pytest.mark.usefixtures("exact_memory")
@on_cpu
def test_memory_grows_with_the_tokens_and_not_with_their_square() -> None:
    def peak(tokens: int) -> int:
        arrays = inputs((1, 8, 8, tokens, tokens, 16))
        mx.eval(arrays)
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        mx.eval(outcome(attention, arrays, "causal"))
        return mx.get_peak_memory() - before

    # Eight times the tokens would be 64 times the weights, which alone would be 512 MB.
    assert peak(4096) < 12 * peak(512)


@on_cpu
def test_few_queries_and_other_types_are_left_to_mlx(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def original(q: mx.array, *_: Any, **__: Any) -> mx.array:
        asked.append((q.shape[2], q.dtype))
        return q

    monkeypatch.setattr(module, "_mlx_attention", original)
    q, k, v = inputs(SHAPES[0])
    attention(q[:, :, -1:], k, v, scale=1.0)
    attention(*(array.astype(mx.float16) for array in (q, k, v)), scale=1.0)
    attention(q, k, v, scale=1.0, sinks=mx.zeros(8))
    assert asked == [(1, mx.float32), (64, mx.float16), (64, mx.float32)]


@on_cpu
def test_sigmoid_and_its_gradient_are_those_of_mlx() -> None:
    x = mx.concatenate([normal(1000, seed=0), mx.array([-1e4, -90.0, 0.0, 90.0, 1e4])])
    assert mx.allclose(sigmoid(x), module._mlx_sigmoid(x), rtol=1e-5, atol=1e-7)
    ours, theirs = (mx.grad(lambda x, f=f: f(x).sum())(x) for f in (sigmoid, nn.sigmoid))
    assert mx.allclose(ours, theirs, rtol=1e-4, atol=1e-6)
    assert sigmoid(x.astype(mx.float16)).dtype == mx.float16


@on_cpu
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_models_give_what_they_give_with_the_attention_of_mlx(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_adapted(name)
    tokens = mx.arange(80).reshape(2, 40) % 60
    with monkeypatch.context() as plain:
        plain.setattr(module, "attention", module._mlx_attention)
        plain.setattr(module, "swiglu", activations.swiglu)
        expected = model(tokens)
    mx.eval(expected)
    asked = []
    monkeypatch.setattr(module, "attention", lambda *a, **k: asked.append(1) or attention(*a, **k))
    assert mx.abs(model(tokens) - expected).max() <= 1e-5 * mx.abs(expected).max()
    # Caps of its own keep gemma2 from MLX's attention.
    assert bool(asked) == (name != "gemma2")


class Asking(nn.Module):
    """Notes which attention it is called with."""

    def __init__(self) -> None:
        super().__init__()
        self.functions: list[Any] = []

    def __call__(self, x: mx.array) -> mx.array:
        self.functions.append(functions())
        return x


def functions() -> tuple[Any, ...]:
    """What models may find replaced."""
    return mx.fast.scaled_dot_product_attention, mx.sigmoid, nn.silu, llama.swiglu


PLAIN = functions()


def test_only_the_models_that_use_fast_functions_find_them() -> None:
    """And MLX is as it was before and after, in whatever order models call each other."""
    ours, other = Asking(), Asking()
    use_fast_functions(ours)
    use_fast_functions(ours)
    ours(mx.zeros(1))
    other(mx.zeros(1))
    assert type(ours).__name__ == "Asking" and isinstance(ours, Asking)
    assert ours.functions[0] != PLAIN and other.functions == [PLAIN]
    assert functions() == PLAIN


def test_another_thread_computes_as_mlx_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "swiglu", lambda gate, x: mx.array(7.0))
    x = mx.array([0.0])
    with fast_functions():
        assert llama.swiglu(x, x).item() == 7.0
        with ThreadPoolExecutor(1) as thread:
            assert thread.submit(lambda: llama.swiglu(x, x).item()).result() == 0.0
    assert llama.swiglu(x, x).item() == 0.0


def test_what_a_user_has_replaced_stays_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    mine = lambda *args, **kwargs: "mine"  # noqa: E731
    monkeypatch.setattr(mx.fast, "scaled_dot_product_attention", mine)
    with fast_functions():
        pass
    assert mx.fast.scaled_dot_product_attention is mine


def test_a_model_leaves_no_trace_in_what_mlx_compiles() -> None:
    """MLX keeps what it has compiled: a plain model gives the same bits before and after."""
    code = (
        "import graft, mlx.core as mx, mlx.nn as nn, sys\n"
        "from mlx_lm.models import activations\n"
        "from graft.pretrained.load import load_model\n"
        "if sys.argv[1] == 'after':\n"
        "    mx.eval(load_model()[0](mx.arange(64)[None]))\n"
        "mx.random.seed(0)\n"
        "x = mx.random.normal((4096,))\n"
        "mx.eval(values := [nn.silu(x), activations.swiglu(x, x), mx.sigmoid(x)])\n"
        "import hashlib, numpy as np\n"
        "print(hashlib.sha256(b''.join(np.array(v).tobytes() for v in values)).hexdigest())\n"
    )
    digests = {
        subprocess.run(
            [sys.executable, "-c", code, when], cwd=ROOT, capture_output=True, check=True
        ).stdout
        for when in ("before", "after")
    }
    assert len(digests) == 1


def test_an_error_in_a_model_leaves_mlx_as_it_was() -> None:
    with pytest.raises(ZeroDivisionError), fast_functions():
        raise ZeroDivisionError
    assert functions() == PLAIN


def test_importing_graft_and_loading_a_model_change_nothing_in_mlx() -> None:
    code = (
        "import os, signal, sys, threading, warnings, numpy, mlx.core as mx\n"
        "def process():\n"
        "    handlers = [signal.getsignal(number) for number in signal.valid_signals()]\n"
        "    streams = sys.stdin, sys.stdout, sys.stderr, sys.stdout.errors, sys.excepthook\n"
        "    return dict(os.environ), handlers, list(sys.path), list(warnings.filters), streams, "
        "os.getcwd(), threading.active_count()\n"
        "unchanged = process()\n"
        "before = mx.fast.scaled_dot_product_attention, mx.sigmoid\n"
        "import graft\n"
        "for name in graft.__all__: getattr(graft, name)\n"
        "assert process() == unchanged\n"
        "from graft.pretrained.load import load_model\n"
        "model, _, _ = load_model()\nmx.eval(model(mx.arange(64)[None]))\n"
        "assert before == (mx.fast.scaled_dot_product_attention, mx.sigmoid)\n"
    )
    environment = {**os.environ, "GRAFT_BLAS": "off"}
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, check=True)


@on_cpu
def test_recomputed_blocks_use_the_functions_of_their_forward_pass() -> None:
    """Gradient checkpointing runs them again when the model's own call has ended."""
    model = make_adapted("llama")
    tokens = mx.arange(80).reshape(2, 40) % 60
    seen: list[bool] = []
    block = model.layers[0]

    class Noting(type(block)):
        def __call__(self, *args: Any, **kwargs: Any) -> mx.array:
            seen.append(mx.fast.scaled_dot_product_attention is not module._mlx_attention)
            return super().__call__(*args, **kwargs)

    block.__class__ = Noting
    checkpoint_blocks(model)
    mx.eval(nn.value_and_grad(model, lambda model: model(tokens).sum())(model))
    assert len(seen) > 1 and all(seen)
