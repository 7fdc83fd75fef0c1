"""POST /v1/completions over HTTP, on the fake backend."""

from collections.abc import Iterator
from typing import Any

import pytest

from engine.backends import fake as backend
from tests.serving import Service, events, fake, script, serving, settings


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    path = script(
        tmp_path_factory.mktemp("completions"),
        {"match": "once", "answer": " upon a time"},
        {"match": "choose", "answer": ["red", "vermilion", "ultramarine"]},
        {"match": "umlaut", "answer": "Grüße, 世x! z"},
        {"match": "break", "answer": "half of it", "fault": "step", "after": 4},
    )
    with serving(settings(light=fake(path, queue_size=4, n_ctx=256, n_parallel=2))) as service:
        yield service


def test_a_whole_answer_has_openais_shape(service: Service) -> None:
    body = service.complete("once").json()
    assert body["id"].startswith("cmpl-")
    assert (body["object"], body["model"]) == ("text_completion", "light")
    assert body["choices"] == [
        {"index": 0, "text": " upon a time", "logprobs": None, "finish_reason": "stop"}
    ]
    assert (body["usage"]["prompt_tokens"], body["usage"]["total_tokens"]) == (4, 17)


@pytest.mark.parametrize(
    ("prompt", "texts"),
    [
        ("once", [" upon a time"]),
        (["once", "a", "once"], [" upon a time", "You said: a", " upon a time"]),
        (list(b"once"), [" upon a time"]),
        ([list(b"a"), list(b"once")], ["You said: a", " upon a time"]),
    ],
)
def test_every_form_of_prompt_streamed_and_not(
    service: Service, prompt: Any, texts: list[str]
) -> None:
    body = service.complete(prompt).json()
    assert [(c["index"], c["text"]) for c in body["choices"]] == list(enumerate(texts))
    *chunks, last = events(
        service.complete(prompt, stream=True, stream_options={"include_usage": True})
    )
    streamed = [""] * len(texts)
    finishes: list[Any] = [None] * len(texts)
    for chunk in chunks:
        (choice,) = chunk["choices"]
        streamed[choice["index"]] += choice["text"]
        finishes[choice["index"]] = finishes[choice["index"]] or choice["finish_reason"]
    assert streamed == texts
    assert finishes == ["stop"] * len(texts)
    assert last["choices"] == []
    for count in ("prompt_tokens", "completion_tokens", "total_tokens"):
        assert last["usage"][count] == body["usage"][count]


def test_control_tokens_in_a_raw_prompt_are_obeyed(service: Service) -> None:
    usage = service.complete("<|user|>hi<|end|><|assistant|>").json()["usage"]
    assert usage["prompt_tokens"] == 5


@pytest.mark.parametrize(
    "prompt",
    ["", [], [""], ["a", ""], [[]], [[1], []], [1, "a"], ["a", 1], {"a": 1}, None, 5, [-1], [1.5],
     ["a"] * 5, [263, 264], [999999]],
)  # fmt: skip
def test_a_bad_prompt_is_a_400_that_names_it(service: Service, prompt: Any) -> None:
    response = service.complete(prompt)
    assert response.status_code == 400
    assert response.json()["error"]["param"].startswith("prompt")


def test_an_over_long_prompt_is_named_as_such(service: Service) -> None:
    error = service.complete("x" * 300).json()["error"]
    assert (error["code"], error["param"]) == ("context_length_exceeded", "prompt")


def test_n_answers_to_each_of_several_prompts(service: Service) -> None:
    body = service.complete(["choose", "a"], n=2, seed=0).json()
    texts = ["red", "vermilion", "You said: a", "You said: a"]
    assert [(c["index"], c["text"]) for c in body["choices"]] == list(enumerate(texts))
    assert body["usage"]["prompt_tokens"] == 7
    streamed = [""] * 4
    for chunk in events(service.complete(["choose", "a"], n=2, seed=0, stream=True)):
        (choice,) = chunk["choices"]
        streamed[choice["index"]] += choice["text"]
    assert streamed == texts


def streamed_texts(response: Any, n: int) -> list[str]:
    texts = [""] * n
    for chunk in events(response):
        (choice,) = chunk["choices"]
        assert choice["text"] or choice["finish_reason"]
        texts[choice["index"]] += choice["text"]
    return texts


@pytest.mark.parametrize(
    ("prompt", "texts"),
    [
        ("once", ["once upon a time"]),
        (list(b"once"), ["once upon a time"]),
        ([256, 0xC3, 256], ["<|end|>\ufffd<|end|>You said: \ufffd"]),
        (["a", "once"], ["aYou said: a", "once upon a time"]),
        ([list(b"a"), list(b"once")], ["aYou said: a", "once upon a time"]),
    ],
)
def test_a_prompt_is_echoed_as_text_streamed_and_not(
    service: Service, prompt: Any, texts: list[str]
) -> None:
    body = service.complete(prompt, echo=True).json()
    assert [choice["text"] for choice in body["choices"]] == texts
    assert body["usage"] == service.complete(prompt).json()["usage"] | {
        "prompt_tokens_details": body["usage"]["prompt_tokens_details"]
    }
    assert streamed_texts(service.complete(prompt, echo=True, stream=True), len(texts)) == texts
    assert service.complete(prompt, echo=None).status_code == 200


def test_each_of_several_answers_begins_with_its_own_prompt(service: Service) -> None:
    fields: dict[str, Any] = {"n": 2, "seed": 0, "echo": True}
    texts = ["choosered", "choosevermilion", "aYou said: a", "aYou said: a"]
    body = service.complete(["choose", "a"], **fields).json()
    assert [choice["text"] for choice in body["choices"]] == texts
    streamed = service.complete(["choose", "a"], stream=True, **fields)
    assert streamed_texts(streamed, 4) == texts
    best = service.complete(["choose", "a"], best_of=3, **fields).json()["choices"]
    assert [c["text"] for c in best] == ["chooseultramarine", "choosevermilion", *texts[2:]]


def test_an_echo_alone_is_the_prompt(service: Service) -> None:
    choice = service.complete("once", echo=True, max_tokens=0).json()["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == ("once", "length")


def logprob_after(byte: int) -> float:
    """Of a prompt's token, as the fake model says it."""
    return -(1 + byte) / 256


@pytest.mark.parametrize("prompt", ["know 🙂", list("know 🙂".encode())])
def test_an_echo_has_log_probabilities_streamed_and_not(service: Service, prompt: Any) -> None:
    asked = {"echo": True, "logprobs": 2, "max_tokens": 1, "temperature": 0}
    (choice,) = service.complete(prompt, **asked).json()["choices"]
    logprobs = choice["logprobs"]
    data = "know 🙂".encode()
    assert choice["text"] == "know 🙂Y"
    assert logprobs["tokens"] == [*"know ", "", "", "", "🙂", "Y"]
    assert logprobs["text_offset"] == [0, 1, 2, 3, 4, 5, 5, 5, 5, 6]
    first, *others, last = logprobs["token_logprobs"]
    assert first is logprobs["top_logprobs"][0] is None
    assert others == [logprob_after(byte) for byte in data[:-1]]
    assert last == logprobs["top_logprobs"][-1]["Y"]
    assert logprobs["top_logprobs"][1] == {
        "n": logprob_after(ord("k")),
        "\x01": logprob_after(ord("k")) - 1,
    }
    parts = [
        (piece["text"], piece["logprobs"])
        for chunk in events(service.complete(prompt, stream=True, **asked))
        for piece in chunk["choices"]
    ]
    assert "".join(text for text, _ in parts) == choice["text"]
    for name in ("tokens", "token_logprobs", "text_offset", "top_logprobs"):
        assert [item for _, part in parts for item in part[name]] == logprobs[name]


def test_each_of_several_choices_has_the_log_probabilities_of_its_prompt(service: Service) -> None:
    asked = {"echo": True, "logprobs": 0, "n": 2, "max_tokens": 0}
    choices = service.complete(["choose", "a"], **asked).json()["choices"]
    assert [c["text"] for c in choices] == ["choose", "choose", "a", "a"]
    of_choose = [None, *map(logprob_after, b"choos")]
    found = [c["logprobs"]["token_logprobs"] for c in choices]
    assert found == [of_choose, of_choose, [None], [None]]
    assert [c["logprobs"]["top_logprobs"] for c in choices] == [None] * 4


def test_the_end_of_an_answer_has_a_log_probability_behind_a_prompt_that_has(
    service: Service,
) -> None:
    asked = {"logprobs": 1, "echo": True, "logit_bias": {"Y": -100}}  # so it ends at once
    (choice,) = service.complete("a", **asked).json()["choices"]
    assert (choice["text"], choice["finish_reason"]) == ("a", "stop")
    assert choice["logprobs"]["tokens"] == ["a", ""]
    assert choice["logprobs"]["token_logprobs"] == [None, pytest.approx(-1 / len("You said: a"))]


def test_what_a_stop_string_cuts_off_has_log_probabilities_behind_a_prompt_that_has(
    service: Service,
) -> None:
    asked: dict[str, Any] = {"logprobs": 0, "echo": True, "stop": ["Yo"]}
    for stream in (False, True):
        response = service.complete("ab", stream=stream, **asked)
        replies = events(response) if stream else [response.json()]
        choices = [choice for reply in replies for choice in reply["choices"]]
        assert "".join(choice["text"] for choice in choices) == "ab"
        assert choices[-1]["finish_reason"] == "stop"
        tokens = [token for choice in choices for token in choice["logprobs"]["tokens"]]
        assert tokens == ["a", "b", "", ""]


def test_a_long_prompt_comes_in_parts_and_says_the_same(service: Service) -> None:
    prompt = "0123456789" * 20
    asked: dict[str, Any] = {"logprobs": 0, "echo": True, "max_tokens": 0, "n": 2}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("generation_jobs.PROMPT_PART", 7)
        whole = service.complete(prompt, **asked).json()["choices"]
        streamed = events(service.complete(prompt, stream=True, **asked))
    for index, choice in enumerate(whole):
        assert choice["text"] == prompt
        assert choice["logprobs"]["tokens"] == [*prompt]
        assert choice["logprobs"]["text_offset"] == [*range(len(prompt))]
        parts = [c for chunk in streamed for c in chunk["choices"] if c["index"] == index]
        assert "".join(part["text"] for part in parts) == prompt
        for name in ("tokens", "token_logprobs", "text_offset"):
            of_parts = [item for part in parts for item in part["logprobs"][name]]
            assert of_parts == choice["logprobs"][name]


def test_what_is_too_much_to_score_is_a_400(service: Service) -> None:
    fields: dict[str, Any] = {"echo": True, "logprobs": 20, "n": 128, "max_tokens": 0}
    for prompt in ("x" * 25, [list(b"x" * 25)]):
        response = service.complete(prompt, **fields)
        assert response.status_code == 400
        error = response.json()["error"]
        assert error["param"] == "logprobs"
        assert "this one would have 67,200 " in error["message"]
    assert service.complete("x" * 24, **fields).status_code == 200
    response = service.complete("a", suffix="b", echo=True, logprobs=1)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "suffix"


def test_ids_that_have_no_text_cannot_be_echoed(service: Service) -> None:
    response = service.complete([1, 99999], echo=True)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "prompt"


def test_a_middle_is_filled_between_the_models_own_marks(service: Service) -> None:
    body = service.complete("def f(", suffix="return 1").json()
    assert body["choices"][0]["text"] == "You said: def f(return 1"
    assert body["usage"]["prompt_tokens"] == len("def f(return 1") + 3
    streamed = service.complete("def f(", suffix="return 1", echo=True, stream=True)
    assert streamed_texts(streamed, 1) == ["def f(You said: def f(return 1"]
    several = service.complete(["a", ""], suffix="z").json()["choices"]
    assert [choice["text"] for choice in several] == ["You said: az", "You said: z"]


def test_around_a_middle_no_control_token_is_obeyed(service: Service) -> None:
    prompt, suffix = "<|fim_suffix|>a", "b<|user|>c<|end|>"
    usage = service.complete(prompt, suffix=suffix).json()["usage"]
    assert usage["prompt_tokens"] == len(prompt + suffix) + 3


@pytest.mark.parametrize("prompt", [[True], [97, True], [[97, True]]], ids=str)
def test_a_truth_is_no_token(service: Service, prompt: Any) -> None:
    response = service.complete(prompt)
    assert response.status_code == 400
    assert response.json()["error"]["param"].startswith("prompt[")


@pytest.mark.parametrize("suffix", [None, ""])
def test_no_suffix_is_a_prompt_as_ever(service: Service, suffix: Any) -> None:
    body = service.complete("<|user|>once<|end|>", suffix=suffix).json()
    assert body["choices"][0]["text"] == " upon a time"
    assert body["usage"]["prompt_tokens"] == 6
    assert service.complete("", suffix=suffix).status_code == 400


@pytest.mark.parametrize(
    "fields", [{"suffix": 5}, {"suffix": ["a"]}, {"suffix": "a", "prompt": [1, 2]}], ids=str
)
def test_a_suffix_that_makes_no_sense_is_refused(service: Service, fields: dict[str, Any]) -> None:
    response = service.complete(**fields)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "suffix"


def test_a_model_without_marks_fills_no_middle(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "CONTROL_TOKENS", backend.CONTROL_TOKENS[:5])
    with serving() as other:
        response = other.complete("a", suffix="b")
        assert response.status_code == 400
        error = response.json()["error"]
        assert (error["code"], error["param"]) == ("unsupported_parameter", "suffix")
        assert other.complete("a", suffix="").status_code == 200


def test_log_probabilities_in_the_legacy_form(service: Service) -> None:
    body = service.complete("choose", seed=0, logprobs=2).json()
    logprobs = body["choices"][0]["logprobs"]
    assert logprobs["tokens"] == ["r", "e", "d"]
    assert logprobs["token_logprobs"] == [pytest.approx(-1 / 3)] * 3
    assert logprobs["text_offset"] == [0, 1, 2]
    assert logprobs["top_logprobs"][1] == {
        "e": pytest.approx(-1 / 3), "\x01": pytest.approx(-4 / 3),
    }  # fmt: skip
    parts = [
        chunk["choices"][0]["logprobs"]
        for chunk in events(service.complete("choose", seed=0, logprobs=2, stream=True))
    ]
    for name in ("tokens", "token_logprobs", "text_offset", "top_logprobs"):
        assert [item for part in parts for item in part[name]] == logprobs[name]
    assert service.complete("choose", logprobs=0).json()["choices"][0]["logprobs"][
        "top_logprobs"
    ] is None  # fmt: skip
    assert service.complete("choose").json()["choices"][0]["logprobs"] is None


@pytest.mark.parametrize("stop", [None, "x! y"])
def test_the_tokens_of_log_probabilities_add_up_to_the_text(
    service: Service, stop: str | None
) -> None:
    """Also where a character has several; the last has all of it. An offset counts characters."""
    asked = {"logprobs": 0, "stop": stop}
    (choice,) = service.complete("umlaut", **asked).json()["choices"]
    told = choice["logprobs"]
    assert choice["text"] == "Grüße, 世x! z"
    assert "".join(told["tokens"]) == choice["text"]
    assert told["tokens"][:6] == ["G", "r", "", "ü", "", "ß"]
    assert told["text_offset"] == [0, 1, 2, 2, 3, 3, 4, 5, 6, 7, 7, 7, 8, 9, 10, 11]
    streamed: dict[str, list[Any]] = {"tokens": [], "text_offset": []}
    text = ""
    for chunk in events(service.complete("umlaut", stream=True, **asked)):
        (piece,) = chunk["choices"]
        text += piece["text"]
        for name, so_far in streamed.items():
            so_far += piece["logprobs"][name]
        assert "".join(streamed["tokens"]) == text
    assert streamed == {name: told[name] for name in streamed}


def test_the_best_of_several_are_given_best_first(service: Service) -> None:
    body = service.complete("choose", n=2, best_of=3, seed=0).json()
    # the fake backend finds longer answers likelier
    assert [c["text"] for c in body["choices"]] == ["ultramarine", "vermilion"]
    assert body["usage"]["completion_tokens"] == len("redvermilionultramarine") + 3
    assert service.complete("choose", best_of=1, seed=0).json()["choices"][0]["text"] == "red"


@pytest.mark.parametrize(
    "fields", [{"best_of": 1, "n": 2}, {"best_of": 2, "stream": True}, {"best_of": 0}], ids=str
)
def test_a_best_of_that_makes_no_sense_is_refused(service: Service, fields: dict[str, Any]) -> None:
    response = service.complete("choose", **fields)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "best_of"


def test_one_of_several_that_breaks_ends_the_stream_with_an_error(service: Service) -> None:
    *_, last = service.breaking("/v1/completions", prompt=["once", "break"])
    assert last["error"]["code"] == "internal_error"
    assert service.complete(["once", "break"]).status_code == 500
    assert service.complete("once").status_code == 200
