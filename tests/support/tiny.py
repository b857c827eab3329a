"""Tiny seeded models and tokenizers on disk, made in milliseconds, for the tests."""

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

TEXTS = [
    "The quick brown fox jumps over the lazy dog.",
    "def relu(x):\n    return maximum(x, 0)\n",
    "Applies the Rectified Linear Unit. Ärger, naïve café, 日本語 and 🙂.",
    "Args:\n    x (array): The input.\n\nReturns:\n    array: The output.",
]

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "vocab_size": 512,
    "rope_theta": 10000.0,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
QWEN2: dict[str, Any] = {
    **LLAMA,
    "model_type": "qwen2",
    "architectures": ["Qwen2ForCausalLM"],
    "tie_word_embeddings": True,
}


def make_model(config: dict[str, Any], *, seed: int = 0) -> nn.Module:
    """A model of mlx-lm with random weights."""
    from graft.pretrained.load import build_model

    mx.random.seed(seed)
    model = build_model(config)
    mx.eval(model.parameters())
    return model


def write_model(
    folder: Path,
    config: dict[str, Any] = LLAMA,
    *,
    bits: int | None = None,
    group_size: int = 32,
    seed: int = 0,
    form: str = "safetensors",
) -> Path:
    """Write a model folder with a SentencePiece tokenizer, as `convert.py` would; returns it."""
    folder.mkdir(parents=True, exist_ok=True)
    model = make_model(config, seed=seed)
    if bits is not None:
        nn.quantize(model, group_size=group_size, bits=bits)
        quantization = {"group_size": group_size, "bits": bits, "mode": "affine"}
        config = {**config, "quantization": quantization}
    weights = dict(tree_flatten(model.parameters()))
    if form == "npz":
        mx.savez(str(folder / "weights.npz"), **weights)
    else:
        mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "mlx"})
    (folder / "config.json").write_text(json.dumps(config))
    write_sentencepiece(folder / "tokenizer.model")
    return folder


def write_sentencepiece(path: Path, *, vocab_size: int = 400) -> Path:
    """Train a byte-fallback SentencePiece BPE model as Llama's is set up; returns the file."""
    from sentencepiece import SentencePieceTrainer

    written = io.BytesIO()
    SentencePieceTrainer.Train(
        sentence_iterator=iter(TEXTS * 20),
        model_writer=written,
        model_type="bpe",
        vocab_size=vocab_size,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        hard_vocab_limit=False,
        character_coverage=0.99,
        minloglevel=2,
    )
    path.write_bytes(written.getvalue())
    return path


def write_hugging_face_tokenizer(
    folder: Path, *, special_tokens: Sequence[str] = ("<|end|>",)
) -> Path:
    """Train a byte-level BPE tokenizer like GPT-2's, where id 0 ends texts; returns the folder."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=list(special_tokens),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|end|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def write_rows(folder: Path, **splits: list[str]) -> Path:
    """Write `{"text": ...}` rows as NAME.jsonl for each split; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, texts in splits.items():
        lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    return folder
