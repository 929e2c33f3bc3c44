"""What the mask of one row costs in one step, with vocabularies of 32,000 and 128,000 tokens.

    python -m tools.time_masks [--schemas 40] [--json FILE]

Trains byte-level BPE on the Python files of this installation. The demo's model writes instances of random schemas at
temperature 1; they are followed token by token. The goals: at 32,000 tokens a median of 100 us, at 128,000 a 99th
percentile of 1 ms. One thread.
"""

from __future__ import annotations

import argparse
import random
import sys
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from engine.bench.quantiles import quantile
from engine.grammar import Constrained, Grammars, of_json_schema
from tests.engine.harness import Harness
from tests.engine.schemas import schema
from tests.engine.test_grammar import asked, config_of, text_of
from tools.bench_stalls import report

MAX_TOKENS = 512  # of one instance
GOALS = {"32,000: p50, us": 100.0, "128,000: p99, us": 1000.0}


def tokenizer(vocab: int) -> Tokenizer:
    """Byte-level BPE of this size; its token 0 ends an output."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    files = sorted(Path(sysconfig.get_path("purelib")).rglob("*.py"))
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=["</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train([str(file) for file in files[:6000]], trainer)
    return made


def instances(number: int) -> list[tuple[str, str]]:
    """Grammars, and texts that the demo's model wrote under them."""
    house = Harness(config_of(max_total_tokens=1024))
    grammars = [of_json_schema(schema(random.Random(seed))) for seed in range(number)]
    requests = [asked(str(at), one, at, new=MAX_TOKENS) for at, one in enumerate(grammars)]
    found = house.run(requests, check=False)
    house.close()
    return [(one, text_of(found[str(at)])) for at, one in enumerate(grammars)]


def times(grammars: Grammars, made: Tokenizer, written: list[tuple[str, str]]) -> Iterator[float]:
    """Seconds of every mask."""
    vocab = made.get_vocab_size()
    masks = np.zeros((1, -(-vocab // 32)), dtype=np.int32)
    for grammar, text in written:
        tokens = made.encode(text).ids
        grammars.open("row", grammar, [0])
        while not grammars.is_ready("row"):
            time.sleep(0.001)
        for count, token in enumerate(tokens):
            start = time.perf_counter()
            failed = grammars.fill([Constrained(0, "row", tokens[:count], 0)], masks)
            yield time.perf_counter() - start
            assert not failed and masks[0, token // 32] >> (token % 32) & 1, "it is allowed"
        grammars.close("row")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--schemas", type=int, default=40)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    found: dict[str, float] = {}
    written = instances(args.schemas)
    for vocab in (32_000, 128_000):
        made = tokenizer(vocab)
        size = made.get_vocab_size()
        grammars = Grammars(made.to_str, size)
        seconds = sorted(times(grammars, made, written))
        found[f"{vocab:,}: tokens"] = size
        found[f"{vocab:,}: masks"] = len(seconds)
        for share in (0.5, 0.9, 0.99, 1.0):
            found[f"{vocab:,}: p{share * 100:g}, us"] = 1e6 * quantile(seconds, share)
        grammars.shut_down()
    report(found, args.json)
    sys.exit(int(any(found[name] > most for name, most in GOALS.items())))


if __name__ == "__main__":
    main()
