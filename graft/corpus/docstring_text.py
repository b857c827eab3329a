"""Cleans docstrings: removes signatures, and shortens text at the end of a paragraph or sentence.

Works on strings alone.
"""

import re

_CALL = re.compile(r"(?:def )?[A-Za-z_][\w.]*\(")
_AFTER_CALL = re.compile(r"(?: *--?> *(?P<type>[^\n]*?))?:?(?:\n(?:--\n)?|\Z)")
_TYPE = re.compile(r"(?:[\w.]+(?: \| [\w.]+)*(?: object)?)?")
_BRACKETED = re.compile(r"\[[^][]*\]|\([^()]*\)")
_OVERLOADED = "Overloaded function.\n"
_OVERLOAD = re.compile(r"\d+\. `*\w+\(.*")

# A line that introduces the next paragraph, is a heading or underlines one is not an end.
_PARAGRAPH_END = re.compile(r"(?<![-:=~^*])\n\n(?! *\.\. math::)")
# Two letters or closing marks precede a full stop; this excludes "e.g." and "J. Doe".
_SENTENCE_END = re.compile(
    r"(?<=[\w)\]`'\"]{2})(?<!\bcf)(?<!\bvs)[.!?][)`'\"]*(?=\s+[^\sa-z]|\s*\Z)"
)


def clean(doc: str) -> str:
    """A docstring without leading signatures, trailing blanks and repeated empty lines.

    Docstrings of compiled modules often start with the signature: ``add(a: array, b: array) ->
    array``. A docstring that is only a signature becomes empty.
    """
    lines = [line.rstrip() for line in doc.splitlines()]
    text = _without_signatures(re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip())
    if not text.startswith(_OVERLOADED):
        return text
    paragraphs = text.removeprefix(_OVERLOADED).strip().split("\n\n")
    return "\n\n".join(dict.fromkeys(text for text in paragraphs if not _OVERLOAD.fullmatch(text)))


def shorten(text: str, limit: int) -> str:
    """The text up to the last paragraph end within `limit` characters, or the last sentence end.

    If the last paragraph end is in the first half of the limit, a later sentence end is preferred.
    Text without any end within the limit becomes empty.
    """
    if len(text) <= limit:
        return text
    head = text[: limit + 2]  # a paragraph that ends at the limit is followed by two line breaks
    paragraphs = [match.start() for match in _PARAGRAPH_END.finditer(head)]
    sentences = [match.end() for match in _SENTENCE_END.finditer(text, 0, limit + 80)]
    paragraph = max((end for end in paragraphs if end <= limit), default=0)
    sentence = max((end for end in sentences if end <= limit), default=0)
    return text[: paragraph if paragraph > limit // 2 else max(paragraph, sentence)].rstrip()


def _without_signatures(text: str) -> str:
    rest = text
    while end := _signature_end(rest):
        rest = rest[end:].lstrip("\n")
    # An indented line continues the line before it, which was then not a signature.
    return text if rest.startswith(" ") else rest


def _signature_end(text: str) -> int:
    """Where the signature at the start of a text ends; 0 if there is none."""
    call = _CALL.match(text)
    close = _closing(text, call.end()) if call else 0
    after = _AFTER_CALL.match(text, close) if close else None
    if after is None:
        return 0
    returned = after["type"] or ""
    while _BRACKETED.search(returned):
        returned = _BRACKETED.sub("", returned)
    return after.end() if _TYPE.fullmatch(returned) else 0


def _closing(text: str, start: int) -> int:
    """The position after the bracket that closes the one before `start`; 0 if there is none."""
    depth = 1
    for position in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[position], 0)
        if depth == 0:
            return position + 1
    return 0
