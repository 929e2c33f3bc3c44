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
    "This {day}, {name} {v} {count} {item} in {place}.",
    "Every {day}, {name} {v} {count} {item} in {place}.",
    "{day} evening {name} {v} {count} {item}.",
    "When {he} was in {place}, {name} {v} {count} {item}.",
    "During a trip to {place}, {name} {v} {count} {item} on {day}.",
    "My friend {name} {v} {count} {item} in {place}.",
    "Our teacher {name} {v} {count} {item} on {day} in {place}.",
    "My sister {name} went to {place} and {v} {count} {item}.",
    "In {place} {name} {v} {count} {item}.",
    "The {count} {item} of {name} are from {place}.",
    "{name} has {count} {item} in {place}.",
    "{name} came home from {place} on {day} with {count} {item}.",
    "Once, in {place}, {name} {v} {count} {item}.",
    "A friend in {place} sold {count} {item} to {name} on {day}.",
    "{name} {v} {count} {item} on {day}, and {more} on {day2}.",
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
    "My teacher {name} is a {age} year old {job} in {city}.",
    "Our friend {name} is {a_job} in {city}.",
    "My brother met {name}, a {age} year old {job} from {city}.",
    "The {job} {name} is {age} and lives in {city}.",
    "Do you know {name}? {He} is {a_job} in {city}.",
    "{name} is {age}. {He} works in {city} as {a_job}.",
    "When {he} was {age}, {name} was {a_job} in {city}.",
    "{name} likes {city}. {He} is {a_job} there.",
    "In {city} we met {name}, {a_job} of {age} years.",
    "Here is {name}: {age} years old, {a_job}, from {city}.",
    "{name} has been {a_job} in {city} since {he} was {age}.",
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
    "Do not forget the {event} in {place} on {day} at {hour} with {name}.",
    "Next {day} there is a {event} with {name} at {hour}.",
    "In {place} we have a {event} on {day}. {name} comes at {hour}.",
    "{name} invites us to a {event} in {place} at {hour} on {day}.",
    "At {hour} on {day}, {name} has a {event} in {place}.",
    "My friend {name} goes to a {event} in {place} on {day}.",
    "The {event} in {place} is at {hour}, and {name} will come.",
    "I will see {name} at the {event} on {day} at {hour}.",
)
EVENTS_HELDOUT = (
    "In {place} there is a {event} with {name} on {day} at {hour}.",
    "Remember the {event} with {name} in {place} on {day} at {hour}.",
    "On {day}, {name} has a {event} at {hour} in {place}.",
)
HAPPENINGS = (
    "meeting", "party", "lesson", "concert", "trip", "lunch", "dinner", "game", "match",
)  # fmt: skip

# What may stand before or after any training sentence, so that none is known by its first word.
BEFORE = (
    "Yesterday I heard this. ",
    "Listen! ",
    "Hello. ",
    "I say that ",
    "They say that ",
    "It is true that ",
    "As you know, ",
    "He said that ",
    "Today I read that ",
    "Maybe ",
    "The story is that ",
    "Good morning! ",
    "We know that ",
    "My mother says that ",
)
AFTER = (
    " That is all.",
    " Thank you.",
    " It was a good day.",
    " I was happy.",
    " Is that true?",
    " We like it.",
    " Nobody knows why.",
    " The weather was fine.",
)

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
    text = fill(rng, template, values)
    if split != "heldout":
        if rng.random() < 0.25:
            before = rng.choice(BEFORE)
            text = before + (text if before[-2] in ".!" or used_first(template) else lowered(text))
        if rng.random() < 0.15:
            text += rng.choice(AFTER)
    return Example(cap(text), json.dumps(found), template)


def used_first(template: str) -> bool:
    """Whether a template begins with a slot, whose case stays as it is."""
    return template.startswith("{")


def lowered(text: str) -> str:
    """The text with its first letter in lower case."""
    return text[0].lower() + text[1:]


JSON = Task(
    name="json",
    description="Turns a sentence about a purchase, a person or an event into a JSON object.",
    draw=draw,
    train_templates=(*PURCHASES, *PEOPLE, *EVENTS),
    heldout_templates=(*PURCHASES_HELDOUT, *PEOPLE_HELDOUT, *EVENTS_HELDOUT),
)
