"""What `graft bench` measures on: random models, a tokenizer and docstrings, the same for everyone.

Weights are random, so they serve for speed and memory and not for quality. Every model is a folder
that mlx-lm loads, and those that are not quantized transformers loads, too.
"""

import ast
import json
import random
import sysconfig
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from graft.errors import InputError
from graft.storage.atomic import new_folder

ROWS = 800
SPECIAL = ["<s>", "</s>", "<unk>"]
TOKENIZER_VOCABULARY = 8192

_SMALL = {"hidden_size": 256, "num_hidden_layers": 8, "intermediate_size": 704}
_MEDIUM = {"hidden_size": 512, "num_hidden_layers": 12, "intermediate_size": 1408}
MODELS: dict[str, dict[str, int]] = {
    "m10": _SMALL,
    "m10-q4": {**_SMALL, "bits": 4},
    "m40": _MEDIUM,
    "m40-q4": {**_MEDIUM, "bits": 4},
    "wide-vocab": {**_SMALL, "num_hidden_layers": 4, "vocab_size": 65536},
}


@dataclass(frozen=True)
class Work:
    """Something to measure.

    Attributes:
        model: one of `MODELS`.
        about: what it is, for the table.
        layers: adapted, from the top; -1 for all.
        epochs: over all rows, timed from the start of the process; 0 times steps after others.
        loss: of validation, to reach; timed from the start of the process.
        steps: after ten others; 0 is as many as a tool is worth waiting for.
        tokens: to generate, instead of training.
        requests: to a server, for several adapters, instead of training.
    """

    model: str
    about: str
    layers: int = -1
    epochs: int = 0
    loss: float = 0.0
    steps: int = 0
    tokens: int = 0
    requests: int = 0


WORKS = {
    "m10": Work("m10", "10.6 M parameters, all layers"),
    "m40": Work("m40", "46.9 M parameters, all layers"),
    "m10-q4": Work("m10-q4", "the same in 4 bits"),
    "m40-q4": Work("m40-q4", "the same in 4 bits"),
    "m40-top4": Work("m40", "top 4 of 12 layers, 5 epochs over 800 rows", layers=4, epochs=5),
    "m10-to-loss": Work("m10", "seconds to a validation loss of 7.5", loss=7.5, steps=90),
    "wide-vocab": Work("wide-vocab", "a vocabulary of 65,536"),
    "m40-q4-generation": Work("m40-q4", "256 new tokens", tokens=256),
    "serve": Work("m10", "64 requests of 32 tokens for 8 adapters", requests=64),
}


def make_materials(folder: Path, models: Iterable[str]) -> None:
    """Write `data` and the models that are named into `folder`, where they are not there yet.

    Raises:
        InputError: a package is missing that makes tokenizers.
    """
    texts = docstrings()
    _write_data(texts, folder / "data")
    missing = [name for name in dict.fromkeys(models) if not (folder / name).is_dir()]
    tokenizer = _make_tokenizer(texts) if missing else None
    for name in missing:
        with new_folder(folder / name) as temporary:
            _write_model(temporary, tokenizer, **MODELS[name])


def docstrings() -> list[str]:
    """Questions and answers from the standard library's docstrings, in a fixed order."""
    texts = []
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).rglob("*.py")):
        if "test" in path.as_posix() or "site-packages" in path.parts:
            continue
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef):
                text = ast.get_docstring(node)
                if text and len(text) > 40:
                    texts.append(f"Q: What is {node.name}?\nA: {text}")
    random.Random(0).shuffle(texts)
    return texts


def _write_data(texts: list[str], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    parts = {"train": texts[:ROWS], "valid": texts[ROWS : ROWS + 20]}
    for name, part in parts.items():
        lines = "".join(json.dumps({"text": text}) + "\n" for text in part)
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")


def _make_tokenizer(texts: list[str]) -> Any:
    try:
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
        from transformers import PreTrainedTokenizerFast
    except ImportError as error:
        raise InputError(f"the benchmark needs {error.name}, which comes with mlx-lm") from error
    pairs = Tokenizer(models.BPE())
    pairs.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    pairs.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=TOKENIZER_VOCABULARY, special_tokens=SPECIAL, show_progress=False
    )
    pairs.train_from_iterator(texts, trainer)
    start, end, unknown = SPECIAL
    return PreTrainedTokenizerFast(
        tokenizer_object=pairs, bos_token=start, eos_token=end, unk_token=unknown
    )


def _write_model(
    folder: Path,
    tokenizer: Any,
    *,
    bits: int = 0,
    vocab_size: int = TOKENIZER_VOCABULARY,
    **sizes: int,
) -> None:
    from graft.pretrained.load import build_model

    import mlx.core as mx
    import mlx.nn as nn
    from mlx.utils import tree_flatten

    config: dict[str, Any] = {
        **{"architectures": ["LlamaForCausalLM"], "model_type": "llama", **sizes},
        **{"num_attention_heads": 8, "num_key_value_heads": 8, "rms_norm_eps": 1e-5},
        **{"vocab_size": vocab_size, "rope_theta": 10000.0, "tie_word_embeddings": False},
        **{"max_position_embeddings": 4096, "torch_dtype": "float32"},
        **{"bos_token_id": 0, "eos_token_id": 1},
    }
    mx.random.seed(0)
    model = build_model(config)
    if bits:
        nn.quantize(model, group_size=64, bits=bits)
        config["quantization"] = {"group_size": 64, "bits": bits}
    weights = dict(tree_flatten(model.parameters()))
    mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "mlx"})
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    tokenizer.save_pretrained(folder)
