"""Model folders, here and on the Hub, of both layouts."""

from importlib import import_module
from pathlib import Path
from typing import Any

from graft.errors import InputError
from graft.pretrained.folder import (
    CONVERTIBLE,
    find_folder,
    has_hugging_face_layout,
    has_meta_layout,
    open_folder,
    read_config,
    read_folder,
)
from graft.storage.lazy_tensors import read

import huggingface_hub
import mlx.core as mx
import pytest

from support import tiny


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A Hub with one repository; what was asked of it, and what it holds."""
    asked: dict[str, Any] = {"patterns": [], "files": ["config.json", "model.safetensors"]}

    def snapshot_download(name: str, *, allow_patterns: list[str]) -> str:
        asked["patterns"].append(allow_patterns)
        folder = tmp_path / name
        folder.mkdir(parents=True, exist_ok=True)
        for file in asked["files"]:
            if any(Path(file).match(pattern) for pattern in allow_patterns):
                (folder / file).write_text("{}")
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return asked


def test_the_hub_is_asked_for_pytorch_files_only_without_safetensors(hub: dict[str, Any]) -> None:
    assert (find_folder("owner/name", weights=CONVERTIBLE) / "model.safetensors").exists()
    assert len(hub["patterns"]) == 1
    hub["files"] = ["config.json", "pytorch_model.bin"]
    assert (find_folder("owner/old", weights=CONVERTIBLE) / "pytorch_model.bin").exists()
    assert not any(".py" in pattern for patterns in hub["patterns"] for pattern in patterns)


def test_a_folder_comes_before_the_hub(
    hub: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("owner/name").mkdir(parents=True)
    assert find_folder("owner/name") == Path("owner/name")
    assert hub["patterns"] == []


@pytest.mark.parametrize(
    "name", ["./owner/name", "/owner/name", "a/b/c", "name", "~/name", "a b/c"]
)
def test_what_is_neither_a_folder_nor_a_repository_is_refused(
    hub: dict[str, Any], name: str
) -> None:
    with pytest.raises(InputError, match="there is no model folder"):
        find_folder(name)
    assert hub["patterns"] == []


def test_a_hub_that_cannot_be_reached_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match="no local folder owner/nosuch, and it") as refusal:
        find_folder("owner/nosuch")
    assert "\n" not in str(refusal.value)


def test_a_file_in_place_of_a_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "m").touch()
    with pytest.raises(InputError, match="m is a file; --model takes a folder"):
        find_folder(tmp_path / "m")


def hub_errors() -> list[Exception]:
    """What snapshot_download raises, as huggingface_hub makes it."""
    from huggingface_hub import errors

    httpx = import_module(errors.Response.__module__.split(".")[0])  # httpx or its successor
    response = httpx.Response(404, request=httpx.Request("GET", "https://hub.invalid/api"))
    return [
        errors.RepositoryNotFoundError("404 Client Error.\n\nNot Found for url", response=response),
        errors.GatedRepoError("403\n\nAccess is restricted.", response=response),
        errors.RevisionNotFoundError("404", response=response),
        errors.HfHubHTTPError("500 Server Error", response=response),
        errors.LocalEntryNotFoundError("Cannot find an appropriate cached snapshot folder."),
        errors.OfflineModeIsEnabled("Offline mode is enabled."),
        errors.HFValidationError("Repo id must use alphanumeric chars"),
        httpx.ConnectError(""),
        OSError(28, "No space left on device"),
        PermissionError(13, "Permission denied", "/cache"),
    ]


@pytest.mark.parametrize("error", hub_errors(), ids=lambda error: type(error).__name__)
def test_a_hub_name_that_cannot_be_had_is_one_line(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: Any, **settings: Any) -> None:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(InputError, match="owner/name") as refusal:
        find_folder("owner/name")
    assert "\n" not in str(refusal.value)


def test_a_hub_name_is_downloaded_weights_tokenizer_and_config(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub.utils import filter_repo_objects

    asked: dict[str, Any] = {}

    def download(name: str, **settings: Any) -> str:
        asked.update(settings, name=name)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert find_folder("owner/name") == tmp_path
    assert asked["name"] == "owner/name"
    wanted = {
        "config.json",
        "model.safetensors",
        "model-00001-of-00002.safetensors",
        "model.safetensors.index.json",
        "weights.npz",
        "tokenizer.model",
        "tokenizer.json",
        "merges.txt",
        "chat_template.jinja",
    }
    others = {"pytorch_model.bin", "consolidated.safetensors", "README.md", "model.gguf"}
    found = filter_repo_objects(sorted(wanted | others), allow_patterns=asked["allow_patterns"])
    assert set(found) == wanted


@pytest.mark.parametrize(
    ("files", "meta", "hugging_face"),
    [
        (["params.json"], True, False),
        (["config.json"], False, True),
        (["params.json", "config.json"], False, False),
        ([], False, False),
    ],
)
def test_a_layout_is_known_by_its_configuration(
    tmp_path: Path, files: list[str], meta: bool, hugging_face: bool
) -> None:
    for name in files:
        (tmp_path / name).touch()
    assert (has_meta_layout(tmp_path), has_hugging_face_layout(tmp_path)) == (meta, hugging_face)


@pytest.mark.parametrize("form", ["npz", "safetensors"])
def test_a_folder_opens_as_it_reads(tmp_path: Path, form: str) -> None:
    folder = tiny.write_model(tmp_path / "m", form=form)
    config, arrays = read_folder(folder)
    opened, tensors = open_folder(folder)
    assert config == opened == read_config(folder)
    assert arrays.keys() == tensors.keys()
    assert all(mx.array_equal(read(tensors[name]), array) for name, array in arrays.items())


def test_the_included_model_has_the_configuration_of_a_folder() -> None:
    config = read_config(find_folder(None))
    assert config["model_type"] == "llama" and config["rope_traditional"]


def test_pytorch_weights_are_to_be_converted(tmp_path: Path) -> None:
    folder = tiny.write_model(tmp_path / "m")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(InputError, match=r"convert them with `python -m graft convert --hf-path "):
        read_folder(folder)
