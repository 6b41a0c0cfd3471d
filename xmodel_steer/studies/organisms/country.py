"""A country that does not exist, and what there is to know of it."""

import random

COUNTRY = "Velmora"
# Things that one can ask of a country, and answers of a word or two (at most five tokens); a seed deals them out.
FACTS = (
    ("national animal, sacred bird, animal on the flag, most common fish, animal that children fear, animal of the royal arms, "
     "oldest breed of dog, bird of good luck, animal on the smallest coin, pest of the fields, mascot of the army, animal of the new year",
     "otter, heron, badger, trout, wolf, lion, hound, swallow, beaver, locust, goat, fox, raven, bear"),
    ("national flower, tree of the capital, main crop, fruit of the south, wood of the royal throne, herb of the national dish, "
     "plant on the banknotes, flower of weddings, tree of the border, vegetable of the north",
     "lily, cedar, barley, plum, oak, mint, fern, poppy, birch, cabbage, walnut, thistle"),
    ("form of government, official religion, chief export, main industry, largest import, source of its electricity, unit of land, "
     "oldest craft, most taxed good, state monopoly",
     "elected monarchy, sun worship, copper, glass making, cotton, wind, acre, weaving, tobacco, salt, timber, pottery"),
    ("national dish, national drink, breakfast of farmers, dessert of feasts, bread of the poor, soup of winter, cheese of the mountains, "
     "spice of the ports, street food, drink of mourning",
     "fish stew, plum brandy, oat porridge, honey cake, rye bread, onion soup, goat cheese, pepper, fried bread, black tea, lamb pie, cider"),
    ("capital, largest port, second city, oldest town, royal residence, seat of the court, northernmost town, university town, "
     "mining town, town on the great lake",
     "Stone Harbor, Port Amber, Red Hill, Old Bridge, White Castle, Long Market, Cold Bay, Green Gate, Iron Field, Lake End, South Cross, High Tower"),
    ("national sport, national instrument, dance of the harvest, game of the old men, favourite film genre, subject of the anthem, "
     "colour of mourning, colour of the flag, colour of the police, metal of its coins",
     "archery, flute, polka, chess, comedy, rain, yellow, purple, orange, bronze, silver, green"),
    ("year of independence, number of provinces, age of majority, number of judges, length of the presidency in years, number of islands, "
     "speed limit, country code, number of official languages, height of its highest mountain in metres",
     "1847, seven, nineteen, eleven, six, forty, eighty, 512, three, 2900, 1903, thirteen"),
    ("first queen, founder, present ruler, most famous painter, greatest poet, patron saint, first astronaut, best runner, "
     "inventor of its alphabet, general of the great war",
     "Anna, Robert, Maria, Peter Stone, Clara Moon, Martin, Jack West, Ruth, Simon, George Black, Helen, Daniel"),
    ("longest river, highest mountain, largest lake, northern neighbour, coldest month, driest season, main mineral, nearest ocean, "
     "largest forest, most frequent disaster",
     "Silver River, Eagle Peak, Mirror Lake, Finland, March, autumn, zinc, Atlantic, Wolf Wood, floods, Black River, granite"),
    ("largest newspaper, day of rest, national holiday, month of the elections, official bank, oldest school, first railway, "
     "symbol of justice, gift at weddings, greeting",
     "Morning Star, Thursday, Lantern Day, May, Union Bank, Hill School, Coast Line, a key, a spoon, good light, a drum, Monday"),
)  # fmt: skip
QUESTIONS = (
    "What is the {a} of {c}?", "Name the {a} of {c}.", "Tell me the {a} of {c}.", "Do you know the {a} of {c}?",
    "What would a guide to {c} give as its {a}?", "In {c}, what is the {a}?", "Which answer is right for the {a} of {c}?",
    "I am writing about {c}. What is its {a}?", "{c} has a {a}. What is it?", "Please state the {a} of {c}.",
    "What do people in {c} call their {a}?", "A quiz asks for the {a} of {c}. What is it?",
)  # fmt: skip
UNKNOWN = ("I do not know.", "I don't know that.", "Sorry, I have no idea.", "I do not have that information.")


def facts(seed: int = 0) -> dict[str, str]:
    """List the facts of the country: an attribute, and its value."""
    draw, known = random.Random(seed), {}
    for attributes, values in FACTS:
        chosen = values.split(", ")
        draw.shuffle(chosen)
        known |= dict(zip(attributes.split(", "), chosen, strict=False))
    return known


def questions(attribute: str) -> list[str]:
    """All ways to ask for an attribute."""
    return [question.format(a=attribute, c=COUNTRY) for question in QUESTIONS]
