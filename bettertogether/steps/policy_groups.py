"""Runs of the same example compared with each other: which of their answers were better than the others'.

A group has the answers to one call: of one example, one predictor, and its first, second, ... call in a run. Each has
the reward of what its run came to (mmGRPO, arXiv 2508.04660).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, pstdev
from typing import Any

from ..engines.answers import SampledAnswer
from ..engines.protocol import RewardedAnswer
from ..rollouts.traces import Trace
from ..training.config import PolicyConfig

LEAST_SPREAD = 1e-9
"""Rewards that differ by less are the same: their mean is rounded."""

GroupKey = tuple[int, str, int]
"""Example, predictor, and the number of the call among the predictor's calls of the run."""


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


def compared(traces: Iterable[Trace], predictors: Collection[str], policy: PolicyConfig) -> Groups:
    """The answers of these predictors in groups, each with its advantage: its reward minus the mean of its group,
    divided by its standard deviation where that is asked for. An answer that could not be read has `unread_reward`,
    whatever its run came to."""
    groups: dict[GroupKey, list[tuple[Mapping[str, Any], float]]] = defaultdict(list)
    for trace in traces:
        for key, sampled, reward in _answers(trace, policy):
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
    return max(rewards) - min(rewards) > LEAST_SPREAD


def _answers(trace: Trace, policy: PolicyConfig) -> Iterator[tuple[GroupKey, Mapping[str, Any], float]]:
    """Every answer of a run, with its group and its reward. Calls that could not be read come after a predictor's
    others."""
    numbers: dict[str, int] = defaultdict(int)
    for call, is_read in [*((each, True) for each in trace.calls), *((each, False) for each in trace.unread)]:
        key = trace.index, call.predictor, numbers[call.predictor]
        numbers[call.predictor] += 1
        if call.unfit is not None:
            continue
        read = call.sampled[-1:] if is_read else ()
        yield from ((key, each, policy.unread_reward) for each in call.sampled[: len(call.sampled) - len(read)])
        yield from ((key, each, reward_of(trace, policy)) for each in read)
