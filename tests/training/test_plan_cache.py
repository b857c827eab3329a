"""A memory plan is a function of its inputs."""

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import lora
from graft.training import dry_run
from graft.training.memory_plan import MemoryPlan
from graft.training.options import Options
from graft.training.plan_cache import plan_key, read_plan, write_plan

import pytest

from support.lora_runs import train

FINGERPRINTS = {"model": "m", "data": {"train": "t"}}


def test_a_key_is_of_all_that_a_plan_depends_on() -> None:
    options = Options(memory_budget="1GB")
    key = plan_key(options, FINGERPRINTS, {"q": {"rank": 8}})
    same = dataclasses.replace(options, adapter_file="x.npz", save_every=7, report_to="wandb")
    assert plan_key(same, FINGERPRINTS, {"q": {"rank": 8}}) == key
    others = [
        plan_key(dataclasses.replace(options, memory_budget="2GB"), FINGERPRINTS, {}),
        plan_key(dataclasses.replace(options, batch_size=2), FINGERPRINTS, {"q": {"rank": 8}}),
        plan_key(options, {**FINGERPRINTS, "model": "n"}, {"q": {"rank": 8}}),
        plan_key(options, FINGERPRINTS, {"q": {"rank": 4}}),
    ]
    assert len({key, *others}) == 5


def test_a_plan_is_kept_and_damage_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRAFT_CACHE", str(tmp_path))
    assert read_plan("key") is None
    write_plan("key", plan := MemoryPlan(2, True, 99))
    found = read_plan("key")
    assert found == plan and found.peak_bytes == 99
    (tmp_path / "plans" / "key").write_text('{"rows"')
    assert read_plan("key") is None
    monkeypatch.setenv("GRAFT_CACHE", "off")
    write_plan("other", plan)
    assert [path.name for path in (tmp_path / "plans").iterdir()] == ["key"]


def test_the_same_command_makes_the_same_plan(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Although its measurements differ: every second one is too much for four rows."""
    monkeypatch.setenv("GRAFT_CACHE", str(here / "cache"))
    monkeypatch.setattr(dry_run, "set_memory_limits", lambda *given: None)
    noise = itertools.cycle([1, 3])

    def measured(self: Any, plan: MemoryPlan, part: int) -> int:
        return plan.rows * 2**20 * (factor if plan.rows == 4 else 1) // part

    monkeypatch.setattr(dry_run.MemoryTrial, "dry_run", measured)
    said = []
    for name in ("one", "two", "three"):
        factor = next(noise)
        budget = ("--memory-budget", "6MB", "--val-batches", "1")
        assert train(*budget, "--adapter-file", f"{name}/a.npz") == 0
        said.append([x for x in capsys.readouterr().out.splitlines() if x.startswith("memory")])
    assert said[0] == said[1] == said[2] and "micro-batch 4 of 4" in said[0][0]
    monkeypatch.setenv("GRAFT_CACHE", "off")
    factor = 3
    assert lora.main(["--resume", "--adapter-file", "one/a.npz"]) == 0
