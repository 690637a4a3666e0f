"""The HTTP interface: paths, the API key, bodies, errors as JSON."""

import asyncio
import hmac
import importlib.resources
import json
import traceback
from collections.abc import Awaitable, Callable
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from mlpmem_jax.console import note
from mlpmem_jax.generation.inspection import Inspector
from mlpmem_jax.generation.stream import TokenBytes
from mlpmem_jax.serving.completions import Job, Service, check_model, models
from mlpmem_jax.serving.requests import (
    CompletionBody,
    DetokenizeBody,
    NextBody,
    RequestError,
    TokenizeBody,
    check_ids,
    parsed,
    read_prompts,
)

Handler = Callable[[Request], Awaitable[Response]]
_PROMETHEUS = "text/plain; version=0.0.4; charset=utf-8"
_GONE = 499  # the client closed the connection: nobody reads this status but the metrics
# The page is one file: it loads nothing and talks to this server only.
_PAGE_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "connect-src 'self'; frame-ancestors 'none'"
)


class App:
    """The paths of the server."""

    def __init__(self, service: Service, api_key: str | None):
        """Takes what answers.

        Args:
            service: Model, limits, counts.
            api_key: What requests must bring; None: nothing.
        """
        self._service, self._key = service, api_key
        self._inspector = Inspector(service.model.interpolated)
        self._looking = 0
        self._look = asyncio.Lock()
        self._token_bytes = TokenBytes(service.tokenizer.rust)
        page = importlib.resources.files(__package__) / "page.html"
        self._page = page.read_text(encoding="utf-8")
        routes = (
            ("/", "GET", self._show_page, False),
            ("/health", "GET", self._health, False),
            ("/metrics", "GET", self._metrics, True),
            ("/v1/models", "GET", self._models, True),
            ("/tokenizer_info", "GET", self._tokenizer_info, True),
            ("/v1/completions", "POST", self._complete, True),
            ("/tokenize", "POST", self._tokenize, True),
            ("/detokenize", "POST", self._detokenize, True),
            ("/next", "POST", self._next, True),
        )
        self.asgi = Starlette(
            routes=[
                Route(path, self._guarded(path, handler, secret), methods=[method])
                for path, method, handler, secret in routes
            ],
            exception_handlers={HTTPException: self._unknown},
        )

    def _guarded(self, path: str, handler: Handler, secret: bool) -> Handler:
        """Returns a handler that asks for the key and answers errors with JSON."""

        async def answer(request: Request) -> Response:
            try:
                if secret:
                    self._check_key(request)
                response = await handler(request)
            except RequestError as error:
                response = _failed(error)
            except ClientDisconnect:
                response = Response(status_code=_GONE)
            except Exception:
                note(traceback.format_exc().rstrip())
                response = _failed(RequestError(500, "an error of the server; see its log"))
            self._service.metrics.answered(path, response.status_code)
            return response

        return answer

    def _check_key(self, request: Request) -> None:
        if self._key is None:
            return
        given = request.headers.get("authorization", "").encode()
        if not hmac.compare_digest(given, f"Bearer {self._key}".encode()):
            raise RequestError(401, "authorization: needs the header `Authorization: Bearer KEY`")

    async def _content(self, request: Request) -> Any:
        """Reads the body.

        Raises:
            RequestError: It is too large, comes too slowly, or is no JSON.
        """
        # A page of another site cannot send this type without being asked first.
        if request.headers.get("content-type", "").partition(";")[0] != "application/json":
            raise RequestError(400, "content-type: must be application/json", "content-type")
        limit, body = self._service.config.max_body_bytes, bytearray()
        try:
            async with asyncio.timeout(self._service.config.request_secs):
                async for chunk in request.stream():
                    body += chunk
                    if len(body) > limit:
                        raise RequestError(413, f"the body has more than {limit} bytes")
        except TimeoutError:
            raise RequestError(408, "the body did not arrive in time") from None
        try:
            return json.loads(body.decode())
        except (ValueError, RecursionError):
            raise RequestError(400, "the body is not JSON in UTF-8") from None

    async def _complete(self, request: Request) -> Response:
        body = parsed(CompletionBody, await self._content(request))
        check_model(self._service, [body.model])
        job = await asyncio.to_thread(Job, self._service, body)
        job.submit()
        if body.stream:
            return _Stream(job)
        try:
            return await _unless_gone(request, job)
        finally:
            job.cancel()

    async def _tokenize(self, request: Request) -> Response:
        body = parsed(TokenizeBody, await self._content(request))
        check_model(self._service, [body.model])
        encoded = await asyncio.to_thread(self._service.tokenizer.encode, [body.prompt])
        ids = encoded[0].tolist()
        most = self._service.model.interpolated.context_tokens
        return JSONResponse({"tokens": ids, "count": len(ids), "max_model_len": most})

    async def _detokenize(self, request: Request) -> Response:
        body = parsed(DetokenizeBody, await self._content(request))
        check_model(self._service, [body.model])
        check_ids(body.tokens, self._service.tokenizer, "tokens")
        return JSONResponse({"prompt": self._service.tokenizer.decode(body.tokens)})

    async def _next(self, request: Request) -> Response:
        """Answers what decoder and memory would each write next."""
        body = parsed(NextBody, await self._content(request))
        service = self._service
        if self._looking > service.config.max_queue:
            raise RequestError(429, f"the queue is full ({service.config.max_queue} texts)")
        [prompt] = read_prompts([body.prompt], service.tokenizer, context=None)
        self._looking += 1
        try:
            async with self._look:
                weight, found = await asyncio.to_thread(self._inspector.candidates, prompt.ids)
        finally:
            self._looking -= 1
        ids = prompt.ids[prompt.added :]
        candidates = [{"text": self._token_bytes.text(one.token), **one._asdict()} for one in found]
        text = service.tokenizer.decode(ids)
        return JSONResponse(
            {"tokens": ids, "text": text, "interpolation": weight, "candidates": candidates}
        )

    async def _models(self, request: Request) -> Response:
        return JSONResponse(models(self._service))

    async def _tokenizer_info(self, request: Request) -> Response:
        tokenizer = self._service.tokenizer
        return JSONResponse(
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "bos_token": tokenizer.separator,
                "eos_token": tokenizer.separator,
                "vocab_size": tokenizer.vocab_size,
            }
        )

    async def _health(self, request: Request) -> Response:
        if self._service.worker.failure is not None:
            raise RequestError(503, "the engine has failed; see the log of the server")
        return JSONResponse({"status": "ok"})

    async def _metrics(self, request: Request) -> Response:
        batcher = self._service.worker.batcher
        gauges = {
            "slots": self._service.config.slots,
            "slots_used": batcher.num_active,
            "queue_length": batcher.num_waiting,
        }
        return PlainTextResponse(self._service.metrics.text(gauges), media_type=_PROMETHEUS)

    async def _show_page(self, request: Request) -> Response:
        headers = {"content-security-policy": _PAGE_POLICY}
        return Response(self._page, media_type="text/html; charset=utf-8", headers=headers)

    async def _unknown(self, request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        self._service.metrics.answered("other", error.status_code)
        line = f"{request.method} {request.url.path[:100]}: {error.detail}"
        return _failed(RequestError(error.status_code, line))


def _failed(error: RequestError) -> Response:
    return JSONResponse(error.content(), status_code=error.status)


class _Stream(StreamingResponse):
    """A completion as server-sent events; what nobody reads any more is cancelled."""

    def __init__(self, job: Job):
        headers = {"cache-control": "no-store"}
        super().__init__(_events(job), media_type="text/event-stream", headers=headers)
        self._job = job

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._job.cancel()


async def _events(job: Job) -> Any:
    try:
        async for answer in job.stream():
            yield _event(answer)
        yield "data: [DONE]\n\n"
    except RequestError as error:
        yield _event(error.content())


def _event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False, allow_nan=False)}\n\n"


async def _unless_gone(request: Request, job: Job) -> Response:
    """Returns the answer, or gives up when the client has closed the connection."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    answering, leaving = asyncio.ensure_future(job.whole()), asyncio.ensure_future(gone())
    try:
        await asyncio.wait((answering, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not answering.done():
            return Response(status_code=_GONE)
        return JSONResponse(answering.result())
    finally:
        answering.cancel()
        leaving.cancel()
