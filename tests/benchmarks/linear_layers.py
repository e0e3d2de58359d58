"""The rate of a model's linear layers on this processor: plain, and with packed weights.

    python tests/benchmarks/linear_layers.py MODEL_FOLDER [--dtypes float32 bfloat16]

One pass over all linear layers but the output head, and the output head alone, for the numbers of rows that decoding
(1 to 64) and prompts (hundreds) bring. Prints GFLOP/s, best of 5, and whether a row's packed result depends on the
rows beside it.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from bettertogether.engines.loading import load_model, read_card
from bettertogether.engines.local.packed_linear import PackedLinear, pack_linear_layers

ROWS = (1, 8, 16, 32, 64, 256, 2048)


def rate(layers: Sequence[nn.Linear], rows: int) -> float:
    """GFLOP/s of one pass over the layers."""
    inputs = {layer.in_features: torch.randn(rows, layer.in_features, dtype=layer.weight.dtype) for layer in layers}
    times = []
    for _ in range(5):
        started = time.perf_counter()
        for layer in layers:
            layer(inputs[layer.in_features])
        times.append(time.perf_counter() - started)
    return sum(2 * layer.weight.numel() for layer in layers) * rows / min(times) / 1e9


def alone_as_among_others(layer: nn.Linear) -> bool:
    """Whether a row alone has, bit for bit, the result that it has among others."""
    x = torch.randn(64, layer.in_features, dtype=layer.weight.dtype)
    return all(torch.equal(layer(x[i : i + 1]), layer(x)[i : i + 1]) for i in range(0, 64, 7))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    options = parser.parse_args()
    card = read_card(options.model)
    for dtype in options.dtypes:
        model = load_model(card, torch.device("cpu"), getattr(torch, dtype))
        pack_linear_layers(model)
        head = model.get_output_embeddings()
        body = [layer for layer in model.modules() if isinstance(layer, PackedLinear) and layer is not head]
        if not body:
            raise SystemExit("The linear layers of this model are not packed on this processor.")
        with torch.inference_mode():
            same = all(alone_as_among_others(layer) for layer in [*body, head])
        print(f"{dtype}: a row's packed result {'does not depend' if same else 'DEPENDS'} on the rows beside it")
        for name, layers in (("layers", body), ("head", [head])):
            for rows in ROWS:
                with torch.no_grad():
                    plain = rate(layers, rows)
                with torch.inference_mode():
                    packed = rate(layers, rows)
                print(
                    f"  {name:6} {rows:5} rows: plain {plain:4.0f}, packed {packed:4.0f} GFLOP/s, {packed / plain:.2f}x"
                )


if __name__ == "__main__":
    main()
