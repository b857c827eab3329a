"""The bytes of single tokens, including tokens that are only a part of a character."""

from functools import lru_cache
from typing import Any

from graft.pretrained.tokenizer import SentencePieceTokenizer, Tokenizer

SPACE = "\u2581"  # how SentencePiece writes a space


class TokenBytes:
    """Maps token ids to bytes.

    Args:
        tokenizer: a model's. Its vocabulary may be SentencePiece's, byte-level BPE in GPT-2's
            letters, or raw bytes.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._pieces = _pieces(tokenizer)
        self.of = lru_cache(maxsize=1 << 16)(self._of)

    def text(self, token: int) -> str:
        """The token's text; U+FFFD for an incomplete character."""
        return self.of(token).decode("utf-8", "replace")

    def _of(self, token: int) -> bytes:
        """The token's bytes, empty if the vocabulary has no such id."""
        if isinstance(self._tokenizer, SentencePieceTokenizer):
            return self._tokenizer.token_bytes(token)
        if self._pieces is None:
            return self._tokenizer.decode([token]).encode()
        if token >= len(self._pieces):
            return b""
        piece = self._pieces[token]
        if isinstance(piece, bytes):
            return piece.replace(SPACE.encode(), b" ")
        return b"".join(_BYTES.get(letter, letter.encode()) for letter in piece)


def _pieces(tokenizer: Tokenizer) -> list[Any] | None:
    """The tokens of a Hugging Face vocabulary, if mlx-lm knows how they are written."""
    return getattr(getattr(tokenizer, "detokenizer", None), "tokenmap", None)


def _byte_letters() -> dict[str, bytes]:
    """GPT-2's letters for bytes: printable ones are themselves, others start at 256.

    Reference: `bytes_to_unicode` in https://github.com/openai/gpt-2/blob/master/src/encoder.py
    """
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), 256)]
    unprintable = [byte for byte in range(256) if byte not in plain]
    letters = [*zip(map(chr, plain), plain, strict=True)]
    letters += [(chr(256 + number), byte) for number, byte in enumerate(unprintable)]
    return {letter: bytes([byte]) for letter, byte in letters}


_BYTES = _byte_letters()
