"""Carry a behaviour's direction from a small language model into a larger one, and show what survived.

The method is that of arXiv 2503.04429. ``import xmodel_steer as xs``. Here are the names that most work needs; the others are in
``xs.maps``, ``xs.behaviours``, ``xs.scorers``, ``xs.judges``, ``xs.plots``, ``xs.interop`` and ``xs.errors``.
"""

import sys as _sys

if "".join(_sys.argv[:1]).endswith(("xmodel-steer", "xmodel-steer.exe")) or _sys.argv[:1] == ["-m"]:
    # The command line: Ctrl-C while the imports below take their seconds ends in one line.
    _sys.excepthook = lambda kind, *rest: (
        print("\nerror: interrupted", file=_sys.stderr)
        if kind is KeyboardInterrupt
        else _sys.__excepthook__(kind, *rest)
    )

from xmodel_steer import figures as plots  # noqa: F401
from xmodel_steer import interop as interop
from xmodel_steer import maps as maps
from xmodel_steer.activations.collecting import collect_moments as collect_moments
from xmodel_steer.activations.harvesting import harvest as harvest
from xmodel_steer.activations.reading import capture as capture
from xmodel_steer.activations.store import ActivationStore as ActivationStore
from xmodel_steer.core import errors as errors
from xmodel_steer.core.contrast import ContrastSet as ContrastSet
from xmodel_steer.core.directions import difference_of_means as difference_of_means
from xmodel_steer.core.prompts import Prompt as Prompt
from xmodel_steer.core.spaces import Site as Site
from xmodel_steer.core.spaces import Space as Space
from xmodel_steer.core.vectors import Activations as Activations
from xmodel_steer.core.vectors import SteeringVector as SteeringVector
from xmodel_steer.evaluation import behaviours as behaviours
from xmodel_steer.evaluation import judges as judges
from xmodel_steer.evaluation import scorers as scorers
from xmodel_steer.evaluation.replacing import replacement_check as replacement_check
from xmodel_steer.files.readers import read_contrast as read_contrast
from xmodel_steer.files.readers import read_prompts as read_prompts
from xmodel_steer.files.wheels import general_text as general_text
from xmodel_steer.interventions.contexts import steering as steering
from xmodel_steer.interventions.operators import Ablate as Ablate
from xmodel_steer.interventions.operators import Add as Add
from xmodel_steer.interventions.operators import Clamp as Clamp
from xmodel_steer.interventions.operators import Gate as Gate
from xmodel_steer.interventions.operators import Rotate as Rotate
from xmodel_steer.interventions.steps import Intervention as Intervention
from xmodel_steer.maps.isometry import Procrustes as Procrustes
from xmodel_steer.maps.ridge import Ridge as Ridge
from xmodel_steer.maps.training import Autoencoder as Autoencoder
from xmodel_steer.models.generation import generate as generate
from xmodel_steer.models.loading import load as load
from xmodel_steer.models.registry import register as register
from xmodel_steer.models.sites import space_of as space_of
from xmodel_steer.notebook.explorer import explore as explore
from xmodel_steer.notebook.patching_explorer import explore_patching as explore_patching
from xmodel_steer.recipe.carrying import transfer as transfer
from xmodel_steer.recipe.results import Result as Result
from xmodel_steer.recipe.saving import read as read
from xmodel_steer.recipe.saving import save as save
from xmodel_steer.recipe.settings import Budget as Budget
from xmodel_steer.recipe.settings import Method as Method
from xmodel_steer.recipe.sweeping import sweep as sweep
