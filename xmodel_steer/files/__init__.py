"""Files that are whole or absent, artefacts, claims on places, readers, wheels, the user's cache, resuming.

No model is called here; the recipe writes whole results.
"""

from xmodel_steer.files.readers import read_contrast as read_contrast
from xmodel_steer.files.readers import read_prompts as read_prompts
from xmodel_steer.files.resume import resumable as resumable
from xmodel_steer.files.wheels import general_text as general_text
