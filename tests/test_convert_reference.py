"""Converted models give the logits that transformers gives, in float32 to 1e-4."""

import json
from pathlib import Path
from typing import Any

import convert

import numpy as np
import pytest

from support.layouts import TOKENS, WIDE, logits_of, meta_name, params_of, weights_of
from support.tiny import write_sentencepiece

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.reference

# Llama 3.1's, as transformers 5 writes it.
SCALED_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
SIZES = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "vocab_size"),
)


def make_model(kind: str, **changes: Any) -> Any:
    """A seeded model whose weights are so large that every part shows in the logits."""
    config = getattr(transformers, f"{kind}Config")(**{n: WIDE[n] for n in SIZES}, **changes)
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.08 if parameter.ndim > 1 else 0.5)
    return model


def save(model: Any, folder: Path, suffix: str = "safetensors") -> Path:
    """What transformers saves, or the same tensors as PyTorch's .bin file, with a tokenizer."""
    model.save_pretrained(folder)
    if suffix == "bin":
        (folder / "model.safetensors").unlink()
        torch.save(model.state_dict(), folder / "pytorch_model.bin")
    write_sentencepiece(folder / "tokenizer.model")
    return folder


def assert_equal_logits(folder: Path, model: Any) -> None:
    with torch.no_grad():
        expected = model(torch.tensor(np.array(TOKENS), dtype=torch.long)).logits.numpy()
    assert np.abs(expected).max() > 1, "the weights are too small to tell models apart"
    assert np.abs(logits_of(folder) - expected).max() < 1e-4


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("Llama", {"tie_word_embeddings": False}),
        ("Llama", {"tie_word_embeddings": True, "rope_parameters": SCALED_ROPE}),
        ("Qwen2", {"tie_word_embeddings": True}),
        ("Qwen2", {"tie_word_embeddings": False, "rope_parameters": {"rope_theta": 1e6}}),
    ],
)
def test_a_hugging_face_model_gives_the_logits_of_transformers(
    tmp_path: Path, kind: str, changes: dict[str, Any], suffix: str
) -> None:
    model = make_model(kind, **changes)
    source = save(model, tmp_path / "hf", suffix)
    file_format = "safetensors" if suffix == "bin" else "npz"
    convert.convert(tmp_path / "out", hf_path=source, file_format=file_format)
    assert_equal_logits(tmp_path / "out", model)


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_tensors_that_mlx_lm_transposes_come_out_right(tmp_path: Path, suffix: str) -> None:
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=512, n_ctx=1024)
    model = transformers.GPT2LMHeadModel(config).eval()
    torch.nn.init.normal_(model.transformer.wte.weight, std=0.3)
    source = save(model.transformer, tmp_path / "hf", suffix)
    convert.convert(tmp_path / "out", hf_path=source)
    assert_equal_logits(tmp_path / "out", model)
    files = {file.name for file in (tmp_path / "out").iterdir()}
    assert files == {"weights.npz", "config.json", "tokenizer.model"}


def interleaved(weight: Any, heads: int) -> Any:
    """Undo what transformers' converter does to q and k: back to Meta's order of rotary pairs."""
    rows, columns = weight.shape
    return weight.view(heads, 2, rows // heads // 2, columns).transpose(1, 2).reshape(rows, columns)


def split(name: str, weight: Any, shards: int) -> list[Any]:
    """As Llama 2 is split: columns of wo, w2 and the embedding, rows of the rest, whole norms."""
    if "norm" in name:
        return [weight] * shards
    columns = name.endswith(("wo.weight", "w2.weight", "tok_embeddings.weight"))
    return [part.clone() for part in weight.chunk(shards, dim=1 if columns else 0)]


def in_metas_order(name: str, weight: Any) -> Any:
    heads = {"q_proj": WIDE["num_attention_heads"], "k_proj": WIDE["num_key_value_heads"]}
    projection = name.split(".")[-2]
    return interleaved(weight, heads[projection]) if projection in heads else weight


def write_meta(folder: Path, parts: list[dict[str, Any]], **params: Any) -> Path:
    folder.mkdir()
    for index, part in enumerate(parts):
        torch.save(part, folder / f"consolidated.{index:02}.pth")
    (folder / "params.json").write_text(json.dumps({**params_of(WIDE), **params}))
    write_sentencepiece(folder / "tokenizer.model")
    return folder


@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize(
    ("rope", "params"),
    [
        ({"rope_theta": 10000.0}, {"rope_theta": None}),
        (SCALED_ROPE, {"rope_theta": 500000.0, "use_scaled_rope": True}),
    ],
)
def test_a_meta_model_gives_the_logits_of_transformers(
    tmp_path: Path, shards: int, rope: dict[str, Any], params: dict[str, Any]
) -> None:
    model = make_model("Llama", tie_word_embeddings=False, rope_parameters=rope)
    parts: list[dict[str, Any]] = [{"rope.freqs": torch.ones(8)} for _ in range(shards)]
    for name, weight in model.state_dict().items():
        pieces = split(meta_name(name), in_metas_order(name, weight), shards)
        for part, piece in zip(parts, pieces, strict=True):
            part[meta_name(name)] = piece
    source = write_meta(tmp_path / "meta", parts, norm_eps=model.config.rms_norm_eps, **params)
    convert.convert(tmp_path / "out", torch_path=source)
    assert_equal_logits(tmp_path / "out", model)


def test_a_mixtral_in_either_layout_gives_the_logits_of_transformers(tmp_path: Path) -> None:
    experts = {"num_experts": 4, "num_experts_per_tok": 2}
    model = make_model("Mixtral", num_local_experts=4, num_experts_per_tok=2, sliding_window=None)
    convert.convert(tmp_path / "from_hf", hf_path=save(model, tmp_path / "hf"))
    assert_equal_logits(tmp_path / "from_hf", model)
    tensors: dict[str, Any] = {}
    for name, array in weights_of(tmp_path / "from_hf").items():
        weight = in_metas_order(name, torch.tensor(np.array(array)))
        name = meta_name(name.replace("switch_mlp", "mlp"))
        name = name.replace("block_sparse_moe.feed_forward", "feed_forward.experts.N")
        name = name.replace("block_sparse_moe", "feed_forward")
        for index, part in enumerate(weight if ".N." in name else [weight]):
            tensors[name.replace(".N.", f".{index}.")] = part.clone()
    theta, epsilon = model.config.rope_parameters["rope_theta"], model.config.rms_norm_eps
    settings = {"rope_theta": theta, "norm_eps": epsilon, "moe": experts}
    source = write_meta(tmp_path / "meta", [tensors], **settings)
    convert.convert(tmp_path / "from_meta", torch_path=source)
    assert_equal_logits(tmp_path / "from_meta", model)
