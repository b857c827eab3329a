"""Where mlx-lm is known to compute something else than transformers, it is said or refused."""

from pathlib import Path
from typing import Any

from graft.errors import InputError
from graft.pretrained.hugging_face import with_rope_settings
from graft.pretrained.known_differences import check_differences
from graft.pretrained.lazy_model import open_base
from graft.pretrained.load import build_model, load_model, read_model

import mlx.core as mx
import numpy as np
import pytest

from support.architectures import read_configs
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
MINISTRAL3 = {n: v for n, v in read_configs()["ministral3"].items() if n != "layer_types"}
LAYERS = ["sliding_attention", *["full_attention"] * (LLAMA["num_hidden_layers"] - 1)]


def rotation(*, full: float, sliding: float) -> dict[str, Any]:
    """The `rope_parameters` of transformers 5 for layers of two kinds."""
    thetas = {"full_attention": full, "sliding_attention": sliding}
    return {kind: {"rope_type": "default", "rope_theta": theta} for kind, theta in thetas.items()}


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (MISTRAL | {"sliding_window": 64}, True),
        (MISTRAL | {"sliding_window": None}, False),
        (MISTRAL | {"sliding_window": 512}, False),  # no text is longer
        (MISTRAL | {"sliding_window": 64, "use_sliding_window": False}, False),
        (MISTRAL | {"sliding_window": 64, "layer_types": LAYERS}, False),  # mlx-lm applies it
        (GEMMA2 | {"sliding_window": 64, "max_position_embeddings": 512}, True),
        (MINISTRAL3 | {"sliding_window": 64}, True),
        (MINISTRAL3 | {"sliding_window": None}, False),
    ],
)
def test_a_sliding_window_that_is_not_applied_is_said(config: dict[str, Any], said: bool) -> None:
    notes = check_differences(build_model(config), config)
    assert ["beyond 64 tokens" in text for text in notes] == [True] * said


@pytest.mark.parametrize(
    ("name", "changes", "said"),
    [
        ("jamba", {"num_experts_per_tok": 2}, "scales the weights of a token's experts"),
        ("jamba", {"num_experts_per_tok": 1}, None),
        ("dots1", {"num_experts_per_tok": 1}, "norm_topk_prob"),
        ("dots1", {"num_experts_per_tok": 1, "norm_topk_prob": False}, None),
        ("dots1", {"num_experts_per_tok": 2}, None),
        ("glm4_moe", {"num_experts_per_tok": 1}, "norm_topk_prob"),
        ("olmo3", {"rope_parameters": rotation(full=1000, sliding=50)}, "one rope_theta"),
        ("olmo3", {"rope_parameters": rotation(full=1000, sliding=1000)}, None),
        ("mamba2", {"n_groups": 4, "layer_norm_epsilon": 1e-5}, "n_groups"),
        ("mamba2", {"n_groups": 1, "layer_norm_epsilon": 1e-5}, None),
        ("mamba2", {"n_groups": 1, "layer_norm_epsilon": 1e-3}, "layer_norm_epsilon"),
    ],
)
def test_other_answers_are_said(name: str, changes: dict[str, Any], said: str | None) -> None:
    config = with_rope_settings(read_configs()[name] | changes)
    notes = check_differences(build_model(config), config)
    assert [said is not None and said in text for text in notes] == [True] * (said is not None)


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


@pytest.mark.reference
@pytest.mark.parametrize(("groups", "said"), [(1, False), (2, True)])
def test_mamba2_that_transformers_saved_gives_its_logits_or_is_said_not_to(
    tmp_path: Path, groups: int, said: bool
) -> None:
    torch, transformers = map(pytest.importorskip, ("torch", "transformers"))
    config = transformers.Mamba2Config(
        **{"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8},
        **{"num_heads": 4, "head_dim": 16, "n_groups": groups, "chunk_size": 8},
    )
    torch.manual_seed(0)
    reference = transformers.Mamba2ForCausalLM(config).eval()
    for parameter in reference.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    reference.save_pretrained(tmp_path)
    tokens = [[1, 5, 9, 30, 7, 42, 0, 63, 2, 8]]
    with torch.no_grad():
        expected = reference(torch.tensor(tokens), use_cache=False).logits.numpy()
    model, read = read_model(tmp_path)
    differs = np.abs(np.array(model(mx.array(tokens))) - expected).max() > 1e-4
    assert (bool(differs), bool(check_differences(model, read))) == (said, said)
