"""Adapters that come and go between steps, requests that end early, failures and closing.

Expected answers are mlx-lm's `generate_step` on the base with the adapter attached.
"""

import gc
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

from graft.engine.engine import Engine
from graft.engine.errors import (
    AdapterAlreadyLoaded,
    AdapterBusy,
    AdapterDoesNotFit,
    AdapterNotFound,
    EngineClosed,
    EngineFailed,
    PromptTooLong,
    QueueFull,
    RankTooLarge,
    TooManyAdapters,
)
from graft.errors import InputError
from graft.pretrained.tokenizer import Tokenizer

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from support.engines import NAMES, WAIT, alone, held_up, ids_of, prompt_of, wait_for
from support.served import Adapter, make_adapter, write
from support.tiny import LLAMA, make_model

# Loading


def test_adapters_tell_what_they_are(engine: Engine, files: dict[str, Path]) -> None:
    for name in ("two", "thirty"):
        engine.load_adapter(name, files[name])
    first, second = engine.adapters()
    assert (first.id, first.name, first.rank, first.path) == (0, "two", 2, str(files["two"]))
    assert second.targets == ("model.layers.1.mlp.up_proj",)
    assert second.bytes == 4 * 32 * (64 + 128)  # rank 30 is padded to 32
    assert engine.bank_bytes > engine.stats().bank_bytes > first.bytes + second.bytes


def test_the_five_limits_of_loading(
    model: nn.Module, tokenizer: Tokenizer, files: dict[str, Path], tmp_path: Path
) -> None:
    other = make_model({**LLAMA, "hidden_size": 32})
    foreign = write(tmp_path / "foreign", make_adapter(other, targets="q_proj", rank=2))
    with Engine(model, tokenizer, max_adapters=1, max_rank=8) as engine:
        with pytest.raises(RankTooLarge, match="twelve has rank 12 and the limit is 8"):
            engine.load_adapter("twelve", files["twelve"])
        with pytest.raises(AdapterNotFound, match="no adapter at"):
            engine.load_adapter("a", tmp_path / "nothing")
        with pytest.raises(AdapterDoesNotFit, match="q_proj"):
            engine.load_adapter("a", foreign)
        engine.load_adapter("two", files["two"])
        with pytest.raises(AdapterAlreadyLoaded):
            engine.load_adapter("two", files["four"])
        with pytest.raises(TooManyAdapters):
            engine.load_adapter("four", files["four"])
        for missing in (
            lambda: engine.unload_adapter("four"),
            lambda: engine.submit([1], adapters={"four": 1.0}),
        ):
            with pytest.raises(AdapterNotFound, match="'four'"):
                missing()
        stopped, go_on = held_up(engine)
        stream = engine.submit([5, 6], adapters={"two": 1.0}, max_tokens=3)
        assert stopped.wait(WAIT)
        with pytest.raises(AdapterBusy, match="in use by 1 requests"):
            engine.unload_adapter("two")
        go_on()
        assert len(ids_of(stream)) == 3
        engine.unload_adapter("two")
        assert engine.adapters() == []


def test_unloading_can_wait_for_the_requests(engine: Engine, files: dict[str, Path]) -> None:
    engine.load_adapter("two", files["two"])
    stopped, go_on = held_up(engine)
    stream = engine.submit([5, 6], adapters={"two": 1.0}, max_tokens=5)
    assert stopped.wait(WAIT)
    with pytest.raises(AdapterBusy, match="in use"):
        engine.unload_adapter("two", wait=True, timeout=0.01)
    thread = threading.Thread(target=lambda: engine.unload_adapter("two", wait=True))
    thread.start()
    wait_for(lambda: engine._adapters.find("two").leaving)
    with pytest.raises(AdapterNotFound):  # no new ones meanwhile
        engine.submit([5], adapters={"two": 1.0})
    go_on()
    thread.join(WAIT)
    assert not thread.is_alive() and engine.adapters() == []
    assert len(ids_of(stream)) == 5


def test_a_replacement_is_for_new_requests_alone(
    model: nn.Module, tokenizer: Tokenizer, adapters: dict[str, Adapter], files: dict[str, Path]
) -> None:
    prompt = prompt_of(9, 5)
    expected = [alone(model, prompt, adapters[name], 12) for name in ("two", "sixty-four")]
    assert expected[0] != expected[1]
    with Engine(model, tokenizer, max_adapters=1) as engine:
        before = engine.load_adapter("a", files["two"])
        stream = engine.submit(prompt, adapters={"a": 1.0}, max_tokens=12)
        assert stream.get(WAIT) is not None
        stopped, go_on = held_up(engine)
        assert stopped.wait(WAIT)
        loading = threading.Thread(
            target=lambda: engine.load_adapter("a", files["sixty-four"], replace=True)
        )
        loading.start()
        go_on()
        loading.join(WAIT)
        after = engine.adapters()[0]
        new = engine.submit(prompt, adapters={"a": 1.0}, max_tokens=12)
        rest = [token.id for piece in stream for token in piece.tokens]
        assert rest == expected[0][1:]
        assert ids_of(new) == expected[1]
        assert after.digest != before.digest and after.id == before.id
        wait_for(lambda: engine.stats().bank_bytes == 2 * after.bytes)
        engine.load_adapter("a", files["two"], replace=True)
        assert ids_of(engine.submit(prompt, adapters={"a": 1.0}, max_tokens=12)) == expected[0]


def test_loading_and_unloading_change_nothing_for_those_that_run(
    model: nn.Module, tokenizer: Tokenizer, adapters: dict[str, Adapter], files: dict[str, Path]
) -> None:
    prompts = [prompt_of(number, 6) for number in range(8)]
    names = [NAMES[number % 4] for number in range(8)]
    expected = [
        alone(model, prompt, adapters[name], 60)
        for prompt, name in zip(prompts, names, strict=True)
    ]
    with Engine(model, tokenizer) as engine:
        for name in NAMES[:4]:
            engine.load_adapter(name, files[name])
        streams = [
            engine.submit(prompt, adapters={name: 1.0}, max_tokens=60)
            for prompt, name in zip(prompts, names, strict=True)
        ]
        changes = 0
        while not all(stream.ended for stream in streams):
            engine.load_adapter("new", files[NAMES[4 + changes % 3]])
            engine.unload_adapter("new")
            changes += 1
        assert [ids_of(stream) for stream in streams] == expected
        assert changes > 2


@pytest.mark.usefixtures("exact_memory")
def test_swaps_leave_the_base_and_give_the_memory_back(
    model: nn.Module, tokenizer: Tokenizer, files: dict[str, Path]
) -> None:
    arrays = dict(tree_flatten(model.parameters()))
    before = {name: np.array(array).tobytes() for name, array in arrays.items()}
    with Engine(model, tokenizer, prompt_cache_bytes=0) as engine:

        def swap_all() -> int:
            for name in NAMES:
                engine.load_adapter("a", files[name])
                engine.generate([5, 6, 7], adapters={"a": 1.0}, max_tokens=2)
                engine.unload_adapter("a")
            gc.collect()
            return mx.get_active_memory()

        first = swap_all()
        swap_all()
        assert swap_all() <= first
        assert engine.stats().bank_bytes == 0
    after = dict(tree_flatten(model.parameters()))
    assert all(after[name] is array for name, array in arrays.items())
    assert {name: np.array(array).tobytes() for name, array in after.items()} == before


# Requests that end early, and engines


def test_a_cancelled_request_frees_its_row_and_its_adapter(
    model: nn.Module, tokenizer: Tokenizer, files: dict[str, Path]
) -> None:
    with Engine(model, tokenizer, max_rows=1) as engine:
        engine.load_adapter("two", files["two"])
        running = engine.submit([5, 6], adapters={"two": 1.0}, max_tokens=400)
        waiting = engine.submit([5, 6], adapters={"two": 1.0}, max_tokens=400)
        third = engine.submit([5, 6], max_tokens=3)
        assert running.get(WAIT) is not None and waiting.state == "queued"
        waiting.cancel()
        wait_for(lambda: waiting.ended)
        steps = engine.stats().steps
        running.cancel()
        wait_for(lambda: running.ended)
        assert engine.stats().steps - steps < 400
        assert (running.state, waiting.state) == ("cancelled", "cancelled")
        assert len(ids_of(third)) == 3
        assert waiting.get() is None
        engine.unload_adapter("two")
        scored = engine.submit(prompt_of(0, 300), max_tokens=0, echo=True)
        scored.cancel()
        wait_for(lambda: scored.ended)
        assert len(engine.generate([5], max_tokens=2).tokens) == 2


def test_cancelling_twice_is_cancelling_once(model: nn.Module, tokenizer: Tokenizer) -> None:
    with Engine(model, tokenizer, max_rows=1) as engine:
        stopped, go_on = held_up(engine)
        running, waiting = (engine.submit([5], max_tokens=400) for _ in range(2))
        assert stopped.wait(WAIT)
        for stream in (running, running, waiting, waiting):
            stream.cancel()
        go_on()
        wait_for(lambda: running.ended and waiting.ended)
        assert (running.state, waiting.state) == ("cancelled", "cancelled")
        assert len(engine.generate([5], max_tokens=2).tokens) == 2


def test_a_full_queue_says_when_to_try_again(model: nn.Module, tokenizer: Tokenizer) -> None:
    with Engine(model, tokenizer, max_rows=1, max_queue=2) as engine:
        stopped, go_on = held_up(engine)
        first = engine.submit([5], max_tokens=2)
        assert stopped.wait(WAIT)
        others = [engine.submit([5], max_tokens=2) for _ in range(2)]
        with pytest.raises(QueueFull, match=r"2 requests are waiting.*try again in 1 s") as error:
            engine.submit([5])
        assert error.value.retry_after_seconds == 1.0
        go_on()
        assert [len(ids_of(stream)) for stream in (first, *others)] == [2, 2, 2]


def test_a_prompt_that_is_too_long_is_told_with_its_tokens(engine: Engine) -> None:
    with pytest.raises(PromptTooLong, match="513 tokens; shorten it to 512") as error:
        engine.submit([5] * 513)
    assert (error.value.tokens, error.value.limit) == (513, 512)
    assert len(engine.generate([5] * 510, max_tokens=20).tokens) == 2  # the context's end


def test_bad_requests_are_refused_before_they_have_a_row(engine: Engine) -> None:
    for prompt in ("", []):
        bad: dict[str, Any] = {"prompt": prompt} if prompt else {"prompt": []}
        with pytest.raises(InputError, match="empty"):
            engine.submit(**bad)
    with pytest.raises(InputError, match="not UTF-8 at character 2"):
        engine.submit("a\ud800")
    with pytest.raises(InputError, match=r"temperature -1 .*top_p 2 "):
        engine.submit([5], temperature=-1, top_p=2)
    with pytest.raises(InputError, match="below 512: 512"):
        engine.submit([5, 512])
    with pytest.raises(InputError, match="stop"):
        engine.submit([5], stop="x")
    assert engine.stats().running == engine.stats().queued == 0


def test_a_step_that_fails_ends_its_requests_and_no_other(engine: Engine) -> None:
    expected = ids_of(engine.submit([5, 6], max_tokens=4))

    def fail() -> None:
        engine._loop.batcher.step = step  # type: ignore[method-assign]
        raise RuntimeError("out of memory\nat line 3")

    step = engine._loop.batcher.step
    engine._loop.batcher.step = fail  # type: ignore[method-assign]
    stream = engine.submit([5, 6], max_tokens=4)
    with pytest.raises(
        EngineFailed, match="a step of the batch failed: RuntimeError: out of memory"
    ):
        stream.result()
    assert stream.state == "failed"
    assert ids_of(engine.submit([5, 6], max_tokens=4)) == expected


def test_an_adapter_that_cannot_be_installed_leaves_no_trace(
    engine: Engine, files: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = ids_of(engine.submit([5, 6], max_tokens=4))

    def fail(*_: Any) -> None:
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(engine._bank, "_append", fail)
        with pytest.raises(EngineFailed, match=r"changing the adapters failed: .* out of memory"):
            engine.load_adapter("two", files["two"])
    assert engine.adapters() == [] and engine.stats().bank_bytes == 0
    assert ids_of(engine.submit([5, 6], max_tokens=4)) == expected
    assert engine.load_adapter("two", files["two"]).id == 0


def test_what_fails_outside_of_steps_fails_everything_and_hangs_nothing(
    model: nn.Module, tokenizer: Tokenizer, files: dict[str, Path]
) -> None:
    with Engine(model, tokenizer) as engine:

        def fail() -> None:
            raise RuntimeError("a bug")

        engine._loop._admit = fail  # type: ignore[method-assign]
        with pytest.raises(EngineFailed, match="the engine failed: RuntimeError: a bug"):
            engine.generate([5, 6], max_tokens=4)
        with pytest.raises(EngineClosed):
            engine.load_adapter("two", files["two"])


def test_closing_lets_what_runs_end_within_the_time(model: nn.Module, tokenizer: Tokenizer) -> None:
    names = [name for name, _ in model.named_modules()]
    engine = Engine(model, tokenizer)
    stream = engine.submit([5, 6], max_tokens=20)
    engine.close(timeout=WAIT)
    assert (stream.state, len(ids_of(stream))) == ("finished", 20)
    for refused in (
        lambda: engine.submit([5]),
        lambda: engine.load_adapter("a", "a"),
        lambda: engine.unload_adapter("a"),
    ):
        with pytest.raises(EngineClosed):
            refused()
    engine.close()
    assert [name for name, _ in model.named_modules()] == names


def test_closing_cancels_the_rest_and_leaves_no_thread(
    model: nn.Module, tokenizer: Tokenizer, files: dict[str, Path]
) -> None:
    expected = model(mx.array([[5, 6]]))
    before = set(threading.enumerate())
    engine = Engine(model, tokenizer, max_rows=2)
    engine.load_adapter("two", files["two"])
    streams = [engine.submit([5, 6], adapters={"two": 1}, max_tokens=400) for _ in range(4)]
    assert streams[0].get(WAIT) is not None
    engine.close()
    assert {stream.state for stream in streams} == {"cancelled"}
    assert set(threading.enumerate()) == before
    assert mx.array_equal(model(mx.array([[5, 6]])), expected)


@pytest.mark.skipif(sys.platform != "linux", reason="counts the system's threads in /proc")
def test_loading_from_many_threads_leaves_none_behind(
    model: nn.Module, tokenizer: Tokenizer, files: dict[str, Path]
) -> None:
    with Engine(model, tokenizer) as engine:

        def swap() -> None:
            engine.load_adapter("two", files["two"])
            engine.generate([5, 6], adapters={"two": 1.0}, max_tokens=2)
            engine.unload_adapter("two")

        def count_after(times: int) -> int:
            for _ in range(times):
                thread = threading.Thread(target=swap)
                thread.start()
                thread.join(WAIT)
            return len(list(Path("/proc/self/task").iterdir()))

        first = count_after(2)
        assert count_after(8) < first + 4


def test_limits_must_be_1_or_more(model: nn.Module, tokenizer: Tokenizer) -> None:
    with pytest.raises(InputError, match="max_rank 0, max_rows -1: must be a whole number, 1"):
        Engine(model, tokenizer, max_rank=0, max_rows=-1)


@pytest.mark.slow
@pytest.mark.parametrize("end", ["engine.close()", ""])
def test_a_program_that_ends_with_its_engine_ends_well(end: str, base: Path) -> None:
    """MLX's per-thread state takes the interpreter's lock when a thread ends."""
    program = (
        "import sys\nfrom graft.engine.engine import Engine\n"
        "from graft.pretrained.load import load_model\n"
        "engine = Engine(*load_model(sys.argv[1])[:2])\n"
        f"engine.generate([5, 6], max_tokens=4)\n{end}\n"
    )
    for _ in range(4):
        subprocess.run([sys.executable, "-c", program, str(base)], check=True)
