"""Several target sites steered together, at equal KL: ``python benchmarks/target_sites.py``.

Native and mapped vectors of one target site, and of stacks of two and three, each at the KL of the best single site's
native vector at strength 1. About an hour on one core for three concepts; writes benchmarks/target_sites.json.
"""

import json
import sys
from pathlib import Path
from typing import Any

import xmodel_steer as xs
from xmodel_steer.core.spaces import Stack
from xmodel_steer.maps.statistics import bootstrap_mean
from xmodel_steer.recipe.matching import matched
from xmodel_steer.recipe.preparing import default_sites, prepare
from xmodel_steer.recipe.selecting import gains
from xmodel_steer.recipe.settings import Budget, GeneralText, Method
from xmodel_steer.studies.concept_table import SETTINGS, prompts_of
from xmodel_steer.studies.concepts import concept
from xmodel_steer.studies.demo import SOURCE, TARGET

TABLE = Path(__file__).parent / "target_sites.json"
PROMPTS = 150


def measure(source: Any, target: Any, name: str) -> dict[str, Any]:
    """Measure each vector's gain, and its difference from the native one at the best single site."""
    general, neutral = SETTINGS.texts()
    carried, singles = concept(name), default_sites(target, "target")
    stack = next(site for site in default_sites(source, "source") if isinstance(site, Stack))
    together = [Stack(singles[:2]), Stack(singles[1:]), Stack(singles)]
    prepared = prepare(
        source, target, carried.contrast, GeneralText(general, neutral), label=name, method=Method(carried.tokens),
        behaviour=carried.behaviour(*prompts_of(PROMPTS), max_new_tokens=16, batch_size=192), cached=True,
        source_sites=[stack], target_sites=[*singles, *together],
        budget=Budget((-1.0, 1.0), False, map_tokens=192, neutral_tokens=SETTINGS.neutral_tokens),
    )  # fmt: skip
    tried, _ = gains(prepared, "target layer", [(prepared.natives[site], site, 1.0) for site in singles])
    best = max(zip(tried, singles, strict=True), key=lambda each: each[0]["score"])[1]

    vectors: dict[str, xs.SteeringVector] = {}
    for site in (best, *together):
        native = prepared.natives[site]
        mapping = xs.Ridge().fit(prepared.moments.pair(stack, site))
        mapped = mapping.transport(prepared.sources[stack]).with_scale(prepared.moments.scale(site))
        vectors |= {f"native {site}": native, f"mapped {site}": mapped.at_norm_of(native)}
    reference, budget = prepared.natives[best], prepared.budget
    signs = list(enumerate((1, -1)))
    candidates = [(vector, i, sign) for vector in vectors.values() for i, sign in signs]
    _, doses = matched(
        target, [prepared.steer(reference, sign) for _, sign in signs], candidates, prepared.text.reported,
        max_tokens=budget.neutral_tokens,
    )  # fmt: skip
    settings = [prepared.steer(vector, dose.strength) for (vector, *_), dose in zip(candidates, doses, strict=True)]
    found = prepared.evaluation.measure(target, settings)
    gained = {name: (found[2 * i].scores - found[2 * i + 1].scores) / 2 for i, name in enumerate(vectors)}
    base = gained[f"native {best}"]
    return {
        name: {
            "gain": bootstrap_mean(gain).record(),
            "beyond the native vector at one site": bootstrap_mean(gain - base).record(),
            "kl": [round(dose.kl, 4) for dose in doses[2 * i : 2 * i + 2]],
            "reached": all(dose.reached for dose in doses[2 * i : 2 * i + 2]),
        }
        for i, (name, gain) in enumerate(gained.items())
    }


def main() -> None:
    """Measure the concepts that were asked for, by default three."""
    source, target = (xs.load(name) for name in (SOURCE, TARGET))
    table: dict[str, Any] = json.loads(TABLE.read_text()) if TABLE.is_file() else {}
    for name in sys.argv[1:] or ("sentiment", "questions", "tense"):
        table[name] = measure(source, target, name)
        TABLE.write_text(json.dumps(table, indent=1) + "\n")
        for arm, row in table[name].items():
            beyond = row["beyond the native vector at one site"]
            print(
                f"{name}, {arm}: gain {row['gain']['value']:.3f}, {beyond['value']:+.3f} [{beyond['low']:.3f}, "
                f"{beyond['high']:.3f}] beyond native at one site, KL {row['kl']}",
                flush=True,
            )


if __name__ == "__main__":
    main()
