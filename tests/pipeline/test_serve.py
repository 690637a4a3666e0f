"""The command `serve` as a process: requests over TCP, good and bad, and its end by SIGTERM."""

import contextlib
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mlpmem_jax.__main__ import main
from mlpmem_jax.config.schema import Config
from mlpmem_jax.pipeline.serve import API_KEY
from tests.conftest import ROOT

TINY = ROOT / "configs" / "tiny.yaml"
KEY = "not-a-secret"
LIMITS = [
    "serve.slots=2", "serve.max_queue=2", "serve.max_body_bytes=5000", "serve.max_tokens=100000",
    "serve.port=0",
]  # fmt: skip
# The context of configs/tiny.yaml is far shorter: texts go on.
ENDLESS = {"prompt": "def", "max_tokens": 100_000, "ignore_eos": True}


class Server:
    """A process of the command, and connections to it."""

    def __init__(self, workdir: str, *overrides: str):
        arguments = ["serve", "--config", str(TINY), "--workdir", workdir, *LIMITS, *overrides]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "mlpmem_jax", *arguments],
            cwd=ROOT,
            env=os.environ | {"JAX_PLATFORMS": "cpu", API_KEY: KEY},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        found = re.fullmatch(r"serving run at http://127\.0\.0\.1:(\d+) \(2 slots\)\n", line)
        assert found, (line, self.process.stderr and self.process.stderr.read())
        self.port = int(found[1])

    def connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)

    def raw(self, sent: bytes) -> bytes:
        """Sends bytes that are no request, and returns what comes until the end."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=60) as connection:
            connection.sendall(sent)
            connection.shutdown(socket.SHUT_WR)
            return b"".join(iter(lambda: connection.recv(1 << 16), b""))

    def begin(self, **body: Any) -> http.client.HTTPConnection:
        connection = self.connect()
        headers = {"content-type": "application/json", "authorization": f"Bearer {KEY}"}
        connection.request("POST", "/v1/completions", json.dumps(body), headers)
        return connection

    def complete(self, **body: Any) -> tuple[int, Any]:
        with contextlib.closing(self.begin(**body)) as connection:
            answer = connection.getresponse()
            return answer.status, json.loads(answer.read())

    def metric(self, name: str) -> float:
        with contextlib.closing(self.connect()) as connection:
            connection.request("GET", "/metrics", headers={"authorization": f"Bearer {KEY}"})
            lines = connection.getresponse().read().decode().splitlines()
        return float(dict(line.rsplit(" ", 1) for line in lines if line[0] != "#")[name])

    def wait_for(self, name: str, value: float) -> None:
        for _ in range(6000):
            if self.metric(name) == value:
                return
        raise AssertionError(f"{name} never was {value}")

    def end(self) -> tuple[int, str, str]:
        """Sends SIGTERM; returns exit code, output and messages."""
        self.process.send_signal(signal.SIGTERM)
        out, err = self.process.communicate(timeout=120)
        return self.process.returncode, out, err


@pytest.fixture(scope="module")
def server(tiny_run: Config) -> Iterator[Server]:
    started = Server(tiny_run.workdir)
    yield started
    if started.process.poll() is None:
        started.end()


def test_good_requests_among_bad_ones(server: Server):
    body = {"prompt": "def read(", "max_tokens": 8, "temperature": 0}
    status, expected = server.complete(**body)
    assert status == 200
    assert server.raw(b"\0\1\2\r\n\r\n").startswith(b"HTTP/1.1 400")
    assert b" 400 " in server.raw(b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * 20_000 + b"\r\n")
    head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
    head += b"authorization: Bearer " + KEY.encode() + b"\r\n"
    server.raw(head + b"content-length: 100\r\n\r\n{")  # the rest never comes
    large = server.raw(head + b"content-length: 9000\r\n\r\n" + b" " * 9000)
    assert large.startswith(b"HTTP/1.1 413")
    chunk = b"1000\r\n" + b" " * 0x1000 + b"\r\n"
    assert server.raw(head + b"transfer-encoding: chunked\r\n\r\n" + 3 * chunk).startswith(
        b"HTTP/1.1 413"
    )
    assert server.complete(prompt="x", max_tokens=100_001)[0] == 400
    assert server.complete(prompt="x" * 9000)[0] == 413
    with contextlib.closing(server.connect()) as connection:
        connection.request("GET", "/v1/models")
        assert connection.getresponse().status == 401
    again = server.complete(**body)[1]
    assert again["choices"] == expected["choices"]


def test_clients_that_leave_free_their_slots(server: Server):
    connections = [server.begin(**ENDLESS, seed=seed, stream=seed % 2 == 0) for seed in range(4)]
    server.wait_for("mlpmem_slots_used", 2)
    server.wait_for("mlpmem_queue_length", 2)
    status, refused = server.complete(**ENDLESS)
    assert status == 429
    assert "queue is full" in refused["error"]["message"]
    for connection in connections:
        assert connection.sock is not None
        connection.sock.shutdown(socket.SHUT_RDWR)
        connection.close()
    server.wait_for("mlpmem_queue_length", 0)
    server.wait_for("mlpmem_slots_used", 0)
    assert server.complete(prompt="def", max_tokens=2)[0] == 200


def test_many_clients_at_once_get_what_they_get_alone(server: Server):
    bodies = [
        {"prompt": f"def f{number}(", "max_tokens": 5 + number, "seed": number, "logprobs": 2}
        for number in range(4)
    ]
    alone = [server.complete(**body)[1]["choices"] for body in bodies]
    found: dict[int, Any] = {}

    def ask(number: int) -> None:
        found[number] = server.complete(**bodies[number])[1]["choices"]

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[number] for number in range(4)] == alone


def test_sigterm_finishes_what_has_begun_and_accepts_no_more(tiny_run: Config):
    server = Server(tiny_run.workdir, "serve.shutdown_secs=60")
    connection = server.begin(**(ENDLESS | {"max_tokens": 300}), stream=True)
    response = connection.getresponse()
    first = response.readline()
    assert first.startswith(b"data: ")
    server.process.send_signal(signal.SIGTERM)
    body = first + response.read()
    assert body.endswith(b"data: [DONE]\n\n")
    out, err = server.process.communicate(timeout=120)
    assert server.process.returncode == 0, err
    assert out == ""
    assert err.splitlines()[-1].startswith("stopping; requests have 60 s to finish")
    with pytest.raises(ConnectionRefusedError):
        server.connect().connect()


def test_what_does_not_finish_in_time_is_given_up(tiny_run: Config):
    server = Server(tiny_run.workdir, "serve.shutdown_secs=0.1")
    connection = server.begin(**ENDLESS, n=2)
    server.wait_for("mlpmem_slots_used", 2)
    code, _, err = server.end()
    assert code == 0, err
    assert connection.getresponse().status == 503


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["serve.host=0.0.0.0"], "serve.host=0.0.0.0: other machines can connect"),
        (["serve.host=no.such.host.invalid"], "serve.host=no.such.host.invalid: other machines"),
        (["--api-key-file", "/no/such/file"], "--api-key-file /no/such/file: cannot be read"),
        (["serve.port=65536"], "serve.port=65536: must be a whole number from 0 to 65535"),
        (["serve.slots=0"], "serve.slots=0: must be a whole number from 1"),
    ],
)
def test_refusals(
    tiny_run: Config,
    capsys: pytest.CaptureFixture[str],
    monkeypatch,
    arguments: list[str],
    message: str,
):
    monkeypatch.delenv(API_KEY, raising=False)
    command = ["serve", "--config", str(TINY), "--workdir", tiny_run.workdir]
    assert main([*command, *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_port_that_is_taken(tiny_run: Config, capsys: pytest.CaptureFixture[str]):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        command = ["serve", "--config", str(TINY), "--workdir", tiny_run.workdir]
        assert main([*command, f"serve.port={port}"]) == 2
    assert f"serve.port={port}: Address already in use" in capsys.readouterr().err


@pytest.mark.parametrize("content", ["", "short", "with blank in it", "é" * 20])
def test_a_key_that_cannot_be_used(
    tiny_run: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str
):
    (tmp_path / "key").write_text(content, encoding="utf-8")
    command = ["serve", "--config", str(TINY), "--workdir", tiny_run.workdir]
    assert main([*command, "--api-key-file", str(tmp_path / "key")]) == 2
    assert "a key has 8 to 512" in capsys.readouterr().err


def test_missing_packages_are_named(
    tiny_run: Config, capsys: pytest.CaptureFixture[str], monkeypatch
):
    monkeypatch.delitem(sys.modules, "mlpmem_jax.serving.server", raising=False)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    command = ["serve", "--config", str(TINY), "--workdir", tiny_run.workdir]
    assert main(command) == 2
    assert "pip install -r requirements-serve.txt" in capsys.readouterr().err
