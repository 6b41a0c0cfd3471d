"""Files that are whole or absent, artefacts, readers, wheels of the package index, the user's cache, resuming.

No model is called here; how a whole result is written stands with the recipe.
"""

from xmodel_steer.files.readers import read_contrast as read_contrast
from xmodel_steer.files.readers import read_prompts as read_prompts
from xmodel_steer.files.resume import resumable as resumable
from xmodel_steer.files.wheels import general_text as general_text
