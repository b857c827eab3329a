"""No input ends in a traceback, a hang or a full memory: it is read, or refused in one line.

Inputs are seeded changes to small valid files, options and requests. `GRAFT_FUZZ_SEED` chooses
others, `GRAFT_FUZZ_COUNT` how many; the message of a failure says how to repeat it alone.
"""

import contextlib
import io
import json
import os
import random
import resource
import shlex
import shutil
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from graft.__main__ import main as graft
from graft.adapters.formats.graft import write_adapter

import mlx.core as mx
import numpy as np
import pytest

from support import adapter_cases, fuzz, tiny, torch_zip
from support.layouts import WIDE, write_meta
from support.live_server import serve

SEED = int(os.environ.get("GRAFT_FUZZ_SEED", "0"))
COUNT = int(os.environ.get("GRAFT_FUZZ_COUNT", "1000"))
QUICK_COUNT = 100
MOST_SECONDS, MOST_GROWTH_BYTES = 10, 1 << 30


class TooLongError(BaseException):
    """A command did not end in time."""


@dataclass(frozen=True)
class Case:
    """A command, and how one of its inputs is changed.

    Attributes:
        command: the arguments of `graft`, in the folder with the samples.
        file: what is changed; `None` changes an option.
        change: makes the content of the file.
        options: options of which one is added, with a bad value.
    """

    command: str
    file: str | None = None
    change: fuzz.Change = fuzz.change_bytes
    options: Sequence[str] = ()


TEST_CHATS = "lora --test --model model --data chats.jsonl --valid-fraction 0.5 --mask-prompt"


def adapters() -> Iterator[Case]:
    files: dict[str, list[fuzz.Change]] = {
        "npz/adapters.npz": [fuzz.change_bytes, fuzz.change_zip, fuzz.change_npy],
        "npz/adapter_config.json": [fuzz.change_json, fuzz.change_bytes],
        "safe/adapters.safetensors": [fuzz.change_bytes, fuzz.change_safetensors],
        "peft/adapter_model.safetensors": [fuzz.change_bytes, fuzz.change_safetensors],
        "peft/adapter_config.json": [fuzz.change_json, fuzz.change_bytes],
        "bin/adapter_model.bin": [fuzz.change_bytes, fuzz.change_zip],
        "mlx/adapters.safetensors": [fuzz.change_safetensors],
        "mlx/adapter_config.json": [fuzz.change_json, fuzz.change_bytes],
        "gguf/adapter.gguf": [fuzz.change_bytes],
        "ggla/ggml-adapter-model.bin": [fuzz.change_bytes],
        "old/adapters.npz": [fuzz.change_bytes, fuzz.change_zip, fuzz.change_npy],
    }
    for file, changes in files.items():
        folder = file.partition("/")[0]
        for change in changes:
            yield Case(f"inspect {folder}", file, change)
            yield Case(f"export {folder} --to peft --model model --out out", file, change)
            yield Case(f"merge {folder} npz --out out --model model", file, change)


def others() -> Iterator[Case]:
    fuse = "fuse npz --model model --out out --check-data text.txt"
    yield Case(fuse, "npz/adapters.npz", fuzz.change_zip)
    yield Case(fuse, "npz/adapter_config.json", fuzz.change_json)
    yield Case(fuse, "model/config.json", fuzz.change_json)
    yield Case(fuse, "model/model.safetensors", fuzz.change_safetensors)
    extract = "extract --base source --tuned tuned --rank 1 --out out"
    yield Case(extract, "tuned/model.safetensors", fuzz.change_safetensors)
    yield Case(extract, "tuned/config.json", fuzz.change_json)
    chat = "chat --model model --max-tokens 2 --adapters npz"
    yield Case(chat, "model/tokenizer_config.json", fuzz.change_template)
    yield Case(chat, "model/config.json", fuzz.change_json)
    yield Case(chat, "npz/adapters.npz", fuzz.change_npy)
    yield Case("targets --model quantized --method loftq", "quantized/model.safetensors")


def models() -> Iterator[Case]:
    changed: dict[str, list[fuzz.Change]] = {
        "model.safetensors": [fuzz.change_bytes, fuzz.change_safetensors],
        "config.json": [fuzz.change_json, fuzz.change_json, fuzz.change_bytes],
        "tokenizer_config.json": [fuzz.change_json, fuzz.change_template],
        "tokenizer.json": [fuzz.change_bytes],
        "generation_config.json": [fuzz.change_json],
    }
    for file, changes in changed.items():
        for change in changes:
            yield Case(TEST_CHATS, f"model/{file}", change)
            yield Case("convert --hf-path model --mlx-path out", f"model/{file}", change)
            if "token" not in file:
                yield Case("targets --model model --targets q_proj", f"model/{file}", change)
    yield Case("convert --hf-path model --mlx-path out -q", "model/config.json", fuzz.change_json)
    yield Case("targets --model quantized", "quantized/config.json", fuzz.change_json)
    for change in (fuzz.change_bytes, fuzz.change_zip):
        yield Case("convert --torch-path meta --mlx-path out", "meta/consolidated.00.pth", change)
    yield Case("convert --torch-path meta --mlx-path out", "meta/params.json", fuzz.change_json)
    yield Case("convert --torch-path meta --mlx-path out", "meta/tokenizer.model")
    for change in (fuzz.change_bytes, fuzz.change_zip):
        yield Case("convert --hf-path torch --mlx-path out", "torch/pytorch_model-1.bin", change)
    index = "torch/pytorch_model.bin.index.json"
    yield Case("convert --hf-path torch --mlx-path out", index, fuzz.change_json)
    for change in (fuzz.change_bytes, fuzz.change_npy):
        yield Case("convert --hf-path wide --mlx-path out", "wide/weights.npz", change)
        yield Case("targets --model wide", "wide/weights.npz", change)


def data() -> Iterator[Case]:
    for file, change in {
        "chats.jsonl": fuzz.change_lines,
        "rows.jsonl": fuzz.change_lines,
        "text.txt": fuzz.change_bytes,
    }.items():
        command = (
            TEST_CHATS if file == "chats.jsonl" else f"lora --test --model model --data {file}"
        )
        yield Case(command, file, change)
        yield Case(command, file)
    for _ in range(3):
        yield Case("targets --config run.yaml", "run.yaml", fuzz.change_yaml)
    yield Case("targets --config run.yaml", "run.yaml")


def options() -> Iterator[Case]:
    for names in (
        "model data adapter-file seed valid-fraction overlap max-seq-length add-eos-token",
        "batch-size val-batches test-batches memory-budget workers rank alpha rank-pattern config",
        "alpha-pattern dropout learning-rate targets method lora-layers num-tokens temp",
    ):
        yield Case("lora --test --model model --data rows.jsonl", options=names.split())
    training = "resume-adapter-file iters epochs warmup-steps weight-decay grad-clip early-stop"
    yield Case("lora --train --model model --data nothing.jsonl", options=training.split())
    yield Case(
        "targets --model model", options=["targets", "rank", "alpha", "rank-pattern", "lora-layers"]
    )
    yield Case("inspect npz", options=["alpha"])
    for to in ("peft", "mlx-lm", "gguf", "npz"):
        names = ["model", "alpha", "upload-repo", "out"]
        yield Case(f"export npz --to {to} --out out --model model", options=names)
    merging = ["weights", "rank", "density", "seed", "model", "out", "method"]
    yield Case("merge npz safe --out out", options=merging)
    yield Case(
        "extract --base model --tuned model --rank 1 --out out", options=["base", "rank", "out"]
    )
    converting = ["mlx-path", "q-bits", "q-group-size", "q-skip", "hf-path", "torch-path", "dtype"]
    yield Case("convert --hf-path model --mlx-path out -q", options=converting)
    yield Case(
        "fuse nothing --out out", options=["model", "q-bits", "max-kl", "check-data", "alpha"]
    )
    chatting = [
        "model",
        "adapters",
        "adapter",
        "system",
        "format",
        "max-tokens",
        "temperature",
        "top-p",
        "seed",
        "stop",
    ]
    yield Case("chat --model model", options=[*chatting, "max-adapters", "max-rank"])
    serving = [
        "model",
        "name",
        "adapters",
        "max-adapters",
        "max-rank",
        "host",
        "port",
        "max-rows",
        "timeout",
    ]
    yield Case("serve --model nothing", options=serving)
    yield Case(
        "dataset nothing-at-all --out out", options=["out", "max-chars", "test-fraction", "seed"]
    )
    yield Case("bench nothing", options=["repeats", "folder", "json"])


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one small valid file of every kind."""
    folder = tmp_path_factory.mktemp("samples")
    model = tiny.write_model(folder / "model")
    (model / "tokenizer.model").unlink()
    tiny.write_hugging_face_tokenizer(model)
    settings = json.loads((model / "tokenizer_config.json").read_text())
    template = "{% for m in messages %}{{ m.role + ': ' + m.content + '<|end|>' }}{% endfor %}"
    settings["chat_template"] = template
    (model / "tokenizer_config.json").write_text(json.dumps(settings))
    (model / "generation_config.json").write_text('{"eos_token_id": [0, 2]}')
    tiny.write_model(folder / "wide", WIDE, form="npz")
    tiny.write_model(folder / "quantized", {**tiny.LLAMA, "num_hidden_layers": 1}, bits=4)
    write_meta(folder / "meta", tiny.write_model(folder / "source", WIDE))
    tiny.write_model(folder / "tuned", WIDE, seed=1)
    adapter = adapter_cases.make_adapter()
    for name, file in (("npz", "adapters.npz"), ("safe", "adapters.safetensors")):
        (folder / name).mkdir()
        write_adapter(folder / name / file, adapter)
    for name, form in (("peft", "peft"), ("mlx", "mlx-lm")):
        adapter_cases.export(adapter, folder / name, to=form, base=adapter_cases.BASE)
    for name in ("gguf", "ggla", "old", "folder", "bin"):
        (folder / name).mkdir()
    shutil.copy(folder / "peft" / "adapter_config.json", folder / "bin")
    arrays = mx.load(str(folder / "peft" / "adapter_model.safetensors"))
    assert isinstance(arrays, dict)
    tensors = {name: np.array(array) for name, array in arrays.items()}
    torch_zip.save(folder / "bin" / "adapter_model.bin", tensors)
    shutil.copytree(model, folder / "torch")
    arrays = mx.load(str(model / "model.safetensors"))
    assert isinstance(arrays, dict)
    tensors = {name: np.array(array) for name, array in arrays.items()}
    torch_zip.save(folder / "torch" / "pytorch_model-1.bin", tensors)
    (folder / "torch" / "model.safetensors").unlink()
    names = dict.fromkeys(tensors, "pytorch_model-1.bin")
    (folder / "torch" / "pytorch_model.bin.index.json").write_text(
        json.dumps({"weight_map": names})
    )
    half = adapter_cases.half_layer()
    content = adapter_cases.gguf(half, adapter_cases.METADATA)
    square = adapter_cases.half_layer(outputs=64)
    (folder / "gguf" / "adapter.gguf").write_bytes(content)
    halves = {"layers.0.attention.wq.weight.loraA": square["blk.0.attn_v.weight.lora_a"].T}
    halves["layers.0.attention.wq.weight.loraB"] = square["blk.0.attn_v.weight.lora_b"]
    (folder / "ggla" / "ggml-adapter-model.bin").write_bytes(adapter_cases.ggla(halves))
    adapter_cases.old_npz(folder / "old" / "adapters.npz")
    tiny.write_rows(folder, rows=["The quick brown fox.", "jumps over"] * 2)
    calls = [{"function": {"name": "f", "arguments": '{"a": [1, 2]}'}}]
    messages = [
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hi", "tool_calls": calls},
    ]
    row = {"messages": messages, "tools": [{"type": "function", "function": {"name": "f"}}]}
    other = {"messages": [{"role": "user", "content": "A"}, {"role": "assistant", "content": "B"}]}
    (folder / "chats.jsonl").write_text(f"{json.dumps(row)}\n{json.dumps(other)}\n" * 2)
    (folder / "text.txt").write_text("The quick brown fox jumps over the lazy dog.\n" * 9)
    (folder / "run.yaml").write_text("model: model\nrank: 4\ntargets: q_proj\nalpha: 8.0\n")
    os.mkfifo(folder / "pipe")
    os.symlink("loop", folder / "loop")
    return folder


class Runner:
    """Runs cases in a folder with the samples, and puts the samples back after each."""

    def __init__(self, samples: Path, place: Path) -> None:
        self.samples, self.place = samples, place
        shutil.copytree(
            samples, place, symlinks=True, ignore=lambda *_: ["pipe"], dirs_exist_ok=True
        )
        os.mkfifo(place / "pipe")
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as bound:
            bound.bind("socket")

    def run(self, case: Case, rng: random.Random) -> str | None:
        """What is wrong with how the command ended, or `None`."""
        argv = shlex.split(case.command)
        if case.options:
            argv += [f"--{rng.choice(list(case.options))}", rng.choice(fuzz.TEXTS)]
        if case.file is not None:
            content = (self.samples / case.file).read_bytes()
            (self.place / case.file).write_bytes(case.change(rng, content))
        try:
            return self._problem(argv)
        finally:
            if case.file is not None:
                shutil.copyfile(self.samples / case.file, self.place / case.file)
            for name in set(os.listdir(self.place)) - set(os.listdir(self.samples)) - {"socket"}:
                path = self.place / name
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    def _problem(self, argv: list[str]) -> str | None:
        before, start = peak_bytes(), time.monotonic()
        errors, status = io.StringIO(), None
        signal.alarm(MOST_SECONDS)
        try:
            with (
                contextlib.redirect_stderr(errors),
                contextlib.redirect_stdout(io.StringIO()),
            ):
                status = graft(argv)
        except BaseException:
            problem = traceback.format_exc()
            return f"{' '.join(argv)[:300]!r} raised\n{problem}"
        finally:
            signal.alarm(0)
        information = ("note: ", "adapter ")
        lines = [x for x in errors.getvalue().splitlines() if not x.startswith(information)]
        told = len(lines) == 1 and lines[0].startswith("error: ")
        seconds, growth = time.monotonic() - start, peak_bytes() - before
        shown = f"{' '.join(argv)[:300]!r} ended with {status} after {seconds:.1f} s"
        if status not in (0, 2) or (status == 2 and not told):
            return f"{shown}: {lines}"
        if growth > MOST_GROWTH_BYTES:
            return f"{shown}: {growth >> 20} MiB more memory"
        return None


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def too_long(number: int, frame: FrameType | None) -> None:
    raise TooLongError


@pytest.fixture
def runner(
    samples: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[Case, random.Random], str | None]]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hello\n/adapters\n"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    before = signal.signal(signal.SIGALRM, too_long)
    yield Runner(samples, tmp_path).run
    signal.signal(signal.SIGALRM, before)


def test_unchanged_inputs_are_read(runner: Callable[[Case, random.Random], str | None]) -> None:
    cases = [case for kind in (adapters, models, data, others) for case in kind()]
    for command in dict.fromkeys(case.command for case in cases):
        assert graft(shlex.split(command)) == 0, command
        shutil.rmtree("out", ignore_errors=True)


@pytest.mark.parametrize("name", fuzz.KNOWN)
def test_what_once_failed_is_read_or_refused_in_one_line(
    name: str, runner: Callable[[Case, random.Random], str | None], samples: Path
) -> None:
    command, file, content = fuzz.KNOWN[name]
    if file == fuzz.CONFIG:  # one key, in place of what the file has
        config = (samples / file).read_bytes()
        content = config.rstrip(b" }\n") + b", " + content + b"}"
    problem = runner(Case(command, file, lambda rng, old: content), random.Random(0))
    assert problem is None


def check(runner: Callable[[Case, random.Random], str | None], seed: int, count: int) -> None:
    """Run `count` changed inputs; those of one kind of input are as many as of another."""
    kinds = [list(kind()) for kind in (adapters, models, data, options, others)]
    failures = []
    for number in range(count):
        rng = random.Random(f"{seed} {number}")
        case = rng.choice(kinds[number % len(kinds)])
        only = os.environ.get("GRAFT_FUZZ_ONLY")
        if only is not None and number != int(only):
            continue
        if problem := runner(case, rng):
            again = f"GRAFT_FUZZ_SEED={seed} GRAFT_FUZZ_ONLY={number}"
            failures.append(f"{again}: {case.file or case.options}: {problem}")
    assert not failures, f"{len(failures)} of {count}:\n" + "\n".join(failures)


def test_a_changed_input_is_read_or_refused_in_one_line(
    runner: Callable[[Case, random.Random], str | None],
) -> None:
    check(runner, SEED, QUICK_COUNT)


@pytest.mark.slow
def test_a_thousand_changed_inputs_are_read_or_refused_in_one_line(
    runner: Callable[[Case, random.Random], str | None],
) -> None:
    check(runner, SEED, COUNT)


def bodies() -> Iterator[tuple[str, bytes]]:
    """A path, and a valid body for it."""
    messages = [
        {"role": "user", "content": "Hello"},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
            ],
        },
        {"role": "tool", "tool_call_id": "1", "content": "5"},
    ]
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
    common = {"model": "tiny", "max_tokens": 1, "temperature": 0.5, "top_p": 0.9, "seed": 1}
    common |= {"stop": ["a"], "stream": False, "logprobs": True}
    chat = {**common, "messages": messages, "tools": tools, "top_logprobs": 2}
    completion = {**common, "prompt": "Hello", "echo": True, "logprobs": 2}
    for path, body in {
        "/v1/chat/completions": chat,
        "/v1/completions": completion,
        "/v1/load_lora_adapter": {"lora_name": "a", "lora_path": "small"},
        "/v1/unload_lora_adapter": {"lora_name": "a"},
        "/lora-adapters": [{"id": 0, "scale": 0.5}],
    }.items():
        yield path, json.dumps(body).encode()


def check_requests(folder: Path, seed: int, count: int) -> None:
    """Post changed bodies to a server; each is answered or refused within ten seconds."""
    failures = []
    valid = list(bodies())
    with serve(folder, allow_load=True) as live:
        for number in range(count):
            rng = random.Random(f"{seed} {number}")
            path, body = rng.choice(valid)
            body = rng.choice((fuzz.change_json, fuzz.change_json, fuzz.change_bytes))(rng, body)
            start = time.monotonic()
            status, _ = live.post(path, body)
            if not (status == 200 or 400 <= status < 500) or time.monotonic() - start > 10:
                failures.append(f"seed {seed}, {number}: {status} for {path} {body[:1000]!r}")
    assert not failures, "\n".join(failures)


def test_a_changed_request_is_answered_or_refused(tmp_path: Path) -> None:
    check_requests(tmp_path, SEED, 50)


@pytest.mark.slow
def test_many_changed_requests_are_answered_or_refused(tmp_path: Path) -> None:
    check_requests(tmp_path, SEED, COUNT // 2)
