"""Nouns: errors, spaces, prompts, contrast sets, vectors, directions and alignment.

No model, file, network or figure; randomness only from a seed. `core.bars` draws the progress bars of every floor.
"""

from xmodel_steer.core.alignment import Alignment as Alignment
from xmodel_steer.core.alignment import TokenEnds as TokenEnds
from xmodel_steer.core.alignment import align as align
from xmodel_steer.core.alignment import align_texts as align_texts
from xmodel_steer.core.alignment import check_coverage as check_coverage
from xmodel_steer.core.alignment import coverage as coverage
from xmodel_steer.core.contrast import ContrastSet as ContrastSet
from xmodel_steer.core.directions import Direction as Direction
from xmodel_steer.core.directions import difference_of_means as difference_of_means
from xmodel_steer.core.directions import logistic_probe as logistic_probe
from xmodel_steer.core.directions import principal_direction as principal_direction
from xmodel_steer.core.directions import random_like as random_like
from xmodel_steer.core.directions import whitened_difference as whitened_difference
from xmodel_steer.core.prompts import Message as Message
from xmodel_steer.core.prompts import Prompt as Prompt
from xmodel_steer.core.spaces import Site as Site
from xmodel_steer.core.spaces import Space as Space
from xmodel_steer.core.spaces import Stack as Stack
from xmodel_steer.core.vectors import Activations as Activations
from xmodel_steer.core.vectors import SteeringVector as SteeringVector
