"""graft/exporting/fuse.py: a model with its adapter inside, and what it keeps of it."""

import shutil
from pathlib import Path

import graft  # noqa: F401
from graft.adapters.adapter import adapter_of, apply_adapter
from graft.adapters.attach import attach
from graft.adapters.files import load_adapter
from graft.adapters.formats.graft import write_adapter
from graft.adapters.targets import plan
from graft.cli import fuse as fusing
from graft.exporting.fuse import fuse
from graft.pretrained.load import load_model, read_model
from graft.pretrained.module_paths import collapsed

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from support.fusion_cases import adapted
from support.paths import ROOT
from support.tiny import LLAMA, TEXTS, write_model, write_rows

FLOAT16_SLOWLY = pytest.mark.parametrize(
    "run",
    [mx.float32, pytest.param(mx.float16, marks=pytest.mark.slow)],
    indirect=True,
    ids=str,
)


def test_an_adapter_that_records_no_base_needs_its_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Only in Graft's own record does no name mean the included model."""
    _, adapter = adapted(write_model(tmp_path / "base", bits=4), size=0.06)
    mx.savez(str(tmp_path / "adapters.npz"), **adapter.tensors)
    arguments = [str(tmp_path / "adapters.npz"), "--alpha", "8", "--out", str(tmp_path / "out")]
    assert fusing.main(arguments) == 2
    assert "records no base model; name it with --model" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.fixture(params=[mx.float32, mx.float16], ids=str)
def run(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """A quantized model, an adapter of it in a file, and data."""
    base = write_model(tmp_path / "base", bits=4)
    weights = mx.load(str(base / "model.safetensors"))
    floats = {n: a.astype(request.param) for n, a in weights.items() if a.dtype == mx.float32}
    mx.save_safetensors(str(base / "model.safetensors"), {**weights, **floats})
    _, adapter = adapted(base, size=0.06)
    write_adapter(tmp_path / "run" / "adapters.npz", adapter)
    # One of each pair is compared on, the other shows what inputs are like.
    pairs = [text for text in TEXTS for _ in range(2)]
    write_rows(tmp_path / "data", train=TEXTS, valid=pairs)
    return tmp_path


def command(run: Path, *arguments: str, out: str = "out", check: str = "data/valid.jsonl") -> int:
    return fusing.main(
        [
            *("--model", str(run / "base"), "--adapter-file", str(run / "run" / "adapters.npz")),
            *("--out", str(run / out), "--check-data", str(run / check), *arguments),
        ]
    )


def number(printed: str, name: str) -> float:
    line = next(line for line in printed.splitlines() if name in line)
    return float(line.split(name)[1].split()[0].strip("%"))


def test_what_is_compared_is_said(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(run, "--max-kl", "100") == 0
    printed = capsys.readouterr().out
    model, tokenizer, _ = load_model(run / "base")
    found, _ = read_model(run / "out")
    tokens = [[*tokenizer.encode(text), tokenizer.eos_token_id] for text in TEXTS]
    adapter = load_adapter(run / "run" / "adapters.npz")
    apply_adapter(model, adapter, name="a")
    model.eval()
    total, count, losses = 0.0, 0, [0.0, 0.0]
    for row in tokens:  # by hand, a row at a time
        one, two = (np.array(nn.log_softmax(m(mx.array([row[:-1]]))[0])) for m in (model, found))
        total += float((np.exp(one) * (one - two)).sum())
        count += len(row) - 1
        for which, log_probs in enumerate((one, two)):
            losses[which] -= float(log_probs[np.arange(len(row) - 1), row[1:]].sum())
    assert number(printed, "mean KL divergence") == pytest.approx(total / count, abs=2e-5)
    assert number(printed, "loss") == pytest.approx(losses[0] / count, abs=2e-4)
    line = next(line for line in printed.splitlines() if line.startswith("  loss"))
    assert float(line.split()[-1]) == pytest.approx(losses[1] / count, abs=2e-4)
    assert "more bits" not in printed


@FLOAT16_SLOWLY
def test_layers_get_more_bits_until_the_divergence_holds(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(run, "--max-kl", "100") == 0
    before = number(capsys.readouterr().out, "mean KL divergence")
    limit = before / 40
    assert command(run, "--max-kl", str(limit), "--force") == 0
    printed = capsys.readouterr().out
    assert number(printed, "mean KL divergence") <= limit + 1e-5
    by_bits: dict[int, list[str]] = {}
    for path, module in read_model(run / "out")[0].named_modules():
        if (bits := getattr(module, "bits", 4)) != 4:
            by_bits.setdefault(bits, []).append(path)
    assert by_bits
    for bits, paths in by_bits.items():
        (line,) = (line for line in printed.splitlines() if line.startswith(f"  {bits} bits: "))
        assert sorted(line.split(": ")[1].split(", ")) == sorted(collapsed(paths))
    assert f"to keep the adapter's effect: {sum(map(len, by_bits.values()))}\n" in printed


@FLOAT16_SLOWLY
def test_a_divergence_of_nothing_ends_with_whole_layers(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(run, "--max-kl", "1e-12") == 0
    printed = capsys.readouterr().out
    (line,) = (line for line in printed.splitlines() if "not quantized: " in line)
    assert line.count("model.layers.*") == line.count(" (3)") == 7
    assert number(printed, "mean KL divergence") < 1e-5


@FLOAT16_SLOWLY
def test_regard_to_inputs_comes_before_more_bits(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(run, "--max-kl", "100") == 0
    before = number(capsys.readouterr().out, "mean KL divergence")
    plain = (run / "out" / "model.safetensors").stat().st_size
    assert command(run, "--max-kl", str(before / 2), "--force") == 0
    printed = capsys.readouterr().out
    assert number(printed, "mean KL divergence") <= before / 2
    assert " bits: " not in printed
    assert (run / "out" / "model.safetensors").stat().st_size == plain


def test_layers_without_an_adapter_that_q_bits_rounds_get_care_and_bits_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, adapter = adapted(write_model(tmp_path / "base"), "q_proj", size=0.06)
    write_adapter(tmp_path / "run" / "adapters.npz", adapter)
    write_rows(tmp_path / "data", train=TEXTS, valid=TEXTS * 2)
    assert command(tmp_path, "--q-bits", "4", "--max-kl", "1e-3") == 0
    assert number(capsys.readouterr().out, "mean KL divergence") <= 1e-3
    sizes = [(tmp_path / n / "model.safetensors").stat().st_size for n in ("out", "base")]
    assert sizes[0] < sizes[1] / 4


@FLOAT16_SLOWLY
def test_dequantized_needs_no_more_bits(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(run, "--dequantize") == 0
    assert number(capsys.readouterr().out, "mean KL divergence") < 1e-5


# ---- bad input --------------------------------------------------------------------------------


def refusal(capsys: pytest.CaptureFixture[str], status: int) -> str:
    assert status == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1
    return said


@FLOAT16_SLOWLY
def test_without_a_name_the_base_is_the_recorded_one(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = ["--adapter-file", str(run / "run"), "--check-data", str(run / "data/valid.jsonl")]
    assert fusing.main([*files, "--max-kl", "100", "--out", str(run / "one")]) == 0
    assert capsys.readouterr().err == ""
    assert command(run, "--max-kl", "100") == 0
    one, out = (run / name / "model.safetensors" for name in ("one", "out"))
    assert one.read_bytes() == out.read_bytes()
    (run / "base").rename(run / "moved")
    assert "no model folder" in refusal(capsys, fusing.main([*files, "--out", str(run / "two")]))
    named = ["--model", str(run / "moved"), "--max-kl", "100", "--out", str(run / "two")]
    assert fusing.main([*files, *named]) == 0
    assert f"was trained on {run / 'base'}; fusing into" in capsys.readouterr().err


def test_bad_input_is_one_line_and_leaves_nothing(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "give more than 0" in refusal(capsys, command(run, "--max-kl", "0"))
    assert "gone" in refusal(capsys, command(run, check="gone.jsonl"))
    assert "owner/name" in refusal(capsys, command(run, "--upload-repo", "x"))
    other = write_model(run / "other", {**LLAMA, "intermediate_size": 96})
    shutil.rmtree(run / "base")
    other.rename(run / "base")
    said = refusal(capsys, command(run))
    assert "mlp.down_proj.lora_a has shape (128, 4), the model needs (96, 4)" in said
    assert not (run / "out").exists()
    (run / "out").mkdir()
    assert "--force" in refusal(capsys, command(run))


@pytest.mark.parametrize("run", [mx.float16], indirect=True, ids=str)
def test_a_fused_model_of_no_numbers_is_not_written(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, adapter = adapted(run / "base", "v_proj", size=1e3)
    write_adapter(run / "run" / "adapters.npz", adapter)
    assert command(run, "--max-kl", "100") == 1
    said = capsys.readouterr().err
    assert said.startswith("error: ") and "has a loss of nan" in said and said.count("\n") == 1
    assert [path.name for path in run.glob("*out*")] == []


# ---- the default data -------------------------------------------------------------------------


@pytest.mark.slow
def test_a_fused_4_bit_model_keeps_95_percent_of_the_gain(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import convert
    import lora
    from graft.data.batches import sample_rows
    from graft.data.examples import Split, load_splits
    from graft.pretrained.folder import EMBEDDED_MODEL
    from graft.training.evaluate import evaluate_split

    base, adapter, out = tmp_path / "base", tmp_path / "run" / "adapters.npz", tmp_path / "out"
    convert.convert(base, torch_path=EMBEDDED_MODEL, quantize=True, file_format="safetensors")
    data = str(ROOT / "datasets" / "mlx-docs")
    options = {"--learning-rate": 2e-3, "--val-batches": 1, "--data": data}
    words = [str(word) for pair in options.items() for word in pair]
    files = ["--model", str(base), "--adapter-file", str(adapter)]
    model, tokenizer, _ = load_model(base)
    test = load_splits(data, tokenizer, ["test"], max_length=256)["test"]
    rows = Split(sample_rows(test.examples, 40, seed=1))
    before = evaluate_split(model, rows, 4).loss
    # A small update, which rounding loses more easily, and the larger one that it grows into.
    for iters, more in ((20, []), (75, ["--resume"])):
        length = ["--max-seq-length", "256", "--iters", str(iters)]
        assert lora.main(["--train", *files, *words, *length, *more]) == 0
        assert fusing.main([*files, "--out", str(out), "--force"]) == 0
        model, _ = read_model(base)
        apply_adapter(model, load_adapter(adapter), name="a")
        model.eval()
        gain = before - evaluate_split(model, rows, 4).loss
        kept = (before - evaluate_split(read_model(out)[0], rows, 4).loss) / gain
        sizes = [(folder / "model.safetensors").stat().st_size for folder in (base, out)]
        with capsys.disabled():
            print(f"\ngain {gain:.3f}, kept {kept:.2%}, size {sizes[1] / sizes[0]:.3f}")
        assert gain > 0.1
        assert kept >= 0.95
        assert sizes[1] <= 1.1 * sizes[0]


def test_a_model_that_only_mlx_lm_may_load_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = LLAMA | {"model_type": "internlm3", "bias": False, "qkv_bias": False}
    base = write_model(tmp_path / "base", config)
    model, _ = read_model(base)
    attach(model, plan(model, "q_proj", rank=4, alpha=6.0))
    adapter = adapter_of(model, base_model=str(base))
    data = write_rows(tmp_path / "data", train=TEXTS, valid=TEXTS)
    fuse(adapter, tmp_path / "whole", dequantize=True, check_data=str(data))
    printed = " ".join(capsys.readouterr().err.split())
    assert "its names for internlm3 are not known" in printed
