"""The GPU's ops around a step against their references: the same to the bit, and replayed from a graph."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from engine.ops import extension, reference
from engine.runner.transfer import CudaWords, HostWords
from tests.ops.steps import random_step, used

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("fresh")]

ops = torch.ops.lorax
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def loaded() -> None:
    assert "prepare_step_" in extension.load_cuda().ops, extension.load_cuda().reason


@pytest.mark.parametrize("num_rows", [12, 300])
def test_prepare(num_rows: int) -> None:
    for _ in range(20):
        step = random_step(num_rows)
        here, there = step.to("cpu"), step.to("cuda")
        expected = reference.prepare_step_(*here.arguments)  # type: ignore[arg-type]
        found = [part.cpu() for part in ops.prepare_step_(*there.arguments)]
        for i in (0, 1, 2, 4):
            assert torch.equal(found[i], expected[i])
        assert used(found[3], found[4]) == used(expected[3], expected[4])
        assert torch.equal(there.computed.cpu(), here.computed)


def test_a_graph_counts_on_from_replay_to_replay() -> None:
    step = random_step()
    here, there = step.to("cpu"), step.to("cuda")
    ops.prepare_step_(*step.to("cuda").arguments)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = ops.prepare_step_(*there.arguments)
    for _ in range(3):
        here.computed.remainder_(30)
        there.computed.remainder_(30)
        expected = reference.prepare_step_(*here.arguments)  # type: ignore[arg-type]
        graph.replay()
        for i in (0, 1, 2, 4):
            assert torch.equal(outputs[i].cpu(), expected[i])
        assert torch.equal(there.computed.cpu(), here.computed)


@pytest.mark.parametrize("patch", [16, 300])
def test_edits_from_pinned_memory(patch: int) -> None:
    """More edits than the ring has room for, with the host far ahead of the device."""
    here, there = HostWords(1000), CudaWords(1000, torch.device("cuda"), patch)
    for _ in range(200):
        torch.cuda._sleep(random.choice([0, 100_000]))
        at = 0
        while (at := at + random.randint(0, 200)) < 990:
            count = random.randint(0, min(60, 1000 - at))
            values = [random.randrange(-(1 << 31), 1 << 31) for _ in range(count)]
            here.write(at, values)
            there.write(at, np.array(values, dtype=np.int32) if random.random() < 0.5 else values)
            at += len(values)
        there.send()
    assert torch.equal(there.words.cpu(), here.words)


def test_edits_from_pageable_memory_are_refused() -> None:
    words = torch.zeros(9, dtype=torch.int32, device="cuda")
    with pytest.raises(RuntimeError, match="pinned"):
        ops.write_runs_(words, torch.zeros(9, dtype=torch.int32), 1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", [1, 7, 4096, 4097, 32000, 128256])
def test_greedy(dtype: torch.dtype, vocab: int) -> None:
    """Many equal logits, both zeros, infinities; rows that are not aligned; either type of index."""
    for margin in (0, 3, 8):
        wide = torch.randint(-3, 4, (40, vocab + margin), device="cuda").to(dtype)
        wide[torch.rand_like(wide, dtype=torch.float32) < 0.1] *= -0.0
        logits = wide[:, margin:]
        logits[1::7] = -float("inf")
        logits[2::7, vocab // 2] = float("inf")
        logits[3::7, -1] = float("nan")
        logits[4::7] = torch.randn_like(logits[4::7])
        index = random.choice([torch.int32, torch.int64])
        rows = torch.randperm(60, device="cuda")[:40].to(index)
        lengths = torch.randint(0, 9, (40,), device="cuda").to(random.choice([index, torch.int64]))
        table = torch.full((60, 11), -1, dtype=torch.int32, device="cuda")
        expected_table = table.cpu()
        expected = reference.pick_greedy_(
            logits.float().cpu(), rows.cpu(), lengths.cpu(), expected_table[:, :9]
        )
        assert torch.equal(ops.pick_greedy_(logits, rows, lengths, table[:, :9]).cpu(), expected)
        assert torch.equal(table.cpu(), expected_table)


@pytest.mark.parametrize("vocab", [3, 1000, 32000, 128256])
def test_top_p(vocab: int) -> None:
    for spread in (0.0, 0.5, 4.0):
        probs = (torch.randn(30, vocab, device="cuda") * spread).softmax(-1)
        probs[::5, : vocab // 3] = 0.0
        probs /= probs.sum(-1, keepdim=True)
        top_p = torch.rand(30, device="cuda") * 0.999
        top_p[:3] = torch.tensor([0.0, 1e-6, 0.999])
        floor = ops.top_p_floor(probs, top_p)
        assert floor.shape == (30, 1)
        above = torch.where(probs > floor, probs, 0.0).double().sum(-1)
        inside = torch.where(probs >= floor, probs, 0.0).double().sum(-1)
        goal = top_p.double().clamp(min=1e-9)
        assert bool(((above < goal + 1e-6) & (inside > goal - 1e-6)).all())
        assert bool((probs == floor).any(-1).all())
        for _ in range(3):  # the same whatever else is in the batch
            i = random.randrange(30)
            assert torch.equal(ops.top_p_floor(probs[i : i + 1], top_p[i : i + 1])[0], floor[i])


def test_nothing_to_sample() -> None:
    none, table = torch.zeros(0, dtype=torch.int32, device="cuda"), torch.zeros(3, 4).int().cuda()
    assert ops.pick_greedy_(torch.zeros(0, 50).cuda(), none, none, table).shape == (0,)
    assert ops.top_p_floor(torch.zeros(0, 50).cuda(), torch.zeros(0).cuda()).shape == (0, 1)
