"""Write examples/quickstart.ipynb: the quickstart in cells, run from top to bottom, with what they showed.

    pip install -e '.[structured,notebook]' && python tests/benchmarks/notebook.py

The cells are below; change them here and write the notebook anew. `--model` and `--sizes` make a small one elsewhere.
"""

from __future__ import annotations

import argparse
import os
import re
from dataclasses import dataclass
from pathlib import Path

EXAMPLES = Path(__file__).parents[2] / "examples"
NOTEBOOK = EXAMPLES / "quickstart.ipynb"
SETTINGS = "model, sizes = default_model(), (32, 40, 200)"

CELLS = """
# %% [markdown]
# A model teaches itself to tell positive from negative messages

A language model of 135M parameters, on two CPU cores, no GPU and no server: prompt optimization and LoRA fine-tuning
take turns on a DSPy program, and every round is scored on messages that it has not learned from. This is
`quickstart.py` in cells, as `tests/benchmarks/notebook.py` ran it.

    pip install 'torch==2.13.*' '.[structured]' jupyterlab
# %%
import os
import time

import dspy
from tasks import Sentiment, sentiment_data, sentiment_match

import bettertogether
from bettertogether import (
    BetterTogether,
    BootstrapFewShotRS,
    LoRAFinetune,
    TrainingConfig,
    compare,
    default_model,
    evaluate,
    local_lm,
)

started = time.monotonic()
# Messages to learn from, to choose the best round by, and to test on.
model, sizes = default_model(), (32, 40, 200)
f"bettertogether {bettertogether.__version__}, {os.cpu_count()} CPU cores"
# %% [markdown]
## The task

An ordinary DSPy signature and an ordinary metric. The messages were labelled by crowd workers.
# %%
trainset, valset, testset = sentiment_data(*sizes, seed=0)
for example in trainset[:4]:
    print(f"{example.sentiment}: {example.text}")
# %% [markdown]
## The untouched model

`local_lm` is a `dspy.LM` that runs the model in this process. With `JSONAdapter`, the answer follows the types of the
signature token by token: it is "positive" or "negative", and nothing else.
# %%
dspy.configure(adapter=dspy.JSONAdapter())
dspy.configure_cache(enable_disk_cache=False)  # an answer of yesterday's would take no time
student = dspy.Predict(Sentiment)
student.set_lm(local_lm(model, max_tokens=64))

untouched = evaluate(student, testset, sentiment_match)
print(compare({"untouched": untouched}))
# %% [markdown]
## Prompt, weights, prompt

`p` looks for demos among the program's own right runs; `w` trains a LoRA adapter on them; then `p` once more, for the
weights that there are now. Each round is scored on the validation messages, and the best program is returned.
# %%
compiled = BetterTogether(
    sentiment_match,
    p=BootstrapFewShotRS(sentiment_match),
    w=LoRAFinetune(sentiment_match, training=TrainingConfig(epochs=3)),
).compile(student, trainset=trainset, valset=valset, strategy="p -> w -> p", progress=False)
compiled.report
# %% [markdown]
## On messages that no step has seen
# %%
print(compare({"untouched": untouched, "compiled": evaluate(compiled, testset, sentiment_match)}))
# %% [markdown]
The student is as it was, and both answer side by side: one copy of the base weights serves all adapters.
# %%
message = "two hours in line and then they had run out of everything"
print("student: ", student(text=message).sentiment)
print("compiled:", compiled(text=message).sentiment)
print("model:   ", compiled.lm.model)
print("demos:   ", len(compiled.demos))
print(f"\\n{(time.monotonic() - started) / 60:.1f} minutes")
"""


@dataclass(frozen=True)
class Cell:
    """One cell of the notebook."""

    kind: str
    """"markdown" or "code"."""
    text: str


def cells(settings: str = SETTINGS) -> list[Cell]:
    """The cells, in order, with other settings."""
    parts = re.split(r"^# %%(.*)\n", CELLS.replace(SETTINGS, settings), flags=re.MULTILINE)[1:]
    kinds = ["markdown" if "markdown" in mark else "code" for mark in parts[::2]]
    return [Cell(kind, text.strip()) for kind, text in zip(kinds, parts[1::2], strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=NOTEBOOK)
    parser.add_argument("--model", help="folder or hub id of another model")
    parser.add_argument("--sizes", type=int, nargs=3, default=(32, 40, 200), metavar=("TRAIN", "VAL", "TEST"))
    arguments = parser.parse_args()
    model = repr(arguments.model) if arguments.model else "default_model()"
    text = executed(cells(f"model, sizes = {model}, {tuple(arguments.sizes)}"))
    arguments.out.write_text(text, encoding="utf-8")


def executed(content: list[Cell]) -> str:
    """The notebook as JSON, with the outputs of its cells. Raises nbclient's CellExecutionError for one that fails."""
    import nbclient
    import nbformat

    made = {"markdown": nbformat.v4.new_markdown_cell, "code": nbformat.v4.new_code_cell}
    notebook = nbformat.v4.new_notebook(
        cells=[made[cell.kind](cell.text, id=f"cell-{place}") for place, cell in enumerate(content)]
    )
    # Bars that load weights and the warning of tqdm that they are only text, with the path of its file.
    os.environ |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "PYTHONWARNINGS": "ignore"}
    nbclient.NotebookClient(notebook, timeout=None, resources={"metadata": {"path": str(EXAMPLES)}}).execute()
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
    return nbformat.writes(notebook).replace(str(Path.home()), "~") + "\n"


if __name__ == "__main__":
    main()
