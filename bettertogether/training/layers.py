"""What training and answering both need to know of a model's layers."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers.modeling_utils import AttentionInterface

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


class LinearUnderAutograd(nn.Linear):
    """Base of a linear layer that is a plain `nn.Linear` wherever gradients may be asked for."""


def register_attention(name: str, function: Any) -> None:
    """Give transformers an attention function under a name. It is given no mask: by the layout of the tokens it knows
    what each may attend to. (With a mask function registered, transformers would look into the positions of each pass
    whether it is packed, and on a GPU wait for the answer.)"""
    AttentionInterface.register(name, function)
