"""Writing the residual stream: operators, gates, steering, replacement.

The floor above measures the effects.
"""

from xmodel_steer.interventions.contexts import steering as steering
from xmodel_steer.interventions.mirror import mapped_source as mapped_source
from xmodel_steer.interventions.mirror import mean_of as mean_of
from xmodel_steer.interventions.mirror import noise_like as noise_like
from xmodel_steer.interventions.operators import Ablate as Ablate
from xmodel_steer.interventions.operators import Add as Add
from xmodel_steer.interventions.operators import Clamp as Clamp
from xmodel_steer.interventions.operators import Gate as Gate
from xmodel_steer.interventions.operators import Operator as Operator
from xmodel_steer.interventions.operators import Rotate as Rotate
from xmodel_steer.interventions.patches import mapped_patch as mapped_patch
from xmodel_steer.interventions.patches import own_patch as own_patch
from xmodel_steer.interventions.patches import patch as patch
from xmodel_steer.interventions.positions import Positions as Positions
from xmodel_steer.interventions.steps import Intervention as Intervention
from xmodel_steer.interventions.steps import Replacement as Replacement
