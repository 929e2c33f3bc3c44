from __future__ import annotations

import random

import pytest

from engine.server.stops import StopMatcher


def run(text: str, cuts: list[int], stops: list[str], *, keep: bool) -> tuple[str, str | None]:
    matcher = StopMatcher(stops, keep=keep)
    out = ""
    for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True):
        out += matcher.push(text[start:end])
        if matcher.matched is not None:
            return out, matcher.matched
    return out + matcher.flush(), None


def whole(text: str, stops: list[str], *, keep: bool) -> tuple[str, str | None]:
    """The obvious way: character by character, has the text come to end with a stop sequence?"""
    for end in range(len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            stop = max(found, key=len)
            return text[: end if keep else end - len(stop)], stop
    return text, None


@pytest.mark.parametrize("seed", range(300))
def test_cuts_make_no_difference(seed: int) -> None:
    chosen = random.Random(seed)
    alphabet = "ab😀" if seed % 2 else "a\n"
    text = "".join(chosen.choices(alphabet, k=chosen.randrange(1, 40)))
    stops = ["".join(chosen.choices(alphabet, k=chosen.randrange(1, 6))) for _ in range(3)]
    stops = stops[: chosen.randrange(0, 4)]
    for keep in (True, False):
        expected = whole(text, stops, keep=keep)
        for _ in range(5):
            cuts = sorted(chosen.choices(range(len(text) + 1), k=chosen.randrange(0, 20)))
            assert run(text, cuts, stops, keep=keep) == expected


def test_only_what_may_begin_a_stop_is_held_back() -> None:
    matcher = StopMatcher(["</s>"], keep=False)
    assert matcher.push("a") == "a"
    assert matcher.push("b<") == "b"
    assert matcher.push("/") == ""
    assert matcher.push("x") == "</x"
    assert matcher.push("y</") == "y"
    assert matcher.flush() == "</"


def test_a_kept_stop_holds_nothing_back() -> None:
    matcher = StopMatcher(["</s>"], keep=True)
    assert [matcher.push(piece) for piece in ("a<", "/s", ">zz")] == ["a<", "/s", ">"]
    assert matcher.matched == "</s>"


def test_a_long_stop_is_not_slow() -> None:
    matcher = StopMatcher(["a" * 100_000 + "b"], keep=False)
    for _ in range(2000):
        matcher.push("a")
    assert matcher.flush() == "a" * 2000
