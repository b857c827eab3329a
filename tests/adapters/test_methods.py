"""What each method promises beyond what all methods promise, which test_adapted_layer has."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import graft  # noqa: F401
from graft.adapters.adapted_layer import MethodFormula
from graft.adapters.adapter import apply_adapter
from graft.adapters.attach import attach, lora_layers
from graft.adapters.files import load_adapter, save_adapter
from graft.adapters.layer_config import LayerConfig
from graft.adapters.method_names import method_names
from graft.adapters.methods import METHODS, Method, register_method
from graft.adapters.methods.loftq import loftq_start
from graft.adapters.methods.olora import olora_start
from graft.adapters.methods.pissa import pissa_start
from graft.adapters.svd import truncated_svd
from graft.adapters.targets import plan
from graft.errors import InputError
from graft.training.objectives.sft import objective as sft
from graft.training.optimizers import make_optimizer, set_learning_rate
from graft.training.step import UpdateStep
from models import LoRALinear, dense_weight, scale_of

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from support.tiny import QWEN2, make_model

TOKENS = mx.array([[1, 5, 9, 300, 7, 2, 44], [3, 8, 5, 1, 0, 9, 9]])


class Model(nn.Module):
    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = list(layers)


def adapt(base: nn.Module, method: str, *, rank: int = 4, alpha: float = 6.0) -> Any:
    model = Model(base)
    attach(model, {"layers.0": LayerConfig(rank, alpha, method)}, for_loading=True)
    return model.layers[0]


def linear(inputs: int = 32, outputs: int = 24) -> nn.Linear:
    mx.random.seed(3)
    return nn.Linear(inputs, outputs)


def norm(array: mx.array) -> float:
    return float(mx.linalg.norm(array.flatten()).item())


def test_the_scale_is_alpha_over_rank_and_over_its_root_for_rslora() -> None:
    assert scale_of(16, 32.0) == 2.0
    assert scale_of(16, 32.0, rank_stabilized=True) == 8.0
    assert adapt(linear(), "rslora", rank=4, alpha=6.0).scale == 3.0
    assert adapt(linear(), "dora", rank=4, alpha=6.0).scale == 1.5


def test_rslora_is_lora_at_another_scale() -> None:
    layer, plain = adapt(linear(), "rslora"), adapt(linear(), "lora", alpha=12.0)
    tensors = {"lora_a": layer.lora_a, "lora_b": mx.random.normal((4, 24))}
    layer.load(tensors)
    plain.load(tensors)
    x = mx.random.normal((3, 32))
    assert mx.allclose(layer(x), plain(x), atol=1e-6)


@pytest.mark.parametrize("shape", [(20, 30), (30, 20)])
def test_the_truncated_decomposition_is_numpy_s(shape: tuple[int, int]) -> None:
    matrix = mx.random.normal(shape, key=mx.random.key(1))
    u, s, vt = truncated_svd(matrix, 5)
    _, expected, _ = np.linalg.svd(np.array(matrix))
    np.testing.assert_allclose(np.array(s), expected[:5], rtol=1e-5)
    assert (u.shape, vt.shape) == ((shape[0], 5), (5, shape[1]))
    best = np.sqrt((expected[5:] ** 2).sum())
    assert norm(matrix - (u * s) @ vt) == pytest.approx(best, rel=1e-5)


@pytest.mark.usefixtures("exact_memory")
@pytest.mark.parametrize("shape", [(6000, 8), (8, 6000)])
def test_a_vocabulary_s_matrix_is_decomposed_without_making_a_square_of_it(
    shape: tuple[int, int],
) -> None:
    matrix = mx.random.normal(shape, key=mx.random.key(1))
    mx.eval(matrix)
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    u, s, vt = truncated_svd(matrix, 8)
    assert mx.allclose((u * s) @ vt, matrix, atol=1e-4)
    assert mx.get_peak_memory() - before < 20 * matrix.nbytes  # a square has 750 times as much


def test_a_large_matrix_is_decomposed_nearly_as_well_by_sampling() -> None:
    """1100 x 1060 with singular values that fall as 1 / n, as those of trained weights do."""
    rng = np.random.default_rng(0)
    left, _ = np.linalg.qr(rng.normal(size=(1100, 60)))
    right, _ = np.linalg.qr(rng.normal(size=(1060, 60)))
    values = 1 / np.arange(1, 61)
    matrix = mx.array(((left * values) @ right.T).astype(np.float32))
    u, s, vt = truncated_svd(matrix, 8)
    np.testing.assert_allclose(np.array(s), values[:8], rtol=1e-4)
    best = np.sqrt((values[8:] ** 2).sum())
    assert norm(matrix - (u * s) @ vt) == pytest.approx(best, rel=1e-3)


def test_pissa_starts_from_the_principal_part() -> None:
    """Equations 2 and 3 of the paper: A B is the best approximation of its rank."""
    weight = linear().weight.T
    a, b = pissa_start(weight, 4, 1.5)
    _, values, _ = np.linalg.svd(np.array(weight))
    assert norm(weight - 1.5 * a @ b) == pytest.approx(np.sqrt((values[4:] ** 2).sum()), rel=1e-5)
    np.testing.assert_allclose(
        np.array(mx.linalg.norm(a, axis=0)), np.sqrt(values[:4] / 1.5), rtol=1e-4
    )
    np.testing.assert_allclose(
        np.array(mx.linalg.norm(b, axis=1)), np.sqrt(values[:4] / 1.5), rtol=1e-4
    )


def test_olora_starts_from_an_orthonormal_b() -> None:
    weight = linear().weight.T
    a, b = olora_start(weight, 4, 1.5)
    np.testing.assert_allclose(np.array(b @ b.T), np.eye(4), atol=1e-5)
    q, r = np.linalg.qr(np.array(weight.T))
    np.testing.assert_allclose(np.array(a @ b), (q[:, :4] @ r[:4]).T, atol=1e-5)


@pytest.mark.parametrize("method", ["pissa", "olora"])
def test_the_file_holds_a_plain_lora_of_twice_the_rank_for_the_original_base(method: str) -> None:
    layer = adapt(linear(), method)
    layer.lora_a = layer.lora_a + 0.1
    tensors = layer.tensors()
    plain = LoRALinear(layer.base, 8, alpha=2 * layer.alpha)
    plain.load(tensors)
    x = mx.random.normal((5, 32))
    assert mx.allclose(plain(x), layer(x), atol=1e-5)
    assert plain.scale == layer.scale


@pytest.mark.parametrize("method", ["pissa", "olora"])
def test_training_is_that_of_the_residual_base(method: str) -> None:
    """The paper's form: base W - scale A0 B0, and A and B beside it."""
    layer = adapt(linear(), method)
    residual = nn.Linear(32, 24)
    start = layer.scale * (layer._start_a @ layer._start_b).T
    residual.weight, residual.bias = layer.base.weight - start, layer.base.bias
    plain = LoRALinear(residual, 4, alpha=6.0)
    plain.load({"lora_a": layer.lora_a, "lora_b": layer.lora_b})
    x = mx.random.normal((5, 32))

    def loss(module: nn.Module) -> mx.array:
        return mx.tanh(module(x)).sum()

    mine = nn.value_and_grad(layer, loss)(layer)
    theirs = nn.value_and_grad(plain, loss)(plain)
    assert mine[0].item() == pytest.approx(theirs[0].item(), abs=1e-4)
    for name in ("lora_a", "lora_b"):
        assert mx.allclose(mine[1][name], theirs[1][name], atol=1e-4)


def test_dora_s_gradient_holds_the_norm_constant() -> None:
    """Section 4.3. The reference is numpy in float64, central differences, the norm kept."""
    layer = adapt(linear(), "dora")
    layer.lora_b = mx.random.normal((4, 24), key=mx.random.key(5))
    layer.m = layer.m * 1.3
    x = mx.random.normal((5, 32), key=mx.random.key(6))
    values = {name: np.array(array, dtype=np.float64) for name, array in layer.tensors().items()}
    w, bias, rows = (np.array(a, dtype=np.float64) for a in (layer.base.weight, layer.base.bias, x))

    def adapted(v: dict[str, Any]) -> np.ndarray:
        return w + 1.5 * (v["lora_a"] @ v["lora_b"]).T

    kept = np.linalg.norm(adapted(values), axis=1)

    def reference(v: dict[str, Any]) -> float:
        return float(np.tanh((rows @ adapted(v).T) * (v["m"] / kept) + bias).sum())

    _, gradients = nn.value_and_grad(layer, lambda m: mx.tanh(m(x)).sum())(layer)
    rng = np.random.default_rng(0)
    for name in values:
        direction = rng.normal(size=values[name].shape)
        ahead = reference({**values, name: values[name] + 1e-5 * direction})
        behind = reference({**values, name: values[name] - 1e-5 * direction})
        along = (np.array(gradients[name]) * direction).sum()
        assert along == pytest.approx((ahead - behind) / 2e-5, rel=1e-3, abs=1e-3), name


@pytest.mark.parametrize("bits", [None, 4])
def test_dora_s_lengths_are_those_of_the_sum(bits: int | None) -> None:
    base = linear(64, 48) if bits is None else linear(64, 48).to_quantized(32, bits)
    layer = adapt(base, "dora")
    layer.lora_b = mx.random.normal((4, 48), key=mx.random.key(5))
    layer.m = mx.random.uniform(0.5, 2.0, (48,))
    merged = layer.fuse(dequantize=True).weight
    assert mx.allclose(mx.linalg.norm(merged, axis=1), layer.m, atol=1e-5)


@pytest.mark.parametrize(
    ("base", "x"), [(nn.Linear(8, 6), mx.ones((3, 8))), (nn.Embedding(6, 8), mx.array([0, 1]))]
)
def test_dora_over_an_output_whose_weights_are_zero_stays_finite(
    base: nn.Module, x: mx.array
) -> None:
    base.weight = mx.concatenate([mx.zeros((1, 8)), base.weight[1:]])
    layer = adapt(base, "dora")
    value, gradients = nn.value_and_grad(layer, lambda m, x: m(x).square().sum())(layer, x)
    assert mx.array_equal(layer(x), base(x)) and mx.isfinite(value).item()
    assert all(mx.isfinite(gradients[name]).all().item() for name in layer.tensors())


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
@pytest.mark.parametrize("bits", [None, 4])
def test_dora_starts_from_a_base_in_half_precision(bits: int | None, dtype: mx.Dtype) -> None:
    base = linear(64, 48)
    base.set_dtype(dtype)
    base = base if bits is None else base.to_quantized(32, bits)
    x = mx.random.normal((3, 64)).astype(dtype)
    layer = adapt(base, "dora")
    assert layer(x).dtype == base(x).dtype and mx.array_equal(layer(x), base(x))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_loftq_is_the_best_correction_of_the_rounding_that_its_rank_allows(bits: int) -> None:
    whole = linear(64, 48)
    base = whole.to_quantized(group_size=32, bits=bits)
    layer = adapt(base, "loftq")
    assert not layer.lora_b.any()
    loftq_start(layer, whole.weight)
    rounding = np.array(whole.weight - dense_weight(base))
    values = np.linalg.svd(rounding, compute_uv=False)
    left = norm(whole.weight - dense_weight(base) - layer.delta())
    assert left == pytest.approx(np.sqrt((values[4:] ** 2).sum()), rel=1e-4)
    x = mx.random.normal((64, 64))
    assert norm(layer(x) - whole(x)) < norm(base(x) - whole(x))


def test_loftq_over_a_whole_layer_is_refused() -> None:
    with pytest.raises(InputError, match=r"needs quantized layers.*layers\.0"):
        adapt(linear(), "loftq")


def test_vera_shares_its_projections_among_layers_of_one_size() -> None:
    first, second, other = (adapt(linear(n), "vera") for n in (32, 32, 16))
    assert first._projection_a is second._projection_a
    assert first._projection_b is other._projection_b
    assert other._projection_a.shape == (16, 4)


def test_vera_trains_rank_and_outputs_only() -> None:
    layer = adapt(linear(), "vera", rank=8)
    assert sum(array.size for array in layer.tensors().values()) == 8 + 24
    assert set(layer.trainable_parameters()) >= {"lambda_d", "lambda_b"}


def test_only_lora_and_rslora_are_defined_on_parts_and_only_low_rank_and_whole_on_norms() -> None:
    on = {
        kind: {name for name, method in METHODS.items() if kind in method.kinds}
        for kind in ("fused", "vector")
    }
    assert on["fused"] == {"lora", "rslora"}
    assert on["vector"] == {"lora", "rslora", "full", "norm", "bias"}


@pytest.mark.parametrize(
    ("method", "layer"),
    [
        ("dora", nn.RMSNorm(8)),
        ("pissa", nn.LayerNorm(8)),
        ("vera", nn.ConvTranspose1d(2, 2, 2)),
        ("ia3", nn.Embedding(8, 8)),
        ("norm", nn.Linear(8, 8)),
        ("merge-first", nn.RMSNorm(8)),
        ("bias", nn.Linear(8, 8, bias=False)),
    ],
)
def test_a_method_on_a_layer_that_does_not_define_it_is_refused_with_what_is_allowed(
    method: str, layer: nn.Module
) -> None:
    model = Model(layer)
    rank = 2 if METHODS[method].ranked else 1
    with pytest.raises(InputError, match=r"layers\.0") as error:
        attach(model, {"layers.0": LayerConfig(rank, 1.0, method)})
    if method != "bias":
        assert all(kind in str(error.value) for kind in METHODS[method].kinds)
    assert model.layers[0] is layer


def test_merging_a_quantized_layer_costs_its_whole_weight() -> None:
    for dtype, size in ((mx.float32, 4), (mx.float16, 2)):
        whole = linear(64, 48)
        whole.set_dtype(dtype)
        layer = adapt(whole.to_quantized(group_size=32, bits=4), "lora")
        before = {name: array.nbytes for name, array in layer.base.items()}
        assert layer.merge() == 64 * 48 * size
        assert type(layer.merged) is nn.Linear and layer.merged.weight.dtype == dtype
        assert {name: array.nbytes for name, array in layer.base.items()} == before
        layer.unmerge()
        assert layer.merged is None


def test_modules_that_read_the_weight_get_the_adapted_one() -> None:
    for method in ("lora", "dora", "ia3"):
        layer = adapt(linear(), method, rank=4 if method != "ia3" else 1)
        assert mx.allclose(layer.weight, layer.base.weight, atol=1e-6)
        for name, array in layer.tensors().items():
            layer[name] = array + 0.1
        assert mx.allclose(layer.weight, layer.base.weight + layer.delta(), atol=1e-6)
        assert not mx.allclose(layer.weight, layer.base.weight, atol=1e-3)


def start(method: str) -> tuple[nn.Module, UpdateStep]:
    """A language model, quantized, under a method, and the update that training goes through."""
    model = make_model(QWEN2)
    nn.quantize(model, group_size=32, bits=4)
    targets = "q_proj,down_proj,embed_tokens" if method in ("full", "pissa", "vera") else None
    attach(model, plan(model, targets, rank=4, method=method), seed=1, for_loading=True)
    optimizer = make_optimizer("adamw")
    step = UpdateStep(model, sft, optimizer, grad_clip=1.0)
    set_learning_rate(optimizer, 3e-3, lora_plus_ratio=2.0)
    return model, step


BATCH = [{"inputs": TOKENS[:, :-1], "targets": TOKENS[:, 1:], "loss_mask": mx.ones((2, 6))}]


@pytest.mark.parametrize("method", METHODS)
def test_training_a_language_model_lowers_its_loss(method: str) -> None:
    _, step = start(method)
    results = [step(BATCH) for _ in range(8)]
    assert all(result.finite and result.grad_norm > 0 for result in results)
    assert results[-1].loss < results[0].loss - 0.005


@pytest.mark.parametrize("method", ["pissa", "olora", "dora", "vera"])
def test_a_training_that_is_taken_up_again_goes_on_bit_for_bit(method: str) -> None:
    _, step = start(method)
    step(BATCH)
    state = {name: mx.array(array) for name, array in step.state().items()}
    expected = [step(BATCH).loss for _ in range(3)]
    _, again = start(method)
    again.restore(state)
    assert [again(BATCH).loss for _ in range(3)] == expected


def toy_parameters(layer: Any, key: mx.array | None) -> dict[str, mx.array]:
    return {"shift": mx.zeros((layer.linear.weight.shape[0],))}


def toy_output(layer: Any, x: mx.array) -> mx.array:
    y = layer.linear(x)
    return y + (layer.scale * layer.shift).astype(y.dtype)


def toy_deltas(layer: Any) -> dict[str, mx.array]:
    return {"bias": layer.scale * layer.shift}


@pytest.fixture
def toy_method() -> Iterator[str]:
    """A method registered from outside: a trained vector that is added to a layer's output."""
    formula = MethodFormula(toy_parameters, toy_output, toy_deltas)
    toy = Method(formula=formula, kinds=("linear",), text="a trained shift", ranked=False)
    register_method("toy", toy)
    yield "toy"
    del METHODS["toy"]


def test_a_method_registered_from_outside_trains_saves_and_loads(
    toy_method: str, tmp_path: Path
) -> None:
    model, step = start(toy_method)
    results = [step(BATCH) for _ in range(8)]
    assert all(result.finite for result in results) and results[-1].loss < results[0].loss
    assert {layer.method for _, layer in lora_layers(model)} == {"toy"}
    expected = model(TOKENS)
    save_adapter(tmp_path / "adapters.safetensors", model)
    again = make_model(QWEN2)
    nn.quantize(again, group_size=32, bits=4)
    assert not mx.allclose(again(TOKENS), expected)
    apply_adapter(again, load_adapter(tmp_path), name="toy")
    assert mx.array_equal(again(TOKENS), expected)


def test_a_method_that_cannot_be_is_refused(toy_method: str) -> None:
    with pytest.raises(ValueError, match="'toy' is registered already"):
        register_method("toy", METHODS["toy"])
    with pytest.raises(ValueError, match="no kind sparse"):
        register_method("other", replace(METHODS["toy"], kinds=("linear", "sparse")))


def test_every_module_of_the_folder_is_the_method_that_it_is_named_after() -> None:
    variants = {method.on_feed_forward_ends for method in METHODS.values()} - {None}
    assert set(method_names()) == set(METHODS) - variants
