"""Hugging Face's layout: config.json, and weights in one file or in shards.

Tensors keep the names that they have in the files.
"""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from graft.errors import InputError
from graft.pretrained.module_paths import collapsed
from graft.storage.float8 import with_decoded_floats
from graft.storage.json_file import read_json_file
from graft.storage.lazy_tensors import LazyTensor
from graft.storage.npz import open_npz
from graft.storage.safetensors import open_safetensors
from graft.storage.torch_file import open_torch_file

_Tensor = TypeVar("_Tensor")
Opener = Callable[[Path], Mapping[str, LazyTensor]]

# Names of weight files and what opens them, in order of preference.
WEIGHT_FILES: tuple[tuple[str, str, Opener], ...] = (
    ("model", ".safetensors", open_safetensors),
    ("weights", ".npz", open_npz),
    ("pytorch_model", ".bin", open_torch_file),
)

# By architecture, from the name that mlx-lm reads to the one that transformers 5 writes.
_OLDER_NAMES = {
    "gpt2": {"n_ctx": "n_positions"},
    "gpt_neox": {"rotary_emb_base": "rope_theta", "rotary_pct": "partial_rotary_factor"},
    "mellum": {"num_experts": "num_local_experts"},
    "qwen3_moe": {"num_experts": "num_local_experts"},
}
# Settings without which mlx-lm does not build an architecture, and which may be null.
_REQUIRED = {
    "exaone4": "rope_scaling",
    "glm4_moe": "rope_scaling",
    "mamba2": "intermediate_size",  # computed from the heads
}


def open_hugging_face_folder(folder: Path) -> tuple[dict[str, Any], dict[str, LazyTensor]]:
    """Find the tensors of a Hugging Face folder without reading them.

    Returns:
        The configuration, and the tensors by name.

    Raises:
        InputError: files are missing or damaged, or the model needs code from its folder.
    """
    config = read_hugging_face_config(folder)
    openers = {suffix: opener for _, suffix, opener in WEIGHT_FILES}
    files = {file: openers[file.suffix](file) for file in weight_files(folder)}
    return config, with_decoded_floats(in_one(files))


def read_hugging_face_config(folder: Path) -> dict[str, Any]:
    """The configuration in config.json, with rotary settings under the names that mlx-lm reads.

    Raises:
        InputError: it is missing or damaged, or the model needs code from its folder.
    """
    saved: dict[str, Any] = _with_decoded_numbers(read_json_file(folder / "config.json"))
    config = with_yarn_scale(with_older_names(with_rope_settings(saved)))
    if "model_file" in config:
        raise InputError(
            f"{folder}/config.json needs {config['model_file']} to be run, which Graft does not do"
        )
    return config


def with_rope_settings(config: dict[str, Any]) -> dict[str, Any]:
    """Copy the `rope_parameters` of transformers 5 to the names of transformers 4.

    Most architectures of mlx-lm read only the old names, and use their default if they are missing.

    Returns:
        The configuration with `rope_theta`, `rope_scaling` and so on, unless it has them already.
    """
    if isinstance(nested := config.get("text_config"), dict):
        config = config | {"text_config": with_rope_settings(nested)}
    parameters = config.get("rope_parameters")
    if not isinstance(parameters, dict):
        return config
    # If layers of two kinds alternate, each kind has its settings.
    full, sliding = (parameters.get(f"{kind}_attention") for kind in ("full", "sliding"))
    full = full if isinstance(full, dict) else parameters
    sliding = sliding if isinstance(sliding, dict) else {}
    flat = {name: full.get(name) for name in ("rope_theta", "partial_rotary_factor")}
    flat["rope_local_base_freq"] = sliding.get("rope_theta")
    if full.get("rope_type", "default") != "default":
        flat["rope_scaling"] = {name: full[name] for name in full if name not in flat}
    known = {name for name, value in config.items() if value is not None}
    return config | {n: v for n, v in flat.items() if v is not None and n not in known}


def with_older_names(config: dict[str, Any]) -> dict[str, Any]:
    """Add settings that mlx-lm reads under names that transformers 5 does not write."""
    names = _OLDER_NAMES.get(str(config.get("model_type")), {})
    found = {older: config[name] for older, name in names.items() if config.get(name) is not None}
    required = _REQUIRED.get(str(config.get("model_type")))
    return ({required: None} if required else {}) | found | config


def with_yarn_scale(config: dict[str, Any]) -> dict[str, Any]:
    """Give YaRN's `attention_factor` as the `mscale` that comes to the same in mlx-lm.

    mlx-lm reads no `attention_factor`: it scales by y(mscale) / y(mscale_all_dim), with
    y(m) = 0.1 m ln(factor) + 1 (Peng et al. 2023, section 3.4).
    """
    config = dict(config)
    for name in ("text_config", "rope_parameters", "full_attention", "rope_scaling"):
        if isinstance(nested := config.get(name), dict):
            config[name] = with_yarn_scale(nested)
    kind = config.get("rope_type", config.get("type"))
    numbers: list[Any] = [config.get(name) for name in ("attention_factor", "factor")]
    numbers.append(config.get("mscale_all_dim", 0))
    if kind == "yarn" and all(type(n) in (int, float) for n in numbers) and numbers[1] > 1:
        wanted, factor, below = numbers
        slope = 0.1 * math.log(factor)
        config["mscale"] = (wanted * (slope * below + 1) - 1) / slope
    return config


def _with_decoded_numbers(value: Any) -> Any:
    """The value with numbers where transformers 5 writes {"__float__": "Infinity"}."""
    if isinstance(value, list):
        return [_with_decoded_numbers(item) for item in value]
    if not isinstance(value, dict):
        return value
    if value.keys() == {"__float__"} and value["__float__"] in ("Infinity", "-Infinity", "NaN"):
        return float(value["__float__"])
    return {name: _with_decoded_numbers(item) for name, item in value.items()}


def weight_files(folder: Path) -> list[Path]:
    """The files with the weights, of the preferred kind if there are several.

    An index says which files count; what else lies beside them may be of another model.

    Raises:
        InputError: there are none, or the index names files that are missing.
    """
    for stem, suffix, _ in WEIGHT_FILES:
        files = sorted(folder.glob(f"{stem}*{suffix}"))
        index = folder / f"{stem}{suffix}.index.json"
        if index.exists():
            named = set(_weight_map(index).values())
            if missing := sorted(named - {file.name for file in files}):
                raise InputError(f"{folder} lacks {', '.join(missing)}, which {index.name} names")
            files = [file for file in files if file.name in named]
        if files:
            return files
    names = ", ".join(f"{stem}*{suffix}" for stem, suffix, _ in WEIGHT_FILES)
    raise InputError(f"{folder} has no weights: none of {names}")


def in_one(files: Mapping[Path, Mapping[str, _Tensor]]) -> dict[str, _Tensor]:
    """The tensors of a checkpoint's files; where an index names one file, the tensor in that one.

    Args:
        files: the tensors by name, of each of `weight_files`.

    Raises:
        InputError: a tensor is in several files, or not in the one that the index names.
    """
    index = _index_of(next(iter(files)))
    owners = _weight_map(index) if index.exists() else {}
    tensors: dict[str, _Tensor] = {}
    twice: list[str] = []
    for file, held in files.items():
        mine = {name: t for name, t in held.items() if owners.get(name, file.name) == file.name}
        twice += [name for name in mine if name in tensors]
        tensors |= mine
    if twice:
        raise InputError(
            f"{index.parent} has these in several files: {', '.join(collapsed(twice))}"
        )
    if missing := [name for name in owners if name not in tensors]:
        raise InputError(
            f"{index} names files that do not hold these: {', '.join(collapsed(missing))}"
        )
    return tensors


def _index_of(file: Path) -> Path:
    """The index of the shards that a file is one of."""
    stem = next(stem for stem, suffix, _ in WEIGHT_FILES if suffix == file.suffix)
    return file.with_name(f"{stem}{file.suffix}.index.json")


def _weight_map(index: Path) -> dict[str, str]:
    """From the names of tensors to the names of the files that hold them."""
    weight_map = read_json_file(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise InputError(f"{index} has no weight_map; fetch it again")
    return {name: str(file) for name, file in weight_map.items()}
