"""Which layers of a model an adapter is trained on: those that text goes through, that peft can wrap and that the
engines can serve. Asked before the first step, so that no training ends with an adapter that nobody can use."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer, check_target_module_exists
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..errors import ConfigError
from .config import ALL_LINEAR
from .layers import linear_shape
from .lending import looked_at

PROBE_TOKENS = 19
"""Prime, so that a layer which sees tokens by heads, experts or groups sees another number of rows."""
KEPT = (5, PROBE_TOKENS - 1)
"""Tokens of the probe whose logits are asked for; layers behind the cut see these alone."""
NAMED = 5
"""Layers named in an error."""
NO_LAYER = "no layer has such a name"


def chosen_layers(base: PreTrainedModel, targets: str | Sequence[str]) -> list[str]:
    """Full names of the layers that `targets` mean: "all-linear", names, or a pattern, as in peft.

    Layers that text never reaches (towers for images and sound) are left out; "all-linear" also leaves out the output
    layer, routers, experts and whatever else can't be trained and served. Raises ConfigError when a layer was asked
    for by name that can't be, or when none is left.
    """
    modules = _modules(base)
    reasons = _reasons(base, modules)
    usable = [name for name in modules if name in reasons and reasons[name] is None]
    if targets == ALL_LINEAR:
        output = base.get_output_embeddings()
        layers = [name for name in usable if modules[name] is not output]
        if not layers:
            raise _unusable(base, targets, "none of its linear layers can be trained and served", usable)
        return layers
    asked = named_layers(modules, targets)
    wrong = [f"{name} {reason}" for name in asked if (reason := reasons.get(name)) is not None]
    wrong += _experts(base, targets)
    if wrong:
        more = f" and {len(wrong) - NAMED} more" if len(wrong) > NAMED else ""
        raise _unusable(base, targets, "; ".join(wrong[:NAMED]) + more, usable)
    layers = [name for name in asked if name in reasons]
    if not layers:
        raise _unusable(base, targets, f"text never reaches {asked[0]}" if asked else NO_LAYER, usable)
    return layers


def check_targets(base: PreTrainedModel, targets: str | Sequence[str]) -> None:
    """Raise ConfigError for `targets` of which a model shows without its weights that they mean no layer that can be
    trained and served."""
    if targets == ALL_LINEAR:
        return
    modules = _modules(base)
    linear = [name for name, module in modules.items() if linear_shape(module) is not None]
    asked, wrong = named_layers(modules, targets), _experts(base, targets)
    if not asked:
        wrong = wrong or [NO_LAYER]
    elif not {*asked} & {*linear}:
        wrong = wrong or [f"{asked[0]} is no linear layer but {type(modules[asked[0]]).__name__}"]
    if wrong:
        raise _unusable(base, targets, "; ".join(wrong), linear)


def named_layers(names: Iterable[str], targets: str | Sequence[str]) -> list[str]:
    """The full names that `targets` mean: names or a pattern, as in peft."""
    config = LoraConfig(target_modules=targets if isinstance(targets, str) else list(targets))
    return [name for name in names if check_target_module_exists(config, name)]


def _experts(base: PreTrainedModel, targets: str | Sequence[str]) -> list[str]:
    """What is wrong with names of experts."""
    names = () if isinstance(targets, str) else targets
    return [f"{name} means experts, which can't be served" for name in _meaning_experts(base, names)]


def _unusable(base: PreTrainedModel, targets: Any, why: str, usable: Iterable[str]) -> ConfigError:
    names = sorted({name.rpartition(".")[2] for name in usable})
    return ConfigError(
        f"target_modules={targets!r} can't be used on {type(base).__name__} ({why}): give "
        f'"{ALL_LINEAR}" or some of {names}.'
    )


def _modules(base: PreTrainedModel) -> dict[str, nn.Module]:
    """The model's own modules by name: of layers with adapters the layer, without what the adapters brought."""
    inner = [f"{name}." for name, module in base.named_modules() if isinstance(module, BaseTunerLayer)]
    return {
        name: module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
        for name, module in base.named_modules()
        if name and not name.startswith(tuple(inner))
    }


def _reasons(base: PreTrainedModel, modules: dict[str, nn.Module]) -> dict[str, str | None]:
    """Why a layer that text reaches can't be trained and served, None where it can; others have no entry."""
    trained = _seen_in_a_pass(base, modules, training=True)
    reasons = {
        name: reason or trained.get(name, "is bypassed in training")
        for name, reason in _seen_in_a_pass(base, modules, training=False).items()
    }
    usable = [name for name, reason in reasons.items() if reason is None]
    for name in _meaning_experts(base, usable):
        reasons[name] = "has a name that peft takes for the experts'"
    for name in usable:
        parent, _, leaf = name.rpartition(".")
        if leaf == "out_proj" and hasattr(modules.get(parent), "ssm_state_size"):
            reasons[name] = "is bypassed: the state-space kernels take its weights by themselves"
    return reasons


def _seen_in_a_pass(base: PreTrainedModel, modules: dict[str, nn.Module], *, training: bool) -> dict[str, str | None]:
    seen: dict[str, str | None] = {}

    def note(name: str) -> Any:
        def hook(_: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            seen[name] = seen.get(name) or _why_not_served(modules[name], inputs, output)

        return hook

    handles = [base.get_submodule(name).register_forward_hook(note(name)) for name in modules]
    ids = [(7 * i * i + 3 * i + 1) % base.config.get_text_config().vocab_size for i in range(PROBE_TOKENS)]
    arguments: dict[str, Any] = {"input_ids": torch.tensor([ids], device=base.device), "use_cache": False}
    if "logits_to_keep" in inspect.signature(base.forward).parameters:
        arguments["logits_to_keep"] = torch.tensor(KEPT, device=base.device)
    try:
        with looked_at(base):
            base.train(training)
            base(**arguments)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _why_not_served(layer: nn.Module, inputs: tuple[Any, ...], output: Any) -> str | None:
    if linear_shape(layer) is None:
        return f"is no linear layer but {type(layer).__name__}"
    if not isinstance(output, Tensor) or not inputs or not isinstance(inputs[0], Tensor):
        return f"({type(layer).__name__}) gives more than one tensor"
    rows = inputs[0].flatten(0, -2).shape[0]
    return None if rows in (PROBE_TOKENS, len(KEPT)) else "does not see each token once"


def _meaning_experts(base: PreTrainedModel, names: Iterable[str]) -> list[str]:
    """Those names that peft takes for names of experts or routers, as they were called before transformers 5."""
    try:
        from peft.utils.transformers_weight_conversion import (  # type: ignore[attr-defined]
            convert_peft_config_for_transformers,
            get_model_conversion_mapping,
        )
    except ImportError:  # peft before 0.19 translates no names
        return []
    conversions = get_model_conversion_mapping(base)
    meant = []
    for name in names:
        config = LoraConfig(target_modules=[name])
        try:
            convert_peft_config_for_transformers(config, model=base, conversions=copy.copy(conversions))
        except ValueError:  # a part of what makes up one stack of experts
            meant.append(name)
            continue
        if config.target_parameters:
            meant.append(name)
    return meant
