"""Chat requests in OpenAI's format: read, checked and bounded before anything is computed."""

from __future__ import annotations

import base64
import binascii
import contextlib
import io
import warnings
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import PIL.Image
from fastapi import HTTPException, Request
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from visiontok.errors import ConfigError

from .items import Image
from .request import Given, Turn


@dataclass(frozen=True)
class Limits:
    """What a request may cost.

    Attributes:
        queue: requests that wait or are answered; more are told to come again.
        body: bytes of a request.
        images: pictures in a request.
        pixels: of a picture.
        tokens: longest answer, and that of requests that name none.
        seconds: for an answer, from its turn on; looked at after every token.
    """

    queue: int = 64
    body: int = 64 << 20
    images: int = 16
    pixels: int = 50_000_000
    tokens: int = 2048
    seconds: float = 300.0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not value > 0:
                raise ConfigError(f"{name}={value!r}: a limit is a number above 0")


def _only(value: Any, why: str) -> AfterValidator:
    """Accepts nothing but ``value``, which is what the server does anyway."""

    def check(given: Any) -> Any:
        if given not in (None, value):
            raise ValueError(f"must be {value!r} or be left out, for {why}")
        return given

    return AfterValidator(check)


class Text(BaseModel):
    type: Literal["text"]
    text: str


class Url(BaseModel):  # what clients add ("detail", "max_dynamic_patch") says how others should resize
    url: str


class Picture(BaseModel):
    type: Literal["image_url"]
    image_url: Url


class Message(BaseModel):
    role: Literal["system", "user", "assistant"]
    content: str | list[Annotated[Text | Picture, Field(discriminator="type")]]


class Asked(BaseModel):
    """A request. What would change the answer elsewhere but cannot here is refused, and so is what is unknown."""

    model_config = ConfigDict(extra="forbid")

    messages: Annotated[list[Message], Field(min_length=1)]
    model: str | None = None
    visiontok: dict[str, Any] | None = None
    max_tokens: Annotated[int | None, Field(ge=1)] = None
    max_completion_tokens: Annotated[int | None, Field(ge=1)] = None
    stop: str | list[str] | None = None
    stream: Annotated[bool | None, _only(False, "answers are sent whole")] = None
    temperature: Annotated[float | None, _only(0, "decoding is greedy")] = None
    n: Annotated[int | None, _only(1, "decoding is greedy")] = None
    presence_penalty: Annotated[float | None, _only(0, "decoding is greedy")] = None
    frequency_penalty: Annotated[float | None, _only(0, "decoding is greedy")] = None
    logprobs: Annotated[bool | None, _only(False, "answers are words")] = None
    response_format: Annotated[dict[str, Any] | None, _only({"type": "text"}, "answers are words")] = None
    # Without effect on greedy decoding, or on anything. VLMEvalKit says which data set it asks about.
    top_p: float | None = None
    seed: int | None = None
    user: str | None = None
    dataset: str | None = None


def refusal(status: int, message: str, **headers: str) -> HTTPException:
    """An answer to a request that gets none."""
    return HTTPException(status, " ".join(message.split()), headers or None)


async def read_body(request: Request, limit: int) -> bytes:
    """The body, of which no more than the limit is ever held."""
    too_large = refusal(413, f"the request has more than {limit} bytes; send fewer or smaller pictures")
    announced = request.headers.get("content-length", "")
    if announced.isdecimal() and int(announced) > limit:
        raise too_large
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > limit:
            raise too_large
    return bytes(body)


def read(body: bytes) -> Asked:
    """The request in a body, or a refusal that names the first thing that is wrong with it."""
    try:
        return Asked.model_validate_json(body)
    except ValidationError as error:
        # Of the alternatives that a value could have been, the one that fits best fails deepest.
        worst = max(error.errors(include_url=False), key=lambda one: len(one["loc"]))
        # Pydantic names the alternative, too: "str", "list[...]".
        place = ".".join(name for one in worst["loc"] if "[" not in (name := str(one)) and name != "str") or "body"
        value = "" if worst["type"] in ("missing", "json_invalid") else f"={worst['input']!r:.80}"
        raise refusal(400, f"{place}{value}: {worst['msg'].removeprefix('Value error, ')}") from error


def turns_of(asked: Asked, limits: Limits) -> list[Turn]:
    """Who says what, with pictures that are decoded when it is their turn."""
    turns: list[Turn] = []
    number = 0
    for message in asked.messages:
        parts: list[str | Image] = []
        for part in [message.content] if isinstance(message.content, str) else message.content:
            if isinstance(part, Picture):
                number += 1
                if number > limits.images:
                    raise refusal(400, f"there are more than {limits.images} pictures; send fewer")
                parts.append(_picture(f"picture {number}", part.image_url.url, limits.pixels))
            else:
                parts.append(part if isinstance(part, str) else part.text)
        turns.append((message.role, parts))
    if not any(part for _, parts in turns for part in parts):
        raise refusal(400, "messages: are empty; ask something")
    return turns


def _picture(name: str, url: str, limit: int) -> Given:
    kind, comma, text = url.partition(",")
    if not kind.startswith("data:image/") or not kind.endswith(";base64") or not comma:
        raise refusal(
            400, f"{name}: {url[:40]!r} is no picture; nothing is fetched from anywhere: send data:image/png;base64,..."
        )
    try:
        data = base64.b64decode(text, validate=True)
    except binascii.Error as error:
        raise refusal(400, f"{name}: its base64 is broken ({error})") from error
    pixels = 0
    # Only the header is read here. What cannot be opened is said when it is its turn, in the words of `visiontok run`.
    with contextlib.suppress(Exception), warnings.catch_warnings():
        warnings.simplefilter("ignore", PIL.Image.DecompressionBombWarning)
        with PIL.Image.open(io.BytesIO(data)) as image:
            pixels = image.width * image.height
    if pixels > limit:
        raise refusal(400, f"{name}: has {pixels} pixels, the limit is {limit}; scale it down")
    return Given(name, data)
