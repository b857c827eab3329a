"""Every variant against PEFT: the same weights give the same outputs."""

import warnings
from typing import Any

import graft  # noqa: F401
from graft.adapters.attach import attach
from graft.adapters.layer_config import LayerConfig
from graft.adapters.layer_kinds import EMBEDDING_COLUMNS
from models import dense_weight

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

torch = pytest.importorskip("torch")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    peft = pytest.importorskip("peft")

pytestmark = [pytest.mark.reference, pytest.mark.filterwarnings("ignore")]

RANK, ALPHA = 4, 6.0


def to_mlx(tensor: Any) -> mx.array:
    return mx.array(tensor.detach().numpy())


def random(*shape: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


class Torch(torch.nn.Module):  # type: ignore[misc]
    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Any) -> Any:
        return self.layer(x)


class Ours(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def __call__(self, x: mx.array) -> mx.array:
        return self.layer(x)


def make_torch(name: str) -> Any:
    torch.manual_seed(0)
    return {
        "linear": lambda: torch.nn.Linear(24, 16),
        "embedding": lambda: torch.nn.Embedding(30, 16),
        "conv1d": lambda: torch.nn.Conv1d(6, 8, 3, stride=2, padding=1),
        "conv2d": lambda: torch.nn.Conv2d(6, 8, (3, 2), stride=(1, 2), padding=(1, 0)),
        "conv2d pointwise": lambda: torch.nn.Conv2d(6, 8, 1),
        "conv3d": lambda: torch.nn.Conv3d(6, 8, (2, 3, 1), padding=1),
    }[name]()


def make_ours(name: str, theirs: Any) -> nn.Module:
    """The same layer with the same weights."""
    layer = {
        "linear": lambda: nn.Linear(24, 16),
        "embedding": lambda: nn.Embedding(30, 16),
        "conv1d": lambda: nn.Conv1d(6, 8, 3, stride=2, padding=1),
        "conv2d": lambda: nn.Conv2d(6, 8, (3, 2), stride=(1, 2), padding=(1, 0)),
        "conv2d pointwise": lambda: nn.Conv2d(6, 8, 1),
        "conv3d": lambda: nn.Conv3d(6, 8, (2, 3, 1), padding=1),
    }[name]()
    weight = theirs.weight
    layer.weight = to_mlx(weight.movedim(1, -1).contiguous() if "conv" in name else weight)
    if "bias" in layer:
        layer.bias = to_mlx(theirs.bias)
    return Ours(layer)


def make_inputs(name: str) -> tuple[Any, mx.array]:
    if name == "embedding":
        ids = np.random.default_rng(3).integers(0, 30, (4, 7))
        return torch.tensor(ids), mx.array(ids.astype(np.int32))
    shape = {
        "linear": (5, 24),
        "conv1d": (2, 6, 9),
        "conv2d": (2, 6, 5, 7),
        "conv2d pointwise": (2, 6, 5, 7),
        "conv3d": (2, 6, 4, 5, 3),
    }[name]
    x = random(*shape, seed=3)
    return torch.tensor(x), mx.array(np.moveaxis(x, 1, -1) if "conv" in name else x)


def compare(name: str, theirs: Any, ours: nn.Module) -> None:
    """Outputs within 1e-5, apart and merged."""
    theirs.eval()
    their_inputs, our_inputs = make_inputs(name)
    expected = theirs(their_inputs).detach().numpy()
    expected = np.moveaxis(expected, 1, -1) if "conv" in name else expected
    np.testing.assert_allclose(np.array(ours(our_inputs)), expected, atol=1e-5, rtol=1e-5)
    ours.layer.merge()
    np.testing.assert_allclose(np.array(ours(our_inputs)), expected, atol=2e-5, rtol=1e-5)


def with_lora(name: str, **settings: Any) -> tuple[Any, Any, nn.Module]:
    """PEFT's model, its adapted layer with B not zero, and our base."""
    theirs = make_torch(name)
    ours = make_ours(name, theirs)
    config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=["layer"], **settings)
    model = peft.get_peft_model(Torch(theirs), config)
    return model, model.base_model.model.layer, ours


def randomize(parameters: Any) -> None:
    with torch.no_grad():
        for number, parameter in enumerate(parameters):
            parameter += 0.3 * torch.tensor(random(*parameter.shape, seed=50 + number))


def factors(name: str, layer: Any) -> dict[str, mx.array]:
    """PEFT's A and B in our layout."""
    if name == "embedding":
        a, b = layer.lora_embedding_A["default"], layer.lora_embedding_B["default"]
        return {"lora_a": to_mlx(a.T), "lora_b": to_mlx(b.T)}
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    if "conv" in name:
        a = a.movedim(0, -1).movedim(0, -2)  # (rank, inputs, *window) to (*window, inputs, rank)
        return {"lora_a": to_mlx(a.contiguous()), "lora_b": to_mlx(b.flatten(1).T.contiguous())}
    return {"lora_a": to_mlx(a.T.contiguous()), "lora_b": to_mlx(b.T.contiguous())}


def lora_parameters(model: Any) -> list[Any]:
    return [
        p for n, p in model.named_parameters() if "lora_A" in n or "lora_B" in n or "lora_emb" in n
    ]


NAMES = ["linear", "embedding", "conv1d", "conv2d", "conv2d pointwise", "conv3d"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("method", ["lora", "rslora"])
def test_lora_and_rslora_equal_peft(method: str, name: str) -> None:
    theirs, layer, ours = with_lora(name, use_rslora=method == "rslora")
    randomize(lora_parameters(theirs))
    attach(ours, {"layer": LayerConfig(RANK, ALPHA, method)})
    ours.layer.load(factors(name, layer))
    compare(name, theirs, ours)


@pytest.mark.parametrize("name", NAMES)
def test_dora_equals_peft(name: str) -> None:
    theirs, layer, ours = with_lora(name, use_dora=True)
    kind = EMBEDDING_COLUMNS.name if name == "embedding" else None
    attach(ours, {"layer": LayerConfig(RANK, ALPHA, "dora", kind)})
    magnitude = layer.lora_magnitude_vector["default"].weight
    np.testing.assert_allclose(
        np.array(ours.layer.m), magnitude.detach().numpy().flatten(), rtol=1e-5
    )
    randomize([*lora_parameters(theirs), magnitude])
    ours.layer.load({**factors(name, layer), "m": to_mlx(magnitude.flatten())})
    compare(name, theirs, ours)


@pytest.mark.parametrize("method", ["pissa", "olora"])
def test_a_start_and_the_training_after_it_equal_peft(method: str) -> None:
    """PEFT changes the base and trains A and B on it; the outputs and the product are the same."""
    theirs, layer, ours = with_lora("linear", init_lora_weights=method)
    base = np.array(ours.layer.weight)
    attach(ours, {"layer": LayerConfig(RANK, ALPHA, method)})
    compare("linear", theirs, ours)
    ours.layer.unmerge()
    start = factors("linear", layer)
    product = np.array(ours.layer.lora_a @ ours.layer.lora_b)
    np.testing.assert_allclose(product, np.array(start["lora_a"] @ start["lora_b"]), atol=1e-5)
    # Singular vectors are unique up to their sign: take theirs as the start.
    ours.layer._start_a, ours.layer._start_b = start["lora_a"], start["lora_b"]
    randomize(lora_parameters(theirs))
    ours.layer.update(factors("linear", layer))
    compare("linear", theirs, ours)
    assert np.array_equal(np.array(ours.layer.base.weight), base)
    assert not np.allclose(layer.base_layer.weight.detach().numpy(), base, atol=1e-2)


def test_an_exported_pissa_is_plain_lora_on_the_original_base() -> None:
    ours = make_ours("linear", make_torch("linear"))
    attach(ours, {"layer": LayerConfig(RANK, ALPHA, "pissa")})
    ours.layer.lora_b = ours.layer.lora_b + mx.array(random(RANK, 16, seed=4))
    tensors = ours.layer.tensors()
    x = make_inputs("linear")[1]
    plain = peft.get_peft_model(
        Torch(make_torch("linear")),
        peft.LoraConfig(r=2 * RANK, lora_alpha=2 * ALPHA, target_modules=["layer"]),
    )
    with torch.no_grad():
        adapted = plain.base_model.model.layer
        adapted.lora_A["default"].weight.copy_(torch.tensor(np.array(tensors["lora_a"].T)))
        adapted.lora_B["default"].weight.copy_(torch.tensor(np.array(tensors["lora_b"].T)))
    expected = plain(make_inputs("linear")[0]).detach().numpy()
    np.testing.assert_allclose(np.array(ours(x)), expected, atol=1e-5)


def test_loftq_s_start_equals_peft() -> None:
    """PEFT's start for a base that is quantized already: the rounding, decomposed."""
    from peft.utils.loftq_utils import _low_rank_decomposition

    whole = nn.Linear(64, 48)
    ours = Ours(whole.to_quantized(group_size=32, bits=4))
    attach(
        ours,
        {"layer": LayerConfig(RANK, ALPHA, "loftq")},
        unquantized_weights={"layer": whole.weight},
    )
    rounding = np.array(whole.weight - dense_weight(ours.layer.base))
    halves = _low_rank_decomposition(torch.tensor(rounding), reduced_rank=RANK)
    expected = (halves["L"] @ halves["R"]).numpy()
    np.testing.assert_allclose(np.array(ours.layer.delta()), expected, atol=1e-5)


def test_vera_equals_peft() -> None:
    theirs = make_torch("linear")
    ours = make_ours("linear", theirs)
    config = peft.VeraConfig(r=RANK, target_modules=["layer"])
    model = peft.get_peft_model(Torch(theirs), config)
    attach(ours, {"layer": LayerConfig(RANK, float(RANK), "vera")})
    layer = model.base_model.model.layer
    d, b = layer.vera_lambda_d["default"], layer.vera_lambda_b["default"]
    np.testing.assert_array_equal(np.array(ours.layer.lambda_d), d.detach().numpy())
    np.testing.assert_array_equal(np.array(ours.layer.lambda_b), b.detach().numpy())
    randomize([d, b])
    ours.layer._projection_a = to_mlx(layer.vera_A["default"].T.contiguous())
    ours.layer._projection_b = to_mlx(layer.vera_B["default"].T.contiguous())
    ours.layer.load({"lambda_d": to_mlx(d), "lambda_b": to_mlx(b)})
    compare("linear", model, ours)
    # The projections are drawn as PEFT draws them: within sqrt(6 / fan_in).
    fresh = make_ours("linear", make_torch("linear"))
    attach(fresh, {"layer": LayerConfig(RANK, float(RANK), "vera")})
    for mine, fan_in in ((fresh.layer._projection_a, 24), (fresh.layer._projection_b, RANK)):
        assert 0.9 * (6 / fan_in) ** 0.5 < mx.abs(mine).max().item() <= (6 / fan_in) ** 0.5


@pytest.mark.parametrize("name", ["linear", "conv2d", "conv3d"])
@pytest.mark.parametrize("method", ["ia3", "ia3-input"])
def test_ia3_equals_peft(method: str, name: str) -> None:
    theirs = make_torch(name)
    ours = make_ours(name, theirs)
    ends = ["layer"] if method == "ia3-input" else []
    config = peft.IA3Config(target_modules=["layer"], feedforward_modules=ends)
    model = peft.get_peft_model(Torch(theirs), config)
    vector = model.base_model.model.layer.ia3_l["default"]
    attach(ours, {"layer": LayerConfig(1, 1.0, method)})
    assert ours.layer.ia3_l.shape == (vector.numel(),)
    randomize([vector])
    ours.layer.load({"ia3_l": to_mlx(vector.flatten())})
    compare(name, model, ours)


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_gradients_equal_peft(method: str) -> None:
    theirs, layer, ours = with_lora("linear", use_dora=method == "dora")
    attach(ours, {"layer": LayerConfig(RANK, ALPHA, method)})
    trained = lora_parameters(theirs)
    tensors = factors("linear", layer)
    if method == "dora":
        trained.append(layer.lora_magnitude_vector["default"].weight)
    randomize(trained)
    tensors = factors("linear", layer)
    if method == "dora":
        tensors["m"] = to_mlx(trained[-1])
    ours.layer.load(tensors)
    x, y = make_inputs("linear")
    torch.tanh(theirs(x)).sum().backward()
    gradients = nn.value_and_grad(ours, lambda model: mx.tanh(model(y)).sum())(ours)[1]["layer"]
    expected = {"lora_a": layer.lora_A["default"].weight.grad.T}
    expected["lora_b"] = layer.lora_B["default"].weight.grad.T
    if method == "dora":
        expected["m"] = trained[-1].grad
    for key, gradient in expected.items():
        np.testing.assert_allclose(np.array(gradients[key]), gradient.numpy(), atol=2e-5, rtol=1e-4)
