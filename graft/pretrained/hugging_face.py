"""Hugging Face's layout: config.json, and weights in one file or in shards.

Tensors keep the names that they have in the files.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from graft.errors import InputError
from graft.storage.json_file import read_json_file
from graft.storage.lazy_tensors import LazyTensor
from graft.storage.npz import open_npz
from graft.storage.safetensors import open_safetensors
from graft.storage.torch_file import open_torch_file

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
# Architectures that mlx-lm does not build without this setting, which may be null.
_NEED_ROPE_SCALING = ("exaone4", "glm4_moe")


def open_hugging_face_folder(folder: Path) -> tuple[dict[str, Any], dict[str, LazyTensor]]:
    """Find the tensors of a Hugging Face folder without reading them.

    Returns:
        The configuration, and the tensors by name.

    Raises:
        InputError: files are missing or damaged, or the model needs code from its folder.
    """
    config = read_hugging_face_config(folder)
    openers = {suffix: opener for _, suffix, opener in WEIGHT_FILES}
    tensors: dict[str, LazyTensor] = {}
    for file in weight_files(folder):
        tensors |= openers[file.suffix](file)
    return config, tensors


def read_hugging_face_config(folder: Path) -> dict[str, Any]:
    """The configuration in config.json, with rotary settings under the names that mlx-lm reads.

    Raises:
        InputError: it is missing or damaged, or the model needs code from its folder.
    """
    config = with_older_names(with_rope_settings(read_json_file(folder / "config.json")))
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
    required = {"rope_scaling": None} if config.get("model_type") in _NEED_ROPE_SCALING else {}
    return required | found | config


def weight_files(folder: Path) -> list[Path]:
    """The files with the weights, of the preferred kind if there are several.

    Raises:
        InputError: there are none, or the index names files that are missing.
    """
    for stem, suffix, _ in WEIGHT_FILES:
        files = sorted(folder.glob(f"{stem}*{suffix}"))
        index = folder / f"{stem}{suffix}.index.json"
        if index.exists():
            _check_index(index, {file.name for file in files})
        if files:
            return files
    names = ", ".join(f"{stem}*{suffix}" for stem, suffix, _ in WEIGHT_FILES)
    raise InputError(f"{folder} has no weights: none of {names}")


def _check_index(index: Path, files: set[str]) -> None:
    weight_map = read_json_file(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise InputError(f"{index} has no weight_map; fetch it again")
    if missing := sorted(set(map(str, weight_map.values())) - files):
        raise InputError(f"{index.parent} lacks {', '.join(missing)}, which {index.name} names")
