"""Runs of the same example compared with each other: which of their answers were better than the others'.

A group has the answers to one call: of one example, one predictor, and its first, second, ... call in a run (mmGRPO,
arXiv 2508.04660); or the very call of one run, answered anew in branches of it. Each has the reward of what its run
came to.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, pstdev
from typing import Any

from ..engines.answers import COLD, SampledAnswer
from ..engines.protocol import RewardedAnswer
from ..errors import ConfigError
from ..rollouts.branches import BranchPoint
from ..rollouts.metrics import EQUAL
from ..rollouts.rollout import Call
from ..rollouts.traces import Trace
from ..training.config import PolicyConfig

WHOLE_DISTRIBUTION: Mapping[str, tuple[Any, ...]] = {"top_p": (None, 1), "top_k": (None,), "n": (None, 1)}
"""Options of an LM, and what they have to be for its answers to be single draws from its whole distribution."""

GroupKey = tuple[int, str, int]
"""Example, predictor, and the number of the call among the predictor's calls of the run, or among those that were
answered anew."""


@dataclass(frozen=True)
class Groups:
    """The answers of some runs, compared."""

    answers: Mapping[str, Sequence[RewardedAnswer]]
    """By predictor: those of groups with spread."""
    kept: int
    """Groups with spread."""
    dropped: int
    """Groups in which all answers had one reward."""
    examples: frozenset[int]
    """Examples with a group that was kept."""


def check_draws(what: str, predictor: str, options: Mapping[str, Any]) -> None:
    """Raise ConfigError where what has these options answers by other than single draws from its whole distribution."""
    for option, allowed in WHOLE_DISTRIBUTION.items():
        if (value := options.get(option)) not in allowed:
            raise ConfigError(
                f"{what} has {option}={value!r}: a policy's answers have to be single draws from all that it might "
                f"say, with {option}={' or '.join(map(str, allowed))}. Make them without {option}, or freeze the "
                f"predictor: frozen=[{predictor!r}]."
            )


def check_draws_of(runs: Iterable[Trace], predictors: Collection[str]) -> None:
    """Raise ConfigError where a call of these predictors asked, by options of its own, for other answers than those."""
    for run in runs:
        for call, _ in run.every_call():
            if call.predictor not in predictors or call.unfit is not None:
                continue
            what = f"A call of predictor {call.predictor!r}"
            check_draws(what, call.predictor, call.config)
            if any(each["temperature"] < COLD for each in call.sampled):
                raise ConfigError(
                    f"{what} was answered at temperature=0, by an LM that the program gave it: a policy's answers have "
                    f"to be draws. Leave the temperature to the step, or freeze the predictor: "
                    f"frozen=[{call.predictor!r}]."
                )


def reward_of(trace: Trace, policy: PolicyConfig) -> float:
    """What a run earned: the metric's number; `unread_reward` where it ended with an answer that could not be read, and
    0 where the program or the metric raised."""
    return policy.unread_reward if trace.reason == "parse failure" else trace.score


def spread_of(traces: Sequence[Trace], policy: PolicyConfig) -> float:
    """The standard deviation of the rewards of an example's runs; the mean over the examples."""
    by_example: dict[int, list[float]] = defaultdict(list)
    for trace in traces:
        by_example[trace.index].append(reward_of(trace, policy))
    return fmean(map(pstdev, by_example.values()))


def compared(runs: Iterable[Trace | BranchPoint], predictors: Collection[str], policy: PolicyConfig) -> Groups:
    """The answers of these predictors in groups, each with its advantage: its reward minus the mean of its group,
    divided by its standard deviation where that is asked for. Groups are by example and call; those of a call that was
    answered anew have its answers alone. An answer that could not be read has `unread_reward`, whatever its run came
    to."""
    groups: dict[GroupKey, list[tuple[Mapping[str, Any], float]]] = defaultdict(list)
    points: Counter[tuple[int, str]] = Counter()
    for run in runs:
        found = _answers_of_run(run, policy) if isinstance(run, Trace) else _answers_of_point(run, points, policy)
        for key, sampled, reward in found:
            if key[1] in predictors:
                groups[key].append((sampled, reward))
    answers: dict[str, list[RewardedAnswer]] = defaultdict(list)
    kept = {key: members for key, members in groups.items() if _has_spread([reward for _, reward in members])}
    for (_, predictor, _), members in sorted(kept.items()):
        rewards = [reward for _, reward in members]
        mean, unit = fmean(rewards), pstdev(rewards) if policy.divide_by_deviation else 1.0
        answers[predictor] += [
            RewardedAnswer(SampledAnswer(**each), (reward - mean) / unit) for each, reward in members
        ]
    return Groups(answers, len(kept), len(groups) - len(kept), frozenset(example for example, _, _ in kept))


def _has_spread(rewards: Sequence[float]) -> bool:
    return max(rewards) - min(rewards) > EQUAL


_Answers = Iterator[tuple[GroupKey, Mapping[str, Any], float]]
"""Of each answer its group, its tokens and its reward."""


def _answers_of_run(trace: Trace, policy: PolicyConfig) -> _Answers:
    """Every answer of a run. Calls that could not be read come after a predictor's others."""
    numbers: Counter[str] = Counter()
    for call, is_read in trace.every_call():
        key = trace.index, call.predictor, numbers[call.predictor]
        numbers[call.predictor] += 1
        yield from _answers_of_call(key, call, is_read, reward_of(trace, policy), policy)


def _answers_of_point(point: BranchPoint, numbers: Counter[tuple[int, str]], policy: PolicyConfig) -> _Answers:
    """The answers to the call that was answered anew: the run's own, then the new ones."""
    origin = point.run.index, point.call.predictor
    for trace, call, is_read in point.answers():
        if call is not None:
            yield from _answers_of_call((*origin, numbers[origin]), call, is_read, reward_of(trace, policy), policy)
    numbers[origin] += 1


def _answers_of_call(key: GroupKey, call: Call, is_read: bool, reward: float, policy: PolicyConfig) -> _Answers:
    """Of a call that could be read, all answers but the last one could not."""
    if call.unfit is None:
        unread = len(call.sampled) - is_read
        yield from ((key, each, policy.unread_reward) for each in call.sampled[:unread])
        yield from ((key, each, reward) for each in call.sampled[unread:])
