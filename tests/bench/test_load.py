"""The load on a server: what is sent, what is counted, and the report."""

from __future__ import annotations

import asyncio
import json
import random
from array import array
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from engine.bench.load.client import Counter, Record, Server, body_of
from engine.bench.load.load_report import (
    LoadReport,
    cold_spans,
    load_report_from,
    merged,
    report_of,
    touches,
)
from engine.bench.load.run import BACKGROUND_TOKENS, Outcome, drive
from engine.bench.load.traffic import LoadRequest
from engine.bench_options import Load, Span
from engine.config import AdapterConfig, EngineConfig, MemoryConfig
from engine.errors import EngineDead, LoraxError
from engine.server.front import FRONT
from lorax_cli.serving import opened

QUICK = Load(requests=6, concurrency=2, warm_up=0.0, output_tokens=Span(4, 4), alone=0.1)


def quiet(text: str) -> None:
    pass


class OpenAILike:
    """`/v1/completions` of any server: tokens at fixed times, `in_one_event` at once."""

    def __init__(self, gap: float = 0.0, in_one_event: int = 1, cold: float = 0.0) -> None:
        self.gap, self.in_one_event, self.cold = gap, in_one_event, cold
        self.bodies: list[dict[str, Any]] = []
        self.open = self.most_open = 0

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[str]:
        app = web.Application()
        app.router.add_get("/v1/models", self.models)
        app.router.add_post("/v1/completions", self.completions)
        async with TestServer(app, handler_cancellation=True) as server:
            yield str(server.make_url("/"))

    async def models(self, request: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [{"id": "some/base"}]})

    async def completions(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.bodies.append(body)
        if body["model"] == "missing":
            error = {"message": "none", "type": "invalid_request_error", "code": "model_not_found"}
            return web.json_response({"error": error}, status=404)
        self.open += 1
        self.most_open = max(self.most_open, self.open)
        try:
            return await self.stream(request, body)
        finally:
            self.open -= 1

    async def stream(self, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        await response.write(b": a comment\n\n")
        if body["model"].startswith("cold"):
            await asyncio.sleep(self.cold)
        number = body["max_tokens"] // self.in_one_event
        for index in range(number):
            if index == 2 and body["model"] == "broken":
                await self.send(response, {"error": {"message": "it broke", "code": "generation"}})
                return response
            choice = {"index": 0, "text": 'a "data:" b', "finish_reason": None}
            await self.send(response, {"choices": [choice], "usage": None})
            await asyncio.sleep(self.gap)
        last = {"index": 0, "text": "", "finish_reason": "length"}
        await self.send(response, {"choices": [last], "usage": None})
        usage = {"prompt_tokens": len(body["prompt"]), "completion_tokens": body["max_tokens"]}
        await self.send(response, {"choices": [], "usage": usage})
        await response.write(b"data: [DONE]\n\n")
        return response

    @staticmethod
    async def send(response: web.StreamResponse, event: dict[str, Any]) -> None:
        await response.write(b"data: " + json.dumps(event).encode() + b"\n\n")


async def measured(server: OpenAILike, load: Load) -> LoadReport:
    async with server.serving() as url:
        return report_of(await drive(url, load, None, quiet), load)


async def test_closed_loop() -> None:
    server = OpenAILike(gap=0.02)
    load = replace(QUICK, requests=20, concurrency=3, input_tokens=Span(5, 9), adapters=("a", "b"))
    report = await measured(server, load)
    assert (report.sent, report.completed, report.errors) == (20, 20, {})
    assert server.most_open == 3
    assert {body["model"] for body in server.bodies} == {"a", "b"}
    lengths = {len(body["prompt"]) for body in server.bodies}
    assert lengths <= set(range(5, 10)) and len(lengths) > 2
    body = server.bodies[0]
    assert body["max_tokens"] == 4 and body["stream"] and body["ignore_eos"]
    assert body["stream_options"] == {"include_usage": True} and "adapter_source" not in body
    assert report.ttft is not None and report.ttft.count == 20
    assert report.itl is not None and report.itl.count == 20 * 3
    assert report.tokens_per_s == pytest.approx(80 / report.seconds)
    assert report.requests_per_s == pytest.approx(20 / report.seconds)
    assert report.model == "some/base" and report.background is None


async def test_tokens_are_those_of_the_usage() -> None:
    report = await measured(OpenAILike(in_one_event=2), replace(QUICK, output_tokens=Span(8, 8)))
    assert report.itl is not None and report.itl.count == 6 * 3
    assert report.tokens_per_s == pytest.approx(6 * 8 / report.seconds)


async def test_open_loop_does_not_wait_for_answers() -> None:
    """10 requests of 0.4 s each, at 100 per second: all are open at once."""
    server = OpenAILike(gap=0.1)
    load = replace(QUICK, requests=10, concurrency=None, rate=100.0)
    report = await measured(server, load)
    assert report.completed == 10 and server.most_open > 5
    assert report.latency is not None and report.latency.p50 > 400


async def test_times_are_those_of_the_server() -> None:
    report = await measured(OpenAILike(gap=0.05), replace(QUICK, requests=4))
    assert report.itl is not None and report.ttft is not None and report.latency is not None
    assert report.itl.p50 > 45  # no gap is shorter than the server's
    assert report.ttft.max < report.latency.p50


@pytest.mark.parametrize(
    ("adapter", "kind"),
    [("missing", "404 model_not_found"), ("broken", "stream generation")],
)
async def test_errors_by_kind(adapter: str, kind: str) -> None:
    load = replace(QUICK, adapters=(adapter, "fine"), popularity="distinct")
    report = await measured(OpenAILike(), load)
    assert report.errors == {kind: 3}
    assert (report.sent, report.completed) == (6, 3)


async def test_timeout() -> None:
    report = await measured(OpenAILike(gap=5.0), replace(QUICK, requests=2, timeout=0.3))
    assert report.errors == {"timeout": 2} and report.ttft is None


async def test_no_server_there() -> None:
    with pytest.raises(EngineDead, match="no server responds"):
        await drive("http://127.0.0.1:9", QUICK, None, quiet)
    with pytest.raises(EngineDead, match="not a valid URL"):
        await drive("nonsense", QUICK, None, quiet)


async def test_native_needs_a_tokenizer_route() -> None:
    with pytest.raises(LoraxError, match="no /tokenize"):
        await measured(OpenAILike(), replace(QUICK, api="native"))


async def test_warm_up_does_not_count() -> None:
    server = OpenAILike(gap=0.01)
    report = await measured(server, replace(QUICK, requests=4, warm_up=0.3))
    assert report.sent == report.completed == 4
    assert len(server.bodies) > 6


async def test_duration() -> None:
    report = await measured(
        OpenAILike(gap=0.01), replace(QUICK, requests=None, duration=0.5, warm_up=0.1)
    )
    assert report.seconds == 0.5 and report.completed == report.sent > 4
    assert report.tokens_per_s > 0


async def test_background_inside_and_outside_of_loads() -> None:
    """Background streams with a token every 10 ms; every second request is cold for 0.2 s."""
    server = OpenAILike(gap=0.01, cold=0.2)
    load = Load(
        concurrency=1,
        requests=4,
        warm_up=0.0,
        output_tokens=Span(10, 10),
        cold=("cold0", "cold1"),
        adapters=("warm",),
        background=3,
        background_tokens=40,
        alone=0.3,
    )
    report = await measured(server, load)
    assert report.errors == {} and report.completed == 4
    assert report.ttft_cold is not None and report.ttft_cold.count == 2
    assert report.ttft_cold.p50 > 200
    assert report.ttft_warm is not None and report.ttft_warm.p50 < 200
    background = report.background
    assert background is not None and background.streams == 3 and background.restarts > 0
    assert 0.35 < background.inside_s < report.seconds
    for times in (background.alone, background.outside, background.inside):
        assert times is not None and times.count > 10 and times.p50 > 9
    assert load_report_from(json.loads(json.dumps(report.to_json()))) == report


# -- the parts


def test_counter_takes_bytes_as_they_come() -> None:
    events = [b"data: %s\n\n" % json.dumps({"choices": [{"text": "x"}]}).encode()] * 9
    raw = b": keep-alive\n\n" + b"".join(events) + b"data: [DONE]\n\n"
    for size in (1, 2, 7, 50, len(raw)):
        counter = Counter(native=False)
        pieces = [raw[at : at + size] for at in range(0, len(raw), size)]
        assert sum(map(counter.feed, pieces)) == 9 and counter.done


def test_counter_of_native_streams() -> None:
    counter = Counter(native=True)
    event = b'data:{"token":{"id":7,"text":"","logprob":-1.0},"generated_text":null}\n\n'
    assert counter.feed(event * 3) == 3
    assert counter.feed(b'data:{"error":"it broke","error_type":"generation"}\n\n') == 0
    assert (counter.error, counter.reason) == ("stream generation", "it broke")


def test_native_prompts_have_about_as_many_tokens() -> None:
    server = Server("http://x", "native", "base", 100, "local", tokens_per_word=2.0)
    body = body_of(server, LoadRequest("a", False, 128, 9, 0.0), random.Random(0))
    assert len(body["inputs"].split()) == 64
    assert body["parameters"] == {
        "max_new_tokens": 9,
        "ignore_eos_token": True,
        "adapter_id": "a",
        "adapter_source": "local",
    }
    base = body_of(server, LoadRequest(None, False, 128, 9, 0.0), random.Random(0))
    assert "adapter_id" not in base["parameters"]


def test_spans() -> None:
    assert merged([(3, 4), (1, 2), (1.5, 3.5), (6, 7)]) == [(1, 4), (6, 7)]
    assert merged([]) == []


@pytest.mark.parametrize("seed", range(20))
def test_touches_as_told_one_by_one(seed: int) -> None:
    chooser = random.Random(seed)

    def some(number: int) -> list[tuple[float, float]]:
        begins = [chooser.uniform(0, 10) for _ in range(number)]
        return [(begin, begin + chooser.uniform(0.01, 1.0)) for begin in begins]

    spans = some(8)
    joined = merged(spans)
    ends = [end for _, end in joined]
    for begin, end in some(50):
        plain = any(a < end and begin < b for a, b in spans)
        assert touches(begin, end, joined, ends) == plain


def record(due: float, times: list[float], end: float, cold: bool = False, **more: Any) -> Record:
    request = LoadRequest("a", cold, 1, len(times), 0.0)
    given = {"counted": True, "tokens": len(times), **more}
    return Record(request, due, times=array("d", times), end=end, **given)


def test_report_by_hand() -> None:
    server = Server("http://x", "openai", "base", 100)
    records = [
        record(9.0, [9.5, 10.0], 10.1, counted=False),
        record(10.0, [10.2, 10.3, 10.5], 10.6),
        record(11.0, [12.0, 12.1], 12.2, cold=True, tokens=4),
        record(13.0, [], 13.5, cold=True, error="500", reason="the first"),
        record(8.0, [], 8.5, counted=False, error="500", reason="the second"),
    ]
    background = [record(5.0, [6.0, 6.5, 10.5, 11.25, 11.5, 13.25, 14.0], 14.0)]
    outcome = Outcome(
        server=server,
        records=records,
        background=background,
        alone=(5.5, 7.0),
        window=(10.0, 14.0),
        lag=array("d", [0.001]),
    )
    report = report_of(outcome, Load(background=1))
    assert (report.sent, report.completed, report.errors) == (3, 2, {"500": 2})
    assert report.reasons == {"500": "the first"}
    assert report.ttft is not None and report.ttft.max == pytest.approx(1000)
    assert report.ttft_warm is not None and report.ttft_warm.p50 == pytest.approx(200)
    assert report.itl is not None and report.itl.mean == pytest.approx(400 / 3)
    assert report.latency is not None and report.latency.max == pytest.approx(1200)
    # one of the warm-up's, three, and two events that were four tokens
    assert report.tokens_per_s == pytest.approx((1 + 3 + 4) / 4)
    assert report.requests_per_s == pytest.approx(3 / 4)
    assert cold_spans(records) == [(11.0, 12.0), (13.0, 13.5)]
    gaps = report.background
    assert gaps is not None and gaps.inside_s == pytest.approx(1.5)
    assert gaps.tokens_per_s == pytest.approx(5 / 4)
    assert gaps.alone is not None and gaps.alone.count == 1 and gaps.alone.max == 500
    # the gaps that end in the window: 4 s, then 0.75, 0.25 and 1.75 that touch a load, then 0.75 that does
    assert gaps.outside is not None and gaps.outside.count == 1 and gaps.outside.max == 4000
    assert gaps.inside is not None and gaps.inside.count == 4 and gaps.inside.max == 1750


# -- our own server


DEMO = EngineConfig(
    adapters=AdapterConfig(host_cache_gb=0.05), memory=MemoryConfig(cpu_memory_gb=0.2)
)


@pytest.mark.parametrize("api", ["openai", "native"])
async def test_our_own_server(api: str) -> None:
    load = Load(
        input_tokens=Span(20, 20),
        output_tokens=Span(12, 12),
        adapters=("pirate", "math"),
        popularity="distinct",
        requests=4,
        concurrency=2,
        warm_up=0.0,
        background=1,
        background_tokens=20,  # it begins anew all the time, so that it never runs out of text
        alone=0.1,
        api=api,  # type: ignore[arg-type]
    )
    keyed = replace(DEMO, server=replace(DEMO.server, api_key=("sk-bench",)))
    async with opened(keyed, local=True) as app, TestServer(app) as server:
        outcome = await drive(str(server.make_url("/")), load, None, quiet, api_key="sk-bench")
    report = report_of(outcome, load)
    assert report.errors == {} and report.completed == 4
    assert report.model == "demo" and report.server["version"]
    assert [one.tokens for one in outcome.records] == [12] * 4
    assert report.tokens_per_s == pytest.approx(48 / report.seconds)
    if api == "native":
        assert all(len(one.times) == 12 for one in outcome.records)
    assert report.background is not None and report.background.tokens_per_s > 0


async def test_background_streams_respect_the_servers_limit() -> None:
    load = replace(QUICK, background=2)
    async with opened(DEMO, local=True) as app, TestServer(app) as server:
        limit = app[FRONT].backend.info.max_total_tokens
        outcome = await drive(str(server.make_url("/")), load, None, quiet)
    assert report_of(outcome, load).errors == {}
    assert limit < BACKGROUND_TOKENS
    for one in outcome.background:  # the first ones are cut short, to a half at most
        whole = one.request.input_tokens + one.request.output_tokens
        assert limit // 2 <= whole <= limit
