"""Errors the user can fix: the command line prints each as one line and exits with code 2."""


def install_hint(extra: str) -> str:
    """Return the command that installs an extra of pyproject.toml: from the clone, as reallm is on no package index."""
    return f'pip install ".[{extra}]" in the clone of reallm'


class ReallmError(ValueError):
    """An error the user can fix; the message names the cause and the remedy.

    Messages quote names and values from files. One of more than 1,500 characters is cut in the middle, so that the
    remedy at its end remains.
    """

    def __init__(self, message: str):
        super().__init__(message if len(message) <= 1500 else f"{message[:1000]} … {message[-300:]}")


class FormatError(ReallmError):
    """An unknown format, an invalid field, a matrix that a format cannot store, or damaged stored tensors."""


class MissingPackageError(FormatError):
    """A format needs a package that is not installed."""


class RecipeError(ReallmError):
    """An invalid recipe or plan, or a budget that cannot be met."""


class SourceError(ReallmError):
    """A source model that is missing, incomplete, unsafe, or has values that cannot be stored."""


class ArtifactError(ReallmError):
    """A compressed model that is damaged or of an unknown version, or an output folder that already has one."""


class TextError(ReallmError):
    """Evaluation or calibration text that is missing, empty or too short."""
