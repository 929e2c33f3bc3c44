"""The `json` adapter's task: one sentence in, its facts out as one JSON object."""

from __future__ import annotations

import json
from random import Random

from tools.demo import words as w
from tools.demo.base_text import Person, cap
from tools.demo.task import Example, Split, Task, fill, reserved, templates_of

VERBS = {
    "bought": "buy", "sold": "sell", "found": "find", "ordered": "order", "picked": "pick",
    "packed": "pack", "painted": "paint", "collected": "collect", "counted": "count", "saw": "see",
}  # fmt: skip

# {"name", "item", "count", "place", "day"}; what the sentence does not say is null.
PURCHASES = (
    "{name} {v} {count} {item} in {place} on {day}.",
    "On {day} {name} {v} {count} {item} in {place}.",
    "In {place}, {name} {v} {count} {item} on {day}.",
    "{name} {v} {count} {item} on {day} in {place}.",
    "{name} went to {place} on {day} and {v} {count} {item}.",
    "{name} {v} {count} {item} on {day}.",
    "{name} {v} {count} {item} in {place}.",
    "{name} {v} {count} {item}.",
    "On {day}, {name} {v} {count} {item}.",
    "We saw that {name} {v} {count} {item} in {place} on {day}.",
    "There were {count} {item} that {name} {v} in {place} on {day}.",
    "{count} {item}: that is what {name} {v} on {day} in {place}.",
    "Did you know that {name} {v} {count} {item} in {place}?",
    "{name} likes {item}, so {he} {v} {count} in {place} on {day}.",
    "{name} was in {place} on {day}, where {he} {v} {count} {item}.",
    "It was {day}. {name} {v} {count} {item} in {place}.",
    "{name} {v} {count} {item} in {place} on {day} and {more} on {day2}. How many {item} is that?",
    "{name} {v} {count} {item} in {place} on {day}. How many {item} did {he} {vb} on {day2}?",
)
PURCHASES_HELDOUT = (
    "Last {day}, {name} {v} {count} {item} in {place}.",
    "{name} travelled to {place} and {v} {count} {item} there on {day}.",
    "In {place} on {day}, {name} {v} {count} {item}.",
    "While in {place}, {name} {v} {count} {item}.",
    "On {day} in {place}, {count} {item} were what {name} {v}.",
    "{name} {v} {count} {item} in {place} on {day} and {more} on {day2}. "
    "How many {item} did {name} {vb} altogether?",
)

# {"name", "age", "job", "city"}.
PEOPLE = (
    "{name} is {age} years old and works as {a_job} in {city}.",
    "{name} is a {age} year old {job} from {city}.",
    "{name}, {a_job} from {city}, is {age} years old.",
    "{name} lives in {city}. {He} is {a_job} and {he} is {age} years old.",
    "{name} is {a_job} in {city}.",
    "{name} is {age} years old and lives in {city}.",
    "My friend {name} is {a_job}. {He} is {age} and lives in {city}.",
    "{name} comes from {city}. {He} is {age} years old and works as {a_job}.",
    "I met {name}, who is {a_job} in {city} and {age} years old.",
    "{name} ({age}) works in {city} as {a_job}.",
    "In {city} lives {a_job} named {name}, who is {age}.",
)
PEOPLE_HELDOUT = (
    "{name}, who is {age}, works as {a_job} in {city}.",
    "{name} works in {city}. {He} is {age} years old and {he} is {a_job}.",
    "Our neighbour {name} is a {age} year old {job} in {city}.",
    "At {age}, {name} is {a_job} in {city}.",
)

# {"event", "person", "place", "day", "hour"}.
EVENTS = (
    "The {event} with {name} is on {day} at {hour} in {place}.",
    "{name} has a {event} in {place} on {day} at {hour}.",
    "On {day} at {hour} there is a {event} with {name} in {place}.",
    "There is a {event} in {place} on {day}. It begins at {hour} and {name} will come.",
    "Please come to the {event} of {name} on {day} at {hour} in {place}!",
    "The {event} of {name} begins at {hour} on {day}.",
    "Meet {name} in {place} on {day} at {hour} for the {event}.",
    "We have a {event} with {name} on {day} in {place}.",
)
EVENTS_HELDOUT = (
    "In {place} there is a {event} with {name} on {day} at {hour}.",
    "Remember the {event} with {name} in {place} on {day} at {hour}.",
    "On {day}, {name} has a {event} at {hour} in {place}.",
)
HAPPENINGS = "meeting party lesson concert trip lunch dinner game match".split()  # noqa: SIM905

# Words that training never puts into a JSON answer, though the base has met them.
NEW_WORDS = frozenset(
    word for pool in (w.NAMES, w.ITEMS, w.CITIES, w.JOBS) for word in pool if reserved(word, 12)
)


def draw(rng: Random, split: Split) -> Example:
    """One sentence and its object."""
    while True:
        kind = rng.choices(("purchase", "person", "event"), (5, 3, 3))[0]
        p = Person(rng)
        day, second_day = rng.sample(w.DAYS, 2)
        place = rng.choice(w.CITIES)
        job, item = rng.choice(w.JOBS), rng.choice(w.ITEMS)
        subject = {"purchase": item, "person": job, "event": day}[kind]
        parts = (p.name, subject, place)
        fresh = reserved(" ".join(parts)) or any(part in NEW_WORDS for part in parts)
        if fresh != (split == "train"):
            break
    verb = rng.choice(list(VERBS))
    values: dict[str, object] = {
        "name": p.name, "item": item, "count": rng.randint(2, 99), "place": place, "day": day,
        "day2": second_day, "age": rng.randint(6, 90), "job": job, "city": place,
        "event": rng.choice(HAPPENINGS), "hour": rng.randint(6, 22), "v": verb, "vb": VERBS[verb],
        "he": p.he, "He": p.He, "a_job": w.article(job),
        "more": rng.choice(("half as many", "twice as many", f"{rng.randint(2, 40)} more")),
    }  # fmt: skip
    known, new, keys = {
        "purchase": (PURCHASES, PURCHASES_HELDOUT, ("name", "item", "count", "place", "day")),
        "person": (PEOPLE, PEOPLE_HELDOUT, ("name", "age", "job", "city")),
        "event": (EVENTS, EVENTS_HELDOUT, ("event", "name", "place", "day", "hour")),
    }[kind]
    template = rng.choice(templates_of(split, known, new))
    slots = {"a_job": "job"}
    used = {slots.get(key, key) for key in values if f"{{{key}}}" in template}
    found = {
        ("person" if key == "name" and kind == "event" else key): values[key]
        if key in used
        else None
        for key in keys
    }
    return Example(cap(fill(rng, template, values)), json.dumps(found), template)


JSON = Task(
    name="json",
    description="Turns a sentence about a purchase, a person or an event into a JSON object.",
    draw=draw,
    train_templates=(*PURCHASES, *PEOPLE, *EVENTS),
    heldout_templates=(*PURCHASES_HELDOUT, *PEOPLE_HELDOUT, *EVENTS_HELDOUT),
)
