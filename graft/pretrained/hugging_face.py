"""Hugging Face's layout: a folder, here or on the Hub, and where in its files each tensor lies.

Knows safetensors and PyTorch files, whole or in shards. Keeps the names that stand in the files.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from graft.errors import InputError
from graft.pretrained.hub import fetch_from_hub, is_repo_name
from graft.storage.json_file import read_json
from graft.storage.lazy_tensors import LazyTensor
from graft.storage.safetensors import open_safetensors
from graft.storage.torch_file import open_torch_file

Config = dict[str, Any]
Tensors = dict[str, LazyTensor]


def open_hugging_face_folder(folder: Path) -> tuple[Config, Tensors]:
    """Find the tensors of a Hugging Face folder without reading them.

    Returns:
        What `config.json` says, and the tensors by name.

    Raises:
        InputError: files are missing or damaged, or the model asks to run code of its own.
    """
    config = with_rope_settings(read_json(folder / "config.json"))
    if "model_file" in config:
        raise InputError(f"{folder}/config.json asks to run {config['model_file']}: refused")
    tensors: Tensors = {}
    for file in weight_files(folder):
        safe = file.suffix == ".safetensors"
        tensors |= open_safetensors(file) if safe else open_torch_file(file)
    return config, tensors


def with_rope_settings(config: Config) -> Config:
    """Repeat the `rope_parameters` of transformers 5 under the names of transformers 4.

    Most of mlx-lm's classes read those alone, and without them silently take their own default.

    Returns:
        The configuration with `rope_theta`, `rope_scaling` and the like; what it has already wins.
    """
    if isinstance(nested := config.get("text_config"), dict):
        config = config | {"text_config": with_rope_settings(nested)}
    parameters = config.get("rope_parameters")
    if not isinstance(parameters, dict):
        return config
    # Where layers of two kinds alternate, each kind has settings of its own.
    full, sliding = (parameters.get(f"{kind}_attention") for kind in ("full", "sliding"))
    full = full if isinstance(full, dict) else parameters
    sliding = sliding if isinstance(sliding, dict) else {}
    flat = {name: full.get(name) for name in ("rope_theta", "partial_rotary_factor")}
    flat["rope_local_base_freq"] = sliding.get("rope_theta")
    if full.get("rope_type", "default") != "default":
        flat["rope_scaling"] = {name: full[name] for name in full if name not in flat}
    known = {name for name, value in config.items() if value is not None}
    return config | {n: v for n, v in flat.items() if v is not None and n not in known}


def find_folder(name: str, extras: Sequence[str] = ()) -> Path:
    """A folder as it is, or else what the Hub has under that name.

    Args:
        name: a folder, or owner/name on the Hub.
        extras: globs of files to fetch beside the weights and all JSON.

    Raises:
        InputError: there is neither.
    """
    folder = Path(name)
    if folder.is_dir():
        return folder
    if not is_repo_name(name):
        raise InputError(
            f"there is no folder {name}; --hf-path takes one, or owner/name on the Hub"
        )
    folder = fetch_from_hub(name, ["*.json", "model*.safetensors", *extras])
    if not any(folder.glob("model*.safetensors")):
        folder = fetch_from_hub(name, ["*.json", "pytorch_model*.bin", *extras])
    return folder


def weight_files(folder: Path) -> list[Path]:
    """The files with the weights, safetensors before PyTorch's.

    Raises:
        InputError: there are none, or the index names files that are missing.
    """
    for stem, suffix in (("model", "safetensors"), ("pytorch_model", "bin")):
        files = sorted(folder.glob(f"{stem}*.{suffix}"))
        index = folder / f"{stem}.{suffix}.index.json"
        if index.exists():
            named = read_json(index).get("weight_map")
            if not isinstance(named, dict):
                raise InputError(f"{index} has no weight_map; fetch it again")
            missing = sorted(set(map(str, named.values())) - {file.name for file in files})
            if missing:
                raise InputError(f"{folder} lacks {', '.join(missing)}, which {index.name} names")
        if files:
            return files
    raise InputError(f"{folder} has no weights: model*.safetensors or pytorch_model*.bin")
