"""Wrong types are told at the first line, in words. The type checker of the test run would answer first: another process asks."""

import json
import subprocess
import sys

import pytest

SETTING = """
import json, sys
import torch
from xmodel_steer.core.alignment import align
from xmodel_steer.core.contrast import ContrastSet
from xmodel_steer.core.directions import difference_of_means, logistic_probe, principal_direction, random_like, whitened_difference
from xmodel_steer.core.prompts import Message, Prompt
from xmodel_steer.core.spaces import Site, Space
from xmodel_steer.core.vectors import Activations, SteeringVector

space = Space("small", Site(1), 4, "aaaa")
rows = Activations(torch.ones(2, 4), space)
vector = SteeringVector(torch.ones(4), space, scale=torch.ones(4))
contrast = ContrastSet.from_prompts(["a", "b"], ["c", "d"])
answers = {}
for call in json.load(sys.stdin):
    try:
        answers[call] = f"no error: {eval(call)!r}"
    except Exception as error:
        answers[call] = f"{type(error).__name__}: {error}"
print(json.dumps(answers))
"""
MESSAGES = {
    'difference_of_means("a", "b")': "TypeError: difference_of_means takes Activations, got str 'a'",
    "difference_of_means(rows, rows.values)": "TypeError: difference_of_means takes Activations, got Tensor",
    "logistic_probe([], rows)": "TypeError: logistic_probe takes Activations, got list",
    'logistic_probe(rows, rows, c="1")': "TypeError: logistic_probe: c takes a number, got str '1'",
    'whitened_difference(rows, rows, shrinkage="oas")': "TypeError: whitened_difference: shrinkage takes a number or 'auto', got str 'oas'",
    "whitened_difference(rows, None)": "TypeError: whitened_difference takes Activations, got NoneType",
    "principal_direction(rows, [])": "TypeError: principal_direction takes Activations, got list",
    'random_like("v", seed=0)': "TypeError: random_like takes SteeringVector, got str 'v'",
    "align([1], [2])": "TypeError: align takes TokenEnds, got list",
    "Activations([[1.0]], space)": "TypeError: Activations.values takes Tensor, got list",
    'Activations(rows.values, "small")': "TypeError: Activations.space takes Space, got str 'small'",
    "SteeringVector([1, 2, 3, 4], space)": "TypeError: SteeringVector.direction takes Tensor, got list",
    "SteeringVector(torch.ones(4), Site(1))": "TypeError: SteeringVector.space takes Space, got Site",
    "SteeringVector(torch.ones(4), space, 3)": "TypeError: SteeringVector.label takes str, got int 3",
    "vector.with_scale(2.0)": "TypeError: SteeringVector.scale takes Tensor, got float 2.0",
    'vector * "2"': "TypeError: number * vector takes a number, got str '2'",
    '"2" * vector': "TypeError: number * vector takes a number, got str '2'",
    'vector / "2"': "TypeError: vector / number takes a number, got str '2'",
    "vector * vector": "TypeError: number * vector takes a number, got SteeringVector",
    "vector + 1": "TypeError: vector + vector takes SteeringVector, got int 1",
    "vector - vector.direction": "TypeError: vector - vector takes SteeringVector, got Tensor",
    'vector.with_norm("2")': "TypeError: with_norm takes a number, got str '2'",
    "vector.at_norm_of(2.0)": "TypeError: at_norm_of takes SteeringVector, got float 2.0",
    "vector.cosine(vector.direction)": "TypeError: cosine takes SteeringVector, got Tensor",
    "vector.about([0.0] * 4)": "TypeError: about takes Tensor, got list",
    'Site("10")': "TypeError: Site.layer takes a block's index such as 10, got str '10'",
    "Site(1.5)": "TypeError: Site.layer takes a block's index such as 10, got float 1.5",
    'Space("small", 1, 4, "aaaa")': "TypeError: Space.site takes Site, got int 1",
    'Space("small", Site(1), "4", "aaaa")': "TypeError: Space.width takes a number of dimensions, got str '4'",
    'Message("user", 3)': "TypeError: Message takes str, got int 3",
    'Prompt("text", id=3)': "TypeError: Prompt.id takes str, got int 3",
    "Prompt(3)": "PromptError: Prompt: text must be a string and messages Messages, got int '3'; use Prompt.of",
    "Prompt(messages=3)": "PromptError: Prompt: text must be a string and messages Messages, got int '3'; use Prompt.of",
    "ContrastSet(3, 4)": "PromptError: ContrastSet: needs tuples of Prompts, got int '3'; use ContrastSet.from_prompts",
    'ContrastSet(contrast.positive, contrast.negative, "no")': "TypeError: ContrastSet.paired takes bool, got str 'no'",
    "contrast.split(0.5)": "TypeError: split: fractions takes a list of numbers, got float 0.5",
    'contrast.split(["0.5"])': "TypeError: split: fractions takes a list of numbers, got str '0.5'",
}


@pytest.fixture(scope="module")
def answers() -> dict[str, str]:
    done = subprocess.run(
        [sys.executable, "-c", SETTING], input=json.dumps(list(MESSAGES)), capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout)


@pytest.mark.parametrize("call", MESSAGES)
def test_a_wrong_type_is_told(call: str, answers: dict[str, str]) -> None:
    assert answers[call] == MESSAGES[call]
