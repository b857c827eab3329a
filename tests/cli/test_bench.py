"""graft/cli/bench.py: the benchmark from its arguments to its record."""

import json
from pathlib import Path

from graft.bench import work as bench_work
from graft.bench.work import MODELS, WORKS, Work
from graft.cli import bench
from graft.pretrained.load import read_model
from models import weight_shape

import pytest


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--work", "m11"], "--work m11"),
        (["--against", "mlx-lm,torch"], "--against torch"),
        (["--repeats", "0"], "--repeats 0"),
    ],
)
def test_what_is_unknown_is_refused(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench.main(arguments) == 2
    assert message in capsys.readouterr().err


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
    # Short rows: what is tested is that each tool runs and reports, not how long it takes.
    texts = [text[:120] for text in bench_work.stdlib_docstrings()[:80]]
    monkeypatch.setattr(bench_work, "stdlib_docstrings", lambda: texts)
    monkeypatch.setattr(bench_work, "TRAIN_ROWS", 40)
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
