"""graft/corpus/inspect_compiled.py: modules that must be imported, each in a process of its own."""

import _collections
import math
import os
import time
from pathlib import Path

from graft.corpus.inspect_compiled import inspect_modules

import pytest


@pytest.fixture
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder on the search path; a compiled module is imported like any other."""
    folder = tmp_path / "modules"
    folder.mkdir()
    monkeypatch.syspath_prepend(folder)
    return folder


GOOD = 'def works():\n    """It works."""\n'

BAD = {
    "segfault": ("import os; os.kill(os.getpid(), 11)", "its import crashed (SIGSEGV)"),
    "leaves": ("import os; os._exit(0)", "its import ended the process with status 0"),
    "exits": ("raise SystemExit(3)", "its import raised SystemExit: 3"),
    "hangs": ("while True: pass", "its import took longer than 1 s"),
    "raises": ("1 / 0", "its import raised ZeroDivisionError: division by zero"),
    "asks": ("input()", "its import raised EOFError: EOF when reading a line"),
}


def test_a_module_that_fails_costs_that_module_only(
    modules: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for name, (code, _) in BAD.items():
        (modules / f"{name}.py").write_text(code)
    (modules / "noisy.py").write_text("print('noise')\nopen('litter', 'w').close()\n" + GOOD)
    before = sorted(os.listdir())
    found, failed = inspect_modules([*BAD, "noisy", "nowhere"], workers=2, seconds=1)
    assert [module["path"] for module in found] == ["noisy"]
    assert found[0]["members"]["works"]["doc"] == "It works."
    missing = "its import raised ModuleNotFoundError: No module named 'nowhere'"
    assert failed == {name: reason for name, (_, reason) in BAD.items()} | {"nowhere": missing}
    assert capfd.readouterr() == ("", "")
    assert sorted(os.listdir()) == before


def test_an_exit_that_hangs_costs_nothing(modules: Path) -> None:
    hook = "import atexit, threading, time\natexit.register(time.sleep, 60)\n"
    thread = "threading.Thread(target=time.sleep, args=(60,)).start()\n"
    (modules / "lingers.py").write_text(hook + thread + GOOD)
    found, failed = inspect_modules(["lingers"], workers=1, seconds=20)
    assert (len(found), failed) == (1, {})


def test_what_a_module_starts_ends_with_it(modules: Path, tmp_path: Path) -> None:
    note = tmp_path / "pid"
    start = f"import subprocess; p = subprocess.Popen(['sleep', '60']); open({str(note)!r}, 'w')"
    (modules / "starts.py").write_text(start + ".write(str(p.pid))\n" + GOOD)
    inspect_modules(["starts"], workers=1)
    for _ in range(100):
        if not is_running(int(note.read_text())):
            return
        time.sleep(0.05)
    raise AssertionError("the process that the module started goes on")


def is_running(pid: int) -> bool:
    """Whether a process has not ended; one that nobody has waited for yet has ended, too."""
    status = Path(f"/proc/{pid}/stat")
    try:
        os.kill(pid, 0)
        return not status.exists() or status.read_text().rpartition(")")[2].split()[0] != "Z"
    except (ProcessLookupError, FileNotFoundError):
        return False


def test_what_it_finds_are_the_modules_docstrings() -> None:
    [module], _ = inspect_modules(["math"], workers=1)
    assert module["doc"] == math.__doc__.strip()
    assert module["members"]["sin"] == {
        "kind": "function",
        "doc": math.sin.__doc__,
        "target": "",
        "members": {},
    }
    assert "pi" not in module["members"]


def test_classes_come_with_their_methods_and_properties() -> None:
    [module], _ = inspect_modules(["_collections"], workers=1)
    deque = module["members"]["deque"]
    assert (deque["kind"], deque["target"]) == ("class", "collections.deque")
    assert deque["members"]["append"]["kind"] == "function"
    assert deque["members"]["append"]["doc"] == _collections.deque.append.__doc__
    assert deque["members"]["maxlen"]["kind"] == "property"
    assert not any(name.startswith("_") for name in deque["members"])


def test_a_second_name_is_an_alias_and_what_others_define_is_left_out(modules: Path) -> None:
    (modules / "names.py").write_text(GOOD + "again = works\nfrom json import dumps\n")
    [module], _ = inspect_modules(["names"], workers=1)
    assert module["members"].keys() == {"again", "works"}
    again = module["members"]["again"]
    assert (again["kind"], again["target"]) == ("alias", "names.works")


def test_submodules_without_a_file_come_along() -> None:
    found, _ = inspect_modules(["mlx.core"], workers=1)
    assert [module["path"] for module in found][:2] == ["mlx.core", "mlx.core.cuda"]
    assert "mlx.core.random" in [module["path"] for module in found]


def test_results_come_in_the_order_asked_for(modules: Path) -> None:
    (modules / "slow.py").write_text("import time; time.sleep(0.5)\n" + GOOD)
    (modules / "fast.py").write_text(GOOD)
    done: list[str] = []
    found, _ = inspect_modules(["slow", "fast"], workers=2, report=done.append)
    assert [module["path"] for module in found] == ["slow", "fast"]
    assert sorted(done) == ["fast", "slow"]


def test_an_interruption_ends_the_children(modules: Path, tmp_path: Path) -> None:
    note = tmp_path / "pid"
    code = (
        f"import os, time\nwith open({str(note)!r} + '.new', 'w') as new: "
        f"new.write(str(os.getpid()))\nos.rename(new.name, {str(note)!r}); time.sleep(60)"
    )
    (modules / "sleeps.py").write_text(code)
    (modules / "fast.py").write_text(
        f"import os, time\nwhile not os.path.exists({str(note)!r}): time.sleep(0.01)"
    )

    def interrupt(name: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        inspect_modules(["sleeps", "fast"], workers=2, report=interrupt)
    assert not is_running(int(note.read_text()))
