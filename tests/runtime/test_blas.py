"""Mostly in child processes: what a process has loaded cannot be unloaded."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from graft.runtime import blas

import pytest

from support.paths import ROOT

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux needs a BLAS loaded")

MULTIPLY = "import mlx.core as mx; print(mx.matmul(mx.ones((2, 3)), mx.ones((3, 2))).tolist())"
FORTY_TWO = """
extern "C" void cblas_sgemm(int, int, int, int m, int n, int, float, const float *, int,
                            const float *, int, float, float *c, int ldc) {
    for (int i = 0; i < m; i++)
        for (int j = 0; j < n; j++) c[i * ldc + j] = 42;
}
"""


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run Python code in a child that starts without what this process's graft has set."""
    clean = {name: value for name, value in os.environ.items() if name != "GRAFT_BLAS"}
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=clean | environment,
        capture_output=True,
        text=True,
        check=True,
    )


@pytest.fixture
def installed() -> str:
    """Path of the optimised BLAS of this machine."""
    path = run("from graft import blas; print(blas.loaded() or '')").stdout.strip()
    return path or pytest.skip("this machine has no optimised BLAS")


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_mlx_multiplies_with_the_library_that_graft_blas_names(tmp_path: Path) -> None:
    source, library = tmp_path / "fake.cpp", tmp_path / "libfake.so"
    source.write_text(FORTY_TWO)
    subprocess.run(["g++", "-shared", "-fPIC", "-o", library, source], check=True)
    done = run(f"import graft; {MULTIPLY}", GRAFT_BLAS=str(library))
    assert done.stdout.strip() == "[[42.0, 42.0], [42.0, 42.0]]"
    assert done.stderr == ""


def test_the_library_found_is_mapped_and_owns_the_global_symbol(installed: str) -> None:
    done = run(
        f"import graft; {MULTIPLY}; from graft import blas; print(blas.loaded())"
        "; print(open('/proc/self/maps').read())"
    )
    product, path, maps = done.stdout.split("\n", 2)
    assert product == "[[3.0, 3.0], [3.0, 3.0]]"
    assert path == installed
    assert str(Path(path).resolve()) in maps
    assert done.stderr == ""


def test_off_loads_nothing_and_says_nothing() -> None:
    done = run("from graft import blas; print(blas.loaded())", GRAFT_BLAS="off")
    assert (done.stdout.strip(), done.stderr) == ("None", "")


@pytest.mark.parametrize(
    ("name", "reason"),
    [("/nowhere/libblas.so", "No such file"), ("libm.so.6", "it has no cblas_sgemm")],
)
def test_a_named_library_that_does_not_serve_is_said_and_not_replaced(
    name: str, reason: str
) -> None:
    done = run(f"import graft; {MULTIPLY}; print(graft.runtime.blas.loaded())", GRAFT_BLAS=name)
    assert done.stdout.split("\n")[:2] == ["[[3.0, 3.0], [3.0, 3.0]]", "None"]
    assert done.stderr.count("\n") == 1
    assert f"GRAFT_BLAS={name} cannot be used" in done.stderr
    assert reason in done.stderr


def test_a_preloaded_library_is_left_alone(installed: str) -> None:
    done = run("from graft import blas; print(blas.loaded())", LD_PRELOAD=installed)
    assert (done.stdout.strip(), done.stderr) == (installed, "")
    other = run(
        "from graft import blas; print(blas.loaded())", LD_PRELOAD=installed, GRAFT_BLAS="/nowhere"
    )
    assert (other.stdout.strip(), other.stderr) == (installed, "")


def test_mlx_imported_first_is_said_to_be_too_late() -> None:
    done = run("import mlx.core, graft; print(graft.runtime.blas.loaded())")
    assert done.stdout.strip() == "None"
    assert done.stderr.count("\n") == 1
    assert "import graft first" in done.stderr


@pytest.fixture
def bare_machine(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A Linux machine with MLX's CPU wheel, no BLAS, and MLX not imported yet."""
    monkeypatch.setattr(blas, "loaded", lambda: None)
    monkeypatch.setattr(blas, "_candidates", lambda: iter(["/nowhere/libblas.so"]))
    monkeypatch.setattr(blas, "_wheels_with_reference_blas", lambda: ["mlx_cpu.libs"])
    monkeypatch.delitem(sys.modules, "mlx.core", raising=False)
    monkeypatch.setenv("GRAFT_BLAS", "")
    return monkeypatch


def test_no_blas_is_said_once_with_the_remedy(
    bare_machine: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    blas.load()
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "30 to 80 times slower" in said
    assert "apt-get install libopenblas0-pthread" in said
    assert os.environ["GRAFT_BLAS"] == "off"  # what child processes inherit
    blas.load()
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("wheels", [[], ["mlx_cuda_12.libs"]])
def test_no_blas_is_not_said_where_mlx_needs_none(
    bare_machine: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], wheels: list[str]
) -> None:
    bare_machine.setattr(blas, "_wheels_with_reference_blas", lambda: wheels)
    blas.load()
    assert capsys.readouterr().err == ""


def test_the_first_candidate_that_serves_is_taken(
    bare_machine: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tried: list[str] = []

    def load_globally(name: str) -> None:
        tried.append(name)
        if name != "second":
            raise OSError(f"{name}: no such file")

    bare_machine.setattr(blas, "_load_globally", load_globally)
    bare_machine.setattr(blas, "_candidates", lambda: iter(["first", "second", "third"]))
    blas.load()
    assert tried == ["first", "second"]
    assert capsys.readouterr().err == ""


def test_other_systems_are_left_alone(
    bare_machine: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bare_machine.setattr(sys, "platform", "darwin")
    blas.load()
    assert capsys.readouterr().err == ""


def test_pypi_mkl_is_a_candidate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "lib").mkdir()
    library = tmp_path / "lib" / "libmkl_rt.so.3"
    library.touch()
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    assert str(library) in list(blas._candidates())
