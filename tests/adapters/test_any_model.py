"""Models that are no language models, or not mlx-lm's: docs/any-model.md, and more of them."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import graft  # noqa: F401
from graft.adapters.adapter import apply_adapter
from graft.adapters.attach import attach, count_parameters, detach, lora_layers, merge_all
from graft.adapters.files import load_adapter, save_adapter
from graft.adapters.targets import plan

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import pytest
from mlx.utils import tree_flatten

from support.paths import ROOT

PAGE = ROOT / "docs" / "any-model.md"


def test_the_page_s_code_runs_and_prints_what_it_shows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    text = PAGE.read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(blocks) == 5
    names: dict[str, Any] = {}
    for block in blocks:
        exec(block, names)
    (shown,) = re.findall(r"```text\n(.*?)```", text, re.DOTALL)
    assert capsys.readouterr().out.startswith(shown)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "adapter_config.json",
        "adapters.safetensors",
    ]


def random(*shape: int, seed: int = 1) -> mx.array:
    return mx.random.normal(shape, key=mx.random.key(seed))


class VisionTransformer(nn.Module):
    """Patches through a convolution, a learnt class token, an encoder, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 64, kernel_size=4, stride=4)
        self.token = mx.zeros((1, 1, 64))
        self.encoder = nn.TransformerEncoder(2, 64, 4)
        self.head = nn.Linear(64, 10)

    def __call__(self, images: mx.array) -> mx.array:
        x = self.patches(images).flatten(1, 2)
        x = mx.concatenate([mx.broadcast_to(self.token, (len(x), 1, 64)), x], axis=1)
        return self.head(self.encoder(x, None)[:, 0])


class ConvolutionalNet(nn.Module):
    """Convolutions with batch norm, pooling, a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1),
            nn.BatchNorm(16),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 3, padding=1, groups=4),
            nn.BatchNorm(32),
            nn.ReLU(),
        )
        self.head = nn.Linear(32, 10)

    def __call__(self, images: mx.array) -> mx.array:
        return self.head(self.features(images).mean(axis=(1, 2)))


class MinGPT(nn.Module):
    """minGPT's "gpt-mini": 6 layers, 6 heads, 192 dims; its embedding is the output too."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(65, 192)
        self.positions = nn.Embedding(32, 192)
        self.blocks = nn.TransformerEncoder(6, 192, 6)

    def __call__(self, ids: mx.array) -> mx.array:
        length = ids.shape[1]
        mask = nn.MultiHeadAttention.create_additive_causal_mask(length)
        x = self.tokens(ids) + self.positions(mx.arange(length))
        return self.tokens.as_linear(self.blocks(x, mask))


class Decoder(nn.Module):
    """`nn.TransformerDecoder` over a memory that is given."""

    def __init__(self) -> None:
        super().__init__()
        self.decoder = nn.TransformerDecoder(2, 64, 4)

    def __call__(self, x: mx.array, memory: mx.array) -> mx.array:
        return self.decoder(x, memory, None, None)


class Encoder(nn.Module):
    """`nn.TransformerEncoder` without a mask."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.TransformerEncoder(2, 64, 4)

    def __call__(self, x: mx.array) -> mx.array:
        return self.encoder(x, None)


def gpt2() -> nn.Module:
    from graft.pretrained.load import build_model

    return build_model(
        {
            "model_type": "gpt2",
            "n_ctx": 32,
            "n_embd": 64,
            "n_head": 4,
            "n_layer": 2,
            "n_positions": 32,
            "layer_norm_epsilon": 1e-5,
            "vocab_size": 128,
        }
    )


@dataclass(frozen=True)
class Case:
    make: Callable[[], nn.Module]
    inputs: Callable[[], tuple[mx.array, ...]]
    targets: str
    output: tuple[int, ...]


TOKENS = [[1, 5, 9, 30, 7, 2], [3, 3, 8, 60, 1, 0]]
CASES = {
    "encoder": Case(Encoder, lambda: (random(2, 6, 64),), "query,value,linear1", (2, 6, 64)),
    "decoder": Case(
        Decoder,
        lambda: (random(2, 6, 64), random(2, 5, 64)),
        "cross_attention.query,cross_attention.value,linear2",
        (2, 6, 64),
    ),
    "vision transformer": Case(
        VisionTransformer, lambda: (random(2, 16, 16, 3),), "patches,all-linear,ln", (2, 10)
    ),
    "convolutional net": Case(
        ConvolutionalNet, lambda: (random(4, 8, 8, 3),), "*features*,head", (4, 10)
    ),
    "gpt-2": Case(gpt2, lambda: (mx.array(TOKENS),), "c_attn.q,c_attn.v,c_proj,wte", (2, 6, 128)),
    "minGPT": Case(MinGPT, lambda: (mx.array(TOKENS),), "tokens,query,value,*ln*", (2, 6, 65)),
}


def prepare(name: str, *, quantize: bool) -> tuple[Case, nn.Module]:
    mx.random.seed(0)
    case = CASES[name]
    model = case.make()
    if quantize:
        nn.quantize(model, group_size=32, bits=4, class_predicate=_divides)
    mx.eval(model.parameters())
    return case, model


def _divides(path: str, module: nn.Module) -> bool:
    return hasattr(module, "to_quantized") and module.weight.shape[-1] % 32 == 0


def weights(model: nn.Module) -> dict[str, bytes]:
    return {
        name: bytes(memoryview(mx.contiguous(array).view(mx.uint8)))
        for name, array in tree_flatten(model.parameters())
    }


@pytest.mark.parametrize("quantize", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_quantize_attach_train_save_and_load(name: str, quantize: bool, tmp_path: Path) -> None:
    case, model = prepare(name, quantize=quantize)
    model.eval()
    inputs, base = case.inputs(), weights(model)
    expected = model(*inputs)
    attach(model, plan(model, case.targets, rank=1, alpha=2.0))
    assert mx.array_equal(model(*inputs), expected)
    target = random(*case.output, seed=2)

    def loss(model: nn.Module) -> mx.array:
        return (model(*inputs) - target).square().mean()

    gradient = nn.value_and_grad(model, loss)
    optimizer = optim.Adam(learning_rate=3e-3)
    first = loss(model).item()
    model.train()
    for _ in range(25):
        _, changes = gradient(model)
        optimizer.update(model, changes)
        mx.eval(model.parameters(), optimizer.state)
    model.eval()
    assert loss(model).item() < 0.95 * first
    trained = model(*inputs)

    save_adapter(tmp_path / "adapters.npz", model)
    adapter = load_adapter(tmp_path / "adapters.npz")
    assert sum(array.size for array in adapter.tensors.values()) == count_parameters(model)[0]
    _, fresh = prepare(name, quantize=quantize)
    apply_adapter(fresh, adapter, name="adapters.npz")
    fresh.eval()
    assert mx.array_equal(fresh(*inputs), trained)
    merge_all(model)
    assert mx.allclose(model(*inputs), trained, atol=1e-3)
    detach(model)
    assert weights(model) == base
    assert mx.array_equal(model(*inputs), expected)


def test_a_large_encoder_layer_trains_as_many_parameters_as_loralib() -> None:
    layer = nn.TransformerEncoderLayer(512, 8, 2048)
    attach(layer, plan(layer, "out,linear1,linear2", rank=4))
    assert count_parameters(layer)[0] == 24_576
    detach(layer)
    attach(layer, plan(layer, "query,key,value,out,linear1,linear2", rank=4))
    assert count_parameters(layer)[0] == 36_864


def test_counts_are_told_on_request(capsys: pytest.CaptureFixture[str]) -> None:
    model = nn.TransformerEncoderLayer(64, 4)
    total = sum(array.size for _, array in tree_flatten(model.parameters()))
    settings = plan(model, "query", rank=4)
    attach(model, settings, report=print)
    assert capsys.readouterr().out.splitlines() == [
        f"before: {total:,} of {total:,} parameters trained (100.00%)",
        f"after: 512 of {total + 512:,} parameters trained ({512 / (total + 512):.2%})",
    ]
    detach(model)
    attach(model, settings)
    assert capsys.readouterr().out == ""


def test_running_statistics_are_held_while_an_adapter_is_attached() -> None:
    _, model = prepare("convolutional net", quantize=False)
    norm = model.features.layers[1]
    attach(model, plan(model, "features.layers.0", rank=2))
    before = norm.running_mean
    model.train()
    model(random(4, 8, 8, 3))
    assert model.training and not norm.training
    assert norm.running_mean is before
    detach(model)
    model.train()
    model(random(4, 8, 8, 3))
    assert not mx.array_equal(norm.running_mean, before)


def test_the_projections_of_gpt_2_that_are_not_named_stay() -> None:
    _, model = prepare("gpt-2", quantize=False)
    attach(model, plan(model, "c_attn.q", rank=2))
    for path, layer in lora_layers(model):
        layer.lora_b = mx.ones_like(layer.lora_b)
        x = random(1, 3, 64)
        assert mx.array_equal(layer(x)[..., 64:], layer.base(x)[..., 64:]), path
        assert not mx.any(layer(x)[..., :64] == layer.base(x)[..., :64]), path
