"""Text to token ids and back: SentencePiece folders here, Hugging Face ones through mlx-lm.

Both kinds offer `encode(text)` with the model's own start token, `decode(ids)`, `eos_token_id` and
`eos_token_ids`.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

from graft.errors import InputError, first_line


class Tokenizer(Protocol):
    """What Graft asks of a tokenizer."""

    eos_token_id: int
    eos_token_ids: set[int]

    def encode(self, text: str) -> list[int]:
        """Token ids, the start token first where the model has one."""
        ...

    def decode(self, ids: list[int]) -> str:
        """The text of token ids."""
        ...


class SentencePieceTokenizer:
    """A `tokenizer.model` file of SentencePiece, as Llama's first generations and Mistral have it.

    Args:
        path: the model file.

    Raises:
        InputError: the file is no SentencePiece model.
    """

    def __init__(self, path: Path) -> None:
        from sentencepiece import SentencePieceProcessor

        self._model: Any = SentencePieceProcessor()
        try:
            self._model.LoadFromSerializedProto(path.read_bytes())
        except RuntimeError as error:
            raise InputError(
                f"{path} is no SentencePiece model; a tiktoken vocabulary (Llama 3) needs the "
                "tokenizer.json of its Hugging Face repository beside it"
            ) from error
        self.bos_token_id: int = self._model.bos_id()
        self.eos_token_id: int = self._model.eos_id()
        self.eos_token_ids = {self.eos_token_id} - {-1}
        self.vocab_size: int = self._model.GetPieceSize()

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`, after BOS where the model has one and `add_special_tokens` holds."""
        ids: list[int] = self._model.EncodeAsIds(text)
        starts = add_special_tokens and self.bos_token_id >= 0
        return [self.bos_token_id, *ids] if starts else ids

    def encode_many(
        self, texts: Sequence[str], *, add_special_tokens: bool = True, offsets: bool = False
    ) -> list[tuple[list[int], list[tuple[int, int]] | None]]:
        """Token ids of many texts at once, as `encode` gives them.

        Args:
            texts: what to encode.
            add_special_tokens: whether BOS comes first, where the model has one.
            offsets: also tell the (first, last + 1) characters of each token. Every byte token of
                a character has that character's, and BOS has none: (0, 0).
        """
        starts = [self.bos_token_id] if add_special_tokens and self.bos_token_id >= 0 else []
        if not offsets:
            return [([*starts, *ids], None) for ids in self._model.EncodeAsIds(list(texts))]
        found = self._model.EncodeAsOffsetMapping(list(texts))
        return [
            ([*starts, *one["ids"]], [*((0, 0) for _ in starts), *_widened(one["offsets"])])
            for one in found
        ]

    def serialize(self) -> bytes:
        """The whole model, as its file holds it."""
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
        """The text of token ids; control tokens have none, stray bytes become U+FFFD.

        Nor have ids above the vocabulary, which models have whose embedding is padded to a round
        size.
        """
        text: str = self._model.DecodeIds([i for i in ids if i < self.vocab_size])
        return text


def _widened(offsets: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Give the first byte tokens of a character its end, which only the last one has."""
    widened: list[tuple[int, int]] = []
    for first, last in reversed(offsets):
        widened.append((first, max(last, widened[-1][1]) if first == last and widened else last))
    return widened[::-1]


class StreamingDecoder:
    """Decodes ids one after another, holding back characters that are not complete yet.

    A window of the last two released groups is decoded each time, so that tokenizers whose text of
    a token depends on what precedes it (a leading space, a character spread over byte tokens) come
    out right, in time linear in the ids.

    Args:
        tokenizer: anything with `decode`.
        context: ids that come before, such as the end of a prompt; their text is not given out
            again.
    """

    def __init__(self, tokenizer: Tokenizer, context: Iterable[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._ids = list(context)[-16:]
        self._start = 0
        self._released = len(self._ids)

    def add(self, token: int) -> str:
        """The text that `token` completes, which may be empty."""
        self._ids.append(token)
        return self._release(final=False)

    def finish(self) -> str:
        """What was held back."""
        return self._release(final=True)

    def _release(self, *, final: bool) -> str:
        before = self._tokenizer.decode(self._ids[self._start : self._released])
        text = self._tokenizer.decode(self._ids[self._start :])
        if len(text) <= len(before) or (text.endswith("\ufffd") and not final):
            return ""
        self._start, self._released = self._released, len(self._ids)
        return text[len(before) :]


def load_tokenizer(folder: Path, eos_token_ids: int | list[int] | None = None) -> Tokenizer:
    """The tokenizer of a model folder.

    Args:
        folder: holds `tokenizer.json` and its like, or only `tokenizer.model`.
        eos_token_ids: further ids that end a text, as config.json tells them.

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
    except Exception as error:  # transformers and its Rust half raise what they like
        raise InputError(f"cannot read the tokenizer of {folder}: {first_line(error)}") from error
    return tokenizer
