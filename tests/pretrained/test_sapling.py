"""The included base model: what it holds, how large it is, and that its tokenizer loses nothing."""

import json
import zipfile

import numpy as np
import pytest
import sentencepiece

from support.paths import ROOT

FOLDER = ROOT / "graft" / "assets" / "sapling"
TEXTS = [
    "Q: What is relu in mlx?\nA: mlx.nn.relu Applies the Rectified Linear Unit.",
    "Args:\n    x (array): one\n        deeper\n\n\n\tafter a tab",
    "two  spaces, three   and eight        of them",
    " a leading space, a trailing one ",
    "\n",
    "\r\n",
    "naïve café, 数学, 🎉👩‍👩‍👧, \u00a0, \ufb01 is not fi",
    "0x1F, 3.14159, 1e-5, __init__, **kwargs",
]


@pytest.fixture(scope="module")
def params() -> dict:
    return json.loads((FOLDER / "params.json").read_text())


@pytest.fixture(scope="module")
def tokenizer() -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_file=str(FOLDER / "tokenizer.model"))


def count_parameters(params: dict) -> int:
    """The arithmetic of a Llama with an output head of its own."""
    dim, head_dim = params["dim"], params["dim"] // params["n_heads"]
    attention = 2 * dim * dim + 2 * dim * params["n_kv_heads"] * head_dim
    feed_forward = 3 * dim * params["hidden_dim"]
    layer = attention + feed_forward + 2 * dim
    return 2 * params["vocab_size"] * dim + params["n_layers"] * layer + dim


def test_the_folder_holds_a_meta_checkpoint_and_its_card():
    names = {path.name for path in FOLDER.iterdir()}
    assert names == {"README.md", "consolidated.00.pth", "params.json", "tokenizer.model"}


def test_params_say_what_a_reader_needs(params):
    assert params == {
        "dim": 256,
        "n_layers": 7,
        "n_heads": 8,
        "n_kv_heads": 4,
        "hidden_dim": 768,
        "vocab_size": 4096,
        "norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "max_seq_len": 512,
    }


def test_it_has_between_5_and_12_million_parameters(params):
    assert 5e6 <= count_parameters(params) <= 12e6


def test_it_takes_at_most_16_megabytes():
    files = ("consolidated.00.pth", "params.json", "tokenizer.model")
    assert sum((FOLDER / name).stat().st_size for name in files) <= 16_000_000


def test_the_checkpoint_is_torchs_zip_and_holds_each_parameter_once_in_float16(params):
    with zipfile.ZipFile(FOLDER / "consolidated.00.pth") as archive:
        assert archive.testzip() is None
        sizes = {info.filename: info.file_size for info in archive.infolist()}
        pickled = next(archive.read(name) for name in sizes if name.endswith("/data.pkl"))
    storages = [size for name, size in sizes.items() if "/data/" in name]
    assert sum(storages) == 2 * count_parameters(params)
    assert len(storages) == 3 + 9 * params["n_layers"]
    assert b"HalfStorage" in pickled
    assert b"layers.6.feed_forward.w3.weight" in pickled


def test_the_tokenizer_has_the_ids_of_llama(params, tokenizer):
    assert tokenizer.vocab_size() == params["vocab_size"]
    assert (tokenizer.unk_id(), tokenizer.bos_id(), tokenizer.eos_id()) == (0, 1, 2)


@pytest.mark.parametrize("text", TEXTS)
def test_text_survives_the_tokenizer_exactly(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.unk_id() not in ids
    assert tokenizer.decode(ids) == text


def test_any_byte_has_a_piece(tokenizer):
    pieces = {tokenizer.id_to_piece(i) for i in range(tokenizer.vocab_size())}
    assert {f"<0x{byte:02X}>" for byte in range(256)} <= pieces


def test_indentation_takes_one_token(tokenizer):
    unindented = len(tokenizer.encode("x:\n\ny"))
    assert all(len(tokenizer.encode(f"x:\n{' ' * n}\ny")) == unindented + 1 for n in (2, 4, 8))


def test_the_float16_weights_are_finite_and_not_trivial():
    with zipfile.ZipFile(FOLDER / "consolidated.00.pth") as archive:
        names = [name for name in archive.namelist() if "/data/" in name]
        weights = [np.frombuffer(archive.read(name), np.float16) for name in names]
    assert all(np.isfinite(weight).all() and weight.any() for weight in weights)
    assert max(abs(weight).max() for weight in weights) < 1000
