"""graft/quantization/bit_allocation.py: bits go where they do most, and as many as it takes."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import graft  # noqa: F401
from graft.quantization import bit_allocation as fusion_bits
from graft.quantization.bit_allocation import BitAllocator, choose_bits
from graft.quantization.choose import UNQUANTIZED
from graft.quantization.divergence import Comparison, Sample

import pytest

from support.fusion_cases import adapted
from support.tiny import write_model


def test_the_next_bits_go_where_they_save_most() -> None:
    bits = {"small": 4, "large": 4, "good": 4}
    divergences, sizes = (
        {"small": 1.0, "large": 1.0, "good": 0.001},
        {"small": 1, "large": 8, "good": 1},
    )
    assert choose_bits(divergences, sizes, bits, budget=3.0) == bits
    # One bit for the small one leaves 1/4 of its divergence: 0.25 + 1 + 0.001.
    assert choose_bits(divergences, sizes, bits, budget=1.3) == {**bits, "small": 5}
    # A bit of the large one takes a byte, and there is room for less.
    assert choose_bits(divergences, sizes, bits, budget=0.3, room_bytes=0.3)["large"] == 4
    everything = choose_bits(divergences, sizes, bits, budget=0.0)
    assert set(everything.values()) == {UNQUANTIZED}


@pytest.mark.parametrize("excess", [1.001, 2, 1000])
def test_bits_are_added_until_the_limit_holds_or_every_layer_is_whole(
    excess: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = write_model(tmp_path / "base", bits=4)
    model, adapter = adapted(base, "q_proj")
    bits = dict.fromkeys(adapter.layers, 4)
    monkeypatch.setattr(fusion_bits, "layer_divergences", lambda *_: dict.fromkeys(bits, 0.1))
    monkeypatch.setattr(BitAllocator, "prepare", lambda *_: {})
    settings: dict[str, Any] = {"sample": Sample([], []), "calibration": [], "scratch": tmp_path}

    def run(*, enough: int) -> list[dict[str, int]]:
        """The bits tried if the divergence is too high until `enough` layers have more."""
        allocator = BitAllocator(model, bits, limit=0.01, room_bytes=1e9, **settings)
        allocator.comparison = Comparison(0.01 * excess, 1, 0, 0, 1)
        tried = []
        for allocation in allocator:
            tried.append(dict(allocation.more_bits))
            if len(allocation.more_bits) >= enough:
                allocator.comparison = Comparison(0.009, 1, 0, 0, 1)
        return tried

    everything = run(enough=100)
    assert everything[0] == {} and everything[-1] == dict.fromkeys(bits, UNQUANTIZED)
    assert all(one != two for one, two in pairwise(everything))
    assert len(run(enough=1)) == 2
