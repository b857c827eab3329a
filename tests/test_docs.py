"""What the documentation names exists, what is generated is up to date, and help is complete."""

import argparse
import importlib
import importlib.util
import itertools
import re
import shlex
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import graft.__main__

import pytest
from test_house import console, copy_checkout

from support.paths import ROOT

PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "examples").rglob("*.md")),
]
README_LINES = 220
SENTENCE = 120
COMMANDS = {"convert.py": "convert", "lora.py": "lora"}
# Flags of other programs that the pages name.
FOREIGN = {"--slow", "--check", "--help", "--version"}
# The first columns of this page hold other tools' names.
OTHER_TOOLS = ROOT / "docs" / "coming-from.md"
# Rows of docs/architectures.md that the quick tests compute again.
SAMPLE = ("llama", "gemma2")


def page_id(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


each_page = pytest.mark.parametrize("page", PAGES, ids=page_id)


def read(page: Path) -> str:
    """A page's text; of the tables of other tools' names, the last column alone."""
    text = page.read_text(encoding="utf-8")
    if page == OTHER_TOOLS:
        text = re.sub(r"^\|.*\|(.*)\|$", r"\1", text, flags=re.MULTILINE)
    return text


def without_blocks(text: str) -> str:
    return re.sub(r"^ *```.*?^ *```", "", text, flags=re.DOTALL | re.MULTILINE)


def spans(text: str) -> list[str]:
    """What stands between backticks, in one line."""
    return re.findall(r"(?<!`)`([^`\n]+)`(?!`)", without_blocks(text))


def code_lines(text: str) -> Iterator[str]:
    """The commands in the pages' blocks and between backticks, continued lines joined."""
    for block in re.findall(r"^ *```\w*\n(.*?)^ *```", text, re.DOTALL | re.MULTILINE):
        for line in block.replace("\\\n", " ").splitlines():
            yield line.strip().removeprefix("$ ")
    yield from spans(text)


@cache
def script(name: str) -> ModuleType:
    """A module of scripts/."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# What pages name


def problem_of_path(text: str) -> str | None:
    """What is wrong with a path of the checkout; NAME and * stand for any name."""
    parts = list(itertools.takewhile(lambda part: not is_any(part), Path(text).parts))
    return None if Path(ROOT, *parts).exists() else f"{text} is not in the checkout"


def is_any(part: str) -> bool:
    """Whether a part of a path stands for any name, such as NAME.py or test_<module>.py."""
    return bool(re.search(r"\b[A-Z]+\b(?!\.md)|[*<]", part))


def problem_of_name(text: str) -> str | None:
    """What is wrong with a name such as `graft.room.module.function`."""
    parts = text.removesuffix("()").split(".")
    found: Any = importlib.import_module(parts[0])
    for number, part in enumerate(parts[1:], start=2):
        if not hasattr(found, part):
            try:
                importlib.import_module(".".join(parts[:number]))
            except ImportError:
                return f"{text}: {found!r} has no {part}"
        found = getattr(found, part)
    return None


@each_page
def test_every_path_and_name_exists(page: Path) -> None:
    tops = {path.name for path in ROOT.iterdir() if path.is_dir()} - {"adapters", "build"}
    problems = []
    for text in spans(read(page)):
        if re.fullmatch(r"[\w.*<>-]+/[\w./*<>-]*", text) and text.split("/")[0] in tops:
            problems.append(problem_of_path(text))
        elif re.fullmatch(r"graft(\.\w+)+(\(\))?", text):
            problems.append(problem_of_name(text))
        elif re.fullmatch(r"[\w-]+\.sh|(lora|convert|models)\.py|pyproject\.toml", text):
            there = (ROOT / text).exists() or (ROOT / "scripts" / text).exists()
            problems.append(None if there else f"{text} is not in the checkout")
    assert [problem for problem in problems if problem] == []


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives a page's headings."""
    titles = re.findall(r"^#+ (.*)$", without_blocks(page.read_text("utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title).lower().replace(" ", "-") for title in titles}


@each_page
def test_every_link_leads_somewhere(page: Path) -> None:
    problems = []
    for link in re.findall(r"\]\(([^)\s]+)\)", without_blocks(page.read_text(encoding="utf-8"))):
        if re.match(r"https?://", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            problems.append(link)
    assert problems == []


# What commands take


class _Caught(Exception):
    """Carries a parser out of the command that made it."""


def parser_of(verb: str) -> argparse.ArgumentParser:
    """The parser of a verb, whichever function makes it."""
    with pytest.MonkeyPatch.context() as patch:

        def catch(self: argparse.ArgumentParser, *_: object, **__: object) -> None:
            raise _Caught(self)

        patch.setattr(argparse.ArgumentParser, "parse_args", catch)
        patch.setattr(sys, "argv", [verb])
        with pytest.raises(_Caught) as caught:
            graft.__main__.main([verb])
    parser: argparse.ArgumentParser = caught.value.args[0]
    return parser


@cache
def flags_of(verb: str) -> set[str]:
    return {flag for action in parser_of(verb)._actions for flag in action.option_strings}


def verb_of(line: str) -> str | None:
    """The verb that a command line runs, if it is one of Graft's."""
    line = line.partition(" # ")[0]
    words = re.split(r"\s+", line)
    if re.match(r"(?:python -m )?graft [a-z]", line):
        verb = words[words.index("graft") + 1]
        return verb if verb in graft.__main__.VERBS else f"unknown: {verb}"
    for program, verb in COMMANDS.items():
        if re.match(rf"(?:python )?{re.escape(program)}(?: |$)", line):
            return verb
    return None


def flags_in(line: str) -> set[str]:
    """The flags in a command line, without what quotes hold."""
    line = line.partition(" # ")[0].removeprefix("python -m ")
    line = re.sub(r"'[^']*'|\"[^\"]*\"", "TEXT", line)
    return {word.partition("=")[0] for word in re.findall(r"(?<![\w-])--?[a-z][\w-]*=?", line)}


@each_page
def test_every_command_and_flag_exists(page: Path) -> None:
    known = set().union(*map(flags_of, graft.__main__.VERBS)) | FOREIGN
    text, problems = read(page), []
    for line in code_lines(text):
        verb = verb_of(line)
        if verb is not None:
            allowed = flags_of(verb) if verb in graft.__main__.VERBS else set()
            problems += [f"{verb} {flag}" for flag in flags_in(line) - allowed]
            problems += [] if verb in graft.__main__.VERBS else [verb]
        elif line.startswith("--"):
            problems += [flag for flag in flags_in(line) if flag not in known]
        elif line.startswith(("bash scripts/", "python scripts/")):
            name = shlex.split(line.partition(" # ")[0])[1]
            problems += [] if (ROOT / name).exists() else [name]
    assert problems == []


def shortened(command: str) -> str:
    """The command; if it trains for long, with few steps."""
    trains = "lora.py --train" in command and "--iters" not in command
    return f"{command} --iters 3 --val-batches 1" if trains else command


@pytest.mark.slow
def test_the_commands_of_the_pages_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """In this process, where Graft is imported once; README's run as a person runs them."""
    # Pages use the adapter that README's first commands leave behind.
    commands = ["python lora.py --train --iters 3 --val-batches 1"]
    for page in PAGES:
        if page.name != "README.md" or page.parent != ROOT:
            lines = console(page.read_text(encoding="utf-8"))
            commands += [shortened(command) for command, reason in lines if not reason]
    assert len(commands) > 10
    copy_checkout(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [""])  # main changes it
    for command in commands:
        verb = verb_of(command)
        assert verb in graft.__main__.VERBS, command
        words = shlex.split(command, comments=True)
        arguments = words[words.index(verb if "graft" in words else f"{verb}.py") + 1 :]
        assert graft.__main__.main([verb, *arguments]) == 0, (command, capfd.readouterr().err)


@pytest.mark.slow
def test_the_code_of_the_python_page_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "datasets").symlink_to(ROOT / "datasets")
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
    names: dict[str, Any] = {}
    for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        exec(block.replace("iters=200", "iters=2").replace("num_batches=5", "num_batches=1"), names)
    assert names["run"].steps == 2 and "test loss" in capsys.readouterr().out
    assert {"adapters", "copy", "for-peft", "fused"} <= {path.name for path in tmp_path.iterdir()}


@pytest.mark.parametrize("verb", graft.__main__.VERBS)
def test_help_is_short_and_shows_every_default(verb: str) -> None:
    parser = parser_of(verb)
    formatter = parser._get_formatter()
    problems = []
    for action in parser._actions:
        if action.help in (None, argparse.SUPPRESS) or isinstance(action, argparse._HelpAction):
            continue
        name = "/".join(action.option_strings) or action.dest
        text = formatter._expand_help(action)
        sentences = re.split(r"(?<=[.;!?]) ", re.sub(r"\(default: .*\)", "", text))
        problems += [f"{name}: {one}" for one in sentences if len(one) > SENTENCE]
        takes_value = action.option_strings and action.nargs != 0
        if takes_value and not action.required and "(default" not in text:
            problems.append(f"{name} shows no default: {text}")
    epilog = (parser.epilog or "").splitlines()
    assert problems + [line for line in epilog if len(line) > SENTENCE] == []


# What is generated


@pytest.mark.parametrize("page", script("make_docs").PAGES)
def test_generated_pages_are_up_to_date(page: str) -> None:
    made = script("make_docs").made(page)
    assert (ROOT / page).read_text("utf-8") == made, "run python scripts/make_docs.py"


def test_every_option_is_in_a_group_of_the_page() -> None:
    text = (ROOT / "docs" / "options.md").read_text(encoding="utf-8")
    flags = {flag for flag in flags_of("lora") if flag.startswith("--")} - {"--help", "--config"}
    assert {flag for flag in flags if f"`{flag}`" not in text} == set()


@pytest.mark.parametrize("name", SAMPLE)
def test_the_table_of_architectures_says_what_the_probes_say(name: str) -> None:
    probes = script("probe_architectures")
    config = probes.read_configs()[name]
    label = probes.label(name, config)
    shown = probes.rows_of(probes.PAGE.read_text(encoding="utf-8"))[label]
    assert shown == probes.row(name, config, probes.probe(name, config))


@pytest.mark.slow
def test_the_table_has_every_architecture_and_what_the_probes_say() -> None:
    probes = script("probe_architectures")
    shown = probes.rows_of(probes.PAGE.read_text(encoding="utf-8"))
    configs = probes.read_configs()
    assert list(shown) == [probes.label(name, config) for name, config in configs.items()]
    for name in list(configs)[::24]:
        row = probes.row(name, configs[name], probes.probe(name, configs[name]))
        assert shown[probes.label(name, configs[name])] == row


# How pages are written


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text("utf-8").splitlines()) < README_LINES


@each_page
def test_lines_of_prose_end_where_a_sentence_or_a_part_of_it_ends(page: Path) -> None:
    lines = without_blocks(page.read_text(encoding="utf-8")).splitlines()
    wrapped = []
    for line, following in itertools.pairwise(lines):
        is_prose = re.match(r" {0,3}(?:[-*] |\d+\. )?[\w`*\[(\"]", line) and "|" not in line
        goes_on = re.match(r" *[\w`*\[(\"]", following) and not re.match(r" *\d+\. ", following)
        if is_prose and goes_on and not re.search(r"[.:;!?)\"`]$", line):
            wrapped.append(line)
    assert wrapped == []


def test_the_readers_of_pages_read() -> None:
    text = "A `b c` and ``d``.\n```console\n$ python lora.py --train \\\n    --iters 3\n```\n"
    assert spans(text) == ["b c"]
    assert list(code_lines(text)) == ["python lora.py --train      --iters 3", "b c"]
    assert verb_of("python -m graft fuse --out x") == verb_of("graft fuse") == "fuse"
    assert verb_of("python lora.py --train") == "lora" and verb_of("pip install .") is None
    assert flags_in("graft chat --format '--x' -n 3 --a=b # --no") == {"--format", "-n", "--a"}
    assert problem_of_path("graft/data/NAME.py") is None and problem_of_path("README.md") is None
    assert problem_of_path("graft/nothing/NAME.py") and problem_of_path("docs/nothing.md")
    assert problem_of_name("graft.training.options.Options") is None
    assert problem_of_name("graft.training.nothing") is not None
