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
    """A strategy that is empty, names a step that was not given, or has a step where it could do nothing.

    Name keys of the optimizers given to `BetterTogether`, joined by "->"; without any they are "p" and "w".
    """


class DataError(BetterTogetherError, ValueError):
    """A trainset, valset or rows file that can't be used.

    The message names the example or the line. Examples are a list of `dspy.Example`, each with `.with_inputs(...)`;
    `examples_from` makes them of a dataset. A rows file that is damaged has to be written again.
    """


class ProgramError(BetterTogetherError, ValueError):
    """A student or teacher program that can't be optimized as it stands.

    Mostly a predictor without an LM (`program.set_lm(lm)`), a program whose predictors are all frozen, or a teacher of
    another structure than the student.
    """


class ConfigError(BetterTogetherError, ValueError):
    """An option with a value that is not allowed.

    Mostly raised where the option is given, before any work. Take a value that the message allows.
    """


class UnknownPriceError(ConfigError):
    """A limit on cost, and an LM was called whose price is not known.

    Bound tokens, metric calls or minutes instead. The same call with such a budget and the same `run_dir` goes on.
    """


class NoTrainingDataError(BetterTogetherError, RuntimeError):
    """No trace passed, so there is nothing to train on. Carries the counts.

    The counts say whether runs failed, scored below the threshold or were too long. Try harder for each example
    (`num_samples=`), lower `threshold=`, give labels or a teacher, or begin with a prompt step.
    """


class TooManyErrors(BetterTogetherError, RuntimeError):
    """More examples failed than `max_errors` allows.

    The program or the metric raised on them; the message has the commonest reason. Mend it, or give a larger
    `max_errors` where so many failures are to be expected.
    """


class NotTrainableError(BetterTogetherError, TypeError):
    """An LM whose provider can't train here.

    Use `local_lm` or `vllm_lm`, take the weight step out of the strategy, or freeze fewer predictors.
    """


class ModelError(BetterTogetherError, OSError):
    """A folder or hub id that holds no loadable model or adapter.

    Check the path or the id, that all files came, and that you may read it (`hf auth login` for a gated model). Models
    and adapters of kinds that can't be served are refused with their kind.
    """


class UnknownAdapterError(BetterTogetherError, KeyError):
    """A request names an adapter that its engine does not hold.

    Give the adapter to the engine first (`engine.add_adapter(folder)`), or load the program that it belongs to.
    """

    def __str__(self) -> str:
        return printable(self.args[0]) if self.args else ""


class PromptTooLongError(BetterTogetherError, ContextLengthError, ValueError):
    """A prompt leaves no room for an answer in the model's context.

    DSPy shows programs its own `ContextWindowExceededError` instead, on which `dspy.ReAct` shortens its history.
    Elsewhere: shorter inputs, fewer demos, a lower `max_tokens`, or a model with a longer context.
    """


class AnswerTimeoutError(BetterTogetherError, LMProviderError, TimeoutError):
    """A server is well but took too long over an answer. DSPy does not try it again, which would cost as much again.

    Give a longer `request_timeout_s`, a lower `max_tokens` or a lower `concurrency` (`engine_options`).
    """


class TrainingError(BetterTogetherError, RuntimeError):
    """Training failed; the message names the step.

    A loss that is not a number: a lower learning rate, or dtype="float32". No memory: a lower `max_tokens_per_batch`,
    `gradient_checkpointing=True`, or `quantize_base="4bit"`. The same call goes on after the last full epoch.
    """


class NumericsError(BetterTogetherError, FloatingPointError):
    """A model's numbers are infinite or not a number, so that it has no answer; the message names the precision.

    Load it in another one: `engine_options={"dtype": "float32"}`, or "bfloat16" where that is too large.
    """


class EngineBusyError(BetterTogetherError, RuntimeError):
    """A call that would wait for the training that waits for it.

    A callback asked the model, or for another training, while it trains. Ask when the training has ended.
    """


class RunDirectoryError(BetterTogetherError, RuntimeError):
    """A run directory that is damaged, foreign, or belongs to another run.

    The message has what differs from the run that is there. Give the same call to go on, with another strategy if you
    like, or another `run_dir` to start again; what was written stays.
    """


class ArtifactError(BetterTogetherError, ValueError):
    """A saved program that can't be read, or that reaches outside its folder.

    The message names the file. Take the folder as it was saved, give `into=` a program of the saved structure, or the
    base model that the adapter was trained on.
    """


class BudgetExceeded(BetterTogetherError, RuntimeError):
    """The budget was used up between two units of work.

    `compile` catches it and returns the best so far. The same call with a larger budget and the same `run_dir` goes on.
    """


class MissingExtraError(BetterTogetherError, ImportError):
    """An optional package is not installed; the message gives the pip command.

    Run it in the environment that this process runs in.
    """


class DownloadError(BetterTogetherError, OSError):
    """A package file that can't be fetched, or that is not the one expected.

    Check the network and the package index (`pip config list`); or give a model's folder, which needs neither.
    """


class EngineClosedError(BetterTogetherError, RuntimeError):
    """A request to an engine that was closed, or that belongs to another process.

    Make a new LM. A forked process makes its own, or is started with "spawn".
    """
