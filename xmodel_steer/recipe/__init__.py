"""The whole recipe: `transfer`, its arms, the result and its verdict, and how it is saved.

No figure is drawn here, and no study is known.
"""

from xmodel_steer.recipe.arms import Arm as Arm
from xmodel_steer.recipe.carrying import default_sites as default_sites
from xmodel_steer.recipe.carrying import transfer as transfer
from xmodel_steer.recipe.results import TransferResult as TransferResult
from xmodel_steer.recipe.saving import read as read
from xmodel_steer.recipe.saving import save as save
from xmodel_steer.recipe.verdicts import Comparison as Comparison
from xmodel_steer.recipe.verdicts import Verdict as Verdict
