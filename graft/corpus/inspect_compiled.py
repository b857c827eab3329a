"""Reads the docstrings of compiled modules, each in a separate process.

A compiled module has no source, so it must be imported, and importing it runs its code. If that
code crashes, hangs, prints, exits or writes to the working folder, only this module is lost.

This file holds both sides. Run as a script, it is the child process: it imports one module and
writes its names and docstrings as JSON. The child imports nothing of Graft.
"""

import contextlib
import importlib
import inspect
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

SECONDS_PER_MODULE = 30.0
_POLL_SECONDS = 0.01


def inspect_modules(
    names: Sequence[str],
    *,
    workers: int,
    seconds: float = SECONDS_PER_MODULE,
    report: Callable[[str], None] = lambda name: None,
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Import modules in child processes and describe their members.

    Args:
        names: dotted paths of modules.
        workers: the number of processes that run at the same time.
        seconds: the time limit for one module.
        report: called with the name of each module that is finished.

    Returns:
        The modules, in the order of `names`, as dictionaries of the fields of
        `graft.corpus.public_names.Module`; submodules that exist only inside a compiled module
        follow it. And from the name of each module that failed to the reason.
    """
    described: dict[str, list[dict[str, Any]]] = {}
    failed: dict[str, str] = {}
    waiting = list(reversed(names))
    running: list[_Child] = []
    with tempfile.TemporaryDirectory(prefix="graft-", ignore_cleanup_errors=True) as scratch:
        try:
            while waiting or running:
                while waiting and len(running) < workers:
                    folder = Path(scratch, str(len(waiting)))
                    running.append(_Child(waiting.pop(), folder, seconds))
                time.sleep(_POLL_SECONDS)
                for child in [child for child in running if child.finished()]:
                    running.remove(child)
                    result = child.result()
                    if isinstance(result, str):
                        failed[child.name] = result
                    else:
                        described[child.name] = result
                    report(child.name)
        finally:
            for child in running:
                child.stop()
    modules = [module for name in names if name in described for module in described[name]]
    return modules, {name: failed[name] for name in names if name in failed}


class _Child:
    """The process that imports one module, seen from the parent."""

    def __init__(self, name: str, folder: Path, seconds: float) -> None:
        self.name = name
        self._seconds = seconds
        self._output = folder / "module.json"
        working_folder = folder / "cwd"
        working_folder.mkdir(parents=True)
        search_path = [path or os.getcwd() for path in sys.path]
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(search_path),
            "PYTHONSAFEPATH": "1",  # keeps this file's folder out of the search path
            "PYTHONDONTWRITEBYTECODE": "1",
        }
        self._started = time.monotonic()
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).resolve()), name, str(self._output), str(seconds)],
            cwd=working_folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    def finished(self) -> bool:
        """Whether the process has ended or reached its time limit."""
        late = time.monotonic() - self._started > self._seconds
        return self._process.poll() is not None or late

    def result(self) -> list[dict[str, Any]] | str:
        """The descriptions of the modules, or the reason for the failure."""
        status = self._process.poll()
        self.stop()
        try:
            output = json.loads(self._output.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return self._failure(status)
        result: list[dict[str, Any]] | str = output.get("modules", output.get("error"))
        return result

    def _failure(self, status: int | None) -> str:
        if status is None:
            return f"its import took longer than {self._seconds:g} s"
        if status < 0:
            return f"its import crashed ({signal.Signals(-status).name})"
        return f"its import ended the process with status {status}"

    def stop(self) -> None:
        """Kill the process and all processes that it started."""
        # macOS reports "not permitted" for a group whose processes have all ended.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


def _main(name: str, output: str, seconds: str) -> None:
    """The child: describe one module and exit at once, without running any exit handlers."""
    signal.alarm(math.ceil(float(seconds)) + 1)  # ends a hang even if the parent is gone
    try:
        module = importlib.import_module(name)
        described: dict[str, Any] = {"modules": _describe_module(module, name)}
    except BaseException as error:  # SystemExit too: the module failed, not this script
        described = {"error": f"its import raised {_one_line(error)}"}
    partial = Path(output + ".partial")
    partial.write_text(json.dumps(described), encoding="utf-8")
    partial.rename(output)
    os._exit(0)


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}" if text else type(error).__name__


def _describe_module(module: ModuleType, path: str) -> list[dict[str, Any]]:
    """The module, followed by the submodules that have no file."""
    members: dict[str, Any] = {}
    submodules: list[dict[str, Any]] = []
    for name, value in sorted(vars(module).items()):
        if name.startswith("_"):
            continue
        if not isinstance(value, ModuleType):
            member = _quietly(_describe_member, module, path, name, value)
            members |= {name: member} if member else {}
        elif value.__name__ == f"{path}.{name}" and not getattr(value, "__file__", None):
            submodules += _describe_module(value, f"{path}.{name}")
    exports = getattr(module, "__all__", None)
    exports = [name for name in exports if isinstance(name, str)] if exports else None
    described = {
        "path": path,
        "doc": _clean(module.__doc__),
        "is_package": False,
        "exports": exports,
        "members": members,
        "wildcards": [],
    }
    return [described, *submodules]


def _quietly(describe: Callable[..., Any], *arguments: Any) -> Any:
    """A description; `None` if looking at the object raises, as arbitrary code may."""
    try:
        return describe(*arguments)
    except Exception:
        return None


def _describe_member(
    module: ModuleType, path: str, name: str, value: object
) -> dict[str, Any] | None:
    own_name = getattr(value, "__name__", name)
    if own_name != name and vars(module).get(own_name) is value:
        return _name("alias", target=f"{path}.{own_name}")
    described = _describe_object(value)
    home = getattr(value, "__module__", None)
    if described and isinstance(home, str) and home != module.__name__:
        if _is_foreign(module.__name__, home, own_name, value):
            return None
        described["target"] = f"{home}.{own_name}"
    return described


def _is_foreign(here: str, home: str, name: str, value: object) -> bool:
    """Whether the object belongs to another package, which has it under this name."""
    top, home_top = (path.split(".")[0].lstrip("_") for path in (here, home))
    return top != home_top and getattr(sys.modules.get(home), name, None) is value


def _describe_object(value: Any, depth: int = 0) -> dict[str, Any] | None:
    """A class with its members, or an object with a docstring; `None` for plain data."""
    if isinstance(value, type):
        inherited = {getattr(base, "__doc__", None) for base in value.__mro__[1:]}
        doc = value.__doc__ if value.__doc__ not in inherited else ""
        members = {} if depth > 1 else _describe_class_members(value, depth)
        return _name("class", doc, members=members)
    value = getattr(value, "__func__", value)  # of a classmethod or staticmethod
    if inspect.isdatadescriptor(value):
        return _name("property", value.__doc__)
    if callable(value) and value.__doc__ != type(value).__doc__:
        return _name("function", value.__doc__)
    return None


def _describe_class_members(owner: type, depth: int) -> dict[str, Any]:
    public = {name: value for name, value in vars(owner).items() if not name.startswith("_")}
    described = {
        name: _quietly(_describe_object, value, depth + 1) for name, value in sorted(public.items())
    }
    return {name: member for name, member in described.items() if member}


def _name(
    kind: str, doc: object = "", *, target: str = "", members: dict[str, Any] | None = None
) -> dict[str, Any]:
    return {"kind": kind, "doc": _clean(doc), "target": target, "members": members or {}}


def _clean(doc: object) -> str:
    return inspect.cleandoc(doc).strip() if isinstance(doc, str) else ""


if __name__ == "__main__":
    _main(*sys.argv[1:])
