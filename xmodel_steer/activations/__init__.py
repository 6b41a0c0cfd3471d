"""Reading the residual stream: activations of prompts, moments in one pass, stores on disk, several processes.

No module here changes the stream.
"""

from xmodel_steer.activations.cached import cached_moments as cached_moments
from xmodel_steer.activations.collecting import collect_moments as collect_moments
from xmodel_steer.activations.harvesting import harvest as harvest
from xmodel_steer.activations.reading import Tokens as Tokens
from xmodel_steer.activations.reading import capture as capture
from xmodel_steer.activations.store import ActivationStore as ActivationStore
