"""What the wheel installs, and that it runs beside a user's own files of the same names."""

import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

from graft.__main__ import VERBS

import pytest

from support.paths import ROOT

OWN_FILES = ("convert.py", "lora.py", "models.py", "console.py", "data.py", "server.py")


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        list(map(str, command)),
        cwd=cwd,
        env={**clean, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    files = subprocess.run(
        ["git", "-c", "safe.directory=*", "ls-files", "-z"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split("\0")
    # A copy, so that nothing is built in the checkout.
    for name in filter(None, files):
        (folder / "source" / name).parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).is_symlink():
            (folder / "source" / name).symlink_to((ROOT / name).readlink())
        elif (ROOT / name).exists():
            (folder / "source" / name).write_bytes((ROOT / name).read_bytes())
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "--no-deps"]
    run(*pip, "--wheel-dir", folder, folder / "source", cwd=folder)
    (found,) = folder.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of an environment with the wheel, and this environment's other packages."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False)
    (site,) = folder.glob("lib/python*/site-packages")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    (site / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder / "bin" / "python"


@pytest.fixture
def own_folder(tmp_path: Path) -> Path:
    """A folder of a user's own files, none of which may be imported."""
    for name in OWN_FILES:
        (tmp_path / name).write_text("raise SystemExit('the user's own file was imported')\n")
    return tmp_path


@pytest.mark.slow
def test_the_wheel_has_graft_alone_at_its_top(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"graft"}
    for name in ("models", "lora", "convert"):
        assert f"graft/{name}.py" in names
    assert {"graft/assets/mlx-docs/train.jsonl", "graft/server/page/page.html"} <= set(names)


@pytest.mark.slow
@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_runs_beside_a_user_s_own_files(
    python: Path, own_folder: Path, verb: str
) -> None:
    assert f"usage: graft {verb}" in run(python, "-m", "graft", verb, "--help", cwd=own_folder)


@pytest.mark.slow
def test_an_installation_trains_on_the_data_inside(python: Path, own_folder: Path) -> None:
    arguments = ["--train", "--iters", "1", "--val-batches", "1", "--max-seq-length", "32"]
    text = run(
        python, "-m", "graft", "lora", *arguments, "--test", "--test-batches", "1",
        cwd=own_folder, HF_HUB_OFFLINE="1", GRAFT_CACHE="off",
    )  # fmt: skip
    assert "assets/mlx-docs/train.jsonl" in text and "test loss" in text
    where = run(python, "-c", "import graft.models; print(graft.models.__file__)", cwd=own_folder)
    assert Path(where.strip()).parent.parent.name == "site-packages"


def test_both_names_of_a_root_module_are_one_module_in_a_checkout() -> None:
    for first, second in (("models", "graft.models"), ("graft.models", "models")):
        code = f"import {first}, {second}, sys; assert sys.modules['{first}'] is "
        code += f"sys.modules['{second}']; import lora, graft.lora; "
        code += "assert lora is graft.lora and graft.models"
        run(sys.executable, "-c", code, cwd=ROOT, GRAFT_BLAS="off")


def test_a_user_s_own_models_is_theirs(own_folder: Path) -> None:
    (own_folder / "models.py").write_text("mine = True\n")
    code = "import graft, graft.models, models; assert models.mine and graft.models.LoRALinear"
    run(sys.executable, "-c", code, cwd=own_folder, PYTHONPATH=str(ROOT))
