"""The rules of the checkout: who imports whom, what is packaged, what README says."""

import ast
import fnmatch
import functools
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.paths import ROOT

COMMANDS = ("convert", "lora")
MODULES = [path for path in sorted((ROOT / "graft").rglob("*.py")) if not path.is_symlink()]
SOURCES = [*ROOT.glob("*.py"), *MODULES]
SCRIPTS = [*sorted((ROOT / "scripts").glob("*.sh")), ROOT / ".ci" / "run"]
LONGEST_FUNCTION, LONGEST_FILE = 60, 600
# Tests of more than one module of their folder.
EXTRA = {
    "": {"fuzz", "house", "packaging", "printed_commands"},
    "lora": {"command", "files", "generation", "training"},
    "adapters": {"any_model"},
    "cli": {"main"},
    "pretrained": {"every_architecture", "reference", "sapling"},
}


def name_of(path: Path) -> str:
    """Path in the checkout, which pytest shows as the test's id."""
    return path.relative_to(ROOT).as_posix()


@functools.cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def imports_of(path: Path) -> list[str]:
    """Full names of the modules that a file imports, inside functions too, in the file's order."""
    package = path.relative_to(ROOT).parent.parts
    found = []
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            found.append((node.lineno, ".".join([*above, *filter(None, [node.module])])))
    return [name for _, name in sorted(found)]


def tops_of(path: Path) -> list[str]:
    return [name.partition(".")[0] for name in imports_of(path)]


def git_files(*options: str) -> list[str]:
    """Paths that git lists and that are there; skips the test in a copy without git."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    git = ["git", "-c", "safe.directory=*", "ls-files", "-z", *options]
    listed = subprocess.run(git, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [path for path in listed.split("\0") if path and (ROOT / path).is_file()]


# Who imports whom


def test_models_imports_mlx_and_the_standard_library_only() -> None:
    imported = tops_of(ROOT / "models.py")
    assert set(imported) - sys.stdlib_module_names == {"mlx"}


@pytest.mark.parametrize("path", [*SOURCES, *(ROOT / "scripts").glob("*.py")], ids=name_of)
def test_nothing_imports_a_command(path: Path) -> None:
    assert not set(COMMANDS) & set(tops_of(path))


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_imports_graft_before_mlx(name: str) -> None:
    imported = tops_of(ROOT / f"{name}.py")
    with_mlx = [imported.index(top) for top in ("mlx", "mlx_lm", "models") if top in imported]
    assert imported.index("graft") < min(with_mlx, default=len(imported))


def test_datasets_hold_no_python() -> None:
    # It would hide the Hugging Face package of that name from mlx-lm.
    assert list((ROOT / "datasets").rglob("*.py")) == []


# Rooms

# A room imports only these rooms, itself, and modules directly in graft/: errors, console, models.
ARROWS: dict[str, set[str]] = {
    "runtime": set(),
    "storage": set(),
    "pretrained": {"runtime", "storage"},
    "adapters": {"runtime", "storage", "pretrained"},
    "data": {"runtime", "storage", "pretrained"},
    "training": {"runtime", "storage", "pretrained", "adapters", "data"},
    "quantization": {"storage", "pretrained", "adapters", "data"},
    "exporting": {"storage", "pretrained", "adapters", "data", "quantization"},
    "engine": {"runtime", "storage", "pretrained", "adapters"},
    "server": {"runtime", "storage", "pretrained", "adapters", "data", "engine"},
    "corpus": {"runtime", "storage"},
    "bench": {"runtime", "storage", "pretrained", "adapters", "engine"},
}
SHARED = {"errors", "console", "models", "__version__"}
# The commands, and processes that the benchmark starts.
PRINTING = ("graft/__main__.py", "graft/console.py", "graft/cli/", "graft/bench/")


def room_of(path: Path) -> str:
    inside = path.relative_to(ROOT / "graft").parts
    return inside[0] if len(inside) > 1 else ""


def graft_modules(path: Path, *, at_import: bool = False) -> set[str]:
    """Names below `graft.` that a file imports; `at_import` leaves out functions and typing."""
    tree = tree_of(path)
    nodes = tree.body if at_import else list(ast.walk(tree))
    names = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name.removeprefix("graft.") for name in names if name.startswith("graft.")}


def test_every_room_has_its_arrows() -> None:
    rooms = {room_of(path) for path in MODULES} - {""}
    assert rooms == ARROWS.keys() | {"cli"}


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_a_room_imports_only_along_the_arrows(path: Path) -> None:
    imported = {name.partition(".")[0] for name in graft_modules(path)}
    room = room_of(path)
    if room in ARROWS:
        assert imported - ARROWS[room] - SHARED - {room} == set()
    elif path.parent == ROOT / "graft" and path.name not in ("__init__.py", "api.py"):
        assert imported <= SHARED | {"cli"}


def test_no_imports_run_in_a_circle() -> None:
    names = {
        ".".join(path.relative_to(ROOT / "graft").with_suffix("").parts).removesuffix(
            ".__init__"
        ): path
        for path in MODULES
    }
    edges = {
        name: {
            target
            for target in names
            for imported in graft_modules(path, at_import=True)
            if target != name and (imported == target or imported.rpartition(".")[0] == target)
        }
        for name, path in names.items()
    }
    while leaves := [name for name, targets in edges.items() if not targets]:
        edges = {name: set(t) - {*leaves} for name, t in edges.items() if name not in leaves}
    assert edges == {}


def public_names(path: Path) -> Iterator[str]:
    for node in tree_of(path).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Assign):
            yield from (target.id for target in node.targets if isinstance(target, ast.Name))
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            yield node.target.id


def test_no_public_name_is_defined_twice() -> None:
    """Whoever searches for a name finds one thing; every command has a `main`."""
    places: dict[str, list[str]] = {}
    for path in SOURCES:
        for name in dict.fromkeys(public_names(path)):
            if not name.startswith("_") and name not in ("main", "build_parser"):
                places.setdefault(name, []).append(name_of(path))
    # Each objective defines one.
    places.pop("objective", None)
    assert {name: paths for name, paths in places.items() if len(paths) > 1} == {}


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_only_commands_print_and_parse_arguments(path: Path) -> None:
    if name_of(path).startswith(PRINTING):
        return
    calls = [node.func for node in ast.walk(tree_of(path)) if isinstance(node, ast.Call)]
    assert "print" not in [function.id for function in calls if isinstance(function, ast.Name)]
    assert "argparse" not in imports_of(path)


# How it is cut


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_files_and_functions_stay_short(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= LONGEST_FILE
    functions = [
        node
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    lengths = {node.name: (node.end_lineno or 0) - node.lineno + 1 for node in functions}
    assert {name: n for name, n in lengths.items() if n > LONGEST_FUNCTION} == {}


def test_every_module_has_a_topic() -> None:
    assert not {"utils", "util", "helpers", "common", "misc"} & {path.stem for path in SOURCES}


def test_every_test_file_is_named_after_what_it_tests() -> None:
    for path in (ROOT / "tests").rglob("test_*.py"):
        room = path.parent.relative_to(ROOT / "tests")
        stem = path.stem.removeprefix("test_").removesuffix("_reference")
        folders = [ROOT / "graft" / room, *([] if room.parts else [ROOT])]
        known = (
            {other.stem for folder in folders for other in folder.glob("*")}
            | {room.name}
            | EXTRA.get(room.name, set())
        )
        assert stem in known, path


@pytest.mark.parametrize("path", SCRIPTS, ids=name_of)
def test_scripts_are_bash(path: Path) -> None:
    subprocess.run(["bash", "-n", path], check=True)
    assert os.access(path, os.X_OK) == path.read_text().startswith("#!/usr/bin/env bash\n")


# What is packaged


@pytest.fixture
def setuptools() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]


def test_every_module_and_package_is_installed(setuptools: dict) -> None:
    assert setuptools["py-modules"] == []
    for path in ROOT.glob("*.py"):
        assert (ROOT / "graft" / path.name).readlink() == Path("..", path.name)
    assert setuptools["packages"]["find"] == {"include": ["graft*"]}
    for path in SOURCES:
        assert path.parent == ROOT or (path.parent / "__init__.py").exists()


def test_every_asset_is_installed(setuptools: dict) -> None:
    assets = [path for path in git_files("graft") if not path.endswith(".py")]
    assert "graft/assets/sapling/consolidated.00.pth" in assets
    patterns = [f"graft/{pattern}" for pattern in setuptools["package-data"]["graft"]]
    assert [a for a in assets if not any(fnmatch.fnmatch(a, p) for p in patterns)] == []


# What README says


def layout(readme: str) -> list[str]:
    """Paths in the first fenced block under `## Layout`: one a line, folders end in a slash.

    What is in a folder follows it, two spaces deeper.
    """
    block = re.search(r"^## Layout\n.*?^```\w*\n(.*?)^```", readme, re.DOTALL | re.MULTILINE)
    assert block, "README.md has no fenced block under '## Layout'"
    paths: list[str] = []
    above: list[str] = []
    for line in filter(str.strip, block[1].splitlines()):
        depth, name = (len(line) - len(line.lstrip())) // 2, line.split()[0]
        above = [*above[:depth], name]
        paths.append("".join(above))
    return paths


def console(readme: str) -> Iterator[tuple[str, str]]:
    """Each command of the `console` blocks with the reason not to run it, empty for those to run.

    A command is a line that starts with `$ `, and goes on after a backslash at the line's end. A
    comment `# not run: REASON` at its end keeps it from being run.
    """
    for block in re.findall(r"^ *```console\n(.*?)^ *```", readme, re.DOTALL | re.MULTILINE):
        for command in re.findall(r"^ *\$ ((?:.*\\\n)*.*)", block, re.MULTILINE):
            text, _, reason = command.partition("# not run:")
            yield text.strip(), reason.strip()


@pytest.fixture
def readme() -> str:
    return (ROOT / "README.md").read_text(encoding="utf-8")


def children(files: list[str], folder: str) -> set[str]:
    """Names directly in a folder ("" or "graft/"); those of folders end in a slash."""
    inside = [path.removeprefix(folder) for path in files if path.startswith(folder)]
    return {re.sub("/.*", "/", path) for path in inside}


def test_the_readme_s_tree_is_the_checkout_s(readme: str) -> None:
    listed, files = layout(readme), git_files()
    assert len(listed) == len(set(listed))
    for folder in ("", "graft/"):
        # Names that start with a dot may stay out; what is listed has to be there.
        there = {name for name in children(files, folder) if not name.startswith(".")}
        said = {name for name in children(listed, folder) if name and not name.startswith(".")}
        assert said == there, folder or "the root"
    assert [path for path in listed if not (ROOT / path).exists()] == []
    assert [path for path in listed if (ROOT / path).is_dir() != path.endswith("/")] == []


def test_the_readme_s_commands_stand_where_they_are_run(readme: str) -> None:
    commands = list(console(readme))
    assert any(not reason for _, reason in commands)
    assert readme.count("# not run:") == sum(1 for _, reason in commands if reason)
    assert re.findall(r"^ *```(?:bash|sh|shell)\b", readme, re.MULTILINE) == []


def copy_checkout(folder: Path) -> None:
    for path in git_files("--cached", "--others", "--exclude-standard"):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / path, folder / path)


@pytest.mark.slow
def test_the_readme_s_commands_run(readme: str, tmp_path: Path) -> None:
    copy_checkout(tmp_path)
    commands = [command for command, reason in console(readme) if not reason]
    search = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = os.environ | {"PATH": search, "HF_HUB_OFFLINE": "1"}
    for command in commands:
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", command],
            cwd=tmp_path,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=600,
        )
        assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}"


def test_the_readers_of_readme_read() -> None:
    text = (
        "# Graft\n```console\n$ echo one\none\n$ echo two \\\n    three\n```\n"
        "```console\n$ sleep 99  # not run: takes long\n```\n"
        "## Layout\nText.\n```\na.py    what\nb/      what\n  c.py  what\n  d/\n    e\nf\n```\n"
    )
    assert layout(text) == ["a.py", "b/", "b/c.py", "b/d/", "b/d/e", "f"]
    assert list(console(text)) == [
        ("echo one", ""),
        ("echo two \\\n    three", ""),
        ("sleep 99", "takes long"),
    ]
    assert children(layout(text), "") == {"a.py", "b/", "f"}
    assert children(layout(text), "b/") - {""} == {"c.py", "d/"}
