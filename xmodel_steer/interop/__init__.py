"""Formats and models of other programs: llama.cpp, Hugging Face, steering-vectors, runs on the hub."""

from xmodel_steer.interop.control_vectors import read_control_vector as read_control_vector
from xmodel_steer.interop.control_vectors import write_control_vector as write_control_vector
from xmodel_steer.interop.hub import download_run as download_run
from xmodel_steer.interop.hub import upload_run as upload_run
from xmodel_steer.interop.hugging_face import steering_hf as steering_hf
from xmodel_steer.interop.spaces import RECORD as RECORD
from xmodel_steer.interop.spaces import decoder_blocks as decoder_blocks
from xmodel_steer.interop.spaces import hf_name as hf_name
from xmodel_steer.interop.spaces import one_per_block as one_per_block
from xmodel_steer.interop.spaces import require_after_block as require_after_block
from xmodel_steer.interop.spaces import require_hf_space as require_hf_space
from xmodel_steer.interop.spaces import short as short
from xmodel_steer.interop.spaces import space_for as space_for
from xmodel_steer.interop.spaces import text_config as text_config
from xmodel_steer.interop.steering_vectors import from_steering_vectors as from_steering_vectors
from xmodel_steer.interop.steering_vectors import to_steering_vectors as to_steering_vectors
