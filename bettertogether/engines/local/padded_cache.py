"""Rows that join a padded batch and leave it: surgery on transformers' cache.

Rows end at the same column, padded on the left, so that a row's distance to each of its tokens is that of the columns.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer, LinearAttentionLayer


def cache_name(model: Any) -> str:
    """What a model's forward calls its cache, which transformers renames one model after the other."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def join(cache: Any, more: Any) -> None:
    """Add the rows of another cache to this one. Raises TypeError for layers of an unknown kind."""
    for layer, other in zip(cache.layers, more.layers, strict=True):
        if not isinstance(layer, DynamicLayer | LinearAttentionLayer):
            raise TypeError(f"rows can't join a cache of {type(layer).__name__}")
        if isinstance(layer, DynamicLayer) and layer.is_initialized:
            layer.keys = _below(layer.keys, other.keys)
            layer.values = _below(layer.values, other.values)
        if isinstance(layer, DynamicSlidingWindowLayer):
            layer.cumulative_length = max(layer.cumulative_length, other.cumulative_length)
        if isinstance(layer, LinearAttentionLayer):
            for states, others in (
                (layer.conv_states, other.conv_states),
                (layer.recurrent_states, other.recurrent_states),
            ):
                for number, state in states.items():
                    states[number] = None if state is None else torch.cat([state, others[number]])


def keep(cache: Any, places: Tensor, columns: int) -> None:
    """Leave the rows at these places alone, and the last `columns` columns."""
    cache.reorder_cache(places)
    for layer in cache.layers:
        if isinstance(layer, DynamicSlidingWindowLayer):
            layer.cumulative_length = min(layer.cumulative_length, columns)
        if isinstance(layer, DynamicLayer) and layer.keys is not None and layer.values is not None:
            layer.keys, layer.values = layer.keys[..., -columns:, :], layer.values[..., -columns:, :]


def _below(upper_B_K_T_D: Tensor | None, lower_B_K_T_D: Tensor | None) -> Tensor:
    assert upper_B_K_T_D is not None
    assert lower_B_K_T_D is not None
    longest = max(upper_B_K_T_D.shape[-2], lower_B_K_T_D.shape[-2])
    return torch.cat([pad(x, (0, 0, longest - x.shape[-2], 0)) for x in (upper_B_K_T_D, lower_B_K_T_D)])
