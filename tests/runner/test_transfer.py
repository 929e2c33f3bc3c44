"""Edits of words on the device, collected in a ring of buffers, against the same edits at once."""

from __future__ import annotations

import random

import pytest
import torch

from engine.ops import reference
from engine.runner import transfer
from engine.runner.transfer import CudaWords, HostWords, upload_all


class Event:
    """An event of a stream that does its work at once."""

    def record(self) -> None: ...

    def synchronize(self) -> None: ...


@pytest.mark.parametrize("patch", [4, 17, 300])
def test_collected_edits_are_the_edits(patch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "_pinned", lambda size: torch.zeros(size, dtype=torch.int32))
    monkeypatch.setattr(torch.cuda, "Event", Event)
    launches = []

    def launch(words: torch.Tensor, patch: torch.Tensor, runs: int) -> None:
        launches.append(runs)
        reference.write_runs_(words, patch, runs)

    monkeypatch.setattr(transfer.ops, "write_runs_", launch)
    generator = random.Random(patch)
    at_once, collected = HostWords(500), CudaWords(500, torch.device("cpu"), patch)
    for _ in range(40):
        for begin in range(0, 500, 50):  # no two edits of one launch meet
            values = [generator.randrange(1 << 31) for _ in range(generator.randint(0, 50))]
            at_once.write(begin, values)
            collected.write(begin, values)
        collected.send()
        assert torch.equal(collected.words, at_once.words)
    if patch == 300:
        assert len(launches) < 40 * 3  # about 280 words in each
    before = len(launches)
    collected.send()
    assert len(launches) == before


def test_lists_of_both_kinds_arrive_in_one_copy() -> None:
    integers, floats = [[1, -7, 1 << 62], [], [5]], [[0.5], [], [0.25, -1.0]]
    found = upload_all(integers, floats, torch.device("cpu"))
    assert [part.tolist() for part in found] == [*integers, *floats]
    assert [part.dtype for part in found] == [torch.int64] * 3 + [torch.float32] * 3
    assert [len(part) for part in upload_all([[], []], [[]], torch.device("cpu"))] == [0, 0, 0]
