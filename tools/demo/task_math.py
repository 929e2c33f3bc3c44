"""The `math` adapter's task: word problems, answered with the steps and then the number."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
    "There were {a} {i} that {n} {v} {d1}. {He} {v} {rel} {d2}. {Q}",
)
EVENTS_HELDOUT = (
    "{n} {v} {i} to {a} friends {d1} and {rel} {d2}; {q}",
    "After {n} {v} {a} {i} {d1}, {he} {v} {rel} {d2}. {Q}",
    "{n} [visited|went to] the {place} twice. {D1} {he} {v} {a} {i}, but {d2} {he} {v} {rel}. {Q}",
    "{n} {v} {a} {i}{inc} {d1} but {rel} {d2}. {Q}",
)
EVENTS_TOTAL = (
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
    "{n} keeps {a} {i} in the {place}. {m} keeps {rel} {n}. {Q}",
)
OWNERS_HELDOUT = (
    "{n} owns {a} {i}, and {m} owns {rel} {n}. {Q}",
    "{n} and {m} like {i}. {n} has {a} and {m} has {rel} {n}. {Q}",
    "{m} has {rel} {n}, and {n} has {a} {i}. {Q}",
)
OWNERS_TOTAL = (
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
class Family:
    """Problems of one shape that need no relation: numbers, steps and whole templates."""

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
            f"{{n}} {{v}} {{a}} {{i}} {{d1}} and {{b}} {{d2}}. How many {{i}} did {{he}} {{vb}} {TOTAL}?",
            "{n} had {a} {i}. {m} gave {him} {b} more. How many {i} does {n} have now?",
            f"There are {{a}} {{i}} in the {{place}} and {{b}} in the {{place2}}. How many {{i}} are there {TOTAL}?",
            "{n} had {a} {i} and then {v} {b} [more|others]. How many {i} does {he} have now?",
            f"If {{n}} {{v}} {{a}} {{i}} and {{m}} {{v}} {{b}}, how many {{i}} is that {TOTAL}?",
        ),
        (
            "{n} started with {a} {i} and got {b} more from {m}. How many {i} does {he} have now?",
            f"{{n}} {{v}} {{a}} {{i}} and {{m}} {{v}} {{b}}. {TOTAL}, how many {{i}} did they {{vb}}?",
            "{a} {i} were in the {place}. Then {n} brought {b} more. How many {i} are there now?",
        ),
    ),
    "left": Family(
        lambda r: (lambda b: {"a": b + r.randint(1, 70), "b": b})(r.randint(2, 40)),
        lambda x: [subtract(x["a"], x["b"])],
        (
            "{n} had {a} {i}. {He} gave {b} {i} to {m}. How many {i} does {n} have left?",
            "{n} had {a} {i} and {lost} {b} of them. How many {i} are left?",
            "There were {a} {i} in the {place}. {n} took {b}. How many {i} are left?",
            "{n} {v} {a} {i} and gave away {b}. How many {i} does {he} have now?",
            "A shop had {a} {i}. It sold {b} of them {d1}. How many {i} were left?",
            "If {n} has {a} {i} and gives {b} to {m}, how many {i} does {he} have left?",
        ),
        (
            "{n} started with {a} {i} and {lost} {b} of them. How many {i} does {he} have now?",
            "Of the {a} {i} that {n} had, {he} gave {b} to {m}. How many {i} are left?",
            "{n} had {a} {i}, but {d1} {he} {lost} {b}. How many {i} does {he} have left?",
        ),
    ),
    "left_then_more": Family(
        lambda r: (lambda b: {"a": b + r.randint(1, 60), "b": b, "c": r.randint(2, 40)})(
            r.randint(2, 35)
        ),
        lambda x: chained(subtract(x["a"], x["b"]), add, x["c"]),
        (
            "{n} had {a} {i}. {He} gave {b} to {m} and then {v} {c} more. How many {i} does {he} have now?",
            "There were {a} {i} in the {place}. {n} took {b}, and {m} brought {c}. How many {i} are there now?",
            "{n} had {a} {i}. {He} {lost} {b} of them {d1} and got {c} new ones {d2}. How many {i} does {n} have now?",
            "A shop had {a} {i}. It sold {b} {d1}, and {c} more came {d2}. How many {i} does the shop have now?",
            "If {n} has {a} {i}, gives away {b} and gets {c} more, how many {i} does {he} have?",
        ),
        (
            "{n} had {a} {i}. {He} {lost} {b}, but then {m} gave {him} {c} more. How many {i} does {he} have now?",
            "{n} had {a} {i}. {D1} {he} gave {b} to {m}. {D2} {he} {v} {c} more. How many {i} does {n} have?",
        ),
    ),
    "left_twice": Family(
        lambda r: (lambda b, c: {"a": b + c + r.randint(1, 50), "b": b, "c": c})(
            r.randint(2, 25), r.randint(2, 25)
        ),
        lambda x: chained(subtract(x["a"], x["b"]), subtract, x["c"]),
        (
            "{n} had {a} {i}. {He} gave {b} to {m} and {lost} {c}. How many {i} does {he} have left?",
            "There were {a} {i} in the {place}. {n} took {b} and {m} took {c}. How many {i} are left?",
            "A shop had {a} {i}. It sold {b} {d1} and {c} {d2}. How many {i} are left?",
            "{n} {v} {a} {i}. {He} gave {b} {i} to {m} and {c} to a friend. How many {i} does {he} have now?",
        ),
        (
            "{n} had {a} {i}. {He} {lost} {b} {d1} and {c} more {d2}. How many {i} are left?",
            "Of {a} {i}, {n} sold {b} {d1} and {c} {d2}. How many {i} does {he} have left?",
        ),
    ),
    "sum_three": Family(
        lambda r: {k: r.randint(2, 50) for k in "abc"},
        lambda x: chained(add(x["a"], x["b"]), add, x["c"]),
        (
            f"{{n}} {{v}} {{a}} {{i}} {{d1}}, {{b}} {{d2}} and {{c}} {{d3}}. How many {{i}} did {{he}} {{vb}} {TOTAL}?",
            f"{{n}} has {{a}} {{i}}, {{m}} has {{b}} and {{o}} has {{c}}. How many {{i}} do they have {TOTAL}?",
            f"There are {{a}} {{i}} in the {{place}}, {{b}} in the {{place2}} and {{c}} on the table. How many {{i}} are there {TOTAL}?",
            f"If {{n}} {{v}} {{a}} {{i}}, {{m}} {{v}} {{b}} and {{o}} {{v}} {{c}}, how many {{i}} is that {TOTAL}?",
        ),
        (
            f"{{D1}} {{n}} {{v}} {{a}} {{i}}, {{d2}} {{he}} {{v}} {{b}}, and {{d3}} {{c}}. How many {{i}} did {{he}} {{vb}} {TOTAL}?",
            f"{{n}}, {{m}} and {{o}} have {{a}}, {{b}} and {{c}} {{i}}. How many {{i}} do they have {TOTAL}?",
        ),
    ),
    "groups": Family(
        lambda r: {"k": r.randint(2, 12), "a": r.randint(2, 12)},
        lambda x: [multiply(x["k"], x["a"])],
        (
            f"There are {{k}} {{box}}. Each {{box1}} has {{a}} {{i}}. How many {{i}} are there {TOTAL}?",
            "{n} has {k} {box} with {a} {i} in each {box1}. How many {i} does {he} have?",
            f"{{n}} {{v}} {{k}} {{box}} of {{i}}. Each {{box1}} holds {{a}} {{i}}. How many {{i}} is that {TOTAL}?",
            "{n} gave {a} {i} to each of {k} friends. How many {i} did {he} give away?",
            f"If one {{box1}} holds {{a}} {{i}}, how many {{i}} do {{k}} {{box}} hold {TOTAL}?",
            "{n} bought {k} {i} for {a} dollars each. How many dollars did {he} pay?",
        ),
        (
            f"{{n}} filled {{k}} {{box}} with {{a}} {{i}} each. How many {{i}} are there {TOTAL}?",
            "In the {place} there are {k} {box} with {a} {i} each. How many {i} are in the {place}?",
            "Each of {k} {box} holds {a} {i}. How many {i} does {n} have?",
        ),
    ),
    "groups_and": Family(
        lambda r: {"k": r.randint(2, 12), "a": r.randint(2, 12), "b": r.randint(2, 40)},
        lambda x: chained(multiply(x["k"], x["a"]), add, x["b"]),
        (
            f"{{n}} has {{k}} {{box}} with {{a}} {{i}} each and {{b}} more {{i}}. How many {{i}} does {{he}} have {TOTAL}?",
            "There are {k} {box} of {a} {i}. {n} adds {b} more {i}. How many {i} are there now?",
            f"{{n}} {{v}} {{k}} {{box}} of {{i}}. Each {{box1}} holds {{a}} {{i}}. {{He}} also {{v}} {{b}} {{i}} alone. How many {{i}} is that {TOTAL}?",
            "{n} had {b} {i}. Then {he} bought {k} {box} with {a} {i} in each {box1}. How many {i} does {he} have now?",
        ),
        (
            "{n} filled {k} {box} with {a} {i} each. Then {he} found {b} more. How many {i} does {n} have now?",
            f"There are {{k}} {{box}} with {{a}} {{i}} in each {{box1}}, and {{b}} {{i}} on the table. How many {{i}} are there {TOTAL}?",
        ),
    ),
    "groups_without": Family(
        lambda r: (
            lambda k, a: {"k": k, "a": a, "b": r.randint(2, max(2, min(k * a - 1, 40)))}
        )(r.randint(2, 12), r.randint(2, 12)),
        lambda x: chained(multiply(x["k"], x["a"]), subtract, x["b"]),
        (
            "{n} has {k} {box} with {a} {i} each. {He} gives {b} {i} to {m}. How many {i} are left?",
            "There are {k} {box} of {a} {i}. {n} takes {b} {i}. How many {i} are left?",
            "{n} {v} {k} {box} of {i}. Each {box1} holds {a} {i}. {He} {lost} {b} of them. How many {i} does {he} have left?",
            "If {n} has {k} {box} with {a} {i} in each {box1} and sells {b} {i}, how many {i} are left?",
        ),
        (
            "{n} filled {k} {box} with {a} {i} each. Then {he} gave {b} to {m}. How many {i} does {n} have left?",
            "In the {place} there were {k} {box} with {a} {i} each, but {n} {lost} {b} of them. How many {i} are left?",
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
            "There are {a} {i} in {k} equal rows. How many {i} are in each row?",
        ),
        (
            "{n} has {a} {i} and shares them equally among {k} children. How many {i} does each child get?",
            "{k} friends got {a} {i} from {n} and shared them equally. How many {i} did each friend get?",
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
        ),
        (
            "{n} {v} {a} {i}, but {m} {v} only {b}. How many more {i} did {n} {vb} than {m}?",
            "{n} has {a} {i}, and {m} has {b}. What is the difference?",
        ),
    ),
    "change": Family(
        lambda r: (lambda b, c: {"a": b + c + r.randint(1, 50), "b": b, "c": c})(
            r.randint(2, 30), r.randint(2, 30)
        ),
        lambda x: chained(add(x["b"], x["c"]), lambda s, a: subtract(a, s), x["a"]),
        (
            "{n} had {a} dollars. {He} bought {i} for {b} dollars and {j} for {c} dollars. How much money is left?",
            "{n} has {a} dollars. The {i} cost {b} dollars and the {j} cost {c} dollars. How many dollars are left if {he} buys both?",
            "With {a} dollars, {n} bought {i} for {b} dollars and {j} for {c}. How many dollars does {he} have left?",
        ),
        (
            "{n} had {a} dollars and spent {b} dollars on {i} and {c} dollars on {j}. How many dollars are left?",
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
        "d1": times[0], "d2": times[1], "d3": times[2], "D1": cap(times[0]), "D2": cap(times[1]),
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
    values["rel"] = fill(rng, relation.bare if events else relation.than, values)
    values["q"] = fill(rng, question, values)
    values["Q"] = cap(str(values["q"]))
    first = relation.step(a, b)
    steps = [first, add(a, first[1])] if total else [first]
    return story, values, steps


def draw(rng: Random, split: Split) -> Example:
    """One word problem of the split."""
    if rng.random() < 0.5:
        template, values, steps = related(rng, split)
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


MATH = Task(
    name="math",
    description="Solves word problems in one or two steps and ends with the answer.",
    draw=draw,
    train_templates=(
        *EVENTS, *EVENTS_TOTAL, *EVENTS_SECOND, *OWNERS, *OWNERS_TOTAL, *OWNERS_SECOND,
        *(t for family in FAMILIES.values() for t in family.train),
    ),
    heldout_templates=(
        *EVENTS_HELDOUT, *EVENTS_TOTAL_HELDOUT, *EVENTS_SECOND_HELDOUT,
        *OWNERS_HELDOUT, *OWNERS_TOTAL_HELDOUT, *OWNERS_SECOND_HELDOUT,
        *(t for family in FAMILIES.values() for t in family.heldout),
    ),
)  # fmt: skip
