"""Tiny random models and a byte tokenizer, made on the spot, and a way to run a decoder by hand."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GPTNeoXConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    Phi3Config,
    PretrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
)

from bettertogether.engines.adapters import AdapterBank, linear_shapes
from bettertogether.engines.local.decoder import BatchRow, Decoder

SPECIAL = ("<pad>", "<bos>", "<eos>", "<|im_start|>", "<|im_end|>")
VOCABULARY = 256 + len(SPECIAL)
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "pad_token_id": 256,
    "bos_token_id": 257,
    "eos_token_id": 258,
}
WINDOW: dict[str, Any] = {"sliding_window": 24, "layer_types": ["sliding_attention", "full_attention"]}
PACKED: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**SIZES),
    "mistral": MistralConfig(**SIZES, sliding_window=None),
    "mistral with a window": MistralConfig(**SIZES, sliding_window=24),
    "qwen2": Qwen2Config(**SIZES),
    "qwen2 with a window": Qwen2Config(**SIZES, use_sliding_window=True, **WINDOW),
    "qwen3": Qwen3Config(**SIZES, head_dim=16),
    "gemma2": Gemma2Config(**SIZES, head_dim=16, attn_logit_softcapping=5.0, **WINDOW),
    "gemma3": Gemma3TextConfig(**SIZES, head_dim=16, query_pre_attn_scalar=16, **WINDOW),
    "phi3": Phi3Config(**SIZES, sliding_window=None),
    "smollm3": SmolLM3Config(**SIZES),
    "olmo2": Olmo2Config(**SIZES),
    "granite": GraniteConfig(**SIZES),
    "gpt-neox": GPTNeoXConfig(**SIZES),
}
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def random_model(config: PretrainedConfig, seed: int = 0, std: float = 0.2) -> Any:
    """A model whose weights are large enough that every token matters."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=torch.float32)
    for parameter in model.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=std)
    return model.eval()


def tiny_model(config: PretrainedConfig | None = None, seed: int = 0) -> Any:
    """A random model, as an engine holds it."""
    return random_model(config or PACKED["llama"], seed).requires_grad_(False)


def byte_tokenizer(template: str | None = CHATML) -> PreTrainedTokenizerFast:
    """One token a byte, and the special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({symbol: place for place, symbol in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        chat_template=template,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
    )


def save_model(folder: Path, config: PretrainedConfig | None = None, template: str | None = CHATML) -> Path:
    """A tiny model with its tokenizer, as `save_pretrained` writes it."""
    tiny_model(config).save_pretrained(folder)
    byte_tokenizer(template).save_pretrained(folder)
    return folder


def save_adapter(folder: Path, seed: int, **options: Any) -> Path:
    """A PEFT folder with a random LoRA that changes the answers."""
    torch.manual_seed(seed)
    config = LoraConfig(**{"r": 4, "lora_alpha": 16, "target_modules": "all-linear", **options}, task_type="CAUSAL_LM")
    model = get_peft_model(tiny_model(), config)
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(str(folder), save_embedding_layers=False)
    return folder


@contextmanager
def bfloat16_by_default() -> Iterator[None]:
    """Inside the block torch is as another thread finds it while transformers builds a model in bfloat16."""
    torch.set_default_dtype(torch.bfloat16)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


def bank(model: Any) -> AdapterBank:
    """No adapters, attached to a model."""
    adapters = AdapterBank("tiny", lambda: linear_shapes(model))
    adapters.attach(model)
    return adapters


def prompts(number: int, shared: int, own: int = 20, seed: int = 0) -> list[list[int]]:
    """Random prompts that begin with the same `shared` tokens and go on with 1 to `own` different ones."""
    numbers = random.Random(seed)
    prefix = [numbers.randrange(256) for _ in range(shared)]
    return [prefix + [numbers.randrange(256) for _ in range(numbers.randint(1, own))] for _ in range(number)]


def generated(model: Any, prompt_ids: Sequence[int], new_tokens: int) -> list[int]:
    """What `model.generate` answers greedily; it never stops early."""
    ids_1_T = torch.tensor([prompt_ids], device=model.device)
    options = {"do_sample": False, "max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "eos_token_id": None}
    return model.generate(ids_1_T, attention_mask=torch.ones_like(ids_1_T), **options)[0, len(prompt_ids) :].tolist()


def decode(decoder: Decoder, rows: Sequence[BatchRow], most: int = 1000) -> None:
    """Run rows to their `max_new_tokens`, so many at once at most; each leaves when it is done, and those not admitted
    join later."""
    waiting = list(rows)
    running: list[BatchRow] = []
    while waiting or running:
        next_rows = waiting[: most - len(running)]
        taken = decoder.admit(next_rows) if next_rows else []
        waiting = [row for row in waiting if row not in taken]
        running += taken
        for row, decision in zip(list(running), decoder.step(running), strict=True):
            row.output_ids += decision.token_ids
            row.scores += decision.scores
            if len(row.output_ids) >= row.max_new_tokens:
                decoder.release(row)
                running.remove(row)
