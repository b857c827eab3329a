"""Locates the assistant's turns in the text that a chat template writes, and what it leaves out.

A turn starts where the template's generation prompt ends, which is where the model starts to write,
and ends with what the template writes to end it. Nothing is known of how a template works: it is
rendered with other contents, and what stays the same is the template's.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property

from graft.data.conversations import ChatError, Message
from graft.data.tokenize import Span

# Renders messages, with or without the generation prompt; raises `ChatError`.
Render = Callable[[Sequence[Message], bool], str]

REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
_QUESTION: Message = {"role": "user", "content": "A"}
# Kinds of parts of messages.
_CALL, _REASONING = "tool call", "block of reasoning"
_CONTENT_KINDS = {
    "system": "system message",
    "user": "user message",
    "assistant": "answer",
    "tool": "tool result",
}
# Characters of a private plane of Unicode, which mark the ends of contents.
_FIRST_MARK = 0xF0000
_MARKS = re.compile(f"[{chr(_FIRST_MARK)}-\U000ffffd]")


class AssistantTurns:
    """The text of a conversation, and where the assistant's turns are in it.

    Args:
        render: renders messages with the model's chat template.
        messages: the conversation.
        special_tokens: matches the special tokens of the tokenizer.

    Attributes:
        text: the whole conversation.

    Raises:
        ChatError: the template refuses the conversation.
    """

    def __init__(
        self, render: Render, messages: Sequence[Message], special_tokens: re.Pattern[str]
    ) -> None:
        self._render = render
        self._messages = list(messages)
        self._special_tokens = special_tokens
        self._prefixes: dict[tuple[int, bool], str | None] = {}
        self.text = render(self._messages, False)

    def span(self, index: int) -> Span | None:
        """The characters of message `index`, an assistant's.

        Returns:
            (first, last + 1) characters; `None` if the template does not write an empty turn.

        Raises:
            ChatError: the turn cannot be located.
        """
        start = self._start(index)
        content_end = self._content_end(index)
        if content_end < start:
            message = self._messages[index]
            if not (message.get("tool_calls") or self.is_lost(index)):
                if _content(message).strip():
                    raise ChatError(_unlocated(index, "ends"))
                return None
            content_end = start  # The content is not written; calls may follow.
        return start, content_end + len(self._ending(index, content_end))

    def is_lost(self, index: int) -> bool:
        """Whether the template writes nothing of what message `index` says."""
        kept = self._parts[index]
        said = [kind for kind in kept if kind != _REASONING] or list(kept)
        return bool(said) and not any(kept[kind] for kind in said)

    @cached_property
    def left_out(self) -> Counter[str]:
        """How many parts of messages the template does not write, by kind."""
        counts: Counter[str] = Counter()
        for message, kept in zip(self._messages, self._parts, strict=True):
            for kind in (kind for kind, is_kept in kept.items() if not is_kept):
                counts[kind] += len(message["tool_calls"]) if kind == _CALL else 1
        return counts

    @cached_property
    def _parts(self) -> list[dict[str, bool]]:
        """For each message, the kinds of its parts, and whether the template writes them."""
        return [
            {
                kind: (kind in _CONTENT_KINDS.values() and index in self._marked[1])
                or self._matters(index, variant)
                for kind, variant in _variants(message)
            }
            for index, message in enumerate(self._messages)
        ]

    def _matters(self, index: int, variant: Message) -> bool:
        """Whether the text differs if message `index` is replaced by a variant."""
        return self._try_render(_replaced(self._messages, index, variant)) != self.text

    @cached_property
    def _marked(self) -> tuple[bool, dict[int, int]]:
        """Ends of contents, found by appending a mark to each.

        Returns:
            Whether the template writes the marked contents like the original ones, and for each
            message whose mark is in the text once, the last + 1 character of its content.
        """
        if _MARKS.search(self.text):
            return False, {}
        marked = [
            {**message, "content": _content(message) + chr(_FIRST_MARK + index)}
            if _content(message)
            else message
            for index, message in enumerate(self._messages)
        ]
        text = self._try_render(marked) or ""
        ends: dict[int, list[int]] = {}
        for number, match in enumerate(_MARKS.finditer(text)):
            ends.setdefault(ord(match[0]) - _FIRST_MARK, []).append(match.start() - number)
        same = _MARKS.sub("", text) == self.text
        return same, {index: found[0] for index, found in ends.items() if len(found) == 1}

    def _start(self, index: int) -> int:
        """Where message `index` starts: after the generation prompt, if there is one.

        Without one, a role's name is the template's, but blanks before the content are the turn's.
        """
        prompt_end = self._prompt_end(index)
        if prompt_end is not None and self._prefix(index, True) != self._prefix(index, False):
            return prompt_end
        before, _ = self._around(self._messages, index)
        if index == 0 and self._header and 0 <= self.text.find(self._header) < len(before):
            return self.text.find(self._header) + len(self._header)
        if prompt_end is not None and not before[prompt_end:].strip():
            return min(prompt_end, len(before))
        if not self.text.startswith(before):
            raise ChatError(_unlocated(index, "starts"))
        return len(before)

    def _prompt_end(self, index: int) -> int | None:
        """Where the prompt for message `index` ends in the text; `None` if it is not there."""
        prompt = self._prefix(index, True)
        if prompt is not None and self.text.startswith(prompt):
            return len(prompt)
        if prompt is None or index == 0:
            return None
        # A template may write earlier messages differently when others follow: the prompt is
        # compared from the content of the message before on.
        _, after = self._around(self._messages, index - 1)
        _, prompt_tail = self._around(self._messages[:index], index - 1, prompt=True)
        start = len(self.text) - len(after)
        matches = self.text.endswith(after) and after.startswith(prompt_tail)
        return start + len(prompt_tail) if matches else None

    @cached_property
    def _question(self) -> str:
        """A conversation of one question."""
        return self._try_render([_QUESTION]) or ""

    @cached_property
    def _header(self) -> str:
        """The generation prompt after a question, if there is one."""
        prompt = self._try_render([_QUESTION], True) or ""
        return prompt.removeprefix(self._question) if prompt.startswith(self._question) else ""

    def _content_end(self, index: int) -> int:
        """Where the content of message `index` ends; before its start if it is not written."""
        same, ends = self._marked
        if same and index in ends:
            return ends[index]
        _, after = self._around(self._messages, index)
        if not self.text.endswith(after):
            raise ChatError(_unlocated(index, "ends"))
        return len(self.text) - len(after)

    def _ending(self, index: int, content_end: int) -> str:
        """What is written after its content and belongs to message `index`: calls, and its end.

        That is what the template writes whatever follows the message.
        """
        tail = self.text[content_end:]
        if not tail.strip():
            return ""
        is_last = index == len(self._messages) - 1
        others = [*self._messages[: index + 1], *([_following(self._messages)] if is_last else [])]
        other = self._try_render(others)
        if other is None:
            is_whole = is_last and self._messages[index].get("tool_calls")
            return tail.rstrip() if is_whole else self._special_ending(index, tail)
        shared = ""
        if other.startswith(self.text[:content_end]):
            shared = self._shared_start(tail, other[content_end:])
        if not shared:  # Of an earlier turn, some templates leave out the reasoning.
            shared = self._shared_start(tail, self._around(others, index)[1])
        return shared or self._special_ending(index, tail)

    def _shared_start(self, one: str, other: str) -> str:
        """What two texts start with, without a special token or word that is cut, and blanks."""
        shared = _common_prefix(one, other)
        if len(shared) < min(len(one), len(other)):
            shared = shared[: self._last_edge(shared)]
        return shared.rstrip()

    def _last_edge(self, text: str) -> int:
        """Where the last special token or word of a text ends that may be cut in the middle."""
        tokens = [match.end() for match in self._special_tokens.finditer(text)]
        blanks = [match.end() for match in re.finditer(r"\s", text)]
        return max(tokens[-1:] + blanks[-1:], default=0)

    def _special_ending(self, index: int, tail: str) -> str:
        """The special token that a tail starts with, if it ends message `index`.

        Before another message it could also be what opens that one. It ends messages if a question
        that nothing follows ends with it.
        """
        match = self._special_tokens.match(tail.lstrip())
        if match is None:
            return ""
        is_last = index == len(self._messages) - 1
        if not (is_last or self._question.rstrip().endswith(match[0])):
            return ""
        return tail[: len(tail) - len(tail.lstrip())] + match[0]

    def _around(
        self, messages: Sequence[Message], index: int, *, prompt: bool = False
    ) -> tuple[str, str]:
        """What the template writes before and after the content of message `index`.

        It is found by rendering the conversation with two contents that share no character, and
        without reasoning. Tool calls are in the second part.
        """
        message = {k: v for k, v in messages[index].items() if k not in REASONING_KEYS}
        one, two = (
            self._render(_replaced(messages, index, {**message, "content": content}), prompt)
            for content in ("A", "B")
        )
        return _common_prefix(one, two), _common_prefix(one[::-1], two[::-1])[::-1]

    def _prefix(self, count: int, prompt: bool) -> str | None:
        """The text of the first messages; `None` if the template refuses them."""
        if (count, prompt) not in self._prefixes:
            self._prefixes[count, prompt] = self._try_render(self._messages[:count], prompt)
        return self._prefixes[count, prompt]

    def _try_render(self, messages: Sequence[Message], prompt: bool = False) -> str | None:
        try:
            return self._render(messages, prompt)
        except ChatError:
            return None


def _content(message: Message) -> str:
    return message.get("content") or ""


def _variants(message: Message) -> Iterator[tuple[str, Message]]:
    """The kinds of a message's parts, each with the message in which that part is different."""
    content = _content(message)
    reasoning, closing, answer = content.rpartition("</think>")
    if answer.strip():
        yield _CONTENT_KINDS[message["role"]], {**message, "content": content + "A"}
    if reasoning.replace("<think>", "").strip():
        yield _REASONING, {**message, "content": f"{reasoning}A{closing}{answer}"}
    for key in REASONING_KEYS:
        if isinstance(message.get(key), str) and message[key].strip():
            yield _REASONING, {**message, key: message[key] + "A"}
    if message.get("tool_calls"):
        function = {"name": "A", "arguments": {"A": "A"}}
        calls = [
            {**call, "function": function} if "function" in call else {**call, **function}
            for call in message["tool_calls"]
        ]
        yield _CALL, {**message, "tool_calls": calls}


def _following(messages: Sequence[Message]) -> Message:
    """A message that can follow a conversation that ends with the assistant's turn."""
    calls = messages[-1].get("tool_calls")
    if not calls:
        return _QUESTION
    name = calls[0].get("function", calls[0]).get("name")
    return {"role": "tool", "content": "A", "name": name, "tool_call_id": calls[0].get("id")}


def _replaced(messages: Sequence[Message], index: int, message: Message) -> list[Message]:
    return [*messages[:index], message, *messages[index + 1 :]]


def _common_prefix(first: str, second: str) -> str:
    pairs = enumerate(zip(first, second, strict=False))
    return first[: next((at for at, (a, b) in pairs if a != b), min(len(first), len(second)))]


def _unlocated(index: int, verb: str) -> str:
    return (
        f"where message {index + 1} {verb} cannot be told from what the model's chat template "
        "renders: train without --mask-prompt, or give the data as prompt and completion"
    )
