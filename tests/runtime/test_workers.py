"""Parts of a batch side by side give what the whole batch gives, the same every time."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from graft.data.batches import TrainingBatches
from graft.data.examples import Split
from graft.errors import InputError, RunError
from graft.runtime import blas
from graft.runtime import workers as workers
from graft.runtime.memory import peak_bytes, reset_peak
from graft.runtime.workers import Workers, choose_workers, in_groups
from graft.training.chunked_loss import use_chunked_loss
from graft.training.evaluate import evaluate_split
from graft.training.objectives.sft import objective as sft
from graft.training.optimizers import make_optimizer, set_learning_rate
from graft.training.step import UpdateStep, adapter_parameters

import mlx.core as mx
import pytest

from support.fast_cases import ARCHITECTURES, arrays, make_adapted, make_examples
from support.paths import ROOT

on_cpu = pytest.mark.skipif(
    sys.platform != "linux" or not workers.runs_on_cpu(), reason="workers are for Linux's CPU"
)
LENGTHS = [19, 9, 25, 2, 14, 30, 7, 22]


def train(
    name: str, number: int, *, steps: int = 3, batch_size: int = 4, **settings: Any
) -> tuple[list[float], dict[str, mx.array]]:
    """Losses and adapter after some steps in so many workers."""
    model = make_adapted(name, **settings)
    use_chunked_loss(model)
    optimizer = make_optimizer("sgd")
    batches = TrainingBatches(make_examples(LENGTHS), batch_size, workers=number)
    update = UpdateStep(model, sft, optimizer, workers=number)
    set_learning_rate(optimizer, 1e-2)
    model.train()
    losses = []
    for _ in range(steps):
        mx.random.seed(len(losses))
        losses.append(update([arrays(batch) for batch in next(batches)]).loss)
    return losses, adapter_parameters(model)


def ended(pid: int) -> bool:
    """Whether a process is gone, or nobody has asked yet how it ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def wait_for_the_end_of(pids: list[int]) -> None:
    until = time.monotonic() + 60
    while not all(map(ended, pids)):
        assert time.monotonic() < until
        time.sleep(0.01)


@on_cpu
@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_two_workers_train_as_one_does(name: str, bits: int | None) -> None:
    expected, whole = train(name, 1, bits=bits)
    found, parts = train(name, 2, bits=bits)
    assert found == pytest.approx(expected, rel=1e-5)
    for path, array in whole.items():
        assert mx.allclose(parts[path], array, rtol=1e-4, atol=1e-6), path


@on_cpu
@pytest.mark.parametrize(("number", "batch_size"), [(2, 3), (3, 4), (4, 4), (2, 8)])
def test_any_number_of_workers_trains_as_one_does(number: int, batch_size: int) -> None:
    expected, _ = train("llama", 1, batch_size=batch_size)
    found, _ = train("llama", number, batch_size=batch_size)
    assert found == pytest.approx(expected, rel=1e-5)


@on_cpu
def test_the_same_training_gives_the_same_bits() -> None:
    first, second = (train("llama", 2, steps=6, dropout=0.3) for _ in range(2))
    assert first[0] == second[0]
    for path, array in first[1].items():
        assert mx.array_equal(second[1][path], array), path


@on_cpu
def test_an_evaluation_in_workers_gives_the_same_loss() -> None:
    model = make_adapted("qwen2")
    split = Split(make_examples(LENGTHS))
    whole = evaluate_split(model, split, 3)
    for number in (2, 3, 5):
        found = evaluate_split(model, split, 3, workers=number)
        assert found.loss == pytest.approx(whole.loss, rel=1e-6)
        assert found.tokens == whole.tokens


@on_cpu
@pytest.mark.parametrize("number", [1, 2])
def test_a_training_measures_with_what_it_has_learnt_and_nothing_dropped_out(number: int) -> None:
    model, examples = make_adapted("llama", dropout=0.5), make_examples(LENGTHS)
    optimizer = make_optimizer("sgd")
    update = UpdateStep(model, sft, optimizer, workers=number)
    set_learning_rate(optimizer, 1e-1)
    batches = TrainingBatches(examples, 4, workers=number)
    losses = []
    for _ in range(3):
        update([arrays(batch) for batch in next(batches)])
        alone = evaluate_split(model, Split(examples), 3)
        found = evaluate_split(model, Split(examples), 3, workers=number, losses=update.losses)
        assert found.loss == pytest.approx(alone.loss, rel=1e-6)
        losses.append(found.loss)
    assert len(set(losses)) == 3


@on_cpu
def test_each_lane_has_a_process_and_a_blas_of_one_thread() -> None:
    functions = blas._thread_functions()
    if functions is None:
        pytest.skip("this BLAS cannot be told its threads")
    get, set_ = functions
    set_(2)

    def build(n: int) -> tuple[mx.array, mx.array, mx.array]:
        return mx.array(os.getpid()), mx.array(get()), mx.ones(n)

    with Workers(build) as side_by_side:
        for _ in range(2):
            pids, threads, ones = zip(*side_by_side([2, 3, 4]), strict=True)
            assert pids[0].item() == os.getpid()
            assert len({pid.item() for pid in pids}) == 3
            assert [count.item() for count in threads] == [1, 1, 1]
            assert [array.tolist() for array in ones] == [[1] * 2, [1] * 3, [1] * 4]
    assert get() == 2


@on_cpu
def test_workers_are_busy_at_the_same_time(tmp_path: Path) -> None:
    # From the second time on each waits for the other, so one after the other would never end.
    def build(n: int) -> mx.array:
        if n > 1:
            (tmp_path / str(n)).touch()
            until = time.monotonic() + 60
            while not all((tmp_path / name).exists() for name in ("2", "3")):
                assert time.monotonic() < until
                time.sleep(0.001)
        return mx.ones(n)

    with Workers(build) as side_by_side:
        side_by_side([1, 1])
        assert [array.size for array in side_by_side([2, 3])] == [2, 3]


@on_cpu
def test_items_and_results_are_trees_of_arrays() -> None:
    def double(item: dict[str, Any]) -> dict[str, Any]:
        return {"twice": [2 * item["x"], (item["y"],)], "name": mx.array(len(item["name"]))}

    items = [{"x": mx.arange(n), "y": mx.array([n > 2]), "name": "ab"} for n in (2, 3)]
    with Workers(double) as side_by_side:
        _, found = side_by_side(items)
    assert found["twice"][0].tolist() == [0, 2, 4]
    assert found["twice"][1][0].tolist() == [True] and found["twice"][1][0].dtype == mx.bool_
    assert found["name"].item() == 2


@on_cpu
def test_what_is_not_evaluated_yet_is_there_in_every_lane() -> None:
    # An array that waits for the first process's worker would wait for ever in another.
    table = mx.exp(mx.arange(5.0)) + 1
    with Workers(lambda n: table * n) as side_by_side:
        one, three = side_by_side([1, 3])
    assert mx.array_equal(three, one * 3)


@on_cpu
@pytest.mark.parametrize("failing", [2, 3])
def test_what_fails_in_a_lane_fails_for_the_caller(failing: int) -> None:
    def build(n: int) -> mx.array:
        if n == failing:
            raise ValueError(f"no {n}")
        return mx.ones(n)

    with Workers(build) as side_by_side:
        with pytest.raises(ValueError, match=f"no {failing}"):
            side_by_side([2, 3])
        assert [array.size for array in side_by_side([4, 5])] == [4, 5]


class Unpicklable(Exception):
    def __init__(self, one: int, two: int) -> None:
        super().__init__(f"{one} and {two}")


@on_cpu
def test_an_error_comes_with_where_it_was_even_if_it_cannot_be_pickled() -> None:
    def build(n: int) -> mx.array:
        if n == 3:
            raise Unpicklable(n, 4)
        return mx.ones(n)

    with Workers(build) as side_by_side, pytest.raises(RunError, match=r"Unp.*3 and 4") as raised:
        side_by_side([2, 3])
    assert "in build" in "".join(raised.value.__notes__)


@on_cpu
def test_processes_are_started_as_they_are_needed() -> None:
    with Workers(mx.ones) as side_by_side:
        for count in (1, 3, 2, 4):
            assert len(side_by_side(range(count))) == count
        assert len(side_by_side._processes) == 3


@on_cpu
def test_where_children_are_reaped_by_the_system_nothing_fails() -> None:
    code = (
        "import signal; signal.signal(signal.SIGCHLD, signal.SIG_IGN)\n"
        "import graft, mlx.core as mx; from graft.runtime.workers import Workers\n"
        "with Workers(mx.ones) as side_by_side: side_by_side([1, 2, 3])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, cwd=ROOT)
    assert (done.returncode, done.stderr) == (0, b"")


@on_cpu
def test_a_busy_process_ends_with_the_first() -> None:
    code = (
        "import graft, os, signal, time, mlx.core as mx\n"
        "from graft.runtime.workers import Workers\n"
        "def wait(n):\n"
        "    if n == 9: time.sleep(600)\n"
        "    return mx.ones(n)\n"
        "side_by_side = Workers(wait); side_by_side([1, 2])\n"
        "side_by_side._hand_out([(9, 0)])\n"
        "print(side_by_side._processes[0].pid, flush=True); time.sleep(1)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, cwd=ROOT, text=True, timeout=60
    )
    wait_for_the_end_of([int(done.stdout)])


@on_cpu
def test_a_process_that_is_killed_is_an_error_that_says_what_to_do() -> None:
    with Workers(mx.ones) as side_by_side:
        side_by_side([2, 3])
        os.kill(side_by_side._processes[0].pid, signal.SIGKILL)
        with pytest.raises(RunError, match="--workers 1") as raised:
            side_by_side([2, 3])
        assert raised.value.status == 137
        assert [array.size for array in side_by_side([4, 5])] == [4, 5]


@on_cpu
def test_no_more_processes_is_an_error_that_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail() -> int:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(workers.os, "fork", fail)
    with Workers(mx.ones) as side_by_side, pytest.raises(RunError, match=r"unavail.*--workers 1"):
        side_by_side([2, 3])


@on_cpu
def test_processes_end_with_the_workers() -> None:
    side_by_side = Workers(mx.ones)
    side_by_side([1, 2, 3])
    pids = [other.pid for other in side_by_side._processes]
    assert not any(map(ended, pids))
    del side_by_side
    assert all(map(ended, pids))


@on_cpu
@pytest.mark.parametrize("end", ["", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"])
def test_a_process_that_used_workers_ends_in_peace_and_leaves_none(end: str) -> None:
    code = (
        "import graft, mlx.core as mx; from graft.runtime.workers import Workers\n"
        "compiled = mx.compile(lambda x: x + 1)\n"
        "mx.eval(compiled(mx.ones(3)))\n"
        "first, second = (Workers(lambda n: compiled(mx.ones(n))) for _ in range(2))\n"
        "first([2, 3, 4]); second([2, 3, 4])\n"
        "print(*(o.pid for w in (first, second) for o in w._processes), flush=True)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code + end], capture_output=True, cwd=ROOT, text=True
    )
    assert (done.returncode, done.stderr) == (-signal.SIGKILL if end else 0, "")
    pids = [int(pid) for pid in done.stdout.split()]
    assert len(pids) == 4
    wait_for_the_end_of(pids)


@on_cpu
def test_signals_are_left_to_the_first_process() -> None:
    with Workers(mx.ones) as side_by_side:
        side_by_side([2, 3])
        for number in (signal.SIGINT, signal.SIGTERM):
            os.kill(side_by_side._processes[0].pid, number)
        assert [array.size for array in side_by_side([4, 5])] == [4, 5]


@on_cpu
@pytest.mark.usefixtures("exact_memory")
def test_the_peak_counts_what_other_processes_use_beside_what_they_share() -> None:
    before = mx.get_active_memory()
    shared = mx.ones(10**6)
    mx.eval(shared)
    reset_peak()
    with Workers(lambda n: (shared[:n] * 2).sum()) as side_by_side:
        side_by_side([10**6] * 3)
    here = mx.get_peak_memory()
    assert here - before == pytest.approx(8e6, rel=0.01)
    # Two others, each with the product only.
    assert peak_bytes() - here == pytest.approx(8e6, rel=0.01)
    reset_peak()
    assert peak_bytes() == mx.get_peak_memory()


def test_a_single_item_is_left_to_the_caller_to_evaluate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers.mx, "eval", lambda *a: pytest.fail("evaluated"))
    monkeypatch.setattr(workers, "_fork", lambda *a: pytest.fail("forked"))
    assert Workers(lambda n: n + 1)([1]) == [2]


def test_a_gpu_computes_a_batch_as_a_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "runs_on_cpu", lambda: False)
    assert choose_workers(None, 8) == choose_workers(1, 8) == 1
    with pytest.raises(InputError, match="--workers 2"):
        choose_workers(2, 8)


@on_cpu
def test_there_are_no_more_workers_than_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers.os, "sched_getaffinity", lambda _: set(range(6)), raising=False)
    monkeypatch.setattr(workers.sys, "platform", "linux")
    assert choose_workers(None, 8) == 6
    assert choose_workers(None, 4) == 4
    assert choose_workers(1, 4) == 1
    monkeypatch.setattr(workers.sys, "platform", "darwin")
    assert choose_workers(None, 8) == 1


def test_groups_are_in_order_and_the_last_one_may_be_smaller() -> None:
    assert in_groups(range(5), 2) == [range(0, 2), range(2, 4), range(4, 5)]
