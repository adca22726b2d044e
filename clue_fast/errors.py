"""Every error that clue_fast raises on purpose. Each names the thing and says what to do."""

from __future__ import annotations

from collections.abc import Iterable


class ClueFastError(Exception):
    """Parent of all errors of this package; the command line turns it into one line and exit code 2."""


class DataError(ClueFastError, ValueError):
    """A data set is empty, unreadable, lacks columns, or forget and retain are the same."""


class SiteError(ClueFastError, ValueError):
    """No site was found in a model, or a site does not compute what its structure promises."""


class PatchError(ClueFastError, RuntimeError):
    """Patching, recording or unpatching out of order."""


class ModelError(ClueFastError, ValueError):
    """A model or tokenizer cannot be loaded."""


class SelectionError(ClueFastError, ValueError):
    """A selection is empty, out of range, or belongs to another model."""


class CircuitError(ClueFastError, ValueError):
    """A model whose residual stream cannot be taken apart, or a circuit that cannot be made or solved."""


class BudgetError(ClueFastError, ValueError):
    """A fraction, count or threshold outside its range."""


class SettingError(ClueFastError, ValueError):
    """A learning rate, number of epochs or batch size outside its range."""


class SparseError(ClueFastError, RuntimeError):
    """A model cannot be made sparse, or an optimizer does not fit it."""


class ObjectiveError(ClueFastError, ValueError):
    """An objective makes no sense for a model, or lacks the records it needs."""


class BackendError(ClueFastError, RuntimeError):
    """A backend was asked for that cannot run here."""


class NonFiniteError(ClueFastError, ArithmeticError):
    """NaN or infinity in weights, activations or gradients."""


class FileFormatError(ClueFastError, ValueError):
    """A file is truncated, of another kind, or of another version."""


class OutputError(ClueFastError, OSError):
    """An output folder is not empty or cannot be written."""


class ExtraError(ClueFastError, ImportError):
    """A package is missing that only some installations have.

    Args:
        purpose: what needs it, such as "plots need matplotlib".
        extra: the extra of this package that brings it.
    """

    def __init__(self, purpose: str, extra: str) -> None:
        super().__init__(f'{purpose}; install it with: pip install "clue-fast[{extra}]"')


class HubError(ClueFastError, RuntimeError):
    """Something cannot be pushed to the hub or read from it."""


class UnknownNameError(ClueFastError, ValueError):
    """A name that is not registered, such as a criterion, objective or backend.

    Args:
        kind: what was asked for, such as "criterion".
        name: the name that is unknown.
        choices: the names that exist.
    """

    def __init__(self, kind: str, name: str, choices: Iterable[str]) -> None:
        super().__init__(f"unknown {kind} {name!r}; choose one of: {', '.join(sorted(choices))}")
