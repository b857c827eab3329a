"""The Hub and the commands that use it, against a stand-in that the Hub's client talks to."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import graft  # noqa: F401
from graft.adapters.adapter import Adapter
from graft.adapters.files import load_adapter
from graft.adapters.formats.graft import write_adapter
from graft.adapters.layer_config import LayerConfig
from graft.pretrained.hub import is_repo_name

import mlx.core as mx
import pytest
from huggingface_hub.utils import HFValidationError, validate_repo_id

from support.hub_stand_in import Hub, running_hub
from support.paths import ROOT
from support.tiny import TEXTS, write_model, write_rows

Q = "model.layers.0.self_attn.q_proj"


@pytest.fixture
def hub() -> Iterator[Hub]:
    with running_hub() as running:
        yield running


def command(hub: Hub, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a command as a user does, with the stand-in for the Hub."""
    return subprocess.run(
        [sys.executable, "-m", "graft", *arguments],
        cwd=folder,
        env=os.environ
        | {
            "PYTHONPATH": str(ROOT),
            "HF_ENDPOINT": hub.address,
            "HF_HOME": str(folder / "hf"),
            "HF_TOKEN": "hf_secret",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_HUB_DISABLE_XET": "1",
            "NO_PROXY": "127.0.0.1",
        },
        capture_output=True,
        text=True,
    )


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A base, data and an adapter with the losses of its run."""
    write_model(tmp_path / "base", bits=4)
    write_rows(tmp_path / "data", train=TEXTS, valid=TEXTS)
    tensors = {
        f"{Q}.lora_a": 0.1 * mx.random.normal((64, 4), key=mx.random.key(0)),
        f"{Q}.lora_b": 0.1 * mx.random.normal((4, 64), key=mx.random.key(1)),
    }
    options = {"data": "data", "learning_rate": 1e-4, "seed": 0}
    adapter = Adapter(tensors, {Q: LayerConfig(4, 6.0)}, "base", options=options)
    write_adapter(tmp_path / "run" / "adapters.npz", adapter)
    rows = [{"kind": "eval", "split": "valid", "loss": loss} for loss in (3.5, 2.25)]
    (tmp_path / "run" / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return tmp_path


def write_private_files(folder: Path) -> None:
    """Files that nobody asked to publish, of the types that belong to models and adapters."""
    folder.mkdir(exist_ok=True)
    for name in ("my-notes.txt", "train.jsonl", "metrics.jsonl", "key.json", "old.npz", "a.pth"):
        (folder / name).write_text("private")


@pytest.mark.parametrize(
    ("form", "out", "files", "use"),
    [
        pytest.param(
            "mlx-lm",
            "out",
            {"adapters.safetensors", "adapter_config.json"},
            "mlx_lm.generate",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "peft",
            "out",
            {"adapter_model.safetensors", "adapter_config.json"},
            "PeftModel",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "gguf",
            "a.gguf",
            {"a.gguf"},
            "llama-cli -m base.gguf --lora a.gguf",
            marks=pytest.mark.slow,
        ),
        ("npz", "out", {"adapters.npz", "adapter_config.json"}, "--adapter-file me/mine"),
    ],
)
def test_an_exported_adapter_goes_to_the_hub_and_comes_back(
    form: str, out: str, files: set[str], use: str, hub: Hub, run: Path
) -> None:
    if form == "npz":  # the only format that is written into a folder that exists
        write_private_files(run / out)
    done = command(
        hub, run, "export", "run", "--to", form, "--out", out, "--upload-repo", "me/mine"
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert f"uploaded to {hub.address}/me/mine/commit/" in done.stdout
    assert hub.tokens == {"Bearer hf_secret"}
    stored = hub.repositories["me/mine"]
    assert stored.keys() == files | {"README.md"}
    for name in files:
        local = run / out if (run / out).is_file() else run / out / name
        assert stored[name] == local.read_bytes()
    card = stored["README.md"].decode()
    assert card.startswith("---\nlibrary_name: ")
    for told in (use, "lora, rank 4, 1 layers", "Data: data", "Loss on valid: 2.250"):
        assert told in card
    assert str(run) not in card
    again = command(hub, run, "inspect", "me/mine", "--json")
    assert again.returncode == 0, again.stderr
    described = json.loads(again.stdout)
    assert described["layers"][Q]["rank"] == 4 and described["layers"][Q]["alpha"] == 6.0
    assert described["format"] == ("graft" if form == "npz" else form)


@pytest.mark.parametrize(
    ("name", "accepted"),
    [
        *((name, True) for name in ("me/mine", "a/b", "Qwen/Qwen2.5-0.5B", "_a/b_", "a/b.gguf")),
        *((name, False) for name in ("a b/c", "a/na:me", "-x/y", ".x/y", "x/y.", "a/b/c", "a")),
        *((name, False) for name in ("./a", "../a", "~/a", "/a", "a/", "", "a/b--c", "a/b.git")),
        *((name, False) for name in ("a/b..c", "\u00e4/b", "a/" + 97 * "b", "a/b\n")),
    ],
)
def test_repository_names_are_those_that_the_hub_accepts(name: str, accepted: bool) -> None:
    assert is_repo_name(name) == accepted
    try:
        validate_repo_id(name)
    except HFValidationError:
        assert not accepted
    else:
        assert accepted or "/" not in name


def test_a_fused_model_goes_to_the_hub(hub: Hub, run: Path) -> None:
    write_private_files(run / "base")
    names = ["--model", "base", "--adapter-file", "run", "--out", "out"]
    done = command(hub, run, "fuse", *names, "--upload-repo", "me/model")
    assert (done.returncode, done.stderr) == (0, "")
    stored = hub.repositories["me/model"]
    files = {"model.safetensors", "config.json", "tokenizer.model"}
    assert {file.name for file in (run / "out").iterdir()} == files
    assert stored.keys() == files | {"README.md"}
    assert stored["model.safetensors"] == (run / "out" / "model.safetensors").read_bytes()
    assert "mlx_lm.generate --model me/model" in stored["README.md"].decode()


@pytest.mark.slow
def test_training_starts_and_measures_with_an_adapter_of_the_hub(hub: Hub, run: Path) -> None:
    done = command(hub, run, "export", "run", "--to", "peft", "--out", "p", "--upload-repo", "a/b")
    assert done.returncode == 0, done.stderr
    write_rows(run / "data", test=TEXTS)
    test = ["lora", "--model", "base", "--data", "data", "--test"]
    ours = command(hub, run, *test, "--adapter-file", "run/adapters.npz")
    theirs = command(hub, run, *test, "--adapter-file", "a/b")
    assert theirs.returncode == 0, theirs.stderr
    lines = [next(x for x in d.stdout.splitlines() if "loss" in x) for d in (ours, theirs)]
    measured = [line.split("loss")[1].split()[0] for line in lines]
    assert measured[0] == measured[1]
    train = ["lora", "--model", "base", "--data", "data", "--train", "--iters", "1"]
    more = ["--resume-adapter-file", "a/b", "--adapter-file", "more/adapters.npz"]
    done = command(hub, run, *train, *more, "--learning-rate", "0")
    assert done.returncode == 0, done.stderr
    before, after = (load_adapter(run / name).tensors for name in ("run", "more"))
    assert all(mx.allclose(before[name], after[name], atol=1e-6) for name in before)


def test_a_hub_that_refuses_is_one_line_and_what_was_written_stays(hub: Hub, run: Path) -> None:
    hub.refuse = True
    arguments = ["export", "run", "--to", "peft", "--out", "out", "--upload-repo", "me/mine"]
    done = command(hub, run, *arguments)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert "uploading it to the Hub as me/mine failed" in done.stderr
    assert (run / "out" / "adapter_model.safetensors").exists()


def test_an_adapter_that_the_hub_does_not_have_is_one_line(hub: Hub, run: Path) -> None:
    done = command(hub, run, "inspect", "nobody/nothing")
    assert done.returncode == 2
    assert done.stderr.startswith("error: there is no local folder nobody/nothing")
    assert done.stderr.count("\n") == 1
