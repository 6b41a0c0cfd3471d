"""The only code that calls a model: loading, identity, tokens, forward passes, bridges, generation.

Passes here record the residual stream and never change it.
"""

from xmodel_steer.models.generation import generate as generate
from xmodel_steer.models.generation import generate_tokens as generate_tokens
from xmodel_steer.models.laws import Law as Law
from xmodel_steer.models.loading import load as load
from xmodel_steer.models.registry import register as register
from xmodel_steer.models.sites import space_of as space_of
from xmodel_steer.models.tokens import tokenise as tokenise
