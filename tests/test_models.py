from models import LoRALayer, LoRALinear, dense_weight, linear_dims

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from mlx.utils import tree_flatten

# (mode, bits, group_size): everything that MLX quantizes to.
QUANTIZATIONS = [
    *(("affine", bits, size) for bits in (2, 3, 4, 5, 6, 8) for size in (32, 64, 128)),
    ("mxfp4", 4, 32),
    ("nvfp4", 4, 16),
    ("mxfp8", 8, 32),
]
INPUT_DIMS, OUTPUT_DIMS, RANK = 256, 48, 4


def make_linear(*, bias: bool = True, dtype: mx.Dtype = mx.float32) -> nn.Linear:
    mx.random.seed(1)
    linear = nn.Linear(INPUT_DIMS, OUTPUT_DIMS, bias=bias)
    if bias:
        linear.bias = mx.random.normal((OUTPUT_DIMS,))
    linear.set_dtype(dtype)
    return linear


def make_quantized(mode: str, bits: int, group_size: int, *, bias: bool = True) -> nn.Module:
    return nn.QuantizedLinear.from_linear(make_linear(bias=bias), group_size, bits, mode)


def make_trained(base: nn.Module, *, alpha: float = 6.0) -> LoRALinear:
    """A LoRA layer whose B is not zero."""
    layer = LoRALinear(base, RANK, alpha=alpha, key=mx.random.key(2))
    layer.lora_b = mx.random.normal(layer.lora_b.shape, key=mx.random.key(3)) * 0.1
    return layer


def inputs(*shape: int, dtype: mx.Dtype = mx.float32) -> mx.array:
    return mx.random.normal((*shape, INPUT_DIMS), key=mx.random.key(4)).astype(dtype)


def float64(array: mx.array) -> np.ndarray:
    return np.array(array.astype(mx.float32), dtype=np.float64)


def same_bits(first: mx.array, second: mx.array) -> bool:
    return first.dtype == second.dtype and bool(mx.array_equal(first, second))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
def test_an_untrained_layer_gives_what_its_linear_base_gives(bias: bool, dtype: mx.Dtype) -> None:
    base = make_linear(bias=bias, dtype=dtype)
    x = inputs(2, 5, dtype=dtype)
    assert same_bits(LoRALinear(base, RANK)(x), base(x))


@pytest.mark.parametrize(("mode", "bits", "group_size"), QUANTIZATIONS)
def test_an_untrained_layer_gives_what_its_quantized_base_gives(
    mode: str, bits: int, group_size: int
) -> None:
    base = make_quantized(mode, bits, group_size)
    x = inputs(2, 5)
    assert same_bits(LoRALinear(base, RANK)(x), base(x))


@pytest.mark.parametrize(("mode", "bits", "group_size"), QUANTIZATIONS)
def test_the_dims_of_a_quantized_layer_are_those_of_the_whole_one(
    mode: str, bits: int, group_size: int
) -> None:
    base = make_quantized(mode, bits, group_size)
    assert linear_dims(base) == (INPUT_DIMS, OUTPUT_DIMS)
    layer = LoRALinear(base, RANK)
    assert layer.lora_a.shape == (INPUT_DIMS, RANK)
    assert layer.lora_b.shape == (RANK, OUTPUT_DIMS)


def test_the_dims_of_a_linear_layer_are_input_then_output() -> None:
    assert linear_dims(make_linear()) == (INPUT_DIMS, OUTPUT_DIMS)


def test_lora_a_fills_the_interval_of_one_over_the_root_of_the_inputs() -> None:
    layer = LoRALinear(make_linear(), 64, key=mx.random.key(0))
    bound = 1 / 16  # sqrt(256) = 16
    a = float64(layer.lora_a)
    assert np.abs(a).max() <= bound
    assert a.max() > 0.99 * bound and a.min() < -0.99 * bound
    # Uniform: variance bound^2 / 3, within 5 % at 16,384 draws.
    assert a.var() == pytest.approx(bound**2 / 3, rel=0.05)
    assert abs(a.mean()) < 0.02 * bound


def test_lora_b_starts_at_zero() -> None:
    assert not LoRALinear(make_linear(), RANK).lora_b.any()


def test_lora_a_depends_on_the_key_alone() -> None:
    base = make_linear()
    first, again, other = (LoRALinear(base, 4, key=mx.random.key(seed)) for seed in (7, 7, 8))
    assert same_bits(first.lora_a, again.lora_a)
    assert not mx.array_equal(first.lora_a, other.lora_a)


def test_a_and_b_are_float32_over_a_base_of_half_precision() -> None:
    layer = LoRALinear(make_linear(dtype=mx.bfloat16), RANK)
    assert (layer.lora_a.dtype, layer.lora_b.dtype) == (mx.float32, mx.float32)


def test_the_output_is_that_of_the_equation() -> None:
    layer = make_trained(make_linear())
    x = inputs(3, 7)
    w, bias = float64(layer.linear.weight), float64(layer.linear.bias)
    a, b, rows = float64(layer.lora_a), float64(layer.lora_b), float64(x)
    expected = rows @ w.T + bias + 6.0 / RANK * (rows @ a @ b)
    np.testing.assert_allclose(float64(layer(x)), expected, atol=1e-5)


@pytest.mark.parametrize(("mode", "bits", "group_size"), [QUANTIZATIONS[3], *QUANTIZATIONS[-3:]])
def test_the_output_over_a_quantized_base_is_that_of_the_equation(
    mode: str, bits: int, group_size: int
) -> None:
    layer = make_trained(make_quantized(mode, bits, group_size))
    x = inputs(3, 7)
    w, bias = float64(dense_weight(layer.linear)), float64(layer.linear.bias)
    update = float64(layer.lora_a) @ float64(layer.lora_b)
    expected = float64(x) @ (w.T + 6.0 / RANK * update) + bias
    np.testing.assert_allclose(float64(layer(x)), expected, atol=1e-4)


def test_the_scale_is_alpha_over_rank() -> None:
    assert LoRALinear(make_linear(), 8, alpha=20.0).scale == 2.5


@pytest.mark.parametrize("quantized", [False, True])
def test_gradients_equal_finite_differences(quantized: bool) -> None:
    """Central differences, in float64 by numpy, of a loss that is not linear in the output."""
    base = make_quantized("affine", 3, 32) if quantized else make_linear()
    layer = make_trained(base)
    x = inputs(5)

    def loss(layer: LoRALinear, x: mx.array) -> mx.array:
        return mx.tanh(layer(x)).sum()

    gradients = dict(tree_flatten(nn.value_and_grad(layer, loss)(layer, x)[1]))
    assert set(gradients) == {"lora_a", "lora_b"}
    dx = mx.grad(lambda x: loss(layer, x))(x)

    rows, w = float64(x), float64(dense_weight(base))
    bias = float64(base.bias)
    values = {"x": rows, "lora_a": float64(layer.lora_a), "lora_b": float64(layer.lora_b)}

    def reference(**changed: np.ndarray) -> float:
        now = {**values, **changed}
        update = now["x"] @ now["lora_a"] @ now["lora_b"]
        return float(np.tanh(now["x"] @ w.T + bias + 6.0 / RANK * update).sum())

    generator = np.random.default_rng(0)
    for name, gradient in {**gradients, "x": dx}.items():
        for _ in range(20):
            direction = generator.normal(size=values[name].shape)
            ahead = reference(**{name: values[name] + 1e-5 * direction})
            behind = reference(**{name: values[name] - 1e-5 * direction})
            along = (float64(gradient) * direction).sum()
            assert along == pytest.approx((ahead - behind) / 2e-5, rel=1e-3, abs=1e-3), name


def test_the_first_gradient_reaches_b_and_leaves_a_alone() -> None:
    layer = LoRALinear(make_linear(), RANK)
    _, gradients = nn.value_and_grad(layer, lambda m, x: m(x).square().sum())(layer, inputs(5))
    assert not gradients["lora_a"].any()
    assert gradients["lora_b"].any()


@pytest.mark.parametrize("quantized", [False, True])
def test_an_optimizer_step_changes_a_and_b_and_nothing_else(quantized: bool) -> None:
    layer = make_trained(make_quantized("affine", 5, 64) if quantized else make_linear())
    assert set(dict(tree_flatten(layer.trainable_parameters()))) == {"lora_a", "lora_b"}
    before = {name: bytes(memoryview(a)) for name, a in tree_flatten(layer.parameters())}
    _, gradients = nn.value_and_grad(layer, lambda m, x: m(x).square().sum())(layer, inputs(5))
    optimizer = optim.Adam(learning_rate=0.1)
    optimizer.update(layer, gradients)
    mx.eval(layer.parameters())
    after = {name: bytes(memoryview(a)) for name, a in tree_flatten(layer.parameters())}
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {"lora_a", "lora_b"}
    assert any(name.startswith("linear.") for name in before)


def test_dropout_falls_on_the_adapter_alone_and_only_in_training() -> None:
    base = make_linear()
    layer = LoRALinear(base, RANK, dropout=0.5)
    layer.lora_b = mx.ones_like(layer.lora_b)
    x = inputs(4)
    plain = LoRALinear(base, RANK)
    plain.update({"lora_a": layer.lora_a, "lora_b": layer.lora_b})
    layer.eval()
    assert same_bits(layer(x), plain(x))
    layer.train()
    mx.random.seed(0)
    first = layer(x)
    assert not mx.array_equal(first, plain(x))
    layer.lora_b = mx.zeros_like(layer.lora_b)
    assert same_bits(layer(x), base(x))


def test_dropout_keeps_the_mean() -> None:
    layer = make_trained(make_linear())
    x = inputs(4)
    expected = layer(x)
    noisy = LoRALinear(layer.linear, RANK, alpha=6.0, dropout=0.25)
    noisy.update({"lora_a": layer.lora_a, "lora_b": layer.lora_b})
    mx.random.seed(0)
    mean = sum(noisy(x) for _ in range(4000)) / 4000
    assert float(mx.abs(mean - expected).max()) < 0.05
    assert float(mx.abs(noisy(x) - expected).max()) > 0.05


def test_delta_is_the_scaled_product_in_the_layout_of_the_weight() -> None:
    layer = make_trained(make_linear())
    expected = 1.5 * (float64(layer.lora_a) @ float64(layer.lora_b)).T
    assert layer.delta().shape == layer.linear.weight.shape
    np.testing.assert_allclose(float64(layer.delta()), expected, atol=1e-6)


@pytest.mark.parametrize("bias", [True, False])
def test_a_fused_linear_layer_equals_the_adapted_one(bias: bool) -> None:
    layer = make_trained(make_linear(bias=bias))
    fused = layer.fuse()
    assert type(fused) is nn.Linear and ("bias" in fused) is bias
    np.testing.assert_allclose(float64(fused(inputs(6))), float64(layer(inputs(6))), atol=1e-5)


def test_a_fused_layer_has_the_dtype_of_its_base_and_is_off_by_one_rounding() -> None:
    layer = make_trained(make_linear(dtype=mx.bfloat16))
    fused = layer.fuse()
    assert fused.weight.dtype == mx.bfloat16
    exact = float64(layer.linear.weight) + float64(layer.delta())
    # bfloat16 keeps 8 bits: half a unit in the last place is 2^-9 of the value.
    assert (np.abs(float64(fused.weight) - exact) <= np.abs(exact) * 2.0**-8).all()


@pytest.mark.parametrize(("mode", "bits", "group_size"), QUANTIZATIONS)
def test_a_fused_quantized_layer_is_the_sum_quantized_again(
    mode: str, bits: int, group_size: int
) -> None:
    layer = make_trained(make_quantized(mode, bits, group_size))
    fused = layer.fuse()
    assert (fused.mode, fused.bits, fused.group_size) == (mode, bits, group_size)
    total = nn.Linear(INPUT_DIMS, OUTPUT_DIMS)
    whole = dense_weight(layer.linear)
    total.weight = (whole.astype(mx.float32) + layer.delta()).astype(whole.dtype)
    expected = nn.QuantizedLinear.from_linear(total, group_size, bits, mode)
    assert same_bits(dense_weight(fused), dense_weight(expected))
    assert same_bits(fused.bias, layer.linear.bias)


def test_fusing_at_eight_bits_equals_the_adapted_layer_to_rounding() -> None:
    layer = make_trained(make_quantized("affine", 8, 32))
    x = inputs(6)
    weight = dense_weight(layer.linear) + layer.delta()
    # A group's 256 levels span its range; rounding moves a weight by half a level at most, and the
    # largest |x| sums over all inputs bound what that does to an output.
    groups = float64(weight).reshape(OUTPUT_DIMS, -1, 32)
    half_level = (groups.max(-1) - groups.min(-1)).max() / 255
    bound = half_level * np.abs(float64(x)).sum(-1).max()
    difference = np.abs(float64(layer.fuse()(x)) - float64(layer(x)))
    assert 0 < difference.max() < bound / 4


def test_fusing_leaves_the_adapted_layer_as_it_was() -> None:
    layer = make_trained(make_quantized("affine", 4, 64))
    before = layer(inputs(3))
    fused = layer.fuse()
    mx.eval(fused.parameters())
    assert same_bits(layer(inputs(3)), before)


def test_the_layer_holds_its_base_itself_and_keeps_the_protocol() -> None:
    base = make_linear()
    layer = LoRALinear.from_linear(base, rank=2, alpha=4.0, dropout=0.1)
    assert layer.base is base and isinstance(layer, LoRALayer)
    assert (layer.rank, layer.alpha, layer.scale) == (2, 4.0, 2.0)
    assert not isinstance(base, LoRALayer)
