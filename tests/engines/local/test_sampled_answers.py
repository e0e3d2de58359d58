"""Answers in tokens, as they were sampled: which were the model's choice, and out of which it chose."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from dspy.lm15 import Config, Message, Request, Response
from small_models import save_model

from bettertogether.engines import TransformersEngine
from bettertogether.engines.answers import SampledAnswer


def format_of(**properties: Any) -> dict[str, Any]:
    schema = {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}
    return {"type": "json_schema", "schema": schema}


TEXT = format_of(text={"type": "string"})
SHORT = format_of(text={"type": "string", "maxLength": 5}, label={"enum": ["good", "bad", "gone"]})


def ask(engine: TransformersEngine, **config: Any) -> Response:
    options = {"max_tokens": 80, "temperature": 1.0, "seed": 3, "store": True, **config}
    return engine.complete(Request(f"local/{engine.base_name}", (Message.user("Hello"),), config=Config(**options)))


def sampled(response: Response) -> SampledAnswer:
    assert response.provider_data is not None
    return SampledAnswer(**response.provider_data)


def allowed(engine: TransformersEngine, answer: SampledAnswer) -> list[torch.Tensor]:
    """For each token of an answer, which tokens could have been chosen [V]."""
    masks = [np.full(engine._card.vocabulary, 1) if bits is None else bits for bits in engine.choices(answer)]
    bits = [
        mask if mask.dtype != np.uint32 else np.unpackbits(mask.view(np.uint8), bitorder="little") for mask in masks
    ]
    return [torch.from_numpy(each[: engine._card.vocabulary]).bool() for each in bits]


def redrawn(engine: TransformersEngine, answer: SampledAnswer, seed: int) -> list[int]:
    """The tokens that the model's own distribution over what `choices` allows gives for the draws of a seed."""
    draws, token_ids = random.Random(seed), list[int]()
    ids = torch.tensor([answer.prompt_token_ids + answer.token_ids])
    logits_T_V = engine._loaded_model()(ids).logits[0, len(answer.prompt_token_ids) - 1 : -1]
    for logits_V, mask_V, token, forced in zip(
        logits_T_V, allowed(engine, answer), answer.token_ids, answer.forced, strict=True
    ):
        probabilities_V = (logits_V.masked_fill(~mask_V, -torch.inf) / answer.temperature).double().softmax(-1)
        point = 0.0 if forced else draws.random()
        token_ids.append(token if forced else int(torch.searchsorted(probabilities_V.cumsum(-1), point, right=True)))
    return token_ids


def test_only_an_answer_that_is_to_be_stored_comes_in_tokens(engine: TransformersEngine) -> None:
    assert ask(engine, store=None).provider_data is None
    assert "store" in engine.supported_params


def test_an_answer_comes_with_its_prompt_and_the_token_that_ended_it(engine: TransformersEngine) -> None:
    ended = next(response for seed in range(99) if (response := ask(engine, seed=seed)).finish_reason == "stop")
    answer = sampled(ended)
    assert engine._writer.decode(answer.token_ids) == ended.text
    assert answer.token_ids[-1] in engine._eos_ids
    assert not set(answer.token_ids[:-1]) & engine._eos_ids
    assert answer.forced == [False] * len(answer.token_ids)
    assert answer.prompt_token_ids == engine.prompt_tokens([{"role": "user", "content": "Hello"}])


def test_free_tokens_are_those_that_the_models_own_distribution_under_the_grammar_gives(
    engine: TransformersEngine,
) -> None:
    for seed, temperature in ((1, 1.0), (2, 0.7), (3, 1.3)):
        answer = sampled(ask(engine, seed=seed, temperature=temperature, response_format=SHORT))
        assert redrawn(engine, answer, seed) == answer.token_ids
        assert all(mask_V[token] for mask_V, token in zip(allowed(engine, answer), answer.token_ids, strict=True))


def test_what_the_grammar_writes_is_forced_and_each_choice_took_a_pass(engine: TransformersEngine) -> None:
    before = engine.counters()["forward_passes"]
    answer = sampled(ask(engine, response_format=SHORT))
    assert answer.forced.count(False) == engine.counters()["forward_passes"] - before
    begin = engine._card.tokenizer('{\n  "text": "', add_special_tokens=False).input_ids
    assert answer.token_ids[: len(begin)] == begin
    assert all(answer.forced[: len(begin)])


def test_a_server_that_samples_each_token_of_a_complete_answer_had_its_end_alone_to_choose(
    engine: TransformersEngine,
) -> None:
    token_ids = engine.completion_tokens('{\n  "label": "good"\n}')
    response_format = format_of(label={"enum": ["good", "bad"]})
    masks = allowed(engine, SampledAnswer([5], token_ids, [False] * len(token_ids), response_format, 1.0))
    assert all(mask_V[token] for mask_V, token in zip(masks, token_ids, strict=True))
    assert masks[-1].sum() == 1


def test_an_end_that_is_wanted_for_lack_of_room_is_forced(engine: TransformersEngine) -> None:
    answer = sampled(ask(engine, response_format=TEXT, max_tokens=40))
    quote, brace = engine._card.tokenizer('"}', add_special_tokens=False).input_ids
    assert (answer.token_ids[-3], answer.token_ids[-1]) == (quote, brace)
    assert answer.forced[-5:] == [False, False, True, True, True]


def test_thoughts_are_free_and_may_be_anything_but_an_end(tmp_path: Path) -> None:
    template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
    )
    engine = TransformersEngine(save_model(tmp_path / "thinker", template=template))
    answer = sampled(ask(engine, response_format=SHORT, max_tokens=100))
    first = allowed(engine, answer)[0]
    assert [token for token in range(len(first)) if not first[token]] == sorted(engine._eos_ids)
    assert not answer.forced[0]
    assert redrawn(engine, answer, 3)[:40] == answer.token_ids[:40]
    engine.close()
