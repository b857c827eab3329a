"""The benchmark's own arithmetic and errors; no test asserts a time."""

import json
import sys
from pathlib import Path

from graft.bench import runner
from graft.bench import work as bench_work
from graft.bench.runner import interleave, table
from graft.bench.work import MODELS, WORKS, Work, make_materials
from graft.cli import bench
from graft.pretrained.load import read_model
from models import weight_shape

import pytest


def test_every_work_has_a_model() -> None:
    assert {work.model for work in WORKS.values()} <= MODELS.keys()


def test_runs_take_turns_and_keep_every_value() -> None:
    order: list[str] = []

    def run(name: str) -> dict[str, float]:
        order.append(name)
        return {"tokens_per_second": float(len(order))}

    results = interleave({name: lambda name=name: run(name) for name in ("graft", "other")}, 2)
    assert order == ["graft", "other", "graft", "other"]
    assert results["graft"] == {"tokens_per_second": [1.0, 3.0]}
    assert results["other"] == {"tokens_per_second": [2.0, 4.0]}


def test_the_table_shows_medians_spread_and_ratios() -> None:
    figures = {"resident_bytes": [2e8] * 3}
    shown = table(
        "m10",
        {
            "graft": {
                "tokens_per_second": [90.0, 100.0, 130.0],
                "peak_memory_bytes": [1e8],
                **figures,
            },
            "mlx-lm": {"tokens_per_second": [40.0, 50.0, 55.0], **figures},
        },
    )
    ours, theirs = shown.splitlines()[-2:]
    for part in ("100 tokens/s", "(90 to 130)", "200 MB resident", "100 MB in MLX"):
        assert part in ours
    assert "graft x 2.00" in theirs and "in MLX" not in theirs


def test_the_table_tells_the_time_to_a_loss_and_where_it_was_not_reached() -> None:
    speeds = {"tokens_per_second": [100.0] * 3, "resident_bytes": [2e8] * 3}
    shown = table(
        "m10-to-loss",
        {
            "graft": {**speeds, "seconds_to_loss": [20.0, 10.0, 12.0]},
            "mlx-lm": {**speeds, "seconds_to_loss": [40.0, 30.0, 36.0]},
            "peft": speeds,
        },
    ).splitlines()
    ours, theirs, never = shown[3], shown[5], shown[7]
    assert ours.strip() == "the loss after 12.0 s  (10.0 to 20.0)"
    assert theirs.strip() == "the loss after 36.0 s  (30.0 to 40.0)  graft x 3.00"
    assert never.strip() == "the loss was not reached"


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--work", "m11"], "--work m11"),
        (["--against", "mlx-lm,torch"], "--against torch"),
        (["--repeats", "0"], "--repeats 0"),
    ],
)
def test_what_is_unknown_is_refused(
    arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench.main(arguments) == 2
    assert told in capsys.readouterr().err


def test_peft_is_left_out_where_it_cannot_do_the_work() -> None:
    place = Path("nowhere")
    for name, peers in (("m40", ["graft", "mlx-lm", "peft"]), ("m40-q4", ["graft", "mlx-lm"])):
        runs = runner.runs_of(WORKS[name], ["mlx-lm", "peft"], place, place, sys.executable)
        assert list(runs) == peers


def test_a_tool_too_slow_to_reach_a_loss_is_left_out() -> None:
    place, peers = Path("nowhere"), ["mlx-lm", "mlx-lm-as-installed"]
    runs = runner.runs_of(WORKS["m10-to-loss"], peers, place, place, sys.executable)
    assert list(runs) == ["graft", "mlx-lm"]


def test_a_server_s_table_tells_what_sharing_gains_and_costs() -> None:
    figures = {
        "tokens_per_second": [500.0, 900.0, 600.0],
        "one_by_one_tokens_per_second": [150.0, 120.0, 100.0],
        "mixed_over_single": [0.9, 0.95, 0.8],
        "longest_step_while_loading": [2.0, 1.5, 1.75],
        "resident_bytes": [2e8] * 3,
    }
    theirs = {name: figures[name] for name in ("tokens_per_second", "resident_bytes")}
    shown = table("serve", {"graft": figures, "mlx-lm": {**theirs, "tokens_per_second": [200.0]}})
    for part in (
        "5.0 times as fast as one after another (120 tokens/s)",
        "at 0.90 of",
        ": 1.8 ord",
    ):
        assert part in shown
    assert shown.count("times as fast") == 1 and "graft x 3.00" in shown


def test_only_servers_are_measured_serving() -> None:
    place = Path("nowhere")
    peers = ["peft", "mlx-lm", "mlx-lm-as-installed"]
    runs = runner.runs_of(WORKS["serve"], peers, place, place, sys.executable)
    assert list(runs) == ["graft", "mlx-lm"]


def test_a_tool_that_fails_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = "import sys; sys.exit('no such thing')"
    with pytest.raises(runner.InputError, match="no such thing"):
        runner._measure([sys.executable, "-c", code, "tool", "model"])


@pytest.mark.skipif(sys.platform != "linux", reason="the system does not tell")
def test_memory_of_children_counts_and_what_they_share_counts_once() -> None:
    code = """
import os, time
shared = bytearray(b"x") * 100_000_000
for _ in range(2):
    if not os.fork():
        own = bytearray(b"y") * 50_000_000
        time.sleep(5)
        os._exit(0)
time.sleep(5)
"""
    figures = runner._measure([sys.executable, "-c", code]).figures
    assert 2e8 < figures["resident_bytes"] < 3.5e8  # 4e8 if each had its own of all
    assert figures["seconds"] > 5


@pytest.mark.slow
def test_graft_and_mlx_lm_run_on_models_that_are_made_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny = {"hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 64}
    monkeypatch.setitem(MODELS, "tiny", {**tiny, "bits": 4})
    monkeypatch.setitem(MODELS, "tiny-whole", tiny)
    monkeypatch.setitem(WORKS, "tiny", Work("tiny", "two layers"))
    monkeypatch.setitem(WORKS, "tiny-loss", Work("tiny-whole", "to a loss", loss=99.0, steps=10))
    monkeypatch.setitem(WORKS, "tiny-generation", Work("tiny", "eight tokens", tokens=8))
    monkeypatch.setattr(bench_work, "ROWS", 40)
    monkeypatch.setattr(bench_work, "TOKENIZER_VOCABULARY", 512)
    names = ["tiny", "tiny-loss", "tiny-generation"]
    arguments = ["--work", *names, "--against", "mlx-lm", "--repeats", "1"]
    record = tmp_path / "record.json"
    kept = ["--folder", str(tmp_path / "kept"), "--json", str(record)]
    assert bench.main([*arguments, *kept]) == 0, capsys.readouterr().err
    works = json.loads(record.read_text())["works"]
    assert list(works) == names
    assert all(list(tools) == ["graft", "mlx-lm"] for tools in works.values())
    for figures in works["tiny-loss"].values():
        assert 0 < figures["seconds_to_loss"][0] < figures["seconds"][0]
    for tools in works.values():
        for figures in tools.values():
            assert all(value > 0 for values in figures.values() for value in values)
            assert {"tokens_per_second", "peak_memory_bytes", "resident_bytes"} <= figures.keys()
    model, config = read_model(tmp_path / "kept" / "tiny")
    assert weight_shape(model.lm_head) == (config["vocab_size"], 64)


def test_materials_that_are_there_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_work, "docstrings", lambda: ["Q: What is a?\nA: b"] * 3)
    monkeypatch.setattr(bench_work, "_make_tokenizer", lambda texts: pytest.fail("made again"))
    (tmp_path / "m10").mkdir()
    make_materials(tmp_path, ["m10"])
    assert len((tmp_path / "data" / "train.jsonl").read_text().splitlines()) == 3
