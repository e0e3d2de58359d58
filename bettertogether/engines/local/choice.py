"""Which decoder serves a model: the packed one where it gives the model's own logits, else the plain one."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ...printable import get_logger
from ...training.attention import window_of_mask_alone
from ...training.layers import more_than_attention
from ..adapters import AdapterBank
from ..memory_plan import cache_share, free_bytes
from .decoder import Decoder
from .packed_decoder import PackedDecoder
from .plain_decoder import PlainDecoder

logger = get_logger(__name__)


def make_decoder(model: Any, adapters: AdapterBank, cache_bytes: int | None) -> Decoder:
    """The packed decoder, or the plain one where packing does not give this model's own logits (said in the log).

    `cache_bytes` bounds the packed one's keys and values; None takes a share of the memory that is free now.
    """
    reason = why_not_packed_decoder(model, adapters)
    if reason is None:
        share = cache_share(model.device, free_bytes(model.device)) if cache_bytes is None else cache_bytes
        return PackedDecoder(model, adapters, cache_bytes=share)
    logger.warning("%s answers in padded batches, without shared prefixes: %s.", type(model).__name__, reason)
    return PlainDecoder(model, adapters, **_batching(model, adapters))


def _batching(model: Any, adapters: AdapterBank) -> dict[str, bool]:
    """Whether a prompt gets its own logits beside a longer one: padded to its length (`pads`), and joining it when that
    one is under way (`joins`)."""
    vocabulary = model.config.get_text_config().vocab_size
    prompts = [[(7919 * place + 11) % vocabulary for place in range(length)] for length in (19, 12)]
    decoder = PlainDecoder(model, adapters)
    alone_B_V = torch.cat([decoder.probe([prompt]) for prompt in prompts]).float()

    def are_alone(found_B_V: Tensor) -> bool:
        tolerance = 1e-3 if model.dtype == torch.float32 else 2e-2
        errors_B = (found_B_V.float() - alone_B_V).norm(dim=-1)
        return bool((errors_B <= tolerance * alone_B_V.norm(dim=-1)).all())

    pads = are_alone(decoder.probe(prompts))
    try:
        joins = are_alone(decoder.probe(prompts, joined=True))
    except Exception as error:  # whatever a model's code makes of its cache
        logger.info("Rows of %s can't join a batch: %s: %s.", type(model).__name__, type(error).__name__, error)
        joins = False
    return {"pads": pads, "joins": joins}


def why_not_packed_decoder(model: Any, adapters: AdapterBank) -> str | None:
    """Why packed attention can't serve a model; None where a short text gets the same logits with it."""
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None) or math.inf
    return more_than_attention(model) or window_of_mask_alone(model, longest) or _differs(model, adapters)


@torch.inference_mode()
def _differs(model: Any, adapters: AdapterBank) -> str | None:
    tokens = [(7919 * place + 11) % model.config.get_text_config().vocab_size for place in range(14)]
    expected_V = model(torch.tensor([tokens], device=model.device)).logits[0, -1].float()
    try:
        found_V = PackedDecoder(model, adapters, cache_bytes=1 << 30).probe(tokens, prefix_length=8).float()
    except Exception as error:  # whatever a model's code does with an attention function that it does not know
        return f"{type(error).__name__}: {error}"
    tolerance = 1e-3 if model.dtype == torch.float32 else 0.06
    difference = float((expected_V - found_V).abs().max())
    if difference <= tolerance * float(expected_V.max() - expected_V.min()):
        return None
    return f"its logits differ by {difference:.2g} under packed attention"
