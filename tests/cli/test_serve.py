"""The command line: how it starts, what it refuses, what it prints, how it shuts down."""

import http.client
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import graft.__main__
from graft.cli import chat
from graft.cli.serve import build_parser, read_arguments
from graft.pretrained.load import load_model
from graft.server.launch import listen

import pytest

from support.live_server import serve, write_adapter
from support.paths import ROOT
from support.tiny import write_model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    model, _, _ = load_model(write_model(tmp_path / "model"))
    for seed, name in enumerate(("one", "two"), 1):
        write_adapter(tmp_path / "adapters" / name, model, "q_proj", 4, seed)
    return tmp_path


@contextmanager
def started(*arguments: str) -> Iterator[tuple["subprocess.Popen[str]", int, list[str]]]:
    """The command in a process of its own: it, its port, and the lines that it began with."""
    command = [sys.executable, "-m", "graft", "serve", "--port", "0", *arguments]
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    lines = []
    try:
        while not lines or " at http://" not in lines[-1]:
            lines.append(process.stdout.readline().rstrip("\n"))
            assert process.poll() is None, process.communicate()
        yield process, int(lines[-1].rsplit(":", 1)[1].split("/")[0]), lines
    finally:
        process.kill()
        process.communicate()


def ask(port: int, body: object) -> http.client.HTTPConnection:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("POST", "/v1/completions", json.dumps(body))
    return connection


# What it refuses


def test_the_key_can_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRAFT_API_KEY", "secret")
    assert read_arguments([]).api_key == "secret"
    assert read_arguments(["--api-key", "other"]).api_key == "other"


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--host", "0.0.0.0"], "can be reached from other machines"),
        (["--allow-load"], "--allow-load needs --adapters DIR"),
        (["--port", "70000"], "70000 is not a port: 0 to 65535"),
        (["--port", "x"], "invalid"),
        (["--max-rank", "0"], "0 must be 1 or more"),
        (["--timeout", "-1"], "-1 must be 0 or more"),
        (["--timeout", "nan"], "nan must be 0 or more"),
        (["--host", "256.1.1.1", "--api-key", "k"], "cannot listen on 256.1.1.1:8080"),
        (["--port", "0", "--model", "/nowhere"], "there is no model folder /nowhere"),
        (["--port", "0", "--adapters", "/nowhere"], "--adapters /nowhere is not a folder"),
    ],
)
def test_a_wrong_command_line_is_one_line(
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("GRAFT_API_KEY", raising=False)
    assert graft.__main__.main(["serve", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert message in error


def test_a_port_that_is_taken_is_told_before_the_model_is_loaded(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        assert graft.__main__.main(["serve", "--port", str(port), "--model", "/nowhere"]) == 2
    assert f"cannot listen on 127.0.0.1:{port}: Address already in use" in capsys.readouterr().err


# What it serves


def test_it_says_what_it_serves_and_what_it_left_out(folder: Path) -> None:
    (folder / "adapters" / "bad").mkdir()
    (folder / "adapters" / "bad" / "adapters.safetensors").write_bytes(b"torn")
    place = str(folder / "adapters")
    model = str(folder / "model")
    with started("--model", model, "--adapters", place, "--max-adapters", "1") as (_, _, lines):
        assert lines[0] == "adapter 0: one, rank 4"
        assert lines[1].startswith("not loaded: bad: ")
        assert lines[2] == "not loaded: two: already at --max-adapters 1"
        assert lines[3].startswith("adapters: up to 1 of rank 64, at most ")
        assert lines[4] == "loading by clients: off (--allow-load)"
        assert lines[5] == "API key: none, this machine only"
        assert lines[6].startswith("model at http://127.0.0.1:")


def test_a_folder_of_which_nothing_can_be_served_is_refused(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--model", str(folder / "model"), "--adapters", str(folder / "adapters")]
    assert graft.__main__.main(["serve", "--port", "0", "--max-rank", "2", *arguments]) == 2
    error = capsys.readouterr().err
    assert "no adapter in" in error and "one" in error and "two" in error


def test_the_requests_of_the_docs_are_answered(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("openai")
    page = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    (block,) = [block for block in blocks if "import OpenAI" in block]
    adapters = {"mlx-docs": ("q_proj", 2), "numpy-docs": ("v_proj", 1)}
    with serve(tmp_path, adapters=adapters, model="sapling-4bit") as live:
        names: dict[str, Any] = {}
        exec(block.replace(":8080/", f":{live.port}/"), names)
        names["client"].close()
        out = capsys.readouterr().out
        assert out.startswith("['sapling-4bit', 'mlx-docs', 'numpy-docs']\n")
        alone = live.engine.generate("Q: What is relu in mlx?\nA:", adapters={"mlx-docs": 1.0})
        assert names["answer"].choices[0].text == alone.text[: len(names["answer"].choices[0].text)]


def test_the_docs_tell_the_options_that_there_are() -> None:
    page = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
    told = set(re.findall(r"`(--[a-z-]+)", page))
    # The page is about serving, and about chatting with the same adapters.
    parsers = (build_parser(), chat.build_parser())
    actions = [action for parser in parsers for action in parser._actions]
    assert told <= {flag for action in actions for flag in action.option_strings}


# How it ends


@pytest.mark.skipif(os.name != "posix", reason="signals")
@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)]
)
def test_a_signal_lets_what_runs_finish_and_refuses_the_rest(
    folder: Path, number: signal.Signals
) -> None:
    body = {"prompt": "The quick", "max_tokens": 250, "temperature": 0, "stream": True}
    with started("--model", str(folder / "model")) as (process, port, _):
        connection = ask(port, body)
        response = connection.getresponse()
        assert b"data: " in response.readline()
        process.send_signal(number)
        rest = response.read()
        assert b'"finish_reason": "length"' in rest
        assert rest.endswith(b"data: [DONE]\n\n")
        connection.close()
        out, error = process.communicate(timeout=60)
        assert process.returncode == 128 + number
        assert (out, error) == ("stopped\n", "")
        with pytest.raises(ConnectionError):
            ask(port, body)


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_what_does_not_finish_in_time_is_told_so(folder: Path) -> None:
    body = {"prompt": "The quick", "max_tokens": 480, "temperature": 0, "stream": True}
    arguments = ["--model", str(folder / "model"), "--shutdown-timeout", "0"]
    with started(*arguments) as (process, port, _):
        connection = ask(port, body)
        response = connection.getresponse()
        assert b"data: " in response.readline()
        process.send_signal(signal.SIGTERM)
        rest = response.read()
        assert b'"code": "shutting_down"' in rest
        assert rest.endswith(b"data: [DONE]\n\n")
        connection.close()
        process.communicate(timeout=60)
        assert process.returncode == 128 + signal.SIGTERM
