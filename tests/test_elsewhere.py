"""Results that another replica has, without any machinery between: replicas that call one another."""

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

pytest.importorskip("fastapi", reason="the extra serve")

from fastapi import FastAPI
from fastapi import Request as HttpRequest
from starlette.responses import Response
from starlette.types import Message, Scope

from ddpm_deploy import Request
from ddpm_deploy.errors import BackendError
from ddpm_deploy.serve import Batcher
from ddpm_deploy.serve.elsewhere import (
    ElsewhereError,
    Moved,
    NamedResults,
    PassedOn,
    maker_of,
    messages_of,
)
from ddpm_deploy.serve.handle import Handle
from ddpm_deploy.serve.http import app_of
from ddpm_deploy.serve.service import Service
from ddpm_deploy.serve.settings import Settings
from tests.models import ArrayNetwork, tiny_spec

BODY = Request(count=2, steps=4, seed=5)
IMAGES = np.full((2, 1, 8, 8), 0.5, np.float32)


@dataclass
class Replica:
    """One, and how it reaches the others. going: those that are asked no more, and have not ended."""

    name: str
    app: FastAPI
    results: NamedResults
    others: "dict[str, Replica]" = field(default_factory=dict)
    going: set[str] = field(default_factory=set)

    async def ask(self, replica: str, id: str, scope: Scope) -> AsyncIterator[Message]:
        other = self.others.get(replica)
        if other and (other.results.has(id) or maker_of(id) == replica):
            async for message in messages_of(other.app, scope):
                yield message

    async def holder(self, id: str) -> str | None:
        return next((name for name, other in self.others.items() if other.results.has(id)), None)

    async def lives(self, replica: str) -> bool:
        return replica in self.going

    async def get(self, id: str, method: str = "GET", rest: str = "") -> tuple[int, bytes]:
        scope = {"type": "http", "method": method, "path": f"/v1/samples/{id}{rest}", "query_string": b""}
        scope |= {"root_path": "", "http_version": "1.1", "scheme": "http", "headers": [(b"host", b"x")]}
        messages = [message async for message in messages_of(self.app, scope)]
        return messages[0]["status"], b"".join(message.get("body", b"") for message in messages[1:])


@contextmanager
def replicas(*names: str) -> Iterator[list[Replica]]:
    with Batcher(ArrayNetwork(tiny_spec(), 4)) as batcher:
        made = [replica(name, batcher) for name in names]
        for each in made:
            each.others |= {other.name: other for other in made}
        yield made


def replica(name: str, batcher: Batcher) -> Replica:
    service = Service(batcher.spec, Settings(api_keys=("key",) if name == "guarded" else ()), batcher)
    service.results = results = NamedResults(service.settings, name, lambda kept: None)
    app = app_of(service)
    made = Replica(name, app, results)

    async def elsewhere(http: HttpRequest, error: Exception) -> Response:
        assert isinstance(error, ElsewhereError)
        return PassedOn(error.id, made)

    app.add_exception_handler(ElsewhereError, elsewhere)
    return made


def test_whichever_is_asked_the_maker_answers() -> None:
    async def play() -> None:
        kept = one.results.keep(Handle.over(BODY, IMAGES), tiny_spec())
        assert kept.id.startswith("one.")
        for asked in (one, two):
            status, body = await asked.get(kept.id)
            assert (status, json.loads(body)["status"]) == (200, "done")
            status, body = await asked.get(kept.id, rest="/events")
            assert (status, body.count(b"event: done")) == (200, 1)
        assert (await two.get(kept.id, "DELETE"))[0] == 204
        assert [(await asked.get(kept.id))[0] for asked in (one, two)] == [404, 404]
        assert (await two.get("one.nothing"))[0] == 404
        assert (await two.get("nothing"))[0] == 404
        assert (await two.get("nobody.nothing"))[0] == 404

    with replicas("one", "two") as (one, two):
        asyncio.run(play())


@pytest.mark.parametrize(
    ("outcome", "status"), [(IMAGES, "done"), (BackendError("it failed"), "failed"), (None, "cancelled")]
)
def test_what_a_replica_leaves_another_has(outcome: Any, status: str) -> None:
    """Also the model that made it, which may be another than its new replica's."""

    async def play() -> None:
        spec = tiny_spec(timesteps=500)
        kept = one.results.keep(Handle.over(BODY, outcome), spec)
        moved = Moved.of(kept)
        two.results.put(moved.kept())
        del three.others["one"]  # it has ended
        for asked in (two, three):
            code, body = await asked.get(kept.id)
            assert (code, json.loads(body)["status"]) == (200, status)
            code, body = await asked.get(kept.id, rest="/events")
            assert (code, body.count(f"event: {status}".encode())) == (200, 1)
        assert two.results.get(kept.id).spec is spec
        assert (await three.get(kept.id, "DELETE"))[0] == 204
        assert not two.results.has(kept.id)

    with replicas("one", "two", "three") as (one, two, three):
        asyncio.run(play())


def test_what_a_replica_that_goes_still_does_is_on_its_way() -> None:
    async def play() -> None:
        del two.others["one"]
        two.going.add("one")
        status, body = await two.get("one.something")
        assert (status, json.loads(body)) == (202, {"id": "one.something", "status": "running"})
        for method, rest in (("GET", "/events"), ("DELETE", "")):
            status, body = await two.get("one.something", method, rest)
            assert (status, json.loads(body)["error"]["code"]) == (503, "unavailable")
        two.going.clear()
        status, body = await two.get("one.something")
        assert (status, b"lost with its replica" in body) == (404, True)

    with replicas("one", "two") as (_, two):
        asyncio.run(play())


def test_nobody_is_asked_for_one_who_has_no_key() -> None:
    async def play() -> None:
        assert (await guarded.get("one.something"))[0] == 401

    with replicas("one", "guarded") as (_, guarded):
        guarded.others.clear()
        guarded.holder = None  # type: ignore[assignment]  # calling it fails
        asyncio.run(play())


def test_a_reader_who_goes_ends_the_answer() -> None:
    ended = []

    async def endless(scope: Scope, receive: Any, send: Any) -> None:
        try:
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await receive()
            await receive()
        finally:
            ended.append(True)

    async def play() -> None:
        answer = messages_of(endless, {})
        assert (await anext(answer))["status"] == 200
        await asyncio.sleep(0)
        await answer.aclose()  # type: ignore[attr-defined]
        await asyncio.sleep(0)
        assert ended

    asyncio.run(play())


@pytest.mark.parametrize("id", ["", ".", ".x", "x", "a-b.x", "ü.x", "a/b.x", f"{'a' * 64}.x"])
def test_no_replica_made_it(id: str) -> None:
    assert maker_of(id) == ""
