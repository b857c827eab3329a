"""graft/exporting/publish.py: what a card says."""

import json
from dataclasses import replace
from pathlib import Path

import graft  # noqa: F401
from graft.adapters.adapter import Adapter
from graft.adapters.formats import FORMATS
from graft.adapters.layer_config import LayerConfig
from graft.exporting.model_card import write_card
from graft.exporting.publish import make_card

import mlx.core as mx

from support.tiny import write_model

Q = "model.layers.0.self_attn.q_proj"


def test_a_card_tells_no_place_of_this_machine(tmp_path: Path) -> None:
    base, source = write_model(tmp_path / "base"), tmp_path / "run" / "adapters.npz"
    tensors = {f"{Q}.lora_a": mx.ones((64, 4)), f"{Q}.lora_b": mx.ones((4, 64))}
    adapter = Adapter(tensors, {Q: LayerConfig(4, 6.0)}, str(base))
    usage = FORMATS["peft"].usage
    assert usage is not None
    text = write_card(make_card("me/mine", usage, adapter, source))
    assert str(tmp_path) not in text and "base_model" not in text
    named = make_card("me/mine", usage, replace(adapter, base_model="owner/base"), source)
    assert 'base_model: "owner/base"' in write_card(named)
    assert json.dumps("owner/base") in write_card(named)
