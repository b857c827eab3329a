"""Facts about a base model come from the model that mlx-lm builds, not from single keys."""

from pathlib import Path
from typing import Any

from graft.pretrained.architectures import HALVES, INTERLEAVED
from graft.pretrained.base_config import BaseConfig, read_base_config

import mlx.core as mx
import pytest

from support.tiny import LLAMA, QWEN2, write_model

SMALL = {key: value for key, value in LLAMA.items() if key != "tie_word_embeddings"}
GLM4 = {
    **SMALL,
    "model_type": "glm4",
    "attention_bias": False,
    "head_dim": 16,
    "partial_rotary_factor": 0.5,
}
COHERE = {**SMALL, "model_type": "cohere", "layer_norm_eps": 1e-5, "logit_scale": 0.1}
GEMMA3 = {**SMALL, "model_type": "gemma3_text", "head_dim": 16}


@pytest.mark.parametrize(
    ("config", "order"),
    [
        (LLAMA, HALVES),
        (LLAMA | {"rope_traditional": True}, INTERLEAVED),
        (LLAMA | {"rope_traditional": False}, HALVES),
        # transformers rotates neighbors as well, so that its rows are not reordered.
        (GLM4, HALVES),
        (GLM4 | {"rope_traditional": True}, HALVES),
        (COHERE, HALVES),
    ],
)
def test_rows_are_reordered_only_if_the_folder_departs_from_transformers(
    config: dict[str, Any], order: str
) -> None:
    assert BaseConfig("tiny", config).rotary == order


@pytest.mark.parametrize(
    ("config", "tied"),
    [
        (LLAMA, False),
        (QWEN2, True),
        (COHERE, True),
        (COHERE | {"tie_word_embeddings": False}, True),  # mlx-lm's cohere has no head
        (GEMMA3, True),
        (GEMMA3 | {"tie_word_embeddings": False}, False),
    ],
)
def test_the_built_model_tells_whether_its_output_is_tied(
    config: dict[str, Any], tied: bool
) -> None:
    assert BaseConfig("tiny", config).tied is tied


@pytest.mark.parametrize("head", [True, False])
def test_a_head_among_the_tensors_decides_where_the_architecture_has_both(
    head: bool, tmp_path: Path
) -> None:
    write_model(tmp_path, GEMMA3)
    file = tmp_path / "model.safetensors"
    arrays = mx.load(str(file))
    arrays["lm_head.weight"] = arrays["model.embed_tokens.weight"] + 0
    if not head:
        del arrays["lm_head.weight"]
    mx.save_safetensors(str(file), arrays, metadata={"format": "mlx"})
    assert read_base_config(str(tmp_path)).tied is not head
