"""The HTTP API in OpenAI's shape, as a FastAPI application, and the server that runs it."""

import asyncio
import hmac
import json
import signal
import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager
from types import FrameType
from typing import Any

import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from autoregressive.serving.http.image_engine import EngineStoppingError, ImageProgress, ImageTask
from autoregressive.serving.http.images_api import (
    error_body,
    parse_request,
    png_base64,
    stream_event,
    usage,
)
from autoregressive.serving.http.service import ImageService, QueueFullError

IMAGES = "/v1/images/generations"
RETRY_AFTER = {"Retry-After": "1"}
GONE = 499, "the client went away"  # nobody reads it; it counts in the metrics


class RequestRefused(Exception):  # noqa: N818 - an answer, not a defect
    """An answer other than 200: status, one line, headers."""

    def __init__(self, status: int, message: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(message)
        self.status, self.headers = status, headers

    @property
    def body(self) -> dict[str, Any]:
        """OpenAI's form of it."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return error_body(str(self), kind)


def build_app(service: ImageService, api_key: str | None = None) -> FastAPI:
    """The application: images, models, health and metrics.

    api_key: what clients send as a bearer token; None for no key. /health needs none.
    """

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await service.engine.start()
        yield
        await service.engine.stop()

    app = FastAPI(title="LlamaGen", lifespan=lifespan, openapi_url=None)

    def allow(request: Request) -> None:
        sent = request.headers.get("authorization", "").encode("latin-1")
        if api_key and not hmac.compare_digest(sent, f"Bearer {api_key}".encode()):
            raise RequestRefused(401, "the API key is missing or wrong (Authorization: Bearer ...)")

    @app.post(IMAGES, response_model=None)
    async def generate(request: Request) -> Response:
        try:
            allow(request)
            response = await _answer(request, service)
        except RequestRefused as error:
            service.metrics.requests.labels(error.status).inc()
            raise
        service.metrics.requests.labels(200).inc()
        return response

    @app.get("/v1/models")
    async def models(request: Request) -> dict[str, Any]:
        allow(request)
        model = {"id": service.name, "object": "model", "created": service.created}
        return {"object": "list", "data": [{**model, "owned_by": "llamagen"}]}

    @app.get("/health")
    async def health() -> JSONResponse:
        state = "stopping" if service.draining else "ok"
        return JSONResponse({"status": state}, 503 if service.draining else 200)

    @app.get("/metrics")
    async def metrics(request: Request) -> Response:
        allow(request)
        return Response(generate_latest(service.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    @app.exception_handler(RequestRefused)
    async def refused(_: Request, error: RequestRefused) -> JSONResponse:
        return JSONResponse(error.body, error.status, error.headers)

    @app.exception_handler(HTTPException)
    async def unknown(_: Request, error: HTTPException) -> JSONResponse:
        body = error_body(str(error.detail), "invalid_request_error")
        return JSONResponse(body, error.status_code, error.headers)

    @app.exception_handler(Exception)
    async def failed(_: Request, error: Exception) -> JSONResponse:
        return JSONResponse(error_body("the server failed; its log says why", "server_error"), 500)

    return app


async def _answer(request: Request, service: ImageService) -> Response:
    """Read, check and sample one request for images."""
    try:
        body = await asyncio.wait_for(_body(request, service), service.limits.seconds)
        asked = parse_request(body)
        if asked.model not in (None, service.name):
            raise RequestRefused(404, f"model: this server has {service.name} only")
        tasks = service.tasks(asked)
    except ValueError as error:  # InputError is one
        raise RequestRefused(400, str(error)) from error
    except asyncio.TimeoutError as error:
        raise RequestRefused(408, "the body did not arrive in time") from error
    except ClientDisconnect as error:
        raise RequestRefused(*GONE) from error
    images = _images(request, service, tasks)
    if not asked.stream:
        async with aclosing(images):
            finished = [image async for image in images if image.rows == service.engine.gpt.grid[0]]
        return JSONResponse(await asyncio.to_thread(_whole, service, tasks, finished))
    # Before the first image is there, a refusal still has its own status.
    first = await anext(images)
    return StreamingResponse(_events(service, tasks, first, images), media_type="text/event-stream")


async def _body(request: Request, service: ImageService) -> bytes:
    """The body of a request, read no further than the limit."""
    body, limit = bytearray(), service.limits.body_bytes
    async for chunk in request.stream():
        body += chunk
        if len(body) > limit:
            raise RequestRefused(413, f"the body is larger than {limit} bytes")
    return bytes(body)


async def _images(
    request: Request, service: ImageService, tasks: Sequence[ImageTask]
) -> AsyncGenerator[ImageProgress, None]:
    """The service's images while the client is there; its errors as answers."""
    gone = asyncio.ensure_future(_disconnected(request))
    try:
        async with aclosing(service.images(tasks)) as images:
            while True:
                step = asyncio.ensure_future(anext(images, None))
                try:
                    await asyncio.wait({gone, step}, return_when=asyncio.FIRST_COMPLETED)
                    if not step.done():
                        raise RequestRefused(*GONE)
                    image = step.result()
                finally:
                    step.cancel()
                    await asyncio.gather(step, return_exceptions=True)
                if image is None:
                    return
                yield image
    except QueueFullError as error:
        message = f"more than {service.limits.queue} images would wait; try again later"
        raise RequestRefused(429, message, RETRY_AFTER) from error
    except EngineStoppingError as error:
        raise RequestRefused(503, "the server is being stopped", RETRY_AFTER) from error
    except asyncio.TimeoutError as error:
        message = f"the request took longer than {service.limits.seconds:g} s"
        raise RequestRefused(504, message) from error
    finally:
        gone.cancel()


async def _disconnected(request: Request) -> None:
    """Wait until the client goes away; its whole body has been read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _whole(
    service: ImageService, tasks: Sequence[ImageTask], images: Sequence[ImageProgress]
) -> dict[str, Any]:
    """OpenAI's ImagesResponse, with the seed as a further field."""
    return {
        "created": int(time.time()),
        "background": "opaque",
        "output_format": "png",
        "size": service.size,
        "seed": tasks[0].sampling.seed,
        "data": [
            {"b64_json": png_base64(image.pixels)}
            for image in sorted(images, key=lambda image: image.index)
        ],
        "usage": usage(service.engine.gpt.num_codes, len(tasks)),
    }


async def _events(
    service: ImageService,
    tasks: Sequence[ImageTask],
    first: ImageProgress,
    images: AsyncGenerator[ImageProgress, None],
) -> AsyncIterator[str]:
    """Server-sent events of OpenAI's image stream; image_index and rows are ours."""
    gpt = service.engine.gpt

    async def event(image: ImageProgress) -> str:
        is_final = image.rows == gpt.grid[0]
        rows = tasks[image.index].preview_rows
        extra = (
            {"usage": usage(gpt.num_codes, 1)}
            if is_final
            else {"partial_image_index": rows.index(image.rows)}
        )
        values = stream_event(
            "completed" if is_final else "partial_image",
            b64_json=await asyncio.to_thread(png_base64, image.pixels),
            created_at=int(time.time()),
            size=service.size,
            seed=tasks[image.index].sampling.seed,
            image_index=image.index,
            rows=image.rows,
            **extra,
        )
        return f"event: {values['type']}\ndata: {json.dumps(values)}\n\n"

    async with aclosing(images):
        try:
            yield await event(first)
            async for image in images:
                yield await event(image)
        except RequestRefused as error:  # too late for a status of its own
            yield f"event: error\ndata: {json.dumps(error.body)}\n\n"


class DrainingServer(uvicorn.Server):
    """On SIGTERM or SIGINT, finish what runs, refuse the rest with 503, then exit with code 0.

    A second signal stops at once, as uvicorn does.
    """

    def __init__(self, config: uvicorn.Config, service: ImageService) -> None:
        super().__init__(config)
        self.service, self.stopping = service, False

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Called in the signal's handler."""
        if self.stopping:
            super().handle_exit(signal.SIGINT, frame)
        self.stopping = True

    async def on_tick(self, counter: int) -> bool:
        """Called ten times a second in the event loop."""
        if self.stopping and not self.service.draining:
            self.service.drain()
        if self.service.draining and not self.service.pending:
            self.should_exit = True
        return await super().on_tick(counter)
