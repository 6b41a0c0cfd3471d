"""Scorers that call a model, a program or a service: similarity, refusal, insecure code, judges.

Each is a frozen value and a `xmodel_steer.evaluation.scorers.text.TextScorer`.
"""

from xmodel_steer.evaluation.judges.chats import Chat as Chat
from xmodel_steer.evaluation.judges.chats import Endpoint as Endpoint
from xmodel_steer.evaluation.judges.chats import LocalModel as LocalModel
from xmodel_steer.evaluation.judges.chats import Transcript as Transcript
from xmodel_steer.evaluation.judges.code import InsecureCode as InsecureCode
from xmodel_steer.evaluation.judges.code import IsCode as IsCode
from xmodel_steer.evaluation.judges.code import code_of as code_of
from xmodel_steer.evaluation.judges.code import findings as findings
from xmodel_steer.evaluation.judges.judging import Judge as Judge
from xmodel_steer.evaluation.judges.refusals import RefusalClassifier as RefusalClassifier
from xmodel_steer.evaluation.judges.sentences import OnTopic as OnTopic
from xmodel_steer.evaluation.judges.sentences import SentenceSimilarity as SentenceSimilarity
from xmodel_steer.evaluation.judges.sentences import embed as embed
