"""convert.py: what it writes equals the checkpoint, mlx-lm's own quantization, and transformers."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import convert
from graft.errors import InputError
from graft.quantization.choose import BITS, GROUP_SIZES
from graft.storage.safetensors import open_safetensors

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from support import tiny
from support.layouts import TOKENS, WIDE, config_of, logits_of, weights_of, write_meta
from support.paths import ROOT


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder, for all tests to read."""
    return tiny.write_model(tmp_path_factory.mktemp("hf") / "llama", WIDE)


@pytest.fixture(scope="module")
def meta(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same tensors in Meta's layout."""
    return write_meta(tmp_path_factory.mktemp("meta") / "llama", llama)


def assert_equal_weights(found: dict[str, mx.array], expected: dict[str, mx.array]) -> None:
    assert set(found) == set(expected)
    for name, array in expected.items():
        assert found[name].dtype == array.dtype, name
        assert mx.array_equal(found[name], array), name


# What is written


@pytest.mark.parametrize("file_format", ["npz", "safetensors"])
def test_without_options_the_tensors_are_the_checkpoints(
    llama: Path, tmp_path: Path, file_format: str
) -> None:
    convert.convert(tmp_path / "out", hf_path=llama, file_format=file_format)
    assert_equal_weights(weights_of(tmp_path / "out"), weights_of(llama))
    assert config_of(tmp_path / "out") == config_of(llama)


def test_meta_names_become_those_of_mlx_lm(llama: Path, meta: Path, tmp_path: Path) -> None:
    convert.convert(tmp_path / "out", torch_path=meta)
    assert_equal_weights(weights_of(tmp_path / "out"), weights_of(llama))
    config = config_of(tmp_path / "out")
    assert config.pop("rope_traditional") is True
    assert config == {name: WIDE[name] for name in config}, "sizes come from params.json and shapes"


@pytest.mark.parametrize("file_format", ["npz", "safetensors"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_cast_is_that_of_mlx(llama: Path, tmp_path: Path, dtype: str, file_format: str) -> None:
    convert.convert(tmp_path / "out", hf_path=llama, dtype=dtype, file_format=file_format)
    target = getattr(mx, dtype)
    expected = {name: array.astype(target) for name, array in weights_of(llama).items()}
    assert_equal_weights(weights_of(tmp_path / "out"), expected)
    assert config_of(tmp_path / "out")["torch_dtype"] == dtype


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group_size", GROUP_SIZES)
def test_quantizing_equals_mlx_lm_bit_for_bit_and_loads(
    llama: Path, tmp_path: Path, bits: int, group_size: int
) -> None:
    from mlx_lm.utils import quantize_model

    file_format = "npz" if bits % 2 else "safetensors"
    out = tmp_path / "out"
    settings: dict[str, Any] = {"q_bits": bits, "q_group_size": group_size}
    convert.convert(out, hf_path=llama, quantize=True, file_format=file_format, **settings)
    model = tiny.make_model(WIDE)
    model, config = quantize_model(model, WIDE, group_size, bits)
    assert_equal_weights(weights_of(out), dict(tree_flatten(model.parameters())))
    assert config_of(out) == config
    np.testing.assert_allclose(logits_of(out), np.array(model(TOKENS)), atol=1e-4)


def test_blocks_of_rows_quantize_as_the_whole(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    convert.convert(tmp_path / "whole", hf_path=llama, quantize=True)
    monkeypatch.setattr("graft.storage.lazy_tensors.BLOCK_BYTES", 7 * 128 * 4)
    convert.convert(tmp_path / "rows", hf_path=llama, quantize=True)
    whole, rows = (tmp_path / name / "weights.npz" for name in ("whole", "rows"))
    assert whole.read_bytes() == rows.read_bytes()


@pytest.mark.parametrize(
    ("names", "whole"),
    [
        (["output"], {"lm_head"}),
        (["tok_embeddings", "lm_head"], {"lm_head", "model.embed_tokens"}),
        (["v_proj"], {f"model.layers.{i}.self_attn.v_proj" for i in range(2)}),
        (["*.1.mlp.*_proj"], {f"model.layers.1.mlp.{n}_proj" for n in ("gate", "up", "down")}),
        (["layers.0.mlp"], {f"model.layers.0.mlp.{n}_proj" for n in ("gate", "up", "down")}),
    ],
)
def test_skipped_layers_stay_whole(
    llama: Path, tmp_path: Path, names: list[str], whole: set[str]
) -> None:
    report = convert.convert(tmp_path / "out", hf_path=llama, quantize=True, q_skip=names)
    weights = weights_of(tmp_path / "out")
    dense = {n.removesuffix(".weight") for n, a in weights.items() if a.dtype != mx.uint32}
    assert {name for name in dense if f"{name}.scales" not in weights} >= whole
    assert {n for n in dense if not n.endswith(("norm", "scales", "biases"))} == whole
    assert "as --q-skip says" in report.notes[0]
    logits_of(tmp_path / "out")


def test_a_width_that_groups_do_not_divide_stays_whole_and_is_said(tmp_path: Path) -> None:
    source = tiny.write_model(tmp_path / "hf", {**WIDE, "intermediate_size": 96})
    report = convert.convert(tmp_path / "out", hf_path=source, quantize=True)
    assert report.notes == [
        "not quantized, since groups of 64 do not divide their width of 96: "
        "model.layers.*.mlp.down_proj (2)"
    ]
    assert weights_of(tmp_path / "out")["model.layers.0.mlp.down_proj.weight"].dtype == mx.float32
    logits_of(tmp_path / "out")


def test_a_models_own_rule_sets_layers_apart_as_in_mlx_lm(tmp_path: Path) -> None:
    from mlx_lm.utils import quantize_model

    config = {
        **WIDE,
        "model_type": "granitemoe",
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        **dict.fromkeys(("logits_scaling", "residual_multiplier"), 1.0),
        **dict.fromkeys(("embedding_multiplier", "attention_multiplier"), 1.0),
        "max_position_embeddings": 64,
        "tie_word_embeddings": True,
        "attention_bias": False,
    }
    source = tiny.write_model(tmp_path / "hf", config)
    convert.convert(tmp_path / "out", hf_path=source, quantize=True, file_format="safetensors")
    model, expected = quantize_model(tiny.make_model(config), config, 64, 4)
    gate = "model.layers.0.block_sparse_moe.router.layer"
    assert expected["quantization"][gate]["bits"] == 8, "mlx-lm keeps routers at 8 bits"
    assert config_of(tmp_path / "out")["quantization"][gate]["bits"] == 8
    assert_equal_weights(weights_of(tmp_path / "out"), dict(tree_flatten(model.parameters())))
    logits_of(tmp_path / "out")


def test_a_quantized_checkpoint_passes_unchanged_and_is_not_quantized_again(
    tmp_path: Path,
) -> None:
    source = tiny.write_model(tmp_path / "hf", WIDE, bits=4, group_size=64)
    convert.convert(tmp_path / "out", hf_path=source)
    assert_equal_weights(weights_of(tmp_path / "out"), weights_of(source))
    np.testing.assert_allclose(logits_of(tmp_path / "out"), logits_of(source), atol=1e-5)
    with pytest.raises(InputError, match="quantized already"):
        convert.convert(tmp_path / "again", hf_path=source, quantize=True)


def test_the_report_counts_parameters_and_bits(
    llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # By hand, for every 64 weights: 64 x 4 bits, a scale and a bias of 32 bits: 5 bits a weight.
    dense = weights_of(llama)
    parameters = sum(array.size for array in dense.values())
    norms = sum(array.size for name, array in dense.items() if "norm" in name)
    report = convert.convert(tmp_path / "out", hf_path=llama, quantize=True)
    assert report.parameters == parameters
    assert report.bytes_before == 4 * parameters
    assert report.bytes_after == 4 * norms + (parameters - norms) * 5 // 8
    convert.print_report(report)
    printed = capsys.readouterr().out
    assert f"{parameters:,}" in printed
    assert f"{8 * report.bytes_after / parameters:.2f}" in printed


def test_the_tokenizer_goes_along_and_code_does_not(llama: Path, tmp_path: Path) -> None:
    source = tmp_path / "hf"
    source.mkdir()
    for file in llama.iterdir():
        (source / file.name).symlink_to(file)
    extras = ["tokenizer_config.json", "generation_config.json", "chat_template.jinja"]
    for name in [*extras, "tokenization_custom.py", "chat_template.py", "training_args.bin"]:
        (source / name).write_text("{}")
    convert.convert(tmp_path / "out", hf_path=source)
    written = {"weights.npz", "config.json", "tokenizer.model", *extras}
    assert {file.name for file in (tmp_path / "out").iterdir()} == written
    assert not any(file.is_symlink() for file in (tmp_path / "out").iterdir())


def test_metas_tokenizer_is_found_beside_the_folder(meta: Path, tmp_path: Path) -> None:
    source = tmp_path / "llama" / "7B"
    source.mkdir(parents=True)
    for name in ("consolidated.00.pth", "params.json"):
        (source / name).symlink_to(meta / name)
    beside = tmp_path / "llama" / "tokenizer.model"
    tiny.write_sentencepiece(beside)
    convert.convert(tmp_path / "out", torch_path=source)
    assert (tmp_path / "out" / "tokenizer.model").read_bytes() == beside.read_bytes()
    # Llama 3's: nothing here could read the result.
    beside.write_bytes(b"IQ== 0\nIg== 1\n")
    with pytest.raises(InputError, match="tiktoken vocabulary"):
        convert.convert(tmp_path / "tiktoken", torch_path=source)
    assert not (tmp_path / "tiktoken").exists()


def test_the_included_model_converts(tmp_path: Path) -> None:
    source = ROOT / "graft" / "assets" / "sapling"
    report = convert.convert(tmp_path / "out", torch_path=source, quantize=True)
    assert 4.5 <= 8 * report.bytes_after / report.parameters < 4.6
    assert np.isfinite(logits_of(tmp_path / "out")).all()


# What is refused, and what is left behind


def fails(capsys: pytest.CaptureFixture[str], out: Path, *arguments: object) -> str:
    """Run the command, which must fail in one line and leave nothing; returns the line."""
    before = sorted(out.parent.iterdir())
    assert convert.main([*map(str, arguments), "--mlx-path", str(out)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert sorted(out.parent.iterdir()) == before
    return error


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ([], "give one of --torch-path"),
        (["--torch-path", "a", "--hf-path", "b"], "give one of --torch-path"),
        (["--torch-path", "no/such"], "there is no folder no/such"),
        (["--hf-path", "./no-such"], "there is no model folder ./no-such"),
        (["--hf-path", "a", "-q", "--q-bits", "7"], "choose one of 2, 3, 4, 5, 6, 8"),
        (["--hf-path", "a", "-q", "--q-bits", "0"], "choose one of 2, 3, 4, 5, 6, 8"),
        (["--hf-path", "a", "-q", "--q-group-size", "48"], "choose one of 32, 64, 128"),
        (["--hf-path", "a", "--q-bits", "4"], "need -q"),
    ],
)
def test_wrong_options_are_refused(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, arguments: list[str], reason: str
) -> None:
    assert reason in fails(capsys, tmp_path / "out", *arguments)


@pytest.mark.parametrize("quantize", [[], ["-q"]])
@pytest.mark.parametrize(
    ("value", "dtype", "message"),
    [
        (float("nan"), "bfloat16", "holds numbers that are not finite"),
        (float("-inf"), "float16", "holds numbers that are not finite"),
        (
            7e4,
            "float16",
            "holds numbers that are too large for float16: convert with --dtype bfloat16",
        ),
    ],
)
def test_numbers_that_are_not_finite_are_refused_by_name(
    llama: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    value: float,
    dtype: str,
    message: str,
    quantize: list[str],
) -> None:
    def spoil(folder: Path) -> None:
        weights = weights_of(folder)
        weights["model.layers.1.mlp.up_proj.weight"][3, 5] = value
        mx.save_safetensors(str(folder / "model.safetensors"), weights)

    spoilt = damaged(llama, tmp_path / "spoilt", spoil)
    error = fails(capsys, tmp_path / "out", "--hf-path", spoilt, "--dtype", dtype, *quantize)
    assert f"model.layers.1.mlp.up_proj.weight {message}" in error
    assert not (tmp_path / "out").exists()


def damaged(source: Path, folder: Path, damage: Callable[[Path], None]) -> Path:
    """A copy of a checkpoint with something wrong."""
    folder.mkdir()
    for file in source.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    damage(folder)
    return folder


def edit_json(name: str, **changes: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        content = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**content, **changes}))

    return edit


def cut(name: str) -> Callable[[Path], None]:
    return lambda folder: os.truncate(folder / name, (folder / name).stat().st_size - 100)


def remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def write_text(name: str, text: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_text(text) and None


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (remove("config.json"), "config.json is missing"),
        (write_text("config.json", "{"), "config.json is not valid JSON"),
        (remove("tokenizer.model"), "has no tokenizer"),
        (remove("model.safetensors"), "has no weights"),
        (cut("model.safetensors"), "model.safetensors is truncated"),
        (write_text("model.safetensors", "junk"), "model.safetensors is truncated"),
        (edit_json("config.json", model_type="nosuch"), "unknown architecture 'nosuch'"),
        (edit_json("config.json", model_file="mine.py"), "needs mine.py to be run"),
        (
            write_text(
                "model.safetensors.index.json", '{"weight_map": {"x": "model-2.safetensors"}}'
            ),
            "lacks model-2.safetensors",
        ),
    ],
)
def test_a_damaged_hugging_face_folder_is_refused(
    llama: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    damage: Callable[[Path], None],
    reason: str,
) -> None:
    source = damaged(llama, tmp_path / "hf", damage)
    assert reason in fails(capsys, tmp_path / "out", "--hf-path", source)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (remove("params.json"), "params.json is missing"),
        (remove("tokenizer.model"), "has no tokenizer"),
        (remove("consolidated.00.pth"), "has no consolidated.*.pth"),
        (cut("consolidated.00.pth"), "consolidated.00.pth is truncated"),
        (edit_json("params.json", dim="128"), "dim is '128'"),
    ],
)
def test_a_damaged_meta_folder_is_refused(
    meta: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    damage: Callable[[Path], None],
    reason: str,
) -> None:
    source = damaged(meta, tmp_path / "meta", damage)
    assert reason in fails(capsys, tmp_path / "out", "--torch-path", source)


def test_all_missing_left_over_and_misshapen_tensors_are_named(
    llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def damage(folder: Path) -> None:
        arrays = weights_of(folder)
        del arrays["model.norm.weight"], arrays["model.layers.1.mlp.up_proj.weight"]
        arrays["lm_head.weight"] = arrays["lm_head.weight"][:-1]
        arrays["model.extra.weight"] = mx.zeros((1,))
        mx.eval(arrays)
        mx.save_safetensors(str(folder / "model.safetensors"), arrays)

    source = damaged(llama, tmp_path / "hf", damage)
    error = fails(capsys, tmp_path / "out", "--hf-path", source)
    for problem in (
        "model.norm.weight is missing",
        "model.layers.1.mlp.up_proj.weight is missing",
        "model.extra.weight is not part of this architecture",
        "lm_head.weight has shape (511, 128), not (512, 128)",
    ):
        assert problem in error


def test_a_skip_that_matches_nothing_lists_the_layers(
    llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("-q", "--q-skip", "output", "wq", "w2")
    error = fails(capsys, tmp_path / "out", "--hf-path", llama, *options)
    assert "--q-skip wq w2 matches no layer" in error
    for name in ("lm_head", "model.embed_tokens", "model.layers.*.self_attn.q_proj (2)"):
        assert name in error


def test_nothing_left_to_quantize_is_an_error(
    llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("-q", "--q-skip", "*")
    error = fails(capsys, tmp_path / "out", "--hf-path", llama, *options)
    assert "nothing to quantize" in error


def test_the_other_layout_is_recognised(
    llama: Path, meta: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "use --hf-path" in fails(capsys, tmp_path / "out", "--torch-path", llama)
    assert "use --torch-path" in fails(capsys, tmp_path / "out", "--hf-path", meta)


def test_an_unwritable_place_is_refused(
    llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    assert convert.main(["--hf-path", str(llama), "--mlx-path", str(tmp_path / "file/out")]) == 2
    assert f"cannot write {tmp_path}/file/out" in capsys.readouterr().err


def test_an_existing_folder_stays_without_force_and_when_converting_fails(
    llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    convert.convert(out, hf_path=llama)
    before = {file.name: file.read_bytes() for file in out.iterdir()}
    assert "exists" in fails(capsys, out, "--hf-path", llama)
    fails(capsys, out, "--hf-path", llama, "--force", "-q", "--q-skip", "nosuch")
    assert {file.name: file.read_bytes() for file in out.iterdir()} == before
    convert.convert(out, hf_path=llama, force=True, quantize=True)
    assert config_of(out)["quantization"]["bits"] == 4


def test_force_deletes_neither_the_checkpoint_nor_anything_but_models(
    llama: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source = damaged(llama, tmp_path / "hf", lambda folder: None)
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "thesis.tex").write_text("years")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for out, reason in (
        (source, "holds the checkpoint"),
        (tmp_path, "holds the checkpoint"),
        (source / "..", "holds the checkpoint"),
        (tmp_path / "precious", "holds no model"),
        (tmp_path / "here", "holds the current folder"),
    ):
        assert reason in fails(capsys, out, "--hf-path", source, "--force")
    assert (tmp_path / "precious" / "thesis.tex").exists()
    assert open_safetensors(source / "model.safetensors")


# Memory and time


@pytest.mark.usefixtures("exact_memory")
@pytest.mark.parametrize("quantize", [False, True])
def test_memory_stays_far_below_the_models_size(tmp_path: Path, quantize: bool) -> None:
    config = {**tiny.LLAMA, "vocab_size": 40000, "hidden_size": 256, "intermediate_size": 512}
    source = tiny.write_model(tmp_path / "hf", config)
    size = (source / "model.safetensors").stat().st_size
    assert size > 80e6
    mx.reset_peak_memory()
    held = mx.get_active_memory()
    convert.convert(tmp_path / "out", hf_path=source, quantize=quantize)
    assert mx.get_peak_memory() - held < 0.35 * size
    assert mx.get_cache_memory() == 0


def test_help_does_not_wait_for_mlx_lm() -> None:
    program = "import sys, convert; print({'mlx_lm', 'transformers', 'torch'} & set(sys.modules))"
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
