"""Scorers: a number for each generated text, from the text alone.

A scorer is a function from a text to a number, or a `TextScorer`, which sees the prompts and many texts at once.
Scorers that call a model or a program are in `xmodel_steer.evaluation.judges`.
"""

from xmodel_steer.evaluation.scorers.answers import ExactAnswer as ExactAnswer
from xmodel_steer.evaluation.scorers.answers import SameTokens as SameTokens
from xmodel_steer.evaluation.scorers.languages import Language as Language
from xmodel_steer.evaluation.scorers.phrases import Contains as Contains
from xmodel_steer.evaluation.scorers.phrases import Matches as Matches
from xmodel_steer.evaluation.scorers.phrases import RefusalPhrases as RefusalPhrases
from xmodel_steer.evaluation.scorers.phrases import StartsWith as StartsWith
from xmodel_steer.evaluation.scorers.phrases import WordBalance as WordBalance
from xmodel_steer.evaluation.scorers.text import Explained as Explained
from xmodel_steer.evaluation.scorers.text import Scorer as Scorer
from xmodel_steer.evaluation.scorers.text import TextScorer as TextScorer
from xmodel_steer.evaluation.scorers.text import score_texts as score_texts
