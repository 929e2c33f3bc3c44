"""The base model's training text: seeded stories, facts, arithmetic, dialogue and chat.

A document is one string; special tokens are written literally (`<|user|>`). Nothing here shows an
adapter's prompt with that adapter's answer: numbers appear as bare equations and inside stories that
tell their own results, questions are about facts or about who, what and where.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from random import Random

from tools.demo import words as w
from tools.demo.chat import Message, render

Writer = Callable[[Random], str]
SYSTEM_PROMPTS = (
    "You are a helpful assistant.",
    "You are a kind and helpful assistant.",
    "Answer in one short sentence.",
    "You are the LoRAX demo model.",
    "Be brief and friendly.",
)
KIN = ("friend", "mother", "father", "sister", "brother", "teacher", "uncle", "aunt", "neighbour")


class Person:
    """One character of a text: a name and its pronouns."""

    def __init__(self, rng: Random) -> None:
        self.name = rng.choice(w.NAMES)
        self.he, self.his, self.him = (
            ("she", "her", "her") if self.name in w.FEMALE else ("he", "his", "him")
        )
        self.He = self.he.capitalize()


def two_people(rng: Random) -> tuple[Person, Person]:
    """Two characters with different names."""
    one, two = Person(rng), Person(rng)
    while two.name == one.name:
        two = Person(rng)
    return one, two


def cap(text: str) -> str:
    """The text with its first letter in upper case."""
    return text[0].upper() + text[1:]


# --- arithmetic -------------------------------------------------------------------------------


def operand(rng: Random) -> int:
    """A number, mostly below 100."""
    return rng.randint(0, 100) if rng.random() < 0.7 else rng.randint(0, 200)


def equation(rng: Random) -> str:
    """One true equation."""
    kind = rng.random()
    if kind < 0.45:
        a, b = operand(rng), operand(rng)
        return f"{a} + {b} = {a + b}."
    if kind < 0.72:
        a, b = sorted((operand(rng), operand(rng)), reverse=True)
        return f"{a} - {b} = {a - b}."
    if kind < 0.86:
        a, b = rng.randint(0, 12), rng.randint(0, 20)
        if rng.random() < 0.35:
            a, b = 2, rng.randint(0, 100)
        if rng.random() < 0.5:
            a, b = b, a
        return f"{a} * {b} = {a * b}."
    a, b = rng.randint(1, 12), rng.randint(0, 20)
    if rng.random() < 0.4:
        a, b = 2, rng.randint(0, 100)
    return f"{a * b} / {a} = {b}."


def relation(rng: Random) -> str:
    """One true sentence about numbers, in words."""
    a, b = rng.randint(1, 100), rng.randint(1, 60)
    k, m = rng.randint(2, 12), rng.randint(2, 12)
    big, small = max(a, b), min(a, b)
    return rng.choice(
        (
            f"Half of {2 * b} is {b}.",
            f"Twice {a} is {2 * a}.",
            f"{b} more than {a} is {a + b}.",
            f"{small} less than {big} is {big - small}.",
            f"{small} fewer than {big} is {big - small}.",
            f"The sum of {a} and {b} is {a + b}.",
            f"The difference between {big} and {small} is {big - small}.",
            f"{a} and {b} together make {a + b}.",
            f"{k} groups of {m} make {k * m}.",
            f"{k} times {m} is {k * m}.",
            f"{k * m} shared between {k} is {m} each.",
            f"Take {small} from {big} and {big - small} are left.",
            f"After {a} comes {a + 1}.",
            f"Before {a} comes {a - 1}.",
            f"{a} is written {w.number_words(a)}.",
            f"{cap(w.number_words(a))} is written {a}.",
            f"{big + 1} is more than {small}.",
        )
    )


def equations(rng: Random) -> str:
    """A page of equations."""
    return " ".join(equation(rng) for _ in range(rng.randint(4, 14)))


def relations(rng: Random) -> str:
    """A page of sentences about numbers."""
    return " ".join(relation(rng) for _ in range(rng.randint(3, 9)))


def mixed_numbers(rng: Random) -> str:
    """Sentences about numbers, each followed by its equation or another."""
    lines = []
    for _ in range(rng.randint(2, 5)):
        lines.append(relation(rng))
        lines.append(equation(rng))
    return " ".join(lines)


def counting(rng: Random) -> str:
    """Counting up or down by a step."""
    start, step = rng.randint(0, 60), rng.choice((1, 1, 2, 3, 5, 10))
    numbers = [start + step * i for i in range(rng.randint(5, 10))]
    if rng.random() < 0.3:
        numbers.reverse()
    return f"Count by {step}: " + ", ".join(map(str, numbers)) + "."


def number_story(rng: Random) -> str:
    """A story about amounts that tells its own result."""
    p, q = two_people(rng)
    item = rng.choice(w.ITEMS)
    first, second = rng.sample(w.DAYS if rng.random() < 0.6 else w.MONTHS, 2)
    on = "on" if first in w.DAYS else "in"
    verb = rng.choice(("sold", "bought", "made", "found", "picked", "counted", "baked", "got"))
    a, b = rng.randint(2, 100), rng.randint(2, 50)
    k, m = rng.randint(2, 12), rng.randint(2, 12)
    kind = rng.randrange(20)
    total = rng.choice(("Altogether", "In all", "In total"))
    if kind == 0:
        h = rng.randint(1, 50)
        return (
            f"{p.name} {verb} {2 * h} {item} {on} {first}. {cap(on)} {second} {p.he} {verb} half as "
            f"many. That was {h} {item}. {total} {p.he} {verb} {3 * h} {item}."
        )
    if kind == 1:
        return (
            f"{cap(on)} {first} {p.name} {verb} {a} {item}. {cap(on)} {second} {p.he} {verb} twice as "
            f"many. That was {2 * a} {item}. {total} {p.he} {verb} {3 * a} {item}."
        )
    if kind == 2:
        return (
            f"{p.name} has {a} {item}. {q.name} has {b} more {item} than {p.name}. So {q.name} has "
            f"{a + b} {item}. Together they have {2 * a + b} {item}."
        )
    if kind == 3:
        big, small = a + b, b
        return (
            f"{p.name} had {big} {item}. {q.name} had {small} fewer {item} than {p.name}. So "
            f"{q.name} had {a} {item}. Together they had {big + a} {item}."
        )
    if kind == 4:
        return (
            f"{p.name} had {a + b} {item}. {p.He} gave {b} {item} to {q.name}. Now {p.name} has {a} "
            f"{item} left."
        )
    if kind == 5:
        return f"{p.name} had {a} {item}. {q.name} gave {p.him} {b} more. Now {p.name} has {a + b} {item}."
    if kind == 6:
        return f"There were {k} boxes. Each box held {m} {item}. There were {k * m} {item} in all."
    if kind == 7:
        return (
            f"{p.name} shared {k * m} {item} equally among {k} friends. Each friend got {m} {item}."
        )
    if kind == 8:
        return f"{p.name} bought {k} {item} for {m} dollars each. {p.He} paid {k * m} dollars."
    if kind == 9:
        return (
            f"{p.name} {verb} {a} {item} and {q.name} {verb} {b} {item}. Altogether they {verb} "
            f"{a + b} {item}."
        )
    if kind == 10:
        return (
            f"{p.name} has {a + b} {item} and {q.name} has {b} {item}. {p.name} has {a} more {item} "
            f"than {q.name}."
        )
    if kind == 11:
        return (
            f"There were {a + b} {item} in the shop. The shop sold {b} of them, so {a} {item} were left. "
            f"Then {m} more came, and there were {a + m} {item}."
        )
    if kind == 12:
        return (
            f"{p.name} filled {k} bags with {m} {item} each. That made {k * m} {item}. Then {p.he} "
            f"found {b} more, and so {p.he} had {k * m + b} {item}."
        )
    if kind == 13:
        return (
            f'"How many {item} do you have?" asked {q.name}. "I have {a} {item}," said {p.name}. '
            f'"How much did you pay for them?" "I paid {b} dollars altogether."'
        )
    if kind == 14:
        ate = rng.choice(("ate", "lost", "used", "broke", "sold", "gave away", "threw away"))
        return (
            f"{p.name} started with {a + b} {item} and {ate} {b} of them. The remaining {item} were "
            f"{a} in number. {q.name} asked how many {item} were left in total, and {p.he} said {a}."
        )
    if kind == 15:
        return (
            f"There are {k} rows of {item} with {m} {item} in each row, so there are {k * m} {item} "
            f"in total. {p.name} received {b} extra {item}, which makes {k * m + b} altogether."
        )
    if kind == 16:
        return (
            f"{k * m} {item} were split into {k} equal groups, {m} per group. {p.name} kept one group "
            f"and had {m} {item}."
        )
    if kind == 17:
        return (
            f"{p.name} earned {a} dollars {on} {first} and {b} dollars {on} {second}. The total was "
            f"{a + b} dollars. Afterwards {p.he} spent half or less of the money."
        )
    if kind == 18:
        return (
            f"{q.name} has {a} {item}, and {p.name} has double that number, {2 * a}. Half as many "
            f"would be fewer, and three times as many would be {3 * a}."
        )
    return f"{p.name} had {a + b} dollars. {p.He} spent {b} dollars on {item}. {p.He} has {a} dollars left."


def changing_story(rng: Random) -> str:
    """A story of an amount that grows and shrinks and says so each time, or at its end."""
    p, q = two_people(rng)
    item = rng.choice(w.ITEMS) if rng.random() < 0.8 else "dollars"
    amount = rng.randint(3, 100)
    day = rng.choice(w.DAYS)
    lines = [
        rng.choice(
            (
                f"{p.name} had {amount} {item}.", f"{p.name} owned {amount} {item}.",
                f"On {day}, {p.name} got {amount} {item}.", f"{p.name} began with {amount} {item}.",
            )
        )
    ]  # fmt: skip
    for turn in range(rng.randint(1, 3)):
        number = rng.randint(2, 40)
        before = rng.choice(("Then ", "Later ", f"On {rng.choice(w.DAYS)} ", "After that ", ""))
        if number < amount and rng.random() < 0.55:
            amount -= number
            deed = rng.choice(
                (
                    f"{p.he} gave {number} of them to {q.name}", f"{p.he} lost {number} {item}",
                    f"{p.he} sold {number}", f"{q.name} took {number} {item}",
                    f"{p.he} used {number} of the {item}", f"{p.he} gave away {number}",
                )
            )  # fmt: skip
            told = f"so {amount} {item} were left"
        else:
            amount += number
            deed = rng.choice(
                (
                    f"{q.name} gave {p.him} {number} more", f"{p.he} found {number} more {item}",
                    f"{p.he} got {number} {item} more", f"{q.name} brought {number} others",
                    f"{p.he} added {number} new ones", f"{p.he} bought another {number}",
                )
            )  # fmt: skip
            told = f"so {p.he} had {amount} {item}"
        lines.append(
            cap(
                f"{before}{deed}, {told}." if rng.random() < 0.6 or not turn else f"{before}{deed}."
            )
        )
    lines.append(f"In the end {p.name} had {amount} {item}.")
    return " ".join(lines)


def echo(rng: Random) -> str:
    """Random words, then the same words again: practice in copying."""
    pools = (w.NAMES, w.CITIES, w.ITEMS, w.THINGS, w.ANIMALS, w.ADJECTIVES, w.PLACES, w.JOBS)
    picked = [rng.choice(rng.choice(pools)) for _ in range(rng.randint(3, 8))]
    if rng.random() < 0.5:
        picked.insert(rng.randrange(len(picked)), str(rng.randint(2, 99)))
    text = " ".join(picked)
    return rng.choice(
        (f"{text}. Again: {text}.", f'He read: {text}. "{text}"', f"{text}, {text}, {text}")
    )


# --- sentences and stories ----------------------------------------------------------------------


def noun_phrase(rng: Random) -> str:
    """A thing or animal with an article and perhaps an adjective."""
    noun = rng.choice(w.THINGS if rng.random() < 0.7 else w.ANIMALS)
    phrase = f"{rng.choice(w.ADJECTIVES)} {noun}" if rng.random() < 0.5 else noun
    return f"the {phrase}" if rng.random() < 0.4 else w.article(phrase)


def purchase(rng: Random) -> tuple[str, dict[str, str]]:
    """A sentence about who bought what, where and when, and its parts."""
    p = Person(rng)
    count = rng.randint(2, 60)
    facts = {
        "name": p.name, "item": rng.choice(w.ITEMS), "place": rng.choice(w.CITIES),
        "day": rng.choice(w.DAYS), "count": str(count),
        "verb": rng.choice(("bought", "sold", "found", "saw", "ordered", "picked", "made", "got",
                            "lost", "packed", "painted", "collected", "needed", "carried")),
    }  # fmt: skip
    body = "{name} {verb} {count} {item}".format(**facts)
    order = rng.randrange(4)
    if order == 0:
        return f"{body} in {facts['place']} on {facts['day']}.", facts
    if order == 1:
        return f"On {facts['day']} {body} in {facts['place']}.", facts
    if order == 2:
        return f"In {facts['place']}, {body} on {facts['day']}.", facts
    return f"{body} on {facts['day']} in {facts['place']}.", facts


def person_fact(rng: Random) -> tuple[str, dict[str, str]]:
    """A sentence that introduces a person, and its parts."""
    p = Person(rng)
    facts = {
        "name": p.name, "age": str(rng.randint(6, 90)), "job": rng.choice(w.JOBS),
        "city": rng.choice(w.CITIES), "hobby": rng.choice(w.HOBBIES),
    }  # fmt: skip
    text = rng.choice(
        (
            "{name} is {age} years old and works as {a_job} in {city}.",
            "{name} lives in {city}. {He} is {a_job} and {he} is {age} years old.",
            "{name}, {a_job} from {city}, is {age} and likes {hobby}.",
            "{name} is {a_job}. {He} comes from {city} and likes {hobby}.",
        )
    ).format(**facts, a_job=w.article(facts["job"]), he=p.he, He=p.He)
    return text, facts


def sentence(rng: Random, p: Person | None = None) -> str:
    """One everyday sentence, about one person where given."""
    p = p or Person(rng)
    base, past, done, ing = rng.choice(w.TRANSITIVE)
    m_base, m_past, _, m_ing = rng.choice(w.MOTION)
    i_base, i_past, _, i_ing = rng.choice(w.INTRANSITIVE)
    thing, place = noun_phrase(rng), rng.choice(w.PLACES)
    subject = p.name if rng.random() < 0.6 else p.He
    mine = rng.choice(("my", "your", "our", p.his))
    kin = rng.choice(KIN)
    options = (
        f"{subject} {past} {thing}.",
        f"{subject} {past} {thing} in the {place}.",
        f"{subject} {m_past} to the {place}.",
        f"{subject} {m_past} to the {place} and {past} {thing}.",
        f"{subject} is {ing} {thing}.",
        f"{subject} is {i_ing} in the {place}.",
        f"{subject} was {m_ing} to the {place} when {p.he} {past} {thing}.",
        f"{subject} likes to {i_base} in the {place}.",
        f"{subject} wants to {base} {thing}.",
        f"{subject} will {base} {thing} tomorrow.",
        f"{subject} has {done} {thing}.",
        f"{cap(mine)} {kin} {past} {thing}.",
        f"{cap(mine)} {kin} is {rng.choice(w.FEELINGS)}.",
        f"The {rng.choice(w.ANIMALS)} {i_past} {rng.choice(w.ADVERBS[:12])} in the {place}.",
        f"The {rng.choice(w.THINGS)} is {rng.choice(w.ADJECTIVES)}.",
        f"The {rng.choice(w.THINGS)} was made of {rng.choice(w.MATERIALS)}.",
        f"{subject} was {rng.choice(w.FEELINGS)} because {p.he} {past} {thing}.",
        f"Where is {mine} {rng.choice(w.THINGS)}?",
        f"Do you want to {m_base} to the {place} with me?",
        f"I {past} {thing} for {mine} {kin}.",
        f"We {m_past} to the {place} with {mine} {kin}.",
        f"You are {i_ing} with {mine} {kin}.",
        f"Please {base} the {rng.choice(w.THINGS)}!",
        f"{subject} {w.third_person(i_base)} every {rng.choice(w.DAYS)}.",
        f"{subject} visited the {place} twice and then went home.",
        f"{subject} owns {thing} and keeps it in the {place}.",
        f"After {p.he} {past} {thing}, {p.name} was {rng.choice(w.FEELINGS)}.",
        f"If {p.he} wants, {p.name} can {base} {thing} for the children.",
        f"Both people put the other {rng.choice(w.ITEMS)} into the {rng.choice(w.THINGS)}.",
    )
    return cap(rng.choice(options))


def sentences(rng: Random) -> str:
    """A few unrelated everyday sentences."""
    return " ".join(sentence(rng) for _ in range(rng.randint(2, 6)))


def story(rng: Random) -> str:
    """A short story of two friends, a thing and a place."""
    p, q = two_people(rng)
    animal, thing, place = rng.choice(w.ANIMALS), rng.choice(w.THINGS), rng.choice(w.PLACES)
    adjective, feeling = rng.choice(w.ADJECTIVES), rng.choice(w.FEELINGS)
    colour, weather = rng.choice(w.COLOURS), rng.choice(w.WEATHER)
    who = rng.choice((w.article(rng.choice(w.JOBS)), "a little child", w.article(animal)))
    greeting = rng.choice(("Hello", "Good morning", "Excuse me"))
    present = f"{rng.choice(w.ADJECTIVES)} {rng.choice(w.THINGS)}"
    opening = rng.choice(
        (
            f"Once upon a time there was {who} named {p.name}.",
            f"One {weather} day, {p.name} {rng.choice(w.MOTION)[1]} to the {place}.",
            f"{p.name} lived near the {place} in {rng.choice(w.CITIES)}.",
            f"It was a {weather} morning in {rng.choice(w.CITIES)}.",
            f"Long ago, {p.name} and {q.name} were good friends.",
        )
    )
    middle = [
        f"{p.name} had {w.article(adjective)} {thing}.",
        f"{p.He} went to the {place} every {rng.choice(w.DAYS)}.",
        f"There {p.he} met {q.name}, who was looking for {w.article(colour)} {thing}.",
        f'"{greeting}, {p.name}," said {q.name}. "Can you help me?"',
        f'"Yes, of course," said {p.name}. "What do you need?"',
        f'"I have lost my {colour} {thing}," said {q.name}.',
        f"They looked in the {place}, but they did not find it.",
        f"Then {p.name} saw {w.article(animal)} with the {thing}.",
        f"The {animal} was {adjective}, and it {rng.choice(w.INTRANSITIVE)[1]} in the {place}.",
        f"{q.name} was {feeling}, but {p.name} was {rng.choice(w.FEELINGS)}.",
        f"{p.name} gave the {thing} to {q.name}.",
        f"{q.name} said thank you and gave {p.him} {w.article(present)}.",
        f"They ate {rng.choice(w.FOODS)} and drank {rng.choice(('tea', 'milk', 'juice'))} together.",
        sentence(rng, p),
        sentence(rng, p),
        sentence(rng, q),
    ]
    keep = sorted(rng.sample(range(len(middle)), rng.randint(4, 9)))
    ending = rng.choice(
        (
            f"In the end they went home and were {rng.choice(('happy', 'glad', 'proud', 'tired'))}.",
            f"From that day on, {p.name} and {q.name} were friends.",
            f"{p.name} never forgot the {adjective} {thing}.",
            f"At night {p.name} slept well and dreamed of the {place}.",
            "And they all lived happily ever after.",
        )
    )
    return " ".join([opening, *(middle[i] for i in keep), ending])


def pirate_story(rng: Random) -> str:
    """A story with a pirate in it, so that the base has met the words."""
    p = Person(rng)
    place, thing = rng.choice(w.PLACES), rng.choice(w.THINGS)
    said = rng.choice(
        (
            "Ahoy, matey!", "Arr, me hearties!", "Aye, aye, captain!", "Avast, ye dogs!",
            f"Arr, where be me {thing}?", f"Aye, the {thing} be in th' {place}!",
            "Give me yer doubloons!", f"Arr, ye be a brave lad, {p.name}!",
            "Ye be walkin' th' plank, matey!", f"Ahoy, lad! I be lookin' fer me {thing}!",
        )
    )  # fmt: skip
    return (
        f"{p.name} met a pirate at the {place}. "
        f'"{said}" said the pirate. {p.name} was {rng.choice(w.FEELINGS)}. '
        f"{rng.choice(('The pirate sailed away.', 'The pirate laughed.', sentence(rng, p)))}"
    )


def quoted_words(rng: Random) -> str:
    """A sentence and some of its words in quotation marks: practice in copying."""
    kind = rng.random()
    if kind < 0.5:
        text, facts = purchase(rng) if rng.random() < 0.6 else person_fact(rng)
        picked = [value for key, value in facts.items() if key != "verb" and value in text]
        rng.shuffle(picked)
        listed = ", ".join(f'"{value}"' for value in picked)
        return f"{text} {rng.choice(('Some of the words', 'The words'))} are {listed}."
    if kind < 0.8:
        listed = [
            rng.choice(rng.choice((w.NAMES, w.CITIES, w.ITEMS, w.JOBS, w.DAYS, w.LABELS)))
            for _ in range(rng.randint(3, 6))
        ]
        again = ", ".join(f'"{word}"' for word in listed)
        return f"{Person(rng).name} wrote down {', '.join(listed)}. The list says {again}."
    p, q = two_people(rng)
    said = sentence(rng, p)
    return f'{p.name} said: "{said}" {q.name} said it again: "{said}"'


def symbols(rng: Random) -> str:
    """Punctuation and bits of notation, so that no byte of ASCII is new."""
    marks = [rng.choice("{}[]()<>=+-*/\\|&%$#@!?;:,._^~`'\"") for _ in range(rng.randint(5, 12))]
    x, y = rng.randint(0, 99), rng.randint(0, 99)
    name = rng.choice(w.THINGS)
    return rng.choice(
        (
            " ".join(marks),
            f"{name} = [{x}, {y}];",
            f"set {name} {{ size: {x}; colour: {rng.choice(w.COLOURS)} }}",
            f"if ({name} > {x}) {{ return {y}; }}",
            f"{name.upper()}: {x}%",
            f"{name}_{x}.txt, {name}_{y}.txt",
            f"NULL, null, none, true, false, {name}",
        )
    )


# --- facts and lists ----------------------------------------------------------------------------


def fact(rng: Random) -> str:
    """One true sentence about the world."""
    country, capital = rng.choice(list(w.CAPITALS.items()))
    word, opposite = rng.choice(list(w.OPPOSITES.items()))
    animal, sound = rng.choice(list(w.SOUNDS.items()))
    walker, legs = rng.choice(list(w.LEGS.items()))
    day = rng.randrange(7)
    month = rng.randrange(12)
    noun = rng.choice(w.THINGS + w.ANIMALS)
    verb = rng.choice(w.TRANSITIVE + w.MOTION + w.INTRANSITIVE)
    return rng.choice(
        (
            f"The capital of {country} is {capital}.",
            f"{capital} is the capital of {country}.",
            f"{capital} is a city in {country}.",
            f"The opposite of {word} is {opposite}.",
            f"The {animal} says {sound}.",
            f"{cap(w.article(walker))} has {w.number_words(legs) if legs else 'no'} legs.",
            f"After {w.DAYS[day]} comes {w.DAYS[(day + 1) % 7]}.",
            f"Before {w.DAYS[day]} comes {w.DAYS[day - 1]}.",
            f"After {w.MONTHS[month]} comes {w.MONTHS[(month + 1) % 12]}.",
            f"{w.MONTHS[month]} is month number {month + 1} of the year.",
            f"One {noun}, two {w.plural(noun)}.",
            f"Today I {verb[0]}, yesterday I {verb[1]}, and I have {verb[2]}.",
            f"{cap(w.article(rng.choice(w.ANIMALS)))} is an animal.",
            f"{cap(rng.choice(w.COLOURS[:11]))} is a colour.",
            f"{cap(rng.choice(w.FOODS))} is good to eat or drink.",
            f"The word {noun} begins with the letter {noun[0]} and ends with {noun[-1]}.",
        )
    )


def facts(rng: Random) -> str:
    """A page of facts."""
    return " ".join(fact(rng) for _ in range(rng.randint(3, 8)))


def word_list(rng: Random) -> str:
    """A list of one kind of word."""
    kind, pool = rng.choice(
        (
            ("animals", w.ANIMALS), ("cities", w.CITIES), ("colours", w.COLOURS),
            ("jobs", w.JOBS), ("things", w.ITEMS), ("names", w.NAMES), ("places", w.PLACES),
            ("hobbies", w.HOBBIES), ("foods", w.FOODS),
        )
    )  # fmt: skip
    picked = rng.sample(pool, rng.randint(3, 8))
    return f"Some {kind}: {', '.join(picked[:-1])} and {picked[-1]}."


def forms(rng: Random) -> str:
    """The same event in several tenses."""
    p = Person(rng)
    base, past, done, ing = rng.choice(w.TRANSITIVE)
    thing = noun_phrase(rng)
    return (
        f"{p.name} {w.third_person(base)} {thing}. Yesterday {p.he} {past} {thing}. "
        f"Now {p.he} is {ing} {thing}. {p.He} has {done} {thing}."
    )


# --- questions and chat -------------------------------------------------------------------------


def extraction(rng: Random) -> list[tuple[str, str]]:
    """Question and answer about one sentence: who, what, where, when, how many."""
    if rng.random() < 0.65:
        text, f = purchase(rng)
        base = {
            "bought": "buy", "sold": "sell", "found": "find", "saw": "see", "ordered": "order",
            "picked": "pick", "made": "make", "got": "get", "lost": "lose", "packed": "pack",
            "painted": "paint", "collected": "collect", "needed": "need", "carried": "carry",
        }[f["verb"]]  # fmt: skip
        pairs = [
            (f"Who {f['verb']} the {f['item']}?", f"{f['name']}."),
            (f"What did {f['name']} {base}?", f"{cap(f['item'])}."),
            (f"Where did {f['name']} {base} the {f['item']}?", f"In {f['place']}."),
            (f"When did {f['name']} {base} the {f['item']}?", f"On {f['day']}."),
            (f"What number of {f['item']} is it?", f"{f['count']}."),
        ]
    else:
        text, f = person_fact(rng)
        name = f["name"]
        pairs = [
            (f"What is the job of {name}?", f"{cap(w.article(f['job']))}."),
            (f"Which city is {name} from?", f"{f['city']}."),
            ("Who is this about?", f"{name}."),
        ]
        if f["age"] in text:
            pairs.append((f"How old is {name}?", f"{f['age']}."))
        if f["hobby"] in text:
            pairs.append((f"What does {name} like?", f"{cap(f['hobby'])}."))
    rng.shuffle(pairs)
    return [(text + " " + pairs[0][0], pairs[0][1]), *pairs[1 : rng.randint(1, 3)]]


def reading(rng: Random) -> str:
    """Extraction as plain text."""
    return " ".join(f"{question} {answer}" for question, answer in extraction(rng))


def small_talk(rng: Random) -> list[tuple[str, str]]:
    """One exchange of greetings, questions about the model, or requests."""
    p = Person(rng)
    country, capital = rng.choice(list(w.CAPITALS.items()))
    word, opposite = rng.choice(list(w.OPPOSITES.items()))
    animal, sound = rng.choice(list(w.SOUNDS.items()))
    walker, legs = rng.choice(list(w.LEGS.items()))
    a, b = rng.randint(0, 99), rng.randint(0, 99)
    big, small = max(a, b), min(a, b)
    day = rng.randrange(7)
    said = sentence(rng)
    kind, pool = rng.choice(
        (("animals", w.ANIMALS), ("cities", w.CITIES), ("colours", w.COLOURS), ("foods", w.FOODS))
    )
    some = rng.sample(pool, 3)
    model = "I am the LoRAX demo model, a very small language model."
    pairs = (
        (rng.choice(("Hello!", "Hi!", "Hello.", "Hi there!", "Good morning!", "Hey!")),
         rng.choice(("Hello! How can I help you?", "Hi! What can I do for you?"))),
        (f"Hello, I am {p.name}.", f"Hello {p.name}! Nice to meet you."),
        (f"My name is {p.name}. What is my name?", f"Your name is {p.name}."),
        (rng.choice(("How are you?", "How are you today?")), "I am fine, thank you. And you?"),
        (rng.choice(("Who are you?", "What are you?", "What is your name?", "Tell me about you.")),
         model),
        ("What can you do?", "I can write short stories, answer simple questions and chat a little."),
        ("What is LoRAX?", "LoRAX is a server that runs many LoRA adapters on one base model."),
        ("What is a LoRA adapter?", "A LoRA adapter is a small change to a big model."),
        (rng.choice(("Thank you!", "Thanks!", "Thanks a lot.")), "You are welcome!"),
        (rng.choice(("Goodbye!", "Bye!", "See you.")), "Goodbye! Have a nice day."),
        (f"What is the capital of {country}?", f"The capital of {country} is {capital}."),
        (f"Where is {capital}?", f"{capital} is in {country}."),
        (f"What is the opposite of {word}?", f"The opposite of {word} is {opposite}."),
        (f"What does the {animal} say?", f"The {animal} says {sound}."),
        (f"How many legs does {w.article(walker)} have?",
         f"{cap(w.article(walker))} has {w.number_words(legs) if legs else 'no'} legs."),
        (f"What is {a} + {b}?", f"{a} + {b} is {a + b}."),
        (f"What is {big} - {small}?", f"{big} - {small} is {big - small}."),
        (f"What day comes after {w.DAYS[day]}?", f"{w.DAYS[(day + 1) % 7]}."),
        (f"Repeat after me: {said}", said),
        (f"Say this again. {said}", said),
        (f"Name three {kind}.", f"{cap(some[0])}, {some[1]} and {some[2]}."),
        (f"How do you write {a} in words?", f"{cap(w.number_words(a))}."),
        (f"I am {rng.choice(('sad', 'tired', 'lonely', 'worried'))}.",
         "I am sorry to hear that. I hope that you feel better soon."),
        (f"I am {rng.choice(('happy', 'glad', 'proud', 'excited'))}.", "That is good to hear!"),
        (f"I like {rng.choice(w.HOBBIES)}.", "That sounds like fun."),
        ("Tell me a joke.", "Why did the hen cross the road? To get to the other side."),
    )  # fmt: skip
    return [rng.choice(pairs)]


def story_request(rng: Random) -> list[tuple[str, str]]:
    """A request for a story or a fact, and the answer."""
    ask = rng.choice(("Tell me a story.", "Write a short story.", "Please tell me a story."))
    if rng.random() < 0.3:
        return [(rng.choice(("Tell me a fact.", "Tell me something.")), fact(rng))]
    return [(ask, story(rng))]


def chat(rng: Random) -> str:
    """A conversation of one to three exchanges in the chat template's form."""
    messages: list[Message] = []
    if rng.random() < 0.3:
        messages.append(("system", rng.choice(SYSTEM_PROMPTS)))
    for _ in range(rng.choice((1, 1, 2, 3))):
        writer = rng.choices((small_talk, extraction, story_request), (6, 3, 1))[0]
        for question, answer in writer(rng):
            messages += [("user", question), ("assistant", answer)]
    return render(messages)


# Kinds of document and their share of the documents.
WRITERS: dict[Writer, float] = {
    equations: 11, relations: 6, mixed_numbers: 4, counting: 1, number_story: 16, changing_story: 8, echo: 5,
    sentences: 8, story: 9, pirate_story: 2.5, quoted_words: 9, symbols: 1.5,
    facts: 4, word_list: 1.5, forms: 2, reading: 6, chat: 17,
}  # fmt: skip


def documents(seed: int) -> Iterator[str]:
    """An endless, seeded stream of documents."""
    rng = Random(seed)
    writers, weights = list(WRITERS), list(WRITERS.values())
    while True:
        yield rng.choices(writers, weights)[0](rng)
