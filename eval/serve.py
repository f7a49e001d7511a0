"""``visiontok serve``: a model behind the part of OpenAI's chat interface that evaluation harnesses use.

One process, one model, one queue: requests are answered one after the other, each with its own recipe if it names one.
Nobody has to identify himself and nothing is encrypted, so it listens on the loopback interface unless told otherwise.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import statistics
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
import transformers
import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from visiontok.api import compress
from visiontok.errors import ConfigError, VisiontokError
from visiontok.named import Loaded, find_device, load_model, quiet
from visiontok.recipe import Recipe

from .chat import Asked, Limits, read, read_body, refusal, turns_of
from .items import Item
from .request import asked_recipe, conversation, cut
from .runner import FULL, Block, answer

GONE = 499  # the customary status where nobody is left to be told one


class Stop(transformers.StoppingCriteria):
    """Ends an answer when nobody waits for it any more, or when it has taken too long."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self.gone, self.late, self.last = seconds, threading.Event(), False, -1

    def start(self) -> None:
        self.deadline = time.monotonic() + self.seconds

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **kwargs: Any) -> torch.BoolTensor:
        self.last, self.late = int(input_ids[0, -1]), time.monotonic() > self.deadline
        return torch.full((len(input_ids),), self.gone.is_set() or self.late, device=input_ids.device)  # type: ignore[return-value]


@dataclass(frozen=True)
class Job:
    """A request that has been read.

    Attributes:
        item: pictures and conversation.
        recipe: None for the stock model.
        longest: answer, in tokens.
        stops: texts before which it ends.
        stop: ends it early.
    """

    item: Item
    recipe: Recipe | None
    longest: int
    stops: list[str]
    stop: Stop

    def run(self, loaded: Loaded) -> dict[str, Any]:
        """The answer in OpenAI's format, and under "visiontok" what the recipe did."""
        self.stop.start()
        attach = contextlib.nullcontext() if self.recipe is None else compress(loaded.model, self.recipe)
        with quiet(), attach as compression, torch.inference_mode():
            stopping = transformers.StoppingCriteriaList([self.stop])
            (found,) = answer(Block(loaded, [self.item]), compression, self.longest, stopping)
        if found.error is not None:
            raise ConfigError(found.error)
        if self.stop.late:
            raise TimeoutError
        text = cut(found.text, self.stops)
        ends = loaded.model.generation_config.eos_token_id
        ended = self.stop.last in (ends if isinstance(ends, list) else [ends]) or text != found.text
        left = found.visual if found.kept is None else statistics.fmean(found.kept)
        return {
            "choices": [
                {
                    "index": 0,
                    "message": {"role": "assistant", "content": text},
                    "finish_reason": "stop" if ended else "length",
                }
            ],
            "usage": {
                "prompt_tokens": found.prompt,
                "completion_tokens": found.tokens,
                "total_tokens": found.prompt + found.tokens,
                "prompt_tokens_details": {"visual_tokens_in": found.visual, "visual_tokens_out": left},
            },
            "visiontok": {
                "recipe": _label(self.recipe),
                "visual_tokens_per_layer": found.kept,
                "warnings": found.warnings,
                "seconds": found.seconds,
            },
        }


class Queue:
    """Answers jobs one after the other."""

    def __init__(self, loaded: Loaded, most: int) -> None:
        self.loaded, self.most, self.length = loaded, most, 0
        self.worker = ThreadPoolExecutor(1, thread_name_prefix="visiontok")

    @contextlib.contextmanager
    def place(self) -> Iterator[None]:
        """A place in the queue; taken before a request is read, so that the memory for requests is bounded, too."""
        if self.length >= self.most:
            wait = {"Retry-After": "1"}
            raise refusal(503, f"{self.length} requests are waiting already; come again in a second", **wait)
        self.length += 1
        try:
            yield
        finally:
            self.length -= 1

    async def answer(self, job: Job, gone: Callable[[], Any]) -> dict[str, Any] | None:
        """The answer; None if the client has left, which ``gone()`` waits for."""
        submitted = self.worker.submit(job.run, self.loaded)
        running, left = asyncio.wrap_future(submitted), asyncio.ensure_future(gone())
        try:
            await asyncio.wait({running, left}, return_when=asyncio.FIRST_COMPLETED)
            if running.done():
                return running.result()
            job.stop.gone.set()
            if not submitted.cancel():  # its turn has come: it ends with the next token
                await asyncio.gather(running, return_exceptions=True)
            return None
        finally:
            job.stop.gone.set()
            left.cancel()


def make_app(loaded: Loaded, recipe: Recipe | None, limits: Limits) -> FastAPI:
    """The server.

    Args:
        loaded: model and processor.
        recipe: of requests that name none; None for the stock model.
        limits: of every request.
    """
    app = FastAPI(title="visiontok serve", openapi_url=None)
    queue = Queue(loaded, limits.queue)

    @app.exception_handler(HTTPException)
    async def refuse(request: Request, error: Any) -> Response:
        kind = "invalid_request_error" if error.status_code < 500 else "server_error"
        return _error(error.status_code, str(error.detail), kind, error.headers)

    @app.exception_handler(ClientDisconnect)
    async def forget(request: Request, error: ClientDisconnect) -> Response:
        return Response(status_code=GONE)

    @app.exception_handler(Exception)
    async def fail(request: Request, error: Exception) -> Response:
        return _error(500, "the server failed; its log says why", "server_error")

    @app.get("/health")
    async def health() -> Any:
        return {"status": "ok", "waiting": queue.length}

    @app.get("/v1/models")
    async def models() -> Any:
        return {"object": "list", "data": [{"id": loaded.name, "object": "model", "owned_by": "visiontok"}]}

    @app.post("/v1/chat/completions")
    async def complete(request: Request) -> Response:
        try:
            with queue.place():
                asked = read(await read_body(request, limits.body))
                found = await queue.answer(_job(loaded, asked, recipe, limits), request.receive)
        except VisiontokError as error:
            raise refusal(400, str(error)) from error
        except TimeoutError as error:
            raise refusal(504, f"the answer took more than {limits.seconds:g} s; ask for a shorter one") from error
        except torch.OutOfMemoryError as error:
            raise refusal(503, "the device has not enough memory for this request; send fewer pictures") from error
        if found is None:
            return Response(status_code=GONE)
        head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "object": "chat.completion", "created": int(time.time())}
        return JSONResponse({**head, "model": loaded.name, **found})

    return app


def _job(loaded: Loaded, asked: Asked, recipe: Recipe | None, limits: Limits) -> Job:
    """What a request asks for, within the limits; with its own recipe, or else the one that is given."""
    if asked.model not in (None, loaded.name):
        raise refusal(404, f"model={asked.model!r}: this server has {loaded.name!r}")
    longest = asked.max_completion_tokens or asked.max_tokens or limits.tokens
    if longest > limits.tokens:
        raise refusal(400, f"max_tokens={longest}: the limit is {limits.tokens}; ask for less")
    if (given := asked.visiontok) is not None:
        recipe = asked_recipe({"recipe": given} if "stages" in given else given, files=False)
    images, prompt = conversation(turns_of(asked, limits))
    item = Item("request", images, prompt, target={}, cluster="request", groups={})
    stops = [asked.stop] if isinstance(asked.stop, str) else asked.stop or []
    return Job(item, recipe, longest, stops, Stop(limits.seconds))


def _error(status: int, message: str, kind: str, headers: Mapping[str, str] | None = None) -> Response:
    content = {"error": {"message": message, "type": kind, "param": None, "code": None}}
    return JSONResponse(content, status, dict(headers or {}))


def serve_job(
    model: str, device: str, given: Mapping[str, Any], host: str, port: int, limits: Limits, say: Callable[[str], None]
) -> None:
    """Load the model and serve it until interrupted.

    Args:
        model: as for ``visiontok run``.
        device: the same.
        given: the recipe of requests that name none, as for :func:`visiontok.eval.request.asked_recipe`.
        host: interface to listen on.
        port: 0 for any that is free.
        limits: of every request.
        say: gets the address, once requests are accepted.

    Raises:
        ConfigError: for any argument that is wrong, or a port that is taken.
        UnsupportedError: if the model cannot do what the recipe asks.
    """
    recipe, place = asked_recipe(given, files=True), find_device(device)
    try:
        listener = socket.create_server((host, port))
    except (OSError, OverflowError) as error:
        raise ConfigError(f"--host {host} --port {port}: cannot be listened on ({error}); choose another") from error
    with listener:
        with quiet():
            loaded = load_model(model, place)
        if recipe is not None:
            compress(loaded.model, recipe).remove()  # what the model has against it is said now
        app = make_app(loaded, recipe, limits)
        config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=5, server_header=False)
        say(f"visiontok: {loaded.name} on http://{host}:{listener.getsockname()[1]}/v1, {_label(recipe)} by default")
        uvicorn.Server(config).run(sockets=[listener])


def _label(recipe: Recipe | None) -> str:
    return FULL if recipe is None else recipe.label
