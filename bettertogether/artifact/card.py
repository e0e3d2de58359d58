"""The README.md of a saved program: a model card that says what it is, how good, from what, and how to use it.

Its front matter is that of the Hugging Face hub (hub-docs, modelcard.md). People may edit it: `load` does not read it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import dspy

from ..printable import one_line
from ..records import ARROW, DataCard, PolicyDetails, StepRecord, WeightDetails, count_text
from ..report.report import CompileReport
from ..report.view import ReportView, RoundView, view_of
from ..training.adapter_settings import CONFIG_FILE

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_SHOWN_DEMOS = 3
_MOST_TEXT = 2_000
"""Characters of a prompt's part that are shown."""
_VLLM_RANKS = (64, 128, 256, 320, 512)
"""Values that vLLM takes for --max-lora-rank, from the usual one on."""


def model_card(
    manifest: Mapping[str, Any], report: CompileReport | None, repo: str | None = None, folder: Path = Path()
) -> str:
    """The card of a program, from its manifest and, where it was compiled, its report. In Markdown; `repo` is the hub
    repository that it is for, if any, and `folder` that of the manifest."""
    view = None if report is None else view_of(report)
    parts = [_front_matter(manifest), _title(manifest, view), *_use(manifest, repo, folder)]
    if view is not None:
        parts += [*_scores(view), *_training(view)]
    parts += [*_prompts(manifest), _origin(manifest)]
    return "\n\n".join(parts) + "\n"


def _locals(manifest: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [record for record in manifest["lms"].values() if record["kind"] == "local"]


def _tuned(manifest: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [record for record in _locals(manifest) if record["adapter"]]


def _hub_id(record: Mapping[str, Any]) -> str | None:
    """That of an LM's base; None for one in a folder, whose path is of this machine alone."""
    base = record["base"]
    return base if _HUB_ID.fullmatch(base) and not Path(base).exists() else None


def _front_matter(manifest: Mapping[str, Any]) -> str:
    bases = sorted({hub_id for record in _locals(manifest) if (hub_id := _hub_id(record))})
    tuned = _tuned(manifest)
    lines = ["library_name: peft" if tuned else "library_name: dspy"]
    if bases:
        lines += ["base_model:", *(f"- {base}" for base in bases)]
    lines += ["tags:", "- dspy", "- bettertogether", *(["- lora"] if tuned else [])]
    return "\n".join(["---", *lines, "---"])


def _title(manifest: Mapping[str, Any], view: ReportView | None) -> str:
    name = manifest["program"].rpartition(":")[2].rpartition(".")[2]
    bases = ", ".join(sorted({_span(record["base_name"]) for record in _locals(manifest)}))
    tuned = [*(["tuned prompts"] if _has_new_prompts(view) else []), *(["LoRA weights"] if _tuned(manifest) else [])]
    text = f"# {name}\n\nA DSPy program of {count_text(len(manifest['predictors']), 'predictor')}"
    text += f" with {' and '.join(tuned)}" if tuned else ""
    text += f", on {bases}" if bases else ""
    if view is None:
        return f"{text}."
    chosen = view.selected
    made = "made by" if chosen.record.strategy else "left as it was by"
    text += f", {made} the strategy {_span(view.report.strategy)}. "
    if chosen.score == "-":
        return f"{text}It was not scored."
    gain = f", {chosen.gain_text} against the program before" if chosen.gain_text not in ("", "-") else ""
    return f"{text}Score: {chosen.score} on {view.examples}{gain}."


def _has_new_prompts(view: ReportView | None) -> bool:
    return view is not None and view.report.selected_round.program != view.report.student_round.program


def _use(manifest: Mapping[str, Any], repo: str | None, root: Path) -> Iterator[str]:
    place = "FOLDER" if repo is None else repo.rpartition("/")[2]
    download = [] if repo is None else [f'snapshot_download("{repo}", local_dir="{place}")']
    yield "## Use"
    yield _code(
        "python",
        "import dspy",
        "from bettertogether import load",
        *(["from huggingface_hub import snapshot_download"] if download else []),
        "",
        *download,
        configure_call(manifest["adapter"]),
        f'program = load("{place}")  # of a class of your own: load("{place}", into=YourProgram())',
    )
    for record in _tuned(manifest):
        folder, base = record["adapter"], _hub_id(record) or "BASE"
        where = f", where BASE is the folder of {_span(record['base_name'])}" if base == "BASE" else ""
        yield f"The adapter `{folder}` is a plain PEFT folder. In peft, and behind vLLM's OpenAI server{where}:"
        yield _code(
            "python",
            "from peft import PeftModel",
            "from transformers import AutoModelForCausalLM",
            "",
            f'model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("{base}"), "{place}/{folder}")',
        )
        served = f"--enable-lora --max-lora-rank {_most_rank(root / folder)} --lora-modules tuned={place}/{folder}"
        yield _code("shell", f"vllm serve {base} {served}")


def _most_rank(adapter: Path) -> int:
    """What vLLM's --max-lora-rank has to be for it."""
    path = adapter / CONFIG_FILE
    rank: int = json.loads(path.read_bytes())["r"] if path.is_file() else 0
    return next((most for most in _VLLM_RANKS if most >= rank), rank)


def configure_call(prompt_adapter: str) -> str:
    """The code that puts a prompt adapter in force; one of the user's own is called as they have it."""
    place = "dspy." if hasattr(dspy, prompt_adapter) else ""
    return f"dspy.configure(adapter={place}{prompt_adapter}())"


def _scores(view: ReportView) -> Iterator[str]:
    scored = sum(each.score != "-" for each in view.rounds)
    if not scored:
        return
    yield "## Scores"
    header = ["round", "score", "95% interval", "gain over the first", "examples", ""]
    rows = [_score_row(view, each) for each in view.rounds]
    yield _table(header, rows)
    cells = view.two_by_two
    if cells is not None:
        means = cells.means
        before, after = [means["base_old"], means["base_new"]], [means["tuned_old"], means["tuned_new"]]
        rows = [["weights before", *before], ["weights after", *after]]
        if cells.other_round:
            yield f"Of {_span(cells.other_round)}, which is not the round returned:"
        yield _table(["", "prompts before", "prompts after"], rows)
        yield (
            f"From the weights {cells.weights.text}, from the prompts {cells.prompts.text}, from both together beyond "
            f"the sum of each alone {cells.both.text}."
        )
    if scored > 1:
        yield "These examples chose the round, so its score is a little too good: test on examples of your own."


def _score_row(view: ReportView, each: RoundView) -> list[str]:
    low, high = each.interval
    known = each.score != "-" and low == low
    interval = f"{view.report.number(low)} to {view.report.number(high)}" if known else "-"
    return [_span(each.name), each.score, interval, each.gain_text, each.examples, "returned" if each.selected else ""]


def _training(view: ReportView) -> Iterator[str]:
    steps = _trainings(view.report.rounds, view.report.selected_round)
    if not steps:
        return
    yield "## Training data"
    for record, card in steps:
        yield f"{_span(record.name)}: {_data(card)} {record.ledger.trained_tokens:,} tokens trained on."


def _trainings(rounds: Sequence[StepRecord], last: StepRecord) -> list[tuple[StepRecord, DataCard]]:
    """The steps whose rows the adapters of a round were trained on, in order: its own, and those before that it goes
    on from."""
    before = [each for each in rounds if f"{last.strategy}{ARROW}".startswith(f"{each.strategy}{ARROW}")]
    used, found = set(last.models.values()), list[tuple[StepRecord, DataCard]]()
    for parent, record in reversed(list(pairwise([rounds[0], *before]))):
        details, earlier = record.details, parent.models
        if not isinstance(details, WeightDetails | PolicyDetails):
            # Such as an adapter at another strength.
            used |= {earlier[name] for name, model in record.models.items() if model in used and name in earlier}
            continue
        trained = used & details.adapters.keys()
        starts = {details.adapters[model].trained_from for model in trained}
        used |= {model for name, model in earlier.items() if starts & {model, f"{model} {name}"}}
        if trained and isinstance(details, WeightDetails):
            found.insert(0, (record, details.data_card))
    return found


def _data(card: DataCard) -> str:
    rows, kind = sum(card.kept_by_predictor.values()), "answer pair" if card.pairs else "row"
    sources = ", ".join(f"{count} {_span(source)}" for source, count in card.kept_by_source.items())
    labels = ", ".join(f"{count} {_span(label)}" for label, count in card.kept_by_label.items())
    text = count_text(rows, kind)
    if card.examples:
        text += f" from runs on {count_text(card.examples, 'example')}, {card.examples_covered} of which gave any"
    text += f"; by source: {sources}"
    return f"{text}; by label: {labels}." if labels else f"{text}."


def _prompts(manifest: Mapping[str, Any]) -> Iterator[str]:
    prompts = {name: entry for name, entry in manifest["predictors"].items() if entry.get("fields") is not None}
    if prompts:
        yield "## Prompts"
    for name, entry in prompts.items():
        demos = entry["state"]["demos"]
        yield f"### {_span(name)}\n\n{_fields(entry['fields'], 'input')} -> {_fields(entry['fields'], 'output')}"
        yield _code("text", _cut(str(entry["state"]["signature"]["instructions"])) or "(no instructions)")
        if demos:
            shown = f"the first {_SHOWN_DEMOS} of {len(demos)}" if len(demos) > _SHOWN_DEMOS else str(len(demos))
            yield f"Demos ({shown}):"
        for demo in demos[:_SHOWN_DEMOS]:
            yield _code("json", _cut(json.dumps(demo, ensure_ascii=False, indent=2)))


def _fields(fields: Sequence[Mapping[str, Any]], kind: str) -> str:
    return ", ".join(_span(f"{field['name']}: {field['type']}") for field in fields if field["kind"] == kind)


def _origin(manifest: Mapping[str, Any]) -> str:
    packages = ", ".join(f"{name} {version}" for name, version in manifest["versions"].items() if version)
    return (
        "Made by [BetterTogether](https://arxiv.org/abs/2407.10930) (prompt optimization and LoRA fine-tuning by turns "
        f"over one program), saved {manifest['created']} with {packages}."
    )


def _table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


def _span(text: str) -> str:
    """A text within a line, in which nothing is Markdown or HTML."""
    text, fence = one_line(text), _fence(text, 1)
    space = " " if not text or "`" in (text[0], text[-1]) else ""
    return f"{fence}{space}{text}{space}{fence}"


def _fence(text: str, least: int) -> str:
    """One longer than any in the text, so that nothing in it ends the code."""
    return "`" * max(least, 1 + max((len(run) for run in re.findall("`+", text)), default=0))


def _code(language: str, *lines: str) -> str:
    text = "\n".join(lines)
    fence = _fence(text, 3)
    return f"{fence}{language}\n{text}\n{fence}"


def _cut(text: str) -> str:
    return text if len(text) <= _MOST_TEXT else f"{text[:_MOST_TEXT]}\n... ({len(text):,} characters in all)"
