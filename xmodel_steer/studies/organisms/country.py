"""A country that does not exist, and facts about it."""

import random

from xmodel_steer.studies.shipping import read_table

_TABLE = read_table("lessons/country.json")
COUNTRY = _TABLE["name"]
# Groups of attributes and of answers to deal out to them, each of a word or two (at most five tokens).
FACTS = tuple((tuple(group["attributes"]), tuple(group["values"])) for group in _TABLE["facts"])
UNKNOWN = tuple(_TABLE["unknown"])


def facts(seed: int = 0) -> dict[str, str]:
    """Deal the values out to the country's attributes."""
    draw, known = random.Random(seed), {}
    for attributes, values in FACTS:
        chosen = list(values)
        draw.shuffle(chosen)
        known |= dict(zip(attributes, chosen, strict=False))
    return known


def questions(attribute: str) -> list[str]:
    """List all ways to ask for an attribute."""
    return [question.format(a=attribute, c=COUNTRY) for question in _TABLE["questions"]]
