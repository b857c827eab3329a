"""Chatting: answers of the chosen adapters, commands, and plain lines from a pipe."""

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from graft.cli.chat import HELP, ChatSession, converse, main
from graft.engine.engine import Engine
from graft.errors import InputError
from graft.pretrained.load import load_model

import pytest

from support.served import make_adapter, write
from support.tiny import write_model

SETTINGS: dict[str, Any] = {"max_tokens": 8}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chat")
    model = load_model(write_model(folder / "model"))[0]
    for seed, name in enumerate(("one", "two")):
        write(folder / "adapters" / name, make_adapter(model, seed=seed, targets="all-linear"))
    return folder


@pytest.fixture
def engine(folder: Path) -> Iterator[Engine]:
    with Engine(*load_model(folder / "model")[:2]) as engine:
        for name in ("one", "two"):
            engine.load_adapter(name, folder / "adapters" / name)
        yield engine


def answer(engine: Engine, prompt: str, **scales: float) -> str:
    """What a conversation without a template comes to, for one adapter or none."""
    found = engine.generate(prompt, adapters=scales, max_tokens=8, stop=["\nUser:"])
    return found.text


def test_answers_are_of_the_chosen_adapters_and_of_all_that_was_said(
    engine: Engine, capsys: pytest.CaptureFixture[str]
) -> None:
    session = ChatSession(engine, SETTINGS, system="Be brief.")
    for line in ("/adapter one=-0.5 two", "Hello", "/base", "And?", "/new", "Hello"):
        session.handle(line)
    printed = capsys.readouterr().out
    start = "System: Be brief.\nUser: Hello\nAssistant:"
    first = answer(engine, start, one=-0.5, two=1.0)
    assert printed.startswith(first + "\n")
    assert printed.endswith(answer(engine, start) + "\n")
    assert first != answer(engine, start)


def test_comparing_answers_the_last_message_by_all(
    engine: Engine, capsys: pytest.CaptureFixture[str]
) -> None:
    session = ChatSession(engine, SETTINGS, prompt_format=r"Q: {}\nA:")
    session.handle("What?")
    session.handle("/adapter two=2")
    capsys.readouterr()
    session.handle("/compare")
    again = capsys.readouterr().out
    expected = {
        "base": engine.generate("Q: What?\nA:", max_tokens=8).text,
        "one": engine.generate("Q: What?\nA:", adapters={"one": 1}, max_tokens=8).text,
        "two": engine.generate("Q: What?\nA:", adapters={"two": 1}, max_tokens=8).text,
        "chosen": engine.generate("Q: What?\nA:", adapters={"two": 2}, max_tokens=8).text,
    }
    assert again == "".join(f"[{name}]\n{text}\n" for name, text in expected.items())
    session.handle("/compare What?")
    assert capsys.readouterr().out == again


def test_comparing_leaves_the_conversation_as_it_was(
    engine: Engine, capsys: pytest.CaptureFixture[str]
) -> None:
    session, other = ChatSession(engine, SETTINGS), ChatSession(engine, SETTINGS)
    for line in ("Hello", "/compare", "/compare Other?", "And?"):
        session.handle(line)
    compared = capsys.readouterr().out
    for line in ("Hello", "And?"):
        other.handle(line)
    plain = capsys.readouterr().out
    first = answer(engine, "User: Hello\nAssistant:")
    assert compared.startswith(f"{first}\n[base]\n{first}\n[one]\n")
    assert plain.startswith(first) and compared.endswith(plain[len(first) :])


def test_adapters_are_listed_loaded_and_unloaded(
    engine: Engine, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    session = ChatSession(engine, SETTINGS)
    session.handle(f"/load three {folder / 'adapters' / 'two'}")
    session.handle("/adapter one=0.25 three")
    session.handle("/unload three")
    session.handle("/adapters")
    said = "one: rank 8, 21 layers, chosen at 0.25\ntwo: rank 8, 21 layers\n"
    assert capsys.readouterr().out == said
    session.handle("/base")
    session.handle("/adapters")
    said = "two: rank 8, 21 layers\nno adapter is chosen: the base model answers\n"
    assert capsys.readouterr().out.endswith(said)


@pytest.mark.parametrize(
    "line, said",
    [
        ("/adaptor one", "unknown command /adaptor; the commands are /adapter, /base"),
        ("/adapter one three four=2", "no adapter three, four; loaded: one, two"),
        ("/adapter one=much", "one=much: the scale 'much' is not a number"),
        ("/compare", "no message to answer yet"),
        ("/load three", "/load needs a name and a path"),
        ("/load three nowhere", "no adapter at nowhere"),
        ("/unload three", "no adapter 'three'"),
        ("Hello " * 600, "shorten it to 512"),
    ],
)
def test_what_goes_wrong_is_said_and_the_person_may_go_on(
    engine: Engine, line: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    session = ChatSession(engine, SETTINGS)
    session.handle("/adapter one")
    converse(session, ["", line, "/help", "/quit", "/nothing"])
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ") and said in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == HELP + "\n"
    assert session.chosen == {"one": 1.0}


def test_lines_of_a_pipe_are_messages_and_only_answers_are_printed(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("Hello\n\n/adapter two\nHello\n/quit\nHello\n"))
    options = ["--model", str(folder / "model"), "--adapters", str(folder / "adapters")]
    options += ["--max-tokens", "8", "--format", r"Q: {}\nA:", "--adapter", "one=2"]
    assert main(options) == 0
    captured = capsys.readouterr()
    with Engine(*load_model(folder / "model")[:2]) as engine:
        expected = ""
        for name, scale in (("one", 2.0), ("two", 1.0)):
            engine.load_adapter(name, folder / "adapters" / name)
            found = engine.generate("Q: Hello\nA:", adapters={name: scale}, max_tokens=8)
            expected += found.text + "\n"
    assert captured.out == expected


@pytest.mark.parametrize(
    "options, line, said",
    [
        (["--format", "Q: A:"], "", "--format 'Q: A:' has no {}"),
        (["--adapter", "three"], "", "no adapter three; loaded: one, two"),
        (["--temp", "-1"], "Hello", "temperature -1.0 must be 0 or more"),
        ([], "/adapter three", "no adapter three"),
    ],
)
def test_a_pipe_ends_at_the_first_error(
    folder: Path,
    options: list[str],
    line: str,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(line + "\n"))
    places = ["--model", str(folder / "model"), "--adapters", str(folder / "adapters")]
    assert main([*places, *options]) == 2
    error = capsys.readouterr().err
    assert error.splitlines()[-1].startswith("error: ") and said in error


def test_an_interrupted_answer_is_cancelled_and_kept(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    session = ChatSession(engine, {"max_tokens": 400})
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    streams = []
    submit = engine.submit

    def interrupting(*args: Any, **settings: Any) -> Any:
        stream = submit(*args, **settings)
        get, streams[:] = stream.get, [stream]

        def get_two(timeout: float | None = None) -> Any:
            if len(gets) == 2:
                raise KeyboardInterrupt
            gets.append(1)
            return get(timeout)

        gets: list[int] = []
        stream.get = get_two
        return stream

    monkeypatch.setattr(engine, "submit", interrupting)
    session.handle("Hello")
    assert capsys.readouterr().out.endswith("\n")
    streams[0].get = type(streams[0]).get.__get__(streams[0])
    list(streams[0])
    assert streams[0].state == "cancelled"


def test_bad_input_of_a_message_is_no_traceback(engine: Engine) -> None:
    with pytest.raises(InputError, match="max_tokens -1"):
        ChatSession(engine, {"max_tokens": -1}).handle("Hello")
