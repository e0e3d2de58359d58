"""What an answer is asked with and what it comes to, whichever engine writes it. No torch here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from dspy.lm15 import Config, UnsupportedFeatureError

COLD = 1e-5
"""Below this temperature the likeliest token is taken: logits over it may be infinite."""
UNSUPPORTED = ("frequency_penalty", "presence_penalty", "reasoning", "tool_choice", "probabilities", "extensions")


@dataclass(frozen=True)
class SamplingOptions:
    """How the next token is picked from the model's distribution."""

    temperature: float = 0.0
    """0 takes the likeliest token, and so does what is below `COLD`."""
    top_p: float = 1.0
    """Keep the likeliest tokens whose probabilities add up to this, 0 to 1."""
    top_k: int | None = None
    """Keep this many of the likeliest tokens."""
    seed: int | None = None
    """Same seed and prompt, same text; None draws fresh entropy."""
    stop: tuple[str, ...] = ()
    """Texts that end the answer; they are not part of it."""
    logprobs: int | None = None
    """Report log probabilities: of the chosen tokens, and of so many of the likeliest; None: none."""
    store: bool = False
    """Report the tokens as they were sampled, see `SampledAnswer`."""

    @classmethod
    def from_config(cls, config: Config) -> SamplingOptions:
        """The options of a request. Raises UnsupportedFeatureError for those that this engine has not."""
        for name in UNSUPPORTED:
            if getattr(config, name):
                raise UnsupportedFeatureError(
                    f"{name}={getattr(config, name)!r} is not supported by the local engine. Allowed: temperature, "
                    "max_tokens, top_p, top_k, stop, seed, logprobs, store and response_format. Leave it out.",
                    feature=f"config.{name}",
                )
        return cls(
            temperature=config.temperature or 0.0,
            top_p=1.0 if config.top_p is None else config.top_p,
            top_k=config.top_k,
            seed=config.seed,
            stop=config.stop,
            logprobs=config.logprobs,
            store=bool(config.store),
        )

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is taken each time."""
        return self.temperature < COLD or self.top_p == 0.0 or self.top_k == 1


@dataclass(frozen=True)
class TokenScore:
    """Log probability of a chosen token, in the model's unmodified distribution."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()
    """The likeliest tokens and their log probabilities, likeliest first."""


@dataclass(frozen=True)
class SampledAnswer:
    """An answer as it was sampled, in tokens; what a policy is trained on. A request with `store=True` gets it as its
    response's `provider_data`."""

    prompt_token_ids: list[int]
    token_ids: list[int]
    """The token that ended it included, where one did."""
    forced: list[bool]
    """For each of these tokens, whether the model had no say in it: the answer's grammar left no other, or wanted the
    end for lack of room."""
    response_format: Mapping[str, Any] | None
    """Whose grammar the other tokens were sampled under; None: there was none."""
    temperature: float


FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class FinishedAnswer:
    """A finished answer."""

    text: str
    finish_reason: FinishReason
    prompt_tokens: int
    reused_tokens: int
    generated_tokens: int
    scores: tuple[TokenScore, ...]
    cut: bool
    """Whether a stop text cut the text short of its tokens."""
    sampled: SampledAnswer | None = None
    """Where the request asked for it."""
