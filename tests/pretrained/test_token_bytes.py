"""The bytes of single tokens, added up, are those of the text."""

from pathlib import Path

from graft.pretrained.token_bytes import TokenBytes
from graft.pretrained.tokenizer import Tokenizer, load_tokenizer

import pytest

from support.tiny import TEXTS, write_hugging_face_tokenizer, write_sentencepiece


@pytest.fixture(params=["sentencepiece", "byte-level", "unknown"])
def tokenizer(request: pytest.FixtureRequest, tmp_path: Path) -> Tokenizer:
    if request.param == "sentencepiece":
        write_sentencepiece(tmp_path / "tokenizer.model")
        return load_tokenizer(tmp_path)
    own = load_tokenizer(write_hugging_face_tokenizer(tmp_path))
    return own if request.param == "byte-level" else Unknown(own)


class Unknown:
    """A tokenizer of which only the protocol is known."""

    def __init__(self, own: Tokenizer) -> None:
        self.eos_token_id, self.eos_token_ids = own.eos_token_id, own.eos_token_ids
        self.encode, self.decode = own.encode, own.decode


@pytest.mark.parametrize("text", TEXTS)
def test_the_bytes_of_tokens_are_those_of_the_text(tokenizer: Tokenizer, text: str) -> None:
    if isinstance(tokenizer, Unknown) and not text.isascii():
        pytest.skip("parts of characters are not told by decode")
    token_bytes = TokenBytes(tokenizer)
    joined = b"".join(map(token_bytes.of, tokenizer.encode(text)))
    assert joined.decode().strip() == text.strip()


def test_part_of_a_character_has_its_byte_and_no_text(tmp_path: Path) -> None:
    write_sentencepiece(tmp_path / "tokenizer.model")
    tokenizer = load_tokenizer(tmp_path)
    *_, first, second = tokenizer.encode("\N{GREEK CAPITAL LETTER OMEGA}")
    token_bytes = TokenBytes(tokenizer)
    assert [token_bytes.of(first), token_bytes.of(second)] == [b"\xce", b"\xa9"]
    assert token_bytes.text(first) == "\ufffd"


def test_ids_above_the_vocabulary_have_no_bytes(tokenizer: Tokenizer) -> None:
    assert TokenBytes(tokenizer).of(100_000) == b""
