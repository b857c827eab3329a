"""Routes that load, unload, list and scale adapters, as vLLM and llama.cpp define them."""

from typing import Any

from graft.server.adapter_choice import contained_path, scales_by_id, shown_path
from graft.server.errors import LLAMA_CPP_ERRORS, VLLM_ERRORS, HttpError
from graft.server.fields import BOOLEAN, LORA, NAME, check_fields, is_lora
from graft.server.requests import lora_scales
from graft.server.routes import route
from graft.server.service import Service, read_body, service_of

from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response

LOAD = {"lora_name": NAME, "lora_path": NAME, "load_inplace": BOOLEAN}
UNLOAD = {"lora_name": NAME}
IGNORED_FIELDS = ("lora_int_id",)  # vLLM's clients send it; this server chooses the ids
LONGEST_NAME = 200


@route("POST", "/v1/load_lora_adapter", errors=VLLM_ERRORS)
async def load_lora_adapter(request: Request) -> Response:
    """Load or replace an adapter, as vLLM does."""
    service = service_of(request)
    _check_allowed(service)
    body = _without_ignored(await read_body(request))
    if isinstance(body, dict) and not (body.get("lora_name") and body.get("lora_path")):
        raise HttpError(400, "Both 'lora_name' and 'lora_path' must be provided.")
    given = check_fields(body, LOAD, required=("lora_name", "lora_path"))
    name, replace = given["lora_name"], given.get("load_inplace", False)
    _check_name(service, name)
    path = contained_path(service, given["lora_path"])
    await service.change_adapters(lambda: service.engine.load_adapter(name, path, replace=replace))
    return PlainTextResponse(f"Success: LoRA adapter '{name}' added successfully.")


@route("POST", "/v1/unload_lora_adapter", errors=VLLM_ERRORS)
async def unload_lora_adapter(request: Request) -> Response:
    """Unload an adapter, as vLLM does; `?wait=true` waits for the requests that use it."""
    service = service_of(request)
    _check_allowed(service)
    body = _without_ignored(await read_body(request))
    if isinstance(body, dict) and not body.get("lora_name"):
        raise HttpError(400, "'lora_name' needs to be provided to unload a LoRA adapter.")
    name = check_fields(body, UNLOAD, required=("lora_name",))["lora_name"]
    wait = request.query_params.get("wait", "false")
    if wait not in ("true", "false"):
        raise HttpError(400, f"wait is {wait!r}: it must be true or false", param="wait")
    seconds = service.settings.timeout_seconds
    await service.change_adapters(
        lambda: service.engine.unload_adapter(name, wait=wait == "true", timeout=seconds)
    )
    service.scales.pop(name, None)
    return PlainTextResponse(f"Success: LoRA adapter '{name}' removed successfully.")


@route("GET", "/lora-adapters", errors=LLAMA_CPP_ERRORS)
async def list_lora_adapters(request: Request) -> Response:
    """Ids, paths and default scales, as llama.cpp lists them."""
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


@route("POST", "/lora-adapters", errors=LLAMA_CPP_ERRORS)
async def scale_lora_adapters(request: Request) -> Response:
    """Set the default scales, as llama.cpp does; adapters left out get 0."""
    service = service_of(request)
    body = await read_body(request)
    if not isinstance(body, list):
        raise HttpError(400, "Request body must be an array")
    if not is_lora(body):
        raise HttpError(400, f"the body must be {LORA.allowed}")
    service.scales = scales_by_id(service.engine.adapters(), lora_scales(body))
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


def _without_ignored(body: Any) -> Any:
    if not isinstance(body, dict):
        return body
    return {name: value for name, value in body.items() if name not in IGNORED_FIELDS}
