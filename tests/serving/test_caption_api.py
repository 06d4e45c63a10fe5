"""`POST /caption`: every form of body, every parameter, and the answers."""

from __future__ import annotations

import base64
import copy
import dataclasses
import json
from collections.abc import Callable
from typing import Any

import pytest
from starlette.testclient import TestClient

from caption_ray.captioning.predictor import Caption
from caption_ray.serving.batching import QueueFullError
from caption_ray.serving.contract import Options

Pictures = Callable[..., bytes]
Captions = Callable[..., list[Caption]]
Clients = Callable[..., TestClient]
Refused = Callable[..., None]

KINDS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "HEIF", "AVIF")
BESIDE = {"num_beams": 4, "num_return_sequences": 3}
"""Parameters that change the test checkpoint's captions."""


def text(data: bytes) -> str:
    return base64.b64encode(data).decode()


def texts(answer: Any) -> list[str]:
    assert answer.status_code == 200, answer.text
    return [caption["generated_text"] for caption in answer.json()]


def said(captions: list[Caption]) -> list[str]:
    return [caption.text for caption in captions]


# Bodies ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "declared", [None, "image/jpeg", "text/plain", "application/x-www-form-urlencoded"]
)
def test_raw_bytes_are_captioned_whatever_they_are_declared_as(
    client: Clients, picture: Pictures, captions: Captions, kind: str, declared: str | None
) -> None:
    data = picture(2, kind)
    headers = {"Content-Type": declared} if declared else {}
    answer = client().post("/caption", content=data, headers=headers)
    (best,) = captions(data)
    assert answer.json() == [
        {"generated_text": best.text, "log_prob": pytest.approx(best.log_prob, abs=1e-4)}
    ]


@pytest.mark.parametrize("declared", [None, "application/json; charset=utf-8", "image/png"])
@pytest.mark.parametrize("encode", [base64.b64encode, base64.encodebytes])  # with line breaks
def test_json_with_base64_is_captioned_however_it_is_declared(
    client: Clients, picture: Pictures, captions: Captions, declared: str | None, encode: Any
) -> None:
    headers = {"Content-Type": declared} if declared else {}
    for extra in ({}, {"parameters": {}}, {"parameters": None}):
        body = json.dumps({"inputs": encode(picture(3)).decode(), **extra})
        answer = client().post("/caption", content=body, headers=headers)
        assert texts(answer) == said(captions(picture(3)))


def test_a_list_of_pictures_gets_a_list_of_captions_for_each_in_order(
    client: Clients, picture: Pictures, captions: Captions
) -> None:
    pictures = [picture(seed) for seed in range(8)]
    body = {"inputs": [text(data) for data in pictures], "parameters": BESIDE}
    answer = client().post("/caption", json=body).json()
    expected = [said(captions(data, 3, beam_size=4)) for data in pictures]
    assert [[c["generated_text"] for c in found] for found in answer] == expected
    assert len({tuple(found) for found in expected}) > 3, "else a mix-up would not show"


def test_a_list_of_one_picture_gets_a_list_of_lists(client: Clients, picture: Pictures) -> None:
    answer = client().post("/caption", json={"inputs": [text(picture(1))]}).json()
    assert len(answer) == 1 and isinstance(answer[0], list)


def test_one_bad_picture_among_several_is_named(
    client: Clients, picture: Pictures, refused: Refused
) -> None:
    good, half = text(picture(1)), text(picture(2)[:1000])
    answer = client().post("/caption", json={"inputs": [good, half, good]})
    refused(answer, 422, "inputs.1 cannot be read: JPEG of 60 x 40")
    answer = client().post("/caption", json={"inputs": [good, good, text(b"hello")]})
    refused(answer, 415, "inputs.2 cannot be read")
    answer = client().post("/caption", json={"inputs": [good, "%", good]})
    refused(answer, 400, "inputs.1 is '%'..., which is not base64")


def test_a_form_with_a_file_is_captioned_whatever_the_file_is_called(
    client: Clients, picture: Pictures, captions: Captions
) -> None:
    for name, kind in (("a.jpg", "image/jpeg"), ("ü.txt", "text/plain"), ("x", "")):
        answer = client().post("/caption", files={"image": (name, picture(2, "PNG"), kind)})
        assert texts(answer) == said(captions(picture(2, "PNG")))


def test_a_form_with_several_files_gets_a_list_of_captions_for_each(
    client: Clients, picture: Pictures, captions: Captions
) -> None:
    files = [("image", (f"{seed}.jpg", picture(seed))) for seed in (2, 5)]
    answer = client().post("/caption", files=files).json()
    assert [found[0]["generated_text"] for found in answer] == [
        said(captions(picture(seed)))[0] for seed in (2, 5)
    ]


def test_a_form_may_hold_parameters(client: Clients, picture: Pictures, captions: Captions) -> None:
    answer = client().post(
        "/caption", files={"image": picture(2)}, data={"parameters": json.dumps(BESIDE)}
    )
    assert texts(answer) == said(captions(picture(2), 3, beam_size=4))
    fields = {name: str(value) for name, value in BESIDE.items()}
    answer = client().post("/caption", files={"image": picture(2)}, data=fields)
    assert texts(answer) == said(captions(picture(2), 3, beam_size=4))


@pytest.mark.parametrize(
    ("files", "data", "piece"),
    [
        ({"image": b"x", "mask": b"x"}, {}, "'mask' is not a field of the form"),
        ({"image": b"x"}, {"seed": "-1"}, "seed is '-1'"),
        ({"image": b"x"}, {"num_beams": "many"}, "num_beams is 'many'"),
        ({"image": b"x"}, {"sede": "1"}, "'sede' is not a field of the form; valid: image, param"),
        ({"image": b"x"}, {"seed": "1", "parameters": '{"seed": 2}'}, "seed is both 1 and 2"),
        ({"parameters": b"{}"}, {}, "image is missing"),
        ({"none": b""}, {}, "'none' is not a field of the form"),
        ({"image": b"x"}, {"parameters": "{"}, "parameters is '{': Invalid JSON"),
        ({"image": b"x"}, {"parameters": '{"seed": -1}'}, "parameters.seed is -1"),
        ({"image": b"x"}, {"parameters": '{"inputs": ""}'}, "parameters.inputs is '': unknown"),
        ({"image": b"x"}, {"parameters": "{}", "image": "x"}, "image is missing, or not a file"),
        ([("image", b"x")] * 17, {}, "the form cannot be read: Too many files"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_form_that_makes_no_sense_is_refused_by_field(
    client: Clients, refused: Refused, files: Any, data: dict[str, str], piece: str
) -> None:
    refused(client().post("/caption", files=files, data=data), 400, piece)


@pytest.mark.parametrize(
    ("declared", "part", "piece"),
    [
        ("; boundary=b", b"Content-Disposition: form-data; name=image\r\n\r\nx", "not a file"),
        ("; boundary=b", b"Content-Disposition: form-data\r\n\r\nx", '"name" must be provided'),
        ("; boundary=b", b"Content-Disposition: form-data; name=x\r\n\r\nx", "'x' is not a field"),
        ("; boundary=b", b"nonsense", "Invalid multipart data"),
        ("; boundary=other", b"Content-Disposition: form-data; name=image\r\n\r\nx", "Invalid"),
        ("", b"Content-Disposition: form-data; name=image\r\n\r\nx", "Missing boundary"),
        # charsets that decode to characters which no answer can be encoded with
        ("; boundary=b; charset=unicode_escape",
         b'Content-Disposition: form-data; name="\\ud800"\r\n\r\nx', "'\\ud800' is not a field"),
        ("; boundary=b; charset=utf-7",
         b'Content-Disposition: form-data; name="+2AA-"\r\n\r\nx', "'\\ud800' is not a field"),
        ("; boundary=b; charset=punycode",
         b'Content-Disposition: form-data; name="-"\r\n\r\nx', "form"),
    ],
    ids=["field", "no-name", "unknown", "no-header", "boundary", "no-boundary", "escapes", "utf-7",
         "punycode"],
)  # fmt: skip
def test_a_broken_form_is_refused(
    client: Clients, refused: Refused, declared: str, part: bytes, piece: str
) -> None:
    body = b"--b\r\n" + part + b"\r\n--b--\r\n"
    headers = {"Content-Type": f"multipart/form-data{declared}"}
    refused(client().post("/caption", content=body, headers=headers), 400, piece)


# Parameters -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("query", "parameters"),
    [
        (BESIDE, None),
        ({}, BESIDE),
        ({}, {"generation_parameters": BESIDE}),
        ({}, {"generate_kwargs": BESIDE}),
        ({"num_beams": 4}, {"num_return_sequences": 3}),
        ({}, {"num_beams": 4, "generation_parameters": {"num_return_sequences": 3}}),
        (BESIDE, {**BESIDE, "generation_parameters": BESIDE, "generate_kwargs": BESIDE}),
        ({"num_beams": 4}, {"num_return_sequences": 3, "num_beams": None}),  # null: left out
    ],
)
def test_parameters_mean_the_same_wherever_they_stand(
    client: Clients, picture: Pictures, captions: Captions, query: Any, parameters: Any
) -> None:
    body = {"inputs": text(picture(2)), "parameters": parameters}
    answer = client().post("/caption", params=query, json=body)
    assert texts(answer) == said(captions(picture(2), 3, beam_size=4))
    assert texts(answer) != said(captions(picture(2))), "else the parameters would not show"


@pytest.mark.parametrize(
    ("query", "parameters", "piece"),
    [
        ({"seed": 1}, {"seed": 2}, "seed is both 1 and 2: give it once"),
        ({"seed": 0}, {"seed": 2}, "seed is both 0 and 2"),
        ({}, {"top_k": 3, "generate_kwargs": {"top_k": 4}}, "top_k is both 3 and 4"),
        ({"num_beams": 2}, {"num_return_sequences": 3}, "no more captions than beams"),
        ({"do_sample": "false"}, {"top_k": 3}, "do_sample is false, so leave out top_k"),
        ({"num_beams": 3}, {"temperature": 0.5}, "either sample or use beams"),
        ({"num_beams": 1, "num_return_sequences": 2}, {}, "the query is {"),
        ({"min_new_tokens": 5}, {"max_new_tokens": 4}, "min_new_tokens is 5, max_new_tokens 4"),
        ({"min_new_tokens": 5, "max_new_tokens": 4}, {}, "the query is {"),
    ],
)
def test_parameters_that_contradict_each_other_are_refused(
    client: Clients, picture: Pictures, refused: Refused, query: Any, parameters: Any, piece: str
) -> None:
    body = {"inputs": text(picture(2)), "parameters": parameters}
    refused(client().post("/caption", params=query, json=body), 400, piece)


def test_every_parameter_arrives_where_captions_are_made(
    client: Clients, picture: Pictures, backend: Any
) -> None:
    search = {"num_return_sequences": 2, "num_beams": 3, "max_new_tokens": 4, "length_penalty": 1.5}
    limits = {"min_new_tokens": 2, "no_repeat_ngram_size": 3}
    parameters = {**search, **limits, "return_attention": True}
    client().post("/caption", params=parameters, content=picture(1))
    assert backend.calls[-1] == Options(
        num_return=2, beam_size=3, max_length=4, length_penalty=1.5, min_length=2,
        no_repeat_ngram_size=3, attention=True,
    )  # fmt: skip
    drawn = {"temperature": 0.5, "top_k": 7, "top_p": 0.9, "seed": 2**63 - 1}
    client().post("/caption", params=drawn, content=picture(1))
    assert backend.calls[-1] == Options(temperature=0.5, top_k=7, top_p=0.9, seed=2**63 - 1)
    client().post("/caption", content=picture(1))
    assert backend.calls[-1] == Options()


@pytest.mark.parametrize("length", [0, 3, 6, 9, 50])
def test_no_caption_is_shorter_than_min_new_tokens(
    client: Clients, picture: Pictures, captions: Captions, length: int
) -> None:
    """Nor is it refused if the checkpoint's maximum, of 6 words, is below it."""
    data = picture(2)
    answer = client().post(f"/caption?min_new_tokens={length}", content=data)
    assert texts(answer) == said(captions(data, min_length=length, max_length=max(6, length)))
    assert len(texts(answer)[0].split()) >= length


def test_no_repeat_ngram_size_keeps_words_from_being_repeated(
    client: Clients, picture: Pictures, captions: Captions
) -> None:
    query = "/caption?num_beams=1&max_new_tokens=20&min_new_tokens=20"
    said_freely = texts(client().post(query, content=picture(6)))[0].split()
    assert len(set(said_freely)) < len(said_freely), "else nothing would be blocked"
    for size in (2, 3):
        answer = client().post(f"{query}&no_repeat_ngram_size={size}", content=picture(6))
        words = texts(answer)[0].split()
        ngrams = list(zip(*(words[at:] for at in range(size)), strict=False))
        assert len(set(ngrams)) == len(ngrams) > 0


@pytest.mark.parametrize("number", [1, 2, 10])
def test_as_many_captions_as_asked_for_come_best_first(
    client: Clients, picture: Pictures, captions: Captions, number: int
) -> None:
    answer = client().post(f"/caption?num_return_sequences={number}", content=picture(4))
    expected = captions(picture(4), number, beam_size=max(2, number))
    assert texts(answer) == said(expected) and len(expected) == number
    log_probs = [caption["log_prob"] for caption in answer.json()]
    assert log_probs == pytest.approx([caption.log_prob for caption in expected], abs=1e-4)
    assert log_probs == sorted(log_probs, reverse=True)  # all are equally long


@pytest.mark.parametrize("length", [1, 3, 50])
def test_no_caption_is_longer_than_max_new_tokens(
    client: Clients, picture: Pictures, captions: Captions, length: int
) -> None:
    answer = client().post(f"/caption?max_new_tokens={length}", content=picture(2))
    assert texts(answer) == said(captions(picture(2), max_length=length))
    assert len(texts(answer)[0].split()) == length


def test_one_beam_is_greedy(client: Clients, picture: Pictures, captions: Captions) -> None:
    answer = client().post("/caption?num_beams=1&max_new_tokens=20", content=picture(6))
    greedy = said(captions(picture(6), beam_size=1, max_length=20))
    assert texts(answer) == greedy != said(captions(picture(6), beam_size=8, max_length=20))


@pytest.mark.parametrize(
    "asked", [{"do_sample": True}, {"temperature": 2.0}, {"top_k": 5}, {"top_p": 0.95}]
)
def test_words_are_drawn_if_any_parameter_of_it_is_given(
    client: Clients, picture: Pictures, captions: Captions, asked: dict[str, Any]
) -> None:
    answer = client().post(
        "/caption", params={**asked, "seed": 3, "num_return_sequences": 4}, content=picture(2)
    )
    search = {name: value for name, value in asked.items() if name != "do_sample"}
    drawn = captions(picture(2), 4, 3, **{"temperature": 1.0, **search})
    assert texts(answer) == said(drawn)
    assert len(set(texts(answer))) > 1, "else they would not be random"


def test_do_sample_false_searches(client: Clients, picture: Pictures, captions: Captions) -> None:
    answer = client().post("/caption?do_sample=false", content=picture(2))
    assert texts(answer) == said(captions(picture(2)))


def test_the_same_seed_draws_the_same_and_another_draws_others(
    client: Clients, picture: Pictures
) -> None:
    def drawn(seed: int) -> list[str]:
        query = {"do_sample": True, "num_return_sequences": 5, "seed": seed}
        return texts(client().post("/caption", params=query, content=picture(1)))

    assert drawn(7) == drawn(7)
    assert drawn(7) != drawn(8) != drawn(2**63 - 1)


def test_what_a_seed_draws_depends_on_nothing_else_that_is_asked_for(
    client: Clients, picture: Pictures
) -> None:
    query = {"do_sample": True, "seed": 7}
    alone = texts(client().post("/caption", params=query, content=picture(1)))
    pictures = [text(picture(seed)) for seed in (4, 1, 1, 2)]
    body = {"inputs": pictures, "parameters": {**query, "return_attention": True}}
    among = [found[0]["generated_text"] for found in client().post("/caption", json=body).json()]
    assert among[1:3] == alone * 2
    query["format"] = "object"
    answer = client().post("/caption", params=query, content=picture(1))
    assert answer.json()["generated_text"] == alone[0]


# Answers --------------------------------------------------------------------------------------


def test_format_object_is_the_best_caption_alone(
    client: Clients, picture: Pictures, captions: Captions
) -> None:
    best = captions(picture(2), 3, beam_size=4)[0]
    query = {**BESIDE, "format": "object"}
    answer = client().post("/caption", params=query, content=picture(2)).json()
    expected = {"generated_text": best.text, "log_prob": pytest.approx(best.log_prob, abs=1e-4)}
    assert answer == expected
    body = {"inputs": [text(picture(2))] * 2, "parameters": query}
    assert client().post("/caption", json=body).json() == [expected] * 2


@pytest.mark.parametrize("number", [1, 3])
def test_attention_is_the_predictors_for_each_word_and_sums_to_one(
    client: Clients, picture: Pictures, captions: Captions, number: int
) -> None:
    query = {"return_attention": True, "num_return_sequences": number}
    answer = client().post("/caption", params=query, content=picture(5)).json()
    for found, expected in zip(
        answer, captions(picture(5), number, beam_size=max(2, number)), strict=True
    ):
        assert expected.attention is not None
        words, rows, columns = expected.attention.shape
        assert found["words"] == expected.words == found["generated_text"].split()
        assert (found["attention"]["rows"], found["attention"]["columns"]) == (rows, columns)
        weights = found["attention"]["weights"]
        assert weights == [
            pytest.approx(row, abs=1e-5) for row in expected.attention.reshape(words, -1)
        ]
        assert [sum(row) for row in weights] == pytest.approx([1.0] * words, abs=1e-4)
        assert max(map(max, weights)) > 1.05 * min(map(min, weights)), "else any order would do"


def test_captions_come_without_attention_unless_it_is_asked_for(
    client: Clients, picture: Pictures
) -> None:
    (caption,) = client().post("/caption", content=picture(5)).json()
    assert set(caption) == {"generated_text", "log_prob"}


@pytest.mark.parametrize(
    ("fit", "size", "box"),
    [
        ("stretch", (40, 60), [0, 0, 1, 1]),
        ("crop", (40, 60), [1 / 6, 0, 5 / 6, 1]),
        ("crop", (80, 40), [0, 1 / 4, 1, 3 / 4]),
        ("crop", (40, 40), [0, 0, 1, 1]),
    ],
)
def test_the_box_is_what_the_captioner_sees_of_the_picture(
    client: Clients, picture: Pictures, backend: Any, fit: str, size: Any, box: list[float]
) -> None:
    backend.predictor = copy.copy(backend.predictor)
    encoder = backend.predictor.encoder_config
    backend.predictor.encoder_config = dataclasses.replace(encoder, image_fit=fit)
    data = picture(1, size=size)
    (caption,) = client().post("/caption?return_attention=true", content=data).json()
    assert caption["attention"]["box"] == pytest.approx(box)


def test_headers_name_the_checkpoint_and_the_batch(
    client: Clients, picture: Pictures, predictor: Any
) -> None:
    answer = client().post("/caption", content=picture(1))
    assert predictor.uri.endswith(f"/{answer.headers['X-Checkpoint']}")
    assert answer.headers["X-Batch-Size"] == "1"


# Streams --------------------------------------------------------------------------------------


def events(answer: Any) -> list[tuple[str, Any]]:
    """Names and data of server-sent events."""
    assert answer.headers["Content-Type"].startswith("text/event-stream"), answer.text
    assert answer.headers["Cache-Control"] == "no-store"
    found = []
    *blocks, rest = answer.text.split("\n\n")
    assert rest == ""
    for block in blocks:
        name, data = block.split("\n")
        found.append((name.removeprefix("event: "), json.loads(data.removeprefix("data: "))))
    return found


@pytest.mark.parametrize(
    "query",
    [
        {"num_beams": 1},
        {"num_beams": 5, "max_new_tokens": 30},
        {"do_sample": True, "seed": 4, "num_return_sequences": 2},
        {"num_return_sequences": 3, "return_attention": True},
        {"format": "object"},
    ],
)
def test_a_stream_tells_the_words_of_the_answer_and_then_the_answer(
    client: Clients, picture: Pictures, query: dict[str, Any]
) -> None:
    whole = client().post("/caption", params=query, content=picture(2)).json()
    answer = client().post("/caption", params={**query, "stream": True}, content=picture(2))
    *words, (name, last) = events(answer)
    assert (name, last) == ("captions", whole)
    assert {kind for kind, _ in words} <= {"words"}
    told = [word for _, data in words for word in data["words"]]
    best = whole if isinstance(whole, dict) else whole[0]
    assert best["generated_text"].split()[: len(told)] == told
    if "do_sample" not in query:  # of several samples, only their common prefix is certain
        assert " ".join(told) == best["generated_text"]


def test_greedy_words_come_one_by_one(client: Clients, picture: Pictures) -> None:
    answer = client().post("/caption?stream=true&num_beams=1", content=picture(2))
    assert [data["words"] for name, data in events(answer) if name == "words"] == [
        [word] for word in "above square above square above square".split()
    ]


def test_stream_may_stand_in_the_body(client: Clients, picture: Pictures) -> None:
    body = {"inputs": text(picture(2)), "parameters": {"stream": True}}
    assert events(client().post("/caption", json=body))[-1][0] == "captions"
    files, data = {"image": picture(2)}, {"parameters": '{"stream": true}'}
    assert events(client().post("/caption", files=files, data=data))[-1][0] == "captions"


def test_what_is_refused_before_the_first_word_is_a_status(
    client: Clients, picture: Pictures, backend: Any, refused: Refused
) -> None:
    def streamed(data: bytes, **settings: Any) -> Any:
        return client(**settings).post("/caption?stream=true", content=data)

    refused(streamed(b"hello"), 415)
    refused(streamed(picture(1)[:500]), 422)
    refused(streamed(b""), 400, "the body is empty")
    several = {"inputs": [text(picture(1))] * 2, "parameters": {"stream": True}}
    refused(client().post("/caption", json=several), 400, "stream is true: send one picture")
    backend.raises = QueueFullError(9)
    refused(streamed(picture(1)), 429)
    backend.raises = RuntimeError("secret")
    refused(streamed(picture(1)), 500, "request-7")
    backend.delay_s = 9
    refused(streamed(picture(1), request_timeout_s=0.05), 504, "no caption after 0.05 s")


@pytest.mark.parametrize(
    ("error", "content"),
    [
        (
            QueueFullError(9),
            {
                "error": "too many requests wait already; try again in 9 s",
                "error_type": "overloaded",
                "status": 429,
            },
        ),
        (
            RuntimeError("secret"),
            {
                "error": "internal error in request request-7",
                "error_type": "internal",
                "status": 500,
            },
        ),
    ],
    ids=["foreseen", "unforeseen"],
)
def test_what_is_refused_after_the_first_word_is_an_event(
    client: Clients, picture: Pictures, backend: Any, error: Exception, content: dict[str, Any]
) -> None:
    backend.raises_late = error
    found = events(client().post("/caption?stream=true&num_beams=1", content=picture(2)))
    assert [name for name, _ in found] == ["words"] * 6 + ["error"]
    assert found[-1][1] == content
