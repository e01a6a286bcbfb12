"""What can go wrong through no fault of ours: each kind is one line for the user and exit code 2."""


def install_hint(extra: str) -> str:
    """How to install what an extra of pyproject.toml names: the package is on no index, so from the clone."""
    return f'pip install ".[{extra}]" in the clone of reallm'


class ReallmError(ValueError):
    """A mistake or a condition the user can mend; the message names the thing and the remedy.

    Names and values in it come out of files: a long one is cut in its middle, so that the remedy still is there.
    """

    def __init__(self, message: str):
        super().__init__(message if len(message) <= 1500 else f"{message[:1000]} … {message[-300:]}")


class FormatError(ReallmError):
    """A format does not exist, or its fields do not fit a matrix."""


class MissingPackageError(FormatError):
    """A format needs a package that is not installed."""


class RecipeError(ReallmError):
    """A recipe, plan or budget that cannot be followed."""


class SourceError(ReallmError):
    """The model to read is missing, incomplete, unsafe or holds values that cannot be stored."""


class ArtifactError(ReallmError):
    """A compressed model that is damaged, of an unknown version, or in the way of a new one."""


class TextError(ReallmError):
    """Text for evaluation or calibration that is missing, empty or too short."""
