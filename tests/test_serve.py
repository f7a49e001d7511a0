"""`visiontok serve`: the answers of `visiontok eval` behind OpenAI's interface; queue, limits, errors."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import json
import re
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from visiontok.demo import scene
from visiontok.eval.request import asked_recipe, conversation, cut
from visiontok.eval.runner import Block, answer
from visiontok.eval.task import find

from visiontok import cli, compress, recipe
from visiontok.errors import ConfigError
from visiontok.named import Loaded, load_model

pytest.importorskip("fastapi", reason="the extra `serve` is not installed")
import httpx2
import uvicorn
from fastapi.testclient import TestClient
from visiontok.eval import serve
from visiontok.eval.chat import Limits
from visiontok.eval.serve import make_app, serve_job

DEFAULT = recipe("divprune", keep=0.25)
FASTV = recipe("fastv", keep=0.1, layer=1)
LIMITS = Limits(queue=2, body=200_000, images=3, pixels=40_000, tokens=1800, seconds=60)


@pytest.fixture(scope="module")
def tiny() -> Loaded:
    return load_model("tiny", torch.device("cpu"))


@pytest.fixture(scope="module")
def client(tiny: Loaded) -> TestClient:
    return TestClient(make_app(tiny, DEFAULT, LIMITS), raise_server_exceptions=False)


def url(picture: Image.Image, kind: str = "png") -> str:
    file = io.BytesIO()
    picture.save(file, kind)
    return f"data:image/{kind};base64," + base64.b64encode(file.getvalue()).decode()


def shown(*addresses: str) -> list[dict[str, Any]]:
    return [{"type": "image_url", "image_url": {"url": address}} for address in addresses]


def question(text: str, *addresses: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [*shown(*addresses), {"type": "text", "text": text}]}]


PICTURE, [FIRST, *_] = scene(3)
ASKED = question(FIRST.text, url(PICTURE))


def ask(client: Any, **body: Any) -> Any:
    return client.post("/v1/chat/completions", json={"messages": ASKED} | body)


# -------------------------------------------------------------------------------------------------------------- answers


@pytest.mark.parametrize(
    ("given", "attached"),
    [
        (None, DEFAULT),
        ({"method": "full"}, None),
        ({"method": "fastv", "keep": 0.1, "options": {"layer": 1}}, FASTV),
        (FASTV.to_dict(), FASTV),
    ],
    ids=["default", "full", "method", "recipe"],
)
def test_answers_are_those_of_the_runner(tiny: Loaded, client: TestClient, given: Any, attached: Any) -> None:
    items = [*find("scenes").items(None, "llava", 2), *find("scenes-pairs").items(None, "llava", 1)]
    for item in items:
        with contextlib.nullcontext() if attached is None else compress(tiny.model, attached) as compression:
            (expected,) = answer(Block(tiny, [item]), compression, 5)
        pictures = [url(image.open()) for image in item.images]
        found = ask(client, messages=question(item.prompt, *pictures), max_tokens=5, visiontok=given).json()
        (choice,) = found["choices"]
        assert choice["message"] == {"role": "assistant", "content": expected.text}
        assert choice["finish_reason"] == "stop"
        kept = expected.kept or [144 * len(item.images)] * 4
        usage = found["usage"]
        assert (
            usage["prompt_tokens"] == tiny.inputs(([i.open() for i in item.images], item.prompt))["input_ids"].numel()
        )
        assert usage["completion_tokens"] == expected.tokens
        assert usage["prompt_tokens_details"] == {
            "visual_tokens_in": 144 * len(item.images),
            "visual_tokens_out": sum(kept) / len(kept),
        }
        assert found["visiontok"]["visual_tokens_per_layer"] == (expected.kept and list(expected.kept))


def test_what_vlmevalkit_sends(client: TestClient) -> None:
    """Its LMDeployAPI: the model's name from /v1/models, a key, parts in the order of the benchmark, extra fields."""
    (served,) = client.get("/v1/models").json()["data"]
    picture = {"url": url(PICTURE, "jpeg"), "detail": "low", "max_dynamic_patch": 6}
    content = [{"type": "text", "text": FIRST.text}, {"type": "image_url", "image_url": picture}]
    system = {"role": "system", "content": "answer in one word."}
    sent = {"model": served["id"], "messages": [system, {"role": "user", "content": content}]}
    terms = {"max_tokens": 1024, "n": 1, "temperature": 0.0, "dataset": "MMBench_DEV_EN"}
    headers = {"Content-Type": "application/json", "Authorization": "Bearer sk-123456"}
    found = client.post("/v1/chat/completions", headers=headers, content=json.dumps(sent | terms))
    assert found.status_code == 200
    assert found.json()["choices"][0]["message"]["content"].strip()


def test_a_conversation_reaches_the_model_as_it_was_said(tiny: Loaded, client: TestClient) -> None:
    words = [("system", "be brief."), ("user", FIRST.text), ("assistant", FIRST.answer), ("user", "is there a star?")]
    turns = [{"role": role, "content": [{"type": "text", "text": text}]} for role, text in words]
    for place, after in ((1, 0), (3, 1)):  # before the first question and behind the second
        turns[place]["content"].insert(after, {"type": "image", "image": PICTURE})
    inputs = tiny.processor.apply_chat_template(
        turns, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    ids = tiny.model.generate(**inputs, max_new_tokens=5, do_sample=False)[0, inputs["input_ids"].numel() :]
    for turn in turns:
        turn["content"] = [shown(url(PICTURE))[0] if part["type"] == "image" else part for part in turn["content"]]
    found = ask(client, messages=turns, max_tokens=5, visiontok={"method": "full"}).json()
    assert found["choices"][0]["message"]["content"] == tiny.processor.tokenizer.decode(ids, skip_special_tokens=True)
    assert found["usage"]["prompt_tokens"] == inputs["input_ids"].numel()


def test_no_picture_is_needed(client: TestClient) -> None:
    found = ask(client, messages=[{"role": "user", "content": "is there a star?"}]).json()
    assert found["usage"]["prompt_tokens_details"] == {"visual_tokens_in": 0, "visual_tokens_out": 0}


def test_stops_and_lengths(client: TestClient) -> None:
    whole, short = (ask(client, **terms).json()["choices"][0] for terms in ({"max_tokens": 2}, {"max_tokens": 1}))
    assert [whole["finish_reason"], short["finish_reason"]] == ["stop", "length"]
    text = whole["message"]["content"]
    assert ask(client, stop=[text[-1]]).json()["choices"][0]["message"]["content"] == text[:-1]


def test_a_question_behind_its_pictures_is_one_of_tasks() -> None:
    pictures = [SimpleNamespace(name=name, open=lambda: PICTURE) for name in "ab"]
    assert conversation([("user", [*pictures, "what?"])]) == (tuple(pictures), "what?")
    images, prompt = conversation([("system", ["be brief"]), ("user", [pictures[0], "this", pictures[1]])])
    assert images == tuple(pictures)
    assert [[part["type"] for part in turn["content"]] for turn in prompt] == [["text"], ["image", "text", "image"]]
    assert cut("one two three", ["three", "two"]) == "one "
    assert cut("one", []) == cut("one", ["x"]) == "one"


# ------------------------------------------------------------------------------------------------------------- refusals


def with_picture(address: str) -> dict[str, Any]:
    return {"messages": question("what?", address)}


BROKEN = "data:image/png;base64," + base64.b64encode(b"no picture at all").decode()
REFUSED: dict[str, tuple[dict[str, Any], int, str]] = {
    "no messages": ({"messages": None}, 400, "messages"),
    "empty messages": ({"messages": []}, 400, "messages=[]"),
    "nothing said": ({"messages": [{"role": "user", "content": ""}]}, 400, "messages: are empty"),
    "role": ({"messages": [{"role": "tool", "content": "x"}]}, 400, "messages.0.role='tool'"),
    "content": ({"messages": [{"role": "user", "content": 3}]}, 400, "messages.0.content=3"),
    "video": ({"messages": [{"role": "user", "content": [{"type": "video_url"}]}]}, 400, "messages.0.content.0="),
    "address": (with_picture("https://example.org/a.png"), 400, "nothing is fetched from anywhere"),
    "file": (with_picture("/etc/passwd"), 400, "nothing is fetched from anywhere"),
    "base64": (with_picture("data:image/png;base64,a$b"), 400, "picture 1: its base64 is broken"),
    "format": (with_picture(BROKEN), 400, "picture 1: the image (17 bytes) is in no image format"),
    "truncated": (with_picture(url(PICTURE)[:2022]), 400, "picture 1: the image"),
    "pixels": (with_picture(url(Image.new("RGB", (201, 200)))), 400, "has 40200 pixels, the limit is 40000"),
    "pictures": ({"messages": question("what?", *[url(PICTURE)] * 4)}, 400, "more than 3 pictures"),
    "model": ({"model": "gpt-4o"}, 404, "model='gpt-4o': this server has 'tiny'"),
    "temperature": ({"temperature": 0.7}, 400, "temperature=0.7: must be 0 or be left out, for decoding is greedy"),
    "stream": ({"stream": True}, 400, "stream=True"),
    "several": ({"n": 2}, 400, "n=2"),
    "unknown": ({"min_p": 0.1}, 400, "min_p=0.1: Extra inputs are not permitted"),
    "long": ({"max_tokens": 1801}, 400, "max_tokens=1801: the limit is 1800"),
    "no tokens": ({"max_tokens": 0}, 400, "max_tokens=0"),
    "method": ({"visiontok": {"method": "divprun"}}, 400, "divprun"),
    "code": ({"visiontok": {"method": "evil.py:f"}}, 400, "evil.py:f"),
    "recipe's file": ({"visiontok": {"recipe": "recipe.json"}}, 400, "recipe='recipe.json': is no JSON"),
    "weights": ({"visiontok": {"method": "urag", "options": {"head": "/etc/passwd"}}}, 400, "urag would load this"),
    "weights in a recipe": (
        {"visiontok": {"stages": [{"kind": "cut", "method": "urag", "options": {"head": "/etc/passwd"}}]}},
        400,
        "urag would load this",
    ),
    "calibration": ({"visiontok": {"recipe": {"calibration": "vtw"}}}, 400, "recipe: is a calibration"),
    "layer": ({"visiontok": {"method": "fastv", "options": {"layer": 99}}}, 400, "99"),
    "no method": ({"visiontok": {"keep": 0.5}}, 400, "method: is missing"),
    "key": ({"visiontok": {"method": "full", "kep": 0.5}}, 400, "kep=0.5: there is no such key"),
}


def refusal(response: Any) -> str:
    """The message of an error in OpenAI's format."""
    (error,) = response.json().values()
    assert set(error) == {"message", "type", "param", "code"}
    assert "Traceback" not in error["message"]
    return error["message"]


@pytest.mark.parametrize(("body", "status", "said"), REFUSED.values(), ids=REFUSED)
def test_what_is_wrong_is_named(client: TestClient, body: dict[str, Any], status: int, said: str) -> None:
    response = ask(client, **body)
    assert said in refusal(response)
    assert response.status_code == status


def test_other_errors_have_the_same_format(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "body" in refusal(client.post("/v1/chat/completions", content=b"{"))
    assert refusal(client.get("/v1/completions"))
    assert refusal(client.get("/v1/chat/completions"))

    def fails(*_: Any, **__: Any) -> None:
        raise RuntimeError("a secret")

    monkeypatch.setattr(serve, "answer", fails)
    response = ask(client)
    assert response.status_code == 500
    assert "secret" not in refusal(response)
    assert client.get("/health").json() == {"status": "ok", "waiting": 0}


def test_large_bodies_are_not_read(client: TestClient) -> None:
    def chunks() -> Iterator[bytes]:  # without a length that would tell
        for _ in range(100):
            yield b" " * 4096

    for content in (b" " * 200_001, chunks()):
        response = client.post("/v1/chat/completions", content=content)
        assert response.status_code == 413
        assert "200000 bytes" in refusal(response)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"method": "full"}, None),
        ({"method": "divprune"}, DEFAULT),
        ({"method": "divprune", "keep": "36"}, recipe("divprune", keep=36)),
        ({"method": "fastv", "keep": 0.1, "options": '{"layer": 1}'}, FASTV),
        ({"method": "random", "keep": 4, "seed": 7}, recipe("random", keep=4, seed=7)),
        ({"recipe": FASTV.to_dict()}, FASTV),
        ({"recipe": json.dumps(FASTV.to_dict())}, FASTV),
    ],
)
def test_recipes_by_name_and_in_full(given: dict[str, Any], expected: Any) -> None:
    assert asked_recipe(given, files=False) == asked_recipe(given, files=True) == expected


# ------------------------------------------------------------------------------------------ queue, time, disconnections


def test_requests_wait_in_line_and_no_longer_than_the_line(tiny: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    opened, at_once, most = threading.Event(), [0], [0]

    def gated(*arguments: Any, **more: Any) -> Any:
        at_once[0] += 1
        most[0] = max(most[0], at_once[0])
        assert opened.wait(30)
        found = answer(*arguments, **more)
        at_once[0] -= 1
        return found

    monkeypatch.setattr(serve, "answer", gated)

    async def three() -> tuple[list[Any], Any]:
        transport = httpx2.ASGITransport(make_app(tiny, None, LIMITS))
        async with httpx2.AsyncClient(transport=transport, base_url="http://test") as client:
            body = {"messages": ASKED}
            two = [asyncio.ensure_future(client.post("/v1/chat/completions", json=body)) for _ in range(2)]
            while (await client.get("/health")).json()["waiting"] < 2:
                await asyncio.sleep(0.01)
            third = await client.post("/v1/chat/completions", json=body)
            opened.set()
            return await asyncio.gather(*two), third

    served, third = asyncio.run(three())
    assert [one.status_code for one in served] == [200, 200]
    assert most == [1]
    assert third.status_code == 503
    assert third.headers["retry-after"] == "1"
    assert "2 requests are waiting" in refusal(third)


@pytest.fixture
def endless(tiny: Loaded, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[float]]:
    """The model never ends an answer; when it was called."""
    monkeypatch.setattr(tiny.model.generation_config, "eos_token_id", None)
    calls: list[float] = []
    hook = tiny.model.register_forward_hook(lambda *_: calls.append(time.monotonic()))
    yield calls
    hook.remove()


def test_an_answer_that_takes_too_long_is_given_up(tiny: Loaded, endless: list[float]) -> None:
    client = TestClient(make_app(tiny, None, Limits(tokens=1800, seconds=0.2)))
    response = ask(client)
    assert response.status_code == 504
    assert "more than 0.2 s" in refusal(response)
    assert len(endless) < 1800


@pytest.fixture
def listening(tiny: Loaded) -> Iterator[int]:
    """The port of a real server."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = uvicorn.Server(uvicorn.Config(make_app(tiny, DEFAULT, LIMITS), log_level="error"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        yield listener.getsockname()[1]
        server.should_exit = True
        thread.join()


def test_nobody_is_answered_who_has_left(tiny: Loaded, listening: int, endless: list[float]) -> None:
    body = json.dumps({"messages": ASKED}).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    with httpx2.Client(base_url=f"http://127.0.0.1:{listening}") as client:
        for _ in range(2):  # the second leaves while it waits
            with (
                socket.create_connection(("127.0.0.1", listening)) as one,
                socket.create_connection(("127.0.0.1", listening)) as other,
            ):
                one.sendall(head + body)
                other.sendall(head + body)
                wait_for(lambda: client.get("/health").json()["waiting"] == 2 and bool(endless))
            wait_for(lambda: client.get("/health").json()["waiting"] == 0)
        with socket.create_connection(("127.0.0.1", listening)) as one:
            one.sendall(head + body[:100])
            wait_for(lambda: client.get("/health").json()["waiting"] == 1)
        wait_for(lambda: client.get("/health").json()["waiting"] == 0)
        number = len(endless)
        assert number < 1800
        time.sleep(0.1)
        assert len(endless) == number
        tiny.model.generation_config.eos_token_id = 2
        assert ask(client).json()["choices"][0]["finish_reason"] == "stop"


def wait_for(condition: Callable[[], bool], seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


# ----------------------------------------------------------------------------------------------------- the command line


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., SimpleNamespace]:
    """Runs `visiontok serve ARGUMENTS` in this process, up to where requests would be accepted."""
    monkeypatch.setattr(uvicorn.Server, "run", lambda self, sockets: print(len(sockets), self.config.app.title))

    def command(*arguments: str) -> SimpleNamespace:
        monkeypatch.setattr(sys, "argv", ["visiontok", "serve", *arguments])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        streams = capsys.readouterr()
        return SimpleNamespace(code=stop.value.code, out=streams.out, err=streams.err)

    return command


def test_the_command_says_where_it_listens(call: Callable[..., SimpleNamespace]) -> None:
    done = call("--method", "divprune", "--port", "0", "--device", "cpu")
    assert re.search(r"tiny on http://127\.0\.0\.1:\d+/v1, divprune by default\n1 visiontok serve", done.out), done.err
    assert done.code == 0


def test_what_is_wrong_is_said_before_the_model_is_loaded(
    call: Callable[..., SimpleNamespace], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serve, "load_model", lambda *_: pytest.fail("the model was loaded first"))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        for arguments, said in [
            (("--method", "divprun"), "divprun"),
            (("--method", "full", "--keep", "0.5"), "keep='0.5': the stock model has none"),
            (("--queue", "0"), "queue=0: a limit is a number above 0"),
            (("--port", port), f"--port {port}: cannot be listened on"),
            (("--device", "abacus"), "--device 'abacus'"),
        ]:
            done = call(*arguments)
            assert done.code == 2
            assert said in done.err
    for module in ("visiontok.eval.serve", "visiontok.eval.chat"):
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "fastapi", None)
    assert "fastapi is not installed; run `pip install visiontok[serve]`" in call().err


def test_a_recipe_that_does_not_fit_the_model_is_said_at_once() -> None:
    with pytest.raises(ConfigError, match="99"):
        serve_job(
            "tiny", "cpu", {"method": "fastv", "options": {"layer": 99}}, "127.0.0.1", 0, LIMITS, lambda text: None
        )
