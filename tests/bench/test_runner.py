"""Which tools run on which work, and in what order."""

import sys
from pathlib import Path

from graft.bench.runner import BenchFolders, run_in_turns, runs_of
from graft.bench.work import WORKS

FOLDERS = BenchFolders(Path("nowhere"), Path("nowhere"), Path("nowhere"))


def test_runs_take_turns_and_keep_every_value() -> None:
    order: list[str] = []

    def run(name: str) -> dict[str, float]:
        order.append(name)
        return {"tokens_per_second": float(len(order))}

    results = run_in_turns({name: lambda name=name: run(name) for name in ("graft", "other")}, 2)
    assert order == ["graft", "other", "graft", "other"]
    assert results["graft"] == {"tokens_per_second": [1.0, 3.0]}
    assert results["other"] == {"tokens_per_second": [2.0, 4.0]}


def test_peft_is_left_out_where_it_cannot_do_the_work() -> None:
    for name, peers in (("m40", ["graft", "mlx-lm", "peft"]), ("m40-q4", ["graft", "mlx-lm"])):
        runs = runs_of(WORKS[name], ["mlx-lm", "peft"], folders=FOLDERS, peft_python=sys.executable)
        assert list(runs) == peers


def test_a_tool_too_slow_to_reach_a_loss_is_left_out() -> None:
    peers = ["mlx-lm", "mlx-lm-as-installed"]
    runs = runs_of(WORKS["m10-to-loss"], peers, folders=FOLDERS, peft_python=sys.executable)
    assert list(runs) == ["graft", "mlx-lm"]


def test_only_servers_are_measured_serving() -> None:
    peers = ["peft", "mlx-lm", "mlx-lm-as-installed"]
    runs = runs_of(WORKS["serve"], peers, folders=FOLDERS, peft_python=sys.executable)
    assert list(runs) == ["graft", "mlx-lm"]
