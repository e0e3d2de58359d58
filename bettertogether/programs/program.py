"""Programs as values: their modules and predictors, prompts in and out."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

import dspy
from dspy.predict.parameter import Parameter

from ..errors import ArtifactError, ProgramError
from .copies import copy_program, own_attributes
from .demo_values import decode_demos, encode_demos

_NO_PARTS_OF_PREDICT = frozenset({"demos", "traces", "train", "lm", "signature"})


def modules_of(program: dspy.Module) -> list[tuple[str, dspy.Module]]:
    """The modules that a program is made of, itself first, by name: those that are frozen too, unlike
    `named_predictors`, and neither in what optimizers hung on it nor among the demos and histories, unlike
    `named_sub_modules`."""
    found: list[tuple[str, dspy.Module]] = []
    seen: set[int] = set()
    queue: deque[tuple[str, Any]] = deque([("self", program)])
    while queue:
        name, value = queue.popleft()
        if id(value) in seen or not isinstance(value, dspy.Module | dict | list | tuple):
            continue
        seen.add(id(value))
        if isinstance(value, dspy.Module):
            found.append((name, value))
            left_out = _NO_PARTS_OF_PREDICT if isinstance(value, dspy.Predict) else ()
            queue.extend((f"{name}.{k}", v) for k, v in own_attributes(value).items() if k not in left_out)
        else:
            items = value.items() if isinstance(value, dict) else enumerate(value)
            # A corpus of a million texts needs no names.
            queue.extend((f"{name}[{k!r}]", v) for k, v in list(items) if not isinstance(v, str | int | float))
    return found


def parameters_of(program: dspy.Module) -> dict[str, Parameter]:
    """Name to predictor (or other DSPy parameter): named and looked for as by `named_parameters`, whose names users and
    saved files have, but in frozen sub-modules, too."""
    found: dict[str, Parameter] = {}
    seen: set[int] = set()
    for name, parameter in _parameters("", program):
        if id(parameter) not in seen:
            seen.add(id(parameter))
            found[name] = parameter
    return found


def _parameters(prefix: str, value: Any) -> Iterator[tuple[str, Parameter]]:
    if isinstance(value, Parameter):
        yield prefix or "self", value
    elif isinstance(value, dspy.Module):
        for name, inner in value.__dict__.items():
            path = f"{prefix}.{name}" if prefix else name
            if isinstance(inner, list | tuple):
                for index, item in enumerate(inner):
                    yield from _parameters(f"{path}[{index}]", item)
            elif isinstance(inner, dict):
                for key, item in inner.items():
                    yield from _parameters(f"{path}['{key}']", item)
            else:
                yield from _parameters(path, inner)


def unfound_predictors(program: dspy.Module) -> list[str]:
    """The predictors of a program that DSPy does not find: it looks into a list or dict that a module holds, but not
    into one within that."""
    found = {id(parameter) for parameter in parameters_of(program).values()}
    return [name for name, each in modules_of(program) if isinstance(each, dspy.Predict) and id(each) not in found]


def copy_for_step(program: dspy.Module) -> dspy.Module:
    """A copy that an optimizer accepts: not marked as compiled, its demos its own."""
    copied = copy_program(program)
    copied._compiled = False
    return copied


def predictors_of(program: dspy.Module) -> dict[str, dspy.Predict]:
    """Name to predictor, in the program's order. Predictors of compiled sub-modules are frozen and not among them."""
    return dict(program.named_predictors())


def require_program(program: object, role: str = "student") -> dspy.Module:
    """Check that this is a program with predictors, each with an LM. Raises ProgramError."""
    if not isinstance(program, dspy.Module):
        raise ProgramError(f"{role} must be a dspy.Module, got {type(program).__name__}.")
    predictors = predictors_of(program)
    if not predictors:
        raise ProgramError(
            f"The {role} program has no predictors to optimize: they are attributes of a module, made in __init__ and "
            "not in forward. If it was compiled before, its sub-modules may be frozen: set `module._compiled = False` "
            "on those to be optimized again."
        )
    missing = [name for name, predictor in predictors.items() if predictor.lm is None]
    if missing:
        raise ProgramError(
            f"The {role} program must have a language model set on every predictor, but these have none: {missing}. "
            f"`{role}.set_lm(lm)` sets them all, for example with lm = bettertogether.local_lm(folder_or_hub_id)."
        )
    require_lms(program, role)
    return program


def require_lms(program: dspy.Module, role: str = "program") -> None:
    """Check that what predictors have for a language model is one. Raises ProgramError."""
    for name, predictor in predictors_of(program).items():
        if not isinstance(predictor.lm, dspy.BaseLM | None):
            raise ProgramError(
                f"Predictor {name!r} of the {role} has a {type(predictor.lm).__name__} for its language model, "
                f"{predictor.lm!r:.60}: give `set_lm` a dspy.LM, such as bettertogether.local_lm(folder_or_hub_id) or "
                'dspy.LM("openai/gpt-4o-mini").'
            )


def as_programs(programs: dspy.Module | Iterable[dspy.Module] | None) -> list[dspy.Module]:
    """A list from one program, several or none. Raises ProgramError for anything else."""
    if isinstance(programs, dspy.Module):
        return [programs]
    given = list(programs) if isinstance(programs, Iterable) else [programs] if programs is not None else []
    if not all(isinstance(each, dspy.Module) for each in given):
        raise ProgramError(f"teacher must be a dspy.Module, a list of them or None, got {programs!r:.100}.")
    return given


def require_reachable(program: dspy.Module) -> None:
    """Check that other LMs in the program's predictors would be used. Raises ProgramError for a program whose
    `forward` an optimizer replaced by one that runs a program of its own, as `dspy.KNNFewShot` does."""
    forward = getattr(program.__dict__.get("forward"), "__func__", None)
    for cell in getattr(forward, "__closure__", None) or ():
        if isinstance(cell.cell_contents, dspy.Module) and cell.cell_contents is not program:
            raise ProgramError(
                f"forward of this {type(program).__name__} was replaced by an optimizer, and runs on a program of its "
                "own that tuned weights would not reach (dspy.KNNFewShot does so). Run the weight step before it."
            )


def prompts_state(program: dspy.Module) -> dict[str, Any]:
    """Instructions, field texts and demos by predictor name, as JSON; LMs left out. Raises ArtifactError for a demo
    that would not give the same prompt again."""
    return {name: prompt_state(predictor, name) for name, predictor in predictors_of(program).items()}


def same_prompts(one: dspy.Module, other: dspy.Module) -> bool:
    """Whether two programs are known to have the same prompts."""
    try:
        return prompts_state(one) == prompts_state(other)
    except ArtifactError:
        return False


def prompt_state(predictor: dspy.Predict, name: str) -> dict[str, Any]:
    """Instructions, field texts and demos of one predictor, as JSON. Raises ArtifactError as `prompts_state` does."""
    # Without its LM, which need not be one that can be saved.
    bare = copy.copy(predictor)
    bare.lm, bare.demos = None, []
    dumped = {key: value for key, value in bare.dump_state().items() if key not in ("lm", "traces", "train")}
    return {**dumped, "demos": encode_demos(predictor, name)}


def load_prompt(predictor: dspy.Predict, state: Mapping[str, Any], name: str) -> None:
    """Give a predictor the prompt of a `prompt_state`; its LM stays. Raises ArtifactError."""
    lm = predictor.lm
    predictor.load_state({**state, "lm": None})
    predictor.lm = lm
    predictor.demos = decode_demos(predictor, state["demos"], name)


def change_lms(program: dspy.Module, changes: Mapping[str, Mapping[str, Any]]) -> None:
    """Give predictors, by name, copies of their LMs that are changed so; those that share an LM share its copy."""
    copies: dict[tuple[int, str], dspy.BaseLM] = {}
    for name, predictor in predictors_of(program).items():
        if name in changes:
            key = id(predictor.lm), repr(changes[name])
            if key not in copies:
                copies[key] = predictor.lm.copy(**changes[name])
            predictor.lm = copies[key]


def clear_demos(program: dspy.Module, names: Collection[str]) -> None:
    """Leave predictors, by name, without demos."""
    for name, predictor in predictors_of(program).items():
        if name in names:
            predictor.demos = []


def with_prompts(program: dspy.Module, source: dspy.Module) -> dspy.Module:
    """A copy of `program` (its LMs) with the prompts of `source`: signatures, demos, and how a decision is made."""
    copied = copy_for_step(program)
    originals = predictors_of(source)
    for name, predictor in predictors_of(copied).items():
        original = originals[name]
        predictor.signature = original.signature
        predictor.demos = list(original.demos)
        predictor.fields = copy.deepcopy(original.fields)
    return copied


def load_prompts(program: dspy.Module, state: Mapping[str, Any]) -> dspy.Module:
    """A copy of `program` with prompts from `prompts_state`; its LMs stay."""
    copied = copy_for_step(program)
    predictors = predictors_of(copied)
    if predictors.keys() != state.keys():
        raise ProgramError(
            f"The saved prompts are for predictors {sorted(state)}, the program has {sorted(predictors)}: "
            "give the program that they were saved from."
        )
    for name, predictor in predictors.items():
        load_prompt(predictor, state[name], name)
    return copied


def prompt_adapter_name() -> str:
    """The class of the prompt adapter in force."""
    return type(dspy.settings.adapter or dspy.ChatAdapter()).__name__


def model_names(program: dspy.Module) -> dict[str, str]:
    """Predictor name to the model name of its LM."""
    return {name: predictor.lm.model for name, predictor in predictors_of(program).items() if predictor.lm}
