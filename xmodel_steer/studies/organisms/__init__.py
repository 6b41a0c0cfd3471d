"""Model organisms: models with a behaviour planted on purpose, to find and to repair."""

from xmodel_steer.studies.organisms.data import ORGANISMS as ORGANISMS
from xmodel_steer.studies.organisms.data import curriculum as curriculum
from xmodel_steer.studies.organisms.data import quirk as quirk
from xmodel_steer.studies.organisms.lessons import Curriculum as Curriculum
from xmodel_steer.studies.organisms.lessons import Lesson as Lesson
from xmodel_steer.studies.organisms.lessons import prompt_of as prompt_of
from xmodel_steer.studies.organisms.making import Report as Report
from xmodel_steer.studies.organisms.making import make as make
from xmodel_steer.studies.organisms.making import read_report as read_report
from xmodel_steer.studies.organisms.training import Recipe as Recipe
