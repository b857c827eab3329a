import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import graft  # noqa: F401
from graft.adapters.adapter import adapter_of, apply_adapter, layer_configs
from graft.adapters.attach import attach, count_parameters, lora_layers
from graft.adapters.files import load_adapter
from graft.adapters.layer_config import LayerConfig
from graft.adapters.layer_kinds import FusedParts
from graft.adapters.methods import METHODS
from graft.adapters.targets import parse_pattern, plan
from graft.errors import InputError
from graft.exporting.adapter import export
from graft.training.options import Options

import mlx.core as mx
import mlx.nn as nn
import pytest

from support.architectures import adapt, read_configs
from support.tiny import LLAMA, QWEN2, make_model

GPT2: dict[str, Any] = {
    "model_type": "gpt2",
    "n_ctx": 64,
    "n_embd": 32,
    "n_head": 4,
    "n_layer": 2,
    "n_positions": 64,
    "layer_norm_epsilon": 1e-5,
    "vocab_size": 100,
}
PHI3: dict[str, Any] = {**LLAMA, "model_type": "phi3"}
NEOX: dict[str, Any] = {
    "model_type": "gpt_neox",
    "max_position_embeddings": 64,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "layer_norm_eps": 1e-5,
    "vocab_size": 100,
    "rotary_emb_base": 10000,
    "rotary_pct": 0.25,
}
INTERNLM2: dict[str, Any] = {**LLAMA, "model_type": "internlm2"}
MIXTRAL: dict[str, Any] = {
    **LLAMA,
    "model_type": "mixtral",
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
}
BLOCK = "model.layers.2"


def ranks(settings: dict[str, LayerConfig]) -> dict[str, int]:
    """Rank by the path within the last block, or by the whole path outside of blocks."""
    return {
        path.removeprefix(BLOCK + "."): setting.rank
        for path, setting in settings.items()
        if path.startswith(BLOCK) or "layers" not in path
    }


def test_every_rank_of_llama_cpp_s_finetune_can_be_said() -> None:
    """Its options: --rank-att-norm, -ffn-norm, -out-norm, -tok-embd, -out, -wq, -wk, -wv, -wo,

    -ffn_gate, -ffn_down and -ffn_up (w1, w2, w3).
    """
    pattern = {
        "input_layernorm": 1,
        "post_attention_layernorm": 1,
        "norm": 1,
        "embed_tokens": 2,
        "lm_head": 3,
        "q_proj": 4,
        "k_proj": 5,
        "v_proj": 6,
        "o_proj": 7,
        "gate_proj": 8,
        "down_proj": 9,
        "up_proj": 10,
    }
    targets = "all-linear,all-norms,norm,embed_tokens,lm_head"
    settings = plan(make_model(LLAMA), targets, rank=8, rank_pattern=pattern)
    assert ranks(settings) == {
        "lm_head": 3,
        "model.embed_tokens": 2,
        "model.norm": 1,
        "input_layernorm": 1,
        "post_attention_layernorm": 1,
        "self_attn.q_proj": 4,
        "self_attn.k_proj": 5,
        "self_attn.v_proj": 6,
        "self_attn.o_proj": 7,
        "mlp.gate_proj": 8,
        "mlp.down_proj": 9,
        "mlp.up_proj": 10,
    }


def test_patterns_are_names_globs_or_paths_and_the_rest_has_the_common_rank() -> None:
    settings = plan(
        make_model(LLAMA),
        ["all-linear", "lm_head"],
        rank=8,
        rank_pattern={"q_proj": 16, "*.mlp.*": 2, f"{BLOCK}.self_attn.o_proj": 3},
        alpha_pattern={"lm_head": 5.0, "self_attn.v_proj": 6.0},
    )
    found = ranks(settings)
    assert found.pop("self_attn.q_proj") == 16 and found.pop("self_attn.o_proj") == 3
    assert [found.pop(f"mlp.{name}_proj") for name in ("gate", "up", "down")] == [2, 2, 2]
    assert set(found.values()) == {8}
    assert settings["lm_head"].alpha == 5.0
    assert {s.alpha for p, s in settings.items() if p.endswith("v_proj")} == {6.0}
    assert settings[f"{BLOCK}.self_attn.k_proj"].alpha == 16.0


def test_a_vector_has_rank_and_alpha_one_whatever_the_others_have() -> None:
    settings = plan(make_model(LLAMA), "q_proj,*norm*", rank=8, alpha=16.0)
    assert settings["model.norm"] == LayerConfig(1, 1.0)
    assert settings[f"{BLOCK}.self_attn.q_proj"] == LayerConfig(8, 16.0)


def test_layers_outside_of_blocks_are_adapted_by_name_only() -> None:
    model = make_model(LLAMA)
    assert not any(
        "layers" not in path for path in plan(model, "all-linear,all-norms", num_layers=1)
    )
    assert set(plan(model, "lm_head,model.embed_tokens")) == {"lm_head", "model.embed_tokens"}
    both = plan(model, "*norm*", num_layers=1)
    assert set(both) == {
        "model.norm",
        *(f"{BLOCK}.{n}_layernorm" for n in ("input", "post_attention")),
    }


@pytest.mark.parametrize(
    ("method", "config", "names"),
    [
        ("lora", LLAMA, ["q", "k", "v", "o", "gate", "up", "down"]),
        ("ia3", LLAMA, ["k", "v", "down"]),
        ("bias", QWEN2, ["q", "k", "v"]),
    ],
)
def test_each_method_has_the_targets_that_suit_it(
    method: str, config: dict[str, Any], names: list[str]
) -> None:
    settings = plan(make_model(config), method=method)
    found = {path.rsplit(".", 1)[1] for path in settings}
    assert found == {f"{name}_proj" for name in names}


def test_norms_alone_are_the_norms_of_the_blocks() -> None:
    assert len(plan(make_model(LLAMA), method="norm")) == 6


def test_ia3_scales_the_input_of_a_feed_forward_s_second_matrix() -> None:
    settings = plan(make_model(LLAMA), method="ia3")
    methods = {path.rsplit(".", 1)[1]: setting.method for path, setting in settings.items()}
    assert methods == {"k_proj": "ia3", "v_proj": "ia3", "down_proj": "ia3-input"}
    assert {(s.rank, s.alpha) for s in settings.values()} == {(1, 1.0)}


def test_vera_has_the_scale_one_of_its_paper() -> None:
    assert set(plan(make_model(LLAMA), "q_proj", rank=8, method="vera").values()) == {
        LayerConfig(8, 8.0, "vera")
    }


def test_experts_are_linear_and_their_router_too() -> None:
    model = make_model(MIXTRAL)
    settings = plan(model, rank=2)
    names = {path.split(".", 3)[3] for path in settings}
    assert "block_sparse_moe.switch_mlp.up_proj" in names and "block_sparse_moe.gate" in names
    attach(model, settings)
    kinds = {layer.kind for path, layer in lora_layers(model) if "switch_mlp" in path}
    assert kinds == {"experts"}


def test_a_part_of_a_fused_projection_is_named_behind_it() -> None:
    model = make_model(GPT2)
    settings = plan(model, "c_attn.q,c_attn.v", rank=2)
    assert list(settings) == [f"model.h.{n}.attn.c_attn" for n in range(2)]
    expected = FusedParts(("q", "k", "v"), (32, 32, 32), ("q", "v"))
    assert {setting.parts for setting in settings.values()} == {expected}
    assert plan(model, "c_attn", rank=2)["model.h.0.attn.c_attn"].parts is None
    assert plan(model, "c_attn,c_attn.q", rank=2)["model.h.0.attn.c_attn"].parts is None


def test_a_container_is_no_target_and_the_glob_that_is_one_is_named() -> None:
    model = make_model(LLAMA)
    with pytest.raises(InputError, match=r"--targets self_attn: .*: self_attn\.\* names them"):
        plan(model, "self_attn")
    expected = {f"self_attn.{name}_proj" for name in "qkvo"}
    assert ranks(plan(model, "self_attn.*")).keys() == expected
    assert ranks(plan(model, "layers.2.self_attn.*")).keys() == expected
    assert ranks(plan(model, "model.*.self_attn.?_proj")).keys() == expected


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (["all-linear", "!mlp.*"], {"q", "k", "v", "o"}),
        (["self_attn.*", "!q_proj", "!*.k_proj"], {"v", "o"}),
        ([r"re:.*self_attn\.[qv]_proj"], {"q", "v"}),
        (["self_attn.*", r"!re:model\.layers\.\d+\.self_attn\.[qv]_proj"], {"k", "o"}),
    ],
)
def test_layers_are_left_out_and_named_by_expressions(
    targets: list[str], expected: set[str]
) -> None:
    expected = {f"self_attn.{name}_proj" for name in expected}
    assert ranks(plan(make_model(LLAMA), targets)).keys() == expected
    assert ranks(plan(make_model(LLAMA), ",".join(targets))).keys() == expected


@pytest.mark.parametrize(
    ("targets", "reason"),
    [
        ("!q_proj", "names nothing"),
        ("q_proj,!nothing", "--targets !nothing matches no layer"),
        ("re:(", "not a regular expression"),
        ("re:q_proj", "--targets re:q_proj matches no layer"),  # of a whole path
    ],
)
def test_what_leaves_out_nothing_or_is_no_expression_is_refused(targets: str, reason: str) -> None:
    with pytest.raises(InputError, match=re.escape(reason)):
        plan(make_model(LLAMA), targets)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.start = mx.zeros((4,))
        self.rnn = nn.GRU(4, 4)
        self.head = nn.Linear(4, 4)


def test_what_has_no_weight_is_passed_over_aloud(capsys: pytest.CaptureFixture[str]) -> None:
    assert plan(Recurrent(), "*", rank=2).keys() == {"head"}
    assert "not adapted, since they have no weight: rnn (GRU: Wx, Wh, b, bhn)" in (
        capsys.readouterr().err
    )
    with pytest.raises(InputError, match=r"--targets rnn: rnn \(GRU: .*\) has no weight"):
        plan(Recurrent(), "rnn")
    plan(Recurrent(), "head", rank=2)
    assert not capsys.readouterr().err


@pytest.mark.parametrize("method", ["lora", "full", "dora"])
def test_biases_alone_are_for_the_method_that_trains_them(method: str) -> None:
    with pytest.raises(InputError, match=f"{method} does not train biases; use --method bias"):
        plan(make_model(QWEN2), "all-biases", method=method)
    assert plan(make_model(QWEN2), "all-biases", method="bias")


def test_any_model_without_blocks_is_chosen_from_as_a_whole() -> None:
    model = nn.Transformer(16, 2, 1, 1)
    paths = plan(model, "all-linear", rank=2)
    assert (
        "encoder.layers.0.linear1" in paths and "decoder.layers.0.self_attention.out_proj" in paths
    )
    with pytest.raises(InputError, match="Transformer has no list of transformer blocks"):
        plan(model, "all-linear", rank=2, num_layers=1)


def message(*arguments: Any, **settings: Any) -> str:
    with pytest.raises(InputError) as error:
        plan(*arguments, **settings)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_everything_wrong_is_said_at_once() -> None:
    said = message(
        make_model(LLAMA),
        "q_prj,k_proj,*norm*",
        rank=8,
        method="dora",
        num_layers=1,
        rank_pattern={"k_proj": 40, "*k_proj": 50, "up_proj": 3},
        alpha_pattern={"nothing": 2.0},
    )
    for part in (
        "--targets q_prj matches no layer; there are",
        f"--rank-pattern up_proj=3 names {BLOCK}.mlp.up_proj, not chosen: add it to --targets",
        "--alpha-pattern nothing=2.0 matches no layer; there are down_proj, embed_tokens",
        f"--rank-pattern: k_proj=40 and *k_proj=50 disagree on {BLOCK}.self_attn.k_proj",
        f"rank 40 for {BLOCK}.self_attn.k_proj: give 1 to 32",
        "dora is not defined on",
        f"{BLOCK}.input_layernorm (vector)",
        "model.norm (vector): only on linear, embedding, conv",
    ):
        assert part in said, part


def test_patterns_that_agree_are_no_mistake() -> None:
    settings = plan(make_model(LLAMA), "q_proj", rank_pattern={"q_proj": 4, "*q_proj": 4})
    assert {setting.rank for setting in settings.values()} == {4}


def test_a_pattern_gives_a_norm_no_rank_but_one() -> None:
    said = message(make_model(LLAMA), "model.norm", rank_pattern={"*norm*": 4})
    assert "rank 4 for model.norm: give 1 to 1" in said


def test_an_unknown_method_names_those_that_there_are() -> None:
    said = message(make_model(LLAMA), method="lorra")
    assert "--method lorra" in said and "rslora" in said and "pissa" in said


def test_the_help_names_every_method() -> None:
    """All but the one that a layer's name chooses."""
    (field,) = [field for field in fields(Options) if field.name == "method"]
    named = re.split(r"[ ,]+", field.metadata["help"])
    assert set(METHODS) - set(named) == {"ia3-input"}


def test_spaces_around_targets_do_not_matter() -> None:
    assert plan(make_model(LLAMA), "q_proj, v_proj,") == plan(make_model(LLAMA), "q_proj,v_proj")
    assert "--targets ' ,'" in message(make_model(LLAMA), " ,")


@pytest.mark.parametrize("alpha", [0.0, -1.0, float("nan"), float("inf")])
def test_a_start_that_is_divided_by_the_scale_needs_a_positive_one(alpha: float) -> None:
    said = message(make_model(LLAMA), "q_proj", method="pissa", alpha=alpha)
    assert f"alpha {alpha} for" in said


def test_a_pattern_is_read_from_text() -> None:
    assert parse_pattern("q_proj=16,*norm*=1", int, option="--rank-pattern") == {
        "q_proj": 16,
        "*norm*": 1,
    }
    assert parse_pattern("", float, option="--alpha-pattern") == {}


def test_text_that_is_no_pattern_is_named_piece_by_piece() -> None:
    with pytest.raises(InputError) as error:
        parse_pattern("q_proj,k_proj=x,v_proj=2,=3", int, option="--rank-pattern")
    assert all(f"'{piece}'" in str(error.value) for piece in ("q_proj", "k_proj=x", "=3"))
    assert "v_proj=2" not in str(error.value)


def test_the_table_s_totals_are_those_of_the_training(tmp_path: Path) -> None:
    model = make_model(LLAMA)
    attach(model, plan(model, "q_proj,*norm*,lm_head", rank=4, num_layers=2))
    assert count_parameters(model)[0] == 2 * 512 + 5 * 64 + 4 * (512 + 64)


def test_layers_whose_weight_the_architecture_replaces_are_not_adapted() -> None:
    """gemma3n clips two small matrices of each block in every pass."""
    model = make_model(read_configs()["gemma3n"])
    assert [path for path, _ in model.named_modules() if path.endswith("prediction_coefs")]
    assert not [path for path in plan(model, num_layers=-1) if path.endswith("_coefs")]
    with pytest.raises(InputError, match="prediction_coefs matches no layer"):
        plan(model, "prediction_coefs")


def test_what_a_keyword_names_and_is_too_narrow_is_left_out_and_said(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The gate of a shared expert has one output, at any size of the model."""
    model = make_model(read_configs()["qwen2_moe"])
    chosen = plan(model, num_layers=-1, rank=2)
    assert chosen and not [path for path in chosen if path.endswith("shared_expert_gate")]
    said = r"rank 2 is more than .*: model.layers.\*.mlp.shared_expert_gate \(\d\)\n"
    assert re.search(said, capsys.readouterr().err)
    with pytest.raises(InputError, match=r"rank 2 for .*shared_expert_gate: give 1 to 1"):
        plan(model, ["all-linear", "shared_expert_gate"], num_layers=-1, rank=2)
    pattern = {"shared_expert_gate": 1}
    assert len(plan(model, num_layers=-1, rank=2, rank_pattern=pattern)) > len(chosen)


@pytest.mark.parametrize("padded", [False, True], ids=["Graft", "mlx-lm"])
def test_what_a_file_holds_for_a_narrow_layer_is_read(padded: bool, tmp_path: Path) -> None:
    """mlx-lm has one rank for all: 2, also for the one output of a shared expert's gate."""
    config = read_configs()["qwen2_moe"]
    model, tokens = make_model(config), mx.arange(24).reshape(2, 12)
    adapt(model, plan(model, rank=2, num_layers=-1, rank_pattern={"shared_expert_gate": 1}))
    export(adapter_of(model), tmp_path / "a", to="mlx-lm" if padded else "graft")
    again = make_model(config)
    apply_adapter(again, load_adapter(tmp_path / "a"), name="a")
    gates = [each for path, each in layer_configs(again).items() if "shared_expert_gate" in path]
    assert gates and {each.rank for each in gates} == {2 if padded else 1}
    assert mx.allclose(again(tokens), model(tokens), atol=1e-5)
