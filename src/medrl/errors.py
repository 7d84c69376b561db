"""What can go wrong for a user. Every message says what was given, what would do, and how to fix it.

``assert`` is for our own invariants; these are for the world outside.
"""

from pathlib import Path


class MedrlError(ValueError):
    """Root of all errors a user can cause or cure. ``exit_code`` is what the command line ends with."""

    exit_code = 1


class SettingsError(MedrlError):
    """A recipe, override or argument that cannot mean anything: the words were wrong."""

    exit_code = 2


class DataError(MedrlError):
    """A data set, row or store that cannot be read as asked."""


class UnfitError(MedrlError):
    """Training and test sets that an audit found unfit for each other: the answer is no."""

    exit_code = 3


class ImageError(DataError):
    """An image that cannot be decoded: which one, why, and what to do about it."""

    def __init__(self, path: Path, reason: str, fix: str) -> None:
        super().__init__(f"image {path}: {reason}; {fix}")
        self.path, self.reason, self.fix = path, reason, fix

    def __reduce__(self) -> tuple[type, tuple[Path, str, str]]:
        """Crosses process borders whole: images are read in worker processes too."""
        return type(self), (self.path, self.reason, self.fix)


class PolicyError(MedrlError):
    """A model folder that is incomplete, or a model that cannot do what was asked."""


class PromptTooLongError(MedrlError):
    """A prompt that does not fit the context; image tokens are never cut to make it fit."""


class RewardError(MedrlError):
    """A reward that failed or gave no finite number."""


class EndpointError(MedrlError):
    """A server that refuses, cannot be reached, or keeps failing; what it answered before is kept."""


class NonFiniteError(MedrlError):
    """A loss, gradient or reward that is NaN or infinite; raised before any weight changes."""


class CheckpointError(MedrlError):
    """A checkpoint that is missing, incomplete or does not verify."""


class RunError(MedrlError):
    """A run or evaluation folder that is not what was expected."""


class MissingExtraError(MedrlError):
    """An optional dependency that is not installed."""

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(f"this needs the package '{package}', which is not installed: pip install 'medrl[{extra}]'")
