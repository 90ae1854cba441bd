"""The claims of `rmtkd.surgery`: full width changes nothing, less width computes what the projected model computes, and
the caller's model stays as it was.
"""

import copy
from collections.abc import Mapping
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from conftest import assert_untouched, random_rows, snapshot, tiny_bert
from rmtkd.activations import collect, readers
from rmtkd.bases import Basis, bilinear_bases, linear_basis, unit_basis
from rmtkd.batches import logits
from rmtkd.errors import PlanError, SurgeryError
from rmtkd.measurement import count_parameters
from rmtkd.recipes.rows import TokenRows
from rmtkd.sites import Site, find_sites
from rmtkd.surgery import (
    check_cut,
    factorize,
    fill_with_ones,
    fold,
    projected_logits,
    resize,
    skeleton,
)

ROWS = random_rows(48)
BATCH = list(ROWS)[1]

CUTS: dict[str, dict[str, int]] = {
    "embedding": {"embeddings.word": 11},
    "feed-forward": {"layer.0.ffn": 17, "layer.1.ffn": 5},
    "heads": {"layer.1.query_key": 6, "layer.1.value": 6},
    "one of each": {"embeddings.word": 1, "layer.0.query_key": 1, "layer.0.value": 1, "layer.0.ffn": 1},
    "all": {
        "embeddings.word": 20,
        **{
            f"layer.{i}.{part}": width
            for i in range(2)
            for part, width in (("query_key", 8), ("value", 8), ("ffn", 24))
        },
    },
}
"""Widths by site name; sites that are not named stay whole."""


def bert(dtype: torch.dtype = torch.float32, **config: Any) -> Any:
    return nn.Module.to(tiny_bert(**config), dtype)


def double_bert(**config: Any) -> Any:
    return bert(torch.float64, **config)


def fit(
    model: nn.Module, widths: Mapping[str, int], rows: TokenRows = ROWS
) -> tuple[list[Site], dict[str, tuple[Basis, ...]]]:
    """The sites that are named, and their bases at these widths."""
    sites = [site for site in find_sites(model) if site.name in widths]
    moments = collect(model, sites, rows)
    bases: dict[str, tuple[Basis, ...]] = {}
    for site in sites:
        keep, (moment, *other) = widths[site.name], moments[site.name]
        if site.kind == "bilinear":
            bases[site.name] = bilinear_bases(moment.second_moment(), other[0].covariance(), keep)
        else:
            form = linear_basis if site.kind == "linear" else partial(unit_basis, each=site.each)
            bases[site.name] = (form(moment.covariance(), moment.mean, readers(model, site)[0], keep),)
    return sites, bases


def cut(model: nn.Module, widths: Mapping[str, int]) -> Any:
    return fold(model, *fit(model, widths))


def run(model: nn.Module, batch: dict[str, Tensor] = BATCH) -> Tensor:
    with torch.no_grad():
        return logits(model.eval(), batch)


def difference(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


def shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def test_the_batch_of_these_tests_holds_padding() -> None:
    assert (BATCH["attention_mask"] == 0).any()


# ---------------------------------------------------------------------------------------------- full width


@pytest.mark.parametrize("activation", ["gelu", "relu", "silu", "tanh"])
@pytest.mark.parametrize("kind", ["linear", "pointwise", "bilinear", "heads", "all"])
def test_a_cut_at_full_width_changes_nothing(kind: str, activation: str) -> None:
    model = double_bert(hidden_act=activation)
    widths = {site.name: site.width for site in find_sites(model) if kind in (site.kind, "all")}
    student = cut(model, widths)
    assert difference(run(student), run(model)) < 1e-10
    before = snapshot(model)
    changed = [name for name, p in student.named_parameters() if name in before and not torch.equal(p, before[name])]
    assert bool(changed) == (
        kind not in ("pointwise", "heads")
    )  # keeping all units leaves even the weights as they are


def test_a_cut_at_full_width_changes_nothing_where_units_and_directions_are_dead() -> None:
    model = double_bert(hidden_act="relu")
    with torch.no_grad():
        for layer in model.bert.encoder.layer:
            layer.intermediate.dense.bias[::3] = -1e4  # never fires
            layer.attention.self.value.weight[:8] = 0  # constant
            layer.attention.self.query.weight[3] = layer.attention.self.query.weight[4]  # dependent
            layer.attention.self.key.weight[20] *= 1e4  # far larger than the rest
    student = cut(model, {site.name: site.width for site in find_sites(model)})
    assert difference(run(student), run(model)) < 1e-10


# ---------------------------------------------------------------------------------------------- less width


@pytest.mark.parametrize("activation", ["gelu", "relu"])
@pytest.mark.parametrize("name", CUTS)
def test_a_cut_computes_what_the_projected_model_computes(name: str, activation: str) -> None:
    model = double_bert(hidden_act=activation)
    sites, bases = fit(model, CUTS[name])
    student = fold(model, sites, bases)
    reference = projected_logits(model, sites, bases, BATCH)
    assert difference(run(student), reference) < 1e-9
    assert difference(run(student), run(model)) > 1e-4  # the cut did cut
    assert check_cut(model, student, sites, bases, BATCH) < 1e-9


@pytest.mark.parametrize("name", CUTS)
def test_a_cut_has_the_widths_that_were_asked_for(name: str) -> None:
    model = double_bert()
    student = cut(model, CUTS[name])
    expected = {site.name: CUTS[name].get(site.name, site.width) for site in find_sites(model)}
    assert {site.name: site.width for site in find_sites(student)} == expected


def test_a_compressed_model_is_compressed_again() -> None:
    model = double_bert()
    once = cut(model, CUTS["all"])
    sites, bases = fit(once, {"embeddings.word": 9, "layer.0.query_key": 4, "layer.0.value": 4, "layer.1.ffn": 8})
    twice = fold(once, sites, bases)
    assert check_cut(once, twice, sites, bases, BATCH) < 1e-9
    assert [type(m).__name__ for m in twice.modules()].count("FactorizedEmbedding") == 1
    full = cut(once, {site.name: site.width for site in find_sites(once)})
    assert difference(run(full), run(once)) < 1e-10


def test_any_basis_is_folded_not_only_the_best() -> None:
    model = double_bert()
    sites, bases = fit(model, CUTS["heads"])
    generator = torch.Generator().manual_seed(0)
    for site in sites:
        if site.kind == "linear":
            reduce, lift, mean = (
                torch.randn(shape, generator=generator, dtype=torch.float64)
                for shape in ((2, 6, 16), (2, 16, 6), (2, 16))
            )
            bases[site.name] = (Basis(reduce=reduce, lift=lift, mean=mean),)
    assert check_cut(model, fold(model, sites, bases), sites, bases, BATCH) < 1e-9


def test_projecting_with_hooks_leaves_none_behind() -> None:
    model = double_bert()
    sites, bases = fit(model, CUTS["all"])
    before, expected = snapshot(model), run(model)
    projected_logits(model, sites, bases, BATCH)
    with pytest.raises(IndexError):
        projected_logits(model, sites, bases, {"input_ids": torch.full((1, 3), 999)})
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert torch.equal(run(model), expected)
    assert_untouched(model, before)


# ---------------------------------------------------------------------------------------------- the caller's model


def test_the_caller_s_model_is_byte_identical_and_shares_no_storage() -> None:
    model = double_bert().train()
    before, modules = snapshot(model), [(n, type(m), m.training) for n, m in model.named_modules()]
    sites, bases = fit(model, CUTS["all"])
    student = fold(model, sites, bases)
    check_cut(model, student, sites, bases, BATCH)
    assert_untouched(model, before)
    assert [(n, type(m), m.training) for n, m in model.named_modules()] == modules
    mine, theirs = ({t.untyped_storage().data_ptr() for t in [*m.parameters(), *m.buffers()]} for m in (model, student))
    assert not mine & theirs
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.fill_(7)
    assert_untouched(model, before)
    assert student.config is not model.config


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dtype_mode_and_frozen_flags_are_kept(dtype: torch.dtype) -> None:
    model = bert(dtype).train()
    model.get_submodule("bert.encoder.layer.0").requires_grad_(False)
    student = cut(model, CUTS["all"])
    assert {parameter.dtype for parameter in student.parameters()} == {dtype}
    assert student.training
    for name, parameter in student.named_parameters():
        assert parameter.requires_grad == ("encoder.layer.0" not in name), name


# ---------------------------------------------------------------------------------------------- the check


def attention_of(model: nn.Module) -> Any:
    return model.get_submodule("bert.encoder.layer.0.attention.self")


@pytest.mark.parametrize(
    ("keep", "stale"),
    [
        (8, {"scaling": 16**-0.5}),
        (8, {"attention_head_size": 16}),  # runs: two heads of 8 are taken for one of 16
        (6, {"attention_head_size": 16}),  # does not run: 12 is no multiple of 16
    ],
)
def test_a_stale_attribute_in_the_cut_model_is_caught(keep: int, stale: dict[str, float]) -> None:
    model = double_bert()
    sites, bases = fit(model, {"layer.0.query_key": keep, "layer.0.value": keep})
    student = fold(model, sites, bases)
    for name, value in stale.items():
        setattr(attention_of(student), name, value)
    with pytest.raises(SurgeryError, match=r"layer\.0\.query_key, layer\.0\.value"):
        check_cut(model, student, sites, bases, BATCH)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", CUTS)
def test_an_honest_cut_passes_the_check_in_every_precision(name: str, dtype: torch.dtype) -> None:
    model = bert(dtype)
    sites, bases = fit(model, CUTS[name])
    check_cut(model, fold(model, sites, bases), sites, bases, BATCH)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("fault", ["bias", "transposed", "not finite"])
def test_a_wrong_weight_in_the_cut_model_is_caught(fault: str, dtype: torch.dtype) -> None:
    model = bert(dtype)
    sites, bases = fit(model, CUTS["all"])
    student = fold(model, sites, bases)
    with torch.no_grad():
        output: Any = student.get_submodule("bert.encoder.layer.1.output.dense")
        if fault == "bias":  # the mean of what was dropped is forgotten
            output.bias.copy_(model.get_parameter("bert.encoder.layer.1.output.dense.bias"))
        elif fault == "transposed":
            output.weight.copy_(output.weight.flip(1))
        else:
            output.weight[0, 0] = float("nan")
    with pytest.raises(SurgeryError, match="projected full-width reference"):
        check_cut(model, student, sites, bases, BATCH)


def test_the_check_leaves_both_models_as_they_were() -> None:
    model = bert().train()
    sites, bases = fit(model, CUTS["all"])
    student = fold(model, sites, bases)
    before = snapshot(model), snapshot(student)
    check_cut(model, student, sites, bases, BATCH)
    assert_untouched(model, before[0])
    assert_untouched(student, before[1])
    assert model.training
    assert student.training


def test_widths_that_disagree_on_a_shared_width_are_refused() -> None:
    model = double_bert()
    before = snapshot(model)
    sites, bases = fit(model, {"layer.0.query_key": 8, "layer.0.value": 6})
    with pytest.raises(PlanError, match=r"share the width layer\.0\.head .* Got 8 and 6"):
        fold(model, sites, bases)
    assert_untouched(model, before)


# ---------------------------------------------------------------------------------------------- running and training


@pytest.mark.filterwarnings("error")
def test_fused_attention_still_runs_with_equal_head_widths(monkeypatch: pytest.MonkeyPatch) -> None:
    student = cut(bert(attn_implementation="sdpa"), CUTS["all"])
    fused, heads = nn.functional.scaled_dot_product_attention, []

    def note(query: Tensor, key: Tensor, value: Tensor, *args, **kwargs) -> Tensor:
        heads.append([tensor.shape[1::2] for tensor in (query, key, value)])
        return fused(query, key, value, *args, **kwargs)

    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", note)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):  # no other kernel is allowed
        assert run(student).isfinite().all()
    assert heads == [[(2, 8)] * 3] * 2


@pytest.mark.parametrize("name", ["heads", "all"])
def test_eager_and_fused_attention_agree_after_a_cut(name: str) -> None:
    student = cut(double_bert(attn_implementation="sdpa"), CUTS[name])
    fused = run(student)
    student.set_attn_implementation("eager")
    assert difference(run(student), fused) < 1e-12


def test_gradients_reach_every_parameter_of_a_cut_model() -> None:
    student = cut(bert(), CUTS["all"]).train()
    student(**BATCH).loss.backward()
    for name, parameter in student.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.shape == parameter.shape, name
        assert parameter.grad.isfinite().all(), name
        if not name.endswith("key.bias"):  # softmax does not see it
            assert parameter.grad.abs().max() > 1e-7, name
    torch.optim.AdamW(student.parameters(), lr=1e-3).step()
    assert run(student).isfinite().all()


def test_every_module_knows_its_new_sizes() -> None:
    student = cut(bert(), CUTS["all"])
    linears = [module for module in student.modules() if isinstance(module, nn.Linear)]
    embeddings = [module for module in student.modules() if isinstance(module, nn.Embedding)]
    assert len(linears) == 2 * 6 + 3
    for linear in linears:
        assert (linear.out_features, linear.in_features) == linear.weight.shape
        assert linear.bias.shape == (linear.out_features,)
        assert linear.weight.is_contiguous()
    for embedding in embeddings:
        assert (embedding.num_embeddings, embedding.embedding_dim) == embedding.weight.shape
    attention = attention_of(student)
    assert (attention.attention_head_size, attention.all_head_size, attention.scaling) == (8, 16, 8**-0.5)


# ---------------------------------------------------------------------------------------------- shapes


@pytest.mark.parametrize("name", CUTS)
def test_a_skeleton_has_exactly_the_shapes_of_the_narrow_model(name: str) -> None:
    model = bert()
    shape = skeleton(model, find_sites(model), CUTS[name])
    assert shapes(shape) == shapes(cut(model, CUTS[name]))
    assert list(shapes(shape)) == list(shapes(cut(model, CUTS[name])))
    for module in shape.modules():
        if isinstance(module, nn.Linear):
            assert (module.out_features, module.in_features) == module.weight.shape


def test_a_skeleton_takes_no_memory_and_leaves_the_model_alone() -> None:
    model = bert()
    before = snapshot(model)
    shape = skeleton(model, find_sites(model), CUTS["all"])
    assert all(parameter.is_meta for parameter in shape.parameters())
    assert_untouched(model, before)
    fill_with_ones(shape, "cpu")
    assert_untouched(model, before)
    assert all(bool((parameter == 1).all()) for parameter in shape.parameters())


def test_a_skeleton_at_full_width_is_the_model_s_shape() -> None:
    model = bert().requires_grad_(False)
    sites = find_sites(model)
    for widths in ({}, {site.name: site.width for site in sites}):
        shape = skeleton(model, sites, widths)
        assert shapes(shape) == shapes(model)
        assert not any(parameter.requires_grad for parameter in shape.parameters())


def test_a_skeleton_counts_tied_parameters_once_and_runs() -> None:
    model = bert()
    pooler, dense = model.get_submodule("bert.pooler.dense"), nn.Linear(32, 32)
    dense.weight = pooler.weight
    model.classifier = nn.Sequential(dense, model.classifier)
    shape = skeleton(model, find_sites(model), {})
    assert count_parameters(shape) == count_parameters(model)
    fill_with_ones(shape, "cpu")
    assert not any(parameter.is_meta for parameter in shape.parameters())
    assert run(shape).isfinite().all()


def test_resizing_and_loading_gives_the_narrow_model_back() -> None:
    model = bert()
    student = cut(model, CUTS["all"])
    other = bert(seed=1)
    factorize(other, "bert.embeddings.word_embeddings")
    resize(other, shapes(student))
    assert shapes(other) == shapes(student)
    for site in find_sites(student):
        for attribute in site.attributes:
            value = attribute.value(site.width, site.groups, site.each)
            setattr(other.get_submodule(attribute.module), attribute.name, value)
    other.load_state_dict(student.state_dict())
    assert torch.equal(run(other), run(student))


def test_a_cut_model_can_be_copied_and_moved() -> None:
    student = cut(bert(), CUTS["all"])
    assert torch.equal(run(copy.deepcopy(student)), run(student))
    assert difference(run(copy.deepcopy(student).double()).float(), run(student)) < 1e-4
