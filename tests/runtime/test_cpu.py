import os
import subprocess
import sys
from pathlib import Path

import graft  # noqa: F401
from graft.runtime import cpu as backend
from graft.runtime.cpu import (
    MANY_ROWS,
    CompiledStep,
    CpuLoRALinear,
    DequantizingLinear,
    suit_backend,
)
from models import dense_weight, fused, weight_shape

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from support.paths import ROOT
from support.tiny import LLAMA, QWEN2, make_model

INPUT_DIMS, OUTPUT_DIMS = 256, 48
QUANTIZATIONS = [
    *(("affine", bits, size) for bits in (2, 3, 4, 5, 6, 8) for size in (32, 64, 128)),
    ("mxfp4", 4, 32),
    ("nvfp4", 4, 16),
    ("mxfp8", 8, 32),
]
MANY = MANY_ROWS

on_cpu = pytest.mark.skipif(not backend.runs_on_cpu(), reason="speaks of the CPU backend")


def make_quantized(mode: str, bits: int, group_size: int, *, bias: bool) -> nn.QuantizedLinear:
    mx.random.seed(1)
    linear = nn.Linear(INPUT_DIMS, OUTPUT_DIMS, bias=bias)
    if bias:
        linear.bias = mx.random.normal((OUTPUT_DIMS,))
    return nn.QuantizedLinear.from_linear(linear, group_size, bits, mode)


def rows(*shape: int) -> mx.array:
    return mx.random.normal((*shape, INPUT_DIMS), key=mx.random.key(2))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("mode", "bits", "group_size"), QUANTIZATIONS)
def test_the_outputs_are_those_of_a_quantized_linear(
    mode: str, bits: int, group_size: int, bias: bool
) -> None:
    plain = make_quantized(mode, bits, group_size, bias=bias)
    ours = DequantizingLinear.of(plain)
    for shape in [(1,), (MANY - 1,), (MANY,), (2, MANY), (3, 2, 5)]:
        x = rows(*shape)
        assert ours(x).shape == (*shape, OUTPUT_DIMS)
        np.testing.assert_allclose(np.array(ours(x)), np.array(plain(x)), atol=1e-5)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("mode", "bits", "group_size"), QUANTIZATIONS)
def test_the_gradients_of_the_input_are_those_of_a_quantized_linear(
    mode: str, bits: int, group_size: int, bias: bool
) -> None:
    plain = make_quantized(mode, bits, group_size, bias=bias)
    ours = DequantizingLinear.of(plain)
    for shape in [(2,), (MANY,), (2, MANY)]:
        x = rows(*shape)
        expected, found = (
            mx.grad(lambda x, layer=layer: mx.tanh(layer(x)).sum())(x) for layer in (plain, ours)
        )
        np.testing.assert_allclose(np.array(found), np.array(expected), atol=1e-5)


@on_cpu
@pytest.mark.parametrize("quantized", [False, True])
def test_a_base_that_is_trained_itself_gets_its_gradient(quantized: bool) -> None:
    """The fast products give it none, so it takes the plain ones."""
    base = nn.Linear(INPUT_DIMS, OUTPUT_DIMS)
    base = DequantizingLinear.of(base.to_quantized(32, 4)) if quantized else base
    layer = CpuLoRALinear(base, 4)
    base.unfreeze(keys=["scales", "biases"] if quantized else ["weight"])
    x, name = rows(MANY), "scales" if quantized else "weight"
    _, found = nn.value_and_grad(layer, lambda layer: mx.tanh(layer(x)).sum())(layer)
    few = [
        nn.value_and_grad(layer, lambda layer, row=row: mx.tanh(layer(row)).sum())(layer)[1]
        for row in mx.split(x, MANY)
    ]
    expected = sum(each["linear"][name] for each in few)
    assert mx.abs(expected).max() > 0
    np.testing.assert_allclose(np.array(found["linear"][name]), np.array(expected), atol=1e-4)


def test_many_rows_are_multiplied_by_the_dense_weight_and_few_are_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls = []
    dense = backend.dense_weight
    monkeypatch.setattr(backend, "dense_weight", lambda layer: calls.append(1) or dense(layer))
    layer = DequantizingLinear.of(make_quantized("affine", 4, 32, bias=False))
    mx.eval(layer(rows(MANY - 1)))
    assert calls == []
    mx.eval(layer(rows(MANY)))
    assert calls == [1]


def test_the_backward_pass_dequantizes_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    dense = backend.dense_weight
    monkeypatch.setattr(backend, "dense_weight", lambda layer: calls.append(1) or dense(layer))
    layer = DequantizingLinear.of(make_quantized("affine", 4, 32, bias=False))
    mx.eval(mx.grad(lambda x: layer(x).sum())(rows(MANY)))
    assert calls == [1, 1]


def test_the_twin_shares_its_arrays_and_is_frozen() -> None:
    plain = make_quantized("affine", 3, 64, bias=True)
    ours = DequantizingLinear.of(plain)
    assert isinstance(ours, nn.QuantizedLinear)
    assert (ours.bits, ours.group_size, ours.mode) == (3, 64, "affine")
    for name, array in tree_flatten(plain.parameters()):
        assert ours[name] is array
    assert not tree_flatten(ours.trainable_parameters())


@on_cpu
@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_a_model_of_half_precision_becomes_float32_on_the_cpu(dtype: mx.Dtype) -> None:
    model = make_model(LLAMA)
    model.set_dtype(dtype)
    before = dict(tree_flatten(model.parameters()))
    backend.suit_backend(model)
    for name, array in tree_flatten(model.parameters()):
        assert array.dtype == mx.float32
        assert mx.array_equal(array, before[name].astype(mx.float32))


@on_cpu
@pytest.mark.parametrize("config", [LLAMA, QWEN2])
def test_a_quantized_model_keeps_its_logits(config: dict) -> None:
    model = make_model(config)
    nn.quantize(model, group_size=32, bits=4)
    tokens = mx.array([[1, 5, 9, 300, 7, 2, 11, 12, 13, 14]])
    expected = model(tokens)
    packed = {n: a for n, a in tree_flatten(model.parameters()) if a.dtype == mx.uint32}
    backend.suit_backend(model)
    kinds = {type(module) for _, module in model.named_modules()}
    assert DequantizingLinear in kinds and nn.QuantizedLinear not in kinds
    after = dict(tree_flatten(model.parameters()))
    assert packed and all(after[name] is array for name, array in packed.items())
    np.testing.assert_allclose(np.array(model(tokens)), np.array(expected), atol=1e-5)


def test_on_a_gpu_the_model_stays_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "runs_on_cpu", lambda: False)
    model = make_model(LLAMA)
    nn.quantize(model, group_size=32, bits=4)
    model.set_dtype(mx.float16)
    before = dict(model.named_modules())
    arrays = dict(tree_flatten(model.parameters()))
    backend.suit_backend(model)
    assert all(module is before[path] for path, module in model.named_modules())
    assert all(array is arrays[name] for name, array in tree_flatten(model.parameters()))


def test_a_missing_compiler_is_said_and_compiling_is_turned_off(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(backend.sys, "platform", "linux")
    monkeypatch.setattr(backend, "runs_on_cpu", lambda: True)
    monkeypatch.setattr(backend.shutil, "which", lambda name: None)
    calls = []
    monkeypatch.setattr(backend.mx, "disable_compile", lambda: calls.append("off"))
    backend.check_compiler()
    assert calls == ["off"]
    assert "install g++" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("platform", "cpu", "compiler"),
    [("linux", True, "/bin/g++"), ("linux", False, None), ("darwin", True, None)],
)
def test_where_compiling_works_nothing_is_turned_off(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    platform: str,
    cpu: bool,
    compiler: str | None,
) -> None:
    monkeypatch.setattr(backend.sys, "platform", platform)
    monkeypatch.setattr(backend, "runs_on_cpu", lambda: cpu)
    monkeypatch.setattr(backend.shutil, "which", lambda name: compiler)
    monkeypatch.setattr(backend.mx, "disable_compile", lambda: pytest.fail("turned off"))
    backend.check_compiler()
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(("cpu", "told"), [(True, False), (False, True)])
def test_a_step_runs_as_it_is_on_the_cpu_and_where_mlx_is_told_not_to_compile(
    monkeypatch: pytest.MonkeyPatch, cpu: bool, told: bool
) -> None:
    monkeypatch.setattr(backend, "runs_on_cpu", lambda: cpu)
    if told:
        monkeypatch.setenv("MLX_DISABLE_COMPILE", "1")
    calls = []
    step = CompiledStep(lambda x: calls.append(x.shape) or x + 1, [])
    assert [step(mx.array([n])).item() for n in range(3)] == [1, 2, 3]
    assert calls == [(1,)] * 3
    assert (step.traces, step.shapes) == (0, set())


def test_the_traces_of_a_compiled_step_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """By hand: two widths, of which one comes again, and one of another type, for no need."""
    monkeypatch.setattr(backend, "runs_on_cpu", lambda: False)
    step = CompiledStep(lambda sums, group: {"loss": sums["loss"] + group[0].sum()}, [])
    sums = {"loss": mx.array(0.0)}
    for width in (4, 5, 4, 4):
        sums = step(sums, [mx.ones((2, width))])
    assert sums["loss"].item() == 2 * (4 + 5 + 4 + 4)
    assert (step.traces, len(step.shapes)) == (2, 2)
    step(sums, [mx.ones((2, 4), dtype=mx.int32)])
    assert (step.traces, len(step.shapes)) == (3, 2)


@pytest.mark.parametrize("cpu", [True, False])
def test_an_exponential_is_one(monkeypatch: pytest.MonkeyPatch, cpu: bool) -> None:
    monkeypatch.setattr(backend, "runs_on_cpu", lambda: cpu)
    x = np.concatenate([np.linspace(-80, 0, 1000), [-np.inf, -200.0, 0.0]]).astype(np.float32)
    expected = np.exp(x.astype(np.float64))
    np.testing.assert_allclose(
        np.array(backend.exponential(mx.array(x))), expected, rtol=1e-5, atol=1e-38
    )


@pytest.mark.parametrize(("metal", "told"), [(True, [12345]), (False, [])])
def test_metal_is_told_to_keep_its_memory_resident(
    monkeypatch: pytest.MonkeyPatch, metal: bool, told: list[int]
) -> None:
    limits: list[int] = []
    information = {"max_recommended_working_set_size": 12345}
    monkeypatch.setattr(backend.mx.metal, "is_available", lambda: metal)
    monkeypatch.setattr(backend.mx, "device_info", lambda: information)
    monkeypatch.setattr(backend.mx, "set_wired_limit", limits.append)
    backend.suit_backend(make_model(LLAMA))
    assert limits == told


@on_cpu
def test_whole_weights_are_kept_where_they_fit_and_change_nothing() -> None:
    model = make_model(LLAMA)
    nn.quantize(model, group_size=32, bits=4)
    suit_backend(model)
    tokens = mx.arange(24).reshape(2, 12)
    expected, saved = model(tokens), sorted(dict(tree_flatten(model.parameters())))
    layers = [m for _, m in model.named_modules() if isinstance(m, DequantizingLinear)]
    size = sum(4 * weight_shape(layer)[0] * weight_shape(layer)[1] for layer in layers)
    assert backend.keep_whole_weights(model, size - 1) == 0
    assert all(layer.kept is None for layer in layers)
    assert backend.keep_whole_weights(model, size) == size
    assert sum(layer.kept.nbytes for layer in layers) == size
    assert mx.array_equal(model(tokens), expected)
    assert sorted(dict(tree_flatten(model.parameters()))) == saved


def test_shortcuts_can_be_switched_off() -> None:
    code = (
        "import lora, mlx.core as mx, mlx.nn as nn\n"
        "from graft.runtime.cpu import CpuLoRALinear, suit_backend\n"
        "model = nn.Sequential(CpuLoRALinear(nn.Linear(8, 8), 2))\n"
        "suit_backend(model)\n"
        "print(not getattr(model, 'uses_fast_functions', False),"
        " model.layers[0].multiplies_at_once(mx.ones((9, 8))))"
    )
    for setting, expected in (("off", "True False"), ("on", "False True")):
        done = subprocess.run(
            [sys.executable, "-c", code],
            cwd=ROOT,
            env={**os.environ, "GRAFT_SHORTCUTS": setting},
            capture_output=True,
            text=True,
            check=True,
        )
        if sys.platform == "linux" and backend.runs_on_cpu():
            assert done.stdout.strip() == expected


@on_cpu
def test_a_layer_made_of_one_that_keeps_its_whole_weight_multiplies_with_its_own() -> None:
    layer = DequantizingLinear.of(nn.QuantizedLinear.from_linear(nn.Linear(64, 48), 32, 4))
    layer.keep()
    changed = fused(layer, {"weight": mx.ones((48, 64))})
    x = mx.ones((MANY, 64))
    assert mx.allclose(changed(x), x @ dense_weight(changed).T + changed.bias, rtol=1e-5)
    assert not mx.allclose(changed(x), layer(x), rtol=0.1)


@on_cpu
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("bits", [None, 4])
def test_the_product_in_one_is_that_of_base_and_update(
    monkeypatch: pytest.MonkeyPatch, bits: int | None, bias: bool
) -> None:
    mx.random.seed(0)
    linear: nn.Module = nn.Linear(64, 48, bias=bias)
    if bits is not None:
        linear = DequantizingLinear.of(nn.QuantizedLinear.from_linear(linear, 32, bits))
    layer = CpuLoRALinear(linear, 4, alpha=6.0)
    layer.lora_b = mx.random.normal((4, 48))
    x, weights = mx.random.normal((2, 9, 64)), mx.random.normal((2, 9, 48))

    def outcome() -> list[mx.array]:
        def weighted(x: mx.array, a: mx.array, b: mx.array) -> mx.array:
            layer.lora_a, layer.lora_b = a, b
            return (layer(x) * weights).sum()

        arrays = x, layer.lora_a, layer.lora_b
        value, gradients = mx.value_and_grad(weighted, argnums=(0, 1, 2))(*arrays)
        layer.lora_a, layer.lora_b = arrays[1:]
        return [layer(x), value, *gradients]

    assert layer.multiplies_at_once(x)
    found = outcome()
    monkeypatch.setattr(backend, "MANY_ROWS", 10**9)
    assert not layer.multiplies_at_once(x)
    for ours, plain in zip(found, outcome(), strict=True):
        assert mx.abs(ours - plain).max() <= 1e-5 * mx.abs(plain).max()


@on_cpu
def test_dropout_leaves_the_update_apart() -> None:
    layer = CpuLoRALinear(nn.Linear(64, 48), 4, dropout=0.5)
    x = mx.ones((16, 64))
    assert not layer.multiplies_at_once(x)
    layer.eval()
    assert layer.multiplies_at_once(x)


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not compile C++")
def test_a_temporary_folder_that_cannot_be_used_turns_compiling_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    turned_off: list[bool] = []
    monkeypatch.setattr("graft.runtime.cpu.runs_on_cpu", lambda: True)
    monkeypatch.setattr("graft.runtime.cpu.shutil.which", lambda name: "/usr/bin/g++")
    monkeypatch.setattr(mx, "disable_compile", lambda: turned_off.append(True))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    backend.check_compiler()
    assert not turned_off
    monkeypatch.setenv("TMPDIR", str(tmp_path / "none"))
    backend.check_compiler()
    assert turned_off
    assert f"the temporary folder {tmp_path / 'none'} cannot be written" in capsys.readouterr().err
