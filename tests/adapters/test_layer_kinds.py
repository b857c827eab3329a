"""What a low-rank update is for each kind of layer, against references."""

import copy
from collections.abc import Callable
from typing import Any

import graft  # noqa: F401
from graft.adapters.attach import attach, count_parameters, lora_layers
from graft.adapters.layer_config import LayerConfig
from graft.adapters.layer_kinds import LAYER_KINDS, LINEAR, VECTOR, FusedParts, kind_of
from graft.adapters.targets import plan
from graft.errors import InputError
from graft.runtime.cpu import DequantizingLinear
from models import LoRALinear, dense_weight

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from support.layer_cases import (
    ALPHA,
    CASES,
    RANK,
    Model,
    adapt,
    bits_of,
    close,
    expert_inputs,
    experts,
    normal,
    quantized,
    shift,
)

TIED = [
    *("embedding", "embedding affine 4", "merge-first embedding", "full embedding"),
    *("dora embedding", "dora embedding affine 4"),
    *("pissa embedding", "olora embedding", "vera embedding", "full embedding affine 4"),
]


@pytest.mark.parametrize("name", TIED)
def test_a_tied_embedding_has_one_weight_for_input_and_output(name: str) -> None:
    _, model, _ = adapt(name)
    layer = copy.deepcopy(model).layer
    weight = dense_weight(layer.base) + layer.delta()
    tokens, hidden = mx.array([3, 39]), normal(4, 32)
    for _ in range(2):
        close(layer(tokens), weight[tokens])
        close(layer.as_linear(hidden), hidden @ weight.T)
        layer.merge()


@pytest.mark.parametrize("name", TIED)
def test_a_tied_embedding_starts_with_the_logits_of_its_base(name: str) -> None:
    _, _, layer = adapt(name, trained=False)
    hidden = normal(4, 32)
    assert bits_of(layer.as_linear(hidden)) == bits_of(layer.base.as_linear(hidden))


def test_an_embedding_as_peft_adapts_it_leaves_a_tied_output_alone() -> None:
    _, _, layer = adapt("dora embedding-columns")
    tokens, hidden = mx.array([3, 39]), normal(4, 32)
    for _ in range(2):
        close(layer(tokens), (dense_weight(layer.base) + layer.delta())[tokens])
        assert bits_of(layer.as_linear(hidden)) == bits_of(layer.base.as_linear(hidden))
        layer.merge()


@pytest.mark.parametrize("name", ["fused", "fused quantized", "fused per head"])
def test_parts_that_are_not_enabled_stay_bit_for_bit(name: str) -> None:
    case, _, layer = adapt(name)
    parts, unit = case.setting.parts, sum(case.setting.parts.sizes)
    (x,) = case.inputs()
    y, base = layer(x), layer.base(x)
    starts = np.cumsum([0, *parts.sizes]).tolist()
    for part, start, size in zip(parts.names, starts, parts.sizes, strict=False):
        columns = [r * unit + start + i for r in range(parts.repeats) for i in range(size)]
        mine, theirs = y[..., mx.array(columns)], base[..., mx.array(columns)]
        rows = layer.delta()[mx.array(columns)]
        if part in parts.enabled:
            assert not mx.any(mine == theirs)
            assert mx.all(mx.any(rows != 0, axis=1))
        else:
            assert bits_of(mine) == bits_of(theirs)
            assert not mx.any(rows)


def test_parts_equal_separate_layers() -> None:
    """The enabled parts are LoRA layers of their own over their own rows of the weight."""
    case, _, layer = adapt("fused")
    (x,) = case.inputs()
    y = layer(x)
    for number, (start, stop, columns) in enumerate([(0, 32, (0, 32)), (48, 64, (32, 48))]):
        alone = nn.Linear(32, stop - start)
        alone.weight, alone.bias = layer.base.weight[start:stop], layer.base.bias[start:stop]
        single = LoRALinear(alone, 2, alpha=3.0)
        single.lora_a = layer.lora_a[:, 2 * number : 2 * number + 2]
        single.lora_b = layer.lora_b[:, columns[0] : columns[1]]
        close(y[..., start:stop], single(x))


@pytest.mark.parametrize(
    ("layer", "parts", "said"),
    [
        (nn.Linear(8, 12), FusedParts(("q", "k"), (4, 4), ("q",)), "1 x (4 + 4) outputs"),
        (
            nn.Linear(8, 8),
            FusedParts(("q", "k"), (4, 4), ("v",)),
            "no part v in layer: there are q, k",
        ),
        (nn.Linear(8, 8), FusedParts(("q", "k"), (4, 4), ()), "no part chosen in layer"),
        (nn.Linear(8, 8), FusedParts(("q", "k"), (4, 4), ("q", "q")), "named twice among q, q"),
        (
            nn.Linear(8, 8),
            FusedParts(("q", "k"), (6, 2), ("q", "k")),
            "rank 4 for layer: give 1 to 2",
        ),
        (
            nn.Embedding(8, 8),
            FusedParts(("q", "k"), (4, 4), ("q",)),
            "only linear layers have parts",
        ),
    ],
)
def test_parts_that_do_not_fit_are_refused(layer: nn.Module, parts: FusedParts, said: str) -> None:
    model = Model(layer)
    with pytest.raises(InputError) as error:
        attach(model, {"layer": LayerConfig(4, 1.0, parts=parts)})
    assert said in str(error.value)
    assert model.layer is layer


def test_each_expert_is_a_lora_layer_of_its_own() -> None:
    case, _, layer = adapt("experts")
    x, indices = case.inputs()
    y = layer(x, indices)
    for row in range(3):
        for place in range(2):
            e = indices[row, place].item()
            weight = layer.base.weight[e] + ALPHA / RANK * layer.lora_b[e] @ layer.lora_a[e]
            close(y[row, place, 0], weight @ x[row, 0, 0] + layer.base.bias[e])


@pytest.mark.parametrize(
    ("mode", "bits", "size"),
    [
        *(("affine", bits, size) for bits in (2, 3, 4, 5, 6, 8) for size in (32, 64)),
        *(("mxfp4", 4, 32), ("nvfp4", 4, 16), ("mxfp8", 8, 32)),
    ],
)
def test_embeddings_of_every_quantization_start_at_zero_change(
    mode: str, bits: int, size: int
) -> None:
    base = quantized(nn.Embedding(40, 64), mode=mode, bits=bits, group_size=size)
    model, tokens, hidden = Model(base), mx.array([[3, 39]]), normal(2, 64)
    expected = bits_of(base(tokens)), bits_of(base.as_linear(hidden))
    attach(model, {"layer": LayerConfig(RANK, ALPHA)})
    layer = model.layer
    assert (bits_of(layer(tokens)), bits_of(layer.as_linear(hidden))) == expected
    shift(layer)
    assert layer.delta().shape == (40, 64)
    difference = layer(tokens) - base(tokens)
    assert mx.allclose(difference.astype(mx.float32), layer.delta()[tokens], atol=2e-2)
    change = layer.as_linear(hidden) - base.as_linear(hidden)
    assert mx.allclose(change, hidden @ layer.delta().T, atol=1e-4)


def test_sorted_experts_give_the_same() -> None:
    _, _, layer = adapt("experts")
    x, indices = normal(6, 1, 32), mx.array([0, 0, 1, 2, 2, 3])
    close(layer(x, indices, sorted_indices=True), layer(x, indices))


@pytest.mark.parametrize(
    ("mode", "bits"),
    [*(("affine", bits) for bits in (2, 3, 4, 5, 6, 8)), ("mxfp4", 4), ("nvfp4", 4), ("mxfp8", 8)],
)
def test_experts_of_every_quantization_start_at_zero_change(mode: str, bits: int) -> None:
    size = 16 if mode == "nvfp4" else 32
    model = Model(quantized(experts(), mode=mode, bits=bits, group_size=size))
    expected = model(*expert_inputs())
    attach(model, {"layer": LayerConfig(RANK, ALPHA)})
    assert bits_of(model(*expert_inputs())) == bits_of(expected)
    shift(model.layer)
    assert model.layer.delta().shape == (4, 16, 32)


def test_experts_with_scales_of_their_own_fuse_and_merge() -> None:
    layer = experts().to_quantized(group_size=16, bits=4, mode="nvfp4", global_scale=True)
    assert layer.global_scale.shape == (4,)
    model = Model(layer)
    attach(model, {"layer": LayerConfig(RANK, ALPHA)})
    again = model.layer.fuse()
    # Nothing was trained, so quantizing again rounds to what was there.
    close(dense_weight(again), dense_weight(layer))
    model.layer.merge()
    assert model.layer.merged.weight.shape == (4, 16, 32)


def test_the_four_projections_of_attention_are_adapted_by_name() -> None:
    mx.random.seed(0)
    model = nn.TransformerEncoder(1, 16, 2)
    expected = {
        name: bits_of(array)
        for name, array in tree_flatten(model.parameters())
        if "key" in name or "out" in name
    }
    settings = plan(model, "query,value", rank=2)
    assert list(settings) == [f"layers.0.attention.{name}_proj" for name in ("query", "value")]
    attach(model, settings)
    for _, layer in lora_layers(model):
        shift(layer)
    after = dict(tree_flatten(model.parameters()))
    assert expected and all(bits_of(after[name]) == was for name, was in expected.items())
    attention, x = model.layers[0].attention, normal(1, 4, 16)
    assert type(attention.key_proj) is nn.Linear is type(attention.out_proj)
    plain = LoRALinear(attention.query_proj.base, 2)
    plain.load(attention.query_proj.tensors())
    close(attention.query_proj(x), plain(x))


class Doubling(nn.Linear):
    """A linear layer that does more than its parent says."""

    def __call__(self, x: mx.array) -> mx.array:
        return 2 * super().__call__(mx.tanh(x))


class Own(nn.Module):
    """A layer that nobody knows."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = normal(3, 8, 8)

    def __call__(self, x: mx.array) -> mx.array:
        return mx.sin(x @ self.weight[0]) @ self.weight[1].T + x @ self.weight[2]


@pytest.mark.parametrize("layer_type", [lambda: Doubling(8, 8), Own])
def test_a_layer_of_unknown_type_runs_with_the_sum_of_its_weight(
    layer_type: Callable[[], nn.Module],
) -> None:
    model = Model(layer_type())
    x = normal(5, 8)
    expected = model(x)
    attach(model, {"layer": LayerConfig(2, 4.0)})
    assert model.layer.kind == "weight"
    assert bits_of(model(x)) == bits_of(expected)
    shift(model.layer)
    changed = layer_type()
    changed.update(dict(model.layer.base.items()))
    changed.weight = model.layer.base.weight + model.layer.delta()
    close(model(x), changed(x))


def test_a_subclass_that_computes_as_its_parent_is_taken_for_it() -> None:
    class Named(nn.Linear):
        pass

    assert kind_of(Named(4, 4)) is LINEAR
    assert kind_of(DequantizingLinear.of(nn.QuantizedLinear(64, 8))) is LINEAR


def test_modules_without_a_weight_have_no_kind() -> None:
    assert kind_of(nn.ReLU()) is None
    assert kind_of(None) is None
    assert kind_of(nn.RMSNorm(4)) is VECTOR


# loralib's formulas, from its layers.py: Embedding r (V + d); Linear r (in + out); MergedLinear
# A (r * sum(enabled), in), B (out // parts * sum(enabled), r); Conv2d A (r k, in k), B (out //
# groups * k, r k).
@pytest.mark.parametrize(
    ("layer", "setting", "expected"),
    [
        (nn.Linear(12, 20), LayerConfig(3, 1.0), 3 * (12 + 20)),
        (nn.Embedding(50, 12), LayerConfig(3, 1.0), 3 * (50 + 12)),
        (
            nn.Linear(12, 36),
            LayerConfig(3, 1.0, parts=FusedParts(("q", "k", "v"), (12, 12, 12), ("q", "v"))),
            3 * 2 * 12 + 36 // 3 * 2 * 3,
        ),
        (nn.Conv2d(4, 6, 3), LayerConfig(2, 1.0, "merge-first"), 2 * 3 * 4 * 3 + 6 * 3 * 2 * 3),
        (
            nn.Conv2d(4, 6, 3, groups=2),
            LayerConfig(2, 1.0, "merge-first"),
            2 * 3 * 4 * 3 + 6 // 2 * 3 * 2 * 3,
        ),
    ],
)
def test_the_trained_parameters_are_as_many_as_in_loralib(
    layer: nn.Module, setting: LayerConfig, expected: int
) -> None:
    model = Model(layer)
    attach(model, {"layer": setting})
    assert count_parameters(model)[0] == expected


def torch_layout(weight: mx.array) -> Any:
    """From (outputs, *window, inputs) to (outputs, inputs, *window), in that order in memory.

    With strides of another order PyTorch 2.13's grouped convolutions are wrong on the CPU.
    """
    torch = pytest.importorskip("torch")
    return torch.tensor(np.ascontiguousarray(np.moveaxis(np.array(weight), -1, 1)))


@pytest.mark.reference
@pytest.mark.parametrize(
    "name", [name for name, case in CASES.items() if "conv" in name and "trans" not in name]
)
def test_convolutions_equal_torch_with_the_deltas_added(name: str) -> None:
    torch = pytest.importorskip("torch")
    case, _, layer = adapt(name)
    (x,) = case.inputs()
    base, dims = layer.base, x.ndim - 2
    convolve = getattr(torch.nn.functional, f"conv{dims}d")
    settings = {
        "stride": base.stride,
        "padding": base.padding,
        "dilation": getattr(base, "dilation", 1),
        "groups": getattr(base, "groups", 1),
    }
    arrays = {
        key: base[key] + layer.deltas().get(key, 0) for key in ("weight", "bias") if key in base
    }
    bias = torch.tensor(np.array(arrays["bias"])) if "bias" in arrays else None
    expected = convolve(torch_layout(x), torch_layout(arrays["weight"]), bias, **settings)
    close(layer(x), mx.array(expected.movedim(1, -1).contiguous().numpy()))


def random_convolution(dims: int, seed: int) -> tuple[dict[str, Any], tuple[int, ...]]:
    """Settings of a convolution, and the shape of an input that it fits."""
    rng = np.random.default_rng(seed)

    def each(low: int, high: int) -> tuple[int, ...]:
        return tuple(int(n) for n in rng.integers(low, high + 1, dims))

    settings = {
        "kernel_size": each(1, 3),
        "stride": each(1, 3),
        "padding": each(0, 2),
        "dilation": each(1, 3),
    }
    if dims < 3:  # nn.Conv3d has no groups
        settings["groups"] = int(rng.choice([1, 2, 3]))
    if dims == 1:
        settings = {k: v[0] if isinstance(v, tuple) else v for k, v in settings.items()}
    return settings, (2, *each(8, 10), 6)


@pytest.mark.reference
@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_any_kernel_stride_padding_dilation_and_groups_equal_torch(dims: int, seed: int) -> None:
    torch = pytest.importorskip("torch")
    settings, shape = random_convolution(dims, seed)
    base = getattr(nn, f"Conv{dims}d")(6, 12, **settings)
    model, x = Model(base), normal(*shape)
    expected = bits_of(model(x))
    attach(model, {"layer": LayerConfig(RANK, ALPHA)})
    assert bits_of(model(x)) == expected
    shift(model.layer)
    weight = torch_layout(base.weight) + torch_layout(model.layer.delta())
    convolve = getattr(torch.nn.functional, f"conv{dims}d")
    settings.pop("kernel_size")
    theirs = convolve(torch_layout(x), weight, torch.tensor(np.array(base.bias)), **settings)
    close(model(x), mx.array(theirs.movedim(1, -1).contiguous().numpy()))


@pytest.mark.reference
def test_a_convolution_s_delta_is_that_of_loralib() -> None:
    """loralib: conv.weight + (lora_B @ lora_A).view(conv.weight.shape) * scaling."""
    torch = pytest.importorskip("torch")
    _, _, layer = adapt("merge-first conv2d")
    a = torch.tensor(np.array(layer.lora_a)).T
    b = torch.tensor(np.array(layer.lora_b)).T
    assert a.shape == (RANK * 3, 4 * 3) and b.shape == (6 // 2 * 3, RANK * 3)
    weight = torch_layout(layer.base.weight)
    expected = (b @ a).view(weight.shape) * (ALPHA / RANK)
    torch.testing.assert_close(torch_layout(layer.delta()), expected)


@pytest.mark.reference
def test_embeddings_equal_torch_with_the_sum_of_weight_and_delta() -> None:
    torch = pytest.importorskip("torch")
    case, _, layer = adapt("embedding")
    (tokens,) = case.inputs()
    update = np.array(layer.lora_a) @ np.array(layer.lora_b) * (ALPHA / RANK)
    weight = torch.tensor(np.array(layer.base.weight) + update)
    ids = torch.tensor(np.array(tokens)).long()
    expected = torch.nn.functional.embedding(ids, weight)
    close(layer(tokens), mx.array(expected.numpy()))
    hidden = normal(3, 32)
    logits = torch.nn.functional.linear(torch.tensor(np.array(hidden)), weight)
    close(layer.as_linear(hidden), mx.array(logits.numpy()))


@pytest.mark.parametrize("name", ["linear", "embedding", "conv2d", "conv3d", "experts"])
def test_the_matrices_of_a_and_b_multiply_to_the_product(name: str) -> None:
    _, _, layer = adapt(name)
    a, b, kind = layer.lora_a, layer.lora_b, LAYER_KINDS[layer.kind]
    matrices = kind.as_matrix(a) @ kind.as_matrix(b)
    product = kind.product(layer.base, a, b)
    expected = product.swapaxes(-1, -2) if kind.flat is None else kind.flat(product)
    close(matrices, expected)
    assert [array.shape[axis] for array, axis in zip((a, b), kind.rank_axes, strict=True)] == [2, 2]
    assert mx.array_equal(kind.from_matrix(kind.as_matrix(a), a.shape[:-2]), a)
    assert mx.array_equal(kind.from_matrix(kind.as_matrix(b), ()), b)
