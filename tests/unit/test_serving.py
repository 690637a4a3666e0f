"""The server through its ASGI interface: OpenAI's protocol, limits, errors, clients that leave."""

import asyncio
import math
import re
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from mlpmem_jax.generation.sampling import Sampling
from mlpmem_jax.serving.app import App
from mlpmem_jax.serving.completions import Service
from tests.unit.asgi_client import JSON, ask, send
from tests.unit.tiny_models import LONG_CONTEXT, WEIGHT, tiny_language_model
from tests.unit.tiny_service import CONFIG, complete, tiny_service, until

KEY = "secret-key"


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    made = tiny_service()
    yield made
    made.worker.stop()


@pytest.fixture(scope="module")
def app(service: Service) -> Any:
    return App(service, None).asgi


def _text(app: Any, **body: Any) -> str:
    answer = complete(app, **body)
    assert answer.status == 200, answer.body
    [choice] = answer.content["choices"]
    return str(choice["text"])


def test_a_completion_is_what_the_model_writes(app):
    expected = tiny_language_model().generate(["def read("], 12, sampling=Sampling("greedy"))
    answer = complete(app, model="tiny", prompt="def read(", max_tokens=12, temperature=0)
    content = answer.content
    assert [choice["text"] for choice in content["choices"]] == expected
    assert content["object"] == "text_completion"
    assert content["model"] == "tiny"
    assert content["choices"][0]["logprobs"] is None
    usage = content["usage"]
    ids = tiny_language_model().tokenizer.encode(["def read("])[0]
    assert usage["prompt_tokens"] == len(ids)
    assert usage["completion_tokens"] <= 12
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]


def test_prompts_and_samples_have_choices_in_order(app):
    body = {"prompt": ["def", "path"], "n": 2, "max_tokens": 10, "seed": 5, "temperature": 1.5}
    choices = complete(app, **body).content["choices"]
    assert [choice["index"] for choice in choices] == [0, 1, 2, 3]
    assert choices[0]["text"] != choices[1]["text"]
    assert complete(app, **body).content["choices"] == choices
    one = complete(app, **(body | {"prompt": ["path"]})).content["choices"]
    assert [choice["text"] for choice in one] == [choice["text"] for choice in choices[2:]]
    assert complete(app, **(body | {"seed": 6})).content["choices"] != choices
    unseeded = {_text(app, prompt="def", max_tokens=10, temperature=1.5) for _ in range(4)}
    assert len(unseeded) > 1


def test_a_stream_is_the_whole_in_pieces(app):
    body = {"prompt": ["def read(", "日"], "max_tokens": 20, "seed": 1, "logprobs": 2, "echo": True}
    whole = complete(app, **body).content["choices"]
    answer = complete(app, **body, stream=True, stream_options={"include_usage": True})
    assert answer.headers["content-type"].startswith("text/event-stream")
    *parts, last = answer.events
    assert last["choices"] == []
    assert last["usage"]["total_tokens"] > 0
    for expected in whole:
        found = [
            part["choices"][0] for part in parts if part["choices"][0]["index"] == expected["index"]
        ]
        assert len(found) > 5
        assert "".join(part["text"] for part in found) == expected["text"]
        for column, values in expected["logprobs"].items():
            assert [value for part in found for value in part["logprobs"][column]] == values
        finishes = [part["finish_reason"] for part in found]
        assert finishes[-1] == expected["finish_reason"]
        assert set(finishes[:-1]) <= {None}


def test_scores_as_the_evaluation_harness_asks_for_them(app):
    """Its request and its reading: context and continuation as ids, echo, one token drawn."""
    model = tiny_language_model()
    separator = model.tokenizer.separator_id
    text = "def read(path):\n"
    ids = [separator, *model.tokenizer.encode([text])[0].tolist()]
    body = {"model": "tiny", "temperature": 0, "max_tokens": 1, "logprobs": 1, "seed": 1234}
    answer = complete(app, prompt=[ids, ids[1:]], echo=True, **body)
    for choice, sent in zip(answer.content["choices"], (ids, ids[1:]), strict=True):
        logprobs = choice["logprobs"]
        assert {len(column) for column in logprobs.values()} == {len(sent) + 1}
        assert choice["text"].startswith(text)
        found = logprobs["token_logprobs"][1 if sent[0] == separator else 0 : -1]
        assert found == pytest.approx(model.score(text).logprob_T.tolist(), abs=2e-4)
    whole = answer.content["choices"][0]["logprobs"]
    assert whole["token_logprobs"][0] is None
    assert whole["top_logprobs"][0] is None
    greedy = [
        logprob == max(top.values())
        for logprob, top in zip(whole["token_logprobs"][1:], whole["top_logprobs"][1:], strict=True)
    ]
    assert greedy[-1]  # the token that was drawn
    assert not all(greedy)


def test_what_is_written_greedily_scores_as_greedy(app):
    """The top entry has the bits of the token's own log-probability, drawn or read."""
    drawn = complete(app, prompt="def", max_tokens=12, temperature=0, logprobs=1).content
    [choice] = drawn["choices"]
    tokens = choice["logprobs"]
    for logprob, top in zip(tokens["token_logprobs"], tokens["top_logprobs"], strict=True):
        assert [logprob] == list(top.values())
    encode = tiny_language_model().tokenizer.encode
    ids = [*encode(["def"])[0].tolist(), *encode([choice["text"]])[0].tolist()]
    read = complete(app, prompt=ids, max_tokens=0, echo=True, logprobs=1).content
    columns = read["choices"][0]["logprobs"]
    if columns["tokens"][1:] == tokens["tokens"]:  # The text may be cut into other tokens.
        for logprob, top in zip(
            columns["token_logprobs"][1:], columns["top_logprobs"][1:], strict=True
        ):
            assert logprob == max(top.values())


def test_log_probabilities_have_names_and_offsets(app):
    content = complete(
        app, prompt="naïve 日本", max_tokens=6, temperature=0, logprobs=3, echo=True
    ).content
    [choice] = content["choices"]
    columns = choice["logprobs"]
    text = choice["text"]
    assert text.startswith("naïve 日本")
    assert columns["text_offset"] == sorted(columns["text_offset"])
    for name, offset in zip(columns["tokens"], columns["text_offset"], strict=True):
        assert name.startswith("bytes:") or text[offset:].startswith(name)
    for top in columns["top_logprobs"]:
        assert 1 <= len(top) <= 4
    shares = [sum(map(math.exp, top.values())) for top in columns["top_logprobs"]]
    assert max(shares) <= 1 + 1e-5


def test_sampling_keys_have_effects(app):
    base = {"prompt": "def", "max_tokens": 16, "seed": 3, "temperature": 1.5}
    plain = _text(app, **base)
    greedy = _text(app, **(base | {"temperature": 0}))
    assert plain != greedy
    for narrow in ({"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}, {"temperature": 1e-5}):
        assert _text(app, **(base | narrow)) == greedy, narrow
    for wide in ({"top_k": -1}, {"top_k": 0}, {"top_p": 1.0}, {"min_p": 0.0}, {"user": "x"}):
        assert _text(app, **base, **wide) == plain, wide
    assert _text(app, **base, interpolation=WEIGHT) == plain
    weights = {_text(app, **base, interpolation=weight) for weight in (0.0, 0.5, 1.0)}
    assert len(weights) > 1
    assert _text(app, **base, repetition_penalty=50.0) != plain


def test_stops(app):
    whole = _text(app, prompt="def", max_tokens=20, temperature=0)
    stop = whole[5:7]
    answer = complete(app, prompt="def", max_tokens=20, temperature=0, stop=[stop, "\0"])
    [choice] = answer.content["choices"]
    assert choice["text"] == whole[: whole.index(stop)]
    assert choice["finish_reason"] == "stop"
    assert _text(app, prompt="def", max_tokens=20, temperature=0, stop=stop) == choice["text"]
    endless = {"prompt": "def", "max_tokens": 300, "temperature": 1.5, "ignore_eos": True}
    whole = complete(app, **endless).content
    assert whole["choices"][0]["finish_reason"] == "length"
    assert whole["usage"]["completion_tokens"] == 300


ERRORS = {
    "no prompt": ({}, "prompt"),
    "null prompt": ({"prompt": None}, "prompt"),
    "number as prompt": ({"prompt": 3}, "prompt"),
    "empty list": ({"prompt": []}, "prompt"),
    "mixed list": ({"prompt": ["a", 3]}, "prompt"),
    "lone surrogate": ({"prompt": "\ud800"}, "prompt"),
    "unknown id": ({"prompt": [10**9]}, "prompt"),
    "negative id": ({"prompt": [-1]}, "prompt"),
    "huge id": ({"prompt": [10**30]}, "prompt"),
    "long prompt": ({"prompt": [5] * LONG_CONTEXT}, "prompt"),
    "many prompts": ({"prompt": ["a"] * 6}, "prompt"),
    "many samples": ({"prompt": "a", "n": 6}, "prompt"),
    "n": ({"prompt": "a", "n": 0}, "n"),
    "max_tokens": ({"prompt": "a", "max_tokens": 5001}, "max_tokens"),
    "negative max_tokens": ({"prompt": "a", "max_tokens": -1}, "max_tokens"),
    "text as number": ({"prompt": "a", "max_tokens": "3"}, "max_tokens"),
    "nothing to do": ({"prompt": "a", "max_tokens": 0}, "max_tokens"),
    "logprobs": ({"prompt": "a", "logprobs": 5}, "logprobs"),
    "temperature": ({"prompt": "a", "temperature": -0.1}, "temperature"),
    "nan": ({"prompt": "a", "temperature": math.nan}, "temperature"),
    "top_p": ({"prompt": "a", "top_p": 0}, "top_p"),
    "min_p": ({"prompt": "a", "min_p": 2}, "min_p"),
    "penalty": ({"prompt": "a", "repetition_penalty": 0}, "repetition_penalty"),
    "λ": ({"prompt": "a", "interpolation": 1.5}, "interpolation"),
    "seed": ({"prompt": "a", "seed": 2**32}, "seed"),
    "empty stop": ({"prompt": "a", "stop": [""]}, "stop"),
    "many stops": ({"prompt": "a", "stop": ["x"] * 17}, "stop"),
    "presence": ({"prompt": "a", "presence_penalty": 0.5}, "presence_penalty"),
    "best_of": ({"prompt": "a", "best_of": 2}, "best_of"),
    "unknown": ({"prompt": "a", "max_token": 3}, "max_token"),
}


@pytest.mark.parametrize(("body", "field"), ERRORS.values(), ids=ERRORS)
def test_errors_name_the_field(app, body: dict[str, Any], field: str):
    answer = complete(app, **body)
    assert answer.status == 400
    error = answer.content["error"]
    assert (error["param"], error["code"], error["type"]) == (field, 400, "invalid_request_error")
    assert error["message"].startswith(f"{field}: ")
    assert "\n" not in error["message"]


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[1]", b"null", b'"x"', b"\xff\xfe", b"[" * 15_000, b'{"prompt": 1' + b"0" * 9000],
    ids=lambda body: repr(body[:12]),
)
def test_bodies_that_are_no_request(app, body: bytes):
    answer = ask(app, "POST", "/v1/completions", body, JSON)
    assert answer.status == 400
    assert set(answer.content["error"]) == {"message", "type", "param", "code"}


def test_other_refusals(app):
    assert complete(app, prompt="x" * 30_000).status == 413
    assert complete(app, model="other", prompt="a").content["error"]["param"] == "model"
    form = ("content-type", "text/plain")
    assert ask(app, "POST", "/v1/completions", b"{}", form).status == 400
    for method, path, status in (("GET", "/v1/completions", 405), ("GET", "/nothing", 404)):
        answer = ask(app, method, path)
        assert answer.status == status
        assert path in answer.content["error"]["message"]


def test_the_key(service: Service):
    app = App(service, KEY).asgi
    for path in ("/v1/models", "/metrics", "/tokenizer_info"):
        assert ask(app, "GET", path).status == 401
        assert ask(app, "GET", path, b"", ("Authorization", "Bearer wrong")).status == 401
        assert ask(app, "GET", path, b"", ("Authorization", f"Bearer {KEY}")).status == 200
    assert ask(app, "POST", "/v1/completions", {"prompt": "a"}).status == 401
    assert ask(app, "GET", "/health").status == 200
    assert ask(app, "GET", "/").status == 200


def test_models_and_tokenizer(app):
    [about] = ask(app, "GET", "/v1/models").content["data"]
    assert (about["id"], about["max_model_len"]) == ("tiny", LONG_CONTEXT)
    text = "def naïve 日本"
    tokens = ask(app, "POST", "/tokenize", {"prompt": text, "add_special_tokens": False}).content
    assert tokens["tokens"] == tiny_language_model().tokenizer.encode([text])[0].tolist()
    assert ask(app, "POST", "/detokenize", {"tokens": tokens["tokens"]}).content["prompt"] == text
    assert (
        ask(app, "POST", "/detokenize", {"tokens": [10**6]}).content["error"]["param"] == "tokens"
    )
    assert ask(app, "GET", "/tokenizer_info").content["eos_token"] == "<|endoftext|>"


def test_what_decoder_and_memory_would_write(app):
    found = ask(app, "POST", "/next", {"prompt": "def read("}).content
    assert found["text"] == "def read("
    assert found["interpolation"] == pytest.approx(WEIGHT)
    best = max(
        found["candidates"],
        key=lambda one: WEIGHT * math.exp(one["memory"]) + (1 - WEIGHT) * math.exp(one["decoder"]),
    )
    body = {"prompt": found["tokens"], "max_tokens": 1, "temperature": 0, "logprobs": 1}
    drawn = complete(app, **body).content["choices"][0]["logprobs"]
    assert drawn["tokens"] == [best["text"]]
    mixed = WEIGHT * math.exp(best["memory"]) + (1 - WEIGHT) * math.exp(best["decoder"])
    assert math.exp(drawn["token_logprobs"][0]) == pytest.approx(mixed, rel=1e-4)
    after = ask(app, "POST", "/next", {"prompt": [*found["tokens"], best["token"]]}).content
    assert after["tokens"] == [*found["tokens"], best["token"]]
    longer = ask(app, "POST", "/next", {"prompt": [5] * 3 * LONG_CONTEXT})
    assert longer.status == 200
    assert ask(app, "POST", "/next", {"prompt": ["a"]}).content["error"]["param"] == "prompt"


def test_a_client_that_leaves_in_the_middle_of_its_body_is_no_error(service, app, capfd):
    messages = iter(
        [
            {"type": "http.request", "body": b'{"prompt"', "more_body": True},
            {"type": "http.disconnect"},
        ]
    )

    async def receive() -> Any:
        return next(messages)

    async def take(message: Any) -> None:
        pass  # Nobody is there.

    name, value = JSON
    scope = {
        "type": "http", "http_version": "1.1", "method": "POST", "path": "/v1/completions",
        "query_string": b"", "headers": [(name.encode(), value.encode())],
    }  # fmt: skip
    counter = 'mlpmem_requests_total{path="/v1/completions",status="499"}'
    before = service.metrics.text({}).count(counter)
    asyncio.run(app(scope, receive, take))
    assert counter in service.metrics.text({}) and before == 0
    assert "Traceback" not in "".join(capfd.readouterr())


def test_the_page_is_one_file_that_loads_nothing(app):
    page = ask(app, "GET", "/")
    text = page.body.decode()
    assert page.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert not re.search(r"https?://|src=|href=|url\(|@import", text)
    assert 'fetch("next"' in text


def test_slots_full_queue_full_and_clients_that_leave(service: Service, app):
    """Two are written and three wait; a sixth is refused; who leaves makes room at once."""
    batcher = service.worker.batcher
    body = {"prompt": "def", "max_tokens": 5000, "ignore_eos": True, "logprobs": 1}

    async def act() -> None:
        streams = [
            asyncio.ensure_future(
                send(
                    app, "POST", "/v1/completions", body | {"seed": seed, "stream": True},
                    leave_after=lambda _: leaving.is_set(),
                )
            )
            for seed in range(2)
        ]  # fmt: skip
        while batcher.num_active < 2:
            await asyncio.sleep(0.01)
        waiting = [
            asyncio.ensure_future(
                send(app, "POST", "/v1/completions", body | {"seed": seed}, leave_after=delay)
            )
            for seed, delay in ((2, 0.5), (3, None), (4, None))
        ]
        while batcher.num_waiting < 3:
            await asyncio.sleep(0.01)
        refused = await send(app, "POST", "/v1/completions", body)
        assert refused.status == 429
        assert "queue is full" in refused.content["error"]["message"]
        assert (await waiting[0]).status == 499
        assert batcher.num_waiting == 2
        for one in waiting[1:]:
            one.cancel()
        await asyncio.gather(*waiting[1:], return_exceptions=True)
        leaving.set()
        await asyncio.gather(*streams)

    leaving = threading.Event()
    asyncio.run(act())
    until(lambda: batcher.num_active == 0)
    assert batcher.num_waiting == 0
    assert complete(app, prompt="def", max_tokens=2).status == 200


def test_metrics(service: Service, app):
    before = _metric(app, 'mlpmem_tokens_total{kind="generated"}')
    answer = complete(app, prompt="def", max_tokens=7, temperature=0)
    drawn = answer.content["usage"]["completion_tokens"]
    assert _metric(app, 'mlpmem_tokens_total{kind="generated"}') == before + drawn
    assert _metric(app, "mlpmem_slots") == CONFIG.slots
    assert _metric(app, "mlpmem_slots_used") == 0
    bad = 'mlpmem_requests_total{path="/v1/completions",status="400"}'
    before = _metric(app, bad)
    complete(app, prompt=3)
    assert _metric(app, bad) == before + 1
    count = _metric(app, "mlpmem_completion_seconds_count")
    assert _metric(app, 'mlpmem_completion_seconds_bucket{le="+Inf"}') == count


def _metric(app: Any, name: str) -> float:
    answer = ask(app, "GET", "/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    rows = dict(line.rsplit(" ", 1) for line in answer.body.decode().splitlines() if line[0] != "#")
    return float(rows.get(name, 0))
