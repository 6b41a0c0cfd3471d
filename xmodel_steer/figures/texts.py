"""Texts side by side, with the words marked that differ from the unsteered text."""

import math
import re
from difflib import SequenceMatcher

from xmodel_steer.core.texts import on_page
from xmodel_steer.figures.overviews import colours_of
from xmodel_steer.maps.statistics import number
from xmodel_steer.recipe.arms import EQUAL_KL, EQUAL_STRENGTH, Arm
from xmodel_steer.recipe.results import Result


def texts_html(result: Result, most: int = 8) -> str:
    """Show the first evaluation prompts' texts, one row per arm.

    Args:
        result: A result.
        most: How many prompts.
    """
    arms = [(arm, base) for arm in shown_arms(result) if (base := _unsteered(result, arm))]
    if not arms:
        return ""
    colours = colours_of(result)
    several = len({arm.recipe for arm, _ in arms}) > 1
    page = "<h2>Texts</h2><p>Marked: the words that the unsteered text does not have there.</p>"
    for i in range(min(most, max(len(arm.texts) for arm, _ in arms))):
        rows: list[str] = []
        for arm, base in (pair for pair in arms if i < len(pair[0].texts)):
            for name, one, text in (
                ("unsteered", base, on_page(base.texts[i])),
                (_title(arm, several), arm, marked(arm.texts[i], base.texts[i])),
            ):
                row = f'<tr><td style="color:{colours[one.arm]}">{on_page(name)}</td><td>{_score(one, i)}</td><td>{text}</td></tr>'
                rows += [] if row in rows else [row]
        ids = arms[0][0].ids
        prompt = result.prompts[i] if i < len(result.prompts) else ids[i] if i < len(ids) else str(i)
        page += f"<h3>{on_page(prompt)} …</h3><table class='texts'>{''.join(rows)}</table>"
    return page


def shown_arms(result: Result) -> list[Arm]:
    """List the steered arms with texts.

    Of each recipe the arms at equal KL, where the native vector was run there; else the arms at equal strength.
    """
    steered = [arm for arm in result.arms if arm.arm != "unsteered" and arm.texts]
    fair = {arm.recipe for arm in steered if arm.arm == "native" and arm.at == EQUAL_KL}
    fixed = {arm.recipe for arm in steered if arm.at == EQUAL_STRENGTH} - fair
    return [arm for arm in steered if arm.at == (EQUAL_STRENGTH if arm.recipe in fixed else EQUAL_KL)]


def examples(result: Result, count: int = 3) -> list[str]:
    """List the first prompts with the unsteered and the mapped text."""
    mapped = ((arm, _unsteered(result, arm)) for arm in shown_arms(result) if arm.arm == "mapped")
    arm, base = next(((arm, base) for arm, base in mapped if base), (None, None))
    if arm is None or base is None:
        return []
    lines = []
    for prompt, plain, steered in list(zip(result.prompts, base.texts, arm.texts, strict=False))[:count]:
        texts = (prompt, f"  unsteered: {plain}", f"  mapped:    {steered}")
        lines += [" ".join(text.split()) if i == 0 else "  " + " ".join(text.split()) for i, text in enumerate(texts)]
    return lines


def _unsteered(result: Result, arm: Arm) -> Arm | None:
    """Return the unsteered arm of a recipe, if there is one with texts.

    Models that write may differ between recipes.
    """
    bases = [base for base in result.arms if base.arm == "unsteered" and base.recipe in (arm.recipe, "") and base.texts]
    return bases[0] if bases else None


def _title(arm: Arm, several: bool) -> str:
    strength = "" if math.isnan(arm.strength) else f" {arm.strength:+.2f}"
    return f"{arm.arm}{strength}" + (f", {arm.recipe}" if several else "")


def _score(arm: Arm, i: int) -> str:
    """Format the score of a text.

    Of several seeds only the first one's text is shown, with the mean score of all.
    """
    if not arm.scores:
        return ""
    return number(arm.scores[i], "+.2f") + (f" (mean of {arm.seeds})" if arm.seeds > 1 else "")


def marked(text: str, base: str) -> str:
    """Mark the words of a text that another text lacks at their place.

    Example:
        >>> marked("a good day", "a bad day")
        'a <mark>good</mark> day'
    """
    words, others = (re.findall(r"\s+|\S+", t) for t in (text, base))
    page = ""
    for kind, _, _, start, end in SequenceMatcher(None, others, words, autojunk=False).get_opcodes():
        piece = on_page("".join(words[start:end]))
        page += piece if kind == "equal" or not piece.strip() else f"<mark>{piece}</mark>"
    return page
