"""Writes what docs/ takes from the code: docs/architecture.md and docs/options.md.

    python scripts/make_docs.py           # write the pages
    python scripts/make_docs.py --check   # exit with 1 if a page is out of date

In each page the script replaces what stands between two comments, `<!-- NAME -->` and
`<!-- end of NAME -->`; the text around them is written by hand.
"""

import argparse
import ast
import dataclasses
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from graft.training.options import GROUPS, Options, flag

ROOT = Path(__file__).resolve().parent.parent

# The defaults of lora.py in https://github.com/ml-explore/mlx-examples/tree/main/lora
MLX_EXAMPLE: dict[str, object] = {
    "model": "mlx_model",
    "num_tokens": 100,
    "temp": 0.8,
    "add_eos_token": 1,
    "data": "data/",
    "lora_layers": 16,
    "batch_size": 4,
    "iters": 1000,
    "val_batches": 25,
    "learning_rate": 1e-5,
    "steps_per_report": 10,
    "steps_per_eval": 200,
    "adapter_file": "adapters.npz",
    "save_every": 100,
    "test_batches": 500,
    "seed": 0,
    # Not options there: constants of the code.
    "targets": "q_proj, v_proj",
    "alpha": "160 (its scale of 20 times the rank)",
    "dropout": 0.0,
    "max_seq_length": "no limit",
}


def rooms() -> list[str]:
    """The folders of the package that hold code."""
    return sorted(path.parent.name for path in (ROOT / "graft").glob("*/__init__.py"))


def modules(folder: Path) -> list[Path]:
    """The modules of a room, with those of its folders."""
    return sorted(path for path in folder.rglob("*.py") if path.name != "__init__.py")


def summary(path: Path) -> str:
    """The first sentence of a module's docstring."""
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    paragraph = " ".join(text.partition("\n\n")[0].split())
    # A sentence ends where a capital follows, so that names such as config.json go on.
    return re.split(r"(?<=[.!?]) (?=[A-Z])", paragraph)[0].replace("``", "`")


def imported_rooms(room: str) -> set[str]:
    """The rooms that a room's modules import."""
    found: set[str] = set()
    for path in (ROOT / "graft" / room).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module:
                names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
            elif isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            else:
                continue
            parts = [name.split(".") for name in names]
            found |= {name[1] for name in parts if name[0] == "graft" and len(name) > 1}
    return found.intersection(rooms()) - {room}


def arrows() -> dict[str, set[str]]:
    """From room to the rooms that it imports, but for those that another of them imports."""
    direct = {room: imported_rooms(room) for room in rooms()}
    return {
        room: {end for end in ends if not any(end in _reached(direct, via) for via in ends - {end})}
        for room, ends in direct.items()
    }


def _reached(direct: dict[str, set[str]], start: str) -> set[str]:
    """All rooms below a room."""
    found: set[str] = set()
    waiting = list(direct[start])
    while waiting:
        room = waiting.pop()
        if room not in found:
            found.add(room)
            waiting += direct[room]
    return found


def map_of_rooms() -> Iterator[str]:
    """A Mermaid diagram; the command line, which may import every room, is left out."""
    yield "```mermaid"
    yield "flowchart BT"
    for room, ends in arrows().items():
        if room not in ("cli", "bench"):
            yield from (f"    {room} --> {end}" for end in sorted(ends))
            if not ends:
                yield f"    {room}"
    yield "```"


def table_of_rooms() -> Iterator[str]:
    """What each room is for, and which it imports."""
    yield "| room | what it is for | imports |"
    yield "|---|---|---|"
    for room in rooms():
        text = summary(ROOT / "graft" / room / "__init__.py")
        imported = ", ".join(sorted(imported_rooms(room))) or "no other room"
        yield f"| [`{room}`](#{room}) | {text} | {imported} |"


def modules_of_rooms() -> Iterator[str]:
    """Each module with its first sentence."""
    top = [path for path in sorted((ROOT / "graft").glob("*.py")) if not path.is_symlink()]
    yield from _modules("The package itself", ROOT / "graft", top)
    for room in rooms():
        yield from _modules(room, ROOT / "graft" / room, modules(ROOT / "graft" / room))


def _modules(title: str, folder: Path, paths: list[Path]) -> Iterator[str]:
    yield from (f"### {title}", "", "| module | what it is for |", "|---|---|")
    for path in paths:
        name, link = path.relative_to(folder).as_posix(), path.relative_to(ROOT).as_posix()
        if path.name != "__init__.py" or folder == ROOT / "graft":
            yield f"| [`{name}`](../{link}) | {_cell(summary(path))} |"
    yield ""


def tables_of_options() -> Iterator[str]:
    """All options of lora.py, by the groups of their declaration."""
    for group in GROUPS:
        yield from ("", f"## {group[:1].upper()}{group[1:]}", "")
        yield from ("| option | default | what it does |", "|---|---|---|")
        for field in dataclasses.fields(Options):
            if field.metadata["group"] == group:
                yield _row(field)


def _row(field: "dataclasses.Field[object]") -> str:
    names = ", ".join(f"`{name}`" for name in [flag(field.name), *field.metadata["flags"]])
    text, default = _help_and_default(field)
    choices, former = field.metadata["choices"], field.metadata["formerly"]
    text += f": {', '.join(f'`{choice}`' for choice in choices)}" if choices else ""
    text += f" (formerly `{flag(former)}`)" if former else ""
    return f"| {names} | {default} | {_cell(text)} |"


def _help_and_default(field: "dataclasses.Field[object]") -> tuple[str, str]:
    """An option's help without its default, and the default."""
    text = str(field.metadata["help"])
    match = re.search(r"\s*\(default: (.*)\)", text)
    if match:
        return text.replace(match[0], ""), match[1]
    if field.default is None or field.default is False:
        return text, "off" if field.default is False else "none"
    return text, f"`{field.default}`"


def table_beside_the_example() -> Iterator[str]:
    """The options whose defaults are not those of the MLX example."""
    yield "| option | here | in the MLX example |"
    yield "|---|---|---|"
    fields = {field.name: field for field in dataclasses.fields(Options)}
    for name, theirs in MLX_EXAMPLE.items():
        _, ours = _help_and_default(fields[name])
        # Its 16 layers are ours, too, where a model has as many.
        if ours.strip("`") != str(theirs) and not ours.startswith(f"{theirs}, or all"):
            theirs = f"`{theirs:g}`" if isinstance(theirs, float) else theirs
            yield f"| `{flag(name)}` | {ours} | {theirs} |"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


PAGES: dict[str, dict[str, Callable[[], Iterator[str]]]] = {
    "docs/architecture.md": {
        "map": map_of_rooms,
        "rooms": table_of_rooms,
        "modules": modules_of_rooms,
    },
    "docs/options.md": {
        "options": tables_of_options,
        "example": table_beside_the_example,
    },
}


def made(page: str) -> str:
    """The text of a page with what the code says now."""
    text = (ROOT / page).read_text(encoding="utf-8")
    for name, lines in PAGES[page].items():
        start, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
        before, _, rest = text.partition(start)
        _, found, after = rest.partition(end)
        if not found:
            raise ValueError(f"{page} has no {start} with {end} after it")
        text = before + start + "\n" + "\n".join(lines()).strip() + "\n" + end + after
    return text


def main() -> int:
    """Write the pages, or check them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing")
    check = parser.parse_args().check
    old = [page for page in PAGES if (ROOT / page).read_text(encoding="utf-8") != made(page)]
    for page in old:
        print(f"{page} is out of date" if check else f"wrote {page}")
        if not check:
            (ROOT / page).write_text(made(page), encoding="utf-8")
    return 1 if check and old else 0


if __name__ == "__main__":
    sys.exit(main())
