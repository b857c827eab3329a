"""graft/exporting/merge.py: sums of adapters, and smaller ones."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import graft  # noqa: F401
from graft.adapters.adapter import Adapter, apply_adapter
from graft.adapters.files import load_adapter
from graft.adapters.formats.graft import write_adapter
from graft.cli.merge import main as merge_command
from graft.errors import InputError
from graft.exporting.merge import dare, decompose, differences, merge, shrink, ties, trim

import mlx.core as mx
import numpy as np
import pytest

from support.merge_cases import IDS, MIXTRAL, deltas, make_adapter
from support.tiny import LLAMA, QWEN2, make_model, write_model


@pytest.mark.parametrize(
    ("config", "targets"),
    [
        (LLAMA, "q_proj,down_proj"),
        (QWEN2, "q_proj,embed_tokens"),
        (MIXTRAL, "all-linear"),
    ],
)
def test_cat_is_the_exact_weighted_sum_of_adapters_of_any_ranks(
    config: dict[str, Any], targets: str
) -> None:
    one = make_adapter(1, config=config, targets=targets)
    two = make_adapter(2, config=config, targets=targets, rank=3)
    merged, _ = merge([one, two], [0.7, -0.3])
    found, first, second = (deltas(a, config) for a in (merged, one, two))
    # A router of four outputs needs no seven ranks.
    small = {path for path in merged.layers if path.endswith("block_sparse_moe.gate")}
    assert {s.rank for path, s in merged.layers.items() if path not in small} == {7}
    assert {merged.layers[path].rank for path in small} <= {4}
    for path, delta in found.items():
        expected = 0.7 * first[path] - 0.3 * second[path]
        np.testing.assert_allclose(delta, expected, atol=1e-5)


def test_what_adapters_do_not_share_is_said_once() -> None:
    one, two = make_adapter(0), make_adapter(1, targets="q_proj")
    assert differences(["a", "b"], [one, one]) == []
    layers = "model.layers.{}.mlp.down_proj".format
    assert differences(["a", "b"], [one, replace(two, base_model="x/y")]) == [
        "their records name different base models (a: None, b: x/y)",
        f"b does not adapt {layers(0)}, {layers(1)}, {layers(2)}: counted as no change",
    ]
    (note,) = differences(["a", "b"], [make_adapter(0, targets="all-linear"), two])
    assert "b does not adapt" in note and " and 15 more: " in note


def test_a_layer_that_one_adapter_lacks_counts_as_no_change() -> None:
    one, two = make_adapter(1, targets="q_proj"), make_adapter(2, targets="q_proj,v_proj")
    merged, _ = merge([one, two], [0.5, 0.5])
    second = deltas(two)
    path = "model.layers.1.self_attn.v_proj"
    np.testing.assert_allclose(deltas(merged)[path], 0.5 * second[path], atol=1e-6)


@pytest.mark.parametrize("config", [LLAMA, MIXTRAL])
def test_svd_is_the_best_of_its_rank_and_tells_what_it_lost(config: dict[str, Any]) -> None:
    targets = "all-linear"
    one, two = (make_adapter(n, config=config, targets=targets) for n in (1, 2))
    merged, losses = merge([one, two], [1.0, 1.0], method="svd", rank=5)
    found, first, second = (deltas(a, config) for a in (merged, one, two))
    for path, delta in found.items():
        whole = first[path] + second[path]
        u, s, vt = np.linalg.svd(whole, full_matrices=False)
        best = (u[..., :5] * s[..., None, :5]) @ vt[..., :5, :]
        np.testing.assert_allclose(delta, best, atol=1e-4)
        assert losses[path] == pytest.approx((s[..., 5:] ** 2).sum() / (s**2).sum(), abs=1e-4)
    assert max(losses.values()) > 0.01


def test_a_rank_that_holds_everything_loses_nothing() -> None:
    one = make_adapter(1)
    merged, losses = merge([one], [1.0], method="svd", rank=6)
    for path, delta in deltas(merged).items():
        np.testing.assert_allclose(delta, deltas(one)[path], atol=1e-5)
    assert max(losses.values()) < 1e-6


def test_shrink_and_decompose_agree() -> None:
    a, b = mx.random.normal((30, 8), key=mx.random.key(0)), mx.random.normal((8, 20))
    (a1, b1), lost1 = shrink((a, b), 3)
    (a2, b2), lost2 = decompose(a @ b, 3)
    np.testing.assert_allclose(np.array(a1 @ b1), np.array(a2 @ b2), atol=1e-3)
    assert lost1 == pytest.approx(lost2, abs=1e-4)


def test_ties_by_hand() -> None:
    # Half of the entries stay: (3, -2, 0, 0) and (0, 4, -1, 0)... the largest two of each.
    first, second = mx.array([3.0, -2.0, 0.5, 0.1]), mx.array([0.2, 4.0, -1.0, 0.3])
    assert trim(first, 0.5).tolist() == [3.0, -2.0, 0.0, 0.0]
    # Signs by the sums 3, 2, -1, 0; the first's -2 disagrees and drops out.
    assert ties([first, second], [1.0, 1.0], 0.5).tolist() == [3.0, 4.0, -1.0, 0.0]
    assert ties([first, second], [0.5, 2.0], 0.5).tolist() == [1.5, 8.0, -2.0, 0.0]
    # Where both agree, the mean.
    agree = ties([mx.array([1.0, 0.0]), mx.array([3.0, 0.0])], [1.0, 1.0], 1.0)
    assert agree.tolist() == [2.0, 0.0]


def test_dare_keeps_the_expectation_and_is_seeded() -> None:
    delta = mx.ones((200, 200))
    found = dare([delta], [0.5], 0.25, mx.random.key(0))
    assert set(np.unique(np.array(found))) == {0.0, 2.0}
    assert mx.mean(found).item() == pytest.approx(0.5, abs=0.01)
    one, two = make_adapter(1), make_adapter(2)
    runs = [merge([one, two], [0.5, 0.5], method="dare", seed=s)[0] for s in (1, 1, 2)]
    first, again, other = (deltas(adapter) for adapter in runs)
    assert all(np.array_equal(first[path], again[path]) for path in first)
    assert not any(np.array_equal(first[path], other[path]) for path in first)


def test_linear_averages_the_halves_at_the_same_rank() -> None:
    one, two = make_adapter(1), make_adapter(2)
    merged, _ = merge([one, two], [0.7, 0.3], method="linear")
    path = "model.layers.0.self_attn.q_proj"
    halves = {}
    for half in ("lora_a", "lora_b"):
        x, y = (np.array(adapter.tensors[f"{path}.{half}"]) for adapter in (one, two))
        halves[half] = (0.7 * 1.5) ** 0.5 * x + (0.3 * 1.5) ** 0.5 * y
    expected = (halves["lora_a"] @ halves["lora_b"]).T
    np.testing.assert_allclose(deltas(merged)[path], expected, atol=1e-5)
    with pytest.raises(InputError, match="linear needs one rank"):
        merge([one, make_adapter(2, rank=3)], [0.5, 0.5], method="linear")


@pytest.mark.reference
@pytest.mark.filterwarnings("ignore")
def test_ties_equals_peft() -> None:
    torch = pytest.importorskip("torch")
    theirs = pytest.importorskip("peft.utils.merge_utils").ties
    rng = np.random.default_rng(0)
    arrays = [rng.normal(size=(20, 30)).astype(np.float32) for _ in range(3)]
    weights = [0.5, 1.0, 2.0]
    expected = theirs([torch.tensor(a) for a in arrays], torch.tensor(weights), 0.4)
    found = ties([mx.array(a) for a in arrays], weights, 0.4)
    np.testing.assert_allclose(np.array(found), expected.numpy(), atol=1e-6)


@pytest.mark.reference
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("method", ["linear", "cat", "svd"])
def test_a_merge_equals_peft(method: str, tmp_path: Path) -> None:
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    from graft.adapters.formats.peft import write_peft

    write_model(tmp_path / "base")
    one, two = make_adapter(1), make_adapter(2)
    for name, adapter in (("one", one), ("two", two)):
        write_peft(adapter, tmp_path / name)
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    model = peft.PeftModel.from_pretrained(base, tmp_path / "one", adapter_name="one")
    model.load_adapter(tmp_path / "two", adapter_name="two")
    settings = {"svd_rank": 5} if method == "svd" else {}
    model.add_weighted_adapter(
        ["one", "two"], [0.7, 0.3], "both", combination_type=method, **settings
    )
    model.set_adapter("both")
    model.eval()
    with torch.no_grad():
        expected = model(torch.tensor(IDS.tolist())).logits.numpy()
    merged, _ = merge([one, two], [0.7, 0.3], method=method, rank=settings.get("svd_rank"))
    ours = make_model(LLAMA)
    apply_adapter(ours, merged, name="merged")
    ours.eval()
    np.testing.assert_allclose(np.array(ours(IDS)), expected, atol=1e-4)


# ---- the commands ------------------------------------------------------------------------------


def save(folder: Path, adapter: Adapter) -> str:
    write_adapter(folder / "adapters.npz", adapter)
    return str(folder)


def test_merge_writes_an_adapter_and_prints_the_lost_energy(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, two = make_adapter(1), make_adapter(2)
    names = [save(tmp_path / "1", one), save(tmp_path / "2", two)]
    out = str(tmp_path / "out")
    arguments = ["--weights", "0.7,0.3", "--method", "svd", "--rank", "5", "--out", out]
    assert merge_command([*names, *arguments]) == 0
    printed = capsys.readouterr().out
    merged, losses = merge([one, two], [0.7, 0.3], method="svd", rank=5)
    assert "6 layers, rank 5" in printed
    assert f"most {max(losses.values()):.2%}" in printed
    adapter = load_adapter(Path(out))
    assert adapter.layers.keys() == merged.layers.keys()
    assert all(mx.array_equal(adapter.tensors[n], array) for n, array in merged.tensors.items())


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--weights", "1"], "give 2 numbers"),
        (["--weights", "a,b"], "give numbers"),
        (["--weights", "nan,1"], "give 2 numbers"),
        (["--method", "svd"], "svd needs --rank"),
        (["--rank", "0"], "--rank 0"),
        (["--method", "ties", "--density", "0"], "--density 0.0"),
        (["--method", "sum"], "invalid choice"),
    ],
)
def test_merge_refuses_in_one_line(
    arguments: list[str], named: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = [save(tmp_path / str(n), make_adapter(n)) for n in (1, 2)]
    assert merge_command([*names, *arguments, "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and named in said
    assert not (tmp_path / "out").exists()


def test_adapters_of_different_bases_are_named(tmp_path: Path) -> None:
    other = make_adapter(2, config={**LLAMA, "intermediate_size": 96})
    with pytest.raises(InputError, match=r"model\.layers\.0\.mlp\.down_proj"):
        merge([make_adapter(1), other], [0.5, 0.5])
