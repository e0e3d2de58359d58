"""Generated data of the benchmark `together.py`: short English texts, made from parts by seed, no two alike."""

from __future__ import annotations

import random
from collections.abc import Callable

import dspy

TEAMS = {
    "shipping": [
        "the parcel never came", "the courier left it at the wrong house", "tracking has not moved for a week",
        "it was sent to my old street", "the box got lost on its way", "I still wait for my delivery",
        "nobody rang at my door", "the van went to another town", "the depot sent it back", "it is stuck at customs",
    ],
    "billing": [
        "I was charged twice", "the invoice shows the wrong amount", "my card was debited too much",
        "I have not got my money back", "the discount was not taken off", "the receipt is missing",
        "you took a fee that I never agreed to", "the total is higher than the price", "my bank refused the payment",
        "the tax on it was counted wrong",
    ],
    "account": [
        "I can't log in", "I forgot my password", "my user name is not accepted", "the reset link does nothing",
        "please change my e-mail address", "somebody else uses my profile", "I want to delete my profile",
        "the code for signing in never comes", "my profile was locked", "I can't change my phone number online",
    ],
    "repairs": [
        "it stopped working", "the screen is cracked", "it makes a loud noise", "the handle broke off",
        "it does not switch on", "the battery gets too hot", "a button is stuck", "it leaks water",
        "the motor smells burnt", "the lid does not close any more",
    ],
}  # fmt: skip
PRODUCTS = (
    "kettle", "lamp", "toaster", "drill", "phone", "radio", "blender", "camera", "printer", "heater", "fan",
    "keyboard", "vacuum cleaner", "hair dryer", "coffee machine", "scale", "speaker", "tablet", "mixer", "iron",
)  # fmt: skip
OPENINGS = ("Hello,", "Good morning,", "Hi there,", "Dear team,", "Please help:", "Sorry to bother you,", "Listen,")
CLOSINGS = ("Thanks.", "Please hurry.", "What now?", "I am upset.", "Can you look?", "Best wishes.", "It is urgent.")
TICKETS = (
    "{opening} I bought a {product} and {problem}. {closing}",
    "About my {product}: {problem}. {closing}",
)

NAMES = (
    "Ada", "Ben", "Cora", "Dan", "Elsa", "Finn", "Gina", "Hugo", "Iris", "Jack", "Kira", "Leo", "Mia", "Noah", "Olga",
    "Paul", "Rosa", "Sam", "Tina", "Viktor",
)  # fmt: skip
SURNAMES = (
    "Abbot", "Brook", "Cole", "Dale", "Ellis", "Frost", "Grant", "Hale", "Ivers", "Jarvis", "Knox", "Lane", "Moss",
    "Nash", "Owens", "Pike", "Quill", "Reed", "Stone", "Tate",
)  # fmt: skip
SYLLABLES = (("Bran", "Cor", "Del", "Esk", "Fal", "Gor", "Hol", "Kel", "Lin", "Mar", "Nor", "Pel", "Ros", "Tor", "Ul"),
             ("a", "e", "i", "o"), ("bury", "dale", "ford", "ham", "mere", "ton", "vik", "wick"))  # fmt: skip
COUNTIES = ("Ashland", "Berkland", "Croyland", "Dunland", "Eastmark", "Fenmark", "Highmark", "Lowmark")
FOODS = ("apples", "bread", "carrots", "fish", "hay", "meat", "nuts", "rice", "seeds", "worms")
PETS = ("Biscuit", "Cinder", "Dot", "Flash", "Ginger", "Mopsy", "Nipper", "Pepper", "Rusty", "Smoky", "Tiger", "Whisky")

THINGS = ("apples", "books", "coins", "eggs", "flowers", "marbles", "pencils", "shells", "stamps", "tickets", "toys")

ITEMS = (
    "green tea", "black pens", "paper cups", "white plates", "red apples", "wool socks", "blue ink", "desk lamps",
    "garden chairs", "oak boards", "fresh eggs", "sea salt", "dog food", "wall clocks", "rubber boots",
    "steel screws",
)  # fmt: skip
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
NUMBERS = ("two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")
ORDERS = (
    "{name} {surname} wants {number} boxes of {item} by {day}.",
    "Please send {number} packs of {item} to {name} {surname} on {day}.",
    "On {day}, {number} bags of {item} go to {name} {surname}.",
    "{name} {surname} called: {number} crates of {item}, not before {day}.",
    "We promised {name} {surname} {number} boxes of {item} for {day}.",
    "For {day}: {item}, {number} packs, customer {name} {surname}.",
)

NOUNS = (
    "blanket", "bread", "bridge", "candle", "doctor", "dog", "garden", "horse", "island", "letter", "market", "mirror",
    "music", "ocean", "river", "teacher", "tower", "train", "window", "winter",
)  # fmt: skip


def distinct(make: Callable[[random.Random], dspy.Example], count: int, seed: int) -> list[dspy.Example]:
    """`count` examples of which no two have the same inputs."""
    rng = random.Random(seed)
    found: dict[str, dspy.Example] = {}
    while len(found) < count:
        example = make(rng)
        found.setdefault(repr(sorted(example.inputs().items())), example)
    return list(found.values())


def _message(rng: random.Random) -> tuple[str, str, str]:
    """A customer's message, the team that it is for, and the product that it is about."""
    team, template = rng.choice(list(TEAMS)), rng.choice(TICKETS)
    opening, product = rng.choice(OPENINGS), rng.choice(PRODUCTS)
    problem, closing = rng.choice(TEAMS[team]), rng.choice(CLOSINGS)
    return template.format(opening=opening, product=product, problem=problem, closing=closing), team, product


def ticket(rng: random.Random) -> dspy.Example:
    """A customer's message and the team that it is for."""
    message, team, _ = _message(rng)
    return dspy.Example(message=message, team=team).with_inputs("message")


def bought(rng: random.Random) -> dspy.Example:
    """A customer's message and the product that it is about."""
    message, _, product = _message(rng)
    return dspy.Example(message=message, product=product).with_inputs("message")


def three_words(rng: random.Random) -> dspy.Example:
    """Three words."""
    return dspy.Example(words=", ".join(rng.sample(NOUNS, 3))).with_inputs("words")


def knowledge() -> dict[str, str]:
    """What is known of each of 400 people, of where they live and of their pets; the same at each call."""
    rng = random.Random(0)
    towns = ["".join((first, vowel, last)) for first in SYLLABLES[0] for vowel in SYLLABLES[1] for last in SYLLABLES[2]]
    pets = [f"{pet} {letter}" for pet in PETS for letter in "ABCDEFGHIJKLMNOPQRSTUVWXYZ"]
    people = [f"{name} {surname}" for name in NAMES for surname in SURNAMES]
    facts = {town: f"{town} lies in {rng.choice(COUNTIES)}." for town in towns}
    facts |= {pet: f"{pet} eats {rng.choice(FOODS)}." for pet in pets}
    for person in people:
        parts = [f"lives in {rng.choice(towns)}", f"has a pet called {rng.choice(pets)}"]
        facts[person] = f"This person {' and '.join(rng.sample(parts, 2))}."
    return facts


FACTS = knowledge()


def hop_question(rng: random.Random) -> dspy.Example:
    """A question about a person, whose answer stands in the facts of that person's town or pet."""
    person = f"{rng.choice(NAMES)} {rng.choice(SURNAMES)}"
    question, relation = rng.choice(
        [(f"In which county does {person} live?", "lives in "), (f"What does the pet of {person} eat?", "called ")]
    )
    name = FACTS[person].partition(relation)[2].partition(" and ")[0].removesuffix(".")
    answer = FACTS[name].removesuffix(".").split()[-1]
    return dspy.Example(question=question, answer=answer).with_inputs("question")


def sum_question(rng: random.Random) -> dspy.Example:
    """A word problem of one or two steps with small numbers."""
    name, other = rng.sample(NAMES, 2)
    things = rng.choice(THINGS)
    a, b, c = rng.randint(4, 12), rng.randint(2, 9), rng.randint(1, 3)
    question, answer = rng.choice(
        [
            (f"{name} has {a} {things} and gets {b} more. How many {things} does {name} have?", a + b),
            (f"{name} has {a} red and {b} blue {things}. How many {things} are that?", a + b),
            (f"{name} had {a + b} {things} and lost {b}. How many {things} are left?", a),
            (f"{name} has {a} {things}, gets {b} and gives away {c}. How many {things} are left?", a + b - c),
            (f"{name} has {b} {things}. {other} has {c} more than {name}. How many does {other} have?", b + c),
        ]
    )
    return dspy.Example(question=question, answer=answer).with_inputs("question")


def order_text(rng: random.Random) -> dspy.Example:
    """An order in a sentence, and its fields."""
    number, name, surname = rng.randrange(len(NUMBERS)), rng.choice(NAMES), rng.choice(SURNAMES)
    fields = {
        "customer": f"{name} {surname}",
        "item": rng.choice(ITEMS),
        "quantity": number + 2,
        "day": rng.choice(DAYS),
    }
    text = rng.choice(ORDERS).format(name=name, surname=surname, number=NUMBERS[number], **fields)
    return dspy.Example(text=text, order=fields).with_inputs("text")
