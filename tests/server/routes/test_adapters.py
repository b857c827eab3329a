"""Adapters by each interface's own means, and files from one folder only."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from graft.pretrained.load import load_model

import pytest

from support.live_server import PROMPT, Live, serve, write_adapter
from support.tiny import write_model


@pytest.fixture
def live(tmp_path: Path) -> Iterator[Live]:
    settings = {"max_adapters": 3, "max_rank": 16}
    with serve(tmp_path, allow_load=True, engine_settings=settings) as live:
        assert live.folder is not None
        shutil.copytree(live.folder / "large", live.folder / "another")
        yield live


def load(live: Live, name: Any, path: Any, **more: Any) -> tuple[int, Any]:
    return live.post("/v1/load_lora_adapter", {"lora_name": name, "lora_path": path, **more})


def unload(live: Live, name: Any, query: str = "") -> tuple[int, Any]:
    return live.post(f"/v1/unload_lora_adapter{query}", {"lora_name": name})


def names(live: Live) -> list[str]:
    return [info.name for info in live.engine.adapters()]


def text(live: Live, **more: Any) -> str:
    body = {"prompt": PROMPT, "max_tokens": 8, "temperature": 0, **more}
    status, content = live.post("/v1/completions", body)
    assert status == 200, content
    found: str = content["choices"][0]["text"]
    return found


def solo(live: Live, **adapters: float) -> str:
    return live.engine.generate(PROMPT, adapters=adapters, max_tokens=8).text


# vLLM


def test_vllm_s_routes_load_replace_and_unload(live: Live) -> None:
    assert load(live, "third", "another") == (
        200,
        "Success: LoRA adapter 'third' added successfully.",
    )
    assert names(live) == ["small", "large", "third"]
    assert text(live, model="third") == solo(live, large=1.0)
    assert load(live, "third", "small", load_inplace=True)[0] == 200
    assert text(live, model="third") == solo(live, small=1.0)
    assert unload(live, "third") == (
        200,
        "Success: LoRA adapter 'third' removed successfully.",
    )
    assert names(live) == ["small", "large"]


def test_vllm_s_fields_must_be_there(live: Live) -> None:
    for body in ({}, {"lora_name": "x"}, {"lora_path": "another"}, {"lora_name": ""}):
        status, content = live.post("/v1/load_lora_adapter", body)
        assert status == 400
        assert content["error"] == {
            "message": "Both 'lora_name' and 'lora_path' must be provided.",
            "type": "InvalidUserInput",
            "param": None,
            "code": 400,
        }
    status, content = live.post("/v1/unload_lora_adapter", {})
    assert (status, content["error"]["type"]) == (400, "InvalidUserInput")
    assert content["error"]["message"] == (
        "'lora_name' needs to be provided to unload a LoRA adapter."
    )


def test_vllm_s_fields_are_checked_together(live: Live) -> None:
    status, content = load(live, 5, ["x"], load_inplace="yes")
    assert status == 400
    assert content["error"]["message"] == (
        "lora_name is 5: it must be a string that is not empty; "
        'lora_path is ["x"]: it must be a string that is not empty; '
        'load_inplace is "yes": it must be true or false'
    )


def test_a_name_that_is_loaded_is_refused(live: Live) -> None:
    status, content = load(live, "small", "another")
    assert (status, content["error"]["code"]) == (400, 400)
    assert content["error"]["type"] == "InvalidUserInput"
    assert "small" in content["error"]["message"]


def test_the_base_s_name_is_no_adapter_s(live: Live) -> None:
    status, content = load(live, "tiny", "another")
    assert (status, content["error"]["param"]) == (400, "lora_name")


def test_a_path_that_is_not_there_is_not_found(live: Live) -> None:
    status, content = load(live, "third", "missing")
    assert status == 404
    assert content["error"] == {
        "message": "there is no adapter at 'missing'",
        "type": "NotFoundError",
        "param": None,
        "code": 404,
    }


def test_an_adapter_that_is_not_loaded_cannot_be_unloaded(live: Live) -> None:
    status, content = unload(live, "third")
    assert (status, content["error"]["type"], content["error"]["code"]) == (
        404,
        "NotFoundError",
        404,
    )
    assert "third" in content["error"]["message"]


def test_more_adapters_than_there_is_room_for_are_refused(live: Live) -> None:
    assert load(live, "third", "another")[0] == 200
    status, content = load(live, "fourth", "another")
    assert (status, content["error"]["type"], content["error"]["code"]) == (
        409,
        "ConflictError",
        409,
    )
    assert "3" in content["error"]["message"]


def test_a_rank_above_the_limit_is_refused(live: Live, tmp_path: Path) -> None:
    assert live.folder is not None
    model, _, _ = load_model(write_model(tmp_path / "same"))
    write_adapter(live.folder / "huge", model, "q_proj", 17, 5)
    status, content = load(live, "huge", "huge")
    assert (status, content["error"]["type"]) == (400, "InvalidUserInput")
    assert "17" in content["error"]["message"] and "16" in content["error"]["message"]
    assert names(live) == ["small", "large"]


def test_an_adapter_of_another_base_is_refused(live: Live, tmp_path: Path) -> None:
    from support.tiny import LLAMA

    assert live.folder is not None
    other = {**LLAMA, "hidden_size": 32}
    model, _, _ = load_model(write_model(tmp_path / "other", other))
    write_adapter(live.folder / "other", model, "q_proj", 2, 5)
    status, content = load(live, "other", "other")
    assert (status, content["error"]["type"]) == (400, "InvalidUserInput")
    assert "q_proj" in content["error"]["message"]


def test_a_damaged_file_is_refused(live: Live) -> None:
    assert live.folder is not None
    file = live.folder / "another" / "adapters.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    assert load(live, "third", "another")[0] == 400
    assert names(live) == ["small", "large"]


def test_a_busy_adapter_is_not_unloaded_but_can_be_waited_for(live: Live) -> None:
    long = {"prompt": PROMPT, "model": "small", "max_tokens": 300, "temperature": 0}
    connection = live.connect("/v1/completions", long)
    live.wait_until(lambda: live.engine.stats().running == 1)
    status, content = unload(live, "small")
    assert (status, content["error"]["type"], content["error"]["code"]) == (
        409,
        "ConflictError",
        409,
    )
    assert unload(live, "small", "?wait=true")[0] == 200
    assert live.engine.stats().running == 0
    assert b"200 OK" in connection.recv(4096)
    connection.close()
    assert names(live) == ["large"]


def test_wait_is_true_or_false(live: Live) -> None:
    status, content = unload(live, "small", "?wait=perhaps")
    assert (status, content["error"]["param"]) == (400, "wait")


# Where files may be


def test_loading_is_off_unless_the_operator_allows_it(tmp_path: Path) -> None:
    with serve(tmp_path) as live:
        for status, content in (load(live, "third", "small"), unload(live, "small")):
            assert status == 403
            assert content["error"]["type"] == "PermissionDeniedError"
            assert "--allow-load" in content["error"]["message"]
        assert names(live) == ["small", "large"]


@pytest.mark.parametrize("way", ["relative", "absolute", "link", "linked file", "linked record"])
def test_nothing_outside_the_folder_is_read(live: Live, tmp_path: Path, way: str) -> None:
    folder = live.folder
    assert folder is not None
    outside = shutil.copytree(folder / "another", tmp_path / "outside")
    path = {"relative": "../outside", "absolute": str(outside)}.get(way, "sly")
    if way == "link":
        (folder / "sly").symlink_to(outside)
    elif way.startswith("linked"):
        shutil.copytree(outside, folder / "sly")
        name = "adapters.safetensors" if way == "linked file" else "adapter_config.json"
        (folder / "sly" / name).unlink()
        (folder / "sly" / name).symlink_to(outside / name)
    status, content = load(live, "third", path)
    assert status == 403
    assert content["error"] == {
        "message": f"{path!r} is not inside the adapters folder",
        "type": "PermissionDeniedError",
        "param": None,
        "code": 403,
    }


@pytest.mark.parametrize("path", ["a\0b", "x" * 5000, "loop"])
def test_a_path_that_is_none_is_refused(live: Live, path: str) -> None:
    assert live.folder is not None
    (live.folder / "loop").symlink_to(live.folder / "loop")
    status, content = load(live, "third", path)
    assert status in (400, 403, 404)
    assert content["error"]["code"] == status


def test_an_absolute_path_below_the_folder_is_fine(live: Live) -> None:
    assert load(live, "third", str(live.folder / "another"))[0] == 200  # type: ignore[operator]


def test_a_link_within_the_folder_is_fine(live: Live) -> None:
    assert live.folder is not None
    (live.folder / "latest").symlink_to(live.folder / "another")
    assert load(live, "third", "latest")[0] == 200


# llama.cpp


def test_llama_cpp_s_scales_hold_for_requests_that_name_no_adapter(live: Live) -> None:
    assert live.get("/lora-adapters") == (
        200,
        [
            {"id": 0, "name": "small", "path": "small", "scale": 0.0},
            {"id": 1, "name": "large", "path": "large", "scale": 0.0},
        ],
    )
    base = text(live)
    assert base == solo(live)
    assert live.post("/lora-adapters", [{"id": 1, "scale": 0.5}]) == (200, {"success": True})
    assert live.get("/lora-adapters")[1][1]["scale"] == 0.5
    assert text(live) == solo(live, large=0.5) != base
    assert text(live, model="tiny") == base
    assert text(live, lora=[]) == base
    assert text(live, lora=[{"id": 0, "scale": -1}]) == solo(live, small=-1.0)
    assert text(live, model="small") == solo(live, small=1.0)
    assert live.post("/lora-adapters", []) == (200, {"success": True})
    assert text(live) == base


def test_an_adapter_that_is_unloaded_takes_its_scale_along(live: Live) -> None:
    live.post("/lora-adapters", [{"id": 0, "scale": 1}])
    assert unload(live, "small")[0] == 200
    assert load(live, "small", "another")[0] == 200
    assert live.get("/lora-adapters")[1][0] == {
        "id": 0,
        "name": "small",
        "path": "another",
        "scale": 0.0,
    }


@pytest.mark.parametrize("body, message", [({"id": 0}, "Request body must be an array")])
def test_llama_cpp_s_body_is_an_array(live: Live, body: Any, message: str) -> None:
    assert live.post("/lora-adapters", body) == (
        400,
        {"error": {"code": 400, "message": message, "type": "invalid_request_error"}},
    )


def test_llama_cpp_s_array_holds_ids_and_scales(live: Live) -> None:
    status, content = live.post("/lora-adapters", [{"id": "0"}])
    assert status == 400
    assert content["error"]["message"].startswith('the body must be a list like [{"id": 0, ')


def test_an_unknown_id_is_not_found(live: Live) -> None:
    message = "there is no adapter 7, 9; loaded: 0 (small), 1 (large)"
    unknown = [{"id": 9, "scale": 1}, {"id": 7, "scale": 1}, {"id": 0, "scale": 1}]
    assert live.post("/lora-adapters", unknown) == (
        404,
        {"error": {"code": 404, "message": message, "type": "not_found_error"}},
    )
    assert live.get("/lora-adapters")[1][0]["scale"] == 0.0
    status, content = live.post("/v1/completions", {"prompt": PROMPT, "lora": unknown})
    assert status == 404
    assert content["error"] == {
        "message": message,
        "type": "invalid_request_error",
        "param": "lora",
        "code": "model_not_found",
    }


# mlx-lm, and by names


def test_mlx_lm_s_path_means_the_adapter_that_was_loaded_from_there(live: Live) -> None:
    assert text(live, adapters="large") == solo(live, large=1.0)
    assert load(live, "third", "another")[0] == 200
    assert text(live, adapters="another") == solo(live, large=1.0)
    assert text(live, adapters="another/adapters.safetensors") == solo(live, large=1.0)


@pytest.mark.parametrize(
    "adapters, status",
    [
        ("missing", 404),
        ("another", 404),
        (".", 404),
        ("../model", 403),
        ({"small": 1, "none": 1}, 404),
    ],
)
def test_a_path_or_name_that_is_not_loaded_is_no_base_answer(
    live: Live, adapters: Any, status: int
) -> None:
    body = {"prompt": PROMPT, "adapters": adapters}
    found, content = live.post("/v1/completions", body)
    assert found == status
    assert content["error"]["type"] == "invalid_request_error"


def test_names_carry_scales(live: Live) -> None:
    both = {"small": 0.5, "large": -0.5}
    assert text(live, adapters=both) == solo(live, **both)
    assert text(live, adapters={}) == text(live, adapters={"large": 0}) == solo(live)


def test_an_adapter_is_told_one_way(live: Live) -> None:
    body = {"prompt": PROMPT, "model": "small", "lora": [], "adapters": {}}
    status, content = live.post("/v1/completions", body)
    assert status == 400
    assert content["error"]["message"] == (
        "model and lora and adapters name adapters: use only one of them"
    )
