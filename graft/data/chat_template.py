r"""Chat templates: conversations to text, with the characters of each assistant turn.

The text is that of the model's chat template. An assistant turn starts after the template's
generation prompt and includes the special token that ends it. Without a template a conversation is
written in plain lines, where `</s>` stands for EOS:

    Tools: [{"type": "function", ...}]
    System: Be brief.
    User: Hello
    Assistant: Hello!</s>User: Bye
    Assistant: See you.</s>

Knows nothing of files; of tokenizers only their templates and special tokens.
"""

import functools
import json
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from graft.console import one_line
from graft.data.conversations import is_text
from graft.data.tokenize import Passage, Span, encode, transformers_tokenizer
from graft.pretrained.tokenizer import Tokenizer
from graft.runtime.limits import run_limited
from graft.storage.json_file import parse_json

# What a template may take to render a conversation; usual ones take a millisecond.
RENDER_SECONDS, RENDER_BYTES, MOST_RENDERED = 5.0, 1 << 30, 1 << 26
LARGEST_NUMBER, LONGEST_REASON = 1_000_000, 300
_GENERATION_TAG = re.compile(r"\{%[-+]?\s*(end)?generation\s*[-+]?%\}")
Message = Mapping[str, Any]
Tools = Sequence[Any] | None
# What templates write for today's date, so that the same data gives the same tokens every day. It
# is the default of Llama's templates.
TEMPLATE_DATE = datetime(2024, 7, 26)
_DATE_CALL = re.compile(r"""strftime_now\(\s*(['"])(.*?)\1\s*\)""")


class ChatError(Exception):
    """The template refuses a conversation, or renders it so that turns cannot be located."""


class ChatFormat:
    """How a model's chat template writes conversations.

    Args:
        tokenizer: of the model; without a chat template, conversations are plain lines.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        model = transformers_tokenizer(tokenizer)
        self._tokenizer: Any = tokenizer
        self._model: Any = model
        # A Python renderer that mlx-lm brings for some models.
        self._renderer = getattr(tokenizer, "_chat_template", None)
        self.has_template = self._renderer is not None or bool(
            getattr(model, "chat_template", None)
        )
        if self.has_template:
            special = {*model.all_special_tokens, *model.get_added_vocab()}
            self._special = {token for token in special if token.strip() == token}
            self._special_lengths = sorted({len(token) for token in self._special}, reverse=True)

    def passages(
        self, messages: Sequence[Message], tools: Tools, *, with_spans: bool
    ) -> list[Passage]:
        """The text of a conversation.

        Args:
            messages: each with `role` and `content`, or `tool_calls`.
            tools: descriptions of the tools that the assistant may call.
            with_spans: also locate the assistant's turns.

        Raises:
            ChatError: the template refuses the conversation, or a turn cannot be located in what it
                renders.
        """
        messages = [_with_parsed_calls(message) for message in messages]
        if not self.has_template:
            return plain_passages(messages, tools)
        text = self._render(messages, tools)
        spans = [
            self._turn_span(messages, tools, index, text)
            for index, message in enumerate(messages)
            if with_spans and message["role"] == "assistant"
        ]
        return [Passage(text, tuple(spans), starts=False, ends=False)]

    def prompt_ids(self, messages: Sequence[Message], tools: Tools) -> list[int]:
        """Token ids of a conversation that the assistant is to continue.

        Args:
            messages: each with `role` and `content`, or `tool_calls`.
            tools: descriptions of the tools that the assistant may call.

        Raises:
            ChatError: the template refuses the conversation.
        """
        messages = [_with_parsed_calls(message) for message in messages]
        if self.has_template:
            text = self._render(messages, tools, add_generation_prompt=True)
            passages = [Passage(text, (), starts=False, ends=False)]
        else:
            passages = plain_passages(messages, tools)
            unanswered = f"{passages.pop().text}\n" if not passages[-1].ends else ""
            prompt = f"{unanswered}Assistant:"
            passages.append(Passage(prompt, (), starts=not passages, ends=False))
        ids: list[int] = []
        for passage, encoded in zip(passages, encode(passages, self._tokenizer), strict=True):
            ids += [*encoded.ids, *([self._tokenizer.eos_token_id] if passage.ends else [])]
        return ids

    def _render(
        self, messages: Sequence[Message], tools: Tools, *, add_generation_prompt: bool = False
    ) -> str:
        settings: dict[str, Any] = {
            "tokenize": False,
            "add_generation_prompt": add_generation_prompt,
        }
        if tools:
            settings["tools"] = list(tools)
        try:
            if self._renderer is None:
                settings["chat_template"] = self._template(tools)
            text: str = run_limited(
                lambda: self._tokenizer.apply_chat_template(list(messages), **settings),
                seconds=RENDER_SECONDS,
                growth_bytes=RENDER_BYTES,
            )
        except Exception as error:  # a template is a program, which can fail in any way
            reason = one_line(error)[:LONGEST_REASON]
            raise ChatError(
                f"the model's chat template refuses this conversation: {reason}"
            ) from error
        if not isinstance(text, str) or len(text) > MOST_RENDERED or not is_text(text):
            raise ChatError("the model's chat template does not render this conversation as text")
        return text

    def _template(self, tools: Tools) -> str:
        """The source of the template, with the date written into it."""
        template: str = self._model.get_chat_template(None, tools or None)
        check_template(template)
        return _DATE_CALL.sub(lambda call: repr(TEMPLATE_DATE.strftime(call[2])), template)

    def _turn_span(self, messages: Sequence[Message], tools: Tools, index: int, text: str) -> Span:
        """The characters of message `index` in `text`, the whole conversation."""
        start = self._turn_start(messages, tools, index, text)
        prefix = self._render(messages[: index + 1], tools)
        end_token = self._ending_special_token(prefix)
        if text.startswith(prefix) and len(prefix) > start:
            return start, len(prefix.rstrip() if end_token else prefix)
        # Some templates render the last turn differently from earlier ones (Qwen3 drops the
        # reasoning of earlier turns), so that `prefix` is not how `text` starts.
        _, after = self._text_around(messages, tools, index)
        content_end = len(text) - len(after)
        from_end_token = after.lstrip()
        if not (
            end_token
            and text.endswith(after)
            and from_end_token.startswith(end_token)
            and start <= content_end
        ):
            raise ChatError(_unlocated(index, "ends"))
        return start, len(text) - len(from_end_token) + len(end_token)

    def _turn_start(self, messages: Sequence[Message], tools: Tools, index: int, text: str) -> int:
        """Where message `index` starts in `text`: after the generation prompt, if there is one."""
        try:
            earlier = self._render(messages[:index], tools)
            prompt = self._render(messages[:index], tools, add_generation_prompt=True)
        except ChatError:  # Many templates refuse a conversation without messages.
            earlier = prompt = ""
        if len(prompt) > len(earlier) and text.startswith(prompt):
            return len(prompt)
        # There is no generation prompt, or it opens a reasoning block that this turn does not have:
        # the turn starts with its content.
        before, _ = self._text_around(messages, tools, index)
        if not text.startswith(before):
            raise ChatError(_unlocated(index, "starts"))
        return len(before)

    def _ending_special_token(self, text: str) -> str:
        """The special token that a text ends with, apart from white space, or an empty string."""
        text = text.rstrip()
        endings = (text[-length:] for length in self._special_lengths)
        return next((ending for ending in endings if ending in self._special), "")

    def _text_around(
        self, messages: Sequence[Message], tools: Tools, index: int
    ) -> tuple[str, str]:
        """What the template writes before and after the content of message `index`.

        It is found by rendering the conversation with two contents that share no character. Tool
        calls and reasoning belong to the turn and are in neither part.
        """
        with_a, with_b = (
            self._render(
                [
                    *messages[:index],
                    {"role": "assistant", "content": content},
                    *messages[index + 1 :],
                ],
                tools,
            )
            for content in ("A", "B")
        )
        before = _common_prefix(with_a, with_b)
        return before, _common_prefix(with_a[::-1], with_b[::-1])[::-1]


@functools.cache
def check_template(source: str) -> None:
    """Refuse a template that makes a huge number or text in one operation.

    Such an operation cannot be interrupted; many small ones are, when the template is rendered.

    Raises:
        ValueError: it has a power, or a number above `LARGEST_NUMBER`.
        jinja2.TemplateError: it is not a template.
    """
    from jinja2 import nodes
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(extensions=[loopcontrols])
    tree = environment.parse(_GENERATION_TAG.sub("", source))
    if next(tree.find_all(nodes.Pow), None) is not None:
        raise ValueError("it computes a power")
    for number in tree.find_all(nodes.Const):
        if isinstance(number.value, int) and abs(number.value) > LARGEST_NUMBER:
            raise ValueError(f"it uses a number above {LARGEST_NUMBER:,}")


def plain_passages(messages: Sequence[Message], tools: Tools) -> list[Passage]:
    """A conversation as plain lines, one passage up to the end of each assistant turn."""
    lines = [f"Tools: {json.dumps(tools, ensure_ascii=False)}"] if tools else []
    passages: list[Passage] = []
    for message in messages:
        speaker = message["role"].capitalize() + ":"
        parts = [message.get("content") or "", _calls_text(message)]
        line = " ".join([speaker, *filter(None, parts)])
        lines.append(line)
        if message["role"] == "assistant":
            text = "\n".join(lines)
            span = (len(text) - len(line) + len(speaker), len(text))
            passages.append(Passage(text, (span,), starts=not passages))
            lines = []
    if lines:
        passages.append(Passage("\n".join(lines), (), starts=not passages, ends=False))
    return passages


def _common_prefix(first: str, second: str) -> str:
    length = 0
    for a, b in zip(first, second, strict=False):
        if a != b:
            break
        length += 1
    return first[:length]


def _unlocated(index: int, verb: str) -> str:
    return (
        f"where message {index + 1} {verb} cannot be told from what the model's chat template "
        "renders: train without --mask-prompt, or give the data as prompt and completion"
    )


def _calls_text(message: Message) -> str:
    calls = [call.get("function", call) for call in message.get("tool_calls") or ()]
    shown = [{key: call[key] for key in ("name", "arguments") if key in call} for call in calls]
    return "\n".join(json.dumps(call, ensure_ascii=False) for call in shown)


def _with_parsed_calls(message: Message) -> Message:
    """The message with arguments of tool calls as objects; OpenAI writes them as JSON strings."""
    if not message.get("tool_calls"):
        return message
    calls = [_with_parsed_arguments(call) for call in message["tool_calls"]]
    return {**message, "tool_calls": calls}


def _with_parsed_arguments(call: Mapping[str, Any]) -> Mapping[str, Any]:
    if "function" in call:
        return {**call, "function": _with_parsed_arguments(call["function"])}
    try:
        return {**call, "arguments": parse_json(call["arguments"])}
    except (KeyError, TypeError, ValueError):
        return call
