"""Formats and models of other programs: llama.cpp, Hugging Face, steering-vectors, runs on the hub."""

from xmodel_steer.interop.control_vectors import download_run as download_run
from xmodel_steer.interop.control_vectors import from_steering_vectors as from_steering_vectors
from xmodel_steer.interop.control_vectors import read_control_vector as read_control_vector
from xmodel_steer.interop.control_vectors import steering_hf as steering_hf
from xmodel_steer.interop.control_vectors import to_steering_vectors as to_steering_vectors
from xmodel_steer.interop.control_vectors import upload_run as upload_run
from xmodel_steer.interop.control_vectors import write_control_vector as write_control_vector
