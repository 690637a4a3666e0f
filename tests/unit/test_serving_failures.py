"""Servers without a memory, with requests that take too long, with an engine that failed."""

from mlpmem_jax.serving.app import App
from tests.unit.asgi_client import ask
from tests.unit.tiny_service import CONFIG, complete, tiny_service, until


def test_without_a_memory():
    service = tiny_service(with_memory=False)
    app = App(service, None).asgi
    assert complete(app, prompt="a", interpolation=0.5).content["error"]["param"] == "interpolation"
    assert complete(app, prompt="a", max_tokens=2).status == 200
    found = ask(app, "POST", "/next", {"prompt": "a"}).content
    assert found["interpolation"] is None
    assert {one["memory"] for one in found["candidates"]} == {None}
    service.worker.stop()


def test_a_request_that_takes_too_long():
    service = tiny_service(CONFIG.model_copy(update={"request_secs": 0.3}))
    app = App(service, None).asgi
    body = {"prompt": "def", "max_tokens": 5000, "ignore_eos": True}
    answer = complete(app, **body)
    assert answer.status == 504
    assert "0.3 s" in answer.content["error"]["message"]
    streamed = complete(app, **body, stream=True).body.decode()
    assert '"code": 504' in streamed
    assert "[DONE]" not in streamed
    until(lambda: service.worker.batcher.num_active == 0)
    service.worker.stop()


def test_a_failed_engine_answers_and_is_seen(monkeypatch):
    service = tiny_service()
    app = App(service, None).asgi
    monkeypatch.setattr(service.worker.batcher, "advance", lambda: 1 / 0)
    assert ask(app, "GET", "/health").status == 200
    assert complete(app, prompt="a").status == 503
    assert isinstance(service.worker.failure, ZeroDivisionError)
    assert ask(app, "GET", "/health").status == 503
    assert complete(app, prompt="a").status == 503
