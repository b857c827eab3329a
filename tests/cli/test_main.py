"""graft/__main__.py: the verb table."""

import os
import resource
import subprocess
import sys
from pathlib import Path

from graft import __main__, __version__
from graft.adapters.formats.graft import write_adapter

import pytest

from support.fusion_cases import adapted
from support.paths import ROOT
from support.tiny import write_model


def graft(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """Run `python -m graft` as a user does."""
    return subprocess.run(
        [sys.executable, "-m", "graft", *arguments],
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize("verb", __main__.VERBS)
def test_every_verb_answers_help(verb: str) -> None:
    done = graft(verb, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("usage: ")
    assert "--help" in done.stdout


@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_help_lists_every_verb(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert __main__.main([flag]) == 0
    printed = capsys.readouterr().out
    for verb, (_, text) in __main__.VERBS.items():
        assert f"  {verb} " in printed
        assert text in printed


def test_version_is_the_package_s(capsys: pytest.CaptureFixture[str]) -> None:
    assert __main__.main(["--version"]) == 0
    assert capsys.readouterr().out == f"graft {__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["datset", "mlx"], "unknown verb 'datset': did you mean 'dataset'?"),
        (["train"], "unknown verb 'train': did you mean 'lora'?"),
        (["generate"], "unknown verb 'generate': did you mean 'lora'?"),
        (["xyzzy"], "unknown verb 'xyzzy': there are "),
        ([], "no verb given; name one of "),
    ],
)
def test_a_wrong_verb_is_one_line_with_the_nearest_right_one(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert __main__.main(arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith(f"error: {said}")
    assert printed.err.count("\n") == 1


def test_a_verb_gets_the_rest_of_the_arguments_and_returns_its_status(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "echo_verb.py").write_text("def main(argv):\n    return len(argv)\n")
    monkeypatch.setattr(sys, "argv", ["graft"])
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    monkeypatch.setitem(__main__.VERBS, "echo", ("echo_verb:main", "count the arguments"))
    assert __main__.main(["echo", "a", "--help", "--version"]) == 3
    assert sys.argv[0] == "graft echo"


def test_a_user_s_own_modules_are_not_taken_for_graft_s(tmp_path: Path) -> None:
    for name in ("lora", "models", "convert"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('the wrong module')\n")
    done = graft("lora", "--help", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("usage: ")


def _limit_files() -> None:
    """Files of at most 3,000 bytes, as on a disk that is full."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))


@pytest.mark.slow
@pytest.mark.parametrize(
    "command",
    [
        "convert --hf-path model --mlx-path new/model",
        "fuse adapters.npz --model model --out new/model",
        "merge adapters.npz adapters.npz --out new/merged",
        "merge adapters.npz adapters.npz --out new/merged.safetensors",
        "export adapters.npz --to peft --out new/peft",
        "export adapters.npz --to mlx-lm --out new/mlx",
        "export adapters.npz --to gguf --model model --out new/adapter.gguf",
        "dataset yaml --out new/data",
    ],
)
def test_what_finds_no_room_is_one_line_and_leaves_nothing(tmp_path: Path, command: str) -> None:
    write_adapter(tmp_path / "adapters.npz", adapted(write_model(tmp_path / "model"))[1])
    before = sorted(tmp_path.rglob("*"))
    done = subprocess.run(
        [sys.executable, "-m", "graft", *command.split()],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"},
        preexec_fn=_limit_files,
        capture_output=True,
        text=True,
    )
    assert done.returncode in (1, 2) and "new/" in done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: "), done.stderr
    assert done.stderr.count("error") == 1 and "Traceback" not in done.stderr
    assert sorted(tmp_path.rglob("*")) == before
