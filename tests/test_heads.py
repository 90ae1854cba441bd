"""Whole heads go and widths may be zero: the cut, its cost, the plan and the folder, for every family."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForSequenceClassification

import rmtkd
from conftest import FAMILY_NAMES, pair_batches, tiny, tiny_bert
from rmtkd import artifact
from rmtkd.bases import order_units, select_heads
from rmtkd.batches import logits
from rmtkd.cutting import cut_in_order
from rmtkd.measurement import count_parameters
from rmtkd.modeling_rmtkd import NoHeads
from rmtkd.planning import predict_cost
from rmtkd.planning.costs import CostTable
from rmtkd.pretrained import presented
from rmtkd.sites import after_cuts, by_width, find_sites
from rmtkd.surgery import check_cut, skeleton

CUTS: dict[str, dict[str, int]] = {
    "fewer heads": {"heads": 3},
    "fewer and narrower heads": {"layer.0.heads": 2, "query_key": 4, "value": 4},
    "no heads": {"layer.0.heads": 0},
    "no feed-forward": {"ffn": 0},
    "nothing but the embedding": {"heads": 0, "query_key": 4, "value": 4, "ffn": 0},
}
"""Widths by the name of a site, or by the last part of it."""


def cut(model: nn.Module, name: str) -> tuple[nn.Module, float]:
    """The model after the cut of this name, and its difference from the projected full-width reference."""
    every = find_sites(model)
    kept = {s.name: CUTS[name].get(s.name, CUTS[name].get(s.name.split(".")[-1], s.width)) for s in every}
    sites = [site for site in every if kept[site.name] < site.width]
    rows = pair_batches(model)
    student, bases = cut_in_order(model, sites, kept, rows)
    assert shapes(student) == shapes(skeleton(model, every, kept))
    return student.eval(), check_cut(model, student, sites, bases, rows[0])


def shapes(model: nn.Module) -> dict[str, torch.Size]:
    return {name: parameter.shape for name, parameter in model.named_parameters()}


def run(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return logits(model, pair_batches(model)[0])


@pytest.mark.parametrize("name", CUTS)
@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_a_cut_is_the_projected_model_and_its_folder_loads_everywhere(family: str, name: str, tmp_path: Path) -> None:
    model = tiny(family, num_attention_heads=4).double()
    student, error = cut(model, name)
    assert error < 1e-9
    single = copy.deepcopy(student).float()
    artifact.save(single, tmp_path / "model")
    loaded, report = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model", output_loading_info=True)
    assert not any(report.values()), report
    loaded.save_pretrained(tmp_path / "again")
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "again")
    for other in (rmtkd.load(tmp_path / "model"), loaded, again):
        assert torch.equal(run(other), run(single))
        assert shapes(other) == shapes(single)


def test_a_layer_without_heads_and_feed_forward_says_so_and_has_no_sites() -> None:
    student, _ = cut(tiny_bert(num_attention_heads=4), "nothing but the embedding")
    shown: Any = presented(student)
    assert [site.name for site in find_sites(shown)] == ["embeddings.word"]
    nothing = {"intermediate_size": 0, "num_attention_heads": 0}
    assert shown.config.to_dict()["per_layer_config"] == {"0": nothing, "1": nothing}
    attention = shown.get_submodule("bert.encoder.layer.0.attention.self")
    assert type(attention) is NoHeads and not list(attention.parameters())


def test_a_model_with_fewer_heads_is_cut_again() -> None:
    once = presented(cut(tiny_bert(num_attention_heads=4), "fewer and narrower heads")[0])
    heads = {site.name: (site.width, site.each) for site in find_sites(once) if site.kind == "heads"}
    assert heads == {"layer.0.heads": (2, 4), "layer.1.heads": (4, 4)}
    sites = [site for site in find_sites(once) if site.kind == "heads"]
    kept = {site.name: 1 for site in sites}
    twice, bases = cut_in_order(once, sites, kept, pair_batches(once))
    check_cut(once, twice, sites, bases, pair_batches(once)[0])
    assert torch.equal(run(presented(twice)), run(twice))


def test_sites_follow_the_heads_that_stay() -> None:
    sites = find_sites(tiny_bert(num_attention_heads=4))
    after = {
        site.name: site for site in after_cuts(sites, {"layer.0.heads": 3, "layer.0.value": 5, "layer.1.heads": 0})
    }
    assert (after["layer.0.value"].groups, after["layer.0.value"].width) == (3, 5)
    assert (after["layer.0.heads"].width, after["layer.0.heads"].each) == (3, 5)
    assert "layer.1.value" not in after and "layer.1.query_key" not in after


def test_the_formula_of_the_cost_holds_down_to_nothing() -> None:
    model = tiny_bert(num_attention_heads=4)
    sites, batch = find_sites(model), pair_batches(model)[0]
    whole, table = CostTable.measure(model, sites, batch)
    assert table is not None
    for heads, head, ffn in ((3, 5, 7), (0, 5, 0), (1, 1, 48), (4, 3, 0), (0, 8, 48)):
        kept = {"heads": heads, "head": head, "ffn": ffn, "word": 32}
        widths = {site.name: kept[site.shares.split(".")[-1]] for site in sites}
        dropped = {shares: group[0].width - widths[group[0].name] for shares, group in by_width(sites).items()}
        predicted = {cost: whole[cost] + table.change(cost, dropped) for cost in whole}
        assert predicted == predict_cost(model, sites, widths, batch)


def test_heads_with_one_coordinate_are_chosen_as_units_are() -> None:
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(12, 12, generator=generator, dtype=torch.float64)
    reader = torch.randn(5, 12, generator=generator, dtype=torch.float64)
    for keep in (0, 1, 5, 12):
        units = order_units([root @ root.T], [reader], keep).sort().values
        assert torch.equal(select_heads(root @ root.T, reader, keep, 1), units)


def test_a_head_that_another_repeats_goes_first() -> None:
    generator = torch.Generator().manual_seed(0)
    heads = torch.randn(500, 3, 4, generator=generator, dtype=torch.float64)
    context = torch.cat([heads, heads[:, 1:2] @ torch.randn(4, 4, generator=generator, dtype=torch.float64)], 1)
    flat = context.flatten(1)
    kept = select_heads(flat.T @ flat / 500, torch.eye(16, dtype=torch.float64), 3, 4).tolist()
    assert {0, 2} < set(kept) and len({1, 3} & set(kept)) == 1


def test_no_plan_takes_heads_unless_it_is_asked_to() -> None:
    model = tiny_bert(num_attention_heads=4)
    rows = [{**batch, "labels": logits(model, batch).argmax(-1).detach()} for batch in pair_batches(model)]
    small = rmtkd.compress(model, train=rows, selection=rows[:2], epochs=0.0, multiple_of=4)
    assert {site.keep for site in small.plan.sites if site.kind == "heads"} == {4}
    wishes = {"layer.0.heads": 0, "layer.1.heads": 2, "layer.1.ffn": 0, "layer.*.value": 4}
    small = rmtkd.compress(model, train=rows, selection=rows[:2], epochs=0.0, granularity="site", keep=wishes)
    assert {name: small.plan.widths[name] for name in wishes if "*" not in name} == {
        name: width for name, width in wishes.items() if "*" not in name
    }
    assert count_parameters(small.model) == small.plan.predicted["params"]
