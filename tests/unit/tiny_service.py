"""A server of the tiny language model, for tests of what it answers."""

import time
from typing import Any

from mlpmem_jax.config.serve import ServeConfig
from mlpmem_jax.serving.completions import Service
from mlpmem_jax.serving.server import start
from tests.unit.asgi_client import Answer, ask
from tests.unit.tiny_models import tiny_language_model

CONFIG = ServeConfig(
    slots=2, max_queue=3, max_tokens=5000, max_logprobs=4, max_body_bytes=20_000, request_secs=60.0
)


def tiny_service(config: ServeConfig = CONFIG, with_memory: bool = True) -> Service:
    return start(config, tiny_language_model(with_memory), "tiny")


def complete(app: Any, **body: Any) -> Answer:
    return ask(app, "POST", "/v1/completions", body)


def until(condition: Any) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)
