"""graft/corpus/package_reading.py: what a package documents, read without running it."""

import ast
import importlib.util
import sys
from pathlib import Path

from graft.corpus.package_reading import Documentation, read_package
from graft.corpus.packages import find_packages

import pytest


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder on the search path."""
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.syspath_prepend(folder)
    return folder


def write(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


def read(name: str, workers: int = 1) -> Documentation:
    [package], missing = find_packages([name])
    assert missing == []
    return read_package(package, workers=workers)


def docs(documentation: Documentation) -> dict[str, str]:
    return {one.path: one.doc for one in documentation.objects if one.doc}


# Reading sources


def test_nothing_of_a_package_is_run_to_read_its_sources(site: Path) -> None:
    trap = 'raise SystemExit("imported")\n'
    write(site, {"trap/__init__.py": '"""A trap."""\n' + trap, "trap/a.py": '"""A."""\n' + trap})
    assert docs(read("trap")) == {"trap": "A trap.", "trap.a": "A."}
    assert "trap" not in sys.modules


def test_a_file_that_cannot_be_parsed_costs_that_file_only(site: Path) -> None:
    write(
        site,
        {
            "p/__init__.py": "",
            "p/good.py": '"""Good."""\n',
            "p/bad.py": "def (:\n",
            "p/stub.pyi": "class\n",
        },
    )
    (site / "p" / "latin.py").write_bytes(b'"""\xe9"""\n')
    (site / "p" / "declared.py").write_bytes(b'# coding: latin-1\n"""\xe9t\xe9"""\n')
    found = read("p")
    assert docs(found) == {"p.good": "Good.", "p.declared": "été"}
    assert found.skipped.keys() == {"p.bad", "p.latin", "p.stub (stub)"}
    assert found.skipped["p.bad"] == "it cannot be parsed: SyntaxError: invalid syntax (line 1)"


def test_a_compiled_module_that_cannot_be_loaded_is_reported(site: Path) -> None:
    suffix = importlib.machinery.EXTENSION_SUFFIXES[0]
    write(site, {"p/__init__.py": '"""P."""\n', f"p/fast{suffix}": "no library"})
    found = read("p")
    assert docs(found) == {"p": "P."}
    assert found.skipped["p.fast"].startswith("its import raised ImportError")


def test_a_compiled_module_in_a_package_that_crashes_is_reported(site: Path) -> None:
    suffix = importlib.machinery.EXTENSION_SUFFIXES[0]
    crash = '"""P."""\nimport os\nos.abort()\n'
    write(site, {"p/__init__.py": crash, f"p/fast{suffix}": "never reached"})
    found = read("p")
    assert docs(found) == {"p": "P."}
    assert found.skipped == {"p.fast": "its import crashed (SIGABRT)"}


def test_libraries_beside_compiled_modules_are_not_imported(site: Path) -> None:
    write(site, {"p/__init__.py": '"""P."""\n', "p/lib/libfast.so": "", "p/data.so.1": ""})
    assert read("p").skipped == {}


def test_stubs_add_what_they_document(site: Path) -> None:
    source = "from p._impl import *\ndef f(): pass\n"
    stub = 'import typing\ndef f() -> None:\n    """From the stub."""\ndef g() -> None: ...\n'
    implementation = '__all__ = ["g"]\ndef g():\n    """From the source."""\n'
    write(site, {"p/__init__.py": source, "p/__init__.pyi": stub, "p/_impl.py": implementation})
    assert docs(read("p")) == {"p.f": "From the stub.", "p.g": "From the source."}


def test_overloads_in_a_stub_share_the_docstring_of_one(site: Path) -> None:
    overloads = (
        "from typing import overload\n"
        '@overload\ndef f(a: int) -> int:\n    """Counts."""\n'
        "@overload\ndef f(a: str) -> str: ...\n"
    )
    write(site, {"p/__init__.py": "", "p/only.pyi": overloads})
    assert docs(read("p")) == {"p.only.f": "Counts."}


def test_every_kind_of_object_is_distinguished(site: Path) -> None:
    code = (
        '"""A module."""\nSIZE = 3\n"""A size."""\n'
        'def f():\n    """A function."""\n'
        'async def g():\n    """A coroutine."""\n'
        'class C:\n    """A class."""\n'
        '    def m(self):\n        """A method."""\n'
        '    @staticmethod\n    def s():\n        """A static method."""\n'
        '    @property\n    def q(self):\n        """A property."""\n'
        '    class D:\n        """A class in a class."""\n'
    )
    write(site, {"p.py": code})
    assert {one.name: one.kind for one in read("p").objects} == {
        "p": "module",
        "SIZE": "attribute",
        "f": "function",
        "g": "function",
        "C": "class",
        "C.m": "method",
        "C.s": "method",
        "C.q": "property",
        "C.D": "class",
    }


def test_names_imported_for_type_checkers_only_are_not_there(site: Path) -> None:
    guarded = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from p._x import C\n"
    write(site, {"p/__init__.py": guarded, "p/_x.py": 'class C:\n    """A class."""\n'})
    assert docs(read("p")) == {}


def test_what_python_warns_of_in_other_peoples_code_is_not_shown(site: Path) -> None:
    # Warnings are errors in these tests.
    write(site, {"p.py": '"""A module."""\n__all__ = []\nx = "\\d"\n'})
    assert docs(read("p")) == {"p": "A module."}
    assert read("p").skipped == {}


ALL = {
    '__all__ = ["a", "b"]': {"p.a", "p.b"},
    '__all__ = ("a",) + ("b",)': {"p.a", "p.b"},
    '__all__ = ["a"]\n__all__ += ["b"]': {"p.a", "p.b"},
    '__all__ = ["a"]\n__all__.extend(["b"])\n__all__.append("c")': {"p.a", "p.b", "p.c"},
    "from p import _x\n__all__ = [*_x.__all__]": {"p.d"},
    "from p import _x\n__all__ = list(_x.__all__) + ['a']": {"p.a", "p.d"},
    "from p import _x\n__all__ = _x.__all__.copy()": {"p.d"},
    "from p._x import __all__": {"p.d"},
    "from p import _x\n__all__ = ['a']\nfor m in (_x,):\n    __all__.extend(m.__all__)": {
        "p.a",
        "p.d",
    },
    "__all__ = []": set(),
    "__all__ = ['a']\n__all__.extend(dir())": {"p.a", "p.b", "p.c", "p.d"},
    "__all__ = [name for name in dir()]": {"p.a", "p.b", "p.c", "p.d"},
}


@pytest.mark.parametrize("statement", ALL)
def test_all_is_read_in_every_form_it_is_written(site: Path, statement: str) -> None:
    functions = "".join(f'def {name}():\n    """It works."""\n' for name in "abc")
    other = '__all__ = ["d"]\ndef d():\n    """It works."""\n'
    start = f"from p._x import *\n{functions}{statement}\n"
    write(site, {"p/__init__.py": start, "p/_x.py": other})
    assert docs(read("p")).keys() == ALL[statement]


def test_tests_are_left_out_and_counted(site: Path) -> None:
    names = ["a", "tests/test_a", "test_b", "conftest", "testing", "contest"]
    write(site, {f"p/{name}.py": '"""A module."""\n' for name in ["__init__", *names]})
    found = read("p")
    assert docs(found).keys() == {"p", "p.a", "p.testing", "p.contest"}
    assert found.skipped == {"p: test modules (3)": "they document tests"}


def test_a_namespace_package_needs_no_init(site: Path) -> None:
    write(site, {"n/part/sub.py": '"""A module."""\n', "n/data/file.txt": ""})
    assert docs(read("n")) == {"n.part.sub": "A module."}


def test_several_processes_read_the_same_as_one(site: Path) -> None:
    files = {f"p/m{number}.py": f'"""Module {number}."""\n' for number in range(210)}
    write(site, {"p/__init__.py": "", **files})
    steps: list[tuple[int, int]] = []
    [package], _ = find_packages(["p"])
    together = read_package(package, workers=2, report=lambda *step: steps.append(step))
    assert together == read("p", workers=1)
    assert len(docs(together)) == 210
    assert steps == [(done, 211) for done in range(1, 212)]


# Real packages


def test_the_standard_librarys_private_halves_are_its_own() -> None:
    found = docs(read("collections"))
    assert found["collections.deque"].endswith("near its endpoints.")
    assert "os.Mapping" not in docs(read("os"))


def test_a_builtin_module_is_inspected() -> None:
    assert docs(read("math"))["math.sqrt"] == "Return the square root of x."


@pytest.mark.slow
def test_numpys_compiled_functions_are_found_under_numpy() -> None:
    found = read("numpy")
    kinds = {one.path: one.kind for one in found.objects if one.doc}
    assert kinds["numpy.array"] == "function"
    assert kinds["numpy.add"] == "function"
    assert kinds["numpy.ndarray"] == "class"
    assert kinds["numpy.ndarray.sort"] == "method"
    assert kinds["numpy.random.Generator.normal"] == "method"
    assert "numpy.abs" not in kinds and "numpy.absolute" in kinds
    assert not any("._" in path for path in kinds)


@pytest.fixture(scope="module")
def mlx() -> Documentation:
    return read("mlx")


def test_mlx_is_read_whole(mlx: Documentation) -> None:
    found = docs(mlx)
    assert found["mlx.nn.relu"] == (
        "Applies the Rectified Linear Unit.\n\nSimply ``mx.maximum(x, 0)``."
    )
    assert "mlx.nn.layers.activations.relu" not in found
    assert not any(path.startswith(("mlx.core.numpy", "mlx.core.typing")) for path in found)
    assert mlx.skipped == {}
    # A decorator's docstring is not the decorated function's, which a static reader cannot miss.
    assert {"mlx.nn.gelu", "mlx.optimizers.Adam", "mlx.utils.tree_map"} <= found.keys()


def test_what_stub_and_compiled_module_describe_is_one_object_with_the_stubs_text(
    mlx: Documentation,
) -> None:
    [location] = importlib.util.find_spec("mlx").submodule_search_locations
    stub = ast.parse(Path(location, "core", "__init__.pyi").read_text(encoding="utf-8"))
    written = {
        f"mlx.core.{node.name}": ast.get_docstring(node)
        for node in stub.body
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and ast.get_docstring(node)
    }
    found = [(one.path, one.doc) for one in mlx.objects if one.path in written]
    assert len(found) == len(written) > 200
    assert dict(found) == {path: doc.strip() for path, doc in written.items()}


def test_each_path_and_each_object_appears_once(mlx: Documentation) -> None:
    paths = [one.path for one in mlx.objects]
    assert len(paths) == len(set(paths))
    assert not any(part.startswith("_") for path in paths for part in path.split("."))
