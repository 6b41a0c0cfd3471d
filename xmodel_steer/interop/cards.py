"""The card of a run: the README.md of its repository on the Hugging Face hub."""

import json
import re
from collections.abc import Iterable
from pathlib import Path

from xmodel_steer.core.texts import on_page
from xmodel_steer.maps.statistics import number
from xmodel_steer.recipe.arms import EQUAL_STRENGTH
from xmodel_steer.recipe.results import Result
from xmodel_steer.recipe.words import sentences

_CHOSEN = ("source_layer", "target_layer", "source_site", "target_site", "operator", "strength")
_OPERATOR = re.compile(r"(Add|Ablate|Clamp)\([\w=', .+-]*\)")  # what the card's code may call


def run_card(result: Result, repo_id: str, *, license: str | None = None) -> str:
    """Write a run's card from its record: verdict, pair, arms, controls, limits, code.

    Args:
        result: The run.
        repo_id: The repository that the code downloads from.
        license: Identifier of your license for the run, such as ``"mit"``; by default the card names none.

    Returns:
        Markdown with the hub's metadata; models with a hub's name are its base models.
    """
    from huggingface_hub import ModelCardData

    models = [str(end["model"]) for end in (result.source, result.target)]
    bases = [name for name in models if re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not Path(name).exists()]
    tags = ["activation-steering", "steering-vector", "interpretability", "arxiv:2503.04429"]
    base = list(dict.fromkeys(bases)) or None
    data = ModelCardData(library_name="xmodel-steer", tags=tags, base_model=base, license=license)
    told = sentences(result) or result.conclusions
    chosen = [
        f"{recipe}: " + ", ".join(f"{key.replace('_', ' ')} {choice[key]}" for key in _CHOSEN if key in choice)
        for recipe, choice in result.chosen.items()
    ]
    arms = [arm for arm in result.arms if arm.at != EQUAL_STRENGTH or arm.arm == "unsteered" or not result.signs]
    rows = [("recipe", "arm", "at", "strength", "effect", "n", "KL"), ("---",) * 7]
    for arm in arms:
        numbers = (number(arm.strength, "+.2f"), f"{arm.effect:.3f}", str(arm.effect.n), number(arm.kl, ".3f"))
        rows.append(tuple(map(_line, (arm.recipe, arm.title, arm.at, *numbers))))
    controls = (
        "random: random directions; shuffled: a map fitted on shuffled pairs. Both have the norm or the KL of native, the target's "
        "own vector, and ran through the same code as mapped."
    )
    parts = {
        "Pair": _list([f"from {models[0]} to {models[1]}", *chosen]),
        "Arms": _list([f"effect, with 95 % intervals: {result.unit}", "KL: nats per token of neutral text"])
        + "\n\n"
        + "\n".join(f"| {' | '.join(row)} |" for row in rows),
        "Controls": _list([controls, *(verdict.text for verdict in result.verdicts.values())]),
        "Limits": _list([*_limits(result), *result.doubts]),
        "Use": f"```python\n{_code(result, repo_id)}\n```",
    }
    head = f"---\n{data.to_yaml()}\n---\n\n# {_line(result.name)}\n\n" + "\n\n".join(f"**{_line(t)}**" for t in told)
    return head + "".join(f"\n\n## {title}\n\n{text}" for title, text in parts.items()) + "\n"


def _line(text: str) -> str:
    """Write a text of the record in one line that holds no markup."""
    return re.sub(r"([|*_`\[\]])", r"\\\1", " ".join(on_page(text).replace("&#x27;", "'").split()))


def _list(lines: Iterable[str]) -> str:
    return "\n".join(f"- {_line(line)}" for line in lines)


def _limits(result: Result) -> list[str]:
    """List what the record cannot say."""
    sizes = [f"{name} {len(ids)}" for name, ids in result.splits.items() if isinstance(ids, list | tuple)]
    sides = sorted({name for arm in result.arms for name in arm.measures})
    return [
        "One pair of models and one map: intervals are over prompts and random vectors, not over pairs, maps or wordings.",
        f"Prompts of each set, whose ids are in result.json: {', '.join(sizes) or 'not recorded'}. Those of evaluation chose nothing.",
        f"What else the vector does was measured by {', '.join(['KL', 'perplexity', *sides])}, and by nothing else.",
        f"Measured in {result.target.get('dtype', 'a dtype that is not recorded')}; other engines and quantised weights differ.",
        f"Positions: the run's are {result.spec.get('positions', 'in its study')}; the code below steers every token, under no gate.",
    ]


def _code(result: Result, repo_id: str) -> str:
    """Write the lines that load the run and steer with its first mapped vector."""
    read = f"import xmodel_steer as xs\n\nresult = xs.read(xs.interop.download_run({json.dumps(repo_id)}))\n"
    name = next((name for name in result.vectors if name == "mapped" or name.endswith(": mapped")), None)
    if name is None:
        return f"{read}print(result.conclusions)  # the run kept no mapped vector"
    choice = result.chosen.get(name.removesuffix("mapped").removesuffix(": "), next(iter(result.chosen.values()), {}))
    operator = str(choice.get("operator", ""))
    operator = operator if _OPERATOR.fullmatch(operator) else f"Add({float(choice.get('strength', 1.0))})"
    return f"""{read}model = xs.load(result.target["model"])
with xs.steering(model, result.vectors[{json.dumps(name)}], operator=xs.{operator}):
    print(xs.generate(model, ["Tell me about your day."]))"""
