"""PEFT adapters against transformers and PEFT: export, import and fusing, by architecture."""

import json
import warnings
from pathlib import Path
from typing import Any

import graft  # noqa: F401
from graft.adapters.adapter import adapter_of, apply_adapter
from graft.adapters.attach import attach, lora_layers
from graft.adapters.files import load_adapter
from graft.adapters.formats.peft import write_peft
from graft.adapters.targets import plan
from graft.exporting.fused_model import Fusion, write_fused_model
from graft.pretrained.base_config import read_base_config
from graft.pretrained.load import read_model
from graft.pretrained.transformers_names import is_lost_in_peft

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from support.paths import ROOT

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

pytestmark = [pytest.mark.reference, pytest.mark.filterwarnings("ignore")]

IDS = [[1, 5, 9, 30, 7, 2, 42, 17, 33, 8]]
SMALL: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# GLM-4, Cohere and Ernie rotate neighbors in transformers, too; the others rotate halves.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {},
    "gemma3_text": {"num_hidden_layers": 6, "sliding_window": 128, "query_pre_attn_scalar": 16},
    "mistral": {"sliding_window": None},
    "phi3": {},
    "glm4": {"attention_bias": True, "partial_rotary_factor": 0.5},
    "cohere": {},
    "ernie4_5": {},
    "olmo2": {},
    "granite": {},
}


# Architectures whose names or layouts in transformers are not mlx-lm's, as small as in
# tests/support/data, with what transformers needs besides.
RENAMED: dict[str, dict[str, Any]] = {
    "afmoe": {},
    "deepseek_v3": {"num_key_value_heads": 4},
    "dots1": {"num_experts_per_tok": 2},
    "exaone_moe": {},
    "falcon_mamba": {},
    "glm4_moe": {"head_dim": 32},
    "glm4_moe_lite": {"head_dim": None},
    "gpt2": {},
    "gpt_neox": {"intermediate_size": 512},
    "gptj": {},
    "granitemoe": {},
    "lfm2": {},
    "mamba": {},
    "minimax_m2": {},
    "mixtral": {},
    "olmoe": {},
    "qwen2_moe": {},
    "qwen3_moe": {},
    "qwen3_next": {"layer_types": ["linear_attention", "full_attention"] * 2},
}
CONFIGS = json.loads((ROOT / "tests/support/data/architectures.json").read_text())
QUICK = ("gpt2", "gptj", "mixtral")


def logits(model: Any) -> np.ndarray:
    if isinstance(model, torch.nn.Module):
        with torch.no_grad():
            return model.eval()(torch.tensor(IDS)).logits.float().numpy()
    model.eval()
    return np.array(model(mx.array(IDS)).astype(mx.float32))


def save_base(settings: dict[str, Any], folder: Path) -> None:
    """A model of transformers whose norms, biases and matrices are all random."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(**settings)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, 1.0 if "norm" in name else 0.0, 0.2)
    model.save_pretrained(folder)


def trained(folder: Path, targets: str = "all-linear") -> Any:
    """Graft's model of a folder with an adapter that changes what it says."""
    model, _ = read_model(folder)
    attach(model, plan(model, targets, num_layers=-1, rank=4, alpha=6.0))
    for number, (_, layer) in enumerate(lora_layers(model)):
        for name in layer.tensors():
            noise = mx.random.normal(layer[name].shape, key=mx.random.key(number))
            layer[name] = layer[name] + 0.1 * noise
    return model


def in_transformers(folder: Path) -> Any:
    """The model of a folder in transformers; all of its weights come from the folder."""
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not any(report.values()), report
    return model


def in_peft(base: Path, folder: Path) -> Any:
    """An adapter in PEFT; all of its tensors are used, and none is missing."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(missing|unexpected|adapter key).*")
        return peft.PeftModel.from_pretrained(in_transformers(base), folder)


def close(found: np.ndarray, expected: np.ndarray, base: np.ndarray) -> None:
    """Equal, up to rounding in proportion to what the adapter changes."""
    effect = np.abs(expected - base).max()
    assert effect > 0.1
    assert np.abs(found - expected).max() < 2e-3 * effect


def check_everywhere(base: Path, targets: str, folder: Path) -> None:
    """An adapter in Graft, in PEFT, read back from PEFT's files, and fused in both libraries."""
    exported, fused = folder / "peft", folder / "fused"
    plain = logits(in_transformers(base))
    np.testing.assert_allclose(logits(read_model(base)[0]), plain, atol=1e-3 * abs(plain).max())
    model = trained(base, targets)
    expected = logits(model)
    adapter = adapter_of(model, base_model=str(base))
    write_peft(adapter, exported, base=read_base_config(str(base)))
    close(logits(in_peft(base, exported)), expected, plain)

    imported, _ = read_model(base)
    apply_adapter(imported, load_adapter(exported), name="exported")
    close(logits(imported), expected, plain)

    fused.mkdir()
    fusion = Fusion(str(base), load_adapter(exported), dequantize=True)
    write_fused_model(fusion, fused)
    close(logits(in_transformers(fused)), expected, plain)
    close(logits(read_model(fused)[0]), expected, plain)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_an_adapter_computes_the_same_in_graft_peft_and_fused(
    architecture: str, tmp_path: Path
) -> None:
    save_base({"model_type": architecture} | SMALL | ARCHITECTURES[architecture], tmp_path / "base")
    check_everywhere(tmp_path / "base", "all-linear", tmp_path)


@pytest.mark.parametrize(
    "architecture",
    [
        name if name in QUICK else pytest.param(name, marks=pytest.mark.slow)
        for name in sorted(RENAMED)
    ],
)
def test_names_and_layouts_are_those_of_transformers(architecture: str, tmp_path: Path) -> None:
    settings = CONFIGS[architecture] | {"pad_token_id": 0} | RENAMED[architecture]
    settings = {name: value for name, value in settings.items() if value is not None}
    save_base(settings, tmp_path / "base")
    model, _ = read_model(tmp_path / "base")
    targets = [p for p, m in model.named_modules() if can_go_to_peft(p, m, architecture)]
    check_everywhere(tmp_path / "base", ",".join(targets), tmp_path)


def can_go_to_peft(path: str, layer: Any, architecture: str) -> bool:
    """Linear layers that rank 4 suits, without what is refused."""
    return (
        type(layer) is nn.Linear
        and min(layer.weight.shape) >= 4
        and not is_lost_in_peft(path, architecture)
    )


@pytest.mark.parametrize(
    ("architecture", "recorded"),
    [("llama", True), ("cohere", True), ("cohere", False), ("gemma3_text", False)],
)
def test_an_adapted_embedding_is_tied_as_in_the_built_model(
    architecture: str, recorded: bool, tmp_path: Path
) -> None:
    """Also where config.json does not say whether it is."""
    base, exported = tmp_path / "base", tmp_path / "peft"
    tied = {"tie_word_embeddings": True} if architecture == "llama" else {}
    save_base({"model_type": architecture} | SMALL | ARCHITECTURES[architecture] | tied, base)
    if not recorded:
        config = json.loads((base / "config.json").read_text())
        config.pop("tie_word_embeddings", None)
        (base / "config.json").write_text(json.dumps(config))
    model = trained(base, "embed_tokens")
    write_peft(adapter_of(model), exported, base=read_base_config(str(base)))
    close(logits(in_peft(base, exported)), logits(model), logits(in_transformers(base)))
