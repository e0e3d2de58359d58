"""A `dspy.LM` over an engine: adapters, copies, streams, providers, and DSPy's own ways to save and tune it."""

from __future__ import annotations

import asyncio
import copy
from pathlib import Path
from typing import Any

import dspy
import pytest
from fakes import api_lm, numbers, parity_engine, parity_match, parity_program, plain_lm, reply

from bettertogether.engines.protocol import TrainingRow
from bettertogether.errors import ConfigError, DataError, NotTrainableError, UnknownAdapterError
from bettertogether.lm import (
    LocalLM,
    LocalProvider,
    configs_from,
    engine_lm,
    local_engine,
    require_engine,
    rows_from_chats,
)
from bettertogether.steps.weight_step import LoRAFinetune
from bettertogether.testing import FakeEngine

ROWS = [TrainingRow(({"role": "user", "content": "q"},), "a")]
CHAT = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}


def yes() -> FakeEngine:
    return FakeEngine(lambda request: "yes")


def test_an_engines_lm_asks_for_the_base_model() -> None:
    lm = engine_lm(yes())
    assert lm.model == "local/fake"
    assert isinstance(lm, dspy.LM)


def test_an_lm_may_ask_for_an_adapter() -> None:
    engine = yes()
    model = engine.finetune(ROWS).model
    assert engine_lm(engine, model)("q") == ["yes"]
    assert engine.requests[-1].model == model


def test_an_unknown_adapter_is_an_error_that_names_those_there_are() -> None:
    engine = yes()
    model = engine.finetune(ROWS).model
    with pytest.raises(Exception, match=f"{model}") as caught:
        plain_lm(engine, "local/fake@r9-00000000")("q")
    assert isinstance(caught.value.__cause__, UnknownAdapterError)


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, lambda lm: lm.copy(temperature=1.0)])
def test_copies_of_an_lm_share_its_engine(duplicate: Any) -> None:
    lm = engine_lm(yes())
    assert duplicate(lm).engine is lm.engine


def test_an_lm_can_be_used_async_and_streams() -> None:
    lm = engine_lm(yes(), cache=False)
    assert asyncio.run(lm.acall("q")) == ["yes"]
    program = dspy.Predict("question -> answer")
    program.set_lm(engine_lm(FakeEngine(lambda request: reply(request, answer="blue")), cache=False))

    async def stream() -> list[Any]:
        return [part async for part in dspy.streamify(program)(question="sky?")]

    assert asyncio.run(stream())[-1].answer == "blue"


def test_several_answers_under_one_seed_have_a_seed_each_the_first_that_of_a_single_answer() -> None:
    engine = FakeEngine(lambda request: str(request.seed))
    lm = plain_lm(engine, seed=5, temperature=1.0)
    single, several = lm("q"), lm("q", n=3)
    assert (several[:1], len(set(several))) == (single, 3)
    assert asyncio.run(lm.acall("q", n=3)) == several
    assert [entry["outputs"] for entry in lm.history] == [single, several, several]
    assert not {*several} & {*lm("q", n=3, seed=6)}
    assert lm("q", n=2, seed=None) == ["None"] * 2


def test_an_lm_of_an_engine_has_a_provider_that_trains() -> None:
    lm = engine_lm(yes())
    assert isinstance(lm.provider, LocalProvider)
    assert lm.provider.finetunable
    assert lm.copy(temperature=1.0).provider is lm.provider


def test_a_saved_lm_finds_its_engine_and_provider_again() -> None:
    engine = yes()
    lm = engine_lm(engine, engine.finetune(ROWS).model, temperature=0.3)
    loaded = LocalLM.load_state(lm.dump_state(), allow_custom_lm_class=True)
    assert (loaded.model, loaded.kwargs["temperature"]) == (lm.model, 0.3)
    assert loaded.engine is engine
    assert isinstance(loaded.provider, LocalProvider)


def test_a_program_saved_by_dspy_loads_with_its_adapter(tmp_path: Path) -> None:
    engine = parity_engine(lambda request, _: request.trained_on > 0)
    compiled = LoRAFinetune(None, validation_share=0.0).compile(parity_program(engine), trainset=numbers(4))
    compiled.save(tmp_path / "program.json")
    loaded = parity_program(engine)
    loaded.load(tmp_path / "program.json", allow_unsafe_lm_state=True)
    assert loaded.lm.model == compiled.lm.model
    assert loaded(number=3).parity == "odd"


def test_dspys_own_finetune_call_trains_and_gives_an_lm_that_answers() -> None:
    engine = yes()
    lm = engine_lm(engine, cache=False)
    tuned = lm.finetune([CHAT], train_data_format="chat").result()
    assert engine.trainings == [tuple(ROWS)]
    assert tuned.model.startswith("local/fake@r1-")
    assert tuned("q") == ["yes"]


def test_a_finetune_of_a_tuned_lm_goes_on_with_its_adapter() -> None:
    engine = yes()
    first = engine_lm(engine).finetune([CHAT], train_data_format="chat").result()
    second = first.finetune([CHAT], train_data_format="chat").result()
    assert second.model.startswith("local/fake@r2-")


def test_train_kwargs_are_the_fields_of_both_configs() -> None:
    lora, training = configs_from({"rank": 4, "epochs": 1})
    assert (lora.rank, training.epochs) == (4, 1)


def test_an_unknown_train_kwarg_is_an_error_that_lists_the_known() -> None:
    with pytest.raises(ConfigError, match=r"\['num_train_epochs'\] are not known.*epochs.*rank"):
        configs_from({"num_train_epochs": 3})


@pytest.mark.parametrize(
    "chat", [{}, *({"messages": messages} for messages in ([], CHAT["messages"][1:], CHAT["messages"][:1] * 2))]
)
def test_a_chat_without_an_answer_at_its_end_is_an_error(chat: Any) -> None:
    with pytest.raises(DataError, match="Row 1 is not"):
        rows_from_chats([CHAT, chat])


def test_launch_and_kill_do_nothing() -> None:
    lm = engine_lm(yes(), cache=False)
    lm.launch()
    lm.kill()
    assert lm("q") == ["yes"]


def test_only_an_lm_over_a_local_engine_can_be_trained() -> None:
    engine = yes()
    assert local_engine(engine_lm(engine)) is engine
    for lm in (api_lm(lambda _: ""), dspy.LM("openai/gpt-4o-mini"), None):
        assert local_engine(lm) is None
        with pytest.raises(NotTrainableError, match="Predictor 'p' uses"):
            require_engine(lm, "p")


def test_dspys_cache_answers_for_the_same_weights_and_not_for_new_ones() -> None:
    dspy.configure_cache(enable_disk_cache=False, enable_memory_cache=True)
    try:
        engine = parity_engine(lambda request, _: request.trained_on > 0)
        program = parity_program(engine, cache=True)
        assert [program(number=1).parity for _ in range(2)] == ["even", "even"]
        assert len(engine.requests) == 1
        compiled = LoRAFinetune(None, validation_share=0.0).compile(program, trainset=numbers(2))
        assert compiled(number=1).parity == "odd"
    finally:
        dspy.configure_cache(enable_disk_cache=False, enable_memory_cache=False)


def test_the_tuned_lm_of_a_program_scores_what_the_metric_says() -> None:
    engine = parity_engine(lambda request, _: request.trained_on > 0)
    program = parity_program(engine)
    compiled = LoRAFinetune(None, validation_share=0.0).compile(program, trainset=numbers(4))
    evaluate = dspy.Evaluate(devset=numbers(10), metric=parity_match, num_threads=2, display_progress=False)
    assert (evaluate(program).score, evaluate(compiled).score) == (0.0, 100.0)
