"""Makes what `05_reading_a_result.ipynb` reads: python notebooks/studies/05_reading_a_result.py (about ten minutes on two cores).

Two run folders of the packaged pair, with the same map: the demo, and a behaviour that the map's text does not contain.
Kept without map and vectors, and of the texts only those of the unsteered model and at equal KL.
"""

import json
from dataclasses import replace
from pathlib import Path

import xmodel_steer as xs
from xmodel_steer import demo
from xmodel_steer.transfer import transfer

OUT = Path(__file__).parent / "05_reading_a_result"
SENTENCES = OUT / "french_sentences.jsonl"  # French ones and what they say in English, written for this study
PROMPTS = 36  # a third validates


def kept(result: xs.TransferResult) -> xs.TransferResult:
    """The result without its files of tensors, and with the texts that are read."""
    arms = [a if a.budget is not None or a.arm == "unsteered" else replace(a, texts=()) for a in result.arms]
    return replace(result, arms=tuple(arms), vectors={}, mapping=None)


def french(site: xs.Site, target_site: xs.Site) -> xs.TransferResult:
    """French against English, by the demo's map, at the sites that the demo chose."""
    small, large = (xs.load(name, dtype="auto") for name in (demo.SOURCE, demo.TARGET))
    passages = demo.general_text()
    rows = [json.loads(line) for line in SENTENCES.read_text(encoding="utf-8").splitlines()]
    moments = demo.cached_moments(
        small, large, passages[: demo.MAP_DOCUMENTS],
        source_sites=demo.SOURCE_SITES, target_sites=demo.TARGET_SITES, max_tokens=demo.MAP_TOKENS,
    )  # fmt: skip
    return transfer(
        small,
        large,
        xs.ContrastSet.from_records(rows),
        (),
        prompts=demo.behaviour_data("sentiment")[1][:PROMPTS],  # beginnings of English sentences
        scorer=xs.Language("french"),
        label="French",
        unit="share of texts in French (0 to 1)",
        source_sites=[site],
        target_sites=[target_site],
        strengths=(0.5, 1.0),
        moments=moments,
        neutral_texts=passages[-demo.NEUTRAL_DOCUMENTS :],
        neutral_tokens=demo.NEUTRAL_TOKENS,
        max_new_tokens=20,
        random_seeds=2,
        side={},
        max_perplexity_ratio=10.0,  # English text is the neutral text: a model that writes French must find it unlikely
    )


def main() -> None:
    """Run both and write their folders."""
    sentiment = demo.demo("sentiment")
    xs.save(kept(sentiment), OUT / "sentiment")
    sites = (xs.Site(end["layer"]) for end in (sentiment.source, sentiment.target))
    xs.save(kept(french(*sites)), OUT / "french")


if __name__ == "__main__":
    main()
