"""A tokenizer of UTF-8 bytes, whose ids a test can write by hand."""


class ByteTokenizer:
    """BOS is 1, EOS is 2, and byte b is 3 + b; reports no offsets."""

    eos_token_id: int | None = 2
    eos_token_ids = frozenset({2})

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        return [1] * add_special_tokens + [3 + byte for byte in text.encode()]

    def decode(self, ids: list[int]) -> str:
        return bytes(token - 3 for token in ids if token > 2).decode()
