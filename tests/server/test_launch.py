"""Who can reach the server, its name, and a long mixed load."""

from pathlib import Path

from graft.errors import InputError
from graft.pretrained.load import load_model
from graft.server.launch import check_reach, is_loopback, model_name

import pytest

from support.live_server import write_adapter
from support.soak import Soak
from support.tiny import write_model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    model, _, _ = load_model(write_model(tmp_path / "model"))
    for seed, name in enumerate(("one", "two"), 1):
        write_adapter(tmp_path / "adapters" / name, model, "q_proj", 4, seed)
    return tmp_path


@pytest.mark.parametrize(
    "host, alone",
    [
        ("127.0.0.1", True),
        ("127.8.8.8", True),
        ("::1", True),
        ("localhost", True),
        ("0.0.0.0", False),
        ("::", False),
        ("192.168.0.2", False),
        ("", False),
        ("example.org", False),
        ("localhost.example.org", False),
    ],
)
def test_only_loopback_addresses_are_this_machine_s_alone(host: str, alone: bool) -> None:
    assert is_loopback(host) is alone


def test_another_address_needs_a_key() -> None:
    with pytest.raises(InputError, match=r"--host 0\.0\.0\.0 can be reached .* --api-key KEY"):
        check_reach("0.0.0.0", None)
    check_reach("0.0.0.0", "secret")
    check_reach("127.0.0.1", None)


@pytest.mark.parametrize("key", ["", " ", "ü", "a\nb"])
def test_a_key_that_no_header_carries_is_refused(key: str) -> None:
    with pytest.raises(InputError, match="--api-key must be printable ASCII"):
        check_reach("127.0.0.1", key)


def test_the_base_is_called_after_its_folder_or_as_on_the_hub(folder: Path) -> None:
    assert model_name(None) == "sapling"
    assert model_name(f"{folder}/model/") == "model"
    assert model_name("owner/name") == "owner/name"


@pytest.mark.slow
def test_a_long_mixed_day_ends_as_it_began(tmp_path: Path) -> None:
    with Soak(tmp_path, seed=5) as soak:
        soak.work(500)
        warm = soak.memory()
        soak.work(2000)
        assert soak.problems == []
        assert soak.live.idle()
        assert soak.memory() <= warm + soak.PROMPT_CACHE_BYTES
        assert min(soak.done.values()) > 0 and len(soak.done) == len(soak.KINDS)
    assert soak.threads_left() == []
