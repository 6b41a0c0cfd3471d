"""Measurements under an intervention: behaviours, scorers, judges, damage, checks of maps and of models.

Nothing is chosen here; the recipe chooses.
"""

from xmodel_steer.evaluation import behaviours as behaviours
from xmodel_steer.evaluation import judges as judges
from xmodel_steer.evaluation import scorers as scorers
from xmodel_steer.evaluation.calibration import Dose as Dose
from xmodel_steer.evaluation.calibration import calibrate as calibrate
from xmodel_steer.evaluation.conformance import check_model as check_model
from xmodel_steer.evaluation.damage import SideEffect as SideEffect
from xmodel_steer.evaluation.damage import side_effects as side_effects
from xmodel_steer.evaluation.gates import GateRates as GateRates
from xmodel_steer.evaluation.gates import choose_gate as choose_gate
from xmodel_steer.evaluation.gates import gate_rates as gate_rates
from xmodel_steer.evaluation.patched import TextStatistics as TextStatistics
from xmodel_steer.evaluation.patching import Patching as Patching
from xmodel_steer.evaluation.patching import patching_grid as patching_grid
from xmodel_steer.evaluation.recovery import PatchingGrid as PatchingGrid
from xmodel_steer.evaluation.replacing import ReplacementArm as ReplacementArm
from xmodel_steer.evaluation.replacing import ReplacementResult as ReplacementResult
from xmodel_steer.evaluation.replacing import replacement_check as replacement_check
