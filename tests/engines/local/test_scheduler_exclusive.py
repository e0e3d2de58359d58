"""Between two steps the scheduler gives the model to a training, and takes it back."""

from __future__ import annotations

import threading
import time

import pytest
from fake_decoder import FakeDecoder, job, run

from bettertogether.engines.local.scheduler import Scheduler
from bettertogether.errors import EngineClosedError


def test_the_model_is_the_callers_alone_between_two_steps_with_what_the_requests_under_way_hold(
    scheduler: Scheduler, decoder: FakeDecoder
) -> None:
    scheduler.submit(long := job(2000, limit=3000))
    while not decoder.batches:
        time.sleep(0.001)
    with scheduler.exclusive():
        before = len(decoder.batches)
        time.sleep(0.05)
        assert len(decoder.batches) == before
        scheduler.forget_decoder()
        assert not decoder.held
    assert long.future.result(timeout=30).generated_tokens == 2000


def test_no_training_begins_on_a_closed_engine_and_the_end_of_the_program_waits_for_the_thread_that_was_to(
    scheduler: Scheduler,
) -> None:
    with scheduler.training():
        scheduler.stop()
        end = threading.Thread(target=scheduler.wait_for_trainings)
        end.start()
        end.join(0.05)
        assert end.is_alive()
        with pytest.raises(EngineClosedError), scheduler.exclusive():
            pytest.fail("the model was given away")
    end.join(10)
    assert not end.is_alive()


def test_an_idle_decoder_frees_its_memory_for_the_caller(scheduler: Scheduler, decoder: FakeDecoder) -> None:
    run(scheduler, job(1))
    with scheduler.exclusive():
        assert decoder.resets == 1


def test_the_model_may_be_lent_back_for_requests_in_between(scheduler: Scheduler, decoder: FakeDecoder) -> None:
    with scheduler.exclusive():
        scheduler.submit(waiting := job(2))
        time.sleep(0.03)
        assert not waiting.future.done()
        with scheduler.lent():
            assert waiting.future.result(timeout=10).text == "cb"
        assert decoder.resets == 1
        scheduler.submit(later := job(3))
        time.sleep(0.03)
        assert not later.future.done()
    assert later.future.result(timeout=10).text == "dcb"
