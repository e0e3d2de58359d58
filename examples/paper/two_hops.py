"""A small world in passages, and questions that take two of them each: made rows of the kind of hotpotqa/hotpot_qa.

900 people live in towns and work for companies; 480 towns lie in counties on rivers; 120 companies make things. Nothing
of it can be known from elsewhere, so that an answer has to come from the passages.
"""

from __future__ import annotations

import functools
import random
from typing import Any

FIRST = (
    "Ada", "Ben", "Cora", "Dan", "Elsa", "Finn", "Gina", "Hugo", "Iris", "Jack", "Kira", "Leo", "Mia", "Noah", "Olga",
    "Paul", "Quinn", "Rosa", "Sam", "Tina", "Uma", "Viktor", "Wanda", "Xaver", "Yara", "Zoe", "Amos", "Berta", "Carl",
    "Doris",
)  # fmt: skip
LAST = (
    "Abbot", "Brook", "Cole", "Dale", "Ellis", "Frost", "Grant", "Hale", "Ivers", "Jarvis", "Knox", "Lane", "Moss",
    "Nash", "Owens", "Pike", "Quill", "Reed", "Stone", "Tate", "Upton", "Vance", "Wolfe", "Yates", "Zeller", "Archer",
    "Barlow", "Carver", "Draper", "Fuller",
)  # fmt: skip
TOWN_HEADS = ("Bran", "Cor", "Del", "Esk", "Fal", "Gor", "Hol", "Kel", "Lin", "Mar", "Nor", "Pel", "Ros", "Tor", "Ul")
TOWN_ENDS = ("bury", "dale", "ford", "ham", "mere", "ton", "vik", "wick")
COUNTIES = ("Ashland", "Berkland", "Croyland", "Dunland", "Eastmark", "Fenmark", "Highmark", "Lowmark")
RIVERS = ("Alder", "Birch", "Clear", "Dove", "Elder", "Fern", "Grey", "Hazel", "Ivy", "Swift")
PRODUCTS = (
    "bells",
    "boats",
    "bricks",
    "candles",
    "clocks",
    "glass",
    "gloves",
    "lamps",
    "paper",
    "soap",
    "tiles",
    "toys",
)
COMPANY_ENDS = ("and Sons", "Brothers", "Works", "Company")
JOBS = ("baker", "clerk", "doctor", "driver", "engineer", "lawyer", "painter", "teacher")
PARAGRAPHS = 10
"""Of a question: two that answer it, and others."""


@functools.cache
def world() -> dict[str, dict[str, Any]]:
    """What is known of each person, town and company, by name; the same at each call."""
    rng = random.Random(0)
    towns = ["".join((head, vowel, end)) for head in TOWN_HEADS for vowel in "aeio" for end in TOWN_ENDS]
    companies = [f"{name} {end}" for name in LAST for end in COMPANY_ENDS]
    known: dict[str, dict[str, Any]] = {}
    for town, year in zip(towns, rng.sample(range(800, 1800), len(towns)), strict=True):
        known[town] = {"county": rng.choice(COUNTIES), "river": rng.choice(RIVERS), "founded": year}
    for company in companies:
        known[company] = {"makes": rng.choice(PRODUCTS), "town": rng.choice(towns)}
    for person in (f"{first} {last}" for first in FIRST for last in LAST):
        known[person] = {"job": rng.choice(JOBS), "town": rng.choice(towns), "company": rng.choice(companies)}
    return known


def sentences(name: str) -> list[str]:
    """The passage on a person, town or company."""
    facts = world()[name]
    if "job" in facts:
        return [f"{name} is a {facts['job']} who lives in {facts['town']}.", f" {name} works for {facts['company']}."]
    if "makes" in facts:
        return [f"{name} is a company in {facts['town']}.", f" It makes {facts['makes']}."]
    return [
        f"{name} is a town in the county of {facts['county']}.",
        f" It lies on the river {facts['river']} and was founded in {facts['founded']}.",
    ]


def rows(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Different questions, a quarter of them comparisons, with what the hub has of each."""
    rng = random.Random(seed)
    made: dict[str, dict[str, Any]] = {}
    while len(made) < count:
        question, answer, kind, gold = _comparison(rng) if rng.random() < 0.25 else _bridge(rng)
        if question not in made:
            made[question] = _row(f"made-{len(made):05}", question, answer, kind, gold, rng)
    return list(made.values())


def _bridge(rng: random.Random) -> tuple[str, str, str, list[tuple[str, int]]]:
    known = world()
    person = f"{rng.choice(FIRST)} {rng.choice(LAST)}"
    town, company = known[person]["town"], known[person]["company"]
    return rng.choice(
        [
            (
                f"In which county is the town where {person} lives?",
                known[town]["county"],
                "bridge",
                [(person, 0), (town, 0)],
            ),
            (
                f"On which river lies the town where {person} lives?",
                known[town]["river"],
                "bridge",
                [(person, 0), (town, 1)],
            ),
            (
                f"What does the company that {person} works for make?",
                known[company]["makes"],
                "bridge",
                [(person, 1), (company, 1)],
            ),
        ]
    )


def _comparison(rng: random.Random) -> tuple[str, str, str, list[tuple[str, int]]]:
    known = world()
    one, other = rng.sample([name for name, facts in known.items() if "founded" in facts], 2)
    older = min(one, other, key=lambda name: known[name]["founded"])
    return f"Which town was founded first, {one} or {other}?", older, "comparison", [(one, 1), (other, 1)]


def _row(
    number: str, question: str, answer: str, kind: str, gold: list[tuple[str, int]], rng: random.Random
) -> dict[str, Any]:
    titles = [title for title, _ in gold]
    others = [name for name in rng.sample(list(world()), PARAGRAPHS) if name not in titles]
    titles = rng.sample(titles + others[: PARAGRAPHS - len(titles)], PARAGRAPHS)
    return {
        "id": number,
        "question": question,
        "answer": answer,
        "type": kind,
        "level": "hard",
        "supporting_facts": {"title": [title for title, _ in gold], "sent_id": [place for _, place in gold]},
        "context": {"title": titles, "sentences": [sentences(title) for title in titles]},
    }
