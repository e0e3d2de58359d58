"""The policy step: `PolicyFinetune`, GRPO for programs (mmGRPO, arXiv 2508.04660) with LoRA adapters."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import dspy

from ..callbacks import events
from ..checks import require
from ..engines.protocol import PolicyEngine
from ..errors import ConfigError, NotTrainableError
from ..files import adapters_cache
from ..other_names import FINE_TUNERS, knows
from ..programs.behaviour import BehaviourWalk
from ..programs.content import dataset_hash
from ..programs.program import clear_demos, predictors_of, require_program, require_reachable
from ..records import PolicyDetails, RewardedAdapter, score_text
from ..rollouts.labels import split_apart
from ..rollouts.metrics import Metric, require_metric
from ..rollouts.settings import RunSettings
from ..training.config import LoRAConfig, PolicyConfig, TrainingConfig
from ..working_folders import working_folder
from .adapter_rows import AdapterKey, Start, adapter_key, held_out_count
from .adapter_step import AdapterStep
from .policy_groups import check_draws
from .policy_run import PolicyRun, RunState
from .rows_from_traces import Trainable
from .step import StepContext, StepResult
from .training_step import TrainingStep
from .weight_step import LoRAFinetune
from .work import Outlook, Work


@knows(
    **FINE_TUNERS,
    beta="policy=PolicyConfig(kl_weight=...)",
    epochs="policy=PolicyConfig(steps=...)",
    num_train_epochs="policy=PolicyConfig(steps=...)",
    max_steps="policy=PolicyConfig(steps=...)",
)
class PolicyFinetune(AdapterStep):
    """Train a program's local LMs by the rewards of its own runs.

    In each step the program is run several times on each of a few examples, with its weights as they are then; every
    answer is made likelier or less likely by how much better its run was than the others on its example. So it learns
    from failures as well as from success, and needs no label that a right answer could be copied from.

    Args:
        metric: `(example, prediction, trace=None)` to a bool, a number or `Prediction(score, feedback)`: the reward.
            It is given no trace.
        policy: How to learn from rewards.
        lora: Shape of a new adapter, without dropout; one that is trained further (`start_from`) keeps its own shape.
        training: AdamW, precision and memory; see `PolicyConfig` for what counts here.
        multitask: One adapter per LM, fed by all predictors that use it; False: one adapter per predictor.
        start_from: "current" goes on with the adapter in use; "base" trains a new one on the base weights.
        frozen: Names of predictors, or of modules with some, to leave alone. Those whose LM is not local are left alone
            anyway.
        validation_share: Share of the trainset's examples held out to choose the best step: at least 4, which may be a
            fifth of them, so that of fewer than 20 none is. Where it is fewer than 16 and there is a valset of 4 or
            more, up to 16 examples of that are scored instead. 0: none, and the last step is kept.
        num_threads, max_errors, seed: As in `dspy.Evaluate`; `compile` may be given its own.
        folder: Where adapters are written where the step is compiled by itself; None: the cache. In a `BetterTogether`
            run they go to the run directory.
    """

    learns_from_solved = False
    asks_teachers = False

    def __init__(
        self,
        metric: Metric,
        *,
        policy: PolicyConfig = PolicyConfig(),
        lora: LoRAConfig = LoRAConfig(),
        training: TrainingConfig = TrainingConfig(),
        multitask: bool = True,
        start_from: Literal["base", "current"] = "current",
        frozen: Sequence[str] = (),
        validation_share: float = 0.1,
        num_threads: int | None = None,
        max_errors: int | None = None,
        seed: int = 0,
        folder: str | Path | None = None,
    ) -> None:
        require(isinstance(policy, PolicyConfig), "policy", policy, "a PolicyConfig(...)")
        require_metric(metric)
        super().__init__(
            metric,
            lora=lora,
            training=training,
            multitask=multitask,
            start_from=start_from,
            frozen=frozen,
            threshold=None,
            validation_share=validation_share,
            num_threads=num_threads,
            max_errors=max_errors,
            seed=seed,
            folder=folder,
        )
        if lora.dropout:
            raise ConfigError(
                f"lora=LoRAConfig(dropout={lora.dropout}): with dropout, a policy would learn by other probabilities "
                "than its answers were sampled with. Leave dropout out."
            )
        if training.launched:
            raise ConfigError(
                "training=TrainingConfig(...) asks for other processes, where nothing answers that could be learned "
                "from: leave out num_processes, accelerate_config and launch_command."
            )
        self.policy = policy

    def compile(
        self,
        student: dspy.Module,
        *,
        trainset: Sequence[dspy.Example],
        teacher: None = None,
        valset: Sequence[dspy.Example] | None = None,
        num_threads: int | None = None,
        max_errors: int | None = None,
        seed: int | None = None,
        folder: str | Path | None = None,
    ) -> dspy.Module:
        """A copy of the student whose predictors use tuned LMs. A teacher's answers are none of the policy's.

        Raises ProgramError, NotTrainableError, ConfigError, TooManyErrors, TrainingError, and NoTrainingDataError
        where no runs of an example differ in reward.
        """
        if teacher is not None:
            raise ConfigError("teacher= is not allowed: a policy learns from its own answers. Use LoRAFinetune for it.")
        settings = RunSettings(num_threads, max_errors, seed)
        return self.run_alone(student, StepContext(trainset, valset, folder=folder, settings=settings))

    def run(self, student: dspy.Module, context: StepContext) -> StepResult:
        """`compile` with its arguments in one, and all that it found out in its result."""
        started = time.monotonic()
        require_reachable(require_program(student))
        trainable = self.trainable(student)
        starts = self._starts_there(trainable)
        settings = self._checked(context.trainset, context.valset, context.settings)
        assert self.metric is not None
        trainset, held_out = self._split(context.trainset, context.valset or (), settings.seed or 0)
        training = self._seeded(context.settings.seed)
        asked = [self._asked(student, training), *map(dataset_hash, (trainset, held_out)), settings.seed]
        name = BehaviourWalk(lasting=True).of(asked)
        folder = self._folder(context) or adapters_cache()
        with working_folder(folder, f"policy-{name[:12]}") as work, ExitStack() as open_sessions:
            sessions = self._sessions(starts, training, folder, open_sessions)
            run = PolicyRun(
                program=partial(self._tuned, student, trainable),
                adapters={name: adapter_key(name, lm, self.multitask) for name, (_, lm) in trainable.items()},
                sessions=sessions,
                trainset=trainset,
                held_out=held_out,
                metric=self.metric,
                policy=self.policy,
                settings=settings,
                folder=work,
                name=name,
            )
            state = run.run()
            written = {key: session.finish() for key, session in sessions.items()} if state.best_step else {}
        warnings = () if written else events.told(_unchanged(state))
        program = self._tuned(student, trainable, {key: model for key, (model, _) in written.items()})
        if self.policy.fade_demos and written:
            clear_demos(program, trainable)
        return StepResult(
            program=program,
            ledger=state.ledger.with_seconds(time.monotonic() - started),
            details=PolicyDetails(
                adapters={
                    model: RewardedAdapter(f"{starts[key].model} {key.predictor}".strip(), str(where))
                    for key, (model, where) in written.items()
                },
                history=state.history,
                best_step=state.best_step,
                held_out_examples=len(held_out),
            ),
            step_gain=_gain(state) if len(trainset) < len(context.trainset) else None,
            warnings=warnings,
        )

    def _asked(self, student: dspy.Module, training: TrainingConfig) -> list[Any]:
        """What decides how a training goes, but for the examples and the seed of answers."""
        options = [self.policy.to_dict(), self.lora.to_dict(), training.to_dict(), self.multitask, self.start_from]
        return [student, dspy.settings.adapter, self.metric, options, self.frozen]

    def trainable(self, student: dspy.Module) -> Trainable:
        """By predictor name, what is to be trained. Raises NotTrainableError, and ConfigError for LMs whose answers
        are not drawn from their whole distribution."""
        found, predictors = super().trainable(student), predictors_of(student)
        for name, (engine, lm) in found.items():
            if not isinstance(engine, PolicyEngine):
                raise NotTrainableError(
                    f"Predictor {name!r} uses {lm.model!r}, whose engine ({type(engine).__name__}) can't learn from "
                    f"rewards: use local_lm(...) or vllm_lm(...), or freeze it: frozen=[{name!r}]."
                )
            check_draws(f"Predictor {name!r} or its LM", name, {**lm.kwargs, **predictors[name].config})
        return found

    def _split(
        self, trainset: Sequence[dspy.Example], valset: Sequence[dspy.Example], seed: int
    ) -> tuple[Sequence[dspy.Example], Sequence[dspy.Example]]:
        """The examples to learn from, and those to choose the best step on."""
        if measured := self.measured(trainset, valset, seed):
            return trainset, measured
        number = held_out_count(len(trainset), self.validation_share)
        if not number:
            return trainset, ()
        held_out, rest = split_apart(trainset, number, seed)
        return rest, held_out

    def _sessions(
        self,
        starts: Mapping[AdapterKey, Start],
        training: TrainingConfig,
        folder: Path,
        stack: ExitStack,
    ) -> dict[AdapterKey, Any]:
        """One for each adapter, open as long as the stack."""
        sessions: dict[AdapterKey, Any] = {}
        for key, start in starts.items():
            assert isinstance(start.engine, PolicyEngine)
            session = start.engine.policy_session(
                policy=self.policy,
                lora=self.lora,
                training=training,
                start_from=start.adapter,
                folder=folder,
            )
            sessions[key] = stack.enter_context(session)
        return sessions

    @property
    def timed(self) -> TrainingStep:
        """A weight step with the program's own prompts, and without `max_minutes`, which ends no policy's training."""
        options: dict[str, Any] = {"multitask": self.multitask, "frozen": self.frozen, "train_prompt": "optimized"}
        training = replace(self.training, max_minutes=None)
        return LoRAFinetune(self.metric, lora=self.lora, training=training, **options)

    def work(self, student: dspy.Module, context: StepContext, outlook: Outlook) -> Work:
        """The runs of all steps, the answers trained on, and the scoring of the examples held out."""
        policy = self.policy
        trainset, held_out = self._split(context.trainset, context.valset or (), context.settings.seed or 0)
        # At most all draws are made, at least the fewest; in between where about half of the examples are neither
        # always solved nor never.
        draws = 1 + outlook.patience * (policy.most_draws - 1)
        examples = min(draws * policy.examples_per_step, len(trainset))
        learned = min(policy.examples_per_step, len(trainset)) * policy.group_size * policy.steps
        scored = (1 + -(-policy.steps // policy.score_every)) * len(held_out)
        by_call = policy.group_by == "call"
        trainable = self.trainable(student)
        branch_runs = sum(outlook.branch_runs.get(name, 0.0) for name in trainable)
        runs_each = policy.group_size if by_call else 1 + (policy.group_size - 1) * branch_runs
        runs = Work.of_runs(examples * runs_each * policy.steps + scored, outlook)
        return runs + Work(
            trained_rows=outlook.calls * learned * policy.updates, trainings=len(self._starts(trainable))
        )


def _gain(state: RunState) -> float | None:
    """By how much the score on examples held out rose."""
    before = state.history[0].held_out_score
    return None if before is None or state.best_score is None else state.best_score - before


def _unchanged(state: RunState) -> str:
    score = score_text(state.best_score)
    return (
        f"No step scored as high on the examples held out as what it started from ({score}): the program is given back "
        "as it was. Lower the learning rate, give more steps or examples, or a larger group_size."
    )
