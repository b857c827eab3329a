"""Generation from the command line."""

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import lora
from graft.adapters.adapter import apply_adapter
from graft.adapters.files import load_adapter
from graft.cli import chat
from graft.engine.engine import Engine
from graft.pretrained.load import load_model
from graft.training.options import Options

import mlx.core as mx
import mlx.nn as nn
import pytest

from support.lora_runs import run
from support.paths import ROOT


class Recorder:
    """Standard output that remembers what had been written at each flush."""

    def __init__(self) -> None:
        self.text = ""
        self.flushed: list[str] = []

    def write(self, text: str) -> int:
        self.text += text
        return len(text)

    def flush(self) -> None:
        self.flushed.append(self.text)


def answer(model: nn.Module, tokenizer: Any, prompt: str, **settings: Any) -> str:
    """What `lora.print_answer` prints."""
    with pytest.MonkeyPatch.context() as patch:
        recorder = Recorder()
        patch.setattr(sys, "stdout", recorder)
        lora.print_answer(model, tokenizer, Options(prompt=prompt, **{"temp": 0.0, **settings}))
    return recorder.text


def piped(content: bytes) -> io.TextIOWrapper:
    """Standard input with this content."""
    return io.TextIOWrapper(io.BytesIO(content), encoding="utf-8")


class TestGenerate:
    def test_at_temperature_0_each_token_is_the_likeliest(self, here: Path) -> None:
        """Against whole forward passes without a cache."""
        model, tokenizer, _ = load_model("whole")
        ids = tokenizer.encode("The quick")
        for _ in range(12):
            ids.append(mx.argmax(model(mx.array([ids]))[0, -1]).item())
        assert tokenizer.eos_token_id not in ids
        expected = tokenizer.decode(ids) + "\n"
        for seed in (0, 1):
            assert answer(model, tokenizer, "The quick", num_tokens=12, seed=seed) == expected

    def test_sampling_is_repeatable_with_a_seed(self, here: Path) -> None:
        model, tokenizer, _ = load_model("whole")
        first, second, other = (
            answer(model, tokenizer, "The", temp=0.8, seed=seed, num_tokens=20)
            for seed in (3, 3, 4)
        )
        assert first == second != other

    @pytest.mark.parametrize("every", [1, 4])
    def test_the_answer_appears_while_it_is_made(
        self, here: Path, monkeypatch: pytest.MonkeyPatch, every: int
    ) -> None:
        model, tokenizer, _ = load_model("whole")
        recorder = Recorder()
        monkeypatch.setattr(sys, "stdout", recorder)
        options = Options(prompt="The", temp=0.0, num_tokens=12, write_every=every)
        lora.print_answer(model, tokenizer, options)
        assert recorder.flushed[0] == "The"
        assert recorder.flushed[-1] == recorder.text
        # The prompt, every so many of the 12 tokens, and the end.
        assert len(recorder.flushed) >= 1 + 12 // every + 1

    def test_as_many_tokens_as_asked_for(self, here: Path) -> None:
        model, tokenizer, _ = load_model("whole")
        short = answer(model, tokenizer, "The", num_tokens=3).rstrip("\n")
        assert answer(model, tokenizer, "The", num_tokens=6).startswith(short)

    def test_an_empty_prompt_starts_from_the_start_token(
        self, here: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert run("--prompt", "", "--temp", "0", "--num-tokens", "4") == 0
        assert capsys.readouterr().out.strip()

    def test_ids_above_the_tokenizers_vocabulary_have_no_text(self, shared: Path) -> None:
        """As models with a padded embedding may give."""
        _, tokenizer, _ = load_model(shared / "whole")
        ids = tokenizer.encode("The fox")
        assert tokenizer.decode([*ids, 400, 511]) == tokenizer.decode(ids)

    @pytest.mark.parametrize("kind", ["chat", "text"])
    def test_what_was_trained_on_chats_is_asked_as_a_chat(
        self,
        here: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
        kind: str,
    ) -> None:
        talk = [{"role": "user", "content": "The"}, {"role": "assistant", "content": ""}]
        rows = [
            {"messages": [talk[0], {**talk[1], "content": f"fox {number}"}]}
            if kind == "chat"
            else {"text": f"The fox {number}"}
            for number in range(8)
        ]
        lines = [json.dumps(row) + "\n" for row in rows]
        Path("rows.jsonl").write_text("".join(lines))
        data = ("--data", "rows.jsonl")
        arguments = ("--prompt", "The", "--temp", "0", "--num-tokens", "6", *data)
        assert run("--train", "--iters", "1", "--val-batches", "1", *arguments) == 0
        trained = capsys.readouterr()
        assert run(*arguments) == 0
        loaded = capsys.readouterr()
        model, tokenizer, _ = load_model("whole")
        apply_adapter(model, load_adapter("adapters"), name="adapters")
        prompt = "User: The\nAssistant:" if kind == "chat" else "The"
        with Engine(model, tokenizer) as engine:
            expected = engine.generate(prompt, max_tokens=6).text
        start = "The\n" if kind == "chat" else "The"
        assert loaded.out == f"{start}{expected}\n"
        assert trained.out.endswith(loaded.out)
        said = "the prompt is sent as a user's message"
        assert (said in trained.err, said in loaded.err) == (kind == "chat",) * 2
        monkeypatch.setattr(sys, "stdin", io.StringIO(""))
        assert chat.main(["--model", "whole", "--adapters", "adapters", "-n", "1"]) == 0
        warned = "adapters was trained on rows of the form text, not on conversations"
        assert (warned in capsys.readouterr().err) == (kind == "text")

    def test_the_prompt_may_come_from_standard_input(
        self, here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        options = ("--temp", "0", "--num-tokens", "4", "--adapter-file", "none")
        assert run("--prompt", "The quick\nfox", *options) == 0
        given = capsys.readouterr().out
        monkeypatch.setattr(sys, "stdin", piped(b"The quick\nfox\n"))
        assert run("--prompt", "-", *options) == 0
        assert capsys.readouterr().out == given
        monkeypatch.setattr(sys, "stdin", piped(b"\xff"))
        assert run("--prompt", "-", *options) == 2
        assert "--prompt -: standard input is not text" in capsys.readouterr().err

    def test_the_reader_of_a_pipe_may_leave(self, here: Path) -> None:
        command = [sys.executable, str(ROOT / "lora.py"), "--model", "whole", "-p", "The\n"]
        options = ["-n", "5000", "--write-every", "1", "--adapter-file", "none"]
        child = subprocess.Popen(
            [*command, *options], stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=here
        )
        assert child.stdout is not None and child.stderr is not None
        assert child.stdout.readline() == b"The\n"
        child.stdout.close()
        assert child.stderr.read() == b"note: no adapter: this is the base model\n"
        child.stderr.close()
        assert child.wait(timeout=60) == 1
