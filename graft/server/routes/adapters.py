"""Which adapters a request means, and the routes that load, unload, list and scale them.

OpenAI's and vLLM's clients tell an adapter by the name in `model`, llama.cpp's by ids in `lora` and
by scales that hold for all requests, mlx-lm's by a path in `adapters`. Files are read only below
the adapters folder, wherever links lead.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from graft.adapters.files import RECORD_NAME
from graft.adapters.formats import find_file
from graft.engine.registry import AdapterInfo
from graft.errors import InputError
from graft.server.errors import HttpError
from graft.server.requests import (
    BOOLEAN,
    LORA,
    NAME,
    GenerationRequest,
    checked,
    is_lora,
)
from graft.server.service import Service, read_json, service_of

from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response

LOAD = {"lora_name": NAME, "lora_path": NAME, "load_inplace": BOOLEAN}
UNLOAD = {"lora_name": NAME}
IDLE_FIELDS = ("lora_int_id",)  # vLLM's clients send it; ids are given out here
LONGEST_NAME = 200


def chosen_adapters(service: Service, request: GenerationRequest) -> dict[str, float]:
    """The scale of each adapter that a request is to be answered with, by name.

    Raises:
        HttpError: a name, id or path means no loaded adapter, or the request tells adapters in
            several ways.
    """
    named = request.model not in (None, service.settings.model)
    loaded = service.engine.adapters()
    if named and request.model not in {adapter.name for adapter in loaded}:
        raise _no_model(str(request.model))
    told = {"model": named, "lora": request.lora is not None}
    told["adapters"] = request.adapters is not None
    ways = [way for way, used in told.items() if used]
    if len(ways) > 1:
        message = f"{' and '.join(ways)} tell adapters: use one of them"
        raise HttpError(400, message, param=ways[1])
    if named:
        return {str(request.model): 1.0}
    if request.lora is not None:
        return _by_id(loaded, request.lora)
    if request.adapters is not None:
        return _by_name_or_path(service, loaded, request.adapters)
    names = {adapter.name for adapter in loaded}
    return {name: scale for name, scale in service.scales.items() if name in names}


def contained_path(service: Service, path: str) -> Path:
    """The place that a client's path means, which must be below the adapters folder.

    Args:
        service: with the folder.
        path: from the folder, or absolute.

    Raises:
        HttpError: 403, it is elsewhere, or a file in it is; 404, it is not there.
    """
    root = service.settings.adapters_folder
    if root is None:
        raise HttpError(403, "the server was started without --adapters: it loads from nowhere")
    outside = HttpError(403, f"{path!r} is not below the adapters folder", code="outside_folder")
    try:
        place = (root / path).resolve()
        if not place.is_relative_to(root):
            raise outside
        if not place.exists():
            raise HttpError(404, f"there is no adapter at {path!r}", code="model_not_found")
        files = place.iterdir() if place.is_dir() else [place.with_name(RECORD_NAME)]
        if not all(file.resolve().is_relative_to(root) for file in files):
            raise outside
    # A zero byte, a name that is too long, a loop of links.
    except (ValueError, OSError, RuntimeError) as error:
        raise HttpError(400, f"{path!r} is no path: {error}", param="lora_path") from None
    return place


def shown_path(service: Service, info: AdapterInfo) -> str:
    """An adapter's path as clients may tell it: from the adapters folder where it is below."""
    root, path = service.settings.adapters_folder, Path(info.path)
    below = root is not None and path.is_relative_to(root)
    return path.relative_to(root).as_posix() if below and root is not None else str(path)


async def load_lora_adapter(request: Request) -> Response:
    """POST /v1/load_lora_adapter, vLLM's: load an adapter, or replace one."""
    service = service_of(request)
    _check_allowed(service)
    body = _without_idle(await read_json(request))
    if isinstance(body, dict) and not (body.get("lora_name") and body.get("lora_path")):
        raise HttpError(400, "Both 'lora_name' and 'lora_path' must be provided.")
    given = checked(body, LOAD, required=("lora_name", "lora_path"))
    name, replace = given["lora_name"], given.get("load_inplace", False)
    _check_name(service, name)
    path = contained_path(service, given["lora_path"])
    await service.change_adapters(lambda: service.engine.load_adapter(name, path, replace=replace))
    return PlainTextResponse(f"Success: LoRA adapter '{name}' added successfully.")


async def unload_lora_adapter(request: Request) -> Response:
    """POST /v1/unload_lora_adapter, vLLM's; `?wait=true` waits for requests that use it."""
    service = service_of(request)
    _check_allowed(service)
    body = _without_idle(await read_json(request))
    if isinstance(body, dict) and not body.get("lora_name"):
        raise HttpError(400, "'lora_name' needs to be provided to unload a LoRA adapter.")
    name = checked(body, UNLOAD, required=("lora_name",))["lora_name"]
    wait = request.query_params.get("wait", "false")
    if wait not in ("true", "false"):
        raise HttpError(400, f"wait is {wait!r}: it must be true or false", param="wait")
    seconds = service.settings.timeout_seconds
    await service.change_adapters(
        lambda: service.engine.unload_adapter(name, wait=wait == "true", timeout=seconds)
    )
    service.scales.pop(name, None)
    return PlainTextResponse(f"Success: LoRA adapter '{name}' removed successfully.")


async def list_lora_adapters(request: Request) -> Response:
    """GET /lora-adapters, llama.cpp's: ids, paths and the scales for requests that name none."""
    service = service_of(request)
    return JSONResponse(
        [
            {
                "id": info.id,
                "name": info.name,
                "path": shown_path(service, info),
                "scale": service.scales.get(info.name, 0.0),
            }
            for info in service.engine.adapters()
        ]
    )


async def scale_lora_adapters(request: Request) -> Response:
    """POST /lora-adapters, llama.cpp's: the scales from now on; adapters left out get 0."""
    service = service_of(request)
    body = await read_json(request)
    if not isinstance(body, list):
        raise HttpError(400, "Request body must be an array")
    if not is_lora(body):
        raise HttpError(400, f"the body must be {LORA.allowed}")
    chosen = [(one["id"], float(one.get("scale", 1.0))) for one in body]
    service.scales = _by_id(service.engine.adapters(), chosen)
    return JSONResponse({"success": True})


def _check_allowed(service: Service) -> None:
    if not service.settings.allow_load:
        raise HttpError(
            403,
            "adapters cannot be loaded or unloaded: the server was started without --allow-load",
        )


def _check_name(service: Service, name: str) -> None:
    if name == service.settings.model:
        raise HttpError(400, f"{name!r} is the base model's name", param="lora_name")
    if len(name) > LONGEST_NAME or not name.isprintable():
        raise HttpError(
            400,
            f"lora_name must be printable and at most {LONGEST_NAME} characters",
            param="lora_name",
        )


def _without_idle(body: Any) -> Any:
    if not isinstance(body, dict):
        return body
    return {name: value for name, value in body.items() if name not in IDLE_FIELDS}


def _no_model(name: str) -> HttpError:
    message = f"The model `{name}` does not exist."
    return HttpError(404, message, param="model", code="model_not_found")


def _by_id(loaded: list[AdapterInfo], chosen: list[tuple[int, float]]) -> dict[str, float]:
    """Scales by name from scales by id; where an id comes twice, the last counts."""
    names = {info.id: info.name for info in loaded}
    unknown = sorted({number for number, _ in chosen if number not in names})
    if unknown:
        told = ", ".join(map(str, unknown))
        there = ", ".join(f"{number} ({name})" for number, name in names.items()) or "none"
        message = f"there is no adapter {told}: loaded are {there}"
        raise HttpError(404, message, param="lora", code="model_not_found")
    return {names[number]: scale for number, scale in chosen}


def _by_name_or_path(
    service: Service, loaded: list[AdapterInfo], told: str | Mapping[str, float]
) -> dict[str, float]:
    names = {info.name for info in loaded}
    if not isinstance(told, str):
        unknown = [name for name in told if name not in names]
        if unknown:
            message = f"there is no adapter {', '.join(unknown)}: loaded are {_listed(names)}"
            raise HttpError(404, message, param="adapters", code="model_not_found")
        return {name: float(scale) for name, scale in told.items()}
    if told in names:
        return {told: 1.0}
    file = _file_of(contained_path(service, told))
    for info in loaded:
        if file == _file_of(Path(info.path).resolve()):
            return {info.name: 1.0}
    message = f"the adapter at {told!r} is not loaded: loaded are {_listed(names)}"
    raise HttpError(404, message, param="adapters", code="model_not_found")


def _file_of(place: Path) -> Path:
    """The file with the tensors, whether it was named itself or by its folder."""
    try:
        return find_file(place)
    except InputError:
        return place


def _listed(names: set[str]) -> str:
    return ", ".join(sorted(names)) or "none"
