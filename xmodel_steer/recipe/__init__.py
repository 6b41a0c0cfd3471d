"""The whole recipe: `transfer` and its four steps, the result with its verdicts, and how it is saved.

No figure is drawn here, and no study is known.
"""

from xmodel_steer.recipe.arms import Arm as Arm
from xmodel_steer.recipe.carrying import transfer as transfer
from xmodel_steer.recipe.matching import match_damage as match_damage
from xmodel_steer.recipe.measuring import measure as measure
from xmodel_steer.recipe.preparing import Prepared as Prepared
from xmodel_steer.recipe.preparing import default_sites as default_sites
from xmodel_steer.recipe.preparing import prepare as prepare
from xmodel_steer.recipe.results import Result as Result
from xmodel_steer.recipe.saving import read as read
from xmodel_steer.recipe.saving import save as save
from xmodel_steer.recipe.selecting import Selected as Selected
from xmodel_steer.recipe.selecting import select as select
from xmodel_steer.recipe.settings import Budget as Budget
from xmodel_steer.recipe.settings import GeneralText as GeneralText
from xmodel_steer.recipe.settings import Method as Method
from xmodel_steer.recipe.verdicts import Comparison as Comparison
from xmodel_steer.recipe.verdicts import Verdict as Verdict
