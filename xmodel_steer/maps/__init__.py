"""Mathematics, tensors in and tensors out: moments, maps and their fitters, controls, layer grids, statistics.

No model and no file, but for the checkpoint of a map in training.
"""

from xmodel_steer.maps.affine import AffineMap as AffineMap
from xmodel_steer.maps.affine import Map as Map
from xmodel_steer.maps.affine import MapScore as MapScore
from xmodel_steer.maps.anchors import RelativeAnchors as RelativeAnchors
from xmodel_steer.maps.autoencoders import AutoencoderMap as AutoencoderMap
from xmodel_steer.maps.autoencoders import cycle_score as cycle_score
from xmodel_steer.maps.controls import Identity as Identity
from xmodel_steer.maps.controls import RandomMap as RandomMap
from xmodel_steer.maps.controls import ShuffledPairs as ShuffledPairs
from xmodel_steer.maps.curves import DataCurve as DataCurve
from xmodel_steer.maps.curves import data_curve as data_curve
from xmodel_steer.maps.fitting import Fitter as Fitter
from xmodel_steer.maps.isometry import Procrustes as Procrustes
from xmodel_steer.maps.knowing import Knowledge as Knowledge
from xmodel_steer.maps.knowing import knows as knows
from xmodel_steer.maps.layers import LayerGrid as LayerGrid
from xmodel_steer.maps.layers import last_strong_layer as last_strong_layer
from xmodel_steer.maps.layers import layer_grid as layer_grid
from xmodel_steer.maps.moments import Moments as Moments
from xmodel_steer.maps.moments import merge as merge
from xmodel_steer.maps.pairs import PairMoments as PairMoments
from xmodel_steer.maps.pairs import SplitMoments as SplitMoments
from xmodel_steer.maps.ridge import ReducedRank as ReducedRank
from xmodel_steer.maps.ridge import Ridge as Ridge
from xmodel_steer.maps.rows import DocumentRows as DocumentRows
from xmodel_steer.maps.rows import PairedRows as PairedRows
from xmodel_steer.maps.significance import above_others as above_others
from xmodel_steer.maps.significance import holm as holm
from xmodel_steer.maps.significance import sign_flip_test as sign_flip_test
from xmodel_steer.maps.statistics import Estimate as Estimate
from xmodel_steer.maps.statistics import bootstrap_mean as bootstrap_mean
from xmodel_steer.maps.statistics import dose_share as dose_share
from xmodel_steer.maps.statistics import transfer_efficiency as transfer_efficiency
from xmodel_steer.maps.training import Autoencoder as Autoencoder
from xmodel_steer.maps.training import SGDAffine as SGDAffine
