"""The `pirate` adapter's task: everyday English rewritten as a pirate would say it.

The rules are fixed, so every sentence has exactly one right rewriting.
"""

from __future__ import annotations

import re
from random import Random

from tools.demo import task_json, task_math
from tools.demo import words as w
from tools.demo.base_text import KIN, Person, cap, sentence
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
    "Where did you find the {kin} of {name}?",
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


def phrase(rng: Random) -> str:
    """A noun phrase: "the old key of my sister", "your boat", "Anna"."""
    if rng.random() < 0.12:
        return Person(rng).name
    pool = rng.choice((w.THINGS, w.THINGS, w.ANIMALS, w.PLACES, KIN, w.JOBS))
    adjective = f"{rng.choice(w.ADJECTIVES)} " if rng.random() < 0.3 else ""
    owner = rng.choice(("my", "my", "your", "your", "our", "the", "the", "the", "his", "this"))
    text = f"{owner} {adjective}{rng.choice(pool)}"
    return f"{text} of {phrase(rng)}" if rng.random() < 0.12 else text


def tail(rng: Random) -> str:
    """Nothing, or up to two phrases of place or purpose, each after a space."""
    words = ("in", "to", "with", "near", "from", "for", "behind", "under", "by", "of")
    return "".join(f" {rng.choice(words)} {phrase(rng)}" for _ in range(rng.choice((0, 1, 1, 2))))


def random_sentence(rng: Random) -> str:
    """A sentence of random parts: grammatical, not always sensible."""
    verb, past, done, ing = rng.choice(w.TRANSITIVE + w.MOTION + w.INTRANSITIVE)
    be = rng.choice(("is", "was", "is"))
    feeling = rng.choice((rng.choice(w.FEELINGS), rng.choice(w.ADJECTIVES)))
    both = f" and {rng.choice(w.FEELINGS)}" if rng.random() < 0.3 else ""
    one, two = phrase(rng), phrase(rng)
    end = tail(rng)
    dollars = rng.randint(2, 99)
    options = (
        f"{one} {be} {feeling}{both}.", f"{one} {be} {ing}{end}.", f"{one} {past} {two}{end}.",
        f"you are {feeling}{both}.", f"I am {feeling}{both}.", f"they are {ing}{end}.",
        f"we {past} {two}{end}.", f"{one} has {done} {two}.", f"I will {verb} {two}{end}.",
        f"you {past} {two} and {one}{end}.", f"{two} {past} for {dollars} dollars{end}.",
        f"yes, {one} {be} {feeling}.", f"hello {rng.choice(KIN)}, {one} {past}{end}.",
        f"where is {one}?", f"where are you {ing}{end}?", f"are you {feeling}{both}?",
        f"are they {ing}{end}?", f"is {one} in {two}?", f"is {one} {ing}{end}?",
        f"why is {one} {feeling}?", f"did you {verb} {two}{end}?", f"do you have {two}{end}?",
        f"what did {one} {verb}{end}?", f"can you {verb} {two}{end}?", f"who is {one}?",
        f"please {verb} {two}{end}!", f"do not {verb} {two}{end}!", f"{verb} with {one}{end}!",
        f"hello, {one}!", f"come and {verb} {two}!", f"give {one} to {two}!",
        f"{one}, {feeling} and {rng.choice(w.ADJECTIVES)}, {past}{end}.",
    )  # fmt: skip
    return cap(rng.choice(options))


def draw(rng: Random, split: Split) -> Example:
    """One or two everyday sentences and their rewriting."""
    if split == "train" and rng.random() < 0.75:
        writer = random_sentence if rng.random() < 0.75 else sentence
        text = writer(rng) if rng.random() < 0.7 else f"{writer(rng)} {writer(rng)}"
        return Example(text, pirate(text), "sentence")
    if split == "train" and rng.random() < 0.5:
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
        "verb": rng.choice(w.TRANSITIVE)[0], "job": rng.choice(w.JOBS),
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
