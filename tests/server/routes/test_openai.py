"""OpenAI's interface: with its own client where that is installed, and by the wire."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from graft.data.chat_template import ChatError, ChatFormat
from graft.engine.errors import EngineFailed
from graft.engine.streams import Piece, Stream
from graft.errors import RunError
from graft.pretrained.load import load_model

import pytest

from support.live_server import KEY, PROMPT, Live, serve
from support.tiny import LLAMA, write_hugging_face_tokenizer, write_model

TEMPLATE = (
    "{% for t in tools or [] %}[{{ t.function.name }}]{% endfor %}"
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
MESSAGES = [{"role": "user", "content": "Hello"}]


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    with serve(tmp_path_factory.mktemp("server"), api_key=KEY) as live:
        yield live


@pytest.fixture(scope="module")
def client(live: Live) -> Iterator[Any]:
    openai = pytest.importorskip("openai")
    url = f"http://127.0.0.1:{live.port}/v1"
    with openai.OpenAI(base_url=url, api_key=KEY, max_retries=0) as client:
        yield client


def post(live: Live, path: str, body: Any) -> tuple[int, Any]:
    return live.post(path, body, Authorization=f"Bearer {KEY}")


def events(content: str) -> list[Any]:
    parts = content.split("\n\n")
    assert parts[-2:] == ["data: [DONE]", ""]
    return [json.loads(part.removeprefix("data: ")) for part in parts[:-2]]


# Models


def test_adapters_are_the_base_s_children(client: Any) -> None:
    listed = client.models.list().data
    assert [(model.id, model.parent, model.root) for model in listed] == [
        ("tiny", None, "tiny"),
        ("small", "tiny", "small"),
        ("large", "tiny", "large"),
    ]
    assert {(model.object, model.owned_by) for model in listed} == {("model", "graft")}
    assert client.models.retrieve("large").parent == "tiny"


def test_a_model_that_is_not_there_is_not_found(client: Any) -> None:
    openai = pytest.importorskip("openai")
    expected = {
        "message": "The model `none` does not exist.",
        "type": "invalid_request_error",
        "param": "model",
        "code": "model_not_found",
    }
    for ask in (
        lambda: client.models.retrieve("none"),
        lambda: client.completions.create(model="none", prompt=PROMPT),
        lambda: client.chat.completions.create(model="none", messages=MESSAGES),
        lambda: client.completions.create(model="none", prompt=PROMPT, stream=True),
    ):
        with pytest.raises(openai.NotFoundError) as caught:
            ask()
        assert caught.value.body == expected


# Completions


@pytest.mark.parametrize("model", ["tiny", "small", "large"])
def test_a_completion_is_the_engine_s(client: Any, live: Live, model: str) -> None:
    adapters = {} if model == "tiny" else {model: 1.0}
    alone = live.engine.generate(PROMPT, adapters=adapters, max_tokens=12, logprobs=3)
    one = client.completions.create(
        model=model, prompt=PROMPT, max_tokens=12, temperature=0, logprobs=3
    )
    choice = one.choices[0]
    assert (one.object, one.model, choice.index) == ("text_completion", model, 0)
    assert (choice.text, choice.finish_reason) == (alone.text, alone.finish_reason)
    assert choice.logprobs.tokens == [token.text for token in alone.tokens]
    assert choice.logprobs.token_logprobs == pytest.approx(
        [token.logprob for token in alone.tokens], abs=1e-4
    )
    assert one.usage.prompt_tokens == alone.prompt_tokens
    assert one.usage.completion_tokens == len(alone.tokens)
    assert one.usage.total_tokens == alone.prompt_tokens + len(alone.tokens)


def test_a_stream_gives_what_the_whole_answer_does(client: Any) -> None:
    asked = {
        "model": "large",
        "prompt": PROMPT,
        "max_tokens": 20,
        "temperature": 0,
        "logprobs": 2,
        "echo": True,
    }
    whole = client.completions.create(**asked)
    options = {"include_usage": True}
    chunks = list(client.completions.create(**asked, stream=True, stream_options=options))
    choices = [chunk.choices[0] for chunk in chunks[:-1]]
    assert "".join(choice.text for choice in choices) == whole.choices[0].text
    assert whole.choices[0].text.startswith(PROMPT)
    assert [choice.finish_reason for choice in choices] == [None] * (len(choices) - 1) + ["length"]
    told = [choice.logprobs for choice in choices if choice.logprobs]
    for name in ("tokens", "token_logprobs", "text_offset"):
        joined = [value for one in told for value in getattr(one, name)]
        expected = getattr(whole.choices[0].logprobs, name)
        near = name == "token_logprobs"
        assert joined == (pytest.approx(expected, abs=1e-4) if near else expected)
    assert [chunk.usage for chunk in chunks[:-1]] == [None] * len(choices)
    assert (chunks[-1].choices, chunks[-1].usage.total_tokens) == ([], whole.usage.total_tokens)
    assert len({chunk.id for chunk in chunks}) == 1


def test_a_seed_repeats_an_answer_and_another_gives_another(client: Any) -> None:
    def ask(seed: int) -> str:
        asked = {"model": "tiny", "prompt": PROMPT, "max_tokens": 30, "temperature": 1.5}
        text: str = client.completions.create(**asked, seed=seed).choices[0].text
        return text

    assert ask(3) == ask(3) != ask(4)
    assert ask(-3) == ask(-3)


def test_a_stop_string_ends_the_answer_before_it(client: Any, live: Live) -> None:
    whole = live.engine.generate(PROMPT, max_tokens=20).text
    stop = whole[5:8]
    expected = whole[: whole.index(stop)]
    asked = {"model": "tiny", "prompt": PROMPT, "max_tokens": 20, "temperature": 0}
    one = client.completions.create(**asked, stop=stop).choices[0]
    assert (one.text, one.finish_reason) == (expected, "stop")
    chunks = list(client.completions.create(**asked, stop=[stop, "never"], stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == expected
    assert chunks[-1].choices[0].finish_reason == "stop"


def test_the_base_scores_what_an_adapter_wrote(client: Any, live: Live) -> None:
    asked = {"model": "large", "prompt": PROMPT, "max_tokens": 6, "temperature": 0}
    told = client.completions.create(**asked, extra_body={"return_token_ids": True}).choices[0]
    ids = [*told.prompt_token_ids, *told.token_ids]
    assert told.prompt_token_ids == live.engine.encode(PROMPT)
    scored = client.completions.create(
        model="tiny", prompt=ids, max_tokens=0, echo=True, logprobs=0
    )
    values = scored.choices[0].logprobs.token_logprobs
    alone = live.engine.submit(ids, max_tokens=0, echo=True, logprobs=0)
    alone.result()
    assert values[0] is None
    assert values[1:] == pytest.approx([token.logprob for token in alone.prompt[1:]], abs=1e-5)
    assert len(values) == len(ids)
    assert scored.usage.completion_tokens == 0


def test_adapters_go_in_the_extra_body(client: Any, live: Live) -> None:
    asked = {"model": "tiny", "prompt": PROMPT, "max_tokens": 12, "temperature": 0}
    alone = live.engine.generate(PROMPT, adapters={"large": 0.5}, max_tokens=12).text
    for extra in ({"adapters": {"large": 0.5}}, {"lora": [{"id": 1, "scale": 0.5}]}):
        assert client.completions.create(**asked, extra_body=extra).choices[0].text == alone


# Chat


def test_a_chat_without_a_template_is_plain_lines(client: Any, live: Live) -> None:
    alone = live.engine.generate("User: Hello\nAssistant:", max_tokens=12)
    one = client.chat.completions.create(
        model="tiny", messages=MESSAGES, max_tokens=12, temperature=0
    )
    assert one.object == "chat.completion"
    assert one.choices[0].message.role == "assistant"
    assert one.choices[0].message.content == alone.text
    assert one.choices[0].finish_reason == alone.finish_reason
    assert one.usage.prompt_tokens == alone.prompt_tokens


def test_a_chat_s_stream_gives_what_the_whole_answer_does(client: Any) -> None:
    asked = {
        "model": "small",
        "messages": MESSAGES,
        "max_completion_tokens": 12,
        "temperature": 0,
        "logprobs": True,
        "top_logprobs": 2,
    }
    whole = client.chat.completions.create(**asked)
    chunks = list(client.chat.completions.create(**asked, stream=True))
    deltas = [chunk.choices[0].delta for chunk in chunks]
    assert deltas[0].role == "assistant"
    assert "".join(delta.content or "" for delta in deltas) == whole.choices[0].message.content
    told = [c.choices[0].logprobs for c in chunks if c.choices[0].logprobs]
    tokens = [token for one in told for token in one.content]
    expected = whole.choices[0].logprobs.content
    assert [token.token for token in tokens] == [token.token for token in expected]
    assert [token.bytes for token in tokens] == [token.bytes for token in expected]
    assert all(len(token.top_logprobs) == 2 for token in tokens)
    assert tokens[0].top_logprobs[0].logprob == pytest.approx(tokens[0].logprob, abs=1e-5)


def test_tools_reach_the_chat_template(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", {**LLAMA, "eos_token_id": 0})
    (folder / "tokenizer.model").unlink()
    write_hugging_face_tokenizer(folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["chat_template"] = TEMPLATE
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    _, tokenizer, _ = load_model(folder)
    tools = [{"type": "function", "function": {"name": "find"}}]
    chat = ChatFormat(tokenizer)
    for given, text in ((tools, "[find]user: Hello\nassistant:"), ([], "user: Hello\nassistant:")):
        assert tokenizer.decode(chat.prompt_ids(MESSAGES, given)) == text


def test_messages_that_the_template_refuses_are_told(
    live: Live, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise ChatError("roles must alternate")

    monkeypatch.setattr(live.service.chat, "prompt_ids", refuse)
    status, content = post(live, "/v1/chat/completions", {"messages": MESSAGES})
    assert status == 400
    assert content["error"]["message"] == "roles must alternate"
    assert content["error"]["param"] == "messages"


# Bad input


def test_a_wrong_key_is_the_client_s_authentication_error(live: Live) -> None:
    openai = pytest.importorskip("openai")
    url = f"http://127.0.0.1:{live.port}/v1"
    with openai.OpenAI(base_url=url, api_key="no", max_retries=0) as wrong:
        with pytest.raises(openai.AuthenticationError) as caught:
            wrong.models.list()
        assert caught.value.code == "invalid_api_key"


def test_wrong_types_are_the_client_s_bad_request(client: Any) -> None:
    openai = pytest.importorskip("openai")
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="tiny", prompt=PROMPT, temperature="hot", top_p=-1)
    assert caught.value.param == "temperature"
    assert "top_p is -1" in caught.value.message


def test_a_prompt_that_is_too_long_tells_its_tokens_and_the_limit(live: Live) -> None:
    status, content = post(live, "/v1/completions", {"prompt": [5] * 600})
    assert status == 400
    assert content["error"]["code"] == "context_length_exceeded"
    assert "600" in content["error"]["message"] and "512" in content["error"]["message"]


def test_more_tokens_than_the_server_gives_are_refused(live: Live) -> None:
    status, content = post(live, "/v1/completions", {"prompt": PROMPT, "max_tokens": 5000})
    assert (status, content["error"]["param"]) == (400, "max_tokens")
    assert "5000" in content["error"]["message"] and "4096" in content["error"]["message"]


def test_an_answer_whose_length_is_not_told_has_a_default_within_the_limit(tmp_path: Path) -> None:
    with serve(tmp_path, max_tokens=20) as live:
        for path, body, tokens in (
            ("/v1/completions", {"prompt": PROMPT}, 16),
            ("/v1/chat/completions", {"messages": MESSAGES}, 20),
        ):
            status, content = live.post(path, {**body, "temperature": 0})
            assert (status, content["usage"]["completion_tokens"]) == (200, tokens)


@pytest.mark.parametrize("prompt", [[511, 512], [10**30]])
def test_ids_outside_the_vocabulary_are_refused(live: Live, prompt: list[int]) -> None:
    status, content = post(live, "/v1/completions", {"prompt": prompt})
    assert status == 400
    assert "512" in content["error"]["message"]


@pytest.mark.parametrize(
    "error, message",
    [
        (EngineFailed("a step failed"), "a step failed"),
        (RunError("no memory"), "no memory"),
        (ZeroDivisionError("a bug"), "internal error; see the server's log"),
    ],
)
def test_what_fails_after_the_first_event_is_told_in_an_event(
    live: Live, monkeypatch: pytest.MonkeyPatch, error: Exception, message: str
) -> None:
    failing = Stream("1", 3)
    failing.put(Piece("Hi", []))
    failing.end("failed", error=error)
    monkeypatch.setattr(live.engine, "submit", lambda *_, **__: failing)
    status, content = post(live, "/v1/completions", {"prompt": PROMPT, "stream": True})
    assert status == 200
    first, second = events(content)
    assert first["choices"][0]["text"] == "Hi"
    assert second["error"] == {
        "message": message,
        "type": "server_error",
        "param": None,
        "code": None,
    }


def test_an_empty_prompt_starts_with_the_start_token(live: Live) -> None:
    status, content = post(live, "/v1/completions", {"prompt": "", "max_tokens": 3})
    assert (status, content["usage"]["prompt_tokens"]) == (200, 1)


@pytest.mark.parametrize(
    "content",
    [
        b'"tool_calls": [{"function": null}]',
        b'"tool_calls": [null]',
        b'"tool_calls": [{"function": {"name": "f", "arguments": %s}}]' % (b"9" * 5000),
        b'"tool_calls": [{"function": {"name": "f", "arguments": "[\\ud800]"}}]',
        b'"name": ' + b"[" * 900 + b"]" * 900,
    ],
)
def test_messages_that_no_template_can_write_are_bad_requests(live: Live, content: bytes) -> None:
    sent = b'{"messages": [{"role": "user", "content": "x"}, {"role": "assistant", %s}]}' % content
    assert post(live, "/v1/chat/completions", sent)[0] == 400
