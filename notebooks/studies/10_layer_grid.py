"""Makes what `10_layer_grid.ipynb` shows: python notebooks/studies/10_layer_grid.py (about 20 minutes on two cores).

The 30 × 18 layer grid of the packaged pair from one pass over the text; what mapped vectors of 24 layer pairs do;
every fitter on one pair, by held-out score and by steering effect.
"""

import json
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

import xmodel_steer as xs
from xmodel_steer.files.wheels import general_text
from xmodel_steer.maps.statistics import bootstrap_mean, resamples
from xmodel_steer.recipe.carrying import versions
from xmodel_steer.studies.concepts import concept
from xmodel_steer.studies.demo import NEUTRAL_DOCUMENTS, SOURCE, TARGET

OUT = Path(__file__).parent / "10_layer_grid"
MAP_TEXTS, MAX_TOKENS, NEW_TOKENS = 500, 192, 20
SOURCE_LAYERS, TARGET_LAYERS = (3, 9, 15, 18, 21, 27), (4, 8, 10, 13)
NAMES = ("sentiment", "first-person")
CHOICE, EVALUATION = slice(0, 36), slice(36, 108)  # prompts that the layer pairs are compared on; that fitters are


def directions(model: Any, contrast: xs.ContrastSet, sites: list[xs.Site], label: str) -> tuple[dict, dict, dict]:
    """Activations of both sides and their difference of means, at each site."""
    sides = [
        xs.capture(model, side, sites, tokens="mean", batch_size=32, progress=False)
        for side in (contrast.positive, contrast.negative)
    ]
    return sides[0], sides[1], {s: xs.difference_of_means(sides[0][s], sides[1][s], label=label) for s in sites}


def measure(model: Any, vectors: list[Any], name: str, prompts: Any, strength: float, neutral: Any) -> list[dict]:
    """For each vector: scores at both signs, their half difference per prompt, and KL and perplexity."""
    settings = [[xs.Intervention(v, xs.Add(s))] for v in vectors for s in (-strength, strength)]
    behaviour = xs.behaviours.GeneratedText(prompts, concept(name).scorer, NEW_TOKENS)
    measured = behaviour.measure(model, settings)
    effects = xs.evaluation.side_effects(model, settings, neutral, max_tokens=24, batch_size=16)
    made = []
    for k in range(len(vectors)):
        down, up = measured[2 * k].scores, measured[2 * k + 1].scores
        pair = effects[2 * k : 2 * k + 2]
        made.append(
            {
                "gain": asdict(bootstrap_mean((up - down) / 2)),
                "minus": float(down.mean()),
                "plus": float(up.mean()),
                "kl": float(np.mean([e.mean_kl for e in pair])),
                "perplexity": [e.perplexity for e in pair],
                "gains": ((up - down) / 2).tolist(),
            }
        )
    return made


def rank_correlation(pairs: list[dict], metric: str) -> dict:
    """Spearman's ρ of a held-out metric and the gain over layer pairs, with intervals.

    One interval resamples the prompts that gains were measured on, the other the layer pairs, which share layers
    and so are not independent: read it as a lower bound of the uncertainty.
    """
    x = np.array([p[metric] for p in pairs])
    gains = np.array([p["gains"] for p in pairs])
    rho = stats.spearmanr(x, gains.mean(1)).statistic
    prompts = [stats.spearmanr(x, gains[:, i].mean(1)).statistic for i in resamples(gains.shape[1], draws=1000)]
    draws = resamples(len(pairs), draws=1000)
    units = [stats.spearmanr(x[i], gains[i].mean(1)).statistic for i in draws if len(set(x[i])) > 3]
    within = [
        stats.spearmanr(x[own], gains[own].mean(1)).statistic
        for t in TARGET_LAYERS
        for own in [[i for i, p in enumerate(pairs) if p["target_layer"] == t]]
    ]
    return {
        "rho": float(rho),
        "over_prompts": np.nanquantile(prompts, [0.025, 0.975]).tolist(),
        "over_pairs": np.nanquantile(units, [0.025, 0.975]).tolist(),
        "within_target_layers": [float(w) for w in within],
        "pairs": len(pairs),
        "prompts": gains.shape[1],
    }


def main() -> None:
    """Run the study and write its results."""
    clock = time.time()
    OUT.mkdir(exist_ok=True)
    small, large = (xs.load(name, dtype="auto") for name in (SOURCE, TARGET))
    passages = general_text()
    texts, neutral = passages[:MAP_TEXTS], passages[-NEUTRAL_DOCUMENTS:]
    sources, targets = ([xs.Site(k) for k in layers] for layers in (SOURCE_LAYERS, TARGET_LAYERS))
    moments = xs.collect_moments(
        small, large, texts, source_sites="all", target_sites="all",
        pairs=[(s, t) for s in sources for t in targets], sketch=64, max_tokens=MAX_TOKENS, batch_size=32,
    )  # fmt: skip
    grid = xs.maps.layer_grid(moments)
    xs.save(grid, OUT / "grid.safetensors")
    print(f"grid: {time.time() - clock:.0f} s", flush=True)

    record: dict[str, Any] = {
        "versions": versions(),
        "behaviours": {},
        "map_tokens": moments.tokens,
        "texts": MAP_TEXTS,
    }
    frame = grid.to_frame().set_index(["source_layer", "target_layer"])
    for name in NAMES:
        contrast, prompts = concept(name).contrast, concept(name).prompts
        _, _, ours = directions(small, contrast, sources, name)
        natives = {s: v.with_scale(moments.scale(s)) for s, v in directions(large, contrast, targets, name)[2].items()}
        rows, vectors = [], []
        for t in targets:
            norm = natives[t].norm(standardised=True)
            for s in sources:
                fitted = xs.Ridge().fit(moments.pair(s, t))
                mapped = fitted.transport(ours[s])
                vectors.append(mapped.with_norm(norm))
                score = fitted.score_test
                assert score is not None
                rows.append(
                    {
                        "source_layer": s.layer, "target_layer": t.layer, "r2": score.mean_r2, "cosine": score.cosine,
                        "cka": float(frame.cka[s.layer, t.layer]), "vector_cosine": natives[t].cosine(mapped),
                        "vector_norm": mapped.norm(standardised=True) / norm,
                    }
                )  # fmt: skip
        chosen = prompts[CHOICE]
        for row, effect in zip(rows, measure(large, vectors, name, chosen, 1.0, neutral[:12]), strict=True):
            row |= effect
        own = measure(large, [natives[t] for t in targets], name, chosen, 1.0, neutral[:12])
        record["behaviours"][name] = {
            "pairs": rows,
            "native": [{"target_layer": t.layer, **effect} for t, effect in zip(targets, own, strict=True)],
            "correlation": {m: rank_correlation(rows, m) for m in ("r2", "cosine", "cka", "vector_cosine")},
        }
        print(f"{name}: {time.time() - clock:.0f} s", flush=True)

    # Every fitter on one pair. The pair is chosen by the validation prompts above, effects are from other prompts.
    name = NAMES[0]
    best = max(record["behaviours"][name]["pairs"], key=lambda row: row["gain"]["value"])
    s, t = xs.Site(best["source_layer"]), xs.Site(best["target_layer"])
    with tempfile.TemporaryDirectory() as folder:
        for model, end, site in ((small, "source", s), (large, "target", t)):
            store = xs.harvest(
                model, texts, folder, end=end, sites=[site], max_tokens=MAX_TOKENS, batch_size=32, dtype="float32"
            )
        pair = store.pair(s, t)
        xs.save(
            xs.maps.data_curve(
                pair,
                fitters={"Ridge": xs.Ridge(), "ReducedRank 64": xs.maps.ReducedRank(64), "Procrustes": xs.Procrustes()},
            ),
            OUT / "curve.safetensors",
        )
        longer = {"learning_rate": 1e-3, "batch_documents": 4, "accumulation": 1, "epochs": 60, "patience": 5}
        fitters: dict[str, Any] = {
            "Ridge": xs.Ridge(),
            "ReducedRank 64": xs.maps.ReducedRank(64),
            "Procrustes": xs.Procrustes(),
            "Procrustes, raw": xs.Procrustes(standardise=False),
            "RelativeAnchors": xs.maps.RelativeAnchors(tolerance=0.01),
            "Autoencoder": xs.Autoencoder(**longer),
            "SGDAffine": xs.maps.SGDAffine(**longer),
            "Autoencoder, paper's settings": xs.Autoencoder(standardise=False),
            "SGDAffine, paper's settings": xs.maps.SGDAffine(standardise=False),
            "Identity": xs.maps.Identity(),
            "ShuffledPairs(Ridge)": xs.maps.ShuffledPairs(xs.Ridge()),
            "RandomMap": xs.maps.RandomMap(),
        }
        contrast, prompts = concept(name).contrast, concept(name).prompts
        positive, negative, ours = directions(small, contrast, [s], name)
        native = directions(large, contrast, [t], name)[2][t].with_scale(moments.scale(t))
        rows, vectors = [], []
        for label, fitter in fitters.items():
            begun = time.time()
            fitted = fitter.fit(pair)
            nonlinear = isinstance(fitted, xs.maps.AutoencoderMap)
            mapped = (
                fitted.transport(ours[s], at=(positive[s], negative[s])) if nonlinear else fitted.transport(ours[s])
            )
            mapped = mapped.with_scale(moments.scale(t))
            score = fitted.score_test
            assert score is not None
            rows.append(
                {
                    "fitter": label, "settings": repr(fitter)[:300], "seconds": time.time() - begun, "r2": score.mean_r2,
                    "cosine": score.cosine, "norm_ratio": score.norm_ratio, "loss": fitted.info["loss"],
                    "epochs": fitted.info.get("epochs"), "test_tokens": score.count,
                    "vector_cosine": native.cosine(mapped),
                    "vector_norm": mapped.norm(standardised=True) / native.norm(standardised=True),
                }
            )  # fmt: skip
            vectors.append(mapped.with_norm(native.norm(standardised=True)))
            print(f"{label}: R² {score.mean_r2:.3f}, {time.time() - clock:.0f} s", flush=True)
    measured = measure(large, [*vectors, native], name, prompts[EVALUATION], 1.0, neutral)
    for row, effect in zip(rows, measured, strict=False):
        row |= effect
    unsteered = xs.behaviours.GeneratedText(prompts[EVALUATION], concept(name).scorer, NEW_TOKENS).measure(large, [[]])[
        0
    ]
    record["fitters"] = {
        "behaviour": name, "source_layer": s.layer, "target_layer": t.layer, "rows": rows, "native": measured[-1],
        "unsteered": asdict(bootstrap_mean(unsteered.scores)),
    }  # fmt: skip
    record["seconds"] = time.time() - clock
    (OUT / "study.json").write_text(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
