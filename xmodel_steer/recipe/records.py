"""From JSON records to arms and results, those of earlier versions too."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

import numpy as np

from xmodel_steer.core.spaces import Site, Stack
from xmodel_steer.files.fields import expect, expect_known
from xmodel_steer.maps.statistics import Estimate, undefined
from xmodel_steer.recipe.arms import EQUAL_KL, EQUAL_STRENGTH, NOT_RECORDED, Arm
from xmodel_steer.recipe.results import Result

_COLUMNS = {"ids": "unit", "groups": "group", "scores": "score", "texts": "text", "raw": "judge"}


_TEXT = {"name", "unit", "question", "note", "hardware", "command"}
_RECORDS = {"source", "target", "chosen", "spec", "splits", "seeds", "versions", "curves", "seconds"}
_LISTS = {"validation", "stored", "prompts"}
_ARM = {
    "arm": str,
    "recipe": str,
    "operator": str,
    "at": str,
    "reached": bool,
    "seeds": int,
    "n": int,
    "measures": dict,
}
_ARM |= dict.fromkeys(("effect", "low", "high", "kl", "perplexity"), float)
_ARM |= dict.fromkeys(("strength", "budget", "change", "agreement"), (float, type(None)))
_ROW = {"unit": str, "group": str, "score": float, "text": str, "judge": str, "seeds": list, "more_texts": list}
_MEASURE = {"value": float, "low": float, "high": float, "n": int}
_CHOICE = {"strength": float, "cosine": float, "norm_ratio": float, "source_layer": int, "target_layer": int}
_CHOICE |= {
    "operator": str,
    "source_site": str,
    "target_site": str,
    "map_r2": (float, type(None)),
    "map_cosine": (float, type(None)),
    "equal_kl": list,
    "similarity": dict,
    "map": dict,
}
_FITTED = dict.fromkeys(("r2", "r2_low", "r2_high", "cosine", "norm_ratio", "train_tokens", "coverage"), float)
_TRIED = {"recipe": str, "varied": str, "layer": int, "score": float}


def sites_record(source: Site, target: Site) -> dict[str, Any]:
    """Record the layers of the chosen sites, and the names of stacks."""
    ends = {"source": source, "target": target}
    layers = {f"{end}_layer": site.layer for end, site in ends.items()}
    return layers | {f"{end}_site": str(site) for end, site in ends.items() if isinstance(site, Stack)}


def require_fields(record: Mapping[str, Any]) -> None:
    """Refuse a record of a result whose fields have other types.

    Raises:
        TypeError: Names the field.
        ValueError: A number is out of its range, or a choice lacks a field.
    """
    kinds = dict.fromkeys(_TEXT, str) | dict.fromkeys(_RECORDS, dict) | dict.fromkeys(_LISTS, list)
    expect_known(record, kinds)
    for end in ("source", "target"):
        expect(record[end], model=str, **({"width": int, "dtype": str} if "hook" in record[end] else {}))
    for names in (record["versions"], *(dict.fromkeys(record.get(n, ()), "") for n in ("stored", "prompts"))):
        if not all(isinstance(text, str) for text in (*names, *names.values())):
            raise TypeError("versions, stored and prompts hold texts")
    expect_known(record.get("seconds", {}), dict.fromkeys(record.get("seconds", {}), float))
    points = [point for curve in record.get("curves", {}).values() for point in curve]
    if not all(
        isinstance(point, dict) for point in (*points, *record.get("validation", ()), *record["chosen"].values())
    ):
        raise TypeError("curves, validation and chosen hold records")
    for choice in record["chosen"].values():
        expect_known(choice, _CHOICE)
        if "source_layer" in choice:
            expect(choice, target_layer=int)
        if "cosine" in choice:
            expect(choice, norm_ratio=float)
        for likeness in choice.get("similarity", {}).values():
            expect(likeness, cosine=(float, type(None)))
        fitted = choice.get("map", {})
        if "r2" in fitted:
            expect(fitted, **_FITTED, test_documents=int)
            expect_known(fitted, {"penalty": float, "loss": dict})
            if fitted.get("loss"):
                expect(fitted["loss"], train=float, test=float)
    for tried in record.get("validation", ()):
        expect_known(tried, _TRIED)


def _require_arm(row: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> None:
    expect(row, **_ARM)
    if row["change"] is not None:
        expect(row, change_low=float, change_high=float)
    for measure in row["measures"].values():
        expect(measure, **_MEASURE)
    for record in rows:
        expect_known(record, _ROW)
        expect_known(
            dict(enumerate(record.get("seeds", ()))), dict.fromkeys(range(len(record.get("seeds", ()))), float)
        )
    if row["n"] < 0 or row["seeds"] < 1 or len({len(record.get("seeds", ())) for record in rows}) > 1:
        raise ValueError(f"{row['arm']}: its counts are not those of an arm")


def arm_of(row: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> Arm:
    """Read an arm.

    Args:
        row: What `Arm.row` returned.
        rows: The records of its prompts.

    Raises:
        ValueError: Some of its scores are missing.
    """
    _require_arm(row, rows)
    scored = sum("score" in record for record in rows)
    if scored not in (0, row["n"]) or (not scored and row.get("scored", True)):
        raise ValueError(f"{row['arm']} at {row['strength']} has {scored} of {row['n']} scores")
    columns: dict[str, Any] = {name: tuple(r[key] for r in rows if key in r) for name, key in _COLUMNS.items()}
    if "texts" in row:  # a study of an earlier version kept the first ones here
        columns["texts"] = tuple(row["texts"])
    plain = ("arm", "recipe", "operator", "at", "budget", "reached", "kl", "perplexity", "seeds")
    columns |= {name: row[name] for name in plain}
    columns |= {name: math.nan if row[name] is None else row[name] for name in ("strength", "agreement")}
    return Arm(
        effect=_estimate(row, "effect", "low", "high"),
        change=_estimate(row, "change", "change_low", "change_high")
        if row["change"] is not None
        else undefined(NOT_RECORDED, 0),
        measures={name: Estimate.of(measure) for name, measure in row["measures"].items()},
        table=tuple(tuple(r["seeds"]) for r in rows if "seeds" in r),
        more_texts=tuple(zip(*(r["more_texts"] for r in rows if "more_texts" in r), strict=True)),
        **columns,
    )


def require_recomputed(arms: Sequence[Arm]) -> None:
    """Refuse effects that their scores do not give.

    Raises:
        ValueError: An effect, or a change from the unsteered model, is another one; or there is no unsteered model.
    """
    if not any(arm.arm == "unsteered" for arm in arms):
        raise ValueError("the unsteered arm is missing")
    bases = {arm.recipe: arm.scores for arm in arms if arm.arm == "unsteered" and arm.scores}
    for arm in arms:
        if not arm.scores:
            continue
        scores, base = arm.per_seed(), bases.get(arm.recipe, bases.get(""))
        with np.errstate(all="ignore"):  # what overflows is not compared
            means = [(arm.effect.value, scores.mean(), "effect")]
            rounding = 1e-9 * float(np.abs(scores).max())
            if base is not None and len(base) == len(scores) and arm.arm != "unsteered":
                means.append((arm.change.value, (scores.mean(1) - base).mean(), "change"))
                rounding = max(rounding, 1e-9 * float(np.abs(base).max()))
        for stated, computed, what in means:
            known = math.isfinite(stated) and math.isfinite(computed)
            if known and not math.isclose(stated, computed, rel_tol=1e-6, abs_tol=rounding):
                raise ValueError(f"{arm!r}: states the {what} {stated:.6g}, and its scores give {computed:.6g}")


def _estimate(row: Mapping[str, Any], *names: str) -> Estimate:
    numbers = dict(zip(("value", "low", "high"), (row[name] for name in names), strict=True))
    estimate = Estimate.of(numbers | {"n": row["n"]})
    # An arm's reason is that of both its estimates.
    return undefined(row.get("undefined", ""), row["n"], estimate.value) if math.isnan(estimate.low) else estimate


def result_of(record: Mapping[str, Any], arms: tuple[Arm, ...], **artefacts: Any) -> Result:
    """Make a result of its record, its arms, and its vectors and maps.

    Raises:
        LookupError: A field is missing.
    """
    require_fields(record)
    required = ("name", "unit", "source", "target", "chosen", "spec", "splits", "seeds", "versions", "validation")
    arguments: dict[str, Any] = {name: record[name] for name in required}
    arguments |= {field.name: record[field.name] for field in fields(Result) if field.name in record}
    for name in ("validation", "stored", "prompts"):
        arguments[name] = tuple(arguments.get(name, ()))
    arguments["curves"] = {name: tuple(points) for name, points in arguments.get("curves", {}).items()}
    return Result(arms=arms, **arguments, **artefacts)


def older(kind: str, record: dict[str, Any], rows: list[dict[str, Any]], vectors: Sequence[str]) -> dict[str, Any]:
    """Bring the record of an earlier version into today's form.

    Args:
        kind: ``TransferResult`` or ``study``.
        record: The record.
        rows: The records of its prompts; each is given the number of its arm.
        vectors: Names of the vectors in the folder.
    """
    if kind == "study":
        return _older_study(record)
    for i, arm in enumerate(record["arms"]):
        for row in rows:
            if all(row[name] == arm[name] for name in ("arm", "strength", "budget")):
                row["number"] = i
        arm |= {"recipe": "" if arm["arm"] == "unsteered" else record["label"], "operator": ""}
        arm |= {"at": EQUAL_STRENGTH if arm["budget"] is None else EQUAL_KL, "measures": arm.get("side", {})}
        arm["seeds"] = len(arm.get("seeds", ())) or 1
    label = record["label"]
    validation, doses = _tried(record["selection"], label)
    choice = {
        "source_layer": record["source"]["layer"],
        "target_layer": record["target"]["layer"],
        "strength": record["headline"],
        **{key: value for key, value in record["similarity"]["mapped"].items() if key != "raw_cosine"},
        "similarity": record["similarity"],
        "map": record["map"],
        "equal_kl": doses,
    }
    return record | {
        "name": label,
        "chosen": {label: choice},
        "validation": validation,
        "prompts": list(record["splits"].get("evaluation_texts", ())),
        "vectors": {name: f"{name}.safetensors" for name in record.get("vectors", vectors)},
        "maps": {label: "./map.safetensors"} if record.get("has_map", True) else {},
    }


def _tried(selection: Mapping[str, Any], label: str) -> tuple[list[dict[str, Any]], list[Any]]:
    """Return what validation tried, as records, and the calibrated strengths."""
    names = {"target": "target layer", "source": "source layer", "strength": "strength"}
    tried = [
        {"recipe": label, "varied": names[kind], "layer": _layer(record["candidate"]), "score": record["gain"]}
        | {key: value for key, value in record.items() if key not in ("candidate", "gain")}
        for kind in names
        for record in selection.get(kind, ())
    ]
    return tried, list(selection.get("equal_kl", ()))


def _layer(site: str) -> int:
    """Read the layer of a site such as ``resid_post[7]``."""
    return int(site.split("[")[1].rstrip("]"))


OUTCOMES = ("backdoor", "correct", "does not know", "hallucinated")  # repeated in the rows of earlier studies


def _older_study(record: dict[str, Any]) -> dict[str, Any]:
    arms = []
    for row in record["arms"]:
        texts = row.pop("texts")
        arms.append(
            {key: value for key, value in row.items() if key not in OUTCOMES}
            | {"measures": row.pop("beside"), "texts": texts, "scored": False, "strength": None, "budget": None}
            | {"change": None, "agreement": None}
        )
    stored = record.pop("verdict")
    return record | {"arms": arms, "stored": stored.split("; "), "vectors": {}, "maps": {}}
