"""Grammars on the real engine: outputs are valid, free rows keep their text, and nothing else is disturbed."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import msgspec
import pytest
from llguidance import LLMatcher
from tokenizers import Tokenizer

from engine.config import AdapterConfig, EngineConfig, MemoryConfig, ModelConfig, SchedulerConfig
from engine.errors import GenerationError, InvalidRequest
from engine.grammar import Grammars, check, of_json_schema, of_lark
from engine.messages import AdapterImageRef, Request, SamplingParams
from tests.engine.harness import Harness, Outcome

DEMO = Path(__file__).resolve().parents[2] / "engine" / "demo"
TOKENIZER = Tokenizer.from_file(str(DEMO / "base" / "tokenizer.json"))
EOS = [json.loads((DEMO / "base" / "generation_config.json").read_text())["eos_token_id"]]
PROMPT = TOKENIZER.encode("Write JSON about a castle: ").ids
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "tags": {"type": "array", "items": {"enum": ["red", "blue"]}, "maxItems": 3},
        "next": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/leaf"}]},
    },
    "required": ["name", "age", "tags", "next"],
    "additionalProperties": False,
    "$defs": {
        "leaf": {
            "type": "object",
            "properties": {"x": {"type": "integer", "maximum": 9, "minimum": -9}},
            "required": ["x"],
            "additionalProperties": False,
        }
    },
}
JSON = of_json_schema(SCHEMA)
DATE = LLMatcher.grammar_from_regex(r"\d{4}-\d{2}-\d{2}")


def config_of(**scheduler: Any) -> EngineConfig:
    return EngineConfig(
        model=ModelConfig(model_id=str(DEMO / "base"), dtype="float32"),
        adapters=AdapterConfig(adapter_memory_fraction=0.2, max_active_adapters=4),
        scheduler=replace(SchedulerConfig(max_total_tokens=400), **scheduler),
        memory=MemoryConfig(device="cpu", cpu_memory_gb=0.1),
    )


@pytest.fixture(scope="module", params=[0, 1], ids=["in turn", "run ahead"])
def house(request: pytest.FixtureRequest) -> Iterator[Harness]:
    made = Harness(config_of(), run_ahead=request.param)
    yield made
    made.close()


def asked(
    id: str,
    grammar: str = "",
    seed: int = 0,
    adapter: AdapterImageRef | None = None,
    new: int = 150,
    **sampling: Any,
) -> Request:
    params = SamplingParams(**({"temperature": 1.0, "seed": seed, "logprobs": True} | sampling))
    return Request(id, PROMPT, params, new, EOS, adapter, grammar=grammar)


def text_of(outcome: Outcome) -> str:
    assert outcome.error is None, outcome.error
    return str(TOKENIZER.decode(outcome.tokens))


def valid(outcome: Outcome) -> dict[str, Any]:
    """The value of an output that ended by itself and is an instance of SCHEMA."""
    assert outcome.finish == "eos"
    value = json.loads(text_of(outcome))
    jsonschema.validate(value, SCHEMA)
    return dict(value)


def test_outputs_are_valid_and_free_rows_keep_their_text(house: Harness) -> None:
    """At temperature 1, with and without an adapter, in one batch."""
    adapter = house.stage(DEMO / "adapters" / "pirate")
    kinds = [("json", JSON), ("free", ""), ("date", DATE), ("free too", "")]
    requests = [
        asked(f"{name} {seed} {used}", grammar, seed, adapter if used else None, new=150)
        for name, grammar in kinds
        for seed in range(3)
        for used in (False, True)
    ]
    found = house.run(requests)
    for id, outcome in found.items():
        if id.startswith("json"):
            valid(outcome)
        elif id.startswith("date"):
            assert outcome.finish == "eos" and re.fullmatch(r"\d{4}-\d{2}-\d{2}", text_of(outcome))
    free = [one for one in requests if not one.grammar]
    alone = house.run(free)
    for one in free:
        assert alone[one.id] == found[one.id]
    assert len({text_of(found[one.id]) for one in requests if one.grammar}) > 8
    assert not house.engine.structured.any, "every matcher is forgotten"


def test_with_the_same_seed_alone_and_among_others(house: Harness) -> None:
    together = house.run([asked(f"r{seed}", JSON, seed) for seed in range(6)])
    for seed in range(6):
        alone = house.run([asked("alone", JSON, seed)])["alone"]
        assert alone.tokens == together[f"r{seed}"].tokens


def test_the_limit_cuts_an_output(house: Harness) -> None:
    cut = house.run([asked("cut", JSON, 1, new=9)])["cut"]
    whole = house.run([asked("whole", JSON, 1)])["whole"]
    assert cut.finish == "length" and cut.tokens == whole.tokens[:9]


def test_greedy_with_biases_and_penalties(house: Harness) -> None:
    """Whatever the logits become, the grammar holds."""
    worst = TOKENIZER.token_to_id("{")
    assert worst is not None
    found = house.run(
        [
            asked("greedy", JSON, temperature=0.0),
            asked("biased", JSON, temperature=0.0, logit_bias={worst: -100.0, EOS[0]: 100.0}),
            asked("punished", JSON, repetition_penalty=1.5, frequency_penalty=1.0),
            asked("filtered", JSON, top_p=0.1, top_k=3, min_p=0.1),
        ]
    )
    for outcome in found.values():
        valid(outcome)


def chained(count: int) -> dict[str, str]:
    """Grammars of 50 to 250 kB that say \"ab\" at the end of a chain of rules."""
    schema: dict[str, Any] = {"$ref": "#/$defs/0", "$defs": {str(count): {"enum": ["ab"]}}}
    schema["$defs"] |= {str(at): {"$ref": f"#/$defs/{at + 1}"} for at in range(count)}
    rules = [f"r{at}: ((((r{at + 1}))))" for at in range(count)]
    lark = "\n".join(["start: r0", *rules, f'r{count}: "\\"ab\\""'])
    return {"references": of_json_schema(schema), "rules": of_lark(lark)}


def test_a_long_chain_of_rules_ends_no_process(house: Harness) -> None:
    """llguidance follows it by recursion: the output is that of the chain's end."""
    direct = house.run([asked("direct", of_json_schema({"enum": ["ab"]}), 1)])["direct"]
    for name, grammar in chained(6000).items():
        check(grammar, "f")
        assert house.run([asked(name, grammar, 1)])[name].tokens == direct.tokens, name


def test_preempted_rows_go_on_in_their_grammars() -> None:
    """The KV cache holds few sequences at once: outputs are those without preemption."""
    requests = [asked(f"r{seed}", JSON if seed % 2 else "", seed, new=180) for seed in range(8)]
    requests = [
        one if one.grammar else msgspec.structs.replace(one, eos_token_ids=[]) for one in requests
    ]
    outcomes = []
    for tokens in (400, 100_000):
        house = Harness(config_of(max_batch_total_tokens=tokens, max_total_tokens=200), run_ahead=1)
        outcomes.append(house.run(requests))
        house.close()
    tight, roomy = outcomes
    assert sum(one.usage.preemptions for one in tight.values() if one.usage) > 0
    for id, outcome in tight.items():
        assert outcome.tokens == roomy[id].tokens
        if int(id[1:]) % 2:
            valid(outcome)


def test_lost_steps_leave_the_matchers_right(house: Harness) -> None:
    """A failed step ends its own requests; one that joined later is served."""
    for number in range(3):
        house.engine.submit(asked(f"lost{number}", JSON, number))
    started = 0
    while started < 12:
        started += sum(len(update.tokens) for update in house.engine.step())
    ended = {update.id for update in house.engine.fail(GenerationError("injected"))}
    assert ended == ({"lost0", "lost1", "lost2"} if house.engine.run_ahead else set())
    while house.engine.has_work:
        house.engine.step()
    assert not house.engine.structured.any
    valid(house.run([asked("next", JSON, 5)])["next"])


def test_a_failed_launch_loses_no_update(house: Harness, monkeypatch: pytest.MonkeyPatch) -> None:
    """The step before is committed for the masks; then the sampling fails. What the step brought is still told."""
    requests = [asked("grammar", JSON, 1), asked("short", new=3), asked("long", new=40)]
    for one in requests:
        house.engine.submit(one)
    runner, launched = house.engine.runner, house.engine.runner.sample
    count = 0

    def sample(masks: Any = None) -> None:
        nonlocal count
        count += masks is not None
        if count >= 3 and masks is not None:
            runner._forwarded = None
            raise RuntimeError("injected")
        launched(masks)

    monkeypatch.setattr(runner, "sample", sample)
    updates = []
    try:
        while house.engine.has_work:
            updates += house.engine.step()
    except RuntimeError:
        updates += house.engine.fail(GenerationError("injected"))
    monkeypatch.setattr(runner, "sample", launched)
    while house.engine.has_work:
        updates += house.engine.step()
    last = {update.id: update for update in updates if update.is_last}
    assert last.keys() == {"grammar", "short", "long"} and count == 3
    for id, update in last.items():
        if update.usage is not None:
            told = sum(len(one.tokens) for one in updates if one.id == id)
            assert told == update.usage.generated_tokens


def test_a_cancelled_request_that_waits_for_its_grammar(house: Harness) -> None:
    slow = LLMatcher.grammar_from_regex(r"[a-z]{3,9}( [a-z]{3,9}){2,50}")
    house.engine.submit(asked("gone", slow))
    house.engine.cancel("gone")
    updates = []
    while house.engine.has_work:
        updates += house.engine.step()
    assert [(update.id, update.finish) for update in updates] == [("gone", "cancelled")]
    assert not house.engine.structured.any


def test_a_grammar_that_cannot_be_compiled_fails_alone(house: Harness) -> None:
    found = house.run([asked("bad", "start: nothing"), asked("good", JSON), asked("free")])
    assert found["bad"].error is not None
    assert found["bad"].error["class"] == "GenerationError"
    valid(found["good"])
    assert found["free"].finish


def test_a_grammar_that_becomes_too_complex_fails_alone(
    house: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engine.grammar.STEP_ITEMS", 12)
    monkeypatch.setattr("engine.grammar.STEP_LEXER_FUEL", 40)
    ambiguous = 'start: e\ne: e "+" e | e "*" e | "(" e ")" | /[0-9]{1,9}/'
    found = house.run([asked("hard", ambiguous), asked("good", DATE, 3), asked("free")])
    assert found["hard"].error is not None and found["hard"].error["hint"]
    assert re.fullmatch(r"\d{4}-\d{2}-\d{2}", text_of(found["good"]))
    assert found["free"].error is None


@pytest.mark.parametrize(
    ("grammar", "reason"),
    [
        (LLMatcher.grammar_from_json_schema({"not": {"type": "string"}}), "not"),
        (LLMatcher.grammar_from_json_schema({"type": "thing"}), "thing"),
        (LLMatcher.grammar_from_json_schema({"$ref": "#/$defs/none"}), "none"),
        (LLMatcher.grammar_from_regex(r"(?=a)b"), "look-around"),
        ("start: nothing", "nothing"),
        ("x" * (1 << 19), "characters"),
    ],
)
def test_what_cannot_be_served_is_refused_by_name(grammar: str, reason: str) -> None:
    with pytest.raises(InvalidRequest, match=reason) as caught:
        check(grammar, "response_format")
    assert caught.value.field == "response_format" and caught.value.hint


def test_grammars_are_compiled_once_and_few_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.grammar.MAX_KEPT", 3)
    grammars = Grammars(lambda: TOKENIZER.to_str(), TOKENIZER.get_vocab_size())
    for number in range(5):
        for copy in range(3):
            grammars.open(f"{number}-{copy}", f'start: "{number}"', EOS)
    assert len(grammars._compiled) == 3 and len(grammars._states) == 15
    for number in range(5):
        compiled = {id(grammars._states[f"{number}-{copy}"].compiled) for copy in range(3)}
        assert len(compiled) == 1
        for copy in range(3):
            grammars.close(f"{number}-{copy}")
    assert not grammars.any
    grammars.shut_down()
