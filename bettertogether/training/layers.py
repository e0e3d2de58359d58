"""What training and answering both need to know of a model's layers."""

from __future__ import annotations

import sys
from typing import Any, TypeGuard

from torch import nn
from transformers.modeling_utils import AttentionInterface
from transformers.pytorch_utils import Conv1D

from ._upstream import is_stateful

ATTENTION_LAYERS = frozenset({"full_attention", "sliding_attention"})
"""Layer types of transformers' configs whose tokens see one another by plain attention alone."""


def more_than_attention(model: Any) -> str | None:
    """What a model has besides attention that carries something from token to token, by its config; None: nothing."""
    types = getattr(model.config.get_text_config(), "layer_types", None)
    if types is None:
        return "its layers keep a state" if is_stateful(model) else None
    others = sorted(set(types) - ATTENTION_LAYERS)
    return f"its layers are of type {', '.join(others)}" if others else None


def head_width(text: Any) -> int:
    """Numbers of one attention head, by the config of a model's text part."""
    return int(getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads)


def linear_shape(layer: nn.Module) -> tuple[int, int] | None:
    """(in, out) of a linear layer, None of any other; GPT-2's Conv1D is one, with its weights transposed, and so are
    gptqmodel's, of GPTQ and AWQ."""
    if isinstance(layer, Conv1D):
        return int(layer.weight.shape[0]), int(layer.weight.shape[1])
    quantized = getattr(sys.modules.get("gptqmodel.nn_modules.qlinear"), "BaseQuantLinear", ())
    return (layer.in_features, layer.out_features) if isinstance(layer, (nn.Linear, quantized)) else None


def is_plain_linear(layer: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether a layer computes what `nn.Linear` does: compressed-tensors gives such layers another forward."""
    return type(layer) is nn.Linear and "forward" not in vars(layer)


class LinearUnderAutograd(nn.Linear):
    """Base of a linear layer that is a plain `nn.Linear` wherever gradients may be asked for."""


def register_attention(name: str, function: Any) -> None:
    """Give transformers an attention function under a name. It is given no mask: by the layout of the tokens it knows
    what each may attend to. (With a mask function registered, transformers would look into the positions of each pass
    whether it is packed, and on a GPU wait for the answer.)"""
    AttentionInterface.register(name, function)
