"""A conformance test for engines: what the rest of the package counts on, as tests that pytest collects.

    from bettertogether.testing import EngineContract

    class TestMyEngine(EngineContract):
        @pytest.fixture
        def engine(self, tmp_path):
            return MyEngine(...)

`pytest.register_assert_rewrite("bettertogether.testing.engine_contract")` before that import makes failures say what
was compared. No pytest is imported here. An engine passes when every test does; a feature that it does not declare is
not tested.
"""

from __future__ import annotations

import copy
import json
import pickle
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from dspy.lm15 import Config, Message, Request, StreamDeltaEvent, TextDelta

from ..engines.protocol import MODEL_PREFIX, FinetuneResult, LocalEngine, TrainingRow, adapter_round
from ..errors import ConfigError, DataError, NoTrainingDataError, UnknownAdapterError
from ..lm import engine_lm
from ..training.config import LoRAConfig, TrainingConfig
from ..training.progress import TrainingProgress


class EngineContract:
    """Subclass it and give a fixture `engine`."""

    words: tuple[str, ...] = ("red", "green", "blue", "yellow", "black", "white")
    """What the requests ask about."""
    max_tokens = 8
    lora = LoRAConfig(rank=4)
    training = TrainingConfig(epochs=2, learning_rate=1e-2, keep_best=False)

    def request(self, engine: LocalEngine, word: str = "red", model: str | None = None, **config: Any) -> Request:
        """A greedy request for a few tokens."""
        options = Config(max_tokens=self.max_tokens, temperature=0.0)
        return Request(
            model or MODEL_PREFIX + engine.base_name,
            (Message.user(f"What is {word}?"),),
            system="Answer in a word.",
            config=replace(options, **config),
        )

    def answer(self, engine: LocalEngine, word: str = "red", model: str | None = None, **config: Any) -> str:
        """The text of the answer to a request."""
        return engine.complete(self.request(engine, word, model, **config)).text or ""

    def rows(self, engine: LocalEngine, completion: str = "a colour") -> list[TrainingRow]:
        """Rows for the very requests of these tests."""
        return [TrainingRow(engine.messages(self.request(engine, word)), completion) for word in self.words]

    def finetune(
        self, engine: LocalEngine, folder: Path, completion: str = "a colour", **options: Any
    ) -> FinetuneResult:
        """A short training."""
        rows = self.rows(engine, completion)
        return engine.finetune(rows, lora=self.lora, training=self.training, folder=folder, **options)

    def test_it_has_all_that_the_protocol_asks_for(self, engine: LocalEngine) -> None:
        assert isinstance(engine, LocalEngine)
        assert engine.max_length > 0
        assert engine.concurrency > 0
        assert "temperature" in engine.supported_params

    def test_copies_and_pickles_are_the_same_engine(self, engine: LocalEngine) -> None:
        assert copy.copy(engine) is engine
        assert copy.deepcopy([engine])[0] is engine
        assert pickle.loads(pickle.dumps(engine)) is engine

    def test_copies_of_its_lm_share_it(self, engine: LocalEngine) -> None:
        lm = engine_lm(engine, cache=False)
        for duplicate in (copy.copy(lm), copy.deepcopy(lm), lm.copy(temperature=1.0), pickle.loads(pickle.dumps(lm))):
            assert duplicate.engine is engine

    def test_the_base_has_no_adapter_folder(self, engine: LocalEngine) -> None:
        assert engine.adapter_folder(MODEL_PREFIX + engine.base_name) is None

    def test_an_unknown_adapter_is_an_error(self, engine: LocalEngine) -> None:
        unknown = f"{MODEL_PREFIX}{engine.base_name}@r1-00000000"
        assert _raised(lambda: engine.complete(self.request(engine, model=unknown))) is UnknownAdapterError
        assert _raised(lambda: engine.adapter_folder(unknown)) is UnknownAdapterError

    def test_a_greedy_answer_is_the_same_every_time(self, engine: LocalEngine) -> None:
        assert self.answer(engine) == self.answer(engine)

    def test_messages_are_plain_and_the_system_message_comes_first(self, engine: LocalEngine) -> None:
        assert list(engine.messages(self.request(engine))) == [
            {"role": "system", "content": "Answer in a word."},
            {"role": "user", "content": "What is red?"},
        ]

    def test_usage_counts_the_tokens_of_prompt_and_answer(self, engine: LocalEngine) -> None:
        request = self.request(engine)
        usage = engine.complete(request).usage
        assert usage.input_tokens == len(engine.prompt_tokens(engine.messages(request)))
        assert 0 < (usage.output_tokens or 0) <= self.max_tokens + 1

    def test_different_prompts_have_different_tokens(self, engine: LocalEngine) -> None:
        prompts = [engine.prompt_tokens(engine.messages(self.request(engine, word))) for word in self.words]
        assert len({tuple(prompt) for prompt in prompts}) == len(self.words)

    def test_completions_end_with_the_same_token_and_only_one_of_it(self, engine: LocalEngine) -> None:
        first, second = engine.completion_tokens("one"), engine.completion_tokens("two words")
        assert first[-1] == second[-1]
        assert first.count(first[-1]) == second.count(second[-1]) == 1

    def test_answers_of_concurrent_requests_are_their_own(self, engine: LocalEngine, tmp_path: Path) -> None:
        models = [MODEL_PREFIX + engine.base_name, self.finetune(engine, tmp_path).model]
        asked = [(word, model) for word in self.words for model in models]
        alone = [self.answer(engine, word, model) for word, model in asked]
        with ThreadPoolExecutor(len(asked)) as pool:
            together = list(pool.map(lambda pair: self.answer(engine, *pair), asked))
        assert together == alone

    def test_a_stream_gives_the_answer_of_complete(self, engine: LocalEngine) -> None:
        events = list(engine.stream(self.request(engine)))
        deltas = [e.delta.text for e in events if isinstance(e, StreamDeltaEvent) and isinstance(e.delta, TextDelta)]
        assert "".join(deltas) == self.answer(engine)
        assert (events[0].type, events[-1].type) == ("start", "end")

    def test_the_same_seed_gives_the_same_sampled_answer(self, engine: LocalEngine) -> None:
        if "seed" in engine.supported_params:
            first, second = (self.answer(engine, temperature=1.0, seed=5) for _ in range(2))
            assert first == second

    def test_counters_grow(self, engine: LocalEngine) -> None:
        before = engine.counters().get("requests", 0)
        self.answer(engine)
        assert engine.counters()["requests"] == before + 1

    def test_training_gives_a_new_name_and_leaves_the_bases_answers_alone(
        self, engine: LocalEngine, tmp_path: Path
    ) -> None:
        before = [self.answer(engine, word) for word in self.words]
        result = self.finetune(engine, tmp_path)
        assert result.model.startswith(f"{MODEL_PREFIX}{engine.base_name}@r1-")
        assert [self.answer(engine, word) for word in self.words] == before
        self.answer(engine, model=result.model)

    def test_every_adapter_stays_callable(self, engine: LocalEngine, tmp_path: Path) -> None:
        first = self.finetune(engine, tmp_path, "one").model
        answer = self.answer(engine, model=first)
        second = self.finetune(engine, tmp_path, "two").model
        assert first != second
        assert self.answer(engine, model=first) == answer
        self.answer(engine, model=second)

    def test_an_adapter_lies_in_a_folder_of_its_name_under_the_one_given(
        self, engine: LocalEngine, tmp_path: Path
    ) -> None:
        result = self.finetune(engine, tmp_path)
        assert result.folder == tmp_path / result.model.removeprefix(MODEL_PREFIX)
        assert any(result.folder.iterdir())

    def test_an_adapter_is_named_by_its_content(self, engine: LocalEngine, tmp_path: Path) -> None:
        result = self.finetune(engine, tmp_path)
        assert engine.add_adapter(result.folder) == result.model
        moved = tmp_path / "elsewhere" / result.folder.name
        shutil.copytree(result.folder, moved)
        assert engine.add_adapter(moved) == result.model

    def test_an_adapter_that_was_moved_is_found_where_it_is_added_again(
        self, engine: LocalEngine, tmp_path: Path
    ) -> None:
        # Rows of its own: the same content may be held from another folder, which stays the one to name.
        result = self.finetune(engine, tmp_path, "a tint")
        moved = tmp_path / "elsewhere" / result.folder.name
        moved.parent.mkdir()
        shutil.move(result.folder, moved)
        assert engine.add_adapter(moved) == result.model
        assert engine.adapter_folder(result.model) == moved

    def test_an_adapter_that_is_served_stays_in_its_folder(self, engine: LocalEngine, tmp_path: Path) -> None:
        result = self.finetune(engine, tmp_path, "a gloss")
        copied = shutil.copytree(result.folder, tmp_path / "elsewhere" / result.folder.name)
        assert engine.add_adapter(copied) == result.model
        assert engine.adapter_folder(result.model) == result.folder

    def test_where_the_folder_of_an_adapter_goes_another_of_its_content_stands_in(
        self, engine: LocalEngine, tmp_path: Path
    ) -> None:
        result = self.finetune(engine, tmp_path, "a gloss elsewhere")
        copied = shutil.copytree(result.folder, tmp_path / "elsewhere" / result.folder.name)
        engine.add_adapter(copied)
        shutil.rmtree(result.folder)
        assert engine.adapter_folder(result.model) == copied

    def test_an_adapter_that_was_removed_is_unknown_and_its_folder_stays(
        self, engine: LocalEngine, tmp_path: Path
    ) -> None:
        result = self.finetune(engine, tmp_path, "a hue")
        engine.remove_adapter(result.model)
        assert _raised(lambda: engine.adapter_folder(result.model)) is UnknownAdapterError
        assert engine.add_adapter(result.folder) == result.model

    def test_the_same_training_gives_the_same_adapter(self, engine: LocalEngine, tmp_path: Path) -> None:
        assert self.finetune(engine, tmp_path / "a").model == self.finetune(engine, tmp_path / "b").model

    def test_going_on_with_an_adapter_is_the_next_round(self, engine: LocalEngine, tmp_path: Path) -> None:
        first = self.finetune(engine, tmp_path).model
        second = self.finetune(engine, tmp_path, "a hue", start_from=first).model
        assert (adapter_round(first), adapter_round(second)) == (1, 2)

    def test_an_adapter_at_another_strength_is_an_adapter_of_its_own(self, engine: LocalEngine, tmp_path: Path) -> None:
        model = self.finetune(engine, tmp_path, "a tone").model
        half = engine.scaled(model, 0.5)
        assert half not in (model, MODEL_PREFIX + engine.base_name)
        assert adapter_round(half) == adapter_round(model)
        assert engine.adapter_folder(half) == tmp_path / half.removeprefix(MODEL_PREFIX)
        assert engine.add_adapter(tmp_path / half.removeprefix(MODEL_PREFIX)) == half
        self.answer(engine, model=half)

    def test_strengths_multiply_and_one_is_the_adapter_itself(self, engine: LocalEngine, tmp_path: Path) -> None:
        model = self.finetune(engine, tmp_path).model
        half = engine.scaled(model, 0.5)
        assert engine.scaled(half, 0.5) == engine.scaled(model, 0.25) != half
        assert engine.scaled(half, 2) == engine.scaled(model, 1) == model

    def test_a_scaled_adapter_goes_where_it_is_told(self, engine: LocalEngine, tmp_path: Path) -> None:
        # Rows of its own: the same content may be held from another folder, which stays the one to name.
        half = engine.scaled(self.finetune(engine, tmp_path, "a shade").model, 0.5, tmp_path / "elsewhere")
        assert engine.adapter_folder(half) == tmp_path / "elsewhere" / half.removeprefix(MODEL_PREFIX)

    def test_the_base_has_no_strength_and_a_strength_has_bounds(self, engine: LocalEngine, tmp_path: Path) -> None:
        assert _raised(lambda: engine.scaled(MODEL_PREFIX + engine.base_name, 0.5)) is ConfigError
        model = self.finetune(engine, tmp_path).model
        wrong: list[Any] = [0, -0.5, 2.01, True, None, "0.5", float("nan")]
        assert {_raised(partial(engine.scaled, model, strength)) for strength in wrong} == {ConfigError}

    def test_training_without_rows_is_an_error(self, engine: LocalEngine, tmp_path: Path) -> None:
        assert _raised(lambda: engine.finetune([], folder=tmp_path)) is NoTrainingDataError

    def test_pairs_are_trained_on_and_held_out(self, engine: LocalEngine, tmp_path: Path) -> None:
        pairs = [replace(row, rejected="a sound") for row in self.rows(engine)]
        result = engine.finetune(
            pairs, validation_rows=pairs[:2], lora=self.lora, training=self.training, folder=tmp_path
        )
        assert None not in (result.base_validation_loss, result.validation_loss)

    def test_pairs_among_rows_are_an_error(self, engine: LocalEngine, tmp_path: Path) -> None:
        first, *others = self.rows(engine)
        mixed = [replace(first, rejected="a sound"), *others]
        assert _raised(lambda: engine.finetune(mixed, folder=tmp_path, training=self.training)) is DataError

    def test_training_reports_its_progress_and_returns_it(self, engine: LocalEngine, tmp_path: Path) -> None:
        lines: list[TrainingProgress] = []
        result = self.finetune(engine, tmp_path, on_progress=lines.append, validation_rows=self.rows(engine)[:2])
        assert tuple(lines) == result.history
        assert lines[-1].validation_loss is not None
        assert sum(line.new_tokens for line in lines) == lines[-1].tokens <= result.tokens
        assert None not in (result.base_validation_loss, result.validation_loss)

    def test_its_state_is_json_and_gives_the_engine_back_with_its_adapters(
        self, engine: LocalEngine, tmp_path: Path
    ) -> None:
        model = self.finetune(engine, tmp_path).model
        state = json.loads(json.dumps(engine.dump_state()))
        again = type(engine).load_state(state)
        assert again is engine
        folder = again.adapter_folder(model)
        assert folder is not None
        assert again.add_adapter(folder) == model


def _raised(function: Callable[[], object]) -> type[BaseException] | None:
    try:
        function()
    except Exception as error:
        return type(error)
    return None
