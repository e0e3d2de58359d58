"""Copies of a program own their modules, demos and containers, and share everything else."""

from __future__ import annotations

import collections
import copy
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dspy
import numpy as np
import pydantic
import pytest
from fakes import numbers, parity_engine, parity_match, plain_lm
from saved import fresh_engine

from bettertogether import BetterTogether, BootstrapFewShotRS, LoRAFinetune, load, save
from bettertogether.programs.copies import Copier, copy_program
from bettertogether.programs.program import copy_for_step, load_prompts, modules_of, prompts_state, with_prompts
from bettertogether.rollouts.evaluation import evaluate
from bettertogether.rollouts.rollout import Attempt
from bettertogether.rollouts.runner import Runner


class Index:
    """Counts the copies that are made of it."""

    copies = 0

    def __init__(self) -> None:
        self.vectors = np.ones(8)

    def __copy__(self) -> Index:
        Index.copies += 1
        return self

    def __deepcopy__(self, memo: Any) -> Index:
        Index.copies += 1
        return self


class Search(dspy.Module):
    """Asks, given what an index finds."""

    def __init__(self, **parts: Any) -> None:
        super().__init__()
        self.ask = dspy.Predict("number: int -> parity")
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, number: int) -> dspy.Prediction:
        return self.ask(number=number)


def search(**parts: Any) -> Search:
    program = Search(**parts)
    program.set_lm(plain_lm(parity_engine(lambda *_: True)))
    return program


class Helper:
    """No module, but refers to one."""

    def __init__(self, ask: dspy.Module, index: Any = None) -> None:
        self.ask, self.index, self.lock = ask, index, threading.Lock()


@dataclass
class Stages:
    first: dspy.Module
    index: Any = None


def test_what_is_no_module_is_shared_wherever_it_is_held() -> None:
    index, array = Index(), np.ones(8)
    inner = Search(index=index, array=array)
    program = search(
        index=index, array=array, by_name={"a": index}, listed=[array], pair=(index, inner), nested={"a": [index]}
    )
    Index.copies = 0
    copied = copy_program(program)
    assert Index.copies == 0
    assert copied.index is copied.by_name["a"] is copied.pair[0] is copied.nested["a"][0] is index
    assert copied.array is copied.listed[0] is array
    assert copied.pair[1] is not inner
    assert copied.pair[1].array is array
    assert copied.pair[1].ask is not inner.ask


def test_a_whole_compile_makes_no_copy_of_an_index() -> None:
    index = Index()
    program = search(index=index, by_name={"a": [index]}, helper=Stages(dspy.Predict("a -> b"), index))
    Index.copies = 0
    steps = {"p": BootstrapFewShotRS(parity_match, num_samples=2), "w": LoRAFinetune(parity_match)}
    compiled = BetterTogether(parity_match, **steps).compile(
        program, trainset=numbers(20), valset=numbers(8), teacher=program, strategy="p -> w", progress=False
    )
    assert compiled.report.rounds[-1].status == "complete"
    assert Index.copies == 0
    assert compiled.index is index
    assert {id(candidate["program"].index) for candidate in compiled.candidate_programs} == {id(index)}


def test_every_copy_of_a_program_shares_its_index(tmp_path: Path) -> None:
    program = search(index=Index())
    Index.copies = 0
    copies = [
        copy_for_step(program),
        with_prompts(program, program),
        load_prompts(program, prompts_state(program)),
        load(save(program, tmp_path), into=program, base_model=fresh_engine()),
    ]
    assert Index.copies == 0
    assert all(each.index is program.index for each in copies)
    assert len({id(each.ask) for each in [program, *copies]}) == 5


def test_the_copies_of_a_runner_share_an_index_and_containers_that_are_not_their_programs() -> None:
    program = search(index=Index(), answers={"q": "a"}, seen=[])
    runner = Runner(program)
    Index.copies = 0
    runner.run(numbers(1)[0], Attempt("sample", 1, 1.0))
    assert runner._copier is not None
    spare, other = runner._spare[0]._program, runner._copier.copy()
    assert Index.copies == 0
    assert spare.index is program.index
    assert (spare.answers is other.answers, spare.seen is other.seen) == (True, True)
    assert (spare.answers is program.answers, spare.seen is program.seen) == (False, False)
    assert spare.ask is not program.ask
    assert spare.ask.demos is not program.ask.demos


class Profile(pydantic.BaseModel):
    """A record that a module keeps."""

    model_config = {"arbitrary_types_allowed": True, "extra": "allow"}
    names: list[str]
    index: Any = None
    _notes: list[str] = pydantic.PrivateAttr(default_factory=list)


def test_a_candidate_has_lists_dicts_sets_and_records_of_its_own_and_those_within_them() -> None:
    index = Index()
    profile = Profile.model_validate({"names": ["a"], "index": index, "more": [1]})
    program = search(answers={"q": ["a"]}, seen=[1], known={1}, users=[{"x": profile}], turns=dspy.History(messages=[]))
    Index.copies = 0
    copied = copy_program(program)
    copied.answers["q"].append("b")
    copied.known.add(2)
    copied.seen.append(2)
    copied.turns.messages.append({"q": "a"})
    own = copied.users[0]["x"]
    for kept in (own.names, own.model_extra["more"], own._notes):
        kept.append("new")
    assert (program.answers, program.seen, program.known) == ({"q": ["a"]}, [1], {1})
    assert (profile.names, profile.model_extra, profile._notes) == (["a"], {"more": [1]}, [])
    assert program.turns.messages == []
    assert own.index is index
    assert Index.copies == 0


LOG: list[str] = []


def log(answer: str) -> None:
    LOG.append(answer)


class Log:
    """No module, but holds a list of one."""

    def __init__(self, notes: list[str]) -> None:
        self.notes = notes

    def add(self, answer: str) -> None:
        self.notes.append(answer)


class Notes(Search):
    """A tool notes what is answered."""

    def __init__(self, notes: list[str], tool: Any) -> None:
        super().__init__(notes=notes, tools=[tool])

    def forward(self, number: int) -> dspy.Prediction:
        self.notes.clear()
        tool = self.tools[0]
        getattr(tool, "func", tool)(super().forward(number).parity)
        return dspy.Prediction(parity=self.notes[-1])


class Logs(Notes):
    """Calls a function of its module, which notes what is answered."""

    def forward(self, number: int) -> dspy.Prediction:
        log("none")
        return super().forward(number)


def note_taking(by: str) -> Notes:
    notes: list[str] = []
    tools = {
        "a closure": lambda answer: notes.append(answer),
        "a closure in a tool": dspy.Tool(lambda answer: notes.append(answer)),
        "a default": lambda answer, to=notes: to.append(answer),
        "its method": notes.append,
        "another object": Log(notes).add,
        "an object in a closure": lambda answer, to=Log(notes): to.add(answer),
    }
    program = Notes(notes, tools[by]) if by in tools else (Logs if by == "a method" else Notes)(LOG, log)
    if by == "its module in a closure":
        program.tools = [lambda answer: program.notes.append(answer)]
    program.set_lm(plain_lm(parity_engine(lambda *_: True)))
    return program


@pytest.mark.parametrize(
    "by",
    [
        "a closure", "a closure in a tool", "a default", "its method", "another object", "an object in a closure",
        "its module in a closure", "a global", "a method",
    ],
)  # fmt: skip
def test_what_something_shared_holds_besides_a_module_stays_one_list_for_both(by: str) -> None:
    program = note_taking(by)
    assert evaluate(program, numbers(4), parity_match, num_threads=1, progress=False).scores == (1.0,) * 4
    assert copy_program(copy_program(program))(number=2).parity == "even"


def test_what_is_within_a_shared_container_is_shared_too() -> None:
    state: dict[str, list[Any]] = {"seen": [[]]}
    cache: dict[str, str] = {}
    program = search(state=state, seen=state["seen"], last=state["seen"][0], own=[], tool=lambda: state)
    program.cache, program.other = cache, Log([])
    program.other.cache = cache
    copied = copy_program(program)
    assert copied.state is program.state
    assert copied.cache is copied.other.cache
    assert [copied.seen is program.seen, copied.last is program.last, copied.own is program.own] == [True, True, False]


def test_a_list_that_only_the_making_of_a_program_names_is_its_copys_own() -> None:
    class Kept(Search):
        def __init__(self, kept: list[str] = []) -> None:  # noqa: B006
            super().__init__(kept=kept, log=LOG)

    program = Kept()
    copied = copy_program(program)
    assert [copied.kept is program.kept, copied.log is program.log] == [False, False]


def test_of_more_than_a_thousand_containers_within_one_all_are_shared() -> None:
    tree = {each: {inner: [inner] for inner in range(30)} for each in range(40)}
    program = search(few=[[each] for each in range(1000)], corpus=[[each] for each in range(1001)], tree=tree)
    copied = copy_program(program)
    assert [copied.corpus is program.corpus, copied.tree is program.tree] == [False, False]
    assert [copied.corpus[0] is program.corpus[0], copied.tree[0] is program.tree[0]] == [True, True]
    assert copied.few[0] is not program.few[0]


class Linked(pydantic.BaseModel):
    """A record that knows the next one."""

    after: Any = None


@pytest.mark.parametrize("shares_state", [False, True])
@pytest.mark.parametrize("link", [lambda after: {"after": after}, lambda after: Linked.model_construct(after=after)])
def test_what_is_nested_deep_is_copied(link: Any, shares_state: bool) -> None:
    links: list[Any] = [link(None)]
    for _ in range(900):
        links.append(link(links[-1]))
    program = search(links=links[::-1], deep=[])
    for _ in range(4000):
        program.deep = [program.deep]
    copied = Copier(program, shares_state=shares_state).copy()
    assert (len(copied.links), len({*map(id, links), *map(id, copied.links)})) == (901, 1802)
    first, second = copied.links[:2]
    assert (first["after"] if isinstance(first, dict) else first.after) is second
    assert [copied.deep is program.deep, copied.deep[0] is program.deep[0]] == [False, True]


def test_a_copied_container_is_of_its_kind() -> None:
    program = search()
    program.kinds = [
        collections.deque([[1], [2]], maxlen=2), collections.OrderedDict(b=[1], a=[2]), collections.Counter("aab"),
        {1, 2}, collections.defaultdict(list, a=[1]),
    ]  # fmt: skip
    program.asked = collections.defaultdict(program.named_predictors)
    copied = copy_program(program)
    assert copied.kinds == program.kinds
    assert [type(each) for each in copied.kinds] == [type(each) for each in program.kinds]
    assert all(own is not other for own, other in zip(copied.kinds, program.kinds, strict=True))
    assert (copied.kinds[0].maxlen, list(copied.kinds[1]), copied.kinds[4]["new"]) == (2, ["b", "a"], [])
    assert copied.asked["new"][0][1] is copied.ask


def test_a_record_that_refuses_to_be_copied_is_shared() -> None:
    class Refuses(Profile):
        def __deepcopy__(self, memo: dict[int, Any] | None = None) -> Refuses:
            raise TypeError("no")

    program = search(profile=Refuses(names=[]))
    assert copy_program(program).profile is Copier(program, shares_state=True).copy().profile is program.profile


def test_demos_and_options_are_a_copys_own_but_not_the_values_of_demos() -> None:
    program = search()
    image = Index()
    program.ask.demos = [dspy.Example(number=image, parity="odd").with_inputs("number"), {"number": 1}]
    program.ask.config["n"] = 1
    Index.copies = 0
    copied = copy_program(program)
    copied.ask.demos[0]["parity"], copied.ask.demos[1]["number"], copied.ask.config["n"] = "even", 2, 3
    assert (program.ask.demos[0].parity, program.ask.demos[1], program.ask.config) == ("odd", {"number": 1}, {"n": 1})
    assert copied.ask.demos[0].number is image
    assert copied.ask.demos[0].inputs().toDict() == {"number": image}
    assert Index.copies == 0


def test_an_object_that_refers_to_a_module_refers_to_its_copy_in_a_copy() -> None:
    program = search(index=Index())
    program.helper, program.stages = Helper(program.ask, program.index), Stages(program.ask, program.index)
    program.helpers = {"a": [Helper(program.ask)]}
    Index.copies = 0
    copied = copy_program(program)
    assert copied.helper.ask is copied.stages.first is copied.helpers["a"][0].ask is copied.ask
    assert copied.ask is not program.ask
    assert copied.helper.index is copied.stages.index is program.index
    assert copied.helper.lock is program.helper.lock
    assert Index.copies == 0


def test_references_in_a_circle_are_followed_once() -> None:
    program = search(index=Index())
    program.helper = Helper(program)
    program.ring = [program]
    program.ring.append(program.ring)
    copied = copy_program(program)
    assert copied.helper.ask is copied.ring[0] is copied
    assert copied.ring[1] is copied.ring
    assert [name for name, _ in modules_of(copied)] == ["self", "self.ask"]


def test_what_runs_is_shared_even_where_it_refers_to_the_program() -> None:
    program = search(pool=ThreadPoolExecutor(1))
    release = threading.Event()
    program.pool.submit(release.wait)
    program.pool.submit(program.ask, number=1)
    copied = copy_program(program)
    release.set()
    assert copied.pool is program.pool
    program.pool.shutdown()


def test_an_object_that_refers_to_a_module_and_refuses_to_be_copied_is_shared() -> None:
    class Refuses(Helper):
        def __deepcopy__(self, memo: Any) -> Any:
            raise TypeError("no")

    program = search()
    program.helper = Refuses(program.ask)
    copied = copy_program(program)
    assert copied.helper is program.helper
    assert copied.ask is not program.ask


def test_a_copy_of_a_copy_and_dspys_own_deep_copy_still_work() -> None:
    program = search(index=Index(), answers={})
    twice = copy_program(copy_program(program))
    assert twice.index is program.index
    assert twice(number=2).parity == "even"
    assert copy.deepcopy(twice).ask.signature is program.ask.signature


def test_results_of_a_module_inside_are_not_copied() -> None:
    program = search(inner=Search())
    program.inner.candidate_programs = [{"program": Search(), "score": 1.0}]
    assert copy_program(program).inner.candidate_programs is program.inner.candidate_programs
