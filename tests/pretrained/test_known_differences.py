"""Where mlx-lm is known to compute something else than transformers, it is said or refused."""

from pathlib import Path
from typing import Any

from graft.errors import InputError
from graft.pretrained.known_differences import check_differences
from graft.pretrained.lazy_model import open_base
from graft.pretrained.load import build_model, load_model

import pytest

from support.tiny import LLAMA, write_model

MISTRAL = LLAMA | {"model_type": "mistral", "max_position_embeddings": 512}
GEMMA2 = {
    **LLAMA,
    "model_type": "gemma2",
    "head_dim": 16,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
    "query_pre_attn_scalar": 16.0,
}
LAYERS = ["sliding_attention", *["full_attention"] * (LLAMA["num_hidden_layers"] - 1)]


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (MISTRAL | {"sliding_window": 64}, True),
        (MISTRAL | {"sliding_window": None}, False),
        (MISTRAL | {"sliding_window": 512}, False),  # no text is longer
        (MISTRAL | {"sliding_window": 64, "use_sliding_window": False}, False),
        (MISTRAL | {"sliding_window": 64, "layer_types": LAYERS}, False),  # mlx-lm applies it
        (GEMMA2 | {"sliding_window": 64, "max_position_embeddings": 512}, True),
    ],
)
def test_a_sliding_window_that_is_not_applied_is_said(config: dict[str, Any], said: bool) -> None:
    notes = check_differences(build_model(config), config)
    assert ["beyond 64 tokens" in text for text in notes] == [True] * said


def test_loading_and_converting_say_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_model(tmp_path / "m", MISTRAL | {"sliding_window": 64})
    load_model(folder)
    assert "mlx-lm's mistral has no sliding window" in capsys.readouterr().err
    with open_base(folder, tmp_path) as base:
        assert any("sliding window" in text for text in base.notes)


def test_glm_with_partly_rotated_heads_is_refused(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m", LLAMA | {"model_type": "glm", "head_dim": 16})
    load_model(folder)
    config = LLAMA | {"model_type": "glm", "head_dim": 16, "partial_rotary_factor": 0.5}
    with pytest.raises(InputError, match="partial_rotary_factor"):
        load_model(write_model(tmp_path / "half", config))
