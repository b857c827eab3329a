"""Every kind of layer under every method: what all of them promise, each for every one."""

import copy
from pathlib import Path

import graft  # noqa: F401
from graft.adapters.adapter import apply_adapter
from graft.adapters.attach import attach, detach, lora_layers, merge_all, unmerge_all
from graft.adapters.files import load_adapter, save_adapter
from models import LoRALayer, dense_weight, is_quantized

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import pytest
from mlx.utils import tree_flatten

from support.layer_cases import (
    CASES,
    Model,
    adapt,
    bits_of,
    close,
    frozen_bytes,
    make,
    normal,
    shift,
)

every_kind = pytest.mark.parametrize("name", CASES)


@every_kind
def test_step_zero_is_the_base_bit_for_bit(name: str) -> None:
    case, model = make(name)
    expected = model(*case.inputs())
    attach(model, {"layer": case.setting})
    assert bits_of(model(*case.inputs())) == bits_of(expected)


@every_kind
def test_the_layer_keeps_the_protocol_and_trains_what_it_saves(name: str) -> None:
    case, model, layer = adapt(name)
    assert isinstance(layer, LoRALayer)
    names = {path for path, _ in tree_flatten(model.trainable_parameters())}
    assert names == {f"layer.{key}" for key in layer.tensors()}
    assert layer.method == case.setting.method and layer.rank == case.setting.rank


@every_kind
def test_a_trained_layer_differs_and_its_delta_has_the_layout_of_the_weight(name: str) -> None:
    case, model, layer = adapt(name)
    assert not mx.allclose(model(*case.inputs()), layer.base(*case.inputs()), atol=1e-3)
    for key, delta in layer.deltas().items():
        whole = dense_weight(layer.base) if key == "weight" else layer.base[key]
        assert delta.shape == whole.shape and delta.dtype == mx.float32


@every_kind
def test_merged_equals_unmerged_and_fused_equals_both(name: str) -> None:
    case, model, layer = adapt(name)
    expected = model(*case.inputs())
    held = layer.merge()
    assert held == sum(layer.merged[key].nbytes for key in layer.deltas())
    close(model(*case.inputs()), expected, name=name)
    assert layer.merge() == 0
    layer.unmerge()
    assert bits_of(model(*case.inputs())) == bits_of(expected)
    close(layer.fuse(dequantize=True)(*case.inputs()), expected, name=name)


@every_kind
def test_fused_again_quantized_is_of_the_base_s_type_and_nearest_to_the_sum(name: str) -> None:
    case, _, layer = adapt(name)
    fused = layer.fuse()
    assert type(fused) is type(layer.base)
    if not is_quantized(layer.base) or "weight" not in layer.deltas():
        close(fused(*case.inputs()), layer(*case.inputs()))
        return
    whole = dense_weight(layer.base)
    whole = (whole + layer.delta()).astype(whole.dtype)
    settings = {k: getattr(layer.base, k) for k in ("group_size", "bits", "mode")}
    expected, *_ = mx.quantize(whole, **settings)
    assert bits_of(fused.weight) == bits_of(expected)


# One of each kind, whole and quantized, goes through it a thousand times, the others ten times.
A_THOUSAND_TIMES = (
    *("linear", "linear affine 4", "embedding", "embedding affine 4", "conv1d", "conv2d", "conv3d"),
    *("fused", "experts", "experts quantized", "layer norm", "bias", "merge-first conv2d"),
    *("dora linear affine 4", "pissa linear affine 4", "ia3 linear"),
)


@every_kind
def test_a_thousand_merges_leave_the_base_as_it_was(name: str) -> None:
    case, model, layer = adapt(name)
    before, output = frozen_bytes(layer.base), bits_of(model(*case.inputs()))
    for _ in range(1000 if name in A_THOUSAND_TIMES else 10):
        merge_all(model)
        unmerge_all(model)
    assert frozen_bytes(layer.base) == before
    assert bits_of(model(*case.inputs())) == output
    detach(model)
    assert frozen_bytes(model.layer) == before


@every_kind
def test_a_merged_layer_has_nothing_to_train_until_it_is_unmerged(name: str) -> None:
    _, model, layer = adapt(name)
    before = dict(tree_flatten(model.trainable_parameters()))
    merge_all(model)
    assert not tree_flatten(model.trainable_parameters())
    assert set(layer.tensors()) == {path.removeprefix("layer.") for path in before}
    unmerge_all(model)
    assert set(dict(tree_flatten(model.trainable_parameters()))) == set(before)


# An embedding in mxfp4 gives bfloat16, too coarse for a difference; DoRA holds its norm constant.
@pytest.mark.parametrize(
    "name", [name for name in CASES if name != "embedding mxfp4" and not name.startswith("dora")]
)
def test_gradients_equal_finite_differences(name: str) -> None:
    """Central differences along random directions, of a loss that is not linear in the output."""
    case, model, layer = adapt(name)

    def loss(model: Model) -> mx.array:
        return mx.tanh(0.3 * model(*case.inputs())).sum()

    tree = nn.value_and_grad(model, loss)(model)[1]
    gradients = {path.removeprefix("layer."): array for path, array in tree_flatten(tree)}
    assert set(gradients) == set(layer.tensors())
    for number, (key, gradient) in enumerate(gradients.items()):
        here = layer[key]
        direction = normal(*here.shape, seed=40 + number)
        direction = direction / mx.linalg.norm(direction.flatten())
        # float32: a step of 1e-2 balances rounding (1e-5) and curvature (1e-4).
        layer[key] = here + 1e-2 * direction
        ahead = loss(model)
        layer[key] = here - 1e-2 * direction
        behind = loss(model)
        layer[key] = here
        along = (gradient * direction).sum().item()
        difference = ((ahead - behind) / 2e-2).item()
        assert along == pytest.approx(difference, rel=2e-2, abs=5e-3), key


@every_kind
def test_training_lowers_the_loss_and_leaves_the_base_byte_for_byte(name: str) -> None:
    case, model, layer = adapt(name, trained=False)
    target = copy.deepcopy(model)
    shift(target.layer)
    expected = target(*case.inputs())
    before = frozen_bytes(layer.base), frozen_bytes(model.other)

    def loss(model: Model) -> mx.array:
        return (model(*case.inputs()) - expected).square().mean()

    gradient = nn.value_and_grad(model, loss)
    optimizer = optim.Adam(learning_rate=0.03)
    first = loss(model).item()
    for _ in range(60):
        _, changes = gradient(model)
        optimizer.update(model, changes)
        mx.eval(model.parameters(), optimizer.state)
    assert loss(model).item() < 0.5 * first
    assert (frozen_bytes(layer.base), frozen_bytes(model.other)) == before


@every_kind
@pytest.mark.parametrize("suffix", ["npz", "safetensors"])
def test_an_adapter_survives_a_round_trip(name: str, suffix: str, tmp_path: Path) -> None:
    case, model, layer = adapt(name)
    file = tmp_path / f"adapters.{suffix}"
    save_adapter(file, model)
    adapter = load_adapter(file)
    assert set(adapter.tensors) == {f"layer.{key}" for key in layer.tensors()}
    assert adapter.layers["layer"].kind == layer.kind
    _, fresh = make(name)
    apply_adapter(fresh, adapter, name="a")
    assert bits_of(fresh(*case.inputs())) == bits_of(model(*case.inputs()))
    assert [path for path, _ in lora_layers(fresh)] == ["layer"]


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
@pytest.mark.parametrize("name", ["embedding", "conv2d", "fused", "rms norm", "merge-first linear"])
def test_the_output_has_the_dtype_of_a_base_in_half_precision(name: str, dtype: mx.Dtype) -> None:
    case, model = make(name)
    model.set_dtype(dtype)
    inputs = [x.astype(dtype) if x.dtype == mx.float32 else x for x in case.inputs()]
    expected = model(*inputs)
    attach(model, {"layer": case.setting})
    assert model(*inputs).dtype == dtype
    assert bits_of(model(*inputs)) == bits_of(expected)
    assert all(array.dtype == mx.float32 for array in model.layer.tensors().values())
