"""No text has two roles, however rows hang together; roles depend on texts alone."""

import hashlib
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rmtkd.errors import DataError
from rmtkd.recipes.groups import PARTS, Assignment, Texts, assign, by_sentence, by_shared_texts, part_of


def is_held(text: str) -> bool:
    """The rule that selection rows are drawn by, written down once more."""
    return int(hashlib.sha256(text.encode()).hexdigest()[:8], 16) % 20 == 0


HELD = [text for text in (f"text {i}" for i in range(2000)) if is_held(text)]
FREE = [text for text in (f"text {i}" for i in range(2000)) if not is_held(text)]
REPORT = [("reported",)]


def pick(rows: list[Texts], indices: list[int]) -> set[str]:
    return {text.strip() for i in indices for text in rows[i]}


def random_pairs(count: int, *, words: int, seed: int = 0) -> list[Texts]:
    generator = np.random.default_rng(seed)
    return [(f"left {a}", f"right {b}") for a, b in generator.integers(0, words, (count, 2))]


# Groups


def test_a_row_of_one_text_is_in_the_group_of_that_text_whatever_stands_around_it() -> None:
    groups = by_shared_texts([("a",), ("b",), ("a ",), (" b",), ("c",)])
    assert groups[0] == groups[2] and groups[1] == groups[3]
    assert len(set(groups)) == 3


def test_rows_that_share_a_text_in_any_column_or_through_others_are_one_group() -> None:
    rows = [("a", "b"), ("c", "d"), ("b", "e"), ("f", "e"), ("g", "h"), ("d", "i")]
    groups = by_shared_texts(rows)
    assert groups == [("a",), ("c",), ("a",), ("a",), ("g",), ("c",)]


@given(st.lists(st.tuples(*[st.sampled_from("abcdefghijkl")] * 2), max_size=15))
def test_groups_are_what_spreads_from_row_to_row(rows: list[Texts]) -> None:
    """Compared with a search that joins rows until nothing changes."""
    sets = [set(row) for row in rows]
    for _ in rows:
        sets = [set().union(*(other for other in sets if other & mine)) for mine in sets]
    assert by_shared_texts(rows) == [(min(joined),) for joined in sets]


def test_a_group_that_would_be_most_of_what_is_held_out_is_trained_on() -> None:
    rows = [(f"text {i}", "yes") for i in range(100)] + [(f"text {i}", f"other {i}") for i in range(1000, 2000)]
    groups = by_shared_texts(rows)
    assert groups[:100] == [()] * 100
    assert all(groups[100:])
    roles = assign(rows, None, REPORT)
    assert set(range(100)) <= set(roles.train) and roles.selection


def test_a_phrase_belongs_to_every_sentence_that_contains_its_words_in_a_row() -> None:
    rows = [
        ("a good film",),
        ("good film ",),
        ("a good film of old",),
        ("film of old",),
        ("a film",),
        ("not a good film",),
    ]
    first, second = "a good film of old", "not a good film"
    assert [set(keys) for keys in by_sentence(rows)] == [
        {first, second},
        {first, second},
        {first},
        {first},
        {"a film"},  # its words are in the sentences, but not in a row
        {second},
    ]


def test_parts_of_words_and_double_spaces_are_no_phrases() -> None:
    assert by_sentence([("films",), ("film",), ("a  b",), ("a",)]) == [("films",), ("film",), ("a  b",), ("a  b",)]


# Roles


def test_selection_rows_are_a_twentieth_by_the_hash_of_their_text() -> None:
    rows = [(f"text {i}",) for i in range(2000)]
    roles = assign(rows, None, REPORT)
    assert [rows[i][0] for i in roles.selection] == HELD
    assert [rows[i][0] for i in roles.train] == FREE
    assert (roles.report, roles.left_out) == ([0], 0)
    assert len(HELD) / 2000 == pytest.approx(1 / PARTS, rel=0.2)


def test_a_phrase_is_held_out_only_with_all_its_sentences() -> None:
    held, other, free = HELD[0], HELD[1], FREE[0]
    held_sentence = next(f"{held} {i}" for i in range(1000) if is_held(f"{held} {i}"))
    free_sentence = next(f"{free} {i}" for i in range(1000) if not is_held(f"{free} {i}"))
    rows = [(held_sentence,), (free_sentence,), (held,), (free,), ("text",), (other,)]
    roles = assign(rows, None, REPORT, by_sentence)
    assert roles.selection == [0, 2, 5]
    assert roles.train == [1, 3, 4]  # the word is part of both, and is trained on


def test_rows_that_share_a_text_with_held_out_rows_are_left_out() -> None:
    train = [("a", "b"), ("c ", "d"), ("e", "f"), ("g", "h")]
    roles = assign(train, [("f", "x"), ("c", "z")], [("y", "c")])
    assert roles == Assignment(train=[0, 3], selection=[0], report=[0], left_out=3)


@pytest.mark.parametrize("own_report", [True, False])
def test_no_text_of_pairs_has_two_roles_and_no_row_is_lost_within_a_file(own_report: bool) -> None:
    rows = random_pairs(1000, words=900)
    report = random_pairs(30, words=900, seed=1) if own_report else None
    roles = assign(rows, None, report)
    parts = [pick(rows, roles.train), pick(rows, roles.selection), pick(report or rows, roles.report)]
    assert all(parts)
    assert not parts[0] & parts[1] and not parts[0] & parts[2] and not parts[1] & parts[2]
    divided = roles.train + roles.selection + ([] if own_report else roles.report)
    assert len(divided) + roles.left_out == 1000
    assert (roles.left_out > 0) == own_report


def test_a_file_for_all_roles_is_divided_in_seven_to_one_to_two() -> None:
    rows = [(f"text {i}",) for i in range(4000)]
    roles = assign(rows, None, None)
    shares = [len(part) / 4000 for part in (roles.train, roles.selection, roles.report)]
    assert shares == pytest.approx([0.7, 0.1, 0.2], abs=0.02)


def test_the_role_of_a_text_depends_on_nothing_but_texts() -> None:
    rows = random_pairs(500, words=600)
    order = np.random.default_rng(1).permutation(len(rows))
    shuffled = [rows[i] for i in order]
    first, second = assign(rows, None, None), assign(shuffled, None, None)
    for role in ("train", "selection", "report"):
        assert pick(rows, getattr(first, role)) == pick(shuffled, getattr(second, role))


@pytest.mark.parametrize(
    ("train", "selection", "report", "role"),
    [
        ([(FREE[0],)], None, REPORT, "selection"),
        ([(HELD[0],)], None, REPORT, "train"),
        ([("reported",)], None, REPORT, "train"),
        ([], None, REPORT, "train"),
        ([("a",)], [("reported",)], REPORT, "selection"),
        ([("a",)], [("b",)], [], "report"),
        ([(f"text {i}", "yes") for i in range(100)], None, None, "selection"),
    ],
)
def test_a_role_without_rows_is_refused(
    train: list[Texts], selection: list[Texts] | None, report: list[Texts], role: str
) -> None:
    with pytest.raises(DataError, match=f"none is left for {role}"):
        assign(train, selection, report)


# The real rows


def read(path: Path, *columns: str) -> list[Texts]:
    table = pq.read_table(path)
    return list(zip(*(table[name].to_pylist() for name in columns), strict=True))


def test_no_real_training_phrase_is_part_of_a_sentence_that_only_selection_has(data_folder: Path) -> None:
    rows = read(data_folder / "sst2_train.parquet", "text")
    roles = assign(rows, None, read(data_folder / "sst2_dev.parquet", "text"), by_sentence)
    assert (len(roles.train), len(roles.selection), roles.left_out) == (64_320, 3_029, 0)
    train = pick(rows, roles.train)
    # The longest selection rows are whole sentences: parts of longer ones come behind them.
    whole = sorted(pick(rows, roles.selection), key=len, reverse=True)[:100]
    for sentence in whole:
        words = sentence.split()
        spans = {" ".join(words[i:j]) for i in range(len(words)) for j in range(i + 2, len(words) + 1)}
        for shared in spans & train:  # then a sentence that is trained on has the phrase too
            assert any(f" {shared} " in f" {other} " for other in train if len(other) > len(shared)), shared


@pytest.mark.parametrize(
    ("train", "report", "columns"),
    [
        ("ag_news_train_partial", "ag_news_test", ["text"]),
        ("qqp_partial_train", "qqp_partial_dev", ["question1", "question2"]),
        ("qnli_dev", None, ["question", "sentence"]),
    ],
)
def test_no_real_text_has_two_roles(data_folder: Path, train: str, report: str | None, columns: list[str]) -> None:
    rows = read(data_folder / f"{train}.parquet", *columns)
    reported = None if report is None else read(data_folder / f"{report}.parquet", *columns)
    roles = assign(rows, None, reported)
    parts = [pick(rows, roles.train), pick(rows, roles.selection), pick(reported or rows, roles.report)]
    assert all(len(part) > 100 for part in parts)
    assert not parts[0] & parts[1] and not parts[0] & parts[2] and not parts[1] & parts[2]
    own = roles.train + roles.selection + ([] if reported else roles.report)
    assert sorted(own) == sorted(set(own)) and len(own) + roles.left_out == len(rows)


def test_a_part_is_one_of_twenty() -> None:
    assert {part_of(str(i)) for i in range(1000)} == set(range(20))
