"""Errors and warnings of the library. Messages say what was required, what came, and what to do."""


class XModelSteerError(Exception):
    """Base of every error that the library raises on purpose."""


class SpaceMismatchError(XModelSteerError, ValueError):
    """Combination of tensors from different vector spaces."""


class PromptError(XModelSteerError, ValueError):
    """Unusable prompt, contrast set or corpus."""


class PromptWarning(UserWarning):
    """Chat template that leaves out or rewrites part of a message."""


class AlignmentError(XModelSteerError, ValueError):
    """Too few pairs of tokens between two models."""


class AlignmentWarning(UserWarning):
    """Fewer pairs of tokens between two models than expected."""


class FewRowsWarning(UserWarning):
    """Fit of a map on fewer rows than it has dimensions."""


class CacheWarning(UserWarning):
    """Unused cache: the folder keeps no files, or a model decodes wrongly with a cache."""


class ModelWarning(UserWarning):
    """Model that behaves unlike others and is used with more care."""


class CheckpointWarning(UserWarning):
    """Checkpoint with tensors that its model does not use."""


class UndefinedWarning(UserWarning):
    """NaN or infinity in a record, written as null with its place and value."""


class UncheckedWarning(UserWarning):
    """File from before checksums, whose damage cannot be told."""


class ModelError(XModelSteerError, RuntimeError):
    """Model that cannot be loaded, or lacks something that the library needs."""


class SiteError(ModelError):
    """Hook point that is missing, did not fire, or has the wrong shape."""


class NonFiniteError(XModelSteerError, ArithmeticError):
    """NaN or infinity where numbers were required."""


class DownloadError(XModelSteerError, OSError):
    """Download that failed, was cut short, or does not match its hash."""


class ArtifactError(XModelSteerError, ValueError):
    """File that is foreign, damaged, or from a newer version."""


class RankError(XModelSteerError, TimeoutError):
    """Process of torchrun that hangs, or has ended while others wait for it."""


class JudgeError(XModelSteerError, RuntimeError):
    """Judge of texts that cannot be reached, or answers in a wrong form."""
