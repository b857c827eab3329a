"""Parts of a batch side by side give what the whole batch gives, the same every time."""

import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import lora
from graft import blas, lanes
from graft.batches import TrainingBatches
from graft.errors import InputError
from graft.lanes import choose_lanes, groups, side_by_side
from graft.loss import avoid_whole_logits
from graft.optimizers import make_optimizer, set_learning_rate
from graft.step import UpdateStep, adapter_parameters

import mlx.core as mx
import pytest
from fast_cases import ARCHITECTURES, arrays, make_adapted, make_examples

ROOT = Path(__file__).resolve().parents[1]
on_cpu = pytest.mark.skipif(not lanes.runs_on_cpu(), reason="lanes are for the CPU")
LENGTHS = [19, 9, 25, 2, 14, 30, 7, 22]


def train(
    name: str, number: int, *, steps: int = 3, batch_size: int = 4, **settings: Any
) -> tuple[list[float], dict[str, mx.array]]:
    """Losses and adapter after some steps in so many lanes."""
    model = make_adapted(name, **settings)
    avoid_whole_logits(model)
    optimizer = make_optimizer("sgd")
    batches = TrainingBatches(make_examples(LENGTHS), batch_size, lanes=number)
    update = UpdateStep(model, lora.loss, optimizer, lanes=number)
    set_learning_rate(optimizer, 1e-2)
    model.train()
    losses = []
    for _ in range(steps):
        mx.random.seed(len(losses))
        losses.append(update([arrays(batch) for batch in next(batches)]).loss)
    return losses, adapter_parameters(model)


@on_cpu
@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_two_lanes_train_as_one_does(name: str, bits: int | None) -> None:
    expected, whole = train(name, 1, bits=bits)
    found, parts = train(name, 2, bits=bits)
    assert found == pytest.approx(expected, rel=1e-5)
    for path, array in whole.items():
        assert mx.allclose(parts[path], array, rtol=1e-4, atol=1e-6), path


@on_cpu
@pytest.mark.parametrize(("number", "batch_size"), [(2, 3), (3, 4), (4, 4), (2, 8)])
def test_any_number_of_lanes_trains_as_one_does(number: int, batch_size: int) -> None:
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
def test_an_evaluation_in_lanes_gives_the_same_loss() -> None:
    from graft.dataset import Split

    model = make_adapted("qwen2")
    split = Split(make_examples(LENGTHS))
    whole = lora.evaluate(model, split, 3)
    for number in (2, 3, 5):
        found = lora.evaluate(model, split, 3, lanes=number)
        assert found.loss == pytest.approx(whole.loss, rel=1e-6)
        assert found.tokens == whole.tokens


@on_cpu
def test_each_lane_has_a_stream_and_a_blas_of_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    functions = blas._thread_functions()
    if functions is None:
        pytest.skip("this BLAS cannot be told its threads")
    get, set_ = functions
    set_(2)
    seen = []

    def build(n: int) -> tuple[mx.Stream, mx.array]:
        seen.append(get())
        return mx.default_stream(mx.cpu), mx.ones(n)

    results = side_by_side(build, [2, 3])
    streams = {str(stream) for stream, _ in results} | {str(mx.default_stream(mx.cpu))}
    assert len(streams) == 3
    assert [array.tolist() for _, array in results] == [[1, 1], [1, 1, 1]]
    assert seen == [1, 1]
    assert get() == 2


@on_cpu
def test_lanes_are_busy_at_the_same_time() -> None:
    # Each waits for the other within its evaluation, so one after the other would never end.
    both = threading.Barrier(2, timeout=60)

    def build(n: int) -> mx.array:
        return mx.ones(n)

    evaluate = mx.eval
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lanes.mx, "eval", lambda *arrays: (both.wait(), evaluate(*arrays)))
        assert [array.size for array in side_by_side(build, [2, 3])] == [2, 3]


@on_cpu
def test_what_fails_in_a_lane_fails_for_the_caller() -> None:
    def build(n: int) -> mx.array:
        if n == 3:
            raise ValueError("three")
        return mx.ones(n)

    with pytest.raises(ValueError, match="three"):
        side_by_side(build, [2, 3])
    assert [array.size for array in side_by_side(build, [4, 5])] == [4, 5]


@on_cpu
def test_a_process_that_used_lanes_ends_in_peace() -> None:
    code = (
        "import graft, mlx.core as mx; from graft.lanes import side_by_side\n"
        "compiled = mx.compile(lambda x: x + 1)\n"
        "side_by_side(lambda n: compiled(mx.ones(n)), [2, 3])"
    )
    for _ in range(3):
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, cwd=ROOT)
        assert (done.returncode, done.stderr) == (0, b"")


def test_a_single_item_is_left_to_the_caller_to_evaluate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lanes.mx, "eval", lambda *a: pytest.fail("evaluated"))
    before = mx.default_stream(mx.default_device())
    assert side_by_side(lambda n: mx.default_stream(mx.default_device()), [1]) == [before]


def test_a_gpu_computes_a_batch_as_a_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lanes, "runs_on_cpu", lambda: False)
    assert choose_lanes(None, 8) == choose_lanes(1, 8) == 1
    with pytest.raises(InputError, match="--lanes 2"):
        choose_lanes(2, 8)


@on_cpu
def test_there_are_no_more_lanes_than_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lanes.os, "sched_getaffinity", lambda _: set(range(6)), raising=False)
    monkeypatch.setattr(lanes.sys, "platform", "linux")
    assert choose_lanes(None, 8) == 6
    assert choose_lanes(None, 4) == 4
    assert choose_lanes(1, 4) == 1
    monkeypatch.setattr(lanes.sys, "platform", "darwin")
    assert choose_lanes(None, 8) == 1


def test_groups_are_in_order_and_the_last_one_may_be_smaller() -> None:
    assert groups(range(5), 2) == [range(0, 2), range(2, 4), range(4, 5)]
