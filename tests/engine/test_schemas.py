"""Outputs under random schemas, with the base and adapters at temperature 1: what ends by itself is an instance.

LORAX_SCHEMAS=200: that many schemas instead of a few.
"""

from __future__ import annotations

import json
import os
import random

import jsonschema
from llguidance import LLMatcher

from engine.grammar import of_json_schema
from tests.engine.harness import Harness
from tests.engine.schemas import schema
from tests.engine.test_grammar import DEMO, TOKENIZER, asked, config_of

NUMBER = int(os.environ.get("LORAX_SCHEMAS", "24"))
COMPLETE = 0.75  # of the outputs, at least
NEW_TOKENS = 512


def test_outputs_are_instances() -> None:
    schemas = [schema(random.Random(seed)) for seed in range(NUMBER)]
    house = Harness(config_of(max_total_tokens=1024), run_ahead=1)
    adapters = [None, *(house.stage(DEMO / "adapters" / name) for name in ("json", "pirate"))]
    requests = [
        asked(f"{number} {which}", of_json_schema(one), number, adapter, new=NEW_TOKENS)
        for number, one in enumerate(schemas)
        for which, adapter in enumerate(adapters)
        if NUMBER > 24 or which == number % 3
    ]
    found = house.run(requests, check=False)
    house.close()
    ended = {id: one for id, one in found.items() if one.finish == "eos"}
    assert not [one.error for one in found.values() if one.error]
    for id, outcome in ended.items():
        value = json.loads(TOKENIZER.decode(outcome.tokens))
        jsonschema.validate(
            value, schemas[int(id.split()[0])], format_checker=jsonschema.FormatChecker()
        )
    print(f"{len(ended)} of {len(found)} outputs ended by themselves")
    assert len(ended) >= COMPLETE * len(found)


def test_every_schema_is_supported() -> None:
    """So that the test above tests what it says."""
    for seed in range(200):
        grammar = of_json_schema(schema(random.Random(seed)))
        assert LLMatcher.validate_grammar(grammar) == ""
