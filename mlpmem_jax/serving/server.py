"""The process that serves: socket, threads, and an orderly end."""

import contextlib
import math
import socket
import threading
from collections.abc import Iterator

import uvicorn

from mlpmem_jax import signals
from mlpmem_jax.config.serve import ServeConfig
from mlpmem_jax.console import note, say
from mlpmem_jax.errors import ConfigError
from mlpmem_jax.generation.batching import Batcher
from mlpmem_jax.generation.engine import Engine
from mlpmem_jax.generation.language_model import LanguageModel
from mlpmem_jax.serving.app import App
from mlpmem_jax.serving.completions import Service
from mlpmem_jax.serving.worker import Worker

_POLL_SECS = 0.2
_LAST_SECS = 5  # to answer requests that are given up


def bound_socket(config: ServeConfig) -> socket.socket:
    """Takes the port, before anything takes time.

    Raises:
        ConfigError: It cannot be had.
    """
    try:
        family, kind, _, _, address = socket.getaddrinfo(
            config.host, config.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        taken = socket.socket(family, kind)
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        taken.bind(address)
    except OSError as error:
        raise ConfigError(
            f"serve.host={config.host}, serve.port={config.port}: {error.strerror or error}"
        ) from None
    return taken


def start(config: ServeConfig, model: LanguageModel, name: str) -> Service:
    """Compiles a model, and returns what answers requests for it, already running."""
    engine = Engine(model.interpolated, config.slots, config.max_logprobs)
    engine.compile()
    worker = Worker(Batcher(engine, config.max_queue))
    worker.start()
    return Service(config, name, model, worker)


def serve(service: Service, api_key: str | None, listening: socket.socket) -> None:
    """Answers requests until SIGTERM comes, then finishes those that it has.

    Raises:
        BaseException: What the engine failed with.
    """
    config = service.config
    server = uvicorn.Server(
        uvicorn.Config(
            App(service, api_key).asgi,
            http="h11",
            ws="none",
            lifespan="off",
            log_config=None,
            log_level="critical",
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=math.ceil(config.shutdown_secs) + _LAST_SECS,
        )
    )
    listening.listen()  # Clients may connect as soon as the address is printed.
    with _running(server, listening) as thread, signals.held():
        host, port = listening.getsockname()[:2]
        where = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        say(f"serving {service.name} at http://{where} ({config.slots} slots)")
        while thread.is_alive() and not signals.came() and service.worker.failure is None:
            thread.join(_POLL_SECS)
        note(f"stopping; requests have {config.shutdown_secs:g} s to finish")
        server.should_exit = True
        thread.join(config.shutdown_secs)
        service.worker.stop()  # What is left is answered with an error.
        thread.join()
    if service.worker.failure is not None:
        raise service.worker.failure


@contextlib.contextmanager
def _running(server: uvicorn.Server, listening: socket.socket) -> Iterator[threading.Thread]:
    """Runs the server in a thread of its own: signals are answered by the main one."""
    thread = threading.Thread(
        target=server.run, kwargs={"sockets": [listening]}, name="http", daemon=True
    )
    thread.start()
    try:
        yield thread
    finally:
        server.should_exit = True
