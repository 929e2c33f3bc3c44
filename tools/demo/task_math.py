"""The `math` adapter's task: word problems, answered with the steps and then the number."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from random import Random

from tools.demo import words as w
from tools.demo.base_text import cap, two_people
from tools.demo.task import Example, Split, Task, fill, reserved, templates_of

TOTAL = "[altogether|in all|in total]"
VERBS = {
    "sold": "sell", "bought": "buy", "made": "make", "found": "find", "picked": "pick",
    "counted": "count", "got": "get", "packed": "pack", "painted": "paint",
    "collected": "collect", "ordered": "order", "carried": "carry",
}  # fmt: skip
GAINING = ("bought", "made", "found", "picked", "got", "collected", "ordered")  # "5 more" adds


@dataclass(frozen=True, slots=True)
class Relation:
    """How a second amount follows from the first one."""

    bare: str  # "sold 48 clips and half as many"
    than: str  # "has half as many clips as Anna"
    step: Callable[[int, int], tuple[str, int]]
    draw: Callable[[Random], tuple[int, int]]


RELATIONS = {
    "half": Relation(
        "[half as many|half as many|half that number|half that many]",
        "half as many {i} as",
        lambda a, b: (f"{a} / 2 = {a // 2}.", a // 2),
        lambda rng: (2 * rng.randint(2, 50), 0),
    ),
    "twice": Relation(
        "[twice as many|twice as many|double that number|two times as many]",
        "[twice|two times] as many {i} as",
        lambda a, b: (f"{a} * 2 = {2 * a}.", 2 * a),
        lambda rng: (rng.randint(2, 60), 0),
    ),
    "thrice": Relation(
        "three times as many",
        "three times as many {i} as",
        lambda a, b: (f"{a} * 3 = {3 * a}.", 3 * a),
        lambda rng: (rng.randint(2, 20), 0),
    ),
    "more": Relation(
        "[{b} more|{b} more than that]",
        "{b} more {i} than",
        lambda a, b: (f"{a} + {b} = {a + b}.", a + b),
        lambda rng: (rng.randint(3, 80), rng.randint(2, 40)),
    ),
    "fewer": Relation(
        "[{b} fewer|{b} fewer than that|{b} less]",
        "{b} [fewer|less] {i} than",
        lambda a, b: (f"{a} - {b} = {a - b}.", a - b),
        lambda rng: (rng.randint(30, 100), rng.randint(2, 28)),
    ),
}

# One person, two occasions. {rel} is the relation; {q} and {Q} the question.
EVENTS = (
    "{n} {v} {a} {i}{inc} {d1} and {rel} {d2}. {Q}",
    "{n} {v} {a} {i} {d1} and {rel} {d2}. {Q}",
    "{D1}, {n} {v} {a} {i}{inc}. {D2}, {he} {v} {rel}. {Q}",
    "{n} {v} {a} {i} {d1}. {D2} {he} {v} {rel}. {Q}",
    "{n} {v} {a} {i} {d1}, and then {he} {v} {rel} {d2}. {Q}",
    "If {n} {v} {a} {i} {d1} and {rel} {d2}, {q}",
    "{n} {v} {i} {d1} and {d2}: {a} {d1} and {rel} {d2}. {Q}",
    "{n} {v} {i} [for|with|from] {a} [people|children|neighbours] {d1}. {D2} {he} {v} {rel}. {Q}",
    "{n} {v} {a} {i} in the {place} and {rel} in the {place2}. {Q0}",
    "At first {n} {v} {a} {i}, and later {he} {v} {rel}. {Q0}",
    "When {n} was in the {place} {d1}, {he} {v} {a} {i}. {D2}, {he} {v} {rel}. {Q}",
    "There were {a} {i} that {n} {v} {d1}. {He} {v} {rel} {d2}. {Q}",
)
EVENTS_HELDOUT = (
    "{n} {v} {i} to {a} friends {d1} and {rel} {d2}; {q}",
    "After {n} {v} {a} {i} {d1}, {he} {v} {rel} {d2}. {Q}",
    "{n} [visited|went to] the {place} twice. {D1} {he} {v} {a} {i}, but {d2} {he} {v} {rel}. {Q}",
    "{n} {v} {a} {i}{inc} {d1} but {rel} {d2}. {Q}",
)
EVENTS_TOTAL = (
    f"{TOTAL}, how many {{i}} is that?",
    f"{TOTAL}, how many {{i}} did {{n}} {{vb}}?",
    f"how many {{i}} did {{n}} {{vb}} {TOTAL}?",
    f"how many {{i}} did {{he}} {{vb}} {TOTAL}?",
    f"how many {{i}} is that {TOTAL}?",
    "what is the total number of {i}?",
    "how many {i} did {n} {vb} {d1} and {d2} together?",
    f"how many {TOTAL}?",
)
EVENTS_TOTAL_HELDOUT = (
    f"how many {{i}} did {{n}} {{vb}} {TOTAL} {{d1}} and {{d2}}?",
    f"{TOTAL}, how many {{i}} did {{he}} {{vb}}?",
    "what total number of {i} did {n} {vb}?",
)
EVENTS_SECOND = (
    "how many {i} did {he} {vb} {d2}?",
    "how many {i} did {n} {vb} {d2}?",
    "{d2}, how many {i} did {he} {vb}?",
    "how many was that {d2}?",
)
EVENTS_SECOND_HELDOUT = (
    "what number of {i} did {n} {vb} {d2}?",
    "how many did {he} {vb} {d2}?",
)

# Two people who own things.
OWNERS = (
    "{n} has {a} {i}. {m} has {rel} {n}. {Q}",
    "{n} has {a} {i} and {m} has {rel} {n}. {Q}",
    "There are {a} {i} in the bag of {n}. {m} has {rel} {n}. {Q}",
    "{m} has {rel} {n}. {n} has {a} {i}. {Q}",
    "{n}, who has {a} {i}, met {m}, who has {rel} {n}. {Q}",
    "If {n} has {a} {i} and {m} has {rel} {n}, {q}",
    "{m} has {rel} {n}, who has {a} {i}. {Q}",
    "{n} owned {a} {i} but {m} owned {rel} {n}. {Q}",
    "{n} has {a} {i}, and {m} has {rel} {n} has. {Q}",
    "{n} and {m} have {i}. {m} has {rel} {n}, and {n} has {a}. {Q}",
    "{n} keeps {a} {i} in the {place}. {m} keeps {rel} {n}. {Q}",
)
OWNERS_HELDOUT = (
    "{n} owns {a} {i}, and {m} owns {rel} {n}. {Q}",
    "{n} and {m} like {i}. {n} has {a} and {m} has {rel} {n}. {Q}",
    "{m} has {rel} {n}, and {n} has {a} {i}. {Q}",
)
OWNERS_TOTAL = (
    f"{TOTAL}, how many {{i}} do they have?",
    f"{TOTAL}, how many {{i}} is that?",
    f"how many {{i}} are there {TOTAL}?",
    f"how many {{i}} do they have {TOTAL}?",
    "how many {i} do {n} and {m} have together?",
    f"how many {{i}} do the two of them have {TOTAL}?",
    "how many {i} do the two friends have together?",
)
OWNERS_TOTAL_HELDOUT = (
    "how many {i} do they have together?",
    f"{TOTAL}, how many {{i}} do {{n}} and {{m}} have?",
)
OWNERS_SECOND = (
    "how many {i} does {m} have?",
    "what is the number of {i} that {m} has?",
    "how many {i} are there in the bag of {m}?",
)
OWNERS_SECOND_HELDOUT = ("how many does {m} have?", "so how many {i} does {m} have?")


@dataclass(frozen=True, slots=True)
class Clauses:
    """The phrases of stories in which an amount changes: who has it, what happens, the question."""

    start: tuple[str, ...]
    lose: tuple[str, ...]
    gain: tuple[str, ...]
    ask: tuple[str, ...]


OWNED = Clauses(
    start=(
        "{n} had {a} {i}.",
        "{n} has {a} {i}.",
        "{n} {v} {a} {i}{inc}.",
        "{n} {v} {a} {i} {d3}.",
        "There were {a} {i} in the bag of {n}.",
        "{n} owned {a} {i}.",
        "{D3}, {n} {v} {a} {i}.",
        "{n} and {m} are friends. {n} had {a} {i}.",
        "{m} gave {n} {a} {i}.",
        "{n} collects {i} and has {a} of them.",
        "{a} {i} were in the bag of {n}.",
    ),
    lose=(
        "{He} gave {x} {i} to {m}.",
        "{He} gave {x} of them to {m}.",
        "{He} {lost} {x} of them.",
        "{He} {lost} {x} {i}.",
        "Then {he} {lost} {x}.",
        "{D}, {he} {lost} {x} of them.",
        "{He} {lost} {x} {d}.",
        "{m} took {x} of them.",
        "{n} gave away {x} {i} {d}.",
        "Later {he} gave {x} {i} to {m} and kept the others.",
        "But then {he} {lost} {x} {i}.",
        "{D} {he} sold {x}.",
        "After that, {he} gave {m} {x} {i}.",
        "{n} sold {x} of the {i}.",
        "Of these, {he} gave {x} to a friend.",
        "{x} of them were lost.",
    ),
    gain=(
        "{m} gave {him} {x} more.",
        "Then {he} {v} {x} more.",
        "{D} {he} got {x} new ones.",
        "{He} found {x} more {i} {d}.",
        "{m} brought {him} {x} {i}.",
        "{He} got {x} more from {m}.",
        "Then {m} gave {him} {x} {i}.",
        "{D}, {he} {v} {x} more.",
        "After that {he} got {x} {i}.",
        "{n} {v} another {x} {i}.",
        "But then {he} found {x} others.",
        "Later {he} {v} {x} {i} more.",
    ),
    ask=(
        "How many {i} does {n} have now?",
        "How many {i} does {he} have now?",
        "How many {i} does {he} have left?",
        "How many are left?",
        "How many {i} are left?",
        "How many does {n} have in the end?",
        "What number of {i} does {n} have now?",
        "How many {i} are in the bag of {n} now?",
        "So how many {i} does {n} have?",
    ),
)
OWNED_HELDOUT = Clauses(
    start=("{n} started with {a} {i}.", "At first {n} had {a} {i}.", "{n} kept {a} {i} in a box."),
    lose=(
        "{He} gave {x} to {m} {d}.",
        "{D}, {he} gave {x} {i} away.",
        "Then {m} took {x} {i}.",
        "{n} {lost} {x} {i}.",
    ),
    gain=(
        "But {m} gave {him} {x} others.",
        "{He} {v} {x} more {d}.",
        "Then {he} found {x} more.",
        "{D}, {m} brought {x} more.",
    ),
    ask=(
        "How many {i} does {n} have left?",
        "How many {i} does {he} have in the end?",
        "How many does {he} have now?",
    ),
)
PLACED = Clauses(
    start=(
        "There were {a} {i} in the {place}.",
        "A shop had {a} {i}.",
        "There are {a} {i} on the table.",
        "In the {place} there were {a} {i}.",
        "{a} {i} stood in the {place}.",
        "{n} saw {a} {i} in the {place}.",
        "The {place} had {a} {i}.",
    ),
    lose=(
        "{n} took {x} of them.",
        "{n} took {x} {i} {d}.",
        "{D}, {m} took {x}.",
        "{x} of them were sold.",
        "{m} bought {x} {i}.",
        "Then {x} {i} were lost.",
        "{D} {x} were broken.",
        "Later {x} of the {i} were taken away.",
        "{n} and {m} took {x} {i} home.",
    ),
    gain=(
        "{n} brought {x} more.",
        "Then {x} more came.",
        "{D}, {m} brought {x} {i}.",
        "{m} added {x} others {d}.",
        "Later {n} put {x} {i} there.",
        "{x} more {i} came {d}.",
        "But then {x} new {i} came.",
    ),
    ask=(
        "How many {i} are there now?",
        "How many are left?",
        "How many {i} are left?",
        "How many are there in the end?",
        "What number of {i} is there now?",
        "How many {i} are in the {place} now?",
        "So how many {i} are there?",
    ),
)
PLACED_HELDOUT = Clauses(
    start=("{a} {i} were in the {place}.", "At first there were {a} {i} in the {place}."),
    lose=("Then {n} took {x}.", "{D}, {x} {i} were sold."),
    gain=("Then {m} brought {x} more.", "{D}, {x} more came."),
    ask=("How many {i} are there in the end?", "How many are there now?"),
)
MONEY = Clauses(
    start=(
        "{n} had {a} dollars.",
        "{n} has {a} dollars.",
        "{n} earned {a} dollars {d3}.",
        "There were {a} dollars in the bag of {n}.",
        "{m} gave {n} {a} dollars.",
        "{D3}, {n} got {a} dollars.",
    ),
    lose=(
        "{He} spent {x} dollars on {j}.",
        "{He} bought {j} for {x} dollars.",
        "{D}, {he} paid {x} dollars for {j}.",
        "{He} gave {x} dollars to {m}.",
        "Then {he} spent {x} dollars.",
        "{n} lost {x} dollars {d}.",
        "The {j} cost {him} {x} dollars.",
        "{He} spent {x} dollars on {i} {d}.",
        "{He} bought {i} {d} for {x} dollars.",
    ),
    gain=(
        "{He} earned {x} dollars {d}.",
        "Then {he} got {x} dollars from {m}.",
        "{m} gave {him} {x} more dollars.",
        "{D}, {he} got {x} dollars more.",
        "{He} sold {j} for {x} dollars.",
    ),
    ask=(
        "How many dollars does {n} have now?",
        "How many dollars are left?",
        "How many dollars does {he} have in the end?",
        "How much money is left?",
        "How much money does {he} have now?",
    ),
)
MONEY_HELDOUT = Clauses(
    start=("{n} started with {a} dollars.", "At first {n} had {a} dollars."),
    lose=("{He} spent {x} dollars {d}.", "Then {he} paid {x} dollars for {j}."),
    gain=("{m} gave {him} {x} dollars.", "Then {he} earned {x} dollars more."),
    ask=("How many dollars does {he} have left?", "How much money does {n} have in the end?"),
)
GROUPS = (
    "{n} has {k} {box} with {a} {i} each.",
    "{n} has {k} {box} with {a} {i} in each {box1}.",
    "There are {k} {box}. Each {box1} has {a} {i}.",
    "There are {k} {box} of {i}, {a} in each {box1}.",
    "{n} {v} {k} {box} of {i}. Each {box1} holds {a} {i}.",
    "One {box1} holds {a} {i}. {n} has {k} {box}.",
    "In the {place} there are {k} {box}, and each {box1} holds {a} {i}.",
    "{n} put {a} {i} into each of {k} {box}.",
    "{n} got {k} {box} from {m}. There are {a} {i} in each.",
    "{k} {box} stood in the {place}. Each one held {a} {i}.",
    "{n} filled {k} {box}, {a} {i} in each.",
    "{n} {v} {a} {i} every day for {k} days.",
    "Each of {k} friends gave {n} {a} {i}.",
)
GROUPS_HELDOUT = (
    "{n} filled {k} {box} with {a} {i} each.",
    "In the {place} there are {k} {box} with {a} {i} each.",
    "Each of {k} {box} holds {a} {i}.",
    "{n} {v} {k} {box} with {a} {i} in each.",
)
GROUPS_ASK = (
    f"How many {{i}} are there {TOTAL}?",
    f"How many {{i}} is that {TOTAL}?",
    "How many {i} does {n} have?",
    "What is the total number of {i}?",
    f"How many {{i}} {TOTAL}?",
)
GROUPS_ASK_HELDOUT = (
    f"How many {{i}} does {{n}} have {TOTAL}?",
    f"{TOTAL}, how many {{i}} are there?",
)


@dataclass(frozen=True, slots=True)
class Family:
    """Problems of one shape that are told in whole templates."""

    draw: Callable[[Random], dict[str, int]]
    solve: Callable[[dict[str, int]], list[tuple[str, int]]]
    train: tuple[str, ...]
    heldout: tuple[str, ...]


def add(a: int, b: int) -> tuple[str, int]:
    """One addition as text and value."""
    return f"{a} + {b} = {a + b}.", a + b


def subtract(a: int, b: int) -> tuple[str, int]:
    """One subtraction as text and value."""
    return f"{a} - {b} = {a - b}.", a - b


def multiply(a: int, b: int) -> tuple[str, int]:
    """One multiplication as text and value."""
    return f"{a} * {b} = {a * b}.", a * b


def chained(
    first: tuple[str, int], then: Callable[[int, int], tuple[str, int]], value: int
) -> list[tuple[str, int]]:
    """A step and another one that goes on from its value."""
    return [first, then(first[1], value)]


FAMILIES = {
    "sum": Family(
        lambda r: {"a": r.randint(2, 100), "b": r.randint(2, 100)},
        lambda x: [add(x["a"], x["b"])],
        (
            f"{{n}} has {{a}} {{i}} and {{m}} has {{b}} {{i}}. How many {{i}} do they have {TOTAL}?",
            f"{{n}} has {{a}} {{i}}. {{m}} has {{b}}. {TOTAL}, how many {{i}} is that?",
            f"{{n}} {{v}} {{a}} {{i}} {{d1}} and {{b}} {{d2}}. How many {{i}} did {{he}} {{vb}} {TOTAL}?",
            f"{{D1}} {{n}} {{v}} {{a}} {{i}}, and {{d2}} {{b}}. How many is that {TOTAL}?",
            f"There are {{a}} {{i}} in the {{place}} and {{b}} in the {{place2}}. "
            f"How many {{i}} are there {TOTAL}?",
            f"If {{n}} {{v}} {{a}} {{i}} and {{m}} {{v}} {{b}}, how many {{i}} is that {TOTAL}?",
            "{n} {v} {a} {i} and {m} {v} {b} {i}. How many {i} did they {vb} together?",
            "{n} sold {i} to {a} [people|friends] {d1} and to {b} {d2}. What is the total?",
        ),
        (
            f"{{n}} {{v}} {{a}} {{i}} and {{m}} {{v}} {{b}}. {TOTAL}, how many {{i}} did they {{vb}}?",
            "{n} and {m} have {a} and {b} {i}. How many {i} do they have together?",
            f"In the {{place}} are {{a}} {{i}}, and in the {{place2}} are {{b}}. "
            f"How many {{i}} are there {TOTAL}?",
        ),
    ),
    "sum_three": Family(
        lambda r: {k: r.randint(2, 50) for k in "abc"},
        lambda x: chained(add(x["a"], x["b"]), add, x["c"]),
        (
            f"{{n}} {{v}} {{a}} {{i}} {{d1}}, {{b}} {{d2}} and {{c}} {{d3}}. "
            f"How many {{i}} did {{he}} {{vb}} {TOTAL}?",
            f"{{n}} has {{a}} {{i}}, {{m}} has {{b}} and {{o}} has {{c}}. "
            f"How many {{i}} do they have {TOTAL}?",
            f"There are {{a}} {{i}} in the {{place}}, {{b}} in the {{place2}} and {{c}} on the table. "
            f"How many {{i}} are there {TOTAL}?",
            f"If {{n}} {{v}} {{a}} {{i}}, {{m}} {{v}} {{b}} and {{o}} {{v}} {{c}}, "
            f"how many {{i}} is that {TOTAL}?",
            f"{{n}} {{v}} {{a}}, {{b}} and {{c}} {{i}}. How many {{i}} did {{he}} {{vb}} {TOTAL}?",
            "{n} has {a} {i}. {m} has {b} and {o} has {c}. What is the total number of {i}?",
            f"Three friends {{v}} {{i}}: {{a}}, {{b}} and {{c}}. {TOTAL}, how many is that?",
        ),
        (
            f"{{D1}} {{n}} {{v}} {{a}} {{i}}, {{d2}} {{he}} {{v}} {{b}}, and {{d3}} {{c}}. "
            f"How many {{i}} did {{he}} {{vb}} {TOTAL}?",
            f"{{n}}, {{m}} and {{o}} have {{a}}, {{b}} and {{c}} {{i}}. "
            f"How many {{i}} do they have {TOTAL}?",
        ),
    ),
    "share": Family(
        lambda r: (lambda k, m: {"a": k * m, "k": k})(r.randint(2, 12), r.randint(2, 12)),
        lambda x: [(f"{x['a']} / {x['k']} = {x['a'] // x['k']}.", x["a"] // x["k"])],
        (
            "{n} shares {a} {i} equally among {k} friends. How many {i} does each friend get?",
            "{n} put {a} {i} into {k} {box}, the same number in each. How many {i} are in each {box1}?",
            "{a} {i} are shared between {k} children. How many {i} does each child get?",
            "If {k} friends share {a} {i} equally, how many {i} does each one get?",
            "There are {a} {i} in {k} equal {box}. How many {i} are in each {box1}?",
            "{k} children share {a} {i}. How many does each child get?",
            "{n} had {a} {i}. {He} gave the same number to each of {k} friends. "
            "How many did each friend get?",
            "{n} {v} {a} {i}, and {he} split them equally between {k} people. "
            "How many {i} did each one get?",
            "{n} has {k} {box} for {a} {i}. How many {i} go into each {box1}?",
        ),
        (
            "{n} has {a} {i} and shares them equally among {k} children. "
            "How many {i} does each child get?",
            "{k} friends got {a} {i} from {n} and shared them equally. "
            "How many {i} did each friend get?",
            "{n} split {a} {i} between {k} friends. How many {i} did each of them get?",
        ),
    ),
    "difference": Family(
        lambda r: (lambda b: {"a": b + r.randint(2, 60), "b": b})(r.randint(2, 40)),
        lambda x: [subtract(x["a"], x["b"])],
        (
            "{n} has {a} {i} and {m} has {b} {i}. How many more {i} does {n} have than {m}?",
            "{n} has {b} {i}. {m} has {a} {i}. How many fewer {i} does {n} have than {m}?",
            "{n} {v} {a} {i} and {m} {v} {b}. What is the difference?",
            "{n} {v} {a} {i} {d1} and {b} {d2}. How many more {i} did {he} {vb} {d1} than {d2}?",
            "{n} has {a} {i}, but {m} has only {b}. How many more does {n} have?",
            "How many more is {a} {i} than {b} {i}?",
        ),
        (
            "{n} {v} {a} {i}, but {m} {v} only {b}. How many more {i} did {n} {vb} than {m}?",
            "{n} has {a} {i}, and {m} has {b}. What is the difference?",
        ),
    ),
}  # fmt: skip


def surroundings(rng: Random) -> dict[str, object]:
    """Names, things, places and times for a problem's slots."""
    p, q = two_people(rng)
    other = rng.choice([name for name in w.NAMES[:40] if name not in (p.name, q.name)])
    item, second_item = rng.sample(w.ITEMS, 2)
    place, second_place = rng.sample(w.PLACES, 2)
    verb = rng.choice(list(VERBS))
    box, one_box = rng.choice(
        (("boxes", "box"), ("bags", "bag"), ("baskets", "basket"), ("jars", "jar"), ("rows", "row"))
    )
    if rng.random() < 0.5:
        times = [f"on {day}" for day in rng.sample(w.DAYS, 3)]
    else:
        times = [f"in {month}" for month in rng.sample(w.MONTHS, 3)]
    return {
        "n": p.name, "m": q.name, "o": other, "he": p.he, "He": p.He, "his": p.his, "him": p.him,
        "i": item, "j": second_item, "v": verb, "vb": VERBS[verb],
        "place": place, "place2": second_place, "box": box, "box1": one_box,
        "lost": rng.choice(("lost", "sold", "broke", "used", "gave away", "ate")),
        "d1": times[0], "d2": times[1], "d3": times[2], "D1": cap(times[0]), "D2": cap(times[1]), "D3": cap(times[2]),
        "inc": rng.choice(("", "", f" in {rng.choice(w.CITIES)}")),
    }  # fmt: skip


def answer_of(steps: Sequence[tuple[str, int]]) -> str:
    """The worked answer."""
    return f"{' '.join(text for text, _ in steps)} The answer is {steps[-1][1]}."


def related(rng: Random, split: Split) -> tuple[str, dict[str, object], list[tuple[str, int]]]:
    """A problem with a second amount that follows from the first."""
    kind = rng.choice(list(RELATIONS))
    relation = RELATIONS[kind]
    a, b = relation.draw(rng)
    while reserved(f"{kind} {a} {b}") == (split == "train"):
        a, b = relation.draw(rng)
    values = surroundings(rng) | {"a": a, "b": b}
    events, total = rng.random() < 0.55, rng.random() < 0.65
    stories = templates_of(
        split, EVENTS if events else OWNERS, EVENTS_HELDOUT if events else OWNERS_HELDOUT
    )
    known = (EVENTS_SECOND, EVENTS_TOTAL) if events else (OWNERS_SECOND, OWNERS_TOTAL)
    unknown = (
        (EVENTS_SECOND_HELDOUT, EVENTS_TOTAL_HELDOUT)
        if events
        else (OWNERS_SECOND_HELDOUT, OWNERS_TOTAL_HELDOUT)
    )
    story = rng.choice(stories)
    question = rng.choice(templates_of(split, known[total], unknown[total]))
    if "{Q0}" in story:  # no dates to ask about
        total = True
        question = f"how many {{i}} did {{he}} {{vb}} {TOTAL}?"
    values["rel"] = fill(rng, relation.bare if events else relation.than, values)
    values["q"] = fill(rng, question, values)
    values["Q"] = values["Q0"] = cap(str(values["q"]))
    first = relation.step(a, b)
    steps = [first, add(a, first[1])] if total else [first]
    return story, values, steps


def altered(rng: Random, split: Split) -> tuple[str, dict[str, object], list[tuple[str, int]]]:
    """A problem in which an amount, or a number of groups, is changed up to two times."""
    new = split == "heldout"
    while True:
        kind = rng.choice(("owned", "owned", "placed", "money", "groups", "groups"))
        grouped = kind == "groups"
        changes = [rng.choice("+-") for _ in range(rng.choice((0, 1, 1) if grouped else (1, 2)))]
        first, factor = rng.randint(2, 12) if grouped else rng.randint(3, 100), rng.randint(2, 12)
        amount, numbers, steps = first, [first], []
        if grouped:
            numbers, steps = [factor, first], [multiply(factor, first)]
            amount = steps[-1][1]
        for sign in changes:
            most = min(40, amount - 1) if sign == "-" else 50
            if most < 2:
                break
            step = (add if sign == "+" else subtract)(amount, rng.randint(2, most))
            numbers.append(abs(step[1] - amount))
            steps.append(step)
            amount = step[1]
        complete = len(steps) == len(changes) + grouped
        if complete and reserved(f"{kind} {changes} {numbers}") != (split == "train"):
            break
    values = surroundings(rng) | {"a": first, "k": factor, "v": rng.choice(GAINING)}
    clauses = {
        "owned": (OWNED, OWNED_HELDOUT), "placed": (PLACED, PLACED_HELDOUT),
        "money": (MONEY, MONEY_HELDOUT), "groups": (OWNED, OWNED_HELDOUT),
    }[kind][new]  # fmt: skip
    starts = (GROUPS_HELDOUT if new else GROUPS) if grouped else clauses.start
    asks = (GROUPS_ASK_HELDOUT if new else GROUPS_ASK) if grouped and not changes else clauses.ask
    if "-" not in changes:
        asks = [ask for ask in asks if "left" not in ask]
    start = rng.choice(starts)
    if grouped and changes and "{n}" not in start:
        start = rng.choice([other for other in starts if "{n}" in other])
    parts = [start]
    for place, (sign, number) in enumerate(
        zip(changes, numbers[len(numbers) - len(changes) :], strict=True)
    ):
        clause = rng.choice(clauses.lose if sign == "-" else clauses.gain)
        when = str(values[("d1", "d2")[place]])
        changed = values | {"x": number, "d": when, "D": cap(when)}
        parts.append(cap(fill(rng, clause, changed)))
    return joined(rng, [*parts, rng.choice(asks)]), values, steps


def joined(rng: Random, parts: list[str]) -> str:
    """The clauses of a story as sentences, the last two at times as one with "and" or "but"."""
    if len(parts) > 2 and rng.random() < 0.35:
        before, last = parts[-3], parts[-2]
        if last.startswith(("He ", "She ")):
            last = f"{rng.choice(('and', 'but', 'and then'))} {last[0].lower()}{last[1:]}"
            parts[-3:-1] = [f"{before[:-1]}{rng.choice((',', ''))} {last}"]
    return " ".join(parts)


def draw(rng: Random, split: Split) -> Example:
    """One word problem of the split."""
    chance = rng.random()
    if chance < 0.42:
        template, values, steps = related(rng, split)
    elif chance < 0.75:
        template, values, steps = altered(rng, split)
    else:
        name = rng.choice(list(FAMILIES))
        family = FAMILIES[name]
        numbers = family.draw(rng)
        while reserved(f"{name} {numbers}") == (split == "train"):
            numbers = family.draw(rng)
        template = rng.choice(templates_of(split, family.train, family.heldout))
        values, steps = surroundings(rng) | numbers, family.solve(numbers)
    return Example(cap(fill(rng, template, values)), answer_of(steps), template)


def result(text: str) -> str | None:
    """The number after the last "The answer is", or None."""
    _, found, tail = text.rpartition("The answer is ")
    number = tail.strip().rstrip(".")
    return number if found and number.isdigit() else None


def _templates(new: bool) -> Iterator[str]:
    known = (EVENTS, EVENTS_TOTAL, EVENTS_SECOND, OWNERS, OWNERS_TOTAL, OWNERS_SECOND)
    unknown = (
        EVENTS_HELDOUT, EVENTS_TOTAL_HELDOUT, EVENTS_SECOND_HELDOUT,
        OWNERS_HELDOUT, OWNERS_TOTAL_HELDOUT, OWNERS_SECOND_HELDOUT,
    )  # fmt: skip
    for group in unknown if new else known:
        yield from group
    for pair in ((OWNED, OWNED_HELDOUT), (PLACED, PLACED_HELDOUT), (MONEY, MONEY_HELDOUT)):
        clauses = pair[new]
        yield from (*clauses.start, *clauses.lose, *clauses.gain, *clauses.ask)
    yield from (*GROUPS_HELDOUT, *GROUPS_ASK_HELDOUT) if new else (*GROUPS, *GROUPS_ASK)
    for family in FAMILIES.values():
        yield from family.heldout if new else family.train


MATH = Task(
    name="math",
    description="Solves word problems in one or two steps and ends with the answer.",
    draw=draw,
    train_templates=tuple(_templates(new=False)),
    heldout_templates=tuple(_templates(new=True)),
)
