"""Errors of the library: each says what was required, what came, and what to do."""


class XModelSteerError(Exception):
    """Base of every error that this library raises on purpose."""


class SpaceMismatchError(XModelSteerError, ValueError):
    """Two tensors that live in different vector spaces were combined."""


class PromptError(XModelSteerError, ValueError):
    """A prompt, a contrast set or a corpus cannot be used as given."""


class PromptWarning(UserWarning):
    """A chat template leaves out or rewrites part of a message."""


class AlignmentError(XModelSteerError, ValueError):
    """The tokens of two models cannot be paired well enough."""


class AlignmentWarning(UserWarning):
    """The tokens of two models pair, but fewer of them than expected."""


class FewRowsWarning(UserWarning):
    """A map was fitted on fewer rows than it has dimensions."""


class CacheWarning(UserWarning):
    """A cache is not used: the user's folder cannot keep what was computed, or a model decodes wrong with one."""


class ModelWarning(UserWarning):
    """A model does not behave as others do, and is used with more care."""


class CheckpointWarning(UserWarning):
    """A checkpoint holds tensors that its model does not use."""


class UndefinedWarning(UserWarning):
    """A number of a record is NaN or infinite: it was written as null, with its place and what it was."""


class ModelError(XModelSteerError, RuntimeError):
    """A model cannot be loaded, or does not have what the library needs."""


class SiteError(ModelError):
    """A hook point is missing, did not fire, or has the wrong shape."""


class NonFiniteError(XModelSteerError, ArithmeticError):
    """NaN or infinity where numbers were required."""


class DownloadError(XModelSteerError, OSError):
    """A download failed, was cut short, or does not match its hash."""


class ArtifactError(XModelSteerError, ValueError):
    """A file is not one of ours, is damaged, or was written by a newer version."""


class JudgeError(XModelSteerError, RuntimeError):
    """A judge of texts cannot be reached, or does not answer as asked."""
