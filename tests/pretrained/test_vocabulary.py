"""Token ids that the embedding has no row for are refused, wherever they come from."""

from pathlib import Path

import lora
from graft.adapters.attach import attach
from graft.adapters.layer_config import LayerConfig
from graft.errors import InputError
from graft.pretrained.load import load_model
from graft.pretrained.vocabulary import check_token_ids, vocabulary_rows

import mlx.nn as nn
import pytest

from support.tiny import (
    LLAMA,
    TEXTS,
    make_model,
    write_hugging_face_tokenizer,
    write_model,
    write_rows,
)

SMALL = {**LLAMA, "num_hidden_layers": 1, "vocab_size": 400}
EXTRA = "<extra>"


def with_added_token(folder: Path) -> Path:
    """A model of 400 rows whose tokenizer has 400 tokens and one more, as Gemma 3's has."""
    from tokenizers import AddedToken, Tokenizer

    write_model(folder, SMALL)
    (folder / "tokenizer.model").unlink()
    file = str(write_hugging_face_tokenizer(folder) / "tokenizer.json")
    tokenizer = Tokenizer.from_file(file)
    filling = [AddedToken(f"<{n}>") for n in range(400 - tokenizer.get_vocab_size())]
    tokenizer.add_tokens([*filling, AddedToken(EXTRA)])
    assert tokenizer.token_to_id(EXTRA) == 400
    tokenizer.save(file)
    return folder


@pytest.mark.parametrize("command", ["--train", "--test", "--prompt=a"])
def test_a_tokenizer_of_another_model_is_refused_with_both_sizes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    folder = write_model(tmp_path / "model", {**SMALL, "vocab_size": 300})
    data = str(write_rows(tmp_path / "data", train=TEXTS, valid=TEXTS, test=TEXTS))
    adapter = "none" if command != "--train" else str(tmp_path / "a.npz")
    given = ["--model", str(folder), "--data", data, "--adapter-file", adapter]
    assert lora.main([command, *given]) == 2
    said = capsys.readouterr().err
    assert "the tokenizer has 400 tokens" in said and "300 rows" in said


def test_a_hugging_face_tokenizer_of_another_model_is_refused(tmp_path: Path) -> None:
    folder = write_model(tmp_path, {**SMALL, "vocab_size": 256})
    (folder / "tokenizer.model").unlink()
    write_hugging_face_tokenizer(folder)
    with pytest.raises(InputError, match="embedding only 256 rows"):
        load_model(folder)


def test_more_rows_than_tokens_are_normal(tmp_path: Path) -> None:
    model, tokenizer, _ = load_model(write_model(tmp_path, LLAMA))
    assert vocabulary_rows(model) == 512
    check_token_ids(model, [tokenizer.encode(text) for text in TEXTS])


@pytest.mark.parametrize("split", ["train", "valid", "test"])
def test_an_added_token_without_a_row_is_refused_in_a_text_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], split: str
) -> None:
    model = with_added_token(tmp_path / "model")
    rows = {name: [*TEXTS] for name in ("train", "valid", "test")}
    data, adapter = write_rows(tmp_path / "data", **rows), tmp_path / "a.npz"
    given = ["--model", str(model), "--data", str(data), "--adapter-file"]
    command = [*given, "none", "--test"]
    if split != "test":
        command = [*given, str(adapter), "--train", "--iters", "1", "--val-batches", "1"]
    assert lora.main(command) == 0
    rows[split].append(f"a {EXTRA} b")
    write_rows(data, **rows)
    assert lora.main([*command, "--force"]) == 2
    said = capsys.readouterr().err
    assert "token id 400" in said and "400 rows" in said


def test_a_prompt_with_such_a_token_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = with_added_token(tmp_path)
    assert lora.main(["--model", str(model), "--adapter-file", "none", "--prompt", EXTRA]) == 2
    assert "token ids below 400: 400" in capsys.readouterr().err


class Named(nn.Module):
    """A model with a table of positions beside the embedding of its tokens."""

    def __init__(self, **tables: int) -> None:
        super().__init__()
        for name, rows in tables.items():
            setattr(self, name, nn.Embedding(rows, 8))


def test_the_token_embedding_is_told_from_other_tables() -> None:
    assert vocabulary_rows(Named(wpe=16, wte=64)) == 64
    assert vocabulary_rows(Named(symbols=32)) == 32
    assert vocabulary_rows(Named(symbols=32, positions=16)) is None
    assert vocabulary_rows(nn.Linear(2, 2)) is None
    adapted = make_model(LLAMA)
    nn.quantize(adapted, group_size=32, bits=4)
    attach(adapted, {"model.embed_tokens": LayerConfig(2, 4.0)})
    assert vocabulary_rows(adapted) == 512
