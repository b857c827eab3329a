"""Meta's layout: params.json and tensor-parallel shards, read as mlx-lm's Llama or Mixtral.

The rows of q and k stay interleaved, as Meta stores them: the configuration sets
`rope_traditional`.

References: https://github.com/meta-llama/llama/blob/main/llama/model.py (names, and what a shard
splits), https://github.com/meta-llama/llama-models (scaled rotary embeddings),
https://github.com/mistralai/mistral-inference (experts).
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from graft.errors import InputError
from graft.pretrained.module_paths import natural_key
from graft.storage.json_file import read_json_file
from graft.storage.lazy_tensors import JoinedTensor, LazyTensor, StackedTensor
from graft.storage.safetensors import open_safetensors
from graft.storage.torch_file import open_torch_file

# Meta's name -> mlx-lm's name, and the dimension that shards split (None: all shards have it all).
_TOP_NAMES: dict[str, tuple[str, int | None]] = {
    "tok_embeddings": ("model.embed_tokens", 1),
    "norm": ("model.norm", None),
    "output": ("lm_head", 0),
}
_LAYER_NAMES: dict[str, tuple[str, int | None]] = {
    "attention_norm": ("input_layernorm", None),
    "ffn_norm": ("post_attention_layernorm", None),
    "attention.wq": ("self_attn.q_proj", 0),
    "attention.wk": ("self_attn.k_proj", 0),
    "attention.wv": ("self_attn.v_proj", 0),
    "attention.wo": ("self_attn.o_proj", 1),
    "feed_forward.w1": ("mlp.gate_proj", 0),
    "feed_forward.w2": ("mlp.down_proj", 1),
    "feed_forward.w3": ("mlp.up_proj", 0),
    "feed_forward.gate": ("block_sparse_moe.gate", None),
    "feed_forward.experts.w1": ("block_sparse_moe.switch_mlp.gate_proj", 0),
    "feed_forward.experts.w2": ("block_sparse_moe.switch_mlp.down_proj", 1),
    "feed_forward.experts.w3": ("block_sparse_moe.switch_mlp.up_proj", 0),
}
_UNUSED = {"rope.freqs"}

# The settings of params.json that are read, and their types.
_REQUIRED = ("dim", "n_layers", "n_heads")
_OPTIONAL = ("n_kv_heads", "hidden_dim", "head_dim", "vocab_size", "max_seq_len", "sliding_window")
_PARAMS: dict[str, tuple[type, ...]] = {
    **dict.fromkeys((*_REQUIRED, *_OPTIONAL), (int,)),
    **dict.fromkeys(("norm_eps", "rope_theta"), (int, float)),
    **dict.fromkeys(("rope_scaling_factor", "rope_high_freq_factor"), (int, float)),
    "moe": (dict,),
}


def open_meta_folder(folder: Path) -> tuple[dict[str, Any], dict[str, LazyTensor]]:
    """Find the tensors of a Meta folder without reading them.

    Args:
        folder: has `params.json` and one or more `consolidated.*` files.

    Returns:
        The configuration of mlx-lm's Llama or Mixtral, and the tensors under its names.

    Raises:
        InputError: files or settings are missing, or the shards do not fit together.
    """
    params = _read_params(folder / "params.json")
    tensors = _joined_tensors(shard_files(folder), params["dim"])
    head, embedding = "lm_head.weight", "model.embed_tokens.weight"
    tied = head not in tensors or tensors[head] == tensors.get(embedding)
    if tied:
        tensors.pop(head, None)
    return {**_config(params, tensors), "tie_word_embeddings": tied}, tensors


def shard_files(folder: Path) -> list[Path]:
    """The `consolidated.*` files of a Meta folder in order.

    Raises:
        InputError: there are none, or one of a series is missing.
    """
    files = sorted(folder.glob("consolidated*.pth")) or sorted(
        folder.glob("consolidated*.safetensors")
    )
    if not files:
        raise InputError(
            f"{folder} has no consolidated.*.pth; is it the folder of a Meta checkpoint?"
        )
    numbers = [int(number) for file in files for number in re.findall(r"\.(\d+)\.", file.name)]
    missing = sorted(set(range(max(numbers, default=0))) - set(numbers))
    if missing:
        names = ", ".join(f"consolidated.{number:02}{files[0].suffix}" for number in missing)
        raise InputError(f"{folder} lacks {names}; fetch all shards")
    return files


def _read_params(path: Path) -> dict[str, Any]:
    """The settings in params.json, checked for their types; settings of null are left out."""
    params = {name: value for name, value in read_json_file(path).items() if value is not None}
    problems = [f"{name} is missing" for name in _REQUIRED if name not in params]
    problems += [
        f"{name} is {params[name]!r}"
        for name, kinds in _PARAMS.items()
        if name in params and not isinstance(params[name], kinds)
    ]
    problems += [f"{name} is {params[name]}" for name in _REQUIRED if params.get(name) in (0, -1)]
    if problems:
        raise InputError(f"{path}: {', '.join(problems)}")
    return params


def _config(params: Mapping[str, Any], tensors: dict[str, LazyTensor]) -> dict[str, Any]:
    experts = params.get("moe", {})
    gate = "block_sparse_moe.switch_mlp.gate_proj" if experts else "mlp.gate_proj"
    vocabulary = params.get("vocab_size", -1)
    config = {
        "model_type": "mixtral" if experts else "llama",
        "architectures": ["MixtralForCausalLM" if experts else "LlamaForCausalLM"],
        "hidden_size": params["dim"],
        "num_hidden_layers": params["n_layers"],
        "num_attention_heads": params["n_heads"],
        "num_key_value_heads": params.get("n_kv_heads", params["n_heads"]),
        # The shapes show what `multiple_of` and `ffn_dim_multiplier` would give.
        "intermediate_size": params.get("hidden_dim")
        or _size(tensors, f"model.layers.0.{gate}.weight", -2),
        "vocab_size": vocabulary
        if vocabulary > 0
        else _size(tensors, "model.embed_tokens.weight", 0),
        "rms_norm_eps": params.get("norm_eps", 1e-5),
        "rope_theta": params.get("rope_theta", 10000.0),
        "rope_traditional": True,
    }
    optional = {
        "head_dim": params.get("head_dim"),
        "sliding_window": params.get("sliding_window"),
        "max_position_embeddings": params.get("max_seq_len"),
        "rope_scaling": _rope_scaling(params),
        "num_local_experts": experts.get("num_experts"),
        "num_experts_per_tok": experts.get("num_experts_per_tok"),
    }
    return config | {name: value for name, value in optional.items() if value is not None}


def _rope_scaling(params: Mapping[str, Any]) -> dict[str, Any] | None:
    """Llama 3.1's scaled rotary embeddings; most of their numbers are in Meta's code only."""
    if not params.get("use_scaled_rope"):
        return None
    # Llama 3.2's text models, recognized by their width, stretch the context further than 3.1.
    stretch = 32.0 if params["dim"] in (2048, 3072) else 8.0
    return {
        "rope_type": "llama3",
        "factor": float(params.get("rope_scaling_factor", stretch)),
        "low_freq_factor": 1.0,
        "high_freq_factor": float(params.get("rope_high_freq_factor", 4.0)),
        "original_max_position_embeddings": 8192,
    }


def _size(tensors: dict[str, LazyTensor], name: str, axis: int) -> int:
    if name not in tensors or len(tensors[name].shape) < 2:
        raise InputError(f"the checkpoint has no matrix {name}")
    return tensors[name].shape[axis]


def _joined_tensors(files: Sequence[Path], dim: int) -> dict[str, LazyTensor]:
    """The joined tensors of all shards under mlx-lm's names; experts of a layer are stacked."""
    shards = {
        file.name: open_safetensors(file)
        if file.suffix == ".safetensors"
        else open_torch_file(file)
        for file in files
    }
    names = sorted({name for shard in shards.values() for name in shard} - _UNUSED, key=natural_key)
    joined: dict[str, LazyTensor] = {}
    experts: dict[str, tuple[LazyTensor, ...]] = {}
    problems: list[str] = []
    for name in names:
        parts = [shard[name] for shard in shards.values() if name in shard]
        new_name, axis = _mlx_name(name, parts[0].shape, dim)
        problems += _problems(name, new_name, axis, parts, shards)
        whole = parts[0] if axis is None or len(parts) == 1 else JoinedTensor(tuple(parts), axis)
        if ".experts." in name:
            experts[new_name] = (*experts.get(new_name, ()), whole)
        else:
            joined[new_name] = whole
    problems += [
        f"the experts of {name} differ in shape"
        for name, stack in experts.items()
        if len({expert.shape for expert in stack}) > 1
    ]
    if problems:
        raise InputError(f"{files[0].parent}: {'; '.join(problems)}")
    return joined | {name: StackedTensor(parts) for name, parts in experts.items()}


def _mlx_name(name: str, shape: tuple[int, ...], dim: int) -> tuple[str, int | None]:
    """mlx-lm's name of a tensor, empty if unknown, and the dimension that shards split."""
    match = re.fullmatch(r"(layers\.\d+\.)?(.+?)(?:\.experts\.\d+(\..+))?\.(weight|bias)", name)
    if match is None:
        return "", None
    layer, module, expert, kind = match.groups()
    names = _LAYER_NAMES if layer else _TOP_NAMES
    new_name, axis = names.get(f"{module}.experts{expert}" if expert else module, ("", None))
    if module == "tok_embeddings" and shape[-1:] == (dim,):
        axis = 0  # Llama 3 splits the vocabulary, earlier models the width
    prefix = f"model.{layer}" if layer else ""
    return (f"{prefix}{new_name}.{kind}" if new_name else ""), axis


def path_from_meta(name: str) -> str:
    """mlx-lm's path of a layer that has Meta's name; any other name as it is."""
    match = re.fullmatch(r"(layers\.\d+\.)?(.+)", name)
    if match is None:
        return name
    layer, module = match.groups()
    names = _LAYER_NAMES if layer else _TOP_NAMES
    if module not in names:
        return name
    prefix = f"model.{layer}" if layer else ""
    return f"{prefix}{names[module][0]}"


def _problems(
    name: str,
    new_name: str,
    axis: int | None,
    parts: Sequence[LazyTensor],
    shards: Mapping[str, Mapping[str, LazyTensor]],
) -> list[str]:
    """Why the parts of a tensor cannot be joined."""
    if not new_name:
        return [f"{name} is not part of Meta's layout"]
    if len(parts) < len(shards):
        absent = ", ".join(file for file, shard in shards.items() if name not in shard)
        return [f"{name} is missing in {absent}"]
    # Parts have one type, and one size in all dimensions but the one along which they are joined.
    kinds = {
        (part.dtype, tuple(-1 if index == axis else n for index, n in enumerate(part.shape)))
        for part in parts
    }
    flat = len(parts) > 1 and axis is not None and len(parts[0].shape) <= axis
    if len(kinds) > 1 or flat:
        shapes = ", ".join(f"{part.shape} {part.dtype}" for part in parts)
        return [f"the parts of {name} do not fit together: {shapes}"]
    return []
