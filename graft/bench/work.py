"""The benchmark's workloads: random models, a tokenizer and docstrings, the same on every machine.

Weights are random, so the models measure speed and memory, not quality. mlx-lm loads every one of
them; transformers loads those that are not quantized.
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

TRAIN_ROWS = 800
SPECIAL_TOKENS = ["<s>", "</s>", "<unk>"]
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

Figures = dict[str, float]


@dataclass(frozen=True)
class Work:
    """One workload.

    Attributes:
        model: one of `MODELS`.
        about: its description in the table.
        layers: the number of top layers to adapt; -1 for all.
        epochs: passes over all rows, timed from the start of the process; with 0, single steps are
            timed after a warm-up.
        loss: the validation loss to reach, timed from the start of the process; 0 for none.
        steps: training steps after the warm-up; 0 for each tool's own number.
        tokens: tokens to generate instead of training.
        requests: requests to a server with several adapters, instead of training.
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
    """Write `data` and the named models into `folder`; models that exist are kept.

    Raises:
        InputError: the packages that train a tokenizer are not installed.
    """
    texts = stdlib_docstrings()
    _write_data(texts, folder / "data")
    missing = [name for name in dict.fromkeys(models) if not (folder / name).is_dir()]
    tokenizer = _make_tokenizer(texts) if missing else None
    for name in missing:
        with new_folder(folder / name) as temporary:
            _write_model(temporary, tokenizer, **MODELS[name])


def stdlib_docstrings() -> list[str]:
    """Questions and answers from the docstrings of the standard library, in a fixed order."""
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
    splits = {"train": texts[:TRAIN_ROWS], "valid": texts[TRAIN_ROWS : TRAIN_ROWS + 20]}
    for name, rows in splits.items():
        lines = "".join(json.dumps({"text": text}) + "\n" for text in rows)
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
        vocab_size=TOKENIZER_VOCABULARY, special_tokens=SPECIAL_TOKENS, show_progress=False
    )
    pairs.train_from_iterator(texts, trainer)
    start, end, unknown = SPECIAL_TOKENS
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
