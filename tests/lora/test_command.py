"""Options, interruption and bad input of the command."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import lora
from graft.adapters.files import load_adapter
from graft.pretrained.tokenizer import SentencePieceTokenizer
from graft.storage import atomic

import mlx.core as mx
import pytest

from support import tiny
from support.lora_runs import execute, losses, metrics, run, same_tensors, snapshot, train, wait_for
from support.paths import ROOT


class TestOptions:
    def test_the_mlx_examples_options_are_taken(self, here: Path) -> None:
        """Names as in mlx-examples/lora/lora.py, both its first and its last version."""
        parser = lora.build_parser()
        text = (
            "--model m --max-tokens 5 -m 6 --num-tokens 7 -n 8 --write-every 1 --temp 0.5 "
            "--prompt a -p b --train --add-eos-token 1 --data d --lora-layers 4 --batch-size 2 "
            "--iters 9 --val-batches -1 --learning-rate 1e-5 --steps-per-report 3 "
            "--steps-per-eval 4 --resume-adapter-file r.npz --adapter-file a.npz --save-every 5 "
            "--test --test-batches 500 --seed 1"
        )
        given = parser.parse_args(text.split())
        assert (given.num_tokens, given.prompt, given.val_batches) == (8, "b", -1)
        assert {"train", "test", "adapter_file", "resume_adapter_file"} <= set(vars(given))

    def test_the_command_line_wins_over_a_config_file(self, here: Path) -> None:
        Path("run.yaml").write_text("train: true\niters: 2\nlearning-rate: 0.01\nrank: 4\n")
        assert run("--config", "run.yaml", "--rank", "2") == 0
        record = load_adapter(Path("adapters/adapters.npz"))
        assert {setting.rank for setting in record.layers.values()} == {2}
        assert [m["step"] for m in metrics() if m["kind"] == "eval"] == [0, 2]
        assert record.options["learning_rate"] == 0.01

    def test_a_saved_records_options_are_a_config_file(self, here: Path) -> None:
        assert train("--rank", "4") == 0
        saved = json.loads(Path("adapters/adapter_config.json").read_text())["options"]
        Path("again.yaml").write_text(json.dumps({**saved, "adapter_file": "again/a.npz"}))
        assert lora.main(["--config", "again.yaml"]) == 0
        same_tensors("adapters/adapters.npz", "again/a.npz")

    def test_everything_in_one_go(self, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
        arguments = ("--test", "--prompt", "The", "--temp", "0", "--num-tokens", "4")
        assert train("--iters", "20", *arguments) == 0
        together = capsys.readouterr()
        assert together.err == ""
        assert run(*arguments) == 0
        apart = capsys.readouterr().out.splitlines()
        assert together.out.splitlines()[-1] == apart[-1]

    def test_help_answers_without_the_slow_imports(self) -> None:
        code = (
            "import sys, lora\n"
            "try: lora.main(['--help'])\n"
            "except SystemExit as end: assert end.code == 0\n"
            "slow = {'mlx_lm', 'transformers', 'torch', 'huggingface_hub', 'sentencepiece'}\n"
            "assert not slow & set(sys.modules), slow & set(sys.modules)\n"
        )
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
        assert (done.returncode, done.stderr) == (0, "")
        assert "--learning-rate" in done.stdout

    def test_output_that_is_no_terminal_is_plain_lines(
        self, here: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert train("--test") == 0
        said = capsys.readouterr()
        assert said.err == "" and "\x1b" not in said.out and "\r" not in said.out
        lines = said.out.splitlines()
        assert [line.split(":")[0] for line in lines[:4]] == ["train", "valid", "test", "adapter"]
        assert [line.split(":")[0] for line in lines[4:6]] == ["training", "memory"]
        assert lines[6].startswith("step     0  valid loss 6.")
        assert lines[-1].startswith("step     3  test loss")


class TestInterruption:
    def test_ctrl_c_saves_the_adapter(self, here: Path) -> None:
        arguments = ["--train", "--iters", "100000", "--save-every", "1", "--val-batches", "1"]
        command = [sys.executable, str(ROOT / "lora.py"), "--model", "whole", "--data", "data"]
        child = subprocess.Popen(
            [*command, *arguments], cwd=here, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )  # fmt: skip
        wait_for(Path("adapters/adapter_config.json"), child)
        child.send_signal(signal.SIGINT)
        _, errors = child.communicate(timeout=60)
        assert (child.returncode, errors) == (130, b"")
        assert not [name for name in os.listdir("adapters") if name.startswith(".tmp")]
        assert run("--test") == 0

    def test_ctrl_c_ends_an_answer_with_one_line(self, here: Path) -> None:
        tiny.write_model(Path("long"), {**tiny.LLAMA, "max_position_embeddings": 1_000_000})
        command = [sys.executable, str(ROOT / "lora.py"), "--model", "long", "-p", "The\n"]
        options = ["-n", "1000000", "--temp", "0", "--adapter-file", "none"]
        child = subprocess.Popen(
            [*command, *options], cwd=here, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )  # fmt: skip
        assert child.stdout is not None and child.stdout.readline() == b"The\n"
        child.stdout.read(1)  # of the answer, which is then under way
        child.send_signal(signal.SIGINT)
        _, errors = child.communicate(timeout=60)
        assert errors == b"note: no adapter: this is the base model\ninterrupted\n"
        assert child.returncode == 130

    def test_a_crash_while_saving_leaves_the_previous_adapter(
        self, here: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        assert train() == 0
        before = load_adapter(Path("adapters/adapters.npz")).tensors

        def crash(path: Path) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(atomic, "_flush", crash)
        assert train() == 130
        monkeypatch.undo()
        os.chdir(here)
        after = load_adapter(Path("adapters/adapters.npz")).tensors
        assert all(mx.array_equal(before[name], after[name]).item() for name in before)
        assert not [name for name in os.listdir("adapters") if name.startswith(".tmp")]


# What is wrong -> the options, and words that the one line must have.
MISTAKES: dict[str, tuple[list[str], list[str]]] = {
    "nothing to do": ([], ["nothing to do", "--train, --test or --prompt"]),
    "no such option": (["--trian"], ["--trian"]),
    "no number": (["--train", "--rank", "four"], ["--rank", "'four'"]),
    "no value": (["--test", "--prompt"], ["--prompt"]),
    "no data folder": (["--train", "--data", "nowhere"], ["nowhere", "graft dataset"]),
    "data is a file": (["--train", "--data", "whole/config.json"], ["whole/config.json"]),
    "no model folder": (["--test", "--model", "./nowhere"], ["nowhere"]),
    "model is a file": (["--test", "--model", "whole/config.json"], ["whole/config.json", "file"]),
    "rank 0": (["--train", "--rank", "0"], ["--rank 0", "at least 1"]),
    "rank too large": (["--train", "--rank", "65"], ["rank 65", "model.layers.0", "64"]),
    "layers too many": (["--train", "--lora-layers", "4"], ["--lora-layers 4", "3 layers"]),
    "layers 0": (["--train", "--lora-layers", "0"], ["--lora-layers 0", "1 to 3"]),
    "layers -2": (["--train", "--lora-layers", "-2"], ["--lora-layers -2", "-1 for all"]),
    "no such target": (["--train", "--targets", "q_prjo,k_proj"], ["q_prjo", "q_proj, up_proj"]),
    "dropout 1": (["--train", "--dropout", "1"], ["--dropout 1", "below 1"]),
    "dropout below 0": (["--train", "--dropout", "-0.1"], ["--dropout -0.1", "at least 0"]),
    "batch size 0": (["--train", "--batch-size", "0"], ["--batch-size 0", "at least 1"]),
    "iters 0": (["--train", "--iters", "0"], ["--iters 0", "at least 1"]),
    "rate nan": (["--train", "--learning-rate", "nan"], ["--learning-rate", "nan"]),
    "temperature below 0": (["--prompt", "a", "--temp", "-1"], ["--temp -1", "at least 0"]),
    "seed too large": (["--train", "--seed", "4294967296"], ["--seed 4294967296", "4294967295"]),
    "no validation": (["--train", "--val-batches", "0"], ["--val-batches", "-1 for all"]),
    "two mistakes": (["--train", "--rank", "0", "--iters", "0"], ["--rank 0", "--iters 0"]),
    "training without a place": (["--train", "--adapter-file", "none"], ["--adapter-file none"]),
    "no format": (["--train", "--adapter-file", "out/a.bin"], ["out/a.bin", ".npz"]),
    "below a file": (
        ["--train", "--adapter-file", "whole/config.json/a.npz"],
        ["cannot write whole/config.json/a.npz", "is a file"],
    ),
    "over a folder": (["--train", "--adapter-file", "folder.npz"], ["folder.npz", "folder"]),
    "no such adapter": (["--test", "--adapter-file", "out/a.npz"], ["no adapter out/a.npz"]),
    "resume nothing": (["--train", "--resume-adapter-file", "a.npz"], ["no adapter a.npz"]),
    "resume without training": (
        ["--test", "--resume-adapter-file", "a.npz"],
        ["--resume-adapter-file", "--train"],
    ),
    "no config file": (["--config", "nowhere.yaml"], ["nowhere.yaml"]),
}  # fmt: skip


def refused(
    arguments: list[str], words: list[str], capsys: pytest.CaptureFixture[str], where: Path
) -> None:
    """`lora.py` says one line with these words, ends with 2 and writes nothing."""
    before = snapshot(where)
    capsys.readouterr()
    assert lora.main(["--model", "whole", "--data", "data", *arguments]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1, said
    assert all(word in said for word in words), said
    assert snapshot(where) == before


class TestBadInput:
    @pytest.mark.parametrize("mistake", MISTAKES)
    def test_a_mistaken_option(
        self, here: Path, capsys: pytest.CaptureFixture[str], mistake: str
    ) -> None:
        Path("folder.npz").mkdir()
        arguments, words = MISTAKES[mistake]
        refused(arguments, words, capsys, here)

    @pytest.mark.parametrize(
        ("content", "words"),
        [
            (None, ["bad/train.jsonl is missing"]),
            ("", ["bad/train.jsonl is empty"]),
            ("\n  \n", ["bad/train.jsonl is empty"]),
            ('{"text": "a"}\n{"text": \n', ["bad/train.jsonl:2", "broken JSON"]),
            ('{"text": "a"}\n\n{"question": "b"}\n', ["bad/train.jsonl:3", "'question'"]),
            ('["a"]\n{"text": 5}\n', ["bad/train.jsonl:1", "list", "bad/train.jsonl:2", "5"]),
            (b'{"text": "\xff"}\n', ["bad/train.jsonl", "utf-8"]),
        ],
        ids=["missing", "empty", "blank", "broken", "no text", "two rows", "not UTF-8"],
    )
    def test_data_that_cannot_be_read(
        self,
        here: Path,
        capsys: pytest.CaptureFixture[str],
        content: str | bytes | None,
        words: list[str],
    ) -> None:
        tiny.write_rows(Path("bad"), valid=["a"])
        if content is not None:
            raw = content if isinstance(content, bytes) else content.encode()
            Path("bad/train.jsonl").write_bytes(raw)
        refused(["--train", "--data", "bad"], words, capsys, here)

    @pytest.mark.parametrize("split", ["train", "test"])
    def test_a_missing_split(
        self, here: Path, capsys: pytest.CaptureFixture[str], split: str
    ) -> None:
        shutil.copytree("data", "less")
        Path("less", f"{split}.jsonl").unlink()
        arguments = ["--train", "--test", "--data", "less"]
        refused(arguments, [f"less/{split}.jsonl is missing"], capsys, here)

    @pytest.mark.parametrize("form", ["safetensors", "npz"])
    @pytest.mark.parametrize("kept", [0.0, 0.001, 0.5, 0.999])
    def test_truncated_weights(
        self, here: Path, capsys: pytest.CaptureFixture[str], form: str, kept: float
    ) -> None:
        tiny.write_model(Path("torn"), form=form)
        (file,) = [*Path("torn").glob("*.safetensors"), *Path("torn").glob("*.npz")]
        with file.open("r+b") as opened:
            opened.truncate(int(file.stat().st_size * kept))
        refused(["--train", "--model", "torn"], [file.name, "damaged"], capsys, here)

    @pytest.mark.parametrize(
        ("change", "words"),
        [
            ({"model_type": "nonesuch"}, ["nonesuch", "architecture"]),
            ({"model_type": None}, ["architecture"]),
            ({"num_hidden_layers": 4}, ["model.layers.3.mlp.up_proj.weight is missing"]),
            ({"num_hidden_layers": 2}, ["model.layers.2.mlp.up_proj.weight is not part of"]),
            ({"intermediate_size": 96}, ["model.layers.0.mlp.up_proj.weight", "(128, 64)", "96"]),
            ({"hidden_size": None}, ["config.json"]),
            ({"quantization": {"group_size": 32}}, ["quantization", "bits"]),
        ],
        ids=["architecture", "no type", "missing", "left over", "shape", "no size", "bits"],
    )
    def test_a_configuration_that_does_not_fit(
        self,
        here: Path,
        capsys: pytest.CaptureFixture[str],
        change: dict[str, Any],
        words: list[str],
    ) -> None:
        shutil.copytree("whole", "other")
        Path("other/config.json").write_text(json.dumps({**tiny.LLAMA, **change}))
        refused(["--train", "--model", "other"], words, capsys, here)

    @pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.model"])
    def test_a_folder_that_lacks_a_file(
        self, here: Path, capsys: pytest.CaptureFixture[str], name: str
    ) -> None:
        shutil.copytree("whole", "less")
        Path("less", name).unlink()
        refused(["--train", "--model", "less"], ["less", name.split(".")[0]], capsys, here)

    def test_an_adapter_that_does_not_fit(
        self, here: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """Another width, fewer layers: every tensor is named, whatever it is wanted for."""
        tiny.write_model(Path("wide"), {**tiny.LLAMA, "intermediate_size": 160})
        tiny.write_model(Path("flat"), {**tiny.LLAMA, "num_hidden_layers": 1})
        assert train("--targets", "up_proj", "--lora-layers", "2") == 0
        both = ["model.layers.1.mlp.up_proj", "model.layers.2.mlp.up_proj"]
        name = "adapters/adapters.npz"
        refused(["--test", "--model", "wide"], [*both, "(8, 128)", "(8, 160)"], capsys, here)
        refused(["--prompt", "a", "--model", "flat"], [*both, name], capsys, here)
        resume = ["--train", "--resume-adapter-file", name, "--adapter-file", "out/a.npz"]
        refused([*resume, "--model", "flat"], [*both, name], capsys, here)

    def test_a_damaged_adapter(self, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
        for form in ("npz", "safetensors"):
            assert train("--adapter-file", f"{form}/a.{form}") == 0
            file = Path(form, f"a.{form}")
            whole, record = file.read_bytes(), file.with_name("adapter_config.json").read_text()
            file.write_bytes(whole[: len(whole) // 2])
            arguments = ["--test", "--adapter-file", str(file)]
            refused(arguments, [str(file), "damaged"], capsys, here)
            file.write_bytes(whole)
            file.with_name("adapter_config.json").write_text(record[: len(record) // 2])
            refused(arguments, [f"{form}/adapter_config.json", "JSON"], capsys, here)
            file.with_name("adapter_config.json").unlink()
            if form == "safetensors":  # an npz without a record is the MLX example's
                refused(arguments, [f"{form}/adapter_config.json is missing"], capsys, here)

    @pytest.mark.parametrize(
        ("content", "words"),
        [
            ("itres: 5\nrank: big\n", ["itres", "iters", "rank", "'big'", "int"]),
            ("train: [\n", ["bad.yaml", "YAML"]),
            ("just words\n", ["bad.yaml", "no options"]),
            ("rank: 0\n", ["--rank 0"]),
        ],
        ids=["names and types", "no YAML", "no options", "out of range"],
    )
    def test_a_config_file(
        self, here: Path, capsys: pytest.CaptureFixture[str], content: str, words: list[str]
    ) -> None:
        Path("bad.yaml").write_text(content)
        refused(["--train", "--config", "bad.yaml"], words, capsys, here)

    def test_an_empty_prompt_without_a_start_token(
        self, here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert train() == 0
        monkeypatch.setattr(
            SentencePieceTokenizer, "encode_many", lambda self, texts, **settings: [([], None)]
        )
        refused(["--prompt", ""], ["the prompt is empty"], capsys, here)

    @pytest.mark.parametrize(
        "arguments",
        [
            ["--train", "--data", "bad"],
            ["--train", "--data", "data", "--targets", "nonesuch"],
            ["--train", "--data", "data", "--model", "torn"],
            ["--train", "--data", "data", "--adapter-file", "whole/config.json/a.npz"],
        ],
        ids=["row", "target", "weights", "output"],
    )
    def test_as_a_person_meets_it(self, here: Path, arguments: list[str]) -> None:
        tiny.write_rows(Path("bad"), valid=["a"])
        Path("bad/train.jsonl").write_text('{"text": "a"}\n{"txt": "b"}\n')
        shutil.copytree("whole", "torn")
        Path("torn/model.safetensors").write_bytes(b"\x08\0\0")
        before = snapshot(here)
        done = execute("--model", "whole", *arguments, cwd=here)
        assert done.returncode == 2
        assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
        assert snapshot(here) == before


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_every_quantization_loads_trains_a_step_and_generates(
    here: Path, capsys: pytest.CaptureFixture[str], bits: int, group_size: int
) -> None:
    config = {**tiny.LLAMA, "hidden_size": 128, "num_hidden_layers": 1}
    tiny.write_model(Path("model"), config, bits=bits, group_size=group_size)
    arguments = ("--iters", "1", "--val-batches", "1", "--prompt", "The", "--num-tokens", "3")
    assert train(*arguments, model="model") == 0
    assert losses(step=1, kind="eval") < losses(step=0, kind="eval")
    assert capsys.readouterr().out.splitlines()[-1].startswith("The")
