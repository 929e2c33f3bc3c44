"""The most likely token at each position of a prompt."""

from __future__ import annotations

import pytest

from tests.engine.harness import Harness, config_of, request
from tests.tiny import make_model

PROMPT = [3, 99, 41, 41, 7, 150, 2, 88]


@pytest.mark.parametrize("chunk", [16, 64])
def test_a_greedy_answer_as_a_prompt_is_its_own_top(
    tmp_path_factory: pytest.TempPathFactory, chunk: int
) -> None:
    folder = tmp_path_factory.mktemp("model")
    make_model("llama", folder)
    harness = Harness(config_of(folder, device="cpu", max_batch_prefill_tokens=chunk))
    try:
        greedy = harness.run([request("greedy", PROMPT)])["greedy"]
        whole = [*PROMPT, *greedy.tokens]
        scored = harness.run([request("scored", whole, max_new_tokens=1, prompt_logprobs=True)])
    finally:
        harness.close()
    found = scored["scored"]
    assert found.prompt_logprobs is not None
    assert len(found.prompt_tops) == len(found.prompt_logprobs) == len(whole) - 1
    tops = found.prompt_tops[len(PROMPT) - 1 :]
    assert [id for id, _ in tops] == greedy.tokens
    assert [logprob for _, logprob in tops] == pytest.approx(greedy.logprobs, abs=1e-4)
    for (id, best), token, own in zip(
        found.prompt_tops, whole[1:], found.prompt_logprobs, strict=True
    ):
        assert best == own if id == token else best > own
