"""The weight step over parity, for its tests."""

from __future__ import annotations

from typing import Any

from fakes import parity_match

from bettertogether.steps.weight_step import LoRAFinetune


def step(**options: Any) -> LoRAFinetune:
    off: dict[str, Any] = {"num_samples": 0, "rescue": False, "balance": False, "validation_share": 0.0}
    return LoRAFinetune(parity_match, **(off | options))
