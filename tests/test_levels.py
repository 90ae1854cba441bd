"""The claims of `rmtkd.levels`: tokens are counted where they are real; a run with levels is a run like any other."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForSequenceClassification

import rmtkd
from conftest import assert_untouched, random_rows, snapshot, tiny_bert
from rmtkd.dry_run import narrow, plan
from rmtkd.errors import DataError, OptionError, PlanError, UnsupportedModelError
from rmtkd.levels import count_tokens, in_levels
from rmtkd.measurement import count_parameters
from rmtkd.planning import Plan
from rmtkd.schedule import Options
from rmtkd.sites import embedding_site, find_sites

WORDS = "bert.embeddings.word_embeddings"
SIX = {"embeddings.word.0": 8, "embeddings.word.1": 4, "embeddings.word.2": 2}


def test_tokens_are_counted_under_the_mask_and_one_batch_alone_goes_beyond_the_embedding() -> None:
    model = tiny_bert()
    runs: list[int] = []
    model.bert.encoder.register_forward_hook(lambda *_: runs.append(1))
    rows = [
        {"input_ids": torch.tensor([[5, 5, 7, 0]]), "attention_mask": torch.tensor([[1, 1, 1, 0]])},
        {"input_ids": torch.tensor([[7, 9]])},
    ]
    counts = count_tokens(model, WORDS, rows)
    assert {i: int(n) for i, n in enumerate(counts) if n} == {5: 2, 7: 2, 9: 1}
    assert len(runs) == 1
    assert not model.bert.embeddings.word_embeddings._forward_pre_hooks


class Bag(nn.Module):
    """A model of one's own: an embedding, and a linear map of the mean."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(60, 24)
        self.inner = nn.Linear(24, 16)
        self.head = nn.Linear(16, 3)
        for bias in (self.inner.bias, self.head.bias):
            nn.init.zeros_(bias)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.inner(self.words(ids)).mean(1))


def bag_rows(count: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Common tokens and rare ones, and those above 50 never."""
    ids = (50 * torch.rand(count, 16, 12, generator=torch.Generator().manual_seed(0)).pow(3)).long()
    return [(part, part[:, 0] % 3) for part in ids]


def answered(model: nn.Module, count: int) -> list[dict[str, torch.Tensor]]:
    """Rows on which the model is always right."""
    rows: list[dict[str, torch.Tensor]] = list(random_rows(count))
    with torch.no_grad():
        return [{**row, "labels": model(**row).logits.argmax(-1)} for row in rows]


def test_a_model_of_ones_own_is_split_compressed_saved_and_loaded(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Bag()
    rows = [(ids, model(ids).argmax(-1)) for ids, _ in bag_rows(20)]
    site = embedding_site(model, "words")
    keep = {"embeddings.word.0": 12, "embeddings.word.1": 2}
    result = rmtkd.compress(
        model, train=rows, selection=rows[:3], sites=[site], embedding_levels=2, keep=keep, epochs=0.5, multiple_of=1
    )
    assert {name: result.plan.widths[name] for name in keep} == keep
    result.save(tmp_path / "model")
    loaded = rmtkd.load(tmp_path / "model", Bag)
    assert torch.equal(loaded(rows[0][0]), result.model(rows[0][0]))


def test_a_model_in_levels_stays_as_it_is_and_one_level_changes_nothing() -> None:
    model, rows = tiny_bert(), list(random_rows(20))
    sites = find_sites(model)
    assert in_levels(model, sites, rows, 1) == (model, sites)
    split, found = in_levels(model, sites, rows, 3)
    assert found == find_sites(split) and len(found) == len(sites) + 2
    assert in_levels(split, found, rows, 2) == (split, found)


def test_an_embedding_that_was_cut_before_is_not_split() -> None:
    model, rows = tiny_bert(), list(random_rows(20))
    made, _ = plan(model, calibration=rows, keep={"embeddings.word": 8})
    cut = narrow(model, made, calibration=rows)
    with pytest.raises(UnsupportedModelError, match=r"one whole embedding among the sites\. Got 0"):
        in_levels(cut, find_sites(cut), rows, 2)


@pytest.mark.parametrize("options", [{"embedding_levels": 0}, {"embedding_levels": 2, "uniform": True}])
def test_levels_that_make_no_sense_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match="embedding_levels must be"):
        Options(**options)


def test_a_plan_with_levels_counts_from_the_untouched_model_and_can_be_applied(tmp_path: Path) -> None:
    model = tiny_bert()
    rows, before = answered(model, 40), snapshot(model)
    made, _ = plan(model, calibration=rows, embedding_levels=3, keep=SIX, multiple_of=2)
    assert made.embedding_levels == 3 and made.baseline["params"] == count_parameters(model)
    made.save(tmp_path / "plan.json")
    again = Plan.read(tmp_path / "plan.json")
    student = narrow(model, again, calibration=rows)
    assert count_parameters(student) == made.predicted["params"]
    assert {site.name: site.width for site in find_sites(student)} == made.widths
    assert_untouched(model, before)
    with pytest.raises(OptionError, match="embedding_levels 2, not 3"):
        rmtkd.compress(model, train=rows, selection=rows, plan=again, embedding_levels=2)
    applied = rmtkd.compress(model, train=rows, selection=rows, plan=again, epochs=0.0)
    assert applied.plan.widths == made.widths and applied.plan.embedding_levels == 3


def test_a_plan_of_another_number_of_levels_is_refused() -> None:
    model, rows = tiny_bert(), list(random_rows(40))
    split, _ = in_levels(model, find_sites(model), rows, 2)
    made, _ = plan(split, calibration=rows, embedding_levels=2)
    with pytest.raises(PlanError, match=r"embeddings\.word\.2: every site of the model must be in the plan"):
        plan(in_levels(model, find_sites(model), rows, 3)[0], calibration=rows, given=made)


def test_a_run_with_levels_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    model = tiny_bert()
    rows, before = answered(model, 60), snapshot(model)
    options: Any = {"embedding_levels": 3, "keep": SIX, "multiple_of": 2, "epochs": 1.0, "granularity": "layer"}
    options |= {"precision": "fp32", "save_every_s": 0.0}
    straight = rmtkd.compress(model, train=rows, selection=rows[:2], out=tmp_path / "straight", **options)
    steps = 0

    def stop(event: Any) -> None:
        nonlocal steps
        steps += event["event"] == "step"
        if event["event"] == "step" and steps == 3:
            raise KeyboardInterrupt

    interrupted = rmtkd.compress(model, train=rows, selection=rows[:2], out=tmp_path / "run", on_event=stop, **options)
    assert not interrupted.record["finished"]
    result = rmtkd.resume(tmp_path / "run", model, train=rows, selection=rows[:2])
    assert_untouched(result.model, snapshot(straight.model))
    assert result.record["baseline"]["parameters"] == count_parameters(model)
    finished = rmtkd.resume(tmp_path / "run", model, train=rows, selection=rows[:2])
    assert_untouched(finished.model, snapshot(straight.model))
    loaded = rmtkd.load(tmp_path / "run" / "model")
    assert_untouched(loaded, snapshot(straight.model))
    assert_untouched(model, before)
    rows = answered(loaded, 60)
    further = rmtkd.compress(loaded, train=rows, selection=rows, keep={"embeddings.word.0": 6}, epochs=0.0)
    assert further.plan.widths["embeddings.word.0"] == 6


def test_rare_tokens_may_go_without_a_table_and_the_folder_loads_everywhere(tmp_path: Path) -> None:
    model = tiny_bert()
    rows, before = answered(model, 40), snapshot(model)
    keep = {"embeddings.word.0": 8, "embeddings.word.1": 0, "embeddings.word.2": 0}
    small = rmtkd.compress(
        model, train=rows, selection=rows[:2], embedding_levels=3, keep=keep, epochs=1.0, out=tmp_path / "run"
    )
    assert_untouched(model, before)
    embedding: Any = small.model.get_submodule(WORDS)
    first = embedding.levels[0].num_embeddings
    vectors = embedding(torch.arange(50))
    assert not vectors[embedding.rows >= first].any() and vectors[embedding.rows < first].any(-1).all()
    assert count_parameters(small.model) == small.plan.predicted["params"]
    assert [site.name for site in find_sites(small.model)][:2] == ["embeddings.word.0", "layer.0.heads"]
    folder = tmp_path / "run" / "model"
    stock, report = AutoModelForSequenceClassification.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    stock.save_pretrained(tmp_path / "again")
    for loaded in (rmtkd.load(folder), stock, AutoModelForSequenceClassification.from_pretrained(tmp_path / "again")):
        assert_untouched(loaded, snapshot(small.model))
        assert torch.equal(loaded(**rows[0]).logits, small.model(**rows[0]).logits)
    rows = answered(small.model, 60)
    again = rmtkd.compress(small.model, train=rows, selection=rows, keep={"embeddings.word.0": 4}, epochs=0.0)
    assert again.plan.widths["embeddings.word.0"] == 4


def test_the_commonest_tokens_keep_a_table() -> None:
    rows = list(random_rows(40))
    with pytest.raises(PlanError, match=r"embeddings\.word\.0 must keep from 1 to 32\. Got 0"):
        plan(tiny_bert(), calibration=rows, embedding_levels=2, keep={"embeddings.word.*": 0})


def test_a_model_of_ones_own_may_lose_a_level(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Bag()
    rows = [(ids, model(ids).argmax(-1)) for ids, _ in bag_rows(20)]
    keep = {"embeddings.word.0": 12, "embeddings.word.1": 0}
    site = embedding_site(model, "words")
    result = rmtkd.compress(
        model, train=rows, selection=rows[:3], sites=[site], embedding_levels=2, keep=keep, epochs=0.0
    )
    result.save(tmp_path / "model")
    assert torch.equal(rmtkd.load(tmp_path / "model", Bag)(rows[0][0]), result.model(rows[0][0]))


def test_levels_of_rows_that_are_drawn_anew_are_refused() -> None:
    """Their tokens would be counted otherwise when a run goes on."""

    class Masked:
        def __iter__(self) -> Any:
            for row in rows:
                gone = torch.rand(row["input_ids"].shape, generator=generator) < 0.2
                yield {**row, "input_ids": row["input_ids"].masked_fill(gone, 1)}

    model, generator = tiny_bert(), torch.Generator().manual_seed(0)
    rows = answered(model, 40)
    with pytest.raises(OptionError, match="embedding_levels counts the tokens of all training rows"):
        rmtkd.compress(model, train=Masked(), selection=rows, embedding_levels=2, multiple_of=2)


def test_levels_know_the_padding_token_as_the_table_did() -> None:
    class Padded(Bag):
        def __init__(self) -> None:
            super().__init__()
            self.words = nn.Embedding(60, 24, padding_idx=0)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            real = ids.ne(self.words.padding_idx or 0)[..., None]
            return self.head(self.inner((self.words(ids) * real).sum(1) / real.sum(1).clamp_min(1)))

    torch.manual_seed(0)
    model, rows = Padded(), bag_rows(4)
    split, _ = in_levels(model, [embedding_site(model, "words")], rows, 2)
    assert torch.equal(split(rows[0][0]), model(rows[0][0]))


@pytest.mark.parametrize(("id_", "masked"), [(50, False), (77, True), (-1, False)])
def test_tokens_that_the_table_has_no_row_for_are_named(id_: int, masked: bool) -> None:
    model = tiny_bert()
    rows = [{"input_ids": torch.tensor([[5, 7, id_]]), "attention_mask": torch.tensor([[1, 1, int(not masked)]])}]
    with pytest.raises(DataError, match=rf"within 0\.\.49: {WORDS} has 50 rows\. Got {id_}\."):
        count_tokens(model, WORDS, rows)


def test_tokens_of_both_sides_of_a_pair_are_counted() -> None:
    class Pair(Bag):
        def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            return super().forward(a) - super().forward(b)

    rows = [
        {"a": torch.tensor([[1, 1]]), "b": torch.tensor([[5, 6, 6]])},
        {"a": torch.tensor([[2]]), "b": torch.tensor([[5]])},
    ]
    counts = count_tokens(Pair(), "words", rows)
    assert {i: int(n) for i, n in enumerate(counts) if n} == {1: 2, 2: 1, 5: 2, 6: 2}
