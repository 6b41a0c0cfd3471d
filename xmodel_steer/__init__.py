"""Carry a behaviour's direction from a small language model into a larger one, and show what survived.

The method is that of arXiv 2503.04429. ``import xmodel_steer as xs``.
"""

from xmodel_steer import plots as plots
from xmodel_steer.alignment import Alignment as Alignment
from xmodel_steer.alignment import align as align
from xmodel_steer.capture import capture as capture
from xmodel_steer.capture import collect_moments as collect_moments
from xmodel_steer.errors import AlignmentError as AlignmentError
from xmodel_steer.errors import AlignmentWarning as AlignmentWarning
from xmodel_steer.errors import ArtifactError as ArtifactError
from xmodel_steer.errors import DownloadError as DownloadError
from xmodel_steer.errors import ModelError as ModelError
from xmodel_steer.errors import NonFiniteError as NonFiniteError
from xmodel_steer.errors import PromptError as PromptError
from xmodel_steer.errors import SiteError as SiteError
from xmodel_steer.errors import SpaceMismatchError as SpaceMismatchError
from xmodel_steer.errors import XModelSteerError as XModelSteerError
from xmodel_steer.evaluation import Contains as Contains
from xmodel_steer.evaluation import GeneratedText as GeneratedText
from xmodel_steer.evaluation import Language as Language
from xmodel_steer.evaluation import Matches as Matches
from xmodel_steer.evaluation import Preference as Preference
from xmodel_steer.evaluation import WordBalance as WordBalance
from xmodel_steer.evaluation import side_effects as side_effects
from xmodel_steer.generation import generate as generate
from xmodel_steer.maps import AffineMap as AffineMap
from xmodel_steer.maps import Ridge as Ridge
from xmodel_steer.models import load as load
from xmodel_steer.models import register as register
from xmodel_steer.models import space_of as space_of
from xmodel_steer.moments import Moments as Moments
from xmodel_steer.persistence import read as read
from xmodel_steer.persistence import save as save
from xmodel_steer.prompts import ContrastSet as ContrastSet
from xmodel_steer.prompts import Prompt as Prompt
from xmodel_steer.readers import read_contrast as read_contrast
from xmodel_steer.readers import read_prompts as read_prompts
from xmodel_steer.report import write_report as write_report
from xmodel_steer.spaces import Site as Site
from xmodel_steer.spaces import Space as Space
from xmodel_steer.steering import Ablate as Ablate
from xmodel_steer.steering import Add as Add
from xmodel_steer.steering import Clamp as Clamp
from xmodel_steer.steering import Intervention as Intervention
from xmodel_steer.steering import steering as steering
from xmodel_steer.transfer import TransferResult as TransferResult
from xmodel_steer.transfer import transfer as transfer
from xmodel_steer.vectors import Activations as Activations
from xmodel_steer.vectors import SteeringVector as SteeringVector
from xmodel_steer.vectors import difference_of_means as difference_of_means
