r"""Conversations to text, with the characters of each assistant turn.

The text is that of the model's chat template. A turn of the assistant begins where the template's
generation prompt ends and goes through the special token that ends the turn. Without a template a
conversation is plain lines, where `</s>` stands for the token that ends texts:

    Tools: [{"type": "function", ...}]
    System: Be brief.
    User: Hello
    Assistant: Hello!</s>User: Bye
    Assistant: See you.</s>

Knows nothing of files; of tokenizers only their templates and special tokens.
"""

import json
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from graft.data.tokenize import Passage, Span, encode, hugging_face
from graft.pretrained.tokenizer import Tokenizer

Message = Mapping[str, Any]
# Templates that write today's date get this one, the default of Llama's: the same data has to give
# the same tokens tomorrow.
TODAY = datetime(2024, 7, 26)
_TODAY_CALL = re.compile(r"""strftime_now\(\s*(['"])(.*?)\1\s*\)""")


class ChatError(Exception):
    """A conversation that the template does not render, or whose turns it does not tell apart."""


class ChatFormat:
    """How a model writes conversations.

    Args:
        tokenizer: the model's; one without a chat template gives plain lines.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        model = hugging_face(tokenizer)
        self._tokenizer: Any = tokenizer
        self._model: Any = model
        self._renderer = getattr(tokenizer, "_chat_template", None)
        self.has_template = self._renderer is not None or bool(
            getattr(model, "chat_template", None)
        )
        if self.has_template:
            special = {*model.all_special_tokens, *model.get_added_vocab()}
            self._special = {name for name in special if name.strip() == name}
            self._special_lengths = sorted({len(name) for name in self._special}, reverse=True)

    def passages(
        self, messages: Sequence[Message], tools: Sequence[Any] | None, *, marked: bool
    ) -> list[Passage]:
        """The text of a conversation.

        Args:
            messages: each with `role` and `content`, or `tool_calls`.
            tools: descriptions of the tools that the assistant may call.
            marked: also find the assistant's turns.

        Raises:
            ChatError: the template refuses the conversation, or renders it so that a turn cannot be
                told from what surrounds it.
        """
        messages = [_with_parsed_calls(message) for message in messages]
        if not self.has_template:
            return plain_passages(messages, tools)
        whole = self._render(messages, tools)
        turns = [at for at, message in enumerate(messages) if message["role"] == "assistant"]
        spans = [self._span(messages, tools, at, whole) for at in turns] if marked else []
        return [Passage(whole, tuple(spans), starts=False, ends=False)]

    def prompt_ids(self, messages: Sequence[Message], tools: Sequence[Any] | None) -> list[int]:
        """Token ids of a conversation that the assistant is to continue.

        Args:
            messages: each with `role` and `content`, or `tool_calls`.
            tools: descriptions of the tools that the assistant may call.

        Raises:
            ChatError: the template refuses the conversation.
        """
        messages = [_with_parsed_calls(message) for message in messages]
        if self.has_template:
            text = self._render(messages, tools, prompt=True)
            passages = [Passage(text, (), starts=False, ends=False)]
        else:
            passages = plain_passages(messages, tools)
            opened = f"{passages.pop().text}\n" if not passages[-1].ends else ""
            passages.append(Passage(f"{opened}Assistant:", (), starts=not passages, ends=False))
        ids: list[int] = []
        for passage, encoded in zip(passages, encode(passages, self._tokenizer), strict=True):
            ids += [*encoded.ids, *([self._tokenizer.eos_token_id] if passage.ends else [])]
        return ids

    def _render(
        self, messages: Sequence[Message], tools: Sequence[Any] | None, *, prompt: bool = False
    ) -> str:
        from jinja2 import TemplateError

        settings: dict[str, Any] = {"tokenize": False, "add_generation_prompt": prompt}
        if tools:
            settings["tools"] = list(tools)
        try:
            if self._renderer is None:
                settings["chat_template"] = self._template(tools)
            text: str = self._tokenizer.apply_chat_template(list(messages), **settings)
        except (TemplateError, ValueError, TypeError, KeyError, IndexError) as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise ChatError(
                f"the model's chat template refuses this conversation: {reason}"
            ) from error
        return text

    def _template(self, tools: Sequence[Any] | None) -> str:
        template: str = self._model.get_chat_template(None, tools or None)
        return _TODAY_CALL.sub(lambda call: repr(TODAY.strftime(call[2])), template)

    def _span(
        self, messages: Sequence[Message], tools: Sequence[Any] | None, at: int, whole: str
    ) -> Span:
        """The characters of message `at` in the whole conversation's text."""
        start = self._start(messages, tools, at, whole)
        through = self._render(messages[: at + 1], tools)
        mark = self._special_end(through)
        if whole.startswith(through) and len(through) > start:
            return start, len(through.rstrip() if mark else through)
        # Some templates write earlier turns otherwise than the last one (Qwen3 leaves out their
        # reasoning), so that `through` is no beginning of the whole.
        _, rest = self._around(messages, tools, at)
        content_end = len(whole) - len(rest)
        ended = rest.lstrip()
        if not (mark and whole.endswith(rest) and ended.startswith(mark) and start <= content_end):
            raise ChatError(
                f"the model's chat template does not tell where message {at + 1} ends: train "
                "without --mask-prompt, or give the data as prompt and completion"
            )
        return start, len(whole) - len(ended) + len(mark)

    def _special_end(self, text: str) -> str:
        """The special token that a text ends with, spaces aside, or nothing."""
        text = text.rstrip()
        ends = (text[-length:] for length in self._special_lengths)
        return next((end for end in ends if end in self._special), "")

    def _start(
        self, messages: Sequence[Message], tools: Sequence[Any] | None, at: int, whole: str
    ) -> int:
        """Where the assistant takes over: after the generation prompt, if the template has one."""
        try:
            before = self._render(messages[:at], tools)
            prompt = self._render(messages[:at], tools, prompt=True)
        except ChatError:  # Many templates refuse a conversation without messages.
            before = prompt = ""
        if len(prompt) > len(before) and whole.startswith(prompt):
            return len(prompt)
        # No prompt, or one that opens a reasoning which this turn has not: before the content.
        header, _ = self._around(messages, tools, at)
        if not whole.startswith(header):
            raise ChatError(
                f"the model's chat template does not tell where message {at + 1} begins: train "
                "without --mask-prompt, or give the data as prompt and completion"
            )
        return len(header)

    def _around(
        self, messages: Sequence[Message], tools: Sequence[Any] | None, at: int
    ) -> tuple[str, str]:
        """What stands before and after the content of message `at`: that which no content changes.

        Calls and reasoning of the message are the assistant's too, and stand in neither.
        """
        one, two = (
            self._render(
                [*messages[:at], {"role": "assistant", "content": text}, *messages[at + 1 :]], tools
            )
            for text in ("A", "B")
        )
        return _common_start(one, two), _common_start(one[::-1], two[::-1])[::-1]


def plain_passages(messages: Sequence[Message], tools: Sequence[Any] | None) -> list[Passage]:
    """A conversation as plain lines; the token that ends texts closes each assistant turn."""
    lines = [f"Tools: {json.dumps(tools, ensure_ascii=False)}"] if tools else []
    passages: list[Passage] = []
    for message in messages:
        name = message["role"].capitalize() + ":"
        said = " ".join([name, *filter(None, [message.get("content") or "", _calls_text(message)])])
        lines.append(said)
        if message["role"] == "assistant":
            text = "\n".join(lines)
            span = (len(text) - len(said) + len(name), len(text))
            passages.append(Passage(text, (span,), starts=not passages))
            lines = []
    if lines:
        passages.append(Passage("\n".join(lines), (), starts=not passages, ends=False))
    return passages


def _common_start(one: str, two: str) -> str:
    pairs = enumerate(zip(one, two, strict=False))
    return one[: next((at for at, (a, b) in pairs if a != b), min(len(one), len(two)))]


def _calls_text(message: Message) -> str:
    calls = [call.get("function", call) for call in message.get("tool_calls") or ()]
    kept = [{key: call[key] for key in ("name", "arguments") if key in call} for call in calls]
    return "\n".join(json.dumps(call, ensure_ascii=False) for call in kept)


def _with_parsed_calls(message: Message) -> Message:
    """Arguments of tool calls as objects: OpenAI's files hold them as JSON in a string."""
    if not message.get("tool_calls"):
        return message
    return {**message, "tool_calls": [_with_parsed_arguments(c) for c in message["tool_calls"]]}


def _with_parsed_arguments(call: Mapping[str, Any]) -> Mapping[str, Any]:
    if "function" in call:
        return {**call, "function": _with_parsed_arguments(call["function"])}
    try:
        return {**call, "arguments": json.loads(call["arguments"])}
    except (KeyError, TypeError, json.JSONDecodeError):
        return call
