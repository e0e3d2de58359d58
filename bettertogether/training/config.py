"""What to train: the LoRA adapter and the training run, as two frozen dataclasses."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, Self, get_args

from ..checks import is_number, require, require_one_of, require_switch, require_whole, with_plain_numbers
from ..other_names import knows

GroupBy = Literal["call", "branch"]
ALL_LINEAR = "all-linear"


def _is_auto(value: object) -> bool:
    return isinstance(value, str) and value == "auto"


def _is_positive(value: Any) -> bool:
    return is_number(value) and value > 0


def _is_pattern(text: str) -> bool:
    try:
        re.compile(text)
    except re.error:
        return False
    return True


@knows(r="rank=...", lora_alpha="alpha=...", lora_dropout="dropout=...")
@dataclass(frozen=True)
class LoRAConfig:
    """The adapter's shape (peft's `LoraConfig`, by the names of the paper)."""

    rank: int = 16
    """Rank r of the update matrices. The paper used 32."""
    alpha: float = 32.0
    """Scale: the update is multiplied by alpha / rank."""
    dropout: float = 0.0
    """Dropout on the adapter's input, 0 to 1 (1 excluded)."""
    target_modules: str | Sequence[str] = ALL_LINEAR
    """"all-linear", one name of layers, such as "q_proj", or several; any other string is a regular expression that
    matches whole names, as in peft. "all-linear" leaves out what can't be served: experts, routers, the output layer,
    and layers that text never reaches."""

    def __post_init__(self) -> None:
        with_plain_numbers(self)
        require_whole("rank", self.rank, 1)
        require(is_number(self.alpha) and self.alpha > 0, "alpha", self.alpha, "a number above 0")
        require(is_number(self.dropout) and 0 <= self.dropout < 1, "dropout", self.dropout, "a number in [0, 1)")
        targets = self.target_modules
        if isinstance(targets, str) and targets != ALL_LINEAR and re.fullmatch(r"[\w.]+", targets):
            targets = (targets,)
        elif isinstance(targets, Sequence) and not isinstance(targets, str):
            targets = tuple(targets)
        object.__setattr__(self, "target_modules", targets)
        names = (targets,) if isinstance(targets, str) else targets
        named = isinstance(names, tuple) and bool(names) and all(isinstance(name, str) and name for name in names)
        named = named and (not isinstance(targets, str) or _is_pattern(targets))
        require(named, "target_modules", targets, '"all-linear", names of layers or a regular expression for them')

    @classmethod
    def paper(cls) -> Self:
        """Section 4 of the paper: r 32, alpha 64, dropout 0, query and key projections only."""
        return cls(rank=32, alpha=64.0, dropout=0.0, target_modules=("q_proj", "k_proj"))

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        return asdict(self)


@knows(
    lr="learning_rate=...",
    num_train_epochs="epochs=...",
    num_epochs="epochs=...",
    max_steps='epochs=..., or "auto" with max_minutes=...',
    per_device_train_batch_size="batch_size=... (of an optimizer step) or max_tokens_per_batch=... (of a pass)",
    gradient_accumulation_steps="batch_size=..., the rows of an optimizer step",
    lr_scheduler_type="scheduler=...",
    warmup_steps="warmup_ratio=...",
    load_best_model_at_end="keep_best=...",
    bf16='dtype="bfloat16"',
    load_in_4bit='quantize_base="4bit"',
)
@dataclass(frozen=True)
class TrainingConfig:
    """How to train. Defaults follow "LoRA Without Regret"; `paper()` gives the paper's."""

    learning_rate: float | Literal["auto"] = "auto"
    """Peak learning rate of AdamW. "auto": by the model's width (`training/auto.py`)."""
    epochs: int | Literal["auto"] = "auto"
    """Passes over the rows. "auto": as many as the rows need, at most what `training/auto.py` says, and fewer where
    the rows held out are answered no better (see `patience`). The best of them is kept, see `keep_best`."""
    patience: int = 3
    """With epochs="auto", `keep_best` and validation rows: epochs without a lower held-out loss or error after which to
    stop, if both rose since, as rows were learned by heart, or have little left to fall by; else more, see
    `training/length.py`."""
    max_minutes: float | None = None
    """Stop at the end of the epoch after which the next would take longer than this (within the first epoch: after the
    step that does). None: no limit."""
    skeleton_weight: float = 0.1
    """Weight in the training loss of the tokens that the answer's grammar forces (JSON around the values); 1.0: all
    alike. Above 0, so that a tuned model answers in form where no grammar is in force."""
    balance_fields: bool = True
    """Each output field of a row counts alike, so that a label of one token is not drowned by a text of fifty; False:
    each token."""
    form_share: float = 0.5
    """Share of the optimizer batches that show prompts with demos, where rows have such forms."""
    batch_size: int = 8
    """Rows an optimizer step learns from, whatever they are split into."""
    max_tokens_per_batch: int = 16_384
    """Tokens in one forward pass at most (packed, shared prefix counted once); a batch over it is split and its
    gradients are accumulated. A single longer row still goes through alone."""
    scheduler: Literal["averaged", "cosine", "linear", "constant"] = "averaged"
    """Learning rate after the warm-up. "averaged": constant, and the weights that are measured and kept are the running
    mean of those of the last steps (`training/averaging.py`), so that training may end at any time."""
    warmup_ratio: float = 0.05
    """Share of the optimizer steps spent warming up, 0 to 1."""
    weight_decay: float = 0.0
    """AdamW weight decay."""
    adam_beta2: float = 0.95
    """AdamW's memory of squared gradients. Trainings here have dozens of steps: at 0.999 the large gradients of the
    first ones, when the model learns the form of the answers, keep the steps small to the end."""
    max_grad_norm: float = 1.0
    """Gradients are clipped to this norm; 0 turns clipping off."""
    keep_best: bool = True
    """With validation rows: keep the epoch with the lowest held-out error (see `TrainingProgress.validation_error`; of
    pairs, the lowest loss), not the last."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Precision of the forward and backward pass; adapter weights and optimizer stay in float32.
    "auto": bfloat16 on hardware that has it, else float32."""
    gradient_checkpointing: bool | Literal["auto"] = "auto"
    """Trade time for memory. "auto": on CUDA with a base model above one billion parameters."""
    quantize_base: Literal["4bit"] | None = None
    """Load the frozen base in 4-bit (CUDA and bitsandbytes only); the model that answers is freed meanwhile."""
    num_processes: int = 1
    """1 trains inside this process; more starts `accelerate launch` with so many processes."""
    accelerate_config: str | Path | None = None
    """A file that `accelerate config` wrote (FSDP2, ZeRO, mixed precision, several machines): training goes through
    `accelerate launch` with it, and with its number of processes. See `training/accelerate_file.py`."""
    launch_command: Sequence[str] = ()
    """What is put before the command that trains, such as ("srun", "--nodes=2", "--ntasks-per-node=1"): it starts that
    command once on each machine. The run's directory has to be on a file system that all of them share."""
    beta: float = 0.1
    """Of pairs: how far their preference may move the model from the reference, less the larger it is (DPO)."""
    nll_weight: float = 1.0
    """Of pairs: weight of the chosen answer's mean loss per token, beside the preference (Iterative RPO)."""
    seed: int = 0
    """Seed of the adapter's initial weights and of the row order; a `seed` that is given to `compile` wins."""

    def __post_init__(self) -> None:
        with_plain_numbers(self)
        rate, warmup = self.learning_rate, self.warmup_ratio
        require(_is_auto(rate) or _is_positive(rate), "learning_rate", rate, 'a number above 0, or "auto"')
        if not _is_auto(self.epochs):
            require_whole("epochs", self.epochs, 1)
        for name in ("patience", "batch_size", "max_tokens_per_batch", "num_processes"):
            require_whole(name, getattr(self, name), 1)
        weight, share, minutes = self.skeleton_weight, self.form_share, self.max_minutes
        require(_is_positive(weight), "skeleton_weight", weight, "a number above 0 (1.0: all tokens alike)")
        require(is_number(share) and 0 <= share <= 1, "form_share", share, "a number in [0, 1]")
        require(minutes is None or _is_positive(minutes), "max_minutes", minutes, "None or a number above 0")
        require_whole("seed", self.seed, 0)
        require_switch("keep_best", self.keep_best)
        require_switch("balance_fields", self.balance_fields)
        schedulers = ("averaged", "cosine", "linear", "constant")
        require(self.scheduler in schedulers, "scheduler", self.scheduler, f"one of {schedulers}")
        require(is_number(warmup) and 0 <= warmup < 1, "warmup_ratio", warmup, "a number in [0, 1)")
        require(_is_positive(self.beta), "beta", self.beta, "a number above 0")
        beta2 = self.adam_beta2
        require(is_number(beta2) and 0 <= beta2 < 1, "adam_beta2", beta2, "a number in [0, 1)")
        for name in ("weight_decay", "max_grad_norm", "nll_weight"):
            value = getattr(self, name)
            require(is_number(value) and value >= 0, name, value, "0 or more")
        require(self.dtype in ("auto", "float32", "bfloat16"), "dtype", self.dtype, '"auto", "float32" or "bfloat16"')
        require(self.quantize_base in (None, "4bit"), "quantize_base", self.quantize_base, 'None or "4bit"')
        self._check_launch()
        checkpoint = self.gradient_checkpointing
        switch = checkpoint == "auto" or isinstance(checkpoint, bool)
        require(switch, "gradient_checkpointing", checkpoint, 'True, False or "auto"')

    def _check_launch(self) -> None:
        command, file = self.launch_command, self.accelerate_config
        words = isinstance(command, Sequence) and not isinstance(command, str)
        words = words and all(isinstance(word, str) and word for word in command)
        require(words, "launch_command", command, 'words such as ("srun", "--nodes=2", "--ntasks-per-node=1")')
        object.__setattr__(self, "launch_command", tuple(command))
        if file is None:
            return
        require(isinstance(file, str | Path), "accelerate_config", file, "the path of a file, or None")
        object.__setattr__(self, "accelerate_config", str(Path(file).expanduser().absolute()))
        # Here, as it brings torch.
        from .accelerate_file import read_accelerate_file

        read_accelerate_file(self)

    @property
    def launched(self) -> bool:
        """Whether it trains in processes of its own."""
        return self.num_processes > 1 or self.accelerate_config is not None or bool(self.launch_command)

    def recipe(self) -> Self:
        """The same training without what only decides where it runs."""
        return replace(self, num_processes=1, accelerate_config=None, launch_command=())

    @classmethod
    def paper(cls) -> Self:
        """Section 4 of the paper: lr 1e-5, 5 epochs, effective batch 8, bfloat16; the last epoch is kept. All tokens
        count alike, and AdamW is as in transformers' Trainer: beta2 0.999, no weight decay."""
        return cls(
            learning_rate=1e-5,
            epochs=5,
            batch_size=8,
            scheduler="linear",
            warmup_ratio=0.0,
            keep_best=False,
            skeleton_weight=1.0,
            balance_fields=False,
            adam_beta2=0.999,
            dtype="bfloat16",
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        return asdict(self)


@knows(
    num_generations="group_size=...",
    num_iterations="updates=...",
    max_steps="steps=...",
    num_train_steps="steps=...",
    num_dspy_examples_per_grpo_step="examples_per_step=...",
    num_rollouts_per_grpo_step="group_size=...",
    num_steps_for_val="score_every=...",
    epsilon="clip=...",
    beta="kl_weight=...",
    scale_rewards="divide_by_deviation=...",
)
@dataclass(frozen=True)
class PolicyConfig:
    """How to learn from rewards (GRPO); the defaults are on-policy, without a reference.

    What a `TrainingConfig` says of AdamW, precision and memory holds here too: `learning_rate` ("auto": a tenth of that
    for rows), `adam_beta2`, `weight_decay`, `max_grad_norm`, `warmup_ratio`, `scheduler` ("averaged" is constant here),
    `max_tokens_per_batch`, `dtype`, `gradient_checkpointing`, `quantize_base` (behind vLLM) and `seed`.
    """

    steps: int = 40
    """Steps: each runs the program with the adapter as it is then, and learns from its answers."""
    examples_per_step: int = 8
    """Examples that a step learns from: those whose runs differ in reward."""
    group_size: int = 8
    """Answers that are compared with each other, at least 2: in so many runs of the program on each example."""
    group_by: GroupBy = "call"
    """"call": a group has the answers of an example's runs to one call, by its predictor and number. "branch": one run
    of each example, in which each call is answered anew `group_size` - 1 times on the very inputs that it had, at most
    three calls of a predictor; the program goes on from there, and a group has the answers to that call."""
    most_draws: int = 3
    """Where all runs of an example have one reward, another example is drawn, up to so many times `examples_per_step`
    in all."""
    temperature: float = 1.0
    """Of the runs, above 0 and at most 2. At 1.0 answers come from the model's own distribution."""
    divide_by_deviation: bool = False
    """Divide advantages by the standard deviation of their group's rewards, as GRPO does. It makes much of groups in
    which all but one run are alike."""
    unread_reward: float = -1.0
    """Reward of an answer that could not be read."""
    updates: int = 1
    """Updates of the adapter on the answers of one step."""
    clip: float = 0.2
    """With several updates: a token's part ends where its probability has changed by this share."""
    kl_weight: float = 0.0
    """Weight of the divergence from the adapter that the training started from, in the loss; 0 does not compute it."""
    fade_demos: bool = False
    """Runs show the program's demos in a share of the examples that falls from all to none over the steps (arXiv
    2603.18953), and the tuned program has none."""
    score_every: int = 5
    """Steps after which the program is scored on examples held out; the best adapter is kept."""

    def __post_init__(self) -> None:
        with_plain_numbers(self)
        for name in ("steps", "examples_per_step", "most_draws", "updates", "score_every"):
            require_whole(name, getattr(self, name), 1)
        require_whole("group_size", self.group_size, 2, meaning="2 or more: runs are compared to each other")
        heat, clip, weight, unread = self.temperature, self.clip, self.kl_weight, self.unread_reward
        sampled = "a number above 0, at most 2: at 0 all runs of an example are the same"
        require(is_number(heat) and 0 < heat <= 2, "temperature", heat, sampled)
        require(is_number(clip) and 0 < clip < 1, "clip", clip, "a number between 0 and 1")
        require(is_number(weight) and weight >= 0, "kl_weight", weight, "0 or more")
        require(is_number(unread), "unread_reward", unread, "a number")
        require_one_of("group_by", self.group_by, get_args(GroupBy))
        require_switch("divide_by_deviation", self.divide_by_deviation)
        require_switch("fade_demos", self.fade_demos)

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        return asdict(self)
