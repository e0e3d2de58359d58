"""Where the paper's examples get data and passages from, and what they say of bad input."""

from __future__ import annotations

import argparse
import json
import sys
import threading
import time
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import datasets
import dspy
import gsm8k
import hotpotqa
import hub_files
import iris
import pytest
import search
import two_hops
from search import Bm25, ColBERT, Passage, search_among, search_over


def failure(module: Any, *arguments: str) -> str:
    with pytest.raises(SystemExit) as caught:
        module.main(["--limit", "4", *arguments])
    return str(caught.value)


def test_without_a_network_and_without_data_the_error_names_the_argument(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*arguments: Any, **options: Any) -> Any:
        raise ConnectionError("no route to host")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    for module, hub_id in ((gsm8k, "openai/gsm8k"), (hotpotqa, "hotpotqa/hotpot_qa")):
        text = failure(module)
        assert f"{hub_id} (" in text
        assert "give its files with --data FOLDER, as the hub has them" in text


def test_the_hub_is_asked_for_the_papers_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def load_dataset(hub_id: str, config: str, split: str) -> datasets.Dataset:
        asked.append((hub_id, config, split))
        return datasets.Dataset.from_list([hub_files.problem(number) for number in range(5)])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    rows = gsm8k.load(argparse.Namespace(limit=2, data=None))
    assert asked == [("openai/gsm8k", "main", "train"), ("openai/gsm8k", "main", "test")]
    assert [len(part) for part in rows] == [2, 2, 2]


def test_a_missing_column_is_named_with_those_there_are(tmp_path: Path) -> None:
    rows = [{"prompt": "one?", "answer": "#### 1"}] * 3
    for split in ("train", "test"):
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert failure(gsm8k, "--data", str(tmp_path)) == (
        f"{tmp_path}: split 'train' has no column 'question', it has ['prompt', 'answer']. Give the columns that "
        "openai/gsm8k has on the hub: ['question', 'answer']."
    )


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (b"4.9", "split 'train' has no 'Species' in row 2: complete it, or leave it out."),
        (b"4.9,\xe9", "the files of split 'train' can't be read: 'utf-8' codec can't decode byte 0xe9 in position 0"),
    ],
)
def test_a_file_with_a_row_that_can_t_be_read_is_told(tmp_path: Path, row: bytes, words: str) -> None:
    header = ",".join(iris.FIELDS.values())
    (tmp_path / "Iris.csv").write_bytes(f"{header}\n1,1,1,5.1,a\n1,1,1,".encode() + row)
    assert failure(iris, "--data", str(tmp_path)).startswith(f"{tmp_path}: {words}")


def test_a_wrong_split_name_is_told_with_the_files_there_are(tmp_path: Path) -> None:
    hub_files.gsm8k(tmp_path)
    (tmp_path / "main/test-00000-of-00001.parquet").rename(tmp_path / "main/dev.parquet")
    assert failure(gsm8k, "--data", str(tmp_path)) == (
        f"{tmp_path}: split 'test' is not there. Expected: files test*.parquet, .jsonl, .json or .csv, in the folder "
        "or in its folder 'main'. Found: dev.parquet, train-00000-of-00001.parquet."
    )
    assert "Found: no such file." in failure(gsm8k, "--data", str(tmp_path / "nowhere"))


def test_an_answer_without_a_number_is_shown(tmp_path: Path) -> None:
    rows = [{"question": f"{number}?", "answer": "many"} for number in range(4)]
    for split in ("train", "test"):
        hub_files.parquet(tmp_path / f"main/{split}-00000-of-00001.parquet", rows, hub_files.GSM8K)
    assert "has the answer 'many', which has no number" in failure(gsm8k, "--data", str(tmp_path))


def test_gsm8k_examples_have_the_number_after_the_hashes_as_their_answer() -> None:
    examples = gsm8k.examples(datasets.Dataset.from_list([hub_files.problem(1)]))
    assert [(example.answer, set(example.inputs())) for example in examples] == [("11", {"question"})]


def test_hard_questions_alone_are_asked(tmp_path: Path) -> None:
    options = argparse.Namespace(limit=30, data=str(hub_files.hotpotqa(tmp_path)), passages=None, drop_missing=False)
    rows, _ = hotpotqa.load(options)
    assert [len(part) for part in rows] == [9, 9, 8]
    assert "easy" not in {name for part in rows for name in part["id"]}
    assert set(rows[0]["id"]).isdisjoint(rows[1]["id"])


def test_a_question_without_gold_passages_is_named_and_may_be_dropped(tmp_path: Path) -> None:
    data = hub_files.hotpotqa(tmp_path / "data")
    unknown = hub_files.questions(8, seed=1)[1]
    missing = unknown["supporting_facts"]["title"][1]
    passages = tmp_path / "passages.jsonl"
    lines = [{"title": title, "text": two_hops.sentences(title)} for title in two_hops.world() if title != missing]
    passages.write_text("".join(json.dumps(line) + "\n" for line in lines))
    text = failure(hotpotqa, "--data", str(data), "--passages", str(passages), "--limit", "30")
    assert text.startswith(f"Question {unknown['id']!r} has no gold passages: {missing!r} is not in the collection; so")
    options = argparse.Namespace(limit=30, data=str(data), passages=str(passages), drop_missing=True)
    dropped = hotpotqa.load(options)[0]
    assert [len(part) for part in dropped] == [9, 9, 7]


def test_questions_that_name_no_gold_passages_are_refused(tmp_path: Path) -> None:
    row = {**two_hops.rows(1)[0], "supporting_facts": {"title": [], "sent_id": []}}
    rows = datasets.Dataset.from_list([row], features=hub_files.HOTPOTQA)
    with pytest.raises(SystemExit, match="Question 'made-00000' has no gold passages: it names none; so for 1 of 1"):
        hotpotqa._with_gold(rows, None, drop=True)


def test_an_empty_folder_of_passages_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"there are no passages\. Give a JSONL file with a passage a line"):
        search_over(str(tmp_path))
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(SystemExit, match="all passages are empty"):
        search_over(str(tmp_path))


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        (
            "a.jsonl",
            b'{"title": "A"}',
            """a.jsonl, line 1: '{"title": "A"}' is no passage: give {"title": ..., "text": ...""",
        ),
        ("a.jsonl", b'{"text": "B"}\n{"text": null}', "a.jsonl, line 2: '{\"text\": null}' is no passage: give"),
        ("a.jsonl", b'{"text": [1, 2]}', "a.jsonl, line 1: '{\"text\": [1, 2]}' is no passage: give"),
        (
            "a.jsonl",
            '{"text": "né"}'.encode("latin-1"),
            "a.jsonl is not in UTF-8 ('utf-8' codec can't decode byte 0xe9",
        ),
        ("a.txt", "né".encode("latin-1"), "a.txt is not in UTF-8 ('utf-8' codec can't decode byte 0xe9"),
    ],
)
def test_what_is_no_passage_is_told_with_its_place(tmp_path: Path, name: str, content: bytes, words: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(SystemExit) as refused:
        search_over(str(tmp_path))
    assert words in str(refused.value)


def test_passages_come_from_files_of_each_kind_with_their_titles(tmp_path: Path) -> None:
    (tmp_path / "wiki.jsonl").write_text(
        '{"title": "Corham", "text": ["Corham is a town.", " It lies on the Dove."]}\n'
    )
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes/Esk.txt").write_text("A river in the north.\n")
    found = search_over(str(tmp_path))
    assert isinstance(found, Bm25)
    assert found.titles() == {"Corham", "Esk"}
    assert found("which town lies on the Dove", 3) == ["Corham | Corham is a town. It lies on the Dove."]
    assert found("northern river", 1) == ["Esk | A river in the north."]
    assert found("", 3) == found("nowhere", 3) == []


def test_a_passage_without_a_title_is_its_text_and_a_byte_order_mark_is_none_of_it(tmp_path: Path) -> None:
    (tmp_path / "wiki.jsonl").write_text('{"title": null, "text": "A town."}\n', encoding="utf-8-sig")
    (tmp_path / "Esk.txt").write_text("A river.", encoding="utf-8-sig")
    found = search_over(str(tmp_path))
    assert (found("town", 1), found("river", 1)) == (["A town."], ["Esk | A river."])


def test_an_index_is_built_once_and_known_by_what_is_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    first = search_among([Passage("A", "apples"), Passage("B", "pears")])
    with monkeypatch.context() as patch:
        patch.setattr(search, "_bm25s", lambda: pytest.fail("built again"))
        assert search_among([Passage("A", "apples"), Passage("B", "pears")]) == first
    assert search_among([Passage("A", "apples")]) != first


def test_a_build_that_is_stopped_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    indexes = Bm25("any").folder.parent

    def stopped(value: Any) -> str:
        assert len(list(indexes.iterdir())) == 1
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(search, "json", types.SimpleNamespace(dumps=stopped))
        with pytest.raises(KeyboardInterrupt):
            search_among([Passage("A", "apples")])
    assert list(indexes.iterdir()) == []
    assert search_among([Passage("A", "apples")])("apples", 1) == ["A | apples"]


def test_an_index_is_opened_once_for_threads_that_search_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[Path] = []

    class SlowIndex(search._Index):
        def __init__(self, folder: Path) -> None:
            opened.append(folder)
            time.sleep(0.05)
            super().__init__(folder)

    monkeypatch.setattr(search, "_Index", SlowIndex)
    found = search_among([Passage("A", "apples"), Passage("B", "pears")])
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(found, ["apples"] * 8, [1] * 8)) == [["A | apples"]] * 8
    assert opened == [found.folder]


def test_of_equally_good_passages_the_first_are_found_after_better_ones() -> None:
    alike = [Passage(str(number), "apples and pears") for number in range(10, 50)]
    found = search_among([*alike, Passage("best", "pears")])
    assert found("pears", 4) == ["best | pears", *map(str, alike[:3])]
    assert found("pears", 0) == found("plums", 4) == []
    assert len(found("pears", 99)) == 41


def test_threads_rank_passages_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    found = search_among([Passage("A", "apples"), Passage("B", "pears")])
    index = search._opened(found.folder)._index
    both, rank = threading.Barrier(2, timeout=20), index.get_scores

    def get_scores(words: list[str], **options: Any) -> Any:
        both.wait()
        return rank(words, **options)

    monkeypatch.setattr(index, "get_scores", get_scores)
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(found, ["apples", "pears"], [1, 1])) == [["A | apples"], ["B | pears"]]


def test_without_bm25s_the_error_has_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bm25s", None)
    with pytest.raises(SystemExit, match=r"pip install 'bettertogether\[examples\]'"):
        search_among([Passage("A", "apples")])


def test_a_colbert_server_is_asked_as_dspy_asks_it(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    class Server:
        def __init__(self, url: str) -> None:
            asked.append(url)

        def __call__(self, query: str, k: int, simplify: bool) -> list[str]:
            asked.append((query, k, simplify))
            return ["A | apples"]

    monkeypatch.setattr(dspy, "ColBERTv2", Server)
    found = search_over("http://colbert:2017/wiki17_abstracts")
    assert found == ColBERT("http://colbert:2017/wiki17_abstracts")
    assert found("apples", 3) == ["A | apples"]
    assert asked[2:] == ["http://colbert:2017/wiki17_abstracts", ("apples", 3, True)]


def test_a_server_that_does_not_answer_is_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(url: str) -> Any:
        raise ConnectionError("refused")

    monkeypatch.setattr(dspy, "ColBERTv2", refuse)
    with pytest.raises(SystemExit, match=r"no answer as a ColBERTv2 server gives it \(ConnectionError: refused\)"):
        search_over("http://colbert:2017")


def test_the_made_world_has_different_questions_whose_answers_stand_in_their_gold_passages() -> None:
    rows = two_hops.rows(3000)
    assert len({row["question"] for row in rows}) == 3000
    assert {row["type"] for row in rows} == {"bridge", "comparison"}
    for row in rows[:300]:
        texts = {title: " ".join(two_hops.sentences(title)) for title in row["supporting_facts"]["title"]}
        assert set(texts) <= set(row["context"]["title"])
        assert len(set(row["context"]["title"])) == two_hops.PARAGRAPHS
        assert row["answer"] in " ".join(texts.values())
    assert two_hops.rows(5) == rows[:5]


def test_made_questions_need_no_files() -> None:
    options = argparse.Namespace(limit=5, data="made", passages=None, drop_missing=False)
    rows, found = hotpotqa.load(options)
    assert [len(part) for part in rows] == [5, 5, 5]
    title = rows[0][0]["supporting_facts"]["title"][0]
    assert any(passage.startswith(f"{title} | ") for passage in found(title, 3))


def test_problems_of_reasoning_gym_are_different_ones_in_three_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    def create_dataset(name: str, size: int, seed: int) -> list[dict[str, str]]:
        assert name == "gsm_symbolic"
        return [{"question": f"{seed + number // 2}?", "answer": f"{seed + number // 2}"} for number in range(size)]

    monkeypatch.setitem(sys.modules, "reasoning_gym", types.SimpleNamespace(create_dataset=create_dataset))
    parts = gsm8k.load(argparse.Namespace(limit=4, data="reasoning-gym"))
    questions = [question for part in parts for question in part["question"]]
    assert len(questions) == len(set(questions)) == 12
    assert parts[0]["answer"] == [question.removesuffix("?") for question in parts[0]["question"]]


def test_without_reasoning_gym_the_error_has_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    assert "--data reasoning-gym needs the package: pip install reasoning-gym." in failure(
        gsm8k, "--data", "reasoning-gym"
    )


def test_flowers_are_the_same_from_scikit_learn_and_from_the_hubs_file(tmp_path: Path) -> None:
    flowers = iris.flowers(None)
    assert (len(flowers), flowers[0].toDict()) == (
        150,
        {"sepal_length": 5.1, "sepal_width": 3.5, "petal_length": 1.4, "petal_width": 0.2, "answer": "setosa"},
    )
    from_file = iris.flowers(str(hub_files.iris(tmp_path) / "Iris.csv"))
    assert (len(from_file), from_file[0].toDict().keys(), from_file[-1].answer) == (
        24,
        flowers[0].toDict().keys(),
        "virginica",
    )


def test_too_few_flowers_are_told_with_the_sizes(tmp_path: Path) -> None:
    text = failure(iris, "--data", str(hub_files.iris(tmp_path)), "--limit", "10")
    assert text == "There are 24 flowers for 10 + 10 + 10: give all 150 of the hub's file, or a lower --limit."
