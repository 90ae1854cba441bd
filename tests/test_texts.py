"""Texts become rows of tokens in one role each; what cannot be read as rows is refused by name."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import BertTokenizer

from conftest import WORDS, Sentiment, make_tokenizer, tiny_bert, write_sentiment_rows
from rmtkd import artifact, recipes
from rmtkd.errors import DataError
from rmtkd.recipes import TokenRows
from rmtkd.recipes.groups import part_of
from rmtkd.recipes.published import TASKS
from rmtkd.recipes.recipe import Rows, Source

NO_MODEL = Source(model=torch.nn.Identity())


def source(tokenizer: Any = None) -> Source:
    """A tiny model with a tokenizer of a few words."""
    return Source(model=tiny_bert(labels=2), tokenizer=tokenizer or make_tokenizer())


def texts(rows: TokenRows) -> list[tuple[int, ...]]:
    """All rows of one pass as token ids without padding."""
    return [
        tuple(ids[mask.bool()].tolist())
        for batch in rows
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    ]


# SST-2


def words(part: TokenRows) -> list[str]:
    tokenizer = make_tokenizer()
    return [str(tokenizer.decode(list(ids), skip_special_tokens=True)) for ids in part.ids]


def load_sentiment(data: Path, seed: int = 0) -> Rows:
    return recipes.get("sst2").rows(data, source(), seed)


def test_roles_are_disjoint_by_text_and_complete(sentiment: Sentiment):
    rows = load_sentiment(sentiment.data)
    train, selection, report = (set(words(part)) for part in (rows.train, rows.selection, rows.report))
    assert not train & selection and not train & report and not selection & report
    assert selection and all(part_of(text) == 0 for text in selection)
    written = set(pq.read_table(sentiment.data / "sst2_train.parquet")["text"].to_pylist())
    assert train | selection == written - report
    assert report == set(pq.read_table(sentiment.data / "sst2_dev.parquet")["text"].to_pylist())


def test_a_repeated_text_has_one_role(tmp_path: Path):
    generator = np.random.default_rng(0)
    phrases = [" ".join(generator.choice(WORDS, 6)) for _ in range(100)]
    assert 0 in map(part_of, phrases)
    pq.write_table(pa.table({"text": phrases * 3, "label": [0, 1] * 150}), tmp_path / "sst2_train.parquet")
    pq.write_table(pa.table({"text": phrases[:10], "label": [0, 1] * 5}), tmp_path / "sst2_dev.parquet")
    rows = load_sentiment(tmp_path)
    train, selection, report = (words(part) for part in (rows.train, rows.selection, rows.report))
    assert not set(train) & set(selection)
    assert sorted(report) == sorted(phrases[:10])
    assert sorted(train + selection) == sorted(text for text in phrases * 3 if text not in report)


def test_held_out_texts_are_the_same_for_every_seed(sentiment: Sentiment):
    first, other = load_sentiment(sentiment.data, 0), load_sentiment(sentiment.data, 7)
    assert words(first.selection) == words(other.selection)
    assert words(first.report) == words(other.report)
    assert texts(first.train) != texts(other.train)
    assert sorted(texts(first.train)) == sorted(texts(other.train))


def test_texts_are_cut_to_what_the_model_allows(sentiment: Sentiment):
    tokenizer = make_tokenizer()
    tokenizer.model_max_length = 6
    rows = recipes.get("sst2").rows(sentiment.data, source(tokenizer), 0)
    assert rows.report.lengths.max() == 6


def test_too_few_rows_for_a_role_are_refused(tmp_path: Path):
    write_sentiment_rows(tmp_path / "sst2_train.parquet", 1, seed=0)
    write_sentiment_rows(tmp_path / "sst2_dev.parquet", 1, seed=1)
    with pytest.raises(DataError, match=r"none is left for (selection|train)"):
        load_sentiment(tmp_path)


# The other published tasks


def write_task(folder: Path, name: str, train: str, report: str, count: int = 300) -> dict[str, list[Any]]:
    """Files of a published task with its columns, texts that occur once, and all its labels."""
    _, task = TASKS[name]
    tables = {}
    for stem, rows in ((train, count), (report, 20)):
        table: dict[str, Any] = {column: [f"good {column} {stem} {i}" for i in range(rows)] for column in task.columns}
        table["label"] = [i % len(task.labels) for i in range(rows)]
        tables[stem] = table
        if rows:
            pq.write_table(pa.table(table), folder / f"{stem}.parquet")
    return tables[train]


def source_of(name: str, **config: Any) -> Source:
    return Source(model=tiny_bert(labels=len(TASKS[name][1].labels), **config), tokenizer=make_tokenizer())


@pytest.mark.parametrize(
    ("name", "train", "report"),
    [
        ("ag_news", "ag_news_train", "ag_news_test"),
        ("ag_news", "ag_news_train_partial", "ag_news_test"),
        ("qnli", "qnli_train", "qnli_dev"),
        ("qqp", "qqp_train", "qqp_dev"),
        ("qqp", "qqp_partial_train", "qqp_partial_dev"),
    ],
)
def test_a_task_finds_its_files_whole_or_partial(tmp_path: Path, name: str, train: str, report: str):
    write_task(tmp_path, name, train, report)
    rows = recipes.get(name).rows(tmp_path, source_of(name), 0)
    assert len(rows.train.ids) + len(rows.selection.ids) == 300
    assert len(rows.report.ids) == 20
    assert rows.note == f"{len(rows.train.ids)} training, {len(rows.selection.ids)} selection and 20 report rows"


def test_the_whole_file_is_preferred_to_a_part(tmp_path: Path):
    write_task(tmp_path, "qqp", "qqp_partial_train", "qqp_dev", 100)
    write_task(tmp_path, "qqp", "qqp_train", "qqp_dev", 300)
    rows = recipes.get("qqp").rows(tmp_path, source_of("qqp"), 0)
    assert len(rows.train.ids) + len(rows.selection.ids) == 300


def test_only_qnli_divides_its_report_file_and_says_so(tmp_path: Path):
    for name, report in (("qnli", "qnli_dev"), ("qqp", "qqp_dev")):
        write_task(tmp_path, name, report, "nothing")
    rows = recipes.get("qnli").rows(tmp_path, source_of("qnli"), 0)
    assert len(rows.train.ids) + len(rows.selection.ids) + len(rows.report.ids) == 300
    assert "of one file, divided by a hash" in rows.note and "not a published set" in rows.note
    with pytest.raises(DataError, match=r"qqp_train\.parquet\. There is no such file"):
        recipes.get("qqp").rows(tmp_path, source_of("qqp"), 0)


@pytest.mark.parametrize("name", TASKS)
def test_without_data_the_rows_come_from_the_hub(monkeypatch: pytest.MonkeyPatch, name: str):
    """The names of sets, splits and columns there, as their cards have them."""
    import datasets

    report = {"ag_news": "test"}.get(name, "validation")
    columns = {
        "sst2": ("stanfordnlp/sst2", None, ["sentence"]),
        "ag_news": ("fancyzhx/ag_news", None, ["text"]),
        "qnli": ("nyu-mll/glue", "qnli", ["question", "sentence"]),
        "qqp": ("nyu-mll/glue", "qqp", ["question1", "question2"]),
    }
    *place, names = columns[name]

    def split(stem: str, count: int) -> datasets.Dataset:
        rows = {column: [f"good {column} {stem} {i} " for i in range(count)] for column in names}
        return datasets.Dataset.from_dict({**rows, "label": [i % 2 for i in range(count)], "idx": list(range(count))})

    def load_dataset(*words: str | None) -> datasets.DatasetDict:
        assert list(words) == place
        return datasets.DatasetDict({"train": split("a", 300), report: split("b", 20)})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    rows = recipes.get(name).rows(None, source_of(name), 0)
    assert (len(rows.train.ids) + len(rows.selection.ids), len(rows.report.ids)) == (300, 20)
    assert rows.report.labels is not None and rows.report.labels.tolist() == [0, 1] * 10


def test_a_hub_that_cannot_be_reached_is_one_message(monkeypatch: pytest.MonkeyPatch):
    import datasets

    def load_dataset(*_: object) -> None:
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(DataError, match=r"come from the hub, nyu-mll/glue.* no network.* a folder with qnli_train"):
        recipes.get("qnli").rows(None, source_of("qnli"), 0)


def test_a_pair_is_two_texts_with_their_types_padded(tmp_path: Path):
    table = {"question": ["good film", "bad"], "sentence": ["a", "the plot is"], "label": [0, 1]}
    pq.write_table(pa.table(table), tmp_path / "rows.parquet")
    rows = recipes.get("qnli").file_rows(tmp_path / "rows.parquet", source_of("qnli"))
    (batch,) = rows
    tokenizer = make_tokenizer()
    assert tokenizer.decode(batch["input_ids"][0]) == "[CLS] good film [SEP] a [SEP] [PAD]"
    assert batch["token_type_ids"].tolist() == [[0, 0, 0, 0, 1, 1, 0], [0, 0, 0, 1, 1, 1, 1]]
    assert batch["attention_mask"].tolist() == [[1] * 6 + [0], [1] * 7]
    assert batch["row_ids"].tolist() == [0, 1]


def test_our_folder_reads_pairs_as_the_teacher_s_does(tmp_path: Path):
    """Its tokenizer is of a class that makes no types of its own accord."""
    model = tiny_bert(labels=2, max_position_embeddings=40)
    model.save_pretrained(tmp_path / "teacher")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "bad", "film", "plot"]
    (tmp_path / "teacher" / "vocab.txt").write_text("\n".join(words))
    qnli = recipes.get("qnli")
    teacher = qnli.load(str(tmp_path / "teacher"))
    assert isinstance(teacher.tokenizer, BertTokenizer)
    teacher.tokenizer.save_pretrained(tmp_path / "tokenizer")
    artifact.save(model, tmp_path / "ours", extra_files=sorted((tmp_path / "tokenizer").iterdir()))
    pq.write_table(pa.table({"question": ["a"], "sentence": ["good film"], "label": [0]}), tmp_path / "rows.parquet")
    first, second = (
        next(iter(qnli.file_rows(tmp_path / "rows.parquet", source)))
        for source in (teacher, qnli.load(str(tmp_path / "ours")))
    )
    assert first["token_type_ids"].tolist() == second["token_type_ids"].tolist() == [[0, 0, 0, 1, 1, 1]]
    assert torch.equal(first["input_ids"], second["input_ids"])


def test_a_model_without_types_gets_none(tmp_path: Path):
    pq.write_table(pa.table({"question": ["a"], "sentence": ["the"], "label": [0]}), tmp_path / "rows.parquet")
    source = source_of("qnli", type_vocab_size=1)
    (batch,) = recipes.get("qnli").file_rows(tmp_path / "rows.parquet", source)
    assert set(batch) == {"input_ids", "attention_mask", "labels", "row_ids"}


def test_the_longest_row_is_an_option(tmp_path: Path):
    pq.write_table(pa.table({"text": ["good " * 30], "label": [0]}), tmp_path / "rows.parquet")
    for option, length in ((None, 32), (10, 10)):
        rows = recipes.get("ag_news", max_length=option).file_rows(tmp_path / "rows.parquet", source_of("ag_news"))
        assert rows.lengths.tolist() == [length]


@pytest.mark.parametrize(("name", "count"), [("qnli", [3_838, 542, 1_083]), ("qqp", [1_741, 102, 7_600])])
def test_the_real_rows_have_the_promised_roles(data_folder: Path, name: str, count: list[int]):
    rows = recipes.get(name).rows(data_folder, source_of(name), 0)
    assert [len(part.ids) for part in (rows.train, rows.selection, rows.report)] == count
    assert all(part.labels is not None and set(part.labels) == {0, 1} for part in (rows.train, rows.report))


# Files that are no rows


def write(table: dict[str, Any]) -> Callable[[Path], object]:
    return lambda path: pq.write_table(pa.table(table), path)


def truncate(path: Path) -> None:
    write({"text": ["a film"] * 100, "label": [0] * 100})(path)
    path.write_bytes(path.read_bytes()[:-20])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "There is no such file"),
        (Path.mkdir, "There is no such file"),
        (lambda path: path.write_bytes(b""), "must be a parquet file"),
        (lambda path: path.write_text("text,label\na,1\n"), "must be a parquet file"),
        (truncate, "must be a parquet file"),
        (write({"sentence": ["a"], "label": [0]}), "must have a column 'text'. It has sentence, label"),
        (write({"text": ["a"], "y": [0]}), "must have a column 'label'. It has text, y"),
        (write({"text": ["a", None, None], "label": [0, 1, 1]}), "'text' of .* must be filled. 2 rows are empty"),
        (write({"text": ["a", "b"], "label": [0, None]}), "'label' of .* must be filled. 1 rows are empty"),
        (write({"text": ["a"], "label": ["good"]}), "whole numbers within 0..1. Got 'good'"),
        (write({"text": ["a"], "label": [0.5]}), "whole numbers within 0..1. Got 0.5"),
        (write({"text": ["a", "b"], "label": [0, 2]}), "whole numbers within 0..1. Got 2"),
        (write({"text": ["a", "b"], "label": [0, -1]}), "whole numbers within 0..1. Got -1"),
        (write({"text": [1], "label": [0]}), "must hold texts. Got 1"),
    ],
)
def test_a_file_that_holds_no_rows_is_refused(tmp_path: Path, make: Callable[[Path], object], message: str):
    make(tmp_path / "rows.parquet")
    with pytest.raises(DataError, match=message):
        recipes.get("sst2").file_rows(tmp_path / "rows.parquet", source())


def test_rows_without_a_tokenizer_are_refused(sentiment: Sentiment):
    with pytest.raises(DataError, match="must come with its tokenizer"):
        recipes.get("sst2").rows(sentiment.data, NO_MODEL, 0)


def test_a_text_teacher_without_a_start_is_refused():
    with pytest.raises(DataError, match="Pass --model PATH_OR_HUB_NAME"):
        recipes.get("sst2").start(None, 0, None)


def test_the_example_has_the_promised_size(sentiment: Sentiment):
    example = recipes.get("sst2").example(tiny_bert(), load_sentiment(sentiment.data))
    assert example["input_ids"].shape == example["attention_mask"].shape == (32, 32)
    assert int(example["input_ids"].max()) < 50


def test_the_task_names_the_files_of_the_data_folder(tmp_path: Path):
    write_sentiment_rows(tmp_path / "sst2_train.parquet", 40, seed=0)
    with pytest.raises(DataError, match=r"sst2_dev\.parquet\. There is no such file"):
        load_sentiment(tmp_path)
