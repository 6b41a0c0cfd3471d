"""Formats and models of other programs: llama.cpp, vLLM, repeng, steering-vectors, transformers, the hub.

For any other program, `save` writes a vector as safetensors, with its space in the header and the direction under
``direction``. No pickle is opened here that could run code.

Layers. A decoder block's output is `Site(k)` here (``resid_post`` of block k, counted from 0). The programs count the
same way:

- llama.cpp adds ``direction.k`` to the output of block k, before block k + 1 reads it: ``build_cvec(cur, il)`` follows the
  feed-forward's residual addition (``src/models/llama.cpp`` and its siblings), with the tensor of layer ``il``
  (``llama_adapter_cvec::tensor_for``, ``src/llama-adapter.cpp``). The file's loader puts ``direction.k`` at k - 1 of a
  buffer (``common_control_vector_load_one``, ``common/common.cpp``), and the adapter reads layer ``il`` from il - 1
  of it: the two shifts cancel. Neither has room for layer 0.
- repeng 0.4 adds ``directions[k]`` to the output of block k (``ControlModel``, ``control.py``). It finds the direction in
  ``hidden_states[k + 1]`` (``batched_get_hiddens``, ``extract.py``), which is the same stream except at the last block,
  where Hugging Face gives it after the final norm. It writes it as ``direction.k`` (``export_gguf``).
- hotwire-vllm 0.1 adds row k of its tensor to the output of block k: ``_install_into_model`` (``hotwire/_patch.py``) numbers
  a block by its place in ``model.layers``, ``slot_for`` (``hotwire/_state.py``) reads the row. Block 0 has one too.
- steering-vectors 0.12 adds ``layer_activations[k]`` to the output of block k (``SteeringVector.patch_activations``).
- llama.cpp's own ``llama-cvector-generator`` reads the output of block k and writes it as ``direction.(k + 1)``
  (``mean.hpp``, ``pca.hpp``), so its vectors act one block after the block that they come from: of all these writers the
  only one that shifts. They are read here as llama.cpp applies them.
"""

from xmodel_steer.interop.baking import bake as bake
from xmodel_steer.interop.baking import write_adapter as write_adapter
from xmodel_steer.interop.cards import run_card as run_card
from xmodel_steer.interop.control_vectors import read_control_vector as read_control_vector
from xmodel_steer.interop.control_vectors import write_control_vector as write_control_vector
from xmodel_steer.interop.hub import download_run as download_run
from xmodel_steer.interop.hub import upload_run as upload_run
from xmodel_steer.interop.hugging_face import steering_hf as steering_hf
from xmodel_steer.interop.steering_vectors import from_steering_vectors as from_steering_vectors
from xmodel_steer.interop.steering_vectors import to_steering_vectors as to_steering_vectors
from xmodel_steer.interop.vllm import read_vllm_vector as read_vllm_vector
from xmodel_steer.interop.vllm import write_vllm_vector as write_vllm_vector
