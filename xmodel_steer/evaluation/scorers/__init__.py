"""Scorers: a number for each generated text, from the text alone."""

from xmodel_steer.evaluation.scorers.phrases import FUNCTION_WORDS as FUNCTION_WORDS
from xmodel_steer.evaluation.scorers.phrases import REFUSALS as REFUSALS
from xmodel_steer.evaluation.scorers.phrases import Contains as Contains
from xmodel_steer.evaluation.scorers.phrases import ExactAnswer as ExactAnswer
from xmodel_steer.evaluation.scorers.phrases import Explained as Explained
from xmodel_steer.evaluation.scorers.phrases import Language as Language
from xmodel_steer.evaluation.scorers.phrases import Matches as Matches
from xmodel_steer.evaluation.scorers.phrases import RefusalPhrases as RefusalPhrases
from xmodel_steer.evaluation.scorers.phrases import SameTokens as SameTokens
from xmodel_steer.evaluation.scorers.phrases import Scorer as Scorer
from xmodel_steer.evaluation.scorers.phrases import StartsWith as StartsWith
from xmodel_steer.evaluation.scorers.phrases import TextScorer as TextScorer
from xmodel_steer.evaluation.scorers.phrases import WordBalance as WordBalance
from xmodel_steer.evaluation.scorers.phrases import normalised as normalised
from xmodel_steer.evaluation.scorers.phrases import score_texts as score_texts
from xmodel_steer.evaluation.scorers.phrases import words as words
