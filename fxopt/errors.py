"""The errors a user can meet: one child of `FxoptError` per room of the house.

A message says what went wrong, at which node (printed) and from which source line where there is
one, and what to do next. It is raised before anything is changed.
"""


class FxoptError(Exception):
    """Base of every error that fxopt raises on purpose."""


class InputError(FxoptError, ValueError):
    """The inputs of a call don't fit the captured program: structure, dtype, rank, size, device."""


class OutsideError(InputError):
    """A call that another program of the same model could answer: of other sizes or constants.

    `branch` tells that Python code of the model takes another branch for its sizes.
    """

    def __init__(self, message: str, branch: bool = False) -> None:
        super().__init__(message)
        self.branch = branch


class ModelError(FxoptError, TypeError):
    """What was handed over as a model can't be transformed as it is."""


class CaptureError(FxoptError):
    """The model holds a construct that can't become a graph; names it, its line, what to try."""


class NotCapturedError(FxoptError):
    """The graph was asked for before the first call provided the inputs to capture it with."""


class CalibrationError(FxoptError, ValueError):
    """Calibration inputs are unusable: no iterable, empty, a batch that doesn't fit, a NaN."""


class WellFormedError(FxoptError):
    """A program holds what the dialect doesn't allow; names the node and its neighbours."""


class PassError(FxoptError, ValueError):
    """A pass list or a pass option is wrong: unknown name, class for instance, order, value."""


class RewriteError(FxoptError):
    """A rule misbehaved while rewriting: it loops, or built something that can't be typed."""


class EquivalenceError(FxoptError):
    """A pass broke its claim: says which pass, claimed against measured, and the guilty node."""


class KernelError(FxoptError):
    """A kernel can't run here, or isn't in the code that lowering generated."""


class LowerError(FxoptError):
    """Lowering is impossible here: no compiler, no such backend."""


class SaveError(FxoptError):
    """A saved program can't be written or read: damaged, truncated, hostile, other version."""


class ExportError(FxoptError):
    """A program can't be written for another runtime: operator, missing package, path."""


class TrainError(FxoptError, ValueError):
    """A training run can't start or go on: an option, what a model returns, a checkpoint, a NaN."""


class MeasureError(FxoptError, ValueError):
    """What is to be measured or compared can't be: a model, its inputs or data, a metric."""


class SearchError(FxoptError, ValueError):
    """A search can't start or go on: an option, the metric, the storage, a missing package."""
