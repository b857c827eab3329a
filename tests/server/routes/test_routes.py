"""Each route is declared once, and everything else reads the declaration."""

import re
from pathlib import Path

from graft.server import routes
from graft.server.errors import LLAMA_CPP_ERRORS, OPENAI_ERRORS, VLLM_ERRORS, HttpError
from graft.server.routes import all_routes
from graft.server.routes.page import PAGE

import pytest
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from support.live_server import KEY, serve
from support.paths import ROOT

ROUTES = {(route.method, route.path): route for route in all_routes()}
PATHS = {route.path for route in ROUTES.values()}


def test_each_route_is_declared_once() -> None:
    assert len(ROUTES) == len(all_routes())


def test_errors_have_the_format_of_the_interface() -> None:
    formats = {
        "/v1/load_lora_adapter": VLLM_ERRORS,
        "/v1/unload_lora_adapter": VLLM_ERRORS,
        "/lora-adapters": LLAMA_CPP_ERRORS,
        "/health": LLAMA_CPP_ERRORS,
    }
    for route in ROUTES.values():
        assert route.errors is formats.get(route.path, OPENAI_ERRORS), route.path


def test_only_the_page_and_the_health_need_no_key() -> None:
    assert {route.path for route in ROUTES.values() if not route.needs_key} == {"/", "/health"}


def test_the_docs_name_routes_that_exist() -> None:
    page = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
    named = set(
        re.findall(r"`(?:GET |POST )?(/(?:v1/[\w/]+|lora-adapters|health|metrics))\b", page)
    )
    assert len(named) > 4 and named <= PATHS


def test_the_page_calls_routes_that_exist() -> None:
    script = (PAGE / "page.js").read_text(encoding="utf-8")
    called = set(re.findall(r'"(v1/[\w/]+)"', script))
    assert called and {f"/{path}" for path in called} <= PATHS


def test_a_route_is_one_marked_function(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routes, "_ROUTES", all_routes())

    @routes.route("GET", "/v1/toy", errors=VLLM_ERRORS)
    async def toy(request: Request) -> Response:
        return JSONResponse({"path": request.url.path})

    with serve(tmp_path, api_key=KEY, adapters={}) as live:
        status, content = live.get("/v1/toy")
        assert (status, content["error"]["type"]) == (401, "AuthenticationError")
        assert live.get("/v1/toy", Authorization=f"Bearer {KEY}") == (200, {"path": "/v1/toy"})
        counted = live.get("/metrics", Authorization=f"Bearer {KEY}")[1]
        assert 'graft_http_responses_total{path="/v1/toy",status="200"} 1' in counted


def test_a_path_may_have_parameters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Access and errors follow the declaration; metrics count such paths as `other`."""
    monkeypatch.setattr(routes, "_ROUTES", all_routes())

    @routes.route("GET", "/v1/toys/{name}", errors=VLLM_ERRORS, needs_key=False)
    async def toy(request: Request) -> Response:
        if request.path_params["name"] == "none":
            raise HttpError(404, "there is no toy")
        return JSONResponse({"toy": request.path_params["name"]})

    with serve(tmp_path, api_key=KEY, adapters={}) as live:
        assert live.get("/v1/toys/bear") == (200, {"toy": "bear"})
        assert live.get("/v1/toys/ball")[0] == 200
        status, content = live.get("/v1/toys/none")
        assert (status, content["error"]["type"]) == (404, "NotFoundError")
        counted = live.get("/metrics", Authorization=f"Bearer {KEY}")[1]
        assert 'graft_http_responses_total{path="other",status="200"} 2' in counted
