"""Thousands of bodies that no client should send: each gets an answer of its route, and nothing of it stays.

LORAX_FUZZ is the number of bodies, LORAX_FUZZ_SEED another seed. A failure prints the number of its case;
`python -m tools.fuzz_bodies --seed S --only NUMBER` sends it to a server of its own.
"""

from __future__ import annotations

import os

import pytest
from aiohttp.test_utils import TestClient

from engine.config import EngineConfig, ServerConfig
from engine.server.front import FRONT
from tests.server.fake import FakeBackend, Start
from tests.server.fuzz_data import VALID
from tests.server.fuzzed import KINDS, case, cases, targets
from tests.server.fuzzing import Round

COUNT = int(os.environ.get("LORAX_FUZZ", "2000"))
SEED = int(os.environ.get("LORAX_FUZZ_SEED", "1"))


def test_a_number_is_a_body() -> None:
    made = list(cases(SEED, 200))
    assert made == [case(SEED, one.number) for one in reversed(made)][::-1]
    assert len({one.body for one in made}) > 100
    assert {one.kind.partition(",")[0] for one in made} == set(KINDS)


def test_the_valid_bodies_have_a_route() -> None:
    assert set(VALID) <= {path for _, path in targets()}


@pytest.mark.timeout(1800)
async def test_every_body_is_answered(start: Start, backend: FakeBackend) -> None:
    config = EngineConfig(server=ServerConfig(max_best_of=4, max_concurrent_requests=64))
    client: TestClient = await start(config=config)
    front = client.app[FRONT]
    url = str(client.make_url("")).rstrip("/")
    ran = Round(url)
    try:
        await ran.send(cases(SEED, COUNT))
    finally:
        await front.pins.close()
        await front.prefetches.close()
    assert not ran.faults, "\n\n".join(ran.faults)
    # Enough got through, so that more than the decoder was tested.
    assert ran.statuses[200] > COUNT / 10
    assert front.bodies.num_open == front.bodies.num_bytes == front.places.num_open == 0
