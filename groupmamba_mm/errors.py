"""Errors that speak to the person at the command line.

The tools print such an error as one line without a traceback (see
:mod:`groupmamba_mm.engine.cli`), so a message names the thing, the value that was found and the
remedy, and stays on one line where it can: an error raised in a data loading worker reaches the
main process as text only.
"""


class UserError(Exception):
    """Base of the errors that the user can fix without reading code."""


class BackendError(UserError, RuntimeError):
    """An operator backend that was asked for by name and cannot run."""


class CheckpointError(UserError, RuntimeError):
    """A checkpoint that cannot be read safely or does not fit the model."""


class ConfigError(UserError, ValueError):
    """A config file or a command line option that cannot be what was meant."""


class DataError(UserError, RuntimeError):
    """A data set or an image that is missing, empty or damaged."""


class LaunchError(UserError, RuntimeError):
    """A launch whose processes, devices or environment do not fit together."""


class MissingExtraError(UserError, ModuleNotFoundError):
    """A library of one of this package's extras that is needed and not installed."""


class ExportError(UserError, RuntimeError):
    """A model that was exported and does not compute what it computes in PyTorch."""
