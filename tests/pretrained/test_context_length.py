"""The longest row of a model, by the names that configurations have for it."""

from pathlib import Path
from typing import Any

import lora
from graft.pretrained.context_length import context_length
from graft.pretrained.load import build_model, load_model

import pytest

from support.architectures import read_configs
from support.tiny import LLAMA, TEXTS, write_model, write_rows


@pytest.mark.parametrize(
    ("config", "tokens"),
    [
        ({"max_position_embeddings": 512, "n_ctx": 64}, 512),
        ({"n_positions": 1024, "n_ctx": 1024}, 1024),
        ({"n_ctx": 64}, 64),
        ({"max_seq_len": 2048}, 2048),
        ({"max_sequence_length": 300}, 300),
        ({"seq_length": 8192}, 8192),
        ({"model_max_length": 131072}, 131072),
        ({"text_config": {"max_position_embeddings": 40}}, 40),
        ({"max_position_embeddings": None, "text_config": {"n_positions": 40}}, 40),
        ({"max_position_embeddings": 0, "text_config": None}, None),
        ({"max_position_embeddings": "512"}, None),
        ({"hidden_size": 64}, None),
    ],
)
def test_the_first_name_that_has_a_number_counts(
    config: dict[str, Any], tokens: int | None
) -> None:
    assert context_length(config) == tokens


@pytest.mark.parametrize(
    ("name", "tokens"),
    [("gpt2", 256), ("gptj", 256), ("kimi_linear", 1000), ("llama4", 1000), ("mamba", None)],
)
def test_a_built_model_knows_what_its_configuration_said(name: str, tokens: int | None) -> None:
    assert context_length(build_model(read_configs()[name])) == tokens


def test_a_loaded_model_knows_names_that_its_architecture_ignores(tmp_path: Path) -> None:
    """dbrx's max_seq_len is not among the arguments that mlx-lm makes from the configuration."""
    config = {key: value for key, value in LLAMA.items() if key != "max_position_embeddings"}
    write_model(tmp_path / "m", config | {"max_seq_len": 96})
    assert context_length(load_model(tmp_path / "m")[0]) == 96


def test_rows_are_cut_where_the_positions_of_a_model_end(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rows of hundreds of tokens on a gpt2 of 64 positions, whose loss would not be finite."""
    config = read_configs()["gpt2"] | {"n_positions": 64, "n_ctx": 64}
    write_model(tmp_path / "m", config)
    write_rows(tmp_path / "d", train=["".join(TEXTS) * 3] * 4, valid=TEXTS, test=TEXTS)
    paths = ["--model", str(tmp_path / "m"), "--data", str(tmp_path / "d")]
    out = ["--adapter-file", str(tmp_path / "a.npz")]
    assert lora.main(["--train", "--iters", "1", "--batch-size", "2", *paths, *out]) == 0
    said = capsys.readouterr().out
    assert "64 tokens" in said and "nan" not in said
