"""The paper's HotPotQA: two hops of search, then an answer (section 5), by all eight strategies beside Table 1.

    pip install '.[structured,examples]'
    python examples/paper/hotpotqa.py --model meta-llama/Meta-Llama-3-8B-Instruct

Questions: hotpotqa/hotpot_qa from the hub, the hard ones; or `--data FOLDER` with its files
(`distractor/train-00000-of-00002.parquet` and so on); or `--data made`, a small world written by two_hops.py.
Passages: `--passages` takes a JSONL file or a folder of passages, such as the wiki-2017 abstracts
(wiki.abstracts.2017.jsonl: {"title": ..., "text": [sentence, ...]} a line), or the address of a ColBERTv2 server.
Without it the search goes over the paragraphs that come with the questions.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import datasets
import dspy
import two_hops
from experiment import Task, exact_match, parser, run
from hub import parts, rows_of
from search import Bm25, Passage, Search, search_among, search_over

from bettertogether import examples_from

TASK = Task("HotPotQA", exact_match, "answer exact match", (1000, 500, 1500))
HUB_ID = "hotpotqa/hotpot_qa"
COLUMNS = ("id", "question", "answer", "level", "supporting_facts", "context")
MADE = "made"


class MultiHop(dspy.Module):
    """Two searches, each with a query of its own predictor, and an answer from what they found."""

    def __init__(self, search: Search, passages: int = 3) -> None:
        super().__init__()
        self.search = search
        self.passages = passages
        self.queries = [dspy.ChainOfThought("context, question -> search_query") for _ in range(2)]
        self.answer = dspy.ChainOfThought("context, question -> answer")

    def forward(self, question: str) -> dspy.Prediction:
        """Answer and the passages that it comes from."""
        context: list[str] = []
        for write_query in self.queries:
            query = write_query(context=context, question=question).search_query
            context = list(dict.fromkeys([*context, *self.search(str(query), self.passages)]))
        return dspy.Prediction(context=context, answer=self.answer(context=context, question=question).answer)


def load(options: argparse.Namespace) -> tuple[list[datasets.Dataset], Search]:
    """Rows to train on, to choose on and of the test, and the search."""
    train, dev, test = TASK.limited(options.limit)
    learning, testing = (_hard_rows(options, split) for split in ("train", "validation"))
    rows = [*parts(learning, (train, dev)), *parts(testing, (test,))]
    if options.passages:
        search = search_over(options.passages)
        titles = search.titles() if isinstance(search, Bm25) else None
    else:
        passages = {
            title: " ".join(map(str.strip, sentences))
            for part in rows
            for row in part
            for title, sentences in zip(row["context"]["title"], row["context"]["sentences"], strict=True)
        }
        search, titles = search_among([Passage(*pair) for pair in passages.items()]), set(passages)
    return [_with_gold(part, titles, options.drop_missing) for part in rows], search


def _hard_rows(options: argparse.Namespace, split: str) -> datasets.Dataset:
    """As dspy.datasets.HotPotQA has it: hard questions, of which all of the hub's validation split are."""
    if options.data == MADE:
        train, dev, test = TASK.sizes
        made = two_hops.rows(train + dev + test)
        return datasets.Dataset.from_list(made[: train + dev] if split == "train" else made[train + dev :])
    # The paragraphs of "fullwiki" are what somebody's search found; those of "distractor" have the right ones.
    config = "fullwiki" if options.passages else "distractor"
    rows = rows_of(HUB_ID, config, split, options.data, COLUMNS)
    hard = rows.select([place for place, level in enumerate(rows["level"]) if level == "hard"])
    if not len(hard):
        raise SystemExit(f"Split {split!r} has no question of level 'hard': give the files of {HUB_ID}.")
    return hard


def _with_gold(rows: datasets.Dataset, titles: set[str] | None, drop: bool) -> datasets.Dataset:
    """The rows whose supporting passages can be found. `titles`: those of the collection, where they are known."""
    problems = [_lacking(facts["title"], titles) for facts in rows["supporting_facts"]]
    kept = [place for place, problem in enumerate(problems) if problem is None]
    if len(kept) < len(rows) and not (drop and kept):
        place = next(place for place, problem in enumerate(problems) if problem)
        raise SystemExit(
            f"Question {rows[place]['id']!r} has no gold passages: {problems[place]}; so for {len(rows) - len(kept)} "
            f"of {len(rows)} questions. Give the collection that the questions were written for with --passages, and "
            "the hub's splits train and validation (its test has no answers); or leave these out with --drop-missing."
        )
    return rows.select(kept)


def _lacking(gold: Sequence[str], titles: set[str] | None) -> str | None:
    """What is wrong with a question's gold passages."""
    if not gold:
        return "it names none"
    return next(
        (f"{title!r} is not in the collection" for title in gold if titles is not None and title not in titles), None
    )


def main(arguments: Sequence[str] | None = None, lm: dspy.LM | None = None) -> str:
    """Run the script; `lm` instead of the model."""
    command = parser(TASK, __doc__)
    command.add_argument("--passages", help="JSONL file, folder, or address of a ColBERTv2 server; see above")
    command.add_argument("--drop-missing", action="store_true", help="leave questions out whose passages are missing")
    options = command.parse_args(arguments)
    rows, search = load(options)
    # So that a run directory is refused where the same place has other passages now.
    options.search = repr(search)
    train, dev, test = (examples_from(part.select_columns(["question", "answer"]), ["question"]) for part in rows)
    return run(TASK, options, MultiHop(search), (train, dev, test), lm)


if __name__ == "__main__":
    main()
