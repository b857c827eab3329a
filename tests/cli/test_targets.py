from pathlib import Path
from typing import Any

import graft  # noqa: F401
from graft.__main__ import main as graft_main
from graft.cli.targets import main

import pytest

from support.tiny import LLAMA, write_model

PHI3: dict[str, Any] = {**LLAMA, "model_type": "phi3"}


def test_the_table_tells_every_layer_and_the_totals(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_model(tmp_path / "m", LLAMA, bits=4)
    arguments = ["--model", str(folder), "--targets", "q_proj,*norm*,lm_head", "--lora-layers", "2"]
    assert graft_main(["targets", *arguments, "--rank", "4", "--rank-pattern", "lm_head=2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    cells = {line.split()[0]: line.split() for line in lines[1:-2]}
    # 3 blocks of 7 projections and 2 norms, a norm, an embedding and a head.
    assert len(cells) == 30
    q_proj = "model.layers.2.self_attn.q_proj"
    assert cells[q_proj] == [q_proj, "linear", "64x64,", "4", "bits", "lora", "4", "16", "512"]
    assert cells["model.norm"][1:] == ["vector", "64", "lora", "-", "1", "64"]
    assert cells["lm_head"][-3:] == ["2", "16", "1,152"]
    assert cells["model.layers.0.self_attn.q_proj"][-1] == "-"
    trained = 2 * 512 + 5 * 64 + 1152
    assert f"8 of 30 layers adapted: {trained:,} parameters trained beside 176,576" in lines[-1]


def test_the_table_tells_the_parts_of_a_fused_projection(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_model(tmp_path / "m", PHI3)
    assert main(["--model", str(folder), "--targets", "qkv_proj.q,qkv_proj.v", "--rank", "2"]) == 0
    lines = [line.split("  ") for line in capsys.readouterr().out.splitlines()]
    (cells,) = [line for line in lines if line[0] == "model.layers.0.self_attn.qkv_proj"]
    trained = 2 * 2 * 64 + 2 * (64 + 32)
    assert [cell.strip() for cell in cells if cell.strip()][1:] == [
        "linear (q, k, v)",
        "128x64",
        "lora q+v",
        "2",
        "16",
        str(trained),
    ]


def test_bad_input_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_model(tmp_path / "m", LLAMA)
    targets = ["--targets", "q_proj,k_proj"]
    assert main(["--model", str(folder), "--rank", "33", "--method", "olora", *targets]) == 2
    said = capsys.readouterr().err
    assert "rank 33 for" in said and "k_proj" in said and said.count("\n") == 1
