"""Learning from rewards on the model that an engine answers with: it answers, learns from that, and answers again."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError
from ..files import new_folder
from ..training.adapter import save_adapter
from ..training.auto import auto_policy_rate
from ..training.config import LoRAConfig, PolicyConfig, TrainingConfig
from ..training.lending import ModelState, lent_out
from ..training.policy import PolicyRow, PolicyTraining
from ..training.progress import PolicyUpdate
from ..training.stepper import ready_to_step
from .finetuning import named_by_content
from .protocol import RewardedAnswer

if TYPE_CHECKING:
    from .base_engine import BaseEngine


class Session:
    """See `PolicySession`, the protocol."""

    def __init__(
        self,
        host: BaseEngine,
        model: Any,
        within: ModelState,
        training: PolicyTraining,
        round_number: int,
        folder: Path,
        scratch: Path,
    ) -> None:
        self._host, self._model, self._within, self._training = host, model, within, training
        self._round, self._folder, self._scratch = round_number, folder, scratch
        self._is_finished = False
        self.model = self._served()

    def update(self, answers: Sequence[RewardedAnswer]) -> PolicyUpdate:
        """Learn from the answers of a step, and answer with the new weights."""
        rows = [self._row(answer) for answer in answers]
        with self._in_training():
            told = self._training.update(rows)
        self._serve()
        return told

    def _row(self, answer: RewardedAnswer) -> PolicyRow:
        sampled = answer.sampled
        return PolicyRow(
            sampled.prompt_token_ids,
            sampled.token_ids,
            forced=sampled.forced,
            advantage=answer.advantage,
            temperature=sampled.temperature,
            masks=partial(self._host.choices, sampled),
        )

    @contextmanager
    def _in_training(self) -> Iterator[None]:
        with self._host.alone(), lent_out(self._model, self._within):
            yield

    def _served(self) -> str:
        name = self._host.serve(self._training, self._round, self._scratch)
        self._host.in_sessions[name] += 1
        return name

    def _serve(self) -> None:
        before, written = self.model, list(self._scratch.iterdir())
        self.model = self._served()
        self._forget(before)
        for folder in written:
            shutil.rmtree(folder)

    def keep(self) -> None:
        """Take the weights as they are for the best so far."""
        self._training.keep()

    def save(self, folder: Path, run: str) -> None:
        """Write the state of a run, by its name, into a folder."""
        self._training.save(folder, run)

    def load(self, folder: Path, run: str) -> None:
        """Go on from what `save` wrote."""
        with self._in_training():
            self._training.load(folder, run)
        self._serve()

    def finish(self) -> tuple[str, Path]:
        """Write the best adapter and serve it; its model name and folder."""
        work = new_folder(self._scratch)
        save_adapter(work, self._training.adapter_config, self._training.best)
        _, folder = named_by_content(work, self._host.base_name, self._round, self._folder)
        self.close()
        self.model = self._host.add_adapter(folder)
        self._is_finished = True
        return self.model, folder

    def close(self) -> None:
        """Answer no more with an adapter that is not finished."""
        if not self._is_finished:
            self._forget(self.model)

    def _forget(self, model: str) -> None:
        self._host.in_sessions[model] -= 1
        if not self._host.in_sessions[model]:
            self._host.remove_adapter(model)


@contextmanager
def policy_session(
    host: BaseEngine,
    policy: PolicyConfig,
    lora: LoRAConfig,
    training: TrainingConfig,
    start_from: tuple[int, Path | None],
    folder: Path,
) -> Iterator[Session]:
    """See `PolicyEngine.policy_session`; `start_from` is a model's round, and its folder where it is an adapter."""
    if training.launched:
        raise ConfigError(
            "num_processes, accelerate_config and launch_command are not for learning from rewards, which goes on in "
            "this process: leave them out of training=TrainingConfig(...)."
        )
    round_number, start = start_from
    folder.mkdir(parents=True, exist_ok=True)
    with host.trained_model(training) as model, ExitStack() as ready:
        before = ModelState.of(model)
        with host.alone():
            if training.learning_rate == "auto":
                width = model.config.get_text_config().hidden_size
                training = replace(training, learning_rate=auto_policy_rate(width))
            stepper = ready.enter_context(ready_to_step(model, lora, training, start, host.max_length))
            learning, within = PolicyTraining(stepper, policy), ModelState.of(model)
            before.restore()
        try:
            # By a name that a run's directory clears away after a kill.
            with tempfile.TemporaryDirectory(prefix=".policy-", suffix=".tmp", dir=folder) as scratch:
                # A server of another user reads from it.
                Path(scratch).chmod(0o755)
                session = Session(host, model, within, learning, round_number + 1, folder, Path(scratch))
                try:
                    yield session
                finally:
                    session.close()
        finally:
            with host.alone():
                within.restore()
                ready.close()
