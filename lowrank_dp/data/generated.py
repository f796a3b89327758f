"""Generated English: sentiment sentences and tables with descriptions, private and public.

The sentiment of a sentence follows from its composition, not from a count of words: from the
adjective, from a negation, and from which of two clauses carries the verdict. Tables have E2E's
form, ``name[...], food[...]``, and one to three descriptions each.

The hash of a sentence or table makes it public or private (:func:`_is_public`), so that the public
corpus is disjoint from every private data set for all seeds.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator
from typing import TypeVar

T = TypeVar("T")

POSITIVE = (
    "brilliant",
    "charming",
    "clever",
    "delightful",
    "fresh",
    "funny",
    "gripping",
    "lovely",
    "moving",
    "superb",
    "warm",
    "witty",
)
NEGATIVE = (
    "awful",
    "bland",
    "boring",
    "clumsy",
    "dreary",
    "dull",
    "flat",
    "hollow",
    "messy",
    "painful",
    "stale",
    "tedious",
)
SUBJECTS = (
    "acting",
    "cast",
    "dialogue",
    "direction",
    "editing",
    "ending",
    "film",
    "humour",
    "movie",
    "music",
    "pacing",
    "plot",
    "premise",
    "score",
    "script",
    "story",
)
PLACES = (
    "in Bergen",
    "in Leeds",
    "in Porto",
    "in Turin",
    "in Ghent",
    "in Quito",
    "in Accra",
    "in Osaka",
    "at home",
    "on the train",
)
COMPANY = ("alone", "with my sister", "with my father", "with my cousin", "with friends")
TIMES = (
    "on monday",
    "on tuesday",
    "on friday",
    "on sunday",
    "in april",
    "in october",
    "last winter",
    "last night",
)
DEGREES = ("", "", "", "really ", "quite ", "rather ", "truly ")
SEEMS = ("is", "is", "feels", "seems", "remains")
NEGATIONS = ("is not {}", "is never {}", "is hardly {}")

FIRST = (
    "Amber",
    "Brass",
    "Cedar",
    "Copper",
    "Crimson",
    "Golden",
    "Hazel",
    "Ivory",
    "Jade",
    "Lime",
    "Maple",
    "Marble",
    "Olive",
    "Pearl",
    "Quiet",
    "Rusty",
    "Scarlet",
    "Silver",
    "Velvet",
    "Willow",
)
SECOND = (
    "Anchor",
    "Bell",
    "Bridge",
    "Crown",
    "Falcon",
    "Fork",
    "Garden",
    "Harbour",
    "Kettle",
    "Lantern",
    "Mill",
    "Oak",
    "Orchard",
    "Otter",
    "Plough",
    "River",
    "Spoon",
    "Swan",
    "Table",
    "Wheel",
)
ATTRIBUTES = {
    "eatType": ("pub", "restaurant", "coffee shop"),
    "food": ("Italian", "Indian", "Chinese", "French", "Japanese", "English", "fast food"),
    "priceRange": ("cheap", "moderate", "high"),
    "customer rating": ("low", "average", "5 out of 5"),
    "area": ("city centre", "riverside"),
    "familyFriendly": ("yes", "no"),
    "near": ("Blue Gate", "Café Lisbon", "Clare Station", "Green Park", "The Old Mint"),
}


def sentiment(
    seed: int, num_train: int = 4000, num_validation: int = 1000
) -> dict[str, list[tuple[str, int]]]:
    """Generate private pairs (text, label) with distinct texts; label 1 is positive.

    The result maps "train" and "validation" to ``num_train`` and ``num_validation`` pairs. Both
    splits have the same distribution.
    """
    rows = _distinct(_sentence, _rng("sentiment", seed), public=False)
    return {"train": _take(rows, num_train), "validation": _take(rows, num_validation)}


def tables(
    seed: int, num_train: int = 1500, num_others: int = 200
) -> dict[str, list[tuple[str, str]]]:
    """Generate private pairs (table, description); no two splits share a table.

    ``num_train`` is the number of tables of the train split, ``num_others`` that of the validation
    split and again of the test split. A table has one to three pairs.
    """
    rng = _rng("tables", seed)
    found = _distinct(_table, rng, public=False)
    sizes = {"train": num_train, "validation": num_others, "test": num_others}
    return {
        split: [
            (table, text)
            for table, values in _take(found, size)
            for text in _descriptions(values, rng)
        ]
        for split, size in sizes.items()
    }


def corpus(num_texts: int, seed: int) -> list[str]:
    """Generate public texts: half sentences, half tables with a description on the next line."""
    rng = _rng("corpus", seed)
    sentences = _distinct(_sentence, rng, public=True)
    found = _distinct(_table, rng, public=True)
    texts = []
    for i in range(num_texts):
        if i % 2 == 0:
            texts.append(next(sentences)[0])
        else:
            table, values = next(found)
            texts.append(f"{table}\n{_descriptions(values, rng)[0]}")
    return texts


def public_sentiment(num_texts: int, seed: int) -> list[tuple[str, int]]:
    """Generate public pairs (text, label) with distinct texts; label 1 is positive."""
    return _take(_distinct(_sentence, _rng("public sentiment", seed), public=True), num_texts)


def public_tables(num_texts: int, seed: int) -> list[tuple[str, str]]:
    """Generate public pairs (table, description) with distinct tables."""
    rng = _rng("public tables", seed)
    found = _take(_distinct(_table, rng, public=True), num_texts)
    return [(table, _descriptions(values, rng)[0]) for table, values in found]


def _sentence(rng: random.Random) -> tuple[str, int]:
    """Generate a sentence and its label (1 positive)."""
    first, second = rng.sample(SUBJECTS, 2)
    label = rng.randrange(2)
    verdict, opposite = _predicate(rng, label), _predicate(rng, 1 - label)
    agreeing = f"the {first} {verdict} and the {second} {_predicate(rng, label)}"
    body = rng.choice(
        (
            f"the {first} {verdict}",
            f"the {first} {verdict}",
            agreeing,
            agreeing,
            agreeing,
            f"the {first} {opposite} , but the {second} {verdict}",
            f"although the {first} {opposite} , the {second} {verdict}",
            f"i was told that the {first} {opposite} , yet it {verdict}",
        )
    )
    setting = [rng.choice(options) for options in (PLACES, COMPANY, TIMES)]
    context = " ".join(rng.sample(setting, rng.randint(1, 2)))
    return rng.choice((f"{context} : {body} .", f"{body} , {context} .")), label


def _predicate(rng: random.Random, label: int) -> str:
    """Generate a verb phrase of the given polarity, with a negation in one of seven."""
    negated = rng.random() < 1 / 7
    word = rng.choice(POSITIVE if label != negated else NEGATIVE)
    if negated:
        return rng.choice(NEGATIONS).format(word)
    return f"{rng.choice(SEEMS)} {rng.choice(DEGREES)}{word}"


def _table(rng: random.Random) -> tuple[str, dict[str, str]]:
    """Generate a table in E2E's form, and its values."""
    values = {"name": f"The {rng.choice(FIRST)} {rng.choice(SECOND)}"}
    chosen = set(rng.sample(sorted(ATTRIBUTES), rng.randint(2, 5)))
    values |= {key: rng.choice(options) for key, options in ATTRIBUTES.items() if key in chosen}
    return ", ".join(f"{key}[{value}]" for key, value in values.items()), values


def _descriptions(values: dict[str, str], rng: random.Random) -> list[str]:
    """Generate one to three different descriptions of a table; each gives all its values."""
    texts = {_description(values, rng) for _ in range(rng.randint(1, 3))}
    return sorted(texts)


def _description(values: dict[str, str], rng: random.Random) -> str:
    name, place = values["name"], values.get("eatType", "place")
    food = f" {values['food']} food" if "food" in values else ""
    serving = rng.choice((f" serving{food}", f" that offers{food}")) if food else ""
    near = (
        rng.choice((f" near {values['near']}", f" close to {values['near']}"))
        if "near" in values
        else ""
    )
    area = {"city centre": " in the city centre", "riverside": " by the riverside"}.get(
        values.get("area", ""), ""
    )
    sentences = [f"{name} is a {place}{serving}{area}{near}."]
    if "priceRange" in values:
        price = values["priceRange"]
        sentences.append(rng.choice((f"Its prices are {price}.", f"The price range is {price}.")))
    if "customer rating" in values:
        rating = values["customer rating"]
        sentences.append(
            rng.choice((f"Customers rate it {rating}.", f"It has a customer rating of {rating}."))
        )
    if "familyFriendly" in values:
        sentences.append(
            {
                "yes": rng.choice(("It is family friendly.", "Children are welcome.")),
                "no": rng.choice(("It is not family friendly.", "It is for adults only.")),
            }[values["familyFriendly"]]
        )
    rest = sentences[1:]
    rng.shuffle(rest)
    return " ".join([sentences[0], *rest])


def _is_public(text: str) -> bool:
    """Tell whether a text is public: its hash makes one text in four public."""
    return hashlib.sha256(text.encode()).digest()[0] % 4 == 0


def _distinct(
    make: Callable[[random.Random], tuple[str, T]], rng: random.Random, *, public: bool
) -> Iterator[tuple[str, T]]:
    """Yield pairs from ``make`` without end, with distinct texts, all public or all private."""
    seen: set[str] = set()
    while True:
        text, value = make(rng)
        if text not in seen and _is_public(text) == public:
            seen.add(text)
            yield text, value


def _take(rows: Iterator[T], count: int) -> list[T]:
    return [next(rows) for _ in range(count)]


def _rng(purpose: str, seed: int) -> random.Random:
    return random.Random(f"lowrank_dp {purpose} {seed}")  # a string seed is hashed by SHA-512
