"""Finds the adapters that a request asks for, by name, id or path.

OpenAI's and vLLM's clients name an adapter in `model`, llama.cpp's give ids in `lora` or set scales
for all requests, mlx-lm's give a path in `adapters`. Paths must be inside the adapters folder, even
after links are resolved.
"""

from collections.abc import Mapping
from pathlib import Path

from graft.adapters.formats import RECORD_NAME, find_file
from graft.engine.registry import AdapterInfo
from graft.errors import InputError
from graft.server.errors import HttpError
from graft.server.requests import GenerationRequest
from graft.server.service import Service


def chosen_adapters(service: Service, request: GenerationRequest) -> dict[str, float]:
    """The adapters that a request asks for, as scales by name.

    Raises:
        HttpError: a name, id or path is not that of a loaded adapter, or the request names adapters
            in more than one way.
    """
    named = request.model not in (None, service.settings.model)
    loaded = service.engine.adapters()
    if named and request.model not in {adapter.name for adapter in loaded}:
        raise no_such_model(str(request.model))
    used = {
        "model": named,
        "lora": request.lora is not None,
        "adapters": request.adapters is not None,
    }
    ways = [way for way, is_used in used.items() if is_used]
    if len(ways) > 1:
        message = f"{' and '.join(ways)} name adapters: use only one of them"
        raise HttpError(400, message, param=ways[1])
    if named:
        return {str(request.model): 1.0}
    if request.lora is not None:
        return scales_by_id(loaded, request.lora)
    if request.adapters is not None:
        return _by_name_or_path(service, loaded, request.adapters)
    if request.model is not None:
        return {}
    names = {adapter.name for adapter in loaded}
    return {name: scale for name, scale in service.scales.items() if name in names}


def contained_path(service: Service, path: str) -> Path:
    """Resolve a client's path, which must be inside the adapters folder.

    Args:
        service: has the folder.
        path: relative to the folder, or absolute.

    Raises:
        HttpError: 403 if the path or a file in it is outside the folder, 404 if it does not exist.
    """
    root = service.settings.adapters_folder
    if root is None:
        raise HttpError(403, "the server was started without --adapters: it cannot load any")
    outside = HttpError(403, f"{path!r} is not inside the adapters folder", code="outside_folder")
    try:
        resolved = (root / path).resolve()
        if not resolved.is_relative_to(root):
            raise outside
        if not resolved.exists():
            raise HttpError(404, f"there is no adapter at {path!r}", code="model_not_found")
        files = resolved.iterdir() if resolved.is_dir() else [resolved.with_name(RECORD_NAME)]
        if not all(file.resolve().is_relative_to(root) for file in files):
            raise outside
    # A zero byte, a name that is too long, a loop of links.
    except (ValueError, OSError, RuntimeError) as error:
        raise HttpError(400, f"{path!r} is not a valid path: {error}", param="lora_path") from None
    return resolved


def shown_path(service: Service, info: AdapterInfo) -> str:
    """An adapter's path for clients: relative to the adapters folder if it is inside."""
    root, path = service.settings.adapters_folder, Path(info.path)
    if root is None or not path.is_relative_to(root):
        return str(path)
    return path.relative_to(root).as_posix()


def no_such_model(name: str) -> HttpError:
    """The error for a model name that is neither the base model nor a loaded adapter."""
    message = f"The model `{name}` does not exist."
    return HttpError(404, message, param="model", code="model_not_found")


def scales_by_id(loaded: list[AdapterInfo], chosen: list[tuple[int, float]]) -> dict[str, float]:
    """Scales by name from scales by id; of repeated ids the last counts.

    Raises:
        HttpError: 404, an id is not that of a loaded adapter.
    """
    names = {info.id: info.name for info in loaded}
    unknown = sorted({number for number, _ in chosen if number not in names})
    if unknown:
        missing = ", ".join(map(str, unknown))
        known = ", ".join(f"{number} ({name})" for number, name in names.items()) or "none"
        message = f"there is no adapter {missing}; loaded: {known}"
        raise HttpError(404, message, param="lora", code="model_not_found")
    return {names[number]: scale for number, scale in chosen}


def _by_name_or_path(
    service: Service, loaded: list[AdapterInfo], wanted: str | Mapping[str, float]
) -> dict[str, float]:
    names = {info.name for info in loaded}
    if not isinstance(wanted, str):
        unknown = [name for name in wanted if name not in names]
        if unknown:
            message = f"there is no adapter {', '.join(unknown)}; loaded: {_listed(names)}"
            raise HttpError(404, message, param="adapters", code="model_not_found")
        return {name: float(scale) for name, scale in wanted.items()}
    if wanted in names:
        return {wanted: 1.0}
    file = _file_of(contained_path(service, wanted))
    for info in loaded:
        if file == _file_of(Path(info.path).resolve()):
            return {info.name: 1.0}
    message = f"the adapter at {wanted!r} is not loaded; loaded: {_listed(names)}"
    raise HttpError(404, message, param="adapters", code="model_not_found")


def _file_of(path: Path) -> Path:
    """The file with the tensors, given that file or its folder."""
    try:
        return find_file(path)
    except InputError:
        return path


def _listed(names: set[str]) -> str:
    return ", ".join(sorted(names)) or "none"
