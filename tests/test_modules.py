"""The claims of `rmtkd.modules`: factors and levels change nothing, and a random start is what its seed says."""

from typing import Any

import pytest
import torch
from torch import nn
from transformers import BertForSequenceClassification

from conftest import assert_untouched, random_rows, snapshot, tiny_bert
from rmtkd.cutting import cut_in_order
from rmtkd.errors import OptionError, UnsupportedModelError
from rmtkd.measurement import count_flops, count_parameters
from rmtkd.modules import factorized, level_bounds, low_rank, randomize, split_embedding
from rmtkd.planning import CostTable
from rmtkd.sites import find_sites
from rmtkd.surgery import check_cut, factorize

WORDS = "bert.embeddings.word_embeddings"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_factorized_computes_bit_for_bit_what_the_embedding_does(dtype: torch.dtype) -> None:
    embedding = nn.Embedding(11, 6, padding_idx=0, dtype=dtype)
    ids = torch.randint(0, 11, (4, 7))
    made = factorized(embedding)
    assert torch.equal(made(ids), embedding(ids))
    assert made(ids).dtype == dtype
    assert made.weight is embedding.weight
    assert made.padding_idx == 0


@pytest.mark.parametrize("frozen", [True, False])
def test_what_is_frozen_is_frozen_in_two_factors(frozen: bool) -> None:
    pairs = [low_rank(nn.Conv2d(3, 5, 3).requires_grad_(not frozen), side) for side in ("input", "output")]
    for module in (factorized(nn.Embedding(5, 3).requires_grad_(not frozen)), *pairs):
        flags = {name: parameter.requires_grad for name, parameter in module.named_parameters()}
        assert set(flags.values()) == {not frozen}, flags


@pytest.mark.parametrize("training", [True, False])
def test_factorized_keeps_the_mode_of_the_embedding(training: bool) -> None:
    made = factorized(nn.Embedding(5, 3).train(training))
    assert {module.training for module in made.modules()} == {training}


def test_factorizing_an_embedding_without_memory_takes_none() -> None:
    made = factorized(nn.Embedding(5, 3, device="meta"))
    assert all(parameter.is_meta for parameter in made.parameters())


def test_factorizing_twice_is_factorizing_once() -> None:
    model = tiny_bert()
    factorize(model, WORDS)
    once = model.get_submodule(WORDS)
    factorize(model, WORDS)
    assert model.get_submodule(WORDS) is once


def test_what_transformers_asks_of_its_input_embedding_still_works() -> None:
    model = tiny_bert()
    total = count_parameters(model)
    factorize(model, WORDS)
    assert model.get_input_embeddings() is model.get_submodule(WORDS)
    assert model.num_parameters() == count_parameters(model) == total + 32 * 32 + 32
    embeddings = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Embedding))
    assert model.num_parameters(exclude_embeddings=True) == model.num_parameters() - embeddings
    model.tie_weights()
    model.enable_input_require_grads()
    batch = next(iter(random_rows(4)))
    assert torch.isfinite(model(**batch).loss)


def test_the_vocabulary_of_a_factorised_model_can_grow() -> None:
    model = tiny_bert()
    factorize(model, WORDS)
    ids = torch.arange(4, 12)[None]
    before = model(ids).logits
    model.resize_token_embeddings(60, mean_resizing=False)
    assert torch.equal(model(ids).logits, before)
    assert torch.isfinite(model(ids + 48).logits).all()


def test_a_random_start_depends_on_its_seed_alone() -> None:
    models = [tiny_bert(seed=i) for i in range(3)]
    for model, seed in zip(models, (5, 5, 6), strict=True):
        randomize(model, seed=seed)
    assert_untouched(models[1], snapshot(models[0]))
    assert not torch.equal(models[2].classifier.weight, models[0].classifier.weight)


def test_a_random_start_is_all_to_be_trained() -> None:
    model = tiny_bert().requires_grad_(False)
    randomize(model, seed=0)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_random_start_leaves_the_global_generator_alone() -> None:
    before = torch.random.get_rng_state()
    model = tiny_bert()
    torch.random.set_rng_state(before)
    randomize(model, seed=1)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_a_random_start_is_the_same_in_every_precision() -> None:
    single, double = tiny_bert(), tiny_bert().double()
    randomize(single, seed=3)
    randomize(double, seed=3)
    assert_untouched(double, snapshot(single.double()))


def test_a_random_start_is_xavier_and_small_and_keeps_nothing() -> None:
    model = tiny_bert()
    before = snapshot(model)
    randomize(model, seed=0)
    for name, parameter in model.named_parameters():
        module = model.get_submodule(name.rpartition(".")[0])
        if isinstance(module, nn.Linear) and name.endswith("weight"):
            bound = (6 / (module.in_features + module.out_features)) ** 0.5
            assert 0.8 * bound < parameter.abs().max() <= bound, name
        elif isinstance(module, nn.Embedding):
            assert parameter.abs().max() < 0.1, name
        elif name.endswith("weight"):
            assert torch.equal(parameter, torch.ones_like(parameter)), name
        else:
            assert not parameter.any(), name
        if "LayerNorm" not in name:
            assert not torch.equal(parameter, before[name]), name


def test_a_random_start_reaches_every_kind_of_module() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.token = nn.Parameter(torch.zeros(1, 1, 8))
            self.attention, self.recurrent, self.norm = nn.MultiheadAttention(8, 2), nn.GRU(8, 8), nn.GroupNorm(2, 8)

    model = Mixed()
    for parameter in model.parameters():
        nn.init.constant_(parameter, 7.0)
    randomize(model, seed=0)
    assert not [name for name, parameter in model.named_parameters() if (parameter == 7.0).any()]
    assert not model.norm.bias.any()
    assert not model.attention.in_proj_bias.any()
    assert model.get_parameter("recurrent.weight_hh_l0").std() > 0.1


def split_bert(levels: int | tuple[int, ...] = (5, 20)) -> tuple[BertForSequenceClassification, nn.Module]:
    """A model with its embedding whole, and in levels."""
    model = tiny_bert()
    return model, split_embedding(model, WORDS, token_counts(), levels)


def token_counts() -> torch.Tensor:
    """Of the tiny model's vocabulary: falling, with ties and with tokens that never occur."""
    return (1000 / torch.arange(1, 51)).floor().flip(0) * (torch.arange(50) % 3 > 0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_an_embedding_in_levels_computes_bit_for_bit_what_the_whole_one_does(dtype: torch.dtype) -> None:
    model: Any = tiny_bert().to(dtype)  # type: ignore[arg-type]
    before, ids = snapshot(model), torch.arange(50).view(5, 10)
    split = split_embedding(model, WORDS, token_counts(), (5, 20))
    assert torch.equal(split.get_submodule(WORDS)(ids), model.get_submodule(WORDS)(ids))
    assert torch.equal(split(ids).logits, model(ids).logits)
    assert count_parameters(split) == count_parameters(model)
    assert_untouched(model, before)


def test_tokens_are_in_levels_by_how_often_they_occur() -> None:
    _, split = split_bert()
    levels: Any = split.get_submodule(WORDS)
    assert [level.num_embeddings for level in levels.levels] == [5, 15, 30]
    seen = [token_counts()[(levels.rows >= low) & (levels.rows < high)] for low, high in ((0, 5), (5, 20), (20, 50))]
    assert seen[0].min() >= seen[1].max() and seen[1].min() >= seen[2].max()


def test_the_padding_token_stays_without_gradient() -> None:
    model, split = split_bert()
    pad = model.get_submodule(WORDS).padding_idx
    levels: Any = split.get_submodule(WORDS)
    assert levels.rows[pad] == 20 and levels.levels[2].padding_idx == 0
    split(torch.arange(50).view(5, 10)).logits.sum().backward()
    assert not levels.levels[2].weight.grad[0].any() and levels.levels[2].weight.grad[1:].any(-1).all()
    assert levels.levels[0].weight.grad.any(-1).all()


def test_splitting_draws_no_random_numbers_and_one_level_changes_nothing() -> None:
    state = torch.random.get_rng_state()
    model, split = split_bert(1)
    after = torch.random.get_rng_state()
    torch.random.set_rng_state(state)
    tiny_bert()
    assert torch.equal(torch.random.get_rng_state(), after)
    assert type(split.get_submodule(WORDS)) is nn.Embedding
    assert_untouched(split, snapshot(model))


def test_levels_end_where_a_share_of_all_occurrences_is_reached() -> None:
    counts = torch.tensor([10, 900, 0, 0, 85, 5])
    assert level_bounds(counts, 1) == ()
    assert level_bounds(counts, 2) == (3,)
    assert level_bounds(counts, 3) == (1, 3)
    assert level_bounds(counts, 9) == (1, 2, 3)
    assert level_bounds(torch.zeros(5), 3) == ()


@pytest.mark.parametrize("levels", [(0, 5), (5, 50), (7, 5), (5, 5), (-1,), 0])
def test_levels_that_are_empty_are_refused(levels: int | tuple[int, ...]) -> None:
    with pytest.raises(OptionError, match="levels must"):
        split_embedding(tiny_bert(), WORDS, token_counts(), levels)


def test_counts_of_another_vocabulary_are_refused() -> None:
    with pytest.raises(OptionError, match=r"each of 50 tokens. Got \[49\]"):
        split_embedding(tiny_bert(), WORDS, token_counts()[1:], 3)


def test_an_embedding_that_is_not_plain_is_not_split() -> None:
    model: Any = tiny_bert()
    model.get_submodule(WORDS).max_norm = 1.0
    with pytest.raises(UnsupportedModelError, match=r"plain nn\.Embedding without max_norm"):
        split_embedding(model, WORDS, token_counts(), 3)
    with pytest.raises(UnsupportedModelError, match=r"plain nn\.Embedding"):
        split_embedding(split_bert()[1], WORDS, token_counts(), 3)


def test_every_level_is_a_width_that_is_cut_and_counted_like_any_other() -> None:
    _, split = split_bert()
    rows = list(random_rows(40))
    sites = {site.name: site for site in find_sites(split)}
    widths = {"embeddings.word.0": 4, "embeddings.word.1": 8, "embeddings.word.2": 2}
    cut = [sites[name] for name in widths]
    assert list(sites)[:3] == list(widths)
    student, bases = cut_in_order(split, cut, widths, rows)
    check_cut(split, student, cut, bases, rows[0])
    whole, table = CostTable.measure(split, tuple(sites.values()), rows[0])
    assert table is not None
    dropped = {name: sites[name].width - width for name, width in widths.items()}
    expected = {cost: whole[cost] + table.change(cost, dropped) for cost in whole}
    assert expected == {"params": count_parameters(student), "flops": count_flops(student, rows[0])}
    again = {site.name: site.width for site in find_sites(student)}
    assert again == {name: widths.get(name, site.width) for name, site in sites.items()}


def test_a_level_of_tokens_that_calibration_never_saw_has_directions_of_its_own() -> None:
    _, split = split_bert()
    rare = (split.get_submodule(WORDS).rows >= 20).nonzero()[:, 0]  # type: ignore[operator, union-attr]
    common = torch.tensor([i for i in range(50) if i not in rare])
    rows = [{"input_ids": common[torch.randint(0, 20, (8, 12))]} for _ in range(4)]
    site = next(site for site in find_sites(split) if site.name == "embeddings.word.2")
    cut, _ = cut_in_order(split, [site], {site.name: 16}, rows)
    before, after = (model.get_submodule(WORDS)(rare) for model in (split, cut))
    table = before.detach().double()
    best = torch.linalg.svdvals(table)[16:].square().sum()
    assert (after - before).square().sum().item() == pytest.approx(best.item(), rel=1e-4)


def test_common_tokens_do_not_feel_how_rare_ones_are_cut() -> None:
    _, split = split_bert()
    common = (split.get_submodule(WORDS).rows < 20).nonzero()[:, 0]  # type: ignore[operator, union-attr]
    site = next(site for site in find_sites(split) if site.name == "embeddings.word.2")
    cut, _ = cut_in_order(split, [site], {site.name: 2}, list(random_rows(40)))
    assert torch.equal(cut.get_submodule(WORDS)(common), split.get_submodule(WORDS)(common))
