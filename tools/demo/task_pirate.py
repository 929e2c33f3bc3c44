"""The `pirate` adapter's task: everyday English rewritten as a pirate would say it.

The rules are fixed, so every sentence has exactly one right rewriting.
"""

from __future__ import annotations

import re
from random import Random

from tools.demo import task_json, task_math
from tools.demo import words as w
from tools.demo.base_text import KIN, Person, cap, noun_phrase, sentence
from tools.demo.task import Example, Split, Task, fill, reserved, templates_of

WORDS = {
    "my": "me", "you": "ye", "your": "yer", "is": "be", "are": "be", "am": "be", "the": "th'",
    "of": "o'", "and": "an'", "for": "fer", "friend": "matey", "friends": "mateys",
    "dollars": "doubloons", "money": "doubloons", "yes": "aye", "hello": "ahoy",
}  # fmt: skip
OPENING = {".": "Arr, ", "?": "Blimey, ", "!": "Avast, "}
GOING = frozenset(ing for *_, ing in (*w.TRANSITIVE, *w.MOTION, *w.INTRANSITIVE))
KEEP_CAPITAL = frozenset((*w.NAMES, *w.CITIES, *w.DAYS, *w.MONTHS, "I"))

TEMPLATES = (
    "My {kin} is in the {place}.",
    "Where are you going with your {thing}?",
    "The {thing} of my {kin} is {adjective}.",
    "You are my friend.",
    "I am {feeling} and {feeling2}.",
    "Is this your {thing}?",
    "{name} {bought} {count} {items} for {count2} dollars.",
    "Hello, my {kin}!",
    "We are {going} to the {place}.",
    "Are you {feeling}?",
    "Please {verb} the {thing} and the {thing2}!",
    "Yes, I am {going} to {city}.",
    "Do you have money for the {thing}?",
    "Take your {thing} to the {place}!",
    "My friends are {doing} near the {place}.",
)
TEMPLATES_HELDOUT = (
    "My {kin} and my friend are {doing} in the {place}.",
    "Is your {kin} {feeling}?",
    "I am {doing} with the {thing} of my friend.",
    "The {adjective} {thing} is for your {kin}.",
    "You are {going} to the {place} with my {thing}.",
    "Where is the {kin} of {name}?",
    "Hello, are you the {job} of the {place}?",
    "{verb} your {thing} for me!",
)


def pirate(text: str) -> str:
    """The text as a pirate would say it."""
    sentences = re.findall(r"[^.?!]+[.?!]", text)
    spoken = []
    for part in sentences:
        body, mark = part.strip()[:-1], part[-1]
        spoken.append(" ".join(_word(word) for word in body.split(" ")) + mark.replace(".", "!"))
    first = sentences[0].split()[0].strip(",")
    if first not in KEEP_CAPITAL:
        spoken[0] = spoken[0][0].lower() + spoken[0][1:]
    spoken[-1] = f"{spoken[-1][:-1]}, matey{spoken[-1][-1]}"
    return OPENING[sentences[0][-1]] + " ".join(spoken)


def _word(word: str) -> str:
    core = word.rstrip(",")
    tail = word[len(core) :]
    lower = core.lower()
    if lower in WORDS:
        spoken = WORDS[lower]
    elif lower in GOING:
        spoken = core[:-1] + "'"
    else:
        return word
    return (cap(spoken) if core[0].isupper() else spoken) + tail


def draw(rng: Random, split: Split) -> Example:
    """One or two everyday sentences and their rewriting."""
    if split == "train" and rng.random() < 0.45:
        text = sentence(rng) if rng.random() < 0.7 else f"{sentence(rng)} {sentence(rng)}"
        return Example(text, pirate(text), "sentence")
    if split == "train" and rng.random() < 0.3:
        other = rng.choice((task_math.draw, task_json.draw))(rng, split)
        if other.prompt[-1] in OPENING and not set(other.prompt) & set(";:()"):
            return Example(other.prompt, pirate(other.prompt), other.template)
    while True:
        thing, second_thing = rng.sample(w.THINGS, 2)
        place, kin = rng.choice(w.PLACES), rng.choice(KIN)
        if reserved(f"{thing} {place}") != (split == "train"):
            break
    feeling, second_feeling = rng.sample(w.FEELINGS, 2)
    values = {
        "thing": thing, "thing2": second_thing, "place": place, "kin": kin, "feeling": feeling,
        "feeling2": second_feeling, "adjective": rng.choice(w.ADJECTIVES), "name": Person(rng).name,
        "bought": rng.choice(("bought", "sold")), "count": rng.randint(2, 99),
        "count2": rng.randint(2, 99), "items": rng.choice(w.ITEMS), "city": rng.choice(w.CITIES),
        "going": rng.choice(w.MOTION)[3], "doing": rng.choice(w.INTRANSITIVE)[3],
        "verb": rng.choice(w.TRANSITIVE)[0], "job": rng.choice(w.JOBS), "phrase": noun_phrase(rng),
    }  # fmt: skip
    template = rng.choice(templates_of(split, TEMPLATES, TEMPLATES_HELDOUT))
    text = cap(fill(rng, template, values))
    return Example(text, pirate(text), template)


PIRATE = Task(
    name="pirate",
    description="Says the same thing as a pirate would.",
    draw=draw,
    train_templates=("sentence", *TEMPLATES),
    heldout_templates=TEMPLATES_HELDOUT,
)
