"""The user's own tables become rows in their roles, with the classes of her checkpoint."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq
import pytest

from conftest import WORDS, make_tokenizer, tiny_bert
from rmtkd import recipes
from rmtkd.errors import DataError, OptionError
from rmtkd.recipes import TokenRows
from rmtkd.recipes.checkpoints import save_classifier
from rmtkd.recipes.own import find_files
from rmtkd.recipes.recipe import Rows, Source
from rmtkd.teaching import train_teacher

TOPICS = ("music", "plot", "story")


def model_of(*labels: str) -> Source:
    config = {"id2label": dict(enumerate(labels)), "label2id": {name: i for i, name in enumerate(labels)}}
    model = tiny_bert(labels=len(labels), max_position_embeddings=40)
    model.config.update(config)
    return Source(model=model, tokenizer=make_tokenizer())


def write_rows(path: Path, count: int = 400, *, seed: int = 0, labels: tuple[Any, ...] = TOPICS, **more: Any) -> Path:
    """Rows of different texts `body` and `title`, with a label that the body names."""
    generator = np.random.default_rng(seed)
    indices = generator.integers(0, len(labels), count)
    bodies = [
        " ".join([TOPICS[topic % 3], *generator.choice(WORDS, 4), str(seed), *f"{i:03}"])
        for i, topic in enumerate(indices)
    ]
    table = {"body": bodies, "title": [f"a {body}" for body in bodies], "topic": [labels[i] for i in indices], **more}
    if path.suffix == ".csv":
        pacsv.write_csv(pa.table(table), path)
    else:
        pq.write_table(pa.table(table), path)
    return path


def load(data: Path | None, source: Source | None = None, label: str | None = "topic", columns: str = "body") -> Rows:
    return recipes.get("text", columns=columns, label=label).rows(data, source or model_of(*TOPICS), 0)


def counts(rows: Rows) -> list[int]:
    return [len(part.ids) for part in (rows.train, rows.selection, rows.report)]


def labels(rows: TokenRows) -> list[int]:
    assert rows.labels is not None
    return rows.labels.tolist()


# Roles


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_one_file_is_divided_into_all_roles_and_the_note_says_so(tmp_path: Path, kind: str):
    rows = load(write_rows(tmp_path / f"rows.{kind}"))
    assert sum(counts(rows)) == 400
    assert all(count > 20 for count in counts(rows))
    assert rows.note.startswith("{} training, {} selection and {} report rows".format(*counts(rows)))
    assert "of one file, divided by a hash" in rows.note
    assert set(labels(rows.train)) == set(labels(rows.report)) == {0, 1, 2}


@pytest.mark.parametrize(
    ("names", "roles"),
    [
        (["train.csv", "test.csv"], {"train": "train.csv", "report": "test.csv"}),
        (["train.csv", "dev.parquet"], {"train": "train.csv", "report": "dev.parquet"}),
        (["train.tsv", "validation.jsonl"], {"train": "train.tsv", "report": "validation.jsonl"}),
        (
            ["train.csv", "validation.csv", "test.csv", "README.md", "train.txt"],
            {"train": "train.csv", "selection": "validation.csv", "report": "test.csv"},
        ),
    ],
)
def test_files_of_a_folder_have_the_roles_of_their_names(tmp_path: Path, names: list[str], roles: dict[str, str]):
    for name in names:
        (tmp_path / name).touch()
    assert find_files(tmp_path) == {role: tmp_path / name for role, name in roles.items()}


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "must hold train.* It holds nothing"),
        (["train.csv"], "and one of test.*, validation.*, dev.* .* It holds train.csv"),
        (["test.csv", "dev.csv"], "must hold train.*"),
        (["train.csv", "train.parquet", "test.csv"], "one file of train rows. It holds train.csv, train.parquet"),
        (["train.csv", "dev.csv", "validation.csv"], "one file of dev rows. It holds dev.csv, validation.csv"),
    ],
)
def test_a_folder_whose_files_have_no_clear_role_is_refused(tmp_path: Path, names: list[str], message: str):
    for name in names:
        (tmp_path / name).touch()
    with pytest.raises(DataError, match=message):
        find_files(tmp_path)


def test_a_folder_keeps_its_files_apart_and_leaves_out_what_they_share(tmp_path: Path):
    write_rows(tmp_path / "train.csv", 300)
    write_rows(tmp_path / "test.parquet", 40, seed=1)
    two = load(tmp_path)
    assert counts(two)[2] == 40 and sum(counts(two)) == 340 and "divided" not in two.note
    write_rows(tmp_path / "dev.csv", 30, seed=2)
    three = load(tmp_path)
    assert counts(three) == [300, 30, 40]
    pacsv.write_csv(pacsv.read_csv(tmp_path / "train.csv")[:30], tmp_path / "dev.csv")
    shared = load(tmp_path)
    assert counts(shared) == [270, 30, 40] and "30 left out" in shared.note


def test_two_columns_are_a_pair(tmp_path: Path):
    rows = load(write_rows(tmp_path / "rows.csv"), columns="title, body")
    (first,) = list(rows.selection)[:1]
    decoded = str(make_tokenizer().decode(first["input_ids"][0]))
    assert decoded.startswith("[CLS] a ") and decoded.count("[SEP]") == 2
    assert "token_type_ids" in first


# Labels


def test_without_a_label_no_row_has_one(tmp_path: Path):
    rows = load(write_rows(tmp_path / "rows.csv"), label=None)
    assert counts(rows) == counts(load(tmp_path / "rows.csv"))
    for part in (rows.train, rows.selection, rows.report):
        assert set(next(iter(part))) == {"input_ids", "attention_mask", "row_ids"}


def test_labels_are_the_model_s_classes_in_the_model_s_order(tmp_path: Path):
    path = write_rows(tmp_path / "rows.csv")
    expected = [TOPICS.index(topic) for topic in pacsv.read_csv(path)["topic"].to_pylist()]
    for names in (TOPICS, TOPICS[::-1]):
        task = recipes.get("text", columns="body", label="topic")
        read = labels(task.file_rows(path, model_of(*names)))
        assert [names[i] for i in read] == [TOPICS[i] for i in expected]


def test_whole_numbers_are_indices_of_a_model_s_classes(tmp_path: Path):
    write_rows(tmp_path / "names.parquet")
    write_rows(tmp_path / "numbers.parquet", labels=(0, 1, 2))
    assert labels(load(tmp_path / "names.parquet").train) == labels(load(tmp_path / "numbers.parquet").train)


@pytest.mark.parametrize("kind", ["strings", "numbers", "many"])
def test_a_teacher_learns_the_classes_of_the_training_file(tmp_path: Path, kind: str):
    given = {"strings": ("story", "plot", "music"), "numbers": (7, 10, 9), "many": tuple(range(100, 140))}[kind]
    path = write_rows(tmp_path / "rows.parquet", labels=given)
    start = model_of("bad", "good")
    save_classifier(start, tmp_path / "start")  # with a head of other classes
    task = recipes.get("text", columns="body", label="topic")
    record = train_teacher(
        task, model=str(tmp_path / "start"), data=path, out=tmp_path / "teacher", epochs=0.2, precision="fp32"
    )
    names = [str(name) for name in sorted(given)]
    config = json.loads((tmp_path / "teacher" / "config.json").read_text())
    assert list(config["id2label"].values()) == names
    assert record["classes"] == len(names) and "divided by a hash" in record["rows"]
    teacher = task.load(str(tmp_path / "teacher"))
    assert teacher.labels == tuple(names)
    read = labels(task.file_rows(path, teacher))
    assert [names[i] for i in read] == [str(topic) for topic in pq.read_table(path)["topic"].to_pylist()]


def test_a_start_whose_body_is_not_its_configuration_s_is_refused(tmp_path: Path):
    path = write_rows(tmp_path / "rows.parquet")
    save_classifier(model_of(*TOPICS), tmp_path / "start")
    config = json.loads((tmp_path / "start" / "config.json").read_text())
    (tmp_path / "start" / "config.json").write_text(json.dumps({**config, "intermediate_size": 64}))
    with pytest.raises(DataError, match=r"must hold the weights of its configuration\. .* bert\.encoder"):
        recipes.get("text", columns="body", label="topic").start(str(tmp_path / "start"), 0, path)


# What is measured


@pytest.mark.parametrize(("words", "length"), [(3, 8), (6, 8), (7, 16), (28, 32)])
def test_the_example_is_as_long_as_the_median_row_in_steps_of_eight(words: int, length: int):
    rows = TokenRows([[5] * 2, [5] * (words + 2), [5] * 50], None)
    example = recipes.get("text").example(tiny_bert(), Rows(train=rows, selection=rows, report=rows))
    assert example["input_ids"].shape == (32, length)


# What is refused


def having(rows: dict[str, Any]) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        pq.write_table(pa.table(rows), folder / "rows.parquet")
        return folder / "rows.parquet"

    return write


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: None, "must have rows. Got none. Pass a file"),
        (lambda folder: folder / "nowhere.csv", "There is no such file"),
        (having({"text": ["a"], "topic": ["plot"]}), "must have a column 'body'. It has text, topic"),
        (having({"body": ["a"], "label": ["plot"]}), "must have a column 'topic'. It has body, label"),
        (
            having({"body": ["a", " "], "topic": ["plot", "music"]}),
            "body of .* Row 2 holds an empty text",
        ),
        (having({"body": ["a", None], "topic": ["plot", "music"]}), "'body' of .* must be filled. 1 rows are empty"),
        (having({"body": [1.5], "topic": ["plot"]}), "must hold texts. Got 1.5"),
        (
            having({"body": pa.array([], pa.string()), "topic": pa.array([], pa.string())}),
            "must hold rows. It holds none",
        ),
        (having({"body": ["a", "b"], "topic": ["plot", "film"]}), r"\(music, plot, story\) .* Got 'film'"),
        (having({"body": ["a", "b"], "topic": ["plot", "plot"]}), "at least two classes. It holds plot"),
        (having({"body": ["a", "b"], "topic": ["plot", "story"]}), "none is left for"),
    ],
)
def test_rows_that_cannot_be_used_are_refused_by_name(
    tmp_path: Path, make: Callable[[Path], Path | None], message: str
):
    with pytest.raises(DataError, match=message):
        load(make(tmp_path))


@pytest.mark.parametrize(
    ("label", "topics", "message"),
    [
        (None, ["plot", "story"], "must be trained on labelled rows. Got no --label"),
        ("topic", ["plot", "plot"], "must hold at least two classes. It holds plot"),
        ("title", ["plot", "story"], "must have a column 'title'. It has body, topic"),
    ],
)
def test_a_teacher_without_classes_is_refused(tmp_path: Path, label: str | None, topics: list[str], message: str):
    path = having({"body": ["a", "b"], "topic": topics})(tmp_path)
    with pytest.raises(DataError, match=message):
        recipes.get("text", columns="body", label=label).start("./nowhere", 0, path)


@pytest.mark.parametrize("columns", ["", "a,", "a,b,c", " , b"])
def test_columns_are_one_or_two(columns: str):
    with pytest.raises(OptionError, match="--columns must name one column of texts or two"):
        recipes.get("text", columns=columns)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("sst2", {"columns": "text"}, "Got --columns for sst2"),
        ("qqp", {"label": "label"}, "Got --label for qqp"),
        ("digits", {"max_length": 64}, "Got --max-length for digits"),
        ("text", {"max_length": 7}, "--max-length must be at least 8. Got 7"),
        ("ag_news", {"max_length": 0}, "--max-length must be at least 8. Got 0"),
    ],
)
def test_options_that_a_recipe_does_not_have_are_refused(name: str, options: dict[str, Any], message: str):
    with pytest.raises(OptionError, match=message):
        recipes.get(name, **options)


def test_a_checkpoint_of_one_output_is_no_classifier(tmp_path: Path):
    tiny_bert(labels=1).save_pretrained(tmp_path)
    with pytest.raises(DataError, match=r"head of at least two classes\. .* has 1"):
        recipes.get("text").load(str(tmp_path))
