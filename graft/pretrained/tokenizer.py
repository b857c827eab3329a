"""Tokenizers: SentencePiece models, and those of Hugging Face through mlx-lm."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

from graft.errors import InputError, first_line


class Tokenizer(Protocol):
    """What Graft needs of a tokenizer."""

    eos_token_id: int
    eos_token_ids: set[int]

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, after the start token if the model has one."""
        ...

    def decode(self, ids: list[int]) -> str:
        """The text of token ids."""
        ...


class SentencePieceTokenizer:
    """A `tokenizer.model` file of SentencePiece, as Llama 1 and 2 and Mistral have it.

    Args:
        path: the model file.

    Raises:
        InputError: the file is not a SentencePiece model.
    """

    def __init__(self, path: Path) -> None:
        from sentencepiece import SentencePieceProcessor

        self._model: Any = SentencePieceProcessor()
        try:
            self._model.LoadFromSerializedProto(path.read_bytes())
        except (RuntimeError, UnicodeDecodeError) as error:  # its reason may quote any bytes
            raise InputError(
                f"{path} is not a SentencePiece model; a tiktoken vocabulary (Llama 3) needs the "
                "tokenizer.json of its Hugging Face repository beside it"
            ) from error
        self.bos_token_id: int = self._model.bos_id()
        self.eos_token_id: int = self._model.eos_id()
        self.eos_token_ids = {self.eos_token_id} - {-1}
        self.vocab_size: int = self._model.GetPieceSize()

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text, after BOS if the model has one and `add_special_tokens` is true."""
        ((ids, _),) = self.encode_many([text], add_special_tokens=add_special_tokens)
        return ids

    def encode_many(
        self,
        texts: Sequence[str],
        *,
        add_special_tokens: bool = True,
        offsets: bool = False,
        written_edges: bool = False,
    ) -> list[tuple[list[int], list[tuple[int, int]] | None]]:
        """Encode many texts at once.

        Args:
            texts: the texts.
            add_special_tokens: start with BOS if the model has one.
            offsets: also return the characters of each token.
            written_edges: take BOS that a text starts with, and EOS that it ends with, for these
                tokens, and add no second BOS; otherwise they are text.

        Returns:
            For each text its token ids, and for each token (first, last + 1) of its characters if
            `offsets` is true. All byte tokens of a character have that character; BOS has (0, 0),
            unless it is written in the text.
        """
        edges = [self._written_edges(text) if written_edges else ("", "") for text in texts]
        texts = [
            text[len(start) : len(text) - len(end)]
            for text, (start, end) in zip(texts, edges, strict=True)
        ]
        starts = [self.bos_token_id] if add_special_tokens and self.bos_token_id >= 0 else []
        stops = [[self.eos_token_id] if end else [] for _, end in edges]
        if not offsets:
            encoded = self._model.EncodeAsIds(texts)
            return [([*starts, *i, *e], None) for i, e in zip(encoded, stops, strict=True)]
        results: list[tuple[list[int], list[tuple[int, int]] | None]] = []
        encoded = self._model.EncodeAsOffsetMapping(texts)
        for text, tokens, (start, end), stop in zip(texts, encoded, edges, stops, strict=True):
            first, last = len(start), len(start) + len(text)
            places = [(one + first, two + first) for one, two in _widened(tokens["offsets"])]
            before, after = [(0, first)] * len(starts), [(last, last + len(end))] * len(stop)
            results.append(([*starts, *tokens["ids"], *stop], [*before, *places, *after]))
        return results

    def _written_edges(self, text: str) -> tuple[str, str]:
        """BOS at the start of a text and EOS at its end, as they are written; else empty."""
        start, end = (
            self._model.IdToPiece(token) if token >= 0 else ""
            for token in (self.bos_token_id, self.eos_token_id)
        )
        start = start if text.startswith(start) else ""
        return start, end if text[len(start) :].endswith(end) else ""

    def serialize(self) -> bytes:
        """The content of the model file."""
        model: bytes = self._model.serialized_model_proto()
        return model

    def token_bytes(self, token: int) -> bytes:
        """The bytes of one token; control tokens and ids above the vocabulary have none."""
        if token >= self.vocab_size or self._model.IsControl(token):
            return b""
        piece: str = self._model.IdToPiece(token)
        if self._model.IsByte(token):
            return bytes([int(piece[3:5], 16)])
        return piece.replace("\u2581", " ").encode()

    def decode(self, ids: list[int]) -> str:
        """The text of token ids; incomplete characters become U+FFFD.

        Control tokens have no text, nor have ids above the vocabulary, which a model can produce
        if its embedding is padded to a round size.
        """
        text: str = self._model.DecodeIds([i for i in ids if i < self.vocab_size])
        return text


def without_second_start(ids: list[int], tokenizer: Tokenizer) -> list[int]:
    """Token ids of a text without the start token that it has twice.

    The tokenizer adds one, also to a text that begins with it.
    """
    start = getattr(tokenizer, "bos_token_id", None)
    return ids[1:] if start is not None and ids[:2] == [start, start] else ids


def encode_text(text: str, tokenizer: Tokenizer) -> list[int]:
    """Token ids of a text, with the start token once, also if the text begins with it."""
    if isinstance(tokenizer, SentencePieceTokenizer):
        return tokenizer.encode_many([text], written_edges=True)[0][0]
    return without_second_start(tokenizer.encode(text), tokenizer)


def _widened(offsets: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Extend the byte tokens of a character to its end, which only the last one has."""
    widened: list[tuple[int, int]] = []
    for first, last in reversed(offsets):
        widened.append((first, max(last, widened[-1][1]) if first == last and widened else last))
    return widened[::-1]


class StreamingDecoder:
    """Decodes token ids one by one and holds back incomplete characters.

    The text of a token can depend on the tokens before it (a leading space, a character of several
    byte tokens). So each step decodes the tokens since the last but one output, which takes time
    linear in the number of tokens.

    Args:
        tokenizer: anything with `decode`.
        context: preceding ids, such as a prompt's; their text is not returned.
    """

    def __init__(self, tokenizer: Tokenizer, context: Iterable[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._ids = list(context)[-16:]
        self._start = 0
        self._released = len(self._ids)

    def add(self, token: int) -> str:
        """The text that a token completes, which may be empty."""
        self._ids.append(token)
        return self._release(final=False)

    def finish(self) -> str:
        """The text that was held back."""
        return self._release(final=True)

    def _release(self, *, final: bool) -> str:
        known = self._tokenizer.decode(self._ids[self._start : self._released])
        text = self._tokenizer.decode(self._ids[self._start :])
        if len(text) <= len(known) or (text.endswith("\ufffd") and not final):
            return ""
        self._start, self._released = self._released, len(self._ids)
        return text[len(known) :]


def load_tokenizer(folder: Path, eos_token_ids: int | list[int] | None = None) -> Tokenizer:
    """The tokenizer of a model folder.

    Args:
        folder: has `tokenizer.json` and the files that belong to it, or only `tokenizer.model`.
        eos_token_ids: further ids that end a text, from the model's configuration.

    Raises:
        InputError: there is no tokenizer, or it cannot be read.
    """
    ids = {eos_token_ids} if isinstance(eos_token_ids, int) else set(eos_token_ids or ())
    if (folder / "tokenizer.model").is_file() and not (folder / "tokenizer.json").is_file():
        sentencepiece = SentencePieceTokenizer(folder / "tokenizer.model")
        sentencepiece.eos_token_ids |= ids
        return sentencepiece
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")):
        raise InputError(f"{folder} has no tokenizer (tokenizer.json or tokenizer.model)")
    from mlx_lm.tokenizer_utils import load

    try:
        tokenizer: Tokenizer = load(folder, eos_token_ids=sorted(ids) or None)
    except Exception as error:  # transformers and its Rust part raise many types
        raise InputError(f"cannot read the tokenizer of {folder}: {first_line(error)}") from error
    return tokenizer
