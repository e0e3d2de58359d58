"""The presets have every setting of the paper (arXiv 2407.10930, section 4)."""

from __future__ import annotations

from fakes import parity_match

from bettertogether import BootstrapFewShotRS, LoRAConfig, LoRAFinetune, TrainingConfig


def test_lora_of_the_paper_is_rank_32_on_query_and_key() -> None:
    assert LoRAConfig.paper() == LoRAConfig(rank=32, alpha=64.0, dropout=0.0, target_modules=("q_proj", "k_proj"))


def test_training_of_the_paper_is_5_epochs_in_bfloat16_at_1e_5_in_batches_of_8() -> None:
    paper = TrainingConfig.paper()
    assert (paper.learning_rate, paper.epochs, paper.batch_size, paper.dtype) == (1e-5, 5, 8, "bfloat16")
    assert (paper.keep_best, paper.max_minutes, paper.quantize_base) == (False, None, None)
    assert (paper.scheduler, paper.warmup_ratio, paper.adam_beta2) == ("linear", 0.0, 0.999)
    assert (paper.skeleton_weight, paper.balance_fields) == (1.0, False)


def test_bfrs_of_the_paper_tries_6_sets_of_3_demos_on_100_and_250_examples() -> None:
    p = BootstrapFewShotRS.paper(parity_match)
    assert (p.num_candidates, p.max_bootstrapped_demos, p.max_labeled_demos) == (6, 3, 3)
    assert (p.train_size, p.val_size, p.threshold) == (100, 250, None)
    assert (p.restart, p.race, p.strengths) == (True, False, ())
    assert (p.sampling.num_samples, p.sampling.rescue) == (0, False)


def test_bft_of_the_paper_trains_one_adapter_on_zero_shot_prompts_of_runs_that_passed() -> None:
    w = LoRAFinetune.paper(parity_match)
    assert (w.lora, w.training) == (LoRAConfig.paper(), TrainingConfig.paper())
    assert (w.sampling.num_samples, w.sampling.rescue, w.sampling.sample_passing) == (0, False, False)
    assert (w.rows.train_prompt, w.rows.balance) == ("vanilla", False)
    assert (w.multitask, w.start_from, w.validation_share, w.threshold) == (True, "base", 0.0, None)
