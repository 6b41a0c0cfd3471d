"""The paper's experiments, each with its controls, from models to one record."""

from xmodel_steer.experiments.concept_table import concept_transfer as concept_transfer
from xmodel_steer.experiments.concept_table import feature_transfer as feature_transfer
from xmodel_steer.experiments.corrupted import corrupted_capability as corrupted_capability
from xmodel_steer.experiments.map_comparison import map_comparison as map_comparison
from xmodel_steer.experiments.pages import write_study as write_study
from xmodel_steer.experiments.presets import PRESETS as PRESETS
from xmodel_steer.experiments.presets import Preset as Preset
from xmodel_steer.experiments.presets import base_of as base_of
from xmodel_steer.experiments.presets import organism as organism
from xmodel_steer.experiments.refusal import refusal_switch as refusal_switch
from xmodel_steer.experiments.removal import backdoor_removal as backdoor_removal
from xmodel_steer.experiments.sizes import small_to_larger as small_to_larger
from xmodel_steer.experiments.study import Study as Study
from xmodel_steer.experiments.study import StudyArm as StudyArm
from xmodel_steer.experiments.study import is_study as is_study
from xmodel_steer.experiments.study import read_study as read_study
from xmodel_steer.experiments.switch import safety_switch as safety_switch
