"""Makes what `05_reading_a_result.ipynb` reads: python notebooks/studies/05_reading_a_result.py (the demo: about ten minutes on two cores).

Kept without map and vectors, and of the texts only those of the unsteered model and at equal KL.
"""

from dataclasses import replace
from pathlib import Path

import xmodel_steer as xs
from xmodel_steer.studies.demo import concept_demo

OUT = Path(__file__).parent / "05_reading_a_result"


def kept(result: xs.Result) -> xs.Result:
    """The result without its files of tensors, and with the texts that are read."""
    arms = [a if a.at == "equal KL" or a.arm == "unsteered" else replace(a, texts=()) for a in result.arms]
    return replace(result, arms=tuple(arms), vectors={}, maps={})


if __name__ == "__main__":
    xs.save(kept(concept_demo("sentiment")), OUT / "sentiment")
