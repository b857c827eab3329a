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
import itertools
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from graft.console import one_line
from graft.data.assistant_turns import AssistantTurns
from graft.data.conversations import TRAIN_KEYS, ChatError, Message, is_text, is_trained
from graft.data.tokenize import Passage, Span, encode, transformers_tokenizer
from graft.pretrained.tokenizer import Tokenizer
from graft.runtime.limits import run_limited
from graft.storage.json_file import parse_json

# What a template may take to render a conversation; usual ones take a millisecond.
RENDER_SECONDS, RENDER_BYTES, MOST_RENDERED = 5.0, 1 << 30, 1 << 26
LARGEST_NUMBER, LONGEST_REASON = 1_000_000, 300
_GENERATION_TAG = re.compile(r"\{%[-+]?\s*(end)?generation\s*[-+]?%\}")
Tools = Sequence[Any] | None
# What templates write for today's date, so that the same data gives the same tokens every day. It
# is the default of Llama's templates.
TEMPLATE_DATE = datetime(2024, 7, 26)
_DATE_CALL = re.compile(r"""strftime_now\(\s*(['"])(.*?)\1\s*\)""")


class ChatFormat:
    """How a model's chat template writes conversations.

    Args:
        tokenizer: of the model; without a chat template, conversations are plain lines.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        model = transformers_tokenizer(tokenizer)
        self._tokenizer: Any = tokenizer
        self._model: Any = model
        self._counts: Counter[str] = Counter()
        # A Python renderer that mlx-lm brings for some models.
        self._renderer = getattr(tokenizer, "_chat_template", None)
        self.has_template = self._renderer is not None or bool(
            getattr(model, "chat_template", None)
        )
        if self.has_template:
            special = {*model.all_special_tokens, *model.get_added_vocab()}
            tokens = sorted((token for token in special if token.strip()), key=len, reverse=True)
            self._special_tokens = re.compile("|".join(map(re.escape, tokens)) or "(?!)")
            stops = sorted(token for token in tokenizer.eos_token_ids if token >= 0)
            self._stop_tokens = tuple(map(str, model.convert_ids_to_tokens(stops)))

    def passages(
        self, messages: Sequence[Message], tools: Tools, *, mask_prompt: bool
    ) -> list[Passage]:
        """The text of a conversation, and what of it is trained.

        Args:
            messages: each with `role` and `content`, or `tool_calls`.
            tools: descriptions of the tools that the assistant may call.
            mask_prompt: train the assistant's turns only. Turns whose weight is 0, and those of
                which the template writes nothing, are never trained.

        Raises:
            ChatError: the template refuses the conversation, or a turn cannot be located in what it
                renders.
        """
        messages = [_with_parsed_calls(message) for message in messages]
        _check_trainable(messages, mask_prompt=mask_prompt)
        if not self.has_template:
            return plain_passages(messages, tools, mask_prompt=mask_prompt)
        turns = AssistantTurns(
            lambda shown, prompt: self._render(shown, tools, add_generation_prompt=prompt),
            messages,
            self._special_tokens,
        )
        self._counts.update(turns.left_out)
        if tools and self._render(messages, None) == turns.text:
            self._counts["list of tools"] += 1
        spans = self._spans(turns, messages, tools, mask_prompt=mask_prompt)
        return [Passage(turns.text, spans, starts=False, ends=False)]

    def notes(self) -> list[str]:
        """What should be known about the conversations that were formatted, a line each."""
        counts = self._counts
        parts = [
            f"{number:,} {kind.replace(' ', 's ', 1) if ' of ' in kind else kind + 's'}"
            if number > 1
            else f"1 {kind}"
            for kind, number in counts.items()
            if kind not in ("turns", "endless", "lost") and number
        ]
        lines = [f"the chat template leaves out {', '.join(parts)}"] if parts else []
        if counts["lost"]:
            lines.append(
                f"not trained: {counts['lost']:,} assistant turns of which the chat template "
                "writes nothing"
            )
        if counts["endless"]:
            stops = ", ".join(self._stop_tokens) or "none is known"
            lines.append(
                f"{counts['endless']:,} of {counts['turns']:,} trained assistant turns do not end "
                f"with a token that stops generation ({stops})"
            )
        return lines

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
            passages = [Passage(text, starts=False, ends=False)]
        else:
            passages = plain_passages(messages, tools)
            unanswered = f"{passages.pop().text}\n" if not passages[-1].ends else ""
            prompt = f"{unanswered}Assistant:"
            passages.append(Passage(prompt, starts=not passages, ends=False))
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

    def _generation_spans(
        self, messages: Sequence[Message], tools: Tools, text: str
    ) -> list[Span] | None:
        """The characters that the template itself marks as the assistant's, by `{% generation %}`.

        Returns:
            `None` if it marks none.
        """
        template = None if self._renderer is not None else self._template(tools)
        if template is None or not _GENERATION_TAG.search(template):
            return None
        from transformers.utils.chat_template_utils import render_jinja_template

        result: Any = render_jinja_template(
            conversations=[
                [{k: v for k, v in message.items() if v is not None} for message in messages]
            ],
            tools=list(tools) if tools else None,
            chat_template=template,
            return_assistant_tokens_mask=True,
            **self._model.special_tokens_map,
            enable_thinking=getattr(self._tokenizer, "has_thinking", False),
        )
        (rendered,), (spans,) = result
        return (
            [(first, last) for first, last in spans if first < last] if rendered == text else None
        )

    def _spans(
        self,
        turns: AssistantTurns,
        messages: Sequence[Message],
        tools: Tools,
        *,
        mask_prompt: bool,
    ) -> tuple[Span, ...] | None:
        """The characters of a conversation that are trained; `None` for all."""
        assistant = [at for at, message in enumerate(messages) if message["role"] == "assistant"]
        lost = {at for at in assistant if turns.is_lost(at)}
        untrained = lost | {at for at in assistant if not is_trained(messages[at])}
        self._counts["lost"] += len(lost)
        left_out = [span for span in map(turns.span, sorted(untrained)) if span is not None]
        if not mask_prompt:
            return _complement(left_out, len(turns.text)) if left_out else None
        spans = self._generation_spans(messages, tools, turns.text)
        if spans is None:
            located = (turns.span(at) for at in assistant if at not in untrained)
            spans = [span for span in located if span is not None]
        else:
            spans = [
                span
                for span in spans
                if not any(first < span[1] and span[0] < last for first, last in left_out)
            ]
        for (_, last), (first, _) in itertools.pairwise(spans):
            if first < last:
                raise ChatError(
                    "two of the assistant's turns overlap in what the model's template renders"
                )
        self._counts["turns"] += len(spans)
        self._counts["endless"] += sum(
            not turns.text[first:last].rstrip().endswith(self._stop_tokens) for first, last in spans
        )
        return tuple(spans)


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


def plain_passages(
    messages: Sequence[Message], tools: Tools, *, mask_prompt: bool = False
) -> list[Passage]:
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
            start = len(text) - len(line) + len(speaker)
            spans: tuple[Span, ...] | None = ((start, len(text)),) if mask_prompt else None
            if not is_trained(message):
                spans = () if mask_prompt else ((0, start),)
            passages.append(Passage(text, spans, starts=not passages))
            lines = []
    if lines:
        spans = () if mask_prompt else None
        passages.append(Passage("\n".join(lines), spans, starts=not passages, ends=False))
    return passages


def _complement(spans: Sequence[Span], length: int) -> tuple[Span, ...]:
    """The characters of a text that are in none of the spans, which are in order."""
    edges = [0, *itertools.chain(*spans), length]
    return tuple(zip(edges[::2], edges[1::2], strict=True))


def _check_trainable(messages: Sequence[Message], *, mask_prompt: bool) -> None:
    """Refuse weights of messages that are not the assistant's and that would not be honoured.

    Raises:
        ChatError: names the message.
    """
    for number, message in enumerate(messages, 1):
        given = [key for key in TRAIN_KEYS if message.get(key) is not None]
        if message["role"] != "assistant" and given and is_trained(message) == mask_prompt:
            reason = (
                "only the assistant's messages are trained with --mask-prompt"
                if mask_prompt
                else "messages of others are trained too; --mask-prompt leaves them out"
            )
            raise ChatError(f"{given[0]!r} of message {number}: {reason}")


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
