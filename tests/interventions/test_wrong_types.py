"""Wrong types are told at the first line, in words. The type checker of the test run would answer first: another process asks."""

import json
import subprocess
import sys

import pytest

SETTING = """
import json, sys
import torch
import xmodel_steer as xs
from xmodel_steer import interop, scorers
from xmodel_steer.core.vectors import SteeringVector
from xmodel_steer.core.spaces import Site, Space
from xmodel_steer.evaluation.calibration import calibrate
from xmodel_steer.evaluation.damage import losses, side_effects
from xmodel_steer.interventions.contexts import steering
from xmodel_steer.interventions.operators import Rotate
from xmodel_steer.interventions.steps import Replacement

space = Space("small", Site(1), 4, "aaaa")
vector = SteeringVector(torch.ones(4), space, scale=torch.ones(4))
answers = {}
for call in json.load(sys.stdin):
    try:
        answers[call] = f"no error: {eval(call)!r}"
    except Exception as error:
        answers[call] = f"{type(error).__name__}: {error}"
print(json.dumps(answers))
"""
OPERATOR = "TypeError: Intervention: operator takes a value such as Add(2.0), got "
STEPS = "TypeError: steering takes SteeringVector or Intervention or Replacement, got "
MESSAGES = {
    'xs.Add("2")': "TypeError: Add: strength takes a number, got str '2'",
    "xs.Add(None)": "TypeError: Add: strength takes a number, got NoneType",
    "xs.Ablate(vector)": "TypeError: Ablate: also takes a tuple of vectors, got SteeringVector",
    "xs.Ablate((vector.direction,))": "TypeError: Ablate: also takes SteeringVector, got Tensor",
    'Rotate(by="90")': "TypeError: Rotate takes numbers, got str '90'",
    "Rotate(by=90.0, plane=1)": "TypeError: Rotate: plane takes a SteeringVector, got int 1",
    'xs.Clamp(overshoot="1")': "TypeError: Clamp: overshoot takes a number, got str '1'",
    'xs.Clamp(gate="no")': "TypeError: Clamp: gate takes bool, got str 'no'",
    "xs.Clamp(True)": "ValueError: Clamp: to must be 'positive' or 'negative', got True",
    'xs.Gate("joy")': "TypeError: Gate: vector takes SteeringVector, got str 'joy'",
    "xs.Intervention(vector=5)": "TypeError: Intervention: vector takes SteeringVector, got int 5",
    "xs.Intervention(vector, 2.0)": OPERATOR + "2.0",
    "xs.Intervention(vector, xs.Add)": OPERATOR + "<class 'xmodel_steer.interventions.operators.Add'>",
    "xs.Intervention(vector, gate=vector)": "TypeError: Intervention: gate takes a Gate, got SteeringVector",
    "xs.Intervention(vector, positions=5)": "TypeError: positions takes 'all', 'prompt', 'generated', 'last', several of them, "
    "or a boolean mask, got int 5",
    "xs.Intervention(vector, schedule=[1.0])": "TypeError: Intervention: schedule takes a tuple of numbers, got list",
    "xs.Intervention(vector, schedule=(1.0, '0'))": "TypeError: Intervention: schedule takes numbers, got str '0'",
    'Replacement("blocks.1", print)': "TypeError: Replacement: space takes Space, got str 'blocks.1'",
    "steering(None, 5).__enter__()": STEPS + "int 5",
    'steering(None, "joy").__enter__()': STEPS + "str 'j'",
    "steering(None, [vector, vector.direction]).__enter__()": STEPS + "Tensor",
    "steering(None, vector, operator=2.0).__enter__()": OPERATOR + "2.0",
    'side_effects(None, "joy", ["a text"])': STEPS + "str 'j'",
    'side_effects(None, vector, ["a text"])': "TypeError: side_effects: interventions takes a list of interventions per setting, "
    "got SteeringVector",
    'losses(None, [5], ["a text"])': STEPS + "int 5",
    'calibrate(None, [vector], "0.1", ["a text"])': "TypeError: calibrate: kl takes a number, got str '0.1'",
    'calibrate(None, [vector], 0.1, ["a text"], signs="1")': "TypeError: calibrate: signs takes a number, got str '1'",
    'calibrate(None, [vector], 0.1, ["a text"], max_strength="9")': "TypeError: calibrate: max_strength takes a number, got str '9'",
    'calibrate(None, ["joy"], 0.1, ["a text"])': "TypeError: calibrate: vectors takes SteeringVector, got str 'joy'",
    'interop.write_control_vector("joy", "joy.gguf")': "TypeError: write_control_vector takes SteeringVector, got str 'j'",
    'scorers.WordBalance("good", "bad")': "ValueError: WordBalance: needs a tuple of strings, such as ('yes', 'no') or ('yes',), "
    "got 'good'",
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
