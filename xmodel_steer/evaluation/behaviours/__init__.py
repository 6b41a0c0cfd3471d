"""Behaviours: one score per prompt or pair, under any intervention."""

from xmodel_steer.evaluation.behaviours.generated import Behaviour as Behaviour
from xmodel_steer.evaluation.behaviours.generated import GeneratedText as GeneratedText
from xmodel_steer.evaluation.behaviours.generated import Measured as Measured
from xmodel_steer.evaluation.behaviours.likelihoods import AnswerLogOdds as AnswerLogOdds
from xmodel_steer.evaluation.behaviours.likelihoods import MultipleChoice as MultipleChoice
from xmodel_steer.evaluation.behaviours.likelihoods import Preference as Preference
from xmodel_steer.evaluation.behaviours.likelihoods import answer_likelihoods as answer_likelihoods
