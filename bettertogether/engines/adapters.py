"""LoRA adapters over one base model: loading, naming by content, and applying several in one forward pass.

The base weights are never touched. A forward hook on each adapted layer adds `B A x` for the tokens that belong to
an adapter, so that requests for the base and for any number of adapters share one pass.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..errors import ModelError
from ..training.adapter_folder import WEIGHTS_FILE, content_hash, read_adapter_config, read_tensors, round_of
from ..training.layers import linear_shape
from .held_adapters import HeldAdapters
from .protocol import adapter_model_name


@dataclass(frozen=True)
class AdaptedSpan:
    """Tokens [start, stop) of a packed pass, and the adapter they belong to. `stop` None: to the end."""

    adapter: str
    start: int
    stop: int | None


@dataclass(frozen=True)
class _ActiveSpan:
    weights: dict[str, tuple[Tensor, Tensor]]
    places: Mapping[int, slice]
    """Where the adapter's tokens are for a layer that sees so many; empty: it sees no others'."""

    def tokens(self, rows: int, layer: str) -> slice:
        """The adapter's among the tokens that a layer sees. Raises ModelError."""
        if not self.places:
            return slice(None)
        if rows not in self.places:
            raise ModelError(
                f"The adapter changes {layer}, which sees {rows} of {max(self.places)} tokens: a layer of experts, or "
                "one that takes tokens apart, can't be served in a batch. Train an adapter without it."
            )
        return self.places[rows]


class AdapterBank(HeldAdapters):
    """The adapters that an engine serves. Methods may be called from many threads; passes run on one."""

    def __init__(self, base_name: str, layer_shapes: Callable[[], Mapping[str, tuple[int, int]]]) -> None:
        """`layer_shapes` gives (in, out) of each linear layer of the base by name; called when first needed."""
        super().__init__(base_name)
        self._layer_shapes = layer_shapes
        self._weights: dict[str, dict[str, tuple[Tensor, Tensor]]] = {}
        """By adapter, and layer name: (A as [in, rank], scaled B as [rank, out])."""
        self._model: Any = None
        self._modules: dict[str, nn.Module] = {}
        """Of the model, as it was attached: a training wraps some for its time."""
        self._hooks: dict[str, Any] = {}
        self._active: list[_ActiveSpan] = []

    def add(self, folder: Path) -> str:
        """Serve the adapter in a PEFT folder; returns its model name. Raises ModelError."""
        name = adapter_name(self._base_name, folder)
        # Before the lock, for which requests of all adapters would wait.
        weights = self._weights.get(name)
        if weights is None:
            weights = read_weights(folder, read_adapter_config(folder), self._layer_shapes())
        with self._lock:
            if name not in self._weights:
                self._weights[name] = weights
                self._attach()
            self.hold(name, folder)
        return name

    def put(self, name: str, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Serve an adapter that is in memory alone, under a name: the config and the weights of a PEFT folder."""
        weights = layer_weights(tensors, config, self._layer_shapes(), name)
        with self._lock:
            self._weights[name], self._folders[name] = weights, ()
            self._attach()

    def remove(self, model: str) -> None:
        """Serve an adapter no more."""
        with self._lock:
            super().remove(model)
            self._weights.pop(model, None)

    def attach(self, model: nn.Module | None) -> None:
        """Serve the adapters on this model from now on; None frees them from it."""
        with self._lock:
            for handle in self._hooks.values():
                handle.remove()
            self._hooks.clear()
            self._model = model
            self._modules = {} if model is None else dict(model.named_modules())
            self._attach()

    def free(self) -> None:
        """Free the model and all weights, for good; names and folders stay known."""
        with self._lock:
            self.attach(None)
            self._weights = {name: {} for name in self._weights}

    @contextmanager
    def active(self, spans: Sequence[AdaptedSpan], kept: Sequence[int] = ()) -> Iterator[None]:
        """Apply adapters to the tokens of the passes inside the block; the base alone after it.

        `kept` are the places, in order, of the tokens whose logits are asked for: the output layer, and whatever
        else comes after the cut, sees these alone. Raises UnknownAdapterError for an adapter that was removed.
        """
        with self._lock:
            self._active = [
                _ActiveSpan(self._held(span.adapter), _places(span, spans[-1].stop, kept))
                for span in spans
                if span.adapter
            ]
        try:
            yield
        finally:
            self._active = []

    def _held(self, model: str) -> dict[str, tuple[Tensor, Tensor]]:
        self.check(model)
        return self._weights[model]

    def _attach(self) -> None:
        """Hook the layers that some adapter changes, and bring the adapters to the model's device and precision."""
        if not self._modules:
            return
        for weights in self._weights.values():
            for name, (a, b) in weights.items():
                layer = self._modules[name]
                held = next(chain(layer.parameters(), layer.buffers()))
                # A quantized layer holds integers or 8-bit floats; gptqmodel's has them in buffers.
                exact = held.is_floating_point() and held.dtype.itemsize > 1
                dtype = held.dtype if exact else self._model.dtype
                weights[name] = (a.to(held.device, dtype), b.to(held.device, dtype))
                if name not in self._hooks:
                    self._hooks[name] = layer.register_forward_hook(self._hook(name))

    def _hook(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def add_updates(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            x_T_I, y_T_O = inputs[0].flatten(0, -2), output.view(-1, output.shape[-1])
            for span in self._active:
                if name in span.weights:
                    a, b = span.weights[name]
                    tokens = span.tokens(len(x_T_I), name)
                    low_T_R = x_T_I[tokens].to(a.dtype) @ a
                    if output.dtype == b.dtype:
                        y_T_O[tokens].addmm_(low_T_R, b)
                    else:
                        y_T_O[tokens] += (low_T_R @ b).to(output.dtype)

        return add_updates


def _places(span: AdaptedSpan, total: int | None, kept: Sequence[int]) -> dict[int, slice]:
    if total is None or (span.start, span.stop) == (0, total):
        return {}
    stop = total if span.stop is None else span.stop
    among_kept = slice(bisect_left(kept, span.start), bisect_left(kept, stop))
    return {len(kept): among_kept, total: slice(span.start, stop)}


def adapter_name(base_name: str, folder: Path) -> str:
    """Model name of the adapter in a PEFT folder: its round and a hash of its content. Raises ModelError."""
    return adapter_model_name(base_name, round_of(folder), content_hash(folder))


def read_weights(
    folder: Path, config: Mapping[str, Any], shapes: Mapping[str, tuple[int, int]]
) -> dict[str, tuple[Tensor, Tensor]]:
    """Layer name to (A as [in, rank], scaled B as [rank, out]), for a base whose layers have these (in, out). Raises
    ModelError."""
    path = folder / WEIGHTS_FILE
    return layer_weights(read_tensors(path), config, shapes, path)


def layer_weights(
    tensors: Mapping[str, Tensor], config: Mapping[str, Any], shapes: Mapping[str, tuple[int, int]], path: object
) -> dict[str, tuple[Tensor, Tensor]]:
    """`read_weights` of what a PEFT folder holds; errors name its `path`."""
    parts: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        layer, dot, kind = key.removeprefix("base_model.model.").removesuffix(".weight").rpartition(".")
        if not dot or kind not in ("lora_A", "lora_B") or layer not in shapes:
            raise ModelError(f"{path} holds {key!r}, which is not a LoRA matrix of a linear layer of this base model.")
        parts.setdefault(layer, {})[kind] = tensor
    weights = {}
    for layer, pair in parts.items():
        a, b = pair.get("lora_A"), pair.get("lora_B")
        whole = a is not None and b is not None and a.ndim == b.ndim == 2 and a.shape[0] == b.shape[1] > 0
        if a is None or b is None or not whole or (a.shape[1], b.shape[0]) != shapes[layer]:
            found = {kind: tuple(tensor.shape) for kind, tensor in pair.items()}
            raise ModelError(f"{path} does not fit the base model: layer {layer} is {shapes[layer]}, LoRA {found}.")
        weights[layer] = (a.t().contiguous(), (b * _scale(config, layer, a.shape[0])).t().contiguous())
    return weights


def _scale(config: Mapping[str, Any], layer: str, rank: int) -> float:
    from peft.utils.other import get_pattern_key

    patterns = config.get("alpha_pattern") or {}
    alpha = float(patterns.get(get_pattern_key(list(patterns), layer), config["lora_alpha"]))
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def linear_shapes(model: nn.Module) -> dict[str, tuple[int, int]]:
    """(in, out) of each linear layer by name."""
    return {name: shape for name, module in model.named_modules() if (shape := linear_shape(module))}
