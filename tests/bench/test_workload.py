"""Options of a benchmark: texts become values, or errors that name the flag; then cases and requests."""

from __future__ import annotations

import itertools
import random
import statistics
from pathlib import Path

import pytest

from engine.bench.cases import assign, cases_of
from engine.bench.load.traffic import background_adapters, requests_of
from engine.bench.shapes import SHAPES
from engine.bench_options import SHAPE_NAMES, Load, Span, Workload, bench_options, fill, names
from engine.errors import ConfigError


def test_every_field_is_read() -> None:
    given: dict[str, str | list[str]] = {
        "batch": "3",
        "input_tokens": "5",
        "output_tokens": "6",
        "adapters": "7",
        "ranks": ["8", "8,16"],
        "targets": "q_proj, v_proj",
        "popularity": "zipf,distinct",
        "long_context": "99",
        "files": "0",
        "cases": "base,long",
        "shape": "mistral-7b",
        "repeat": "2",
        "seed": "0",
    }
    assert set(given) == {name for name, _ in bench_options(Workload)}
    assert fill(Workload, given) == Workload(
        batch=3,
        input_tokens=5,
        output_tokens=6,
        adapters=7,
        ranks=((8,), (8, 16)),
        targets=("q_proj", "v_proj"),
        popularity=("zipf", "distinct"),
        long_context=99,
        files=0,
        cases=("base", "long"),
        shape="mistral-7b",
        repeat=2,
        seed=0,
    )
    assert fill(Workload, {}) == Workload()


def test_every_field_of_a_load_is_read() -> None:
    given: dict[str, str | list[str]] = {
        "input_tokens": "64-256",
        "output_tokens": "9",
        "adapters": "a,b{0..2}",
        "popularity": "zipf",
        "seed": "4",
        "cold": "c{8..10}-{0..1}",
        "cold_share": "0.25",
        "rate": "2.5",
        "concurrency": "3",
        "requests": "10",
        "duration": "1.5",
        "warm_up": "0",
        "background": "2",
        "background_tokens": "77",
        "alone": "0.5",
        "api": "native",
        "timeout": "8",
    }
    assert set(given) == {name for name, _ in bench_options(Load)}
    load = fill(Load, given)
    assert load.input_tokens == Span(64, 256) and load.output_tokens == Span(9, 9)
    assert load.adapters == ("a", "b0", "b1", "b2")
    assert load.cold == ("c8-0", "c8-1", "c9-0", "c9-1", "c10-0", "c10-1")
    with pytest.raises(ConfigError, match="exclude each other"):
        load.check()


@pytest.mark.parametrize(
    ("cls", "name", "text"),
    [
        (Workload, "batch", "0"),
        (Workload, "batch", "two"),
        (Workload, "popularity", "fair"),
        (Workload, "cases", ""),
        (Workload, "shape", "gpt-9"),
        (Load, "input_tokens", "9-3"),
        (Load, "rate", "0"),
        (Load, "rate", "nan"),
        (Load, "cold_share", "1.5"),
        (Load, "adapters", "@/nowhere/at/all"),
        (Load, "api", "grpc"),
    ],
)
def test_bad_texts(cls: type, name: str, text: str) -> None:
    with pytest.raises(ConfigError, match=f"--{name.replace('_', '-')}") as raised:
        fill(cls, {name: text})
    assert raised.value.field == name


def test_bad_item_of_a_repeated_option() -> None:
    with pytest.raises(ConfigError, match="--ranks"):
        fill(Workload, {"ranks": ["8", "8,x"]})


def test_names_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "names"
    file.write_text("one\n\n two \n")
    assert names(f"@{file}") == ("one", "two")


def test_every_shape_has_a_name() -> None:
    assert tuple(SHAPES) == SHAPE_NAMES


def test_cases() -> None:
    workload = Workload(
        batch=64,
        adapters=64,
        ranks=((16,), (8, 64)),
        popularity=("distinct", "zipf"),
        long_context=1000,
    )
    found = [(case.name, case.kind, case.distinct, case.mix) for case in cases_of(workload)]
    assert found == [
        ("base", "base", 0, 0),
        ("LoRA enabled, none used", "enabled", 0, 0),
        ("1 adapter, rank 16", "adapters", 1, 0),
        ("8 distinct, rank 16", "adapters", 8, 0),
        ("64 distinct, rank 16", "adapters", 64, 0),
        ("zipf of 64, rank 16", "adapters", 64, 0),
        ("64 distinct, ranks 8/64", "adapters", 64, 1),
        ("1 x 1000 with 63 short", "long", 0, 0),
    ]
    alone = cases_of(Workload(batch=1, adapters=8))
    assert [case.name for case in alone if case.kind == "adapters"] == ["1 adapter, rank 16"]


def test_popularity() -> None:
    chooser, eight = random.Random(0), list("abcdefgh")
    assert assign(eight, 16, "distinct", chooser) == eight * 2
    assert assign(eight, 16, "identical", chooser) == ["a"] * 16
    zipf = assign(eight, 1000, "zipf", chooser)
    assert zipf.count("a") > 2 * zipf.count("d") > 0
    uniform = assign(eight, 1000, "uniform", chooser)
    assert all(80 < uniform.count(one) < 180 for one in eight)


def test_arrivals_are_poisson_and_seeded() -> None:
    load = Load(rate=20.0, seed=3)
    gaps = [one.gap for one in itertools.islice(requests_of(load), 20_000)]
    assert statistics.mean(gaps) == pytest.approx(1 / 20, rel=0.03)
    assert statistics.stdev(gaps) == pytest.approx(1 / 20, rel=0.03)  # of an exponential: its mean
    counts = [0] * int(sum(gaps))
    for at in itertools.accumulate(gaps):
        if at < len(counts):
            counts[int(at)] += 1
    assert statistics.variance(counts) == pytest.approx(20, rel=0.15)  # of a Poisson: its mean
    again = [one.gap for one in itertools.islice(requests_of(load), 100)]
    assert again == gaps[:100]
    other = [one.gap for one in itertools.islice(requests_of(Load(rate=20.0, seed=4)), 100)]
    assert other != again


def test_requests_do_not_depend_on_how_they_arrive() -> None:
    shape = {"adapters": ("a", "b", "c"), "popularity": "zipf", "input_tokens": Span(5, 50)}
    closed = itertools.islice(requests_of(Load(**shape)), 200)  # type: ignore[arg-type]
    opened = itertools.islice(requests_of(Load(**shape, rate=9.0)), 200)  # type: ignore[arg-type]
    for one, other in zip(closed, opened, strict=True):
        assert one.adapter == other.adapter and one.input_tokens == other.input_tokens
        assert 5 <= one.input_tokens <= 50


def test_cold_adapters_come_in_turn() -> None:
    load = Load(adapters=("warm",), cold=("c0", "c1", "c2"), cold_share=0.25)
    found = list(itertools.islice(requests_of(load), 16))
    assert [one.adapter for one in found if one.cold] == ["c0", "c1", "c2", "c0"]
    assert {one.adapter for one in found if not one.cold} == {"warm"}
    every = itertools.islice(requests_of(Load(cold=("x",), cold_share=1.0)), 9)
    assert all(one.cold for one in every)


def test_background() -> None:
    assert background_adapters(Load(background=2)) == [None, None]
    given = Load(background=3, adapters=("a", "b"), popularity="distinct")
    assert background_adapters(given) == ["a", "b", "a"]
