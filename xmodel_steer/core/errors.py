"""Errors and warnings of the library. Messages say what was required, what came, and what to do."""


class XModelSteerError(Exception):
    """Base of every error that the library raises on purpose."""


class SpaceMismatchError(XModelSteerError, ValueError):
    """Two tensors that live in different vector spaces were combined."""


class PromptError(XModelSteerError, ValueError):
    """A prompt, a contrast set or a corpus cannot be used."""


class PromptWarning(UserWarning):
    """A chat template leaves out or rewrites part of a message."""


class AlignmentError(XModelSteerError, ValueError):
    """The tokens of two models cannot be paired well enough."""


class AlignmentWarning(UserWarning):
    """The tokens of two models pair, but fewer than expected."""


class FewRowsWarning(UserWarning):
    """A map was fitted on fewer rows than it has dimensions."""


class CacheWarning(UserWarning):
    """A cache is not used: the folder is not writable, or a model decodes wrongly with a cache."""


class ModelWarning(UserWarning):
    """A model behaves unlike others, and is used with more care."""


class CheckpointWarning(UserWarning):
    """A checkpoint holds tensors that its model does not use."""


class UndefinedWarning(UserWarning):
    """A number in a record is NaN or infinite: it was written as null, with its place and value."""


class ModelError(XModelSteerError, RuntimeError):
    """A model cannot be loaded, or lacks something that the library needs."""


class SiteError(ModelError):
    """A hook point is missing, did not fire, or has the wrong shape."""


class NonFiniteError(XModelSteerError, ArithmeticError):
    """NaN or infinity where numbers were required."""


class DownloadError(XModelSteerError, OSError):
    """A download failed, was cut short, or does not match its hash."""


class ArtifactError(XModelSteerError, ValueError):
    """A file is foreign, damaged, or from a newer version."""


class JudgeError(XModelSteerError, RuntimeError):
    """A judge of texts cannot be reached, or its answer has the wrong form."""
