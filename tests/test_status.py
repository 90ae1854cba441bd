"""The table of what was verified is what the check gives, for the versions at hand."""

import pytest

import status


@pytest.fixture(scope="module")
def page() -> str:
    return status.PAGE.read_text(encoding="utf-8")


def test_the_committed_table_is_what_the_check_gives(page: str) -> None:
    tables = status.read(page)
    if status.versions() not in tables:
        pytest.skip(f"no table for {status.versions()}: python tests/status.py adds one")
    assert status.checked() == tables[status.versions()]


def test_the_tables_have_every_architecture_and_both_ends_of_what_is_tested(page: str) -> None:
    tables = status.read(page)
    assert all(list(table) == status.architectures() for table in tables.values())
    assert {title.split()[1].rstrip(",") for title in tables} >= {"5.0.0", "5.23.0"}
    assert status.written(page, tables) == page


def test_a_site_that_fails_is_told_in_the_table() -> None:
    good, bad = (status.Verdict(site="layer.0.ffn", ok=ok) for ok in (True, False))
    assert status.cell([good, good]) == "✓ 2"
    assert status.cell([good, bad]) == "1 of 2"
    assert status.cell([]) == "whole"
