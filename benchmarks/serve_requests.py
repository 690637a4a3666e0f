"""Requests of `benchmarks.serve_load`: good, malformed, oversized, and clients that hang up."""

import contextlib
import http.client
import json
import random
import socket
import struct
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

PATH = "/v1/completions"
BODY_BYTES = 20_000  # serve.max_body_bytes of the server
MAX_TOKENS = 256  # serve.max_tokens of the server
_HEADERS = {"content-type": "application/json"}
_HOST = b"host: x\r\nconnection: close\r\n"
_HEAD = b"POST %b HTTP/1.1\r\n%bcontent-type: application/json\r\n" % (PATH.encode(), _HOST)
_WAIT_SECS = 600.0
_LEAVE_SECS = 0.3  # Clients that hang up stay at most so long.
Body = dict[str, Any]


class Answer(NamedTuple):
    """What a client received.

    Attributes:
        status: Of HTTP; 0: the connection ended without an answer.
        content: The choices of a completion, put together where it was a stream; else the body.
        tokens: Tokens drawn for it.
        first_secs: Seconds to the first event of a stream.
    """

    status: int
    content: Any = None
    tokens: int = 0
    first_secs: float | None = None


def good_bodies(draw: random.Random, context: int) -> list[Body]:
    """Returns different requests whose answers depend on nothing but themselves."""
    words = ["def ", "class A:\n", "import os", "return x + 1", "é", "日本", "    ", "# a b c"]
    bodies: list[Body] = [
        {"prompt": "", "max_tokens": 3, "seed": 1},
        {"prompt": "def f(", "max_tokens": 0, "echo": True, "logprobs": 2},
        {"prompt": ["a", "b b"], "max_tokens": 6, "n": 2, "seed": 2},
        {"prompt": [1] * (context - 1), "max_tokens": 2, "seed": 3},
    ]
    for number in range(28):
        body: Body = {
            "prompt": "".join(draw.choices(words, k=draw.randint(1, 2))),
            "max_tokens": draw.randint(1, 40),
            "interpolation": draw.choice([0.0, 0.3, 1.0]),
        }
        if number % 2:
            body["temperature"] = 0
        else:
            body |= {"seed": number, "temperature": 0.9, "top_p": 0.95, "top_k": 50}
        if number % 3 == 0:
            body |= {"stream": True, "stream_options": {"include_usage": True}}
        if number % 4 == 0:
            body["logprobs"] = 3
        if number % 5 == 0:
            body |= {"stop": ["x", "\n"], "repetition_penalty": 1.2}
        if number % 7 == 0:
            body["echo"] = True
        bodies.append(body)
    return bodies


def malformed() -> dict[str, tuple[bytes, int]]:
    """Returns by name what is sent, and the status that must answer it."""
    fields = {
        "a prompt of another type": {"prompt": 3},
        "no prompt": {"max_tokens": 3},
        "an unknown field": {"prompt": "a", "nonsense": 1},
        "a negative temperature": {"prompt": "a", "temperature": -1},
        "an infinite number": {"prompt": "a", "temperature": float("inf")},
        "an unknown token": {"prompt": [10**9]},
        "an empty stop text": {"prompt": "a", "stop": ""},
        "no object": ["a"],
    }
    found = {name: (_posted(json.dumps(body).encode()), 400) for name, body in fields.items()}
    return found | {
        "an unknown model": (_posted(b'{"prompt": "a", "model": "other"}'), 404),
        "no JSON": (_posted(b'{"prompt": '), 400),
        "no UTF-8": (_posted(b'{"prompt": "\xff"}'), 400),
        "deep nesting": (_posted(b"[" * 9000), 400),
        "no content type": (b"POST %b HTTP/1.1\r\n%b\r\n" % (PATH.encode(), _HOST), 400),
        "another method": (b"GET %b HTTP/1.1\r\n%b\r\n" % (PATH.encode(), _HOST), 405),
        "another path": (b"GET /nowhere HTTP/1.1\r\n%b\r\n" % _HOST, 404),
        "a length that is no number": (_HEAD + b"content-length: many\r\n\r\n", 400),
        "no HTTP": (b"\0\1\2\r\n\r\n", 400),
    }


def oversized(context: int) -> dict[str, tuple[bytes, int]]:
    """Returns by name what is sent, and the status that must answer it."""
    fields = {
        "max_tokens": {"prompt": "a", "max_tokens": MAX_TOKENS + 1},
        "a long prompt": {"prompt": [1] * (context + 1)},
        "many texts": {"prompt": ["a"] * 60, "n": 100},
        "logprobs": {"prompt": "a", "logprobs": 1000},
    }
    found = {name: (_posted(json.dumps(body).encode()), 400) for name, body in fields.items()}
    chunk = b"1000\r\n" + b" " * 0x1000 + b"\r\n"
    return found | {
        "a long body": (_posted(b" " * (BODY_BYTES + 1)), 413),
        "a long body in chunks": (_HEAD + b"transfer-encoding: chunked\r\n\r\n" + 6 * chunk, 413),
        "long headers": (b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * 20_000 + b"\r\n", 400),
    }


def _posted(body: bytes) -> bytes:
    return _HEAD + b"content-length: %d\r\n\r\n" % len(body) + body


def ask(port: int, body: Body) -> Answer:
    """Sends a completion request and reads all of its answer."""
    begun = time.monotonic()
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=_WAIT_SECS)
    with contextlib.closing(connection):
        connection.request("POST", PATH, json.dumps(body), _HEADERS)
        response = connection.getresponse()
        if response.status == 200 and body.get("stream"):
            return _read_stream(response, begun)
        content = json.loads(response.read())
        if response.status != 200:
            return Answer(response.status, content)
        return Answer(200, content["choices"], content["usage"]["completion_tokens"])


def _events(response: http.client.HTTPResponse) -> Iterator[Any]:
    """Yields the events of a stream, the last one `[DONE]`."""
    for line in response:
        kind, _, content = line.decode().strip().partition(": ")
        if kind == "data":
            yield content if content == "[DONE]" else json.loads(content)


def _read_stream(response: http.client.HTTPResponse, begun: float) -> Answer:
    """Puts the one choice of a stream together; status 0 where it ends before it is complete."""
    text, columns, first_secs, tokens, event = "", dict[str, list[Any]](), None, 0, None
    finish = None
    for event in _events(response):
        if first_secs is None:
            first_secs = time.monotonic() - begun
        if event == "[DONE]":
            break
        if "error" in event:
            return Answer(0, event)
        tokens = event.get("usage", {}).get("completion_tokens", tokens)
        for choice in event["choices"]:
            text += choice["text"]
            finish = choice["finish_reason"] or finish
            for name, values in (choice["logprobs"] or {}).items():
                columns.setdefault(name, []).extend(values)
    if event != "[DONE]":
        return Answer(0, "the stream ended early")
    content = {"text": text, "finish_reason": finish, "logprobs": columns}
    return Answer(200, content, tokens, first_secs)


def send(port: int, sent: bytes) -> Answer:
    """Sends bytes, and returns the status of what comes until the end."""
    found = b""
    with _socket(port) as connection:
        # A server that refuses what it has not read may close first.
        with contextlib.suppress(ConnectionError):
            connection.sendall(sent)
        with contextlib.suppress(ConnectionError):
            while block := connection.recv(1 << 16):
                found += block
    head = found.partition(b"\r\n")[0].split()
    return Answer(int(head[1]) if len(head) > 1 else 0, found[-500:].decode(errors="replace"))


def hang_up(port: int, draw: random.Random) -> None:
    """Begins a request whose text would go on for long, and leaves somewhere on the way."""
    stream = draw.random() < 0.5
    body = {"prompt": "def", "max_tokens": MAX_TOKENS, "ignore_eos": True, "stream": stream}
    sent = _posted(json.dumps(body).encode())
    cut = draw.choice([0, draw.randrange(len(sent)), len(sent), len(sent), len(sent)])
    with _socket(port) as connection, contextlib.suppress(ConnectionError, TimeoutError):
        connection.sendall(sent[:cut])
        connection.settimeout(draw.random() * _LEAVE_SECS + 1e-3)
        connection.recv(1 + draw.randrange(1000))
        if draw.random() < 0.5:  # With a reset in place of an orderly end.
            linger = struct.pack("ii", 1, 0)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)


def _socket(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), timeout=_WAIT_SECS)
