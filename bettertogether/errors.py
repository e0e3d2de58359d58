"""Every error this library raises on purpose.

Each one has `BetterTogetherError` as its base and the nearest built-in exception as a second parent, so that
callers may catch either. A message says what came, what is allowed and what to do.
"""

from __future__ import annotations

from dspy.lm15 import ContextLengthError
from dspy.utils.exceptions import LMProviderError

from .printable import printable


class BetterTogetherError(Exception):
    """Base of all errors raised on purpose by this library. What is said of them can't steer a terminal."""

    def __str__(self) -> str:
        return printable(super().__str__())


class StrategyError(BetterTogetherError, ValueError):
    """A strategy that is empty or names a step that was not given."""


class DataError(BetterTogetherError, ValueError):
    """A trainset, valset or rows file that can't be used."""


class ProgramError(BetterTogetherError, ValueError):
    """A student or teacher program that can't be optimized as it stands."""


class ConfigError(BetterTogetherError, ValueError):
    """An option with a value that is not allowed."""


class NoTrainingDataError(BetterTogetherError, RuntimeError):
    """No trace passed, so there is nothing to train on. Carries the counts."""


class TooManyErrors(BetterTogetherError, RuntimeError):
    """More examples failed than `max_errors` allows."""


class NotTrainableError(BetterTogetherError, TypeError):
    """An LM whose provider can't train here."""


class ModelError(BetterTogetherError, OSError):
    """A folder or hub id that holds no loadable model or adapter."""


class UnknownAdapterError(BetterTogetherError, KeyError):
    """A request names an adapter that its engine does not hold."""

    def __str__(self) -> str:
        return printable(self.args[0]) if self.args else ""


class PromptTooLongError(BetterTogetherError, ContextLengthError, ValueError):
    """A prompt leaves no room for an answer in the model's context.

    DSPy shows programs its own `ContextWindowExceededError` instead, on which `dspy.ReAct` shortens its history.
    """


class AnswerTimeoutError(BetterTogetherError, LMProviderError, TimeoutError):
    """A server is well but took too long over an answer. DSPy does not try it again, which would cost as much again."""


class TrainingError(BetterTogetherError, RuntimeError):
    """Training failed; the message names the step."""


class NumericsError(BetterTogetherError, FloatingPointError):
    """A model's numbers are infinite or not a number, so that it has no answer; the message names the precision."""


class EngineBusyError(BetterTogetherError, RuntimeError):
    """A call that would wait for the training that waits for it."""


class RunDirectoryError(BetterTogetherError, RuntimeError):
    """A run directory that is damaged, foreign, or belongs to another run."""


class ArtifactError(BetterTogetherError, ValueError):
    """A saved program that can't be read, or that reaches outside its folder."""


class BudgetExceeded(BetterTogetherError, RuntimeError):
    """The budget was used up between two units of work."""


class MissingExtraError(BetterTogetherError, ImportError):
    """An optional package is not installed; the message gives the pip command."""


class DownloadError(BetterTogetherError, OSError):
    """A package file that can't be fetched, or that is not the one expected."""


class EngineClosedError(BetterTogetherError, RuntimeError):
    """A request to an engine that was closed, or that belongs to another process."""
