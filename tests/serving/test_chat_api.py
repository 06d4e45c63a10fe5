"""`/v1`: with OpenAI's real client, and with raw requests."""

from __future__ import annotations

import base64
import itertools
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import openai
import pytest
from patience import scaled
from starlette.testclient import TestClient

from caption_ray.captioning.predictor import Caption
from caption_ray.config import TokenizerName
from caption_ray.data.tokenizer import Tokenizer
from caption_ray.data.vocabulary import Vocabulary
from caption_ray.fetch import FetchError
from caption_ray.serving import service
from caption_ray.serving.batching import QueueFullError
from caption_ray.serving.contract import MAX_LENGTH, Options, UnavailableError

Pictures = Callable[..., bytes]
Captions = Callable[..., list[Caption]]
Clients = Callable[..., TestClient]
Refused = Callable[..., None]

TOKEN = "a-token-of-enough-length"


def data_uri(data: bytes, kind: str = "image/jpeg") -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def asking(url: Any, *before: dict[str, Any]) -> list[dict[str, Any]]:
    """Messages, of which the last is the user's, about the picture at `url`."""
    parts = [
        {"type": "text", "text": "What is this?"},
        {"type": "image_url", "image_url": {"url": url, "detail": "low"}},
    ]
    return [*before, {"role": "user", "content": parts}]


@pytest.fixture
def openai_client(client: Clients) -> Callable[..., openai.OpenAI]:
    def build(**settings: Any) -> openai.OpenAI:
        own = settings.keys() & {"api_key", "max_retries"}
        options = {name: settings.pop(name) for name in own}
        return openai.OpenAI(
            base_url="http://testserver/v1",
            http_client=client(**settings),
            **{"api_key": "any", **options},
        )

    return build


@pytest.fixture
def ask(openai_client: Callable[..., openai.OpenAI], picture: Pictures) -> Callable[..., Any]:
    """A completion for the picture with seed 2, from the given client or a new one."""

    def complete(client: openai.OpenAI | None = None, **asked: Any) -> Any:
        defaults: dict[str, Any] = {
            "model": "caption_ray",
            "messages": asking(data_uri(picture(2))),
        }
        return (client or openai_client()).chat.completions.create(**{**defaults, **asked})

    return complete


# Completions ----------------------------------------------------------------------------------


def test_a_completion_is_the_best_caption(
    ask: Callable[..., Any], picture: Pictures, captions: Captions, predictor: Any
) -> None:
    answer = ask()
    (choice,) = answer.choices
    (best,) = captions(picture(2))
    assert (choice.index, choice.message.role) == (0, "assistant")
    assert choice.message.content == best.text
    assert (answer.object, answer.model) == ("chat.completion", "caption_ray")
    assert answer.id.startswith("chatcmpl-") and answer.id != ask().id
    assert abs(answer.created - time.time()) < 60
    rows, columns = predictor.captioner.encoder.grid
    assert answer.usage.prompt_tokens == rows * columns
    assert answer.usage.completion_tokens == len(best.words)
    assert answer.usage.total_tokens == rows * columns + len(best.words)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "HEIF", "AVIF"])
@pytest.mark.parametrize("declared", ["image/jpeg", "image/png", "", "text/plain;charset=utf-8"])
def test_content_decides_on_the_format_not_the_data_uri(
    ask: Callable[..., Any], picture: Pictures, captions: Captions, kind: str, declared: str
) -> None:
    answer = ask(messages=asking(data_uri(picture(2, kind), declared)))
    assert answer.choices[0].message.content == captions(picture(2, kind))[0].text


def test_the_last_message_of_the_user_counts(
    ask: Callable[..., Any], picture: Pictures, captions: Captions
) -> None:
    messages = asking(
        data_uri(picture(5)),
        {"role": "system", "content": "Be brief."},
        *asking(data_uri(picture(2))),
        {"role": "assistant", "content": "a red circle"},
    )
    messages += [{"role": "assistant", "content": None}]
    answer = ask(messages=messages)
    assert answer.choices[0].message.content == captions(picture(5))[0].text
    assert captions(picture(5))[0].text != captions(picture(2))[0].text, "else any would do"


def test_a_text_only_follow_up_is_about_the_last_pictures(
    ask: Callable[..., Any], picture: Pictures, captions: Captions
) -> None:
    messages = [
        *asking(data_uri(picture(2))),
        {"role": "assistant", "content": "a red circle"},
        *asking(data_uri(picture(5))),
        {"role": "assistant", "content": "a blue square"},
        {"role": "user", "content": "And in one word?"},
        {"role": "user", "content": [{"type": "text", "text": "Please."}]},
    ]
    assert ask(messages=messages).choices[0].message.content == captions(picture(5))[0].text


def test_each_of_several_pictures_has_a_line(
    ask: Callable[..., Any], picture: Pictures, captions: Captions, predictor: Any
) -> None:
    urls = [data_uri(picture(seed)) for seed in (2, 5, 7)]
    parts: list[Any] = [
        {"type": "text", "text": "Compare them."},
        {"type": "image_url", "image_url": {"url": urls[0]}},
        {"type": "image_url", "image_url": urls[1]},
        {"type": "input_image", "image_url": urls[2]},
    ]
    messages = [{"role": "user", "content": parts}]
    expected = [captions(picture(seed), 2) for seed in (2, 5, 7)]
    answer = ask(messages=messages, n=2)
    for index, choice in enumerate(answer.choices):
        lines = [f"Image {n}: {found[index].text}" for n, found in enumerate(expected, 1)]
        assert choice.message.content.split("\n") == lines
    rows, columns = predictor.captioner.encoder.grid
    assert answer.usage.prompt_tokens == 3 * rows * columns
    texts: dict[int, str] = {0: "", 1: ""}
    for chunk in ask(messages=messages, n=2, stream=True):
        (choice,) = chunk.choices
        texts[choice.index] += choice.delta.content or ""
    assert list(texts.values()) == [choice.message.content for choice in answer.choices]


def test_the_bad_one_of_several_pictures_is_named(
    client: Clients, picture: Pictures, refused: Refused
) -> None:
    parts = [
        {"type": "image_url", "image_url": {"url": data_uri(data)}}
        for data in (picture(1), b"hello", picture(2))
    ]
    body = {"messages": [{"role": "user", "content": parts}]}
    answer = client().post("/v1/chat/completions", json=body)
    refused(answer, 400, "messages.0.content.1.image_url.url cannot be read")


def test_a_caption_ends_before_a_stop_sequence(ask: Callable[..., Any]) -> None:
    whole = ask().choices[0].message.content
    words = whole.split()
    assert len(words) > 4
    # the second is the beginning of the third, and comes in two pieces of a stream
    for stop in (words[3], [f"{words[2]} {words[3]}"], [words[2] + " x", words[1] + " " + words[2]],
                 "never", ["", words[3][1:]], [], None):  # fmt: skip
        sequences = [stop] if isinstance(stop, str) else stop or []
        ends = [whole.find(one) for one in sequences if one and one in whole]
        expected = whole[: min(ends)] if ends else whole
        answer = ask(stop=stop).choices[0]
        assert answer.message.content == expected
        assert not ends or answer.finish_reason == "stop"
        *chunks, last = list(ask(stop=stop, stream=True, temperature=0))
        greedy = ask(stop=stop, temperature=0).choices[0]
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        assert (text, last.choices[0].finish_reason) == (
            greedy.message.content, greedy.finish_reason
        )  # fmt: skip


@pytest.mark.parametrize(
    "spell",
    [
        lambda plain: plain,
        lambda plain: f"data:image/jpeg;base64,{plain}",
        lambda plain: f"DATA:image/jpeg;BASE64,{plain}",
        lambda plain: f"data:image/jpeg;charset=utf-8;base64,{plain}",
        lambda plain: f"data:;base64,{plain}",
        lambda plain: plain.rstrip("="),
        lambda plain: plain.replace("+", "-").replace("/", "_"),
        lambda plain: "data:image/jpeg;base64," + plain.rstrip("=").replace("/", "_"),
        lambda plain: "data:image/jpeg;base64," + plain.replace("=", "%3D"),
        lambda plain: plain[:76] + "\r\n" + plain[76:] + "\n",
    ],
)
def test_a_picture_is_read_however_its_base64_is_spelt(
    ask: Callable[..., Any], client: Clients, picture: Pictures, captions: Captions, spell: Any
) -> None:
    data = picture(2) + b"\xff\xef\xbe\xfb" * 3  # decoders do not mind what follows a picture
    while len(data) % 3 != 1:
        data += b"\xff"
    plain = base64.b64encode(data).decode()
    assert {"+", "/"} < set(plain) and plain.endswith("==")
    assert ask(messages=asking(spell(plain))).choices[0].message.content == captions(data)[0].text
    answer = client().post("/caption", json={"inputs": spell(plain)})
    assert answer.json()[0]["generated_text"] == captions(data)[0].text


def test_n_captions_come_best_first(
    ask: Callable[..., Any], picture: Pictures, captions: Captions
) -> None:
    answer = ask(n=4)
    expected = captions(picture(2), 4, beam_size=4)
    assert [choice.message.content for choice in answer.choices] == [c.text for c in expected]
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert answer.usage.completion_tokens == sum(len(c.words) + c.is_whole for c in expected)


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_a_caption_that_is_cut_says_so(
    ask: Callable[..., Any], picture: Pictures, captions: Captions, name: str
) -> None:
    answer = ask(**{name: 2})
    assert answer.choices[0].finish_reason == "length"
    assert answer.choices[0].message.content == captions(picture(2), max_length=2)[0].text
    assert answer.usage.completion_tokens == 2


def test_a_caption_that_ended_says_so(
    ask: Callable[..., Any], picture: Pictures, captions: Captions
) -> None:
    answer = ask(n=10, temperature=1.5, seed=4)
    drawn = captions(picture(2), 10, 4, temperature=1.5)
    reasons = [choice.finish_reason for choice in answer.choices]
    assert reasons == ["stop" if caption.is_whole else "length" for caption in drawn]
    assert set(reasons) == {"stop", "length"}
    assert answer.usage.completion_tokens == sum(len(c.words) + c.is_whole for c in drawn)


def test_a_large_max_tokens_asks_for_no_more_than_there_is(
    ask: Callable[..., Any], backend: Any
) -> None:
    for most in (MAX_LENGTH + 1, 4096, 10**30):
        assert len(ask(max_tokens=most).choices[0].message.content.split()) == MAX_LENGTH
    both = ask(max_tokens=4096, max_completion_tokens=3)
    assert len(both.choices[0].message.content.split()) == 3


@pytest.mark.parametrize(
    ("asked", "options"),
    [
        ({}, Options()),
        ({"n": None, "temperature": None, "seed": None, "max_tokens": None}, Options()),
        ({"temperature": 0}, Options(temperature=0.0)),
        ({"temperature": 1e-300}, Options(temperature=0.0)),  # in float32 it is zero
        ({"temperature": 0.7, "seed": 3}, Options(temperature=0.7, seed=3)),
        ({"temperature": 0, "top_p": 0.5}, Options(temperature=0.0, top_p=0.5)),
        ({"top_p": 0.5}, Options(temperature=1.0, top_p=0.5)),
        ({"seed": -1}, Options(seed=2**63 - 1)),
        ({"seed": 2**63 - 1}, Options(seed=2**63 - 1)),
        ({"seed": -(2**63 - 1)}, Options(seed=1)),
    ],
    ids=str,
)
def test_every_parameter_arrives_where_captions_are_made(
    ask: Callable[..., Any], backend: Any, asked: dict[str, Any], options: Options
) -> None:
    ask(**asked)
    assert backend.calls == [options]


def test_what_asks_for_nothing_is_accepted(ask: Callable[..., Any]) -> None:
    plain = ask().choices
    assert plain == ask(
        frequency_penalty=0.0,
        presence_penalty=0,
        logprobs=False,
        response_format={"type": "text"},
        user="me",
        metadata={"any": "thing"},
        store=False,
        service_tier="auto",
        safety_identifier="me",
        prompt_cache_key="key",
        tools=[],
        tool_choice="none",
        parallel_tool_calls=True,
        logit_bias={},
        modalities=["text"],
        stop=None,
        stream=False,
        stream_options=None,
        top_logprobs=0,
        extra_body={
            "top_k": -1, "repetition_penalty": 1.0, "min_p": 0.0, "best_of": 1, "echo": False,
            "functions": None, "function_call": "auto", "chat_template_kwargs": {}, "tags": ["a"],
            "session_id": "1", "any_vendors_field": None, "another": [], "reasoning_effort": "none",
        },
    ).choices  # fmt: skip


@pytest.mark.parametrize("model", ["gpt-5", "dummy", "openai/caption_ray", ""])
def test_any_model_is_the_one_that_is_served(ask: Callable[..., Any], model: str) -> None:
    answer = ask(model=model)
    assert (answer.model, answer.choices) == ("caption_ray", ask().choices)
    assert {chunk.model for chunk in ask(model=model, stream=True)} == {"caption_ray"}


def test_models_are_listed_and_found_by_name(openai_client: Callable[..., openai.OpenAI]) -> None:
    client = openai_client(model_name="group/captions")
    (model,) = client.models.list()
    assert (model.id, model.object, model.owned_by) == ("group/captions", "model", "caption_ray")
    assert abs(model.created - time.time()) < 600
    assert client.models.retrieve("group/captions") == model


# Streams --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "asked", [{}, {"max_tokens": 30}, {"temperature": 1.5, "seed": 4}, {"temperature": 0}], ids=str
)
def test_a_stream_spells_the_completion(ask: Callable[..., Any], asked: dict[str, Any]) -> None:
    whole = ask(**asked)
    first, *chunks, last = list(ask(stream=True, **asked))
    assert (first.choices[0].delta.role, first.choices[0].delta.content) == ("assistant", "")
    text = "".join(chunk.choices[0].delta.content for chunk in chunks)
    assert text == whole.choices[0].message.content
    assert last.choices[0].finish_reason == whole.choices[0].finish_reason
    assert {chunk.choices[0].finish_reason for chunk in chunks} == {None}
    assert {chunk.object for chunk in (first, *chunks, last)} == {"chat.completion.chunk"}
    assert len({chunk.id for chunk in (first, *chunks, last)}) == 1


@pytest.mark.parametrize(("name", "separator"), [("characters", ""), ("whitespace", " ")])
def test_a_stream_puts_words_together_as_their_tokenizer_does(
    ask: Callable[..., Any],
    backend: Any,
    monkeypatch: pytest.MonkeyPatch,
    name: TokenizerName,
    separator: str,
) -> None:
    known = backend.predictor.vocabulary
    other = Vocabulary([*"一只狗在草地上奔跑和猫睡觉"[: len(known) - 4]], Tokenizer(name))
    monkeypatch.setattr(backend.predictor, "vocabulary", other)
    whole = ask().choices[0].message.content
    chunks = [chunk.choices[0].delta.content or "" for chunk in ask(stream=True, temperature=0)]
    assert len(chunks) > 3
    assert "".join(chunks) == ask(temperature=0).choices[0].message.content
    assert (" " in whole) == (separator == " ")


def test_a_greedy_stream_comes_word_by_word(ask: Callable[..., Any], backend: Any) -> None:
    # it fails after streaming all words, so these did not wait for the answer
    backend.raises_late = RuntimeError("secret")
    told = []
    with pytest.raises(openai.APIError, match="internal error in request request-7"):
        for chunk in ask(stream=True, temperature=0.5, seed=1):
            told.append(chunk.choices[0].delta.content)
    assert len(told) > 2 and all(len(text.split()) == 1 for text in told[1:])


def test_usage_comes_last_if_it_is_asked_for(ask: Callable[..., Any]) -> None:
    *chunks, last = list(ask(stream=True, stream_options={"include_usage": True}))
    assert (last.choices, last.usage) == ([], ask().usage)
    assert {chunk.usage for chunk in chunks} == {None}
    *_, last = list(ask(stream=True))
    assert last.choices and last.usage is None


def test_the_stream_ends_as_clients_expect(client: Clients, picture: Pictures) -> None:
    body = {"model": "caption_ray", "messages": asking(data_uri(picture(2))), "stream": True}
    answer = client().post("/v1/chat/completions", json=body)
    assert answer.headers["Content-Type"].startswith("text/event-stream")
    assert answer.text.endswith("\n\ndata: [DONE]\n\n")


def test_what_is_refused_before_the_first_word_is_a_status(
    ask: Callable[..., Any], openai_client: Callable[..., openai.OpenAI], backend: Any
) -> None:
    with pytest.raises(openai.BadRequestError, match="tools is .*a captioner cannot do") as caught:
        ask(stream=True, tools=[{"type": "function", "function": {"name": "f"}}])
    assert caught.value.param == "tools"
    with pytest.raises(openai.APIStatusError) as unreadable:
        ask(stream=True, messages=asking(data_uri(b"hello")))
    assert unreadable.value.status_code == 400
    backend.raises = QueueFullError(9)
    with pytest.raises(openai.RateLimitError):
        ask(openai_client(max_retries=0), stream=True)


# Errors ---------------------------------------------------------------------------------------


URL = "messages.0.content.1.image_url.url"
IMAGE: dict[str, Any] = {"type": "image_url", "image_url": {"url": "data:;base64,aGVsbG8="}}


def said(*parts: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": list(parts)}]}


@pytest.mark.parametrize(
    ("asked", "param", "piece"),
    [
        ({"messages": []}, "messages", "at least 1 item"),
        ({"messages": [{"role": "user"}] * 1001}, "messages", "at most 1000 items"),
        ({"messages": "hello"}, "messages", "valid array"),
        ({"messages": [0] * 1000}, "messages.0", "messages.0 is 0: Input should be an object"),
        ({"messages": [{"role": "robot"}]}, "messages.0.role", "'robot'"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages.0.content", "give a text"),
        ({"messages": [{"role": "user", "content": [0]}]}, "messages.0.content", "list of at most"),
        (said(*[IMAGE] * 1001), "messages.0.content", "at most 1000 parts"),
        ({"messages": [{"role": "user", "content": "hello"}]}, "messages.0.content", "has no part"),
        ({"messages": [{"role": "user"}]}, "messages.0.content", "has no part of type image_url"),
        ({"messages": [{"role": "system", "content": "x"}]}, "messages", "must send a picture"),
        (said(*[IMAGE] * 17), "messages.0.content", "has 17 pictures: send at most 16"),
        (said({"type": "image_url"}), "messages.0.content.0.image_url", "is missing"),
        (said({"type": "image_url", "image_url": "x"}), "messages.0.content.0.image_url",
         "not base64"),
        (said(IMAGE, {"type": "input_audio"}), "messages.0.content.1.type", "is 'input_audio'"),
        (said({"type": "video_url", "video_url": {"url": "x"}}), "messages.0.content.0.type",
         "parts may be text and image_url"),
        ({"messages": asking(7)}, URL, "is missing"),
        ({"messages": asking("data:,abc")}, URL, "is 'data:,abc'...: give base64"),
        ({"messages": asking("data:image/png,abc;base64,")}, URL, "give base64"),
        ({"messages": asking("data:;base64,%%")}, URL, "not base64"),
        ({"messages": asking("data:;base64,")}, URL, "is empty"),
        ({"messages": asking("file:///etc/passwd")}, URL, "not base64"),
        ({"messages": asking("https://example.com/a.png")}, URL, "URLs are not fetched"),
        ({"stop": ["a"] * 5}, "stop", "at most 4 sequences"),
        ({"stop": "a" * 1001}, "stop", "of at most 1000 characters"),
        ({"n": 0}, "n", "n is 0: Input should be greater than or equal to 1"),
        ({"n": 11}, "n", "less than or equal to 10"),
        ({"n": True}, "n", "n is True: Input should be a valid integer"),
        ({"max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
        ({"max_completion_tokens": 1.5}, "max_completion_tokens", "valid integer"),
        ({"temperature": -0.1}, "temperature", "greater than or equal to 0"),
        ({"temperature": 2.1}, "temperature", "less than or equal to 2"),
        ({"temperature": "1"}, "temperature", "valid number"),
        ({"top_p": 0}, "top_p", "greater than or equal"),
        ({"top_p": 1e-300}, "top_p", "greater than or equal"),
        ({"seed": 2**63}, "seed", "less than or equal"),
        ({"frequency_penalty": 0.5}, "frequency_penalty", "leave it out or give 0"),
        ({"logprobs": True}, "logprobs", "a captioner cannot do that; leave it out"),
        ({"response_format": {"type": "json_object"}}, "response_format.type", "should be 'text'"),
        ({"stream_options": {"x": 1}}, "stream_options.x", "valid: include_usage"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools", "cannot do that"),
        ({"tool_choice": "required"}, "tool_choice", "leave it out or give 'auto'"),
        ({"extra_body": {"top_k": 5}}, "top_k", "leave it out or give -1 or 0"),
        ({"reasoning_effort": "high"}, "reasoning_effort", "'minimal'"),
        ({"extra_body": {"num_beams": 3}}, "num_beams", "is 3: unknown; valid: model, messages"),
        ({"extra_body": {f"x{i}": 1 for i in range(200)}}, "the body", "202 fields; valid: model"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_a_request_that_makes_no_sense_is_refused_by_field(
    ask: Callable[..., Any], asked: dict[str, Any], param: str, piece: str
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        ask(**asked)
    assert caught.value.param == param
    assert piece in str(caught.value) and param in str(caught.value)
    assert (caught.value.type, caught.value.code) == ("invalid_request_error", "validation")
    assert caught.value.response.headers["x-should-retry"] == "false"


def test_another_model_is_not_found(openai_client: Callable[..., openai.OpenAI]) -> None:
    for attempt in (
        lambda: openai_client().models.retrieve("gpt-5"),
        lambda: openai_client().models.retrieve("caption_ray/x"),
    ):
        with pytest.raises(openai.NotFoundError, match="'caption_ray'") as caught:
            attempt()
        assert (caught.value.param, caught.value.code) == ("model", "model_not_found")


def test_a_token_is_needed_if_one_is_configured(
    ask: Callable[..., Any],
    openai_client: Callable[..., openai.OpenAI],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("CAPTION_RAY_TOKENS", TOKEN)
    assert ask(openai_client(api_key=TOKEN)).choices
    client = openai_client(api_key="another")
    for attempt in (lambda: ask(client), client.models.list, lambda: client.models.retrieve("x")):
        with pytest.raises(openai.AuthenticationError) as caught:
            attempt()
        assert (caught.value.type, caught.value.code) == ("authentication_error", "authentication")


@pytest.mark.parametrize(
    ("data", "status"), [(b"hello", 400), (b"\xff\xd8\xff\xe0", 400), (bytes(200_000), 413)]
)
def test_a_bad_picture_is_refused_once(
    ask: Callable[..., Any], openai_client: Callable[..., openai.OpenAI], data: bytes, status: int
) -> None:
    client = openai_client()
    requests: list[Any] = []
    client._client.event_hooks = {"request": [requests.append]}
    with pytest.raises(openai.APIStatusError) as caught:
        ask(client, messages=asking(data_uri(data)))
    assert caught.value.status_code == status
    assert len(requests) == 1, "nothing would change"


@pytest.mark.parametrize(
    ("error", "expected", "headers"),
    [
        (QueueFullError(9), openai.RateLimitError, {"Retry-After": "9"}),
        (UnavailableError("secret"), openai.InternalServerError, {"Retry-After": "1"}),
        (TimeoutError(), openai.InternalServerError, {}),
        (RuntimeError("secret"), openai.InternalServerError, {}),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_what_may_pass_is_tried_twice_again_after_the_time_that_is_asked_for(
    ask: Callable[..., Any],
    backend: Any,
    error: Exception,
    expected: Any,
    headers: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", slept.append)
    backend.raises = error
    with pytest.raises(expected) as caught:
        ask()
    assert len(backend.calls) == 3 and len(slept) == 2
    assert {k: v for k, v in caught.value.response.headers.items() if k == "retry-after"} == {
        name.lower(): value for name, value in headers.items()
    }
    if headers:
        assert slept == [float(headers["Retry-After"])] * 2
    assert "secret" not in str(caught.value)


def test_a_retry_that_is_answered_is_an_answer(
    ask: Callable[..., Any], backend: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def room_again(seconds: float) -> None:
        backend.raises = None

    monkeypatch.setattr(time, "sleep", room_again)
    backend.raises = QueueFullError(1)
    assert ask().choices and len(backend.calls) == 2


@pytest.mark.parametrize(
    ("body", "piece"),
    [
        (b"", "the body is empty"),
        (b"hello", "Invalid JSON"),
        (b'{"model": "caption_ray"', "Invalid JSON"),
        (b"[]", "the body is []: Input should be an object"),
        (b"{}", "messages is {}: Field required"),
        (b'{"messages": ' + b"[" * 50_000, "recursion limit"),
        (b'{"model": "\xff"}', "Invalid JSON"),
        (b'{"model": "\\ud800"}', "Invalid JSON"),
        (b'{"model": "x", "temperature": NaN, "messages": [{"role": "user"}]}', "finite number"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_body_that_is_no_request_is_refused(
    client: Clients, refused: Refused, body: bytes, piece: str
) -> None:
    for declared in ("application/json", "text/plain", "image/png", "multipart/form-data"):
        headers = {"Content-Type": declared}
        refused(client().post("/v1/chat/completions", content=body, headers=headers), 400, piece)


# URLs -----------------------------------------------------------------------------------------


def test_urls_are_refused_unless_hosts_are_allowed(
    ask: Callable[..., Any], openai_client: Callable[..., openai.OpenAI]
) -> None:
    with pytest.raises(openai.BadRequestError, match="URLs are not fetched") as caught:
        ask(messages=asking("http://127.0.0.1:1/picture.png"))
    assert caught.value.param == URL
    client = openai_client(url_allow_list=("images.example.org",))
    with pytest.raises(openai.BadRequestError, match="not a host that pictures") as other:
        ask(client, messages=asking("http://127.0.0.1:1/picture.png"))
    assert (other.value.code, other.value.param) == ("fetch", URL)


def test_a_picture_is_fetched_from_an_allowed_host(
    ask: Callable[..., Any],
    openai_client: Callable[..., openai.OpenAI],
    web: Any,
    tmp_path: Path,
    picture: Pictures,
    captions: Captions,
) -> None:
    (tmp_path / "picture.txt").write_bytes(picture(5, "PNG"))
    client = openai_client(url_allow_list=(f"127.0.0.1:{web.server_port}",))
    answer = ask(client, messages=asking(f"{web.address}/picture.txt"))
    assert answer.choices[0].message.content == captions(picture(5, "PNG"))[0].text
    with pytest.raises(openai.BadRequestError, match="answers 404"):
        ask(client, messages=asking(f"{web.address}/nothing"))
    (tmp_path / "page.png").write_text("<html>")
    with pytest.raises(openai.APIStatusError) as no_picture:
        ask(client, messages=asking(f"{web.address}/page.png"))
    assert no_picture.value.status_code == 400
    (tmp_path / "large").write_bytes(bytes(100_001))
    with pytest.raises(openai.APIStatusError, match="more than 100000 bytes") as too_large:
        ask(client, messages=asking(f"{web.address}/large"))
    assert too_large.value.status_code == 413


@pytest.mark.parametrize(
    ("kind", "status"), [("refused", 400), ("failed", 400), ("timeout", 400), ("too_large", 413)]
)
def test_a_url_that_leads_to_nothing_is_refused(
    client: Clients, refused: Refused, monkeypatch: pytest.MonkeyPatch, kind: Any, status: int
) -> None:
    def fail(*asked: Any, count: object) -> bytes:
        assert asked == ("http://a.org/b", ("a.org",), 100_000, 5.0)
        raise FetchError(kind, "a.org is as it is")

    monkeypatch.setattr(service, "fetch", fail)
    body = {"model": "caption_ray", "messages": asking("http://a.org/b")}
    answer = client(url_allow_list=("a.org",)).post("/v1/chat/completions", json=body)
    refused(answer, status, f"{URL}: a.org is as it is")
    assert answer.json()["error"]["code"] == "fetch"


def test_fetched_pictures_count_as_buffered_and_those_beyond_are_refused(
    client: Clients, refused: Refused, web: Any, tmp_path: Path, picture: Pictures
) -> None:
    data = picture(1, "PNG")
    (tmp_path / "picture.png").write_bytes(data)
    http = client(
        max_body_bytes=50_000,
        max_buffered_bytes=50_000,
        url_allow_list=(f"127.0.0.1:{web.server_port}",),
    )
    for count, status in ((2, 200), (50_000 // len(data) + 1, 429), (2, 200)):
        parts = [{"type": "image_url", "image_url": {"url": f"{web.address}/picture.png"}}] * count
        messages = [{"role": "user", "content": parts}]
        answer = http.post("/v1/chat/completions", json={"messages": messages})
        assert answer.status_code == status, answer.text
        if status == 429:
            refused(answer, 429, "too many bodies are being received")


def test_urls_that_hang_keep_nobody_else_waiting(
    client: Clients, picture: Pictures, monkeypatch: pytest.MonkeyPatch
) -> None:
    hanging, end = threading.Semaphore(0), threading.Event()

    def hang(*asked: Any, count: object) -> bytes:
        hanging.release()
        end.wait(60)
        return picture(1)

    monkeypatch.setattr(service, "fetch", hang)
    http = client(url_allow_list=("a.org",))
    with http, ThreadPoolExecutor(64) as callers:  # one event loop for all requests
        body = {"messages": asking("http://a.org/slow")}
        slow = [callers.submit(http.post, "/v1/chat/completions", json=body) for _ in range(64)]
        for _ in range(service.MAX_FETCHES):
            assert hanging.acquire(timeout=scaled(30))
        refused = [call.result() for call in itertools.islice(as_completed(slow), 32)]
        assert {answer.status_code for answer in refused} == {429}
        assert {answer.headers["Retry-After"] for answer in refused} == {"1"}
        encoded = {"inputs": base64.b64encode(picture(1)).decode()}
        waits = []
        for _ in range(20):
            for get in (
                lambda: http.get("/livez"),
                lambda: http.get("/readyz"),
                lambda: http.post("/caption", json=encoded),
                lambda: http.post("/v1/chat/completions",
                                  json={"messages": asking(data_uri(picture(1)))}),
            ):  # fmt: skip
                begun = time.monotonic()
                assert get().status_code == 200
                waits.append(time.monotonic() - begun)
        assert max(waits) < scaled(5), "none waits for the 60 s of the others"
        end.set()
        assert sorted(call.result().status_code for call in slow) == [200] * 32 + [429] * 32
        again = http.post("/v1/chat/completions", json=body)
        assert again.status_code == 200, "what has ended counts no more"
