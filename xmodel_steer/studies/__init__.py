"""The paper's experiments, each with its controls, from models to one record."""

from xmodel_steer.studies.comparison import map_comparison as map_comparison
from xmodel_steer.studies.concept_table import concept_transfer as concept_transfer
from xmodel_steer.studies.concept_table import feature_transfer as feature_transfer
from xmodel_steer.studies.corrupted import corrupted_capability as corrupted_capability
from xmodel_steer.studies.presets import PRESETS as PRESETS
from xmodel_steer.studies.presets import Preset as Preset
from xmodel_steer.studies.presets import base_of as base_of
from xmodel_steer.studies.presets import organism as organism
from xmodel_steer.studies.refusal import refusal_switch as refusal_switch
from xmodel_steer.studies.removal import backdoor_removal as backdoor_removal
from xmodel_steer.studies.settings import Settings as Settings
from xmodel_steer.studies.sizes import small_to_larger as small_to_larger
from xmodel_steer.studies.switch import safety_switch as safety_switch
from xmodel_steer.studies.trained import distillation as distillation
