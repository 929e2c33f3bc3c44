from __future__ import annotations

import re
from typing import Any

import pytest
from aiohttp.test_utils import TestClient
from msgspec.structs import replace
from prometheus_client.parser import text_string_to_metric_families

from engine.messages import AdapterStatus, Buckets, EngineStats
from engine.metrics import MAX_ADAPTER_LABELS, Metrics
from tests.server.fake import FakeBackend

LORAX = [
    "lorax_request_count",
    "lorax_request_success",
    "lorax_request_duration_bucket",
    "lorax_request_validation_duration_bucket",
    "lorax_request_queue_duration_bucket",
    "lorax_request_inference_duration_bucket",
    "lorax_request_mean_time_per_token_duration_bucket",
    "lorax_request_generated_tokens_bucket",
    "lorax_request_input_length_bucket",
    "lorax_request_max_new_tokens_bucket",
    "lorax_request_skipped_tokens_bucket",
    "lorax_request_input_count_bucket",
    "lorax_batch_next_size_bucket",
    "lorax_batch_current_size",
    "lorax_batch_current_max_tokens",
    "lorax_queue_length",
]


async def samples(client: TestClient) -> dict[str, float]:
    text = await (await client.get("/metrics")).text()
    list(text_string_to_metric_families(text))  # parses
    found = {}
    for line in text.splitlines():
        if not line.startswith("#"):
            name, _, value = line.rpartition(" ")
            found[name] = float(value)
    return found


async def test_metrics_of_requests(client: TestClient, backend: FakeBackend) -> None:
    backend.say("one two")
    body = {"inputs": "x", "parameters": {"max_new_tokens": 20, "adapter_id": "lora"}}
    assert (await client.post("/generate", json=body)).status == 200
    response = await client.post("/generate_stream", json={"inputs": "x"})
    num_events = (await response.read()).count(b"data:")
    await client.post("/generate", json={"inputs": ""})
    await client.post("/generate", data=b"{")
    missing = {"inputs": "x", "parameters": {"adapter_id": "missing"}}
    await client.post("/generate", json=missing)
    found = await samples(client)
    for name in LORAX:
        assert any(key.split("{")[0] == name for key in found), name
    assert found["lorax_request_count"] == 5
    assert found["lorax_request_success"] == 2
    assert found['lorax_request_failure{err="validation"}'] == 1
    assert found['lorax_request_failure{err="bad_request"}'] == 1
    assert found['lorax_request_failure{err="download_adapter"}'] == 1
    assert found["lorax_request_duration_count"] == 2
    assert found["lorax_request_generated_tokens_sum"] == 2 * num_events
    assert found["lorax_request_max_new_tokens_count"] == 1
    assert found["lorax_time_to_first_token_seconds_count"] == 2
    assert found["lorax_inter_token_latency_seconds_count"] == 2 * (num_events - 1)
    assert found['lorax_adapter_requests_total{adapter="base"}'] == 1
    assert found['lorax_adapter_requests_total{adapter="lora"}'] == 1
    assert not any("missing" in name or "_created" in name for name in found)


async def test_metrics_of_the_engine(client: TestClient, backend: FakeBackend) -> None:
    await client.post("/generate", json={"inputs": "x", "parameters": {"adapter_id": "lora"}})
    backend.stats = EngineStats(
        waiting=3,
        running=2,
        free_blocks=60,
        total_blocks=100,
        preemptions=7,
        prefix_hits=50,
        prefix_lookups=80,
        resident=[("a", b"a", 10), ("b", b"b", 20)],
        arena_bytes=100,
        arena_used=30,
        steps=9,
        failed_steps=2,
        joined=4,
        step_seconds=Buckets([0.01, 0.1], [5, 3, 1], 0.75),
        step_sizes=Buckets([1.0, 2.0], [2, 7, 0], 16.0),
    )
    for _ in range(2):  # a load is counted once, however often it is scraped
        found = await samples(client)
        assert found["lorax_queue_length"] == 3
        assert found["lorax_batch_current_size"] == 2
        assert found["lorax_kv_blocks_used"] == 40
        assert found["lorax_batch_current_max_tokens"] == 640
        assert found["lorax_preemptions_total"] == 7
        assert found["lorax_prefix_cache_hit_tokens_total"] == 50
        assert found["lorax_adapters_resident"] == 2
        assert found["lorax_adapter_arena_used_bytes"] == 30
        assert found["lorax_adapters_host"] == 1
        assert found["lorax_adapter_host_bytes"] == 64
        assert found['lorax_batch_inference_count{method="step"}'] == 9
        assert found['lorax_batch_inference_failure{method="step"}'] == 2
        assert found['lorax_batch_concat{reason="running"}'] == 4
        duration = "lorax_batch_inference_duration"
        for bound, count in (("0.01", 5), ("0.1", 8), ("+Inf", 9)):
            assert found[f'{duration}_bucket{{le="{bound}",method="step"}}'] == count
        assert found[f'{duration}_sum{{method="step"}}'] == 0.75
        assert found['lorax_batch_next_size_bucket{le="1.0"}'] == 2
        assert found["lorax_batch_next_size_count"] == 9
        assert found['lorax_adapter_load_seconds_count{stage="fetch"}'] == 1
        assert found['lorax_adapter_load_seconds_sum{stage="parse"}'] == 0.1


@pytest.mark.parametrize(
    "how", [{"headers": {"Accept": "application/json"}}, {"params": {"format": "json"}}]
)
async def test_metrics_as_json(client: TestClient, how: Any) -> None:
    await client.post("/generate", json={"inputs": "x"})
    found = await (await client.get("/metrics", **how)).json()
    (sample,) = found["lorax_request_count"]["samples"]
    assert sample == {"name": "lorax_request_count", "labels": {}, "value": 1.0}


def test_adapter_labels_are_bounded() -> None:
    metrics = Metrics()
    for index in range(MAX_ADAPTER_LABELS + 50):
        metrics.adapter(f"adapter-{index}")
    metrics.adapter("adapter-0")
    text = metrics.render(EngineStats(), [], 16).decode()
    labels = re.findall(r'lorax_adapter_requests_total\{adapter="([^"]+)"\} (\S+)', text)
    assert len(labels) == MAX_ADAPTER_LABELS + 1
    assert dict(labels)["other"] == "50.0" and dict(labels)["adapter-0"] == "2.0"


def test_a_second_load_counts_again() -> None:
    metrics = Metrics()
    for seconds in (0.5, 0.5, 0.7):
        status = AdapterStatus(
            name="a",
            source="hub",
            digest=None,
            state="ready",
            data_bytes=1,
            stacked_rank=8,
            targets=[],
            base_model=None,
            leases=0,
            seconds={"fetch": seconds},
        )
        text = metrics.render(EngineStats(), [status], 16).decode()
    assert 'lorax_adapter_load_seconds_count{stage="fetch"} 2.0' in text


def test_loads_of_one_name_are_told_apart() -> None:
    """Two versions, two sources and two tenants; one that is loading is counted at its end, once."""
    base = AdapterStatus("a", "hub", b"1", "ready", 1, 8, [], None, 0, {"fetch": 0.5})
    others = [
        replace(base, digest=b"2", seconds={"fetch": 0.6}),
        replace(base, source="local", seconds={"fetch": 0.7}),
        replace(base, tenant=b"t", seconds={"fetch": 0.8}),
    ]
    loading = replace(base, name="b", digest=None, state="parsing", seconds={"fetch": 0.9})
    loaded = replace(loading, digest=b"3", state="ready", seconds={"fetch": 0.9})
    metrics = Metrics()
    for newest in (loading, loading, loaded, loaded):
        text = metrics.render(EngineStats(), [base, *others, newest], 16).decode()
    assert 'lorax_adapter_load_seconds_count{stage="fetch"} 5.0' in text


def test_placements_are_observed_once() -> None:
    metrics = Metrics()
    for placed, seconds in ((0, []), (2, [0.1, 0.2]), (2, [0.1, 0.2]), (5, [0.3, 0.4])):
        stats = EngineStats(placed=placed, place_seconds=seconds)
        text = metrics.render(stats, [], 16).decode()
    assert 'lorax_adapter_load_seconds_count{stage="place"} 4.0' in text
    assert 'lorax_adapter_load_seconds_sum{stage="place"} 1.0' in text


async def test_restarts_of_the_exchange_are_counted(
    client: TestClient, backend: FakeBackend
) -> None:
    backend.exchange_restarts = 3
    assert (await samples(client))["lorax_exchange_restarts_total"] == 3
