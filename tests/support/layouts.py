"""Tiny checkpoints in Meta's layout, and a look at what converting makes of a checkpoint."""

import json
from pathlib import Path
from typing import Any

from graft.pretrained.load import read_model

import mlx.core as mx
import numpy as np

from support import tiny, torch_zip

# Wide enough for every group size.
WIDE = {**tiny.LLAMA, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2}
TOKENS = mx.array([[1, 5, 9, 300, 7, 42, 0, 511]])


def write_meta(folder: Path, hugging_face: Path) -> Path:
    folder.mkdir()
    arrays = mx.load(str(hugging_face / "model.safetensors"))
    assert isinstance(arrays, dict)
    tensors = {meta_name(name): np.array(array) for name, array in arrays.items()}
    torch_zip.save(folder / "consolidated.00.pth", tensors)
    (folder / "params.json").write_text(json.dumps(params_of(WIDE)))
    (folder / "tokenizer.model").write_bytes((hugging_face / "tokenizer.model").read_bytes())
    return folder


def params_of(config: dict[str, Any]) -> dict[str, Any]:
    names = {
        "hidden_size": "dim",
        "num_hidden_layers": "n_layers",
        "num_attention_heads": "n_heads",
        "num_key_value_heads": "n_kv_heads",
        "rms_norm_eps": "norm_eps",
        "rope_theta": "rope_theta",
    }
    return {"vocab_size": -1, **{new: config[old] for old, new in names.items()}}


def meta_name(name: str) -> str:
    names = {
        "model.embed_tokens": "tok_embeddings",
        "lm_head": "output",
        "self_attn.q_proj": "attention.wq",
        "self_attn.k_proj": "attention.wk",
        "self_attn.v_proj": "attention.wv",
        "self_attn.o_proj": "attention.wo",
        "mlp.gate_proj": "feed_forward.w1",
        "mlp.down_proj": "feed_forward.w2",
        "mlp.up_proj": "feed_forward.w3",
        "input_layernorm": "attention_norm",
        "post_attention_layernorm": "ffn_norm",
    }
    for theirs, metas in names.items():
        name = name.replace(theirs, metas)
    return name.removeprefix("model.")


def weights_of(folder: Path) -> dict[str, mx.array]:
    (file,) = [*folder.glob("weights.npz"), *folder.glob("model.safetensors")]
    arrays = mx.load(str(file))
    assert isinstance(arrays, dict)
    return arrays


def config_of(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return config


def logits_of(folder: Path, tokens: mx.array = TOKENS) -> np.ndarray[Any, Any]:
    """Logits (1, tokens, vocabulary) of a converted folder in float32, by its own loader."""
    if (folder / "weights.npz").exists():
        model, _ = read_model(folder)
    else:
        from mlx_lm.utils import load_model

        model, _ = load_model(folder)
    return np.array(model(tokens).astype(mx.float32))
