"""graft/exporting/adapter.py: what the command makes of an adapter, and what it refuses."""

import json
from pathlib import Path

import graft  # noqa: F401
from graft.adapters.adapter import Adapter
from graft.adapters.files import load_adapter
from graft.adapters.formats.graft import write_adapter
from graft.adapters.layer_config import LayerConfig
from graft.cli import export as exporting
from graft.errors import InputError
from graft.exporting.adapter import export

import mlx.core as mx
import pytest

from support.tiny import LLAMA, write_model

Q = "model.layers.0.self_attn.q_proj"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """An adapter of a base in a folder, in Graft's own form."""
    write_model(tmp_path / "base")
    tensors = {
        f"{Q}.lora_a": 0.1 * mx.random.normal((64, 4), key=mx.random.key(0)),
        f"{Q}.lora_b": 0.1 * mx.random.normal((4, 64), key=mx.random.key(1)),
    }
    adapter = Adapter(tensors, {Q: LayerConfig(4, 6.0)}, str(tmp_path / "base"))
    write_adapter(tmp_path / "run" / "adapters.npz", adapter)
    return tmp_path


@pytest.mark.parametrize("form", ["npz", "mlx-lm", "peft", "gguf"])
def test_the_base_of_the_record_is_enough(
    form: str, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = run / ("a.gguf" if form == "gguf" else "out")
    assert exporting.main([str(run / "run"), "--to", form, "--out", str(out)]) == 0
    base = f"{run / 'base'}, a path on this machine (--model OWNER/NAME records a Hub name)"
    said = f"wrote {out}: 1 layers; recorded base model: {base}\n"
    assert capsys.readouterr().out == said
    first, again = load_adapter(run / "run"), load_adapter(out)
    assert {p: (s.rank, s.alpha) for p, s in again.layers.items()} == {Q: (4, 6.0)}
    assert mx.array_equal(first.tensors[f"{Q}.lora_a"], again.tensors[f"{Q}.lora_a"])


@pytest.mark.parametrize("recorded", [True, False])
@pytest.mark.parametrize("form", ["npz", "mlx-lm", "peft", "gguf"])
def test_a_base_that_the_adapter_does_not_fit_is_refused(
    form: str, recorded: bool, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = write_model(run / "other", {**LLAMA, "hidden_size": 128})
    if recorded:
        (run / "base").rename(run / "aside")
        other.rename(run / "base")
    arguments = [] if recorded else ["--model", str(other)]
    assert exporting.main([str(run / "run"), "--to", form, "--out", "x.gguf", *arguments]) == 2
    said = capsys.readouterr().err
    assert f"base model {run / ('base' if recorded else 'other')}: " in said
    assert f"{Q}.lora_a has shape (64, 4), the model needs (128, 4)" in said
    assert said.count("\n") == 1 and not Path("x.gguf").exists()


def test_an_adapter_of_no_model_folder_is_exported_as_it_is(run: Path) -> None:
    """Such as one that was trained with Graft's layers in a model of one's own."""
    path = run / "own" / "adapters.npz"
    tensors = {"tower.q_proj.lora_a": mx.ones((6, 2)), "tower.q_proj.lora_b": mx.ones((2, 4))}
    write_adapter(path, Adapter(tensors, {"tower.q_proj": LayerConfig(2, 2.0)}))
    assert exporting.main([str(path), "--to", "peft", "--out", str(run / "out")]) == 0
    again = load_adapter(run / "out").tensors
    assert mx.array_equal(again["tower.q_proj.lora_b"], tensors["tower.q_proj.lora_b"])


@pytest.mark.parametrize("form", ["mlx-lm", "peft", "gguf"])
def test_the_hub_s_name_of_the_base_goes_before_a_place_on_this_machine(
    form: str, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = json.loads((run / "base" / "config.json").read_text())
    (run / "base" / "config.json").write_text(json.dumps({**config, "_name_or_path": "owner/base"}))
    out = run / ("a.gguf" if form == "gguf" else "out")
    assert exporting.main([str(run / "run"), "--to", form, "--out", str(out)]) == 0
    assert "recorded base model: owner/base\n" in capsys.readouterr().out
    assert load_adapter(out).base_model == "owner/base"


def test_a_gguf_that_tells_its_order_goes_to_peft_with_the_base_named(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gguf, out = str(run / "a.gguf"), str(run / "out")
    assert exporting.main([str(run / "run"), "--to", "gguf", "--out", gguf]) == 0
    (run / "base").rename(run / "moved")  # where no record finds it
    assert exporting.main([gguf, "--to", "peft", "--out", out]) == 2
    said = capsys.readouterr().err
    assert "--model" in said and said.count("\n") == 1
    model = ["--model", str(run / "moved")]
    assert exporting.main([gguf, "--to", "peft", "--out", out, *model]) == 0
    first, again = load_adapter(run / "run").tensors, load_adapter(run / "out").tensors
    assert mx.array_equal(first[f"{Q}.lora_b"], again[f"{Q}.lora_b"])


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--to", "gguf", "--out", "out"], "ends in .gguf"),
        (["--to", "onnx", "--out", "out"], "invalid choice: 'onnx'"),
        (["--to", "peft"], "--out"),
        (["--to", "peft", "--out", "out", "--upload-repo", "mine"], "names of the form owner/name"),
        (["--to", "gguf", "--out", "a.gguf", "--model", "gone"], "no model folder gone"),
    ],
)
def test_a_wrong_command_is_one_line(
    arguments: list[str],
    named: str,
    run: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(run)
    assert exporting.main(["run", *arguments]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and named in said
    assert not Path("out").exists()


def test_what_exists_is_replaced_with_force_alone(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(run / "run"), "--to", "npz", "--out", str(run / "out")]
    assert exporting.main(arguments) == 0
    assert exporting.main(arguments) == 2
    assert "--force" in capsys.readouterr().err
    assert exporting.main([*arguments, "--force"]) == 0


def test_the_library_takes_names_as_text(run: Path) -> None:
    adapter = load_adapter(str(run / "run"))
    assert export(adapter, str(run / "a.gguf"), to="gguf", base=str(run / "base")) == []
    assert load_adapter(str(run / "a.gguf")).layers == {Q: LayerConfig(4, 6.0)}
    with pytest.raises(InputError, match="no format 'onnx'"):
        export(adapter, str(run / "a"), to="onnx")
