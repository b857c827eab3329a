"""Graft against transformers and PyTorch: logits, loss and gradients of the same weights."""

import json
from pathlib import Path
from typing import Any

import lora
from graft.adapters.attach import attach, lora_layers
from graft.adapters.layer_config import LayerConfig
from graft.adapters.targets import choose_layers
from graft.data.collate import Batch, collate
from graft.data.examples import tokenize_rows
from graft.data.rows import Row
from graft.pretrained.load import load_model
from graft.training.evaluate import evaluate_split
from graft.training.options import Options

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map

from support import tiny
from support.fast_cases import mean_loss

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

pytestmark = [
    pytest.mark.reference,
    # Of PyTorch's and transformers' own making.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
ROWS = [Row({"text": text}, str(n)) for n, text in enumerate(tiny.TEXTS)]
CONFIGS = {"llama": tiny.LLAMA, "qwen2": tiny.QWEN2}


@pytest.fixture(scope="module", params=CONFIGS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model in mlx-lm's names, which for these architectures are Hugging Face's."""
    path = tmp_path_factory.mktemp(request.param)
    tiny.write_model(path, CONFIGS[request.param])
    fill_small_parts(path / "model.safetensors")
    return path


def fill_small_parts(file: Path) -> None:
    """Give biases and norms random values: at their start, zero and one, they would hide."""
    generator = np.random.default_rng(0)
    weights = {
        name: mx.array(generator.normal(1, 0.3, array.shape).astype(np.float32))
        if array.ndim == 1
        else array
        for name, array in mx.load(str(file)).items()
    }
    mx.save_safetensors(str(file), weights, metadata={"format": "pt"})


@pytest.fixture
def ours(folder: Path) -> nn.Module:
    return load_model(folder)[0]


@pytest.fixture
def theirs(folder: Path) -> Any:
    """transformers' own model with the folder's weights, in float32."""
    config = json.loads((folder / "config.json").read_text())
    model = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(**config), attn_implementation="eager"
    )
    weights = {
        name: torch.from_numpy(np.array(array))
        for name, array in mx.load(str(folder / "model.safetensors")).items()
    }
    missing, left_over = model.load_state_dict(weights, strict=False)
    tied = {"lm_head.weight"} if config["tie_word_embeddings"] else set()
    assert (set(missing), left_over) == (tied, [])
    return model.float().eval()


@pytest.fixture
def batch(folder: Path) -> Batch:
    """Rows of four lengths, padded."""
    _, tokenizer, _ = load_model(folder)
    examples = tokenize_rows(ROWS, tokenizer, max_length=64).examples
    batch = collate(examples, range(len(examples)))
    assert len({len(example) for example in examples}) > 1 and not batch["loss_mask"].all()
    return batch


def torch_loss(model: Any, batch: Batch) -> Any:
    """Cross-entropy by its definition: each row by itself, its real tokens only, no padding."""
    losses = []
    for inputs, targets, loss_mask in zip(
        batch["inputs"], batch["targets"], batch["loss_mask"], strict=True
    ):
        real = int(loss_mask.sum())
        ids = torch.from_numpy(inputs[:real].astype(np.int64))
        next_ids = torch.from_numpy(targets[:real].astype(np.int64))
        probabilities = model(ids[None]).logits[0].softmax(dim=-1)
        losses.append(-probabilities[torch.arange(real), next_ids].log())
    return torch.cat(losses).mean()


def arrays(batch: Batch) -> dict[str, mx.array]:
    return batch.to_mlx()


def test_logits_equal_transformers(ours: nn.Module, theirs: Any, batch: Batch) -> None:
    with torch.no_grad():
        expected = theirs(torch.from_numpy(batch["inputs"].astype(np.int64))).logits.numpy()
    found = np.array(ours(mx.array(batch["inputs"])))
    assert np.abs(expected).max() > 0.1
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)


def test_the_greedy_answer_equals_transformers(
    folder: Path, ours: nn.Module, theirs: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """With our key-value cache against whole forward passes of theirs."""
    _, tokenizer, _ = load_model(folder)
    ids = tokenizer.encode("The quick brown")
    with torch.no_grad():
        for _ in range(10):
            ids.append(int(theirs(torch.tensor([ids])).logits[0, -1].argmax()))
    lora.print_answer(ours, tokenizer, Options(prompt="The quick brown", temp=0.0, num_tokens=10))
    assert tokenizer.eos_token_id not in ids
    assert capsys.readouterr().out == tokenizer.decode(ids) + "\n"


def test_the_loss_is_the_cross_entropy_over_real_tokens(
    ours: nn.Module, theirs: Any, batch: Batch
) -> None:
    with torch.no_grad():
        expected = torch_loss(theirs, batch).item()
    found, tokens = mean_loss(ours, arrays(batch))
    assert tokens.item() == batch["loss_mask"].sum()
    assert found.item() == pytest.approx(expected, abs=1e-5)


def test_evaluation_is_the_same_cross_entropy(
    folder: Path, ours: nn.Module, theirs: Any, batch: Batch
) -> None:
    _, tokenizer, _ = load_model(folder)
    split = tokenize_rows(ROWS, tokenizer, max_length=64)
    with torch.no_grad():
        expected = torch_loss(theirs, batch).item()
    assert evaluate_split(ours, split, 3).loss == pytest.approx(expected, abs=1e-5)


def test_lora_gradients_equal_autograd(ours: nn.Module, theirs: Any, batch: Batch) -> None:
    """Of every `lora_a` and `lora_b`; B is random, since at zero the gradient of A would be too."""
    settings = dict.fromkeys(choose_layers(ours), LayerConfig(rank=4, alpha=6.0))
    attach(ours, settings, seed=3)
    generator = np.random.default_rng(1)
    for _, layer in lora_layers(ours):
        layer.lora_b = mx.array(generator.normal(0, 0.05, layer.lora_b.shape).astype(np.float32))
    _, gradients = nn.value_and_grad(ours, mean_loss)(ours, arrays(batch))
    found = dict(tree_flatten(gradients))
    values = dict(tree_flatten(tree_map(np.array, ours.trainable_parameters())))
    parameters = adapt_with_torch(theirs, values, scale=6.0 / 4)
    torch_loss(theirs, batch).backward()
    assert found.keys() == parameters.keys() and len(found) == 2 * 7 * 3
    for name, parameter in parameters.items():
        expected = parameter.grad.numpy()
        size = np.abs(expected).max()
        assert size > 1e-6
        np.testing.assert_allclose(
            np.array(found[name]), expected, rtol=1e-4, atol=1e-4 * size, err_msg=name
        )


def adapt_with_torch(model: Any, values: dict[str, Any], *, scale: float) -> dict[str, Any]:
    """y = W x + scale * B^T (A^T x) by hooks on transformers' linear layers; the parameters."""
    parameters = {name: torch.nn.Parameter(torch.from_numpy(v)) for name, v in values.items()}
    model.requires_grad_(False)
    for path in {name.rsplit(".", 1)[0] for name in parameters}:
        a, b = parameters[f"{path}.lora_a"], parameters[f"{path}.lora_b"]

        def add(module: Any, inputs: Any, output: Any, a: Any = a, b: Any = b) -> Any:
            return output + scale * (inputs[0] @ a) @ b

        model.get_submodule(path).register_forward_hook(add)
    return parameters
