"""The steps of learning from rewards: run, compare, learn, score. After each of them all is written that it takes to go
on, so that a call after a kill comes to the same adapter."""

from __future__ import annotations

import json
import random
import shutil
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from statistics import fmean

import dspy

from ..callbacks import events
from ..engines.protocol import PolicySession, RewardedAnswer
from ..errors import NoTrainingDataError, TrainingError
from ..files import atomic_folder, atomic_write, put_anew
from ..printable import get_logger
from ..programs.program import change_lms, clear_demos, predictors_of
from ..records import SCHEMA, Ledger, RewardLine, Saved, read
from ..rollouts.branches import BranchPoint, branch_points
from ..rollouts.evaluation import Evaluator
from ..rollouts.metrics import FULL_MARK, Metric, is_above_one, reaches, require_from_zero
from ..rollouts.rollout import Attempt, Call
from ..rollouts.settings import RunSettings
from ..rollouts.traces import ExamplePass, Trace
from ..training.config import PolicyConfig
from ..training.progress import PolicyUpdate, TrainingProgress
from ..working_folders import latest_checkpoint
from .adapter_rows import AdapterKey
from .policy_groups import Groups, check_draws_of, compared, reward_of, spread_of
from .select_traces import unseen_calls

logger = get_logger(__name__)

PATIENCE = 3
"""Steps in a row that had nothing to learn from, or next to nothing, after which the training ends."""

FEW = 0.25
"""A smaller share than this, of the examples drawn whose runs differ, is next to nothing: with eight runs of each, some
96 of 100 earn the full mark."""


@dataclass(frozen=True)
class RunState(Saved):
    """Where a run stands."""

    step: int = 0
    """Steps done."""
    drawn: int = 0
    """Examples drawn, those that were drawn again counted again."""
    idle: int = 0
    """Steps in a row, up to now, that had next to nothing to learn from."""
    best_step: int = 0
    best_score: float | None = None
    """Mean score of the examples held out; None where there are none."""
    history: tuple[RewardLine, ...] = ()
    ledger: Ledger = field(default_factory=Ledger)


@dataclass
class PolicyRun:
    """A program that learns from its rewards; `state` is all but the adapters."""

    program: Callable[[Mapping[AdapterKey, str]], dspy.Module]
    """A copy of the student that asks these models."""
    adapters: Mapping[str, AdapterKey]
    """By predictor, those that are trained."""
    sessions: Mapping[AdapterKey, PolicySession]
    trainset: Sequence[dspy.Example]
    held_out: Sequence[dspy.Example]
    metric: Metric
    policy: PolicyConfig
    settings: RunSettings
    folder: Path
    """Where the run is written down."""
    name: str
    """Hash of all that decides how it goes."""
    state: RunState = field(default_factory=RunState)

    def run(self) -> RunState:
        """Take the steps that are left."""
        self._resume()
        if not self.state.history:
            score = self._score(0)
            self.state = replace(self.state, best_score=score, history=(RewardLine(0, held_out_score=score),))
        while self.state.step < self.policy.steps and self.state.idle < PATIENCE:
            line, updates = self._step()
            self._save()
            # Only now, since whoever watches may end the run.
            self._tell(line, updates)
        if self.state.step < self.policy.steps:
            logger.info("The training ends after %d steps: hardly any runs differ in reward.", self.state.step)
        return self.state

    def _step(self) -> tuple[RewardLine, Sequence[PolicyUpdate]]:
        started, policy, before = time.monotonic(), self.policy, self.state
        self.state = replace(before, step=before.step + 1)
        traces, groups = self._runs()
        updates = self._learn(groups)
        if not groups.kept:
            self._check_learnable(traces)
        spent = sum((trace.ledger for trace in traces), Ledger(trained_tokens=sum(each.tokens for each in updates)))
        seconds = time.monotonic() - started
        line = RewardLine(
            step=self.state.step,
            reward=fmean(reward_of(trace, policy) for trace in traces),
            spread=spread_of(traces, policy),
            examples=len({trace.index for trace in traces}),
            kept_groups=groups.kept,
            groups=groups.kept + groups.dropped,
            kl=fmean(each.kl for each in updates if each.kl is not None) if policy.kl_weight and updates else None,
            tokens_per_s=spent.tokens / max(seconds, 1e-9),
        )
        idle = before.idle + 1 if self._is_idle(groups, traces) else 0
        self.state = replace(self.state, idle=idle, ledger=before.ledger + spent)
        is_last = self.state.step == policy.steps or self.state.idle == PATIENCE
        if is_last or self.state.step % policy.score_every == 0:
            line = replace(line, held_out_score=self._scored())
        self.state = replace(self.state, history=(*before.history, line))
        return line, updates

    def _runs(self) -> tuple[list[Trace], Groups]:
        """Runs of so many examples that enough of them differ in reward, or as many as may be drawn."""
        policy, drawn, traces, runs = self.policy, list[int](), list[Trace](), list[Trace | BranchPoint]()
        programs = [self._program(with_demos=True), self._program(with_demos=False)]
        most = min(policy.most_draws * policy.examples_per_step, len(self.trainset))
        options = ExamplePass(
            self.metric,
            settings=replace(self.settings, store=None),
            phase=f"step {self.state.step} of {policy.steps}",
            scores_only=True,
        )
        groups = compared(runs, self.adapters, policy)
        while (missing := min(policy.examples_per_step - len(groups.examples), most - len(drawn))) > 0:
            new = self._drawn(missing, drawn)
            drawn += new
            more, found = self._run_on(new, programs, options)
            require_from_zero(trace.score for trace in more)
            check_draws_of(more, self.adapters)
            traces += more
            runs += found
            groups = compared(runs, self.adapters, policy)
        return traces, groups

    def _run_on(
        self, examples: Sequence[int], programs: Sequence[dspy.Module], options: ExamplePass
    ) -> tuple[list[Trace], Sequence[Trace | BranchPoint]]:
        """Runs on these examples, of the programs with demos and without, and what is compared of them."""
        policy, with_demos = self.policy, round(self._demo_share * len(examples))
        by_branch = policy.group_by == "branch"
        jobs = [
            (int(place >= with_demos), index, self._attempt(number))
            for place, index in enumerate(examples)
            for number in range(1 if by_branch else policy.group_size)
        ]
        traces = options.over_many(programs, self.trainset, jobs)
        if not by_branch:
            return traces, traces
        points = list[BranchPoint]()
        for program, runs in zip(programs, (traces[:with_demos], traces[with_demos:]), strict=True):
            points += branch_points(
                program,
                self.trainset,
                [replace(run, calls=self._learned(run.calls), unread=self._learned(run.unread)) for run in runs],
                options,
                [policy.temperature] * (policy.group_size - 1),
                first=self._attempt(1).number,
                after=policy.temperature,
            )
        return [*traces, *(branch for point in points for branch in point.branches)], points

    def _learned(self, calls: Sequence[Call]) -> tuple[Call, ...]:
        return tuple(call for call in calls if call.predictor in self.adapters and call.unfit is None)

    def _attempt(self, number: int) -> Attempt:
        """No two of a training have the same number, and so the same seed."""
        first = (self.state.step - 1) * self.policy.group_size + 1
        return Attempt("sample", first + number, self.policy.temperature)

    @cached_property
    def _fades(self) -> bool:
        """Whether there are demos to fade."""
        predictors = predictors_of(self._program(with_demos=True, sampled=False))
        return self.policy.fade_demos and any(predictors[name].demos for name in self.adapters)

    @property
    def _demo_share(self) -> float:
        """The share of examples whose runs show the program's demos."""
        if not self.policy.fade_demos:
            return 1.0
        return 1 - (self.state.step - 1) / max(1, self.policy.steps - 1)

    def _drawn(self, number: int, taken: Sequence[int]) -> list[int]:
        """So many more examples that this step has not taken, in a seeded order that comes to all of them in turn."""
        found = list[int]()
        while len(found) < number:
            turn, place = divmod(self.state.drawn, len(self.trainset))
            order = random.Random(f"{self.settings.seed}/{turn}").sample(range(len(self.trainset)), len(self.trainset))
            if order[place] not in (*taken, *found):
                found.append(order[place])
            self.state = replace(self.state, drawn=self.state.drawn + 1)
        return found

    def _program(self, *, with_demos: bool, sampled: bool = True) -> dspy.Module:
        """The program with the adapters as they are now; its answers come in tokens where it is to be sampled."""
        program = self.program({key: session.model for key, session in self.sessions.items()})
        if sampled:
            change_lms(program, {name: {"store": True, "cache": False} for name in self.adapters})
        if not with_demos:
            clear_demos(program, self.adapters)
        return program

    def _learn(self, groups: Groups) -> list[PolicyUpdate]:
        answers: dict[AdapterKey, list[RewardedAnswer]] = defaultdict(list)
        for predictor, each in groups.answers.items():
            answers[self.adapters[predictor]] += each
        return [session.update(answers[key]) for key, session in self.sessions.items() if answers[key]]

    def _is_idle(self, groups: Groups, traces: Sequence[Trace]) -> bool:
        """Whether no runs of an example differ in reward; or, where the examples held out have the full mark, those of
        hardly any example. Never while demos fade: what is solved with them may not be without."""
        if self._demo_share and self._fades:
            return False
        scores = [self.state.best_score or 0.0, *(trace.score for trace in traces)]
        solved = reaches(scores[0], FULL_MARK) and not any(map(is_above_one, scores))
        differ, drawn = len(groups.examples), len({trace.index for trace in traces})
        return not groups.kept or (solved and differ < FEW * drawn)

    def _check_learnable(self, traces: Sequence[Trace]) -> None:
        """Raise NoTrainingDataError where the very first runs say that there is nothing to learn from."""
        if self.state.step > 1:
            return
        calls = [call for trace in traces for call in (*trace.calls, *trace.unread) if call.predictor in self.adapters]
        if not any(call.sampled for call in calls):
            raise NoTrainingDataError(f"There is nothing to learn from. {unseen_calls(len(traces))}")
        rewards = sorted({round(reward_of(trace, self.policy), 6) for trace in traces})
        if self._fades and reaches(rewards[0], FULL_MARK):
            return  # What is solved with demos may not be without.
        examples, size = len({trace.index for trace in traces}), self.policy.group_size
        alike = f"{size} of each, and all of an example"
        if self.policy.group_by == "branch":
            alike = f"{size} answers to each call, and all of a call"
        raise NoTrainingDataError(
            f"There is nothing to learn from: {len(traces)} runs of {examples} examples, {alike} earned the same "
            f"(rewards: {rewards[:5]}). Give a metric with partial credit, "
            "examples that are neither too hard nor too easy for the program, or a larger group_size; or let it learn "
            "from right runs first (LoRAFinetune)."
        )

    def _scored(self) -> float | None:
        """Score the adapters as they are; of those that score best, the last ones are kept."""
        score, best = self._score(self.state.step), self.state.best_score
        if score is None or best is None or reaches(score, best):
            self.state = replace(self.state, best_step=self.state.step, best_score=score)
            for session in self.sessions.values():
                session.keep()
        return score

    def _score(self, step: int) -> float | None:
        if not self.held_out:
            return None
        # What it started from is scored as it was given; what it comes to has no demos where they fade.
        program = self._program(with_demos=step == 0 or not self.policy.fade_demos, sampled=False)
        evaluator = Evaluator(self.metric, replace(self.settings, store=None))
        phase = f"step {step} of {self.policy.steps}: score"
        scored = evaluator.evaluate([program], self.held_out, phase, "eval_minibatch")[0]
        require_from_zero(scored.scores)
        self.state = replace(self.state, ledger=self.state.ledger + scored.ledger)
        return scored.mean

    def _tell(self, line: RewardLine, updates: Sequence[PolicyUpdate]) -> None:
        progress = TrainingProgress(
            step=self.state.step,
            total_steps=self.policy.steps,
            epoch=self.state.drawn / len(self.trainset),
            loss=fmean(each.loss for each in updates) if updates else None,
            validation_loss=None,
            tokens=self.state.ledger.trained_tokens,
            learning_rate=updates[0].learning_rate if updates else 0.0,
            new_tokens=sum(each.tokens for each in updates),
        )
        events.emit("training", {"progress": progress, "rewards": line})

    def _save(self) -> None:
        target = self.folder / f"step-{self.state.step}"
        with atomic_folder(target, put_anew) as work:
            for number, session in enumerate(self.sessions.values()):
                (work / str(number)).mkdir()
                session.save(work / str(number), self.name)
            atomic_write(work / "state.json", json.dumps({"schema": SCHEMA, "run": self.name, **asdict(self.state)}))
        for other in self.folder.glob("step-*"):
            if other != target:
                shutil.rmtree(other, ignore_errors=True)

    def _resume(self) -> None:
        latest = latest_checkpoint(self.folder, "step-")
        if latest is None:
            return
        try:
            values = json.loads((latest / "state.json").read_text())
            if values.pop("run") != self.name:
                return
            self.state = read(RunState, "checkpoint", values, lambda fields: fields)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise TrainingError(
                f"The checkpoint in {latest} is damaged ({error}): delete {self.folder} and train again."
            ) from error
        for number, session in enumerate(self.sessions.values()):
            session.load(latest / str(number), self.name)
        logger.info("Going on after step %d of %d in %s.", self.state.step, self.policy.steps, self.folder)
