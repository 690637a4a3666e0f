"""A client that calls an ASGI application in this process, and may leave in the middle."""

import asyncio
import json
from collections.abc import Callable
from typing import Any, NamedTuple

JSON = ("content-type", "application/json")


class Answer(NamedTuple):
    """What was received."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def content(self) -> Any:
        return json.loads(self.body)

    @property
    def events(self) -> list[Any]:
        """The server-sent events; the last one must end the stream."""
        blocks = self.body.decode().split("\n\n")
        assert blocks.pop() == ""
        assert all(block.startswith("data: ") for block in blocks)
        assert blocks[-1] == "data: [DONE]"
        return [json.loads(block.removeprefix("data: ")) for block in blocks[:-1]]


async def send(
    app: Any,
    method: str,
    path: str,
    body: Any = b"",
    *headers: tuple[str, str],
    leave_after: float | Callable[[bytes], bool] | None = None,
) -> Answer:
    """Sends one request.

    Args:
        app: The application.
        method: Of HTTP.
        path: What is asked.
        body: Bytes, or what is sent as JSON.
        headers: Further headers.
        leave_after: Seconds, or a condition on what has come, after which the client is gone.
    """
    given = [*headers, *([] if isinstance(body, bytes) else [JSON])]
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    cuts = range(0, max(1, len(raw)), 1 << 16)
    messages = [
        {"type": "http.request", "body": raw[cut : cut + (1 << 16)], "more_body": cut != cuts[-1]}
        for cut in cuts
    ]
    gone, received = asyncio.Event(), []
    start: dict[str, Any] = {}

    async def receive() -> dict[str, Any]:
        if messages:
            return messages.pop(0)
        await gone.wait()
        return {"type": "http.disconnect"}

    async def take(message: dict[str, Any]) -> None:
        if message["type"] == "http.response.start":
            start.update(message)
        else:
            received.append(message.get("body", b""))
            if callable(leave_after) and leave_after(b"".join(received)):
                gone.set()

    if isinstance(leave_after, float):
        asyncio.get_running_loop().call_later(leave_after, gone.set)
    scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": method,
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "root_path": "",
        "headers": [(name.lower().encode(), value.encode()) for name, value in given],
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 80),
    }
    await asyncio.wait_for(app(scope, receive, take), 120)
    names = {name.decode(): value.decode() for name, value in start["headers"]}
    return Answer(start["status"], names, b"".join(received))


def ask(app: Any, method: str, path: str, *body_and_headers: Any, **how: Any) -> Answer:
    """As `send`, in an event loop of its own."""
    return asyncio.run(send(app, method, path, *body_and_headers, **how))
