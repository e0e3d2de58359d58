"""What a user would write without this library: an engine over `generate`, and a provider over trl's SFTTrainer."""

from __future__ import annotations

import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import dspy
import torch
from datasets import Dataset
from dspy.clients.provider import Provider, TrainingJob
from dspy.lm15 import Message, Request, Response, Usage
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from bettertogether.engines.rendering import PromptRenderer, messages_of
from bettertogether.training._upstream import multiplies_bfloat16_fast
from bettertogether.training.config import LoRAConfig


class PlainEngine:
    """Answers one request at a time with `model.generate`; an adapter is switched on where its name is asked for."""

    supported_params = frozenset({"temperature", "max_tokens", "top_p"})
    supports_response_schema = False

    def __init__(self, folder: str | Path) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self.renderer = PromptRenderer(self.tokenizer, [self.model.generation_config.eos_token_id], None)
        self.trained_rows = 0
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self._requests = 0
        self._lock = threading.Lock()

    def complete(self, request: Request) -> Response:
        """Answer one request."""
        prompt = self.renderer.prompt_tokens(messages_of(request))
        config = request.config
        with self._lock:
            started = time.perf_counter()
            self._requests += 1
            answer = self._generate(request.model, prompt, config.max_tokens or 1024, config.temperature or 0.0)
            self.seconds["generate"] += time.perf_counter() - started
        text = self.tokenizer.decode(answer, skip_special_tokens=True)
        return Response(
            id=None,
            model=request.model,
            message=Message.assistant(text),
            finish_reason="stop" if answer and answer[-1] == self.renderer.end_id else "length",
            usage=Usage(input_tokens=len(prompt), output_tokens=len(answer)),
        )

    def _generate(self, name: str, prompt: list[int], max_tokens: int, temperature: float) -> list[int]:
        sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
        if hasattr(self.model, "peft_config"):
            self._switch(name)
        ids = torch.tensor([prompt])
        with torch.no_grad():
            out = self.model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=max_tokens,
                eos_token_id=self.renderer.end_id,
                pad_token_id=self.renderer.end_id,
                **sampling,
            )
        return out[0, len(prompt) :].tolist()

    def _switch(self, name: str) -> None:
        adapter = name.rpartition("@")[2]
        if adapter in self.model.peft_config:
            self.model.base_model.enable_adapter_layers()
            self.model.set_adapter(adapter)
        else:
            self.model.base_model.disable_adapter_layers()

    def train(self, chats: Sequence[Mapping[str, Any]], options: Mapping[str, Any]) -> str:
        """A new adapter, trained with trl on the last message of each chat."""
        from trl import SFTConfig, SFTTrainer

        started = time.perf_counter()
        rows: dict[str, list[list[int]]] = {"input_ids": [], "completion_mask": []}
        for chat in chats:
            prompt = self.renderer.prompt_tokens(chat["messages"][:-1])
            answer = self.renderer.completion_tokens(chat["messages"][-1]["content"])
            rows["input_ids"].append(prompt + answer)
            rows["completion_mask"].append([0] * len(prompt) + [1] * len(answer))
        self.trained_rows += len(chats)
        lora = LoRAConfig()
        adapter = f"adapter{self.trained_rows}"
        config = LoraConfig(r=lora.rank, lora_alpha=int(lora.alpha), target_modules="all-linear", task_type="CAUSAL_LM")
        with self._lock, tempfile.TemporaryDirectory() as folder:
            model = get_peft_model(self.model, config, adapter_name=adapter)
            settings = SFTConfig(
                output_dir=folder,
                num_train_epochs=options["epochs"],
                learning_rate=options["learning_rate"],
                per_device_train_batch_size=options["batch_size"],
                lr_scheduler_type="cosine",
                warmup_steps=0,
                max_length=None,
                completion_only_loss=True,
                gradient_checkpointing=False,
                bf16=multiplies_bfloat16_fast(),
                use_cpu=True,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
            )
            SFTTrainer(
                model, args=settings, train_dataset=Dataset.from_dict(rows), processing_class=self.tokenizer
            ).train()
            self.model = model.eval()
            self.seconds["train"] += time.perf_counter() - started
        return adapter

    def counters(self) -> dict[str, int]:
        """How many requests were answered."""
        return {"requests": self._requests}

    def __deepcopy__(self, memo: Any) -> PlainEngine:
        return self

    def __copy__(self) -> PlainEngine:
        return self


class TrlProvider(Provider):
    """DSPy's way to a training, over `PlainEngine.train`."""

    def __init__(self, engine: PlainEngine) -> None:
        super().__init__()
        self.finetunable = True
        self.engine = engine

    def finetune(
        self,
        job: TrainingJob,
        model: str,
        train_data: Sequence[Mapping[str, Any]],
        train_data_format: Any = None,
        train_kwargs: Mapping[str, Any] | None = None,
    ) -> str:
        """The name of the trained model."""
        return f"{model}@{self.engine.train(train_data, train_kwargs or {})}"


def plain_lm(engine: PlainEngine, **options: Any) -> dspy.LM:
    """The LM over a plain engine, trainable by trl."""
    return dspy.LM("plain/model", engine=engine, provider=TrlProvider(engine), temperature=0.0, **options)
