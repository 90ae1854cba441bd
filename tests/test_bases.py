"""The claims of `rmtkd.bases`: exact at full width, best below it.

Errors are computed here from covariances and projectors alone, optima from a singular value decomposition or from
samples; neither shares code with the closed forms.
"""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rmtkd.bases import Basis, bilinear_bases, linear_basis, order_units, unit_bases, unit_basis

DOUBLE = torch.float64
seeds = st.integers(0, 10_000)


def covariance_of(kind: str, groups: int, width: int, seed: int) -> Tensor:
    """Covariances such as networks have them: dead units, constant features, scales far apart."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(groups, width, width, generator=generator, dtype=DOUBLE)
    if kind == "rank-deficient":
        mixing = mixing[..., : max(1, width // 3)]
    matrix = mixing @ mixing.mT / width
    if kind == "zero":
        matrix = torch.zeros_like(matrix)
    if kind == "dead units":
        matrix[:, ::2] = matrix[:, :, ::2] = 0
    if kind == "one constant feature":
        matrix[:, 0] = matrix[:, :, 0] = 0
    if kind == "one group dead":
        matrix[0] = 0
    if kind == "badly scaled":
        scale = torch.logspace(-6, 6, width, dtype=DOUBLE)
        matrix = scale[:, None] * matrix * scale
    if kind == "tiny":
        matrix = matrix * 1e-30
    if kind == "large mean":  # as in a second moment
        matrix = matrix + 1e8
    return matrix


KINDS = [
    "plain",
    "zero",
    "rank-deficient",
    "dead units",
    "one constant feature",
    "one group dead",
    "badly scaled",
    "tiny",
    "large mean",
]
kinds = st.sampled_from(KINDS)


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


def root(matrix: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp_min(0).sqrt()[..., None, :]) @ vectors.mT


def tail(matrix: Tensor, keep: int) -> Tensor:
    """Squared error of the best rank-`keep` approximation of a matrix, per group (Eckart-Young)."""
    return torch.linalg.svdvals(matrix)[..., keep:].square().sum(-1)


def linear_error(projector: Tensor, covariance: Tensor, reader: Tensor) -> Tensor:
    """Expected squared error of what the reader computes, per group."""
    missing = reader @ (torch.eye(covariance.shape[-1], dtype=DOUBLE) - projector)
    return (missing @ covariance @ missing.mT).diagonal(dim1=-2, dim2=-1).sum(-1)


def product_error(projector: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """Expected squared error of the scalar product of independent streams, per group."""
    missing = torch.eye(first.shape[-1], dtype=DOUBLE) - projector.mT  # qᵀ (I - X) k, with q lifted to Xᵀ q
    return (missing.mT @ first @ missing @ second).diagonal(dim1=-2, dim2=-1).sum(-1)


def assert_exact(basis: Basis, width: int) -> None:
    identity = torch.eye(width, dtype=DOUBLE).expand_as(basis.projector)
    assert (basis.projector - identity).abs().max() < 1e-10


# ---------------------------------------------------------------------------------------------- full width


@settings(deadline=None, max_examples=40)
@given(kind=kinds, width=st.integers(1, 40), out=st.integers(1, 60), seed=seeds)
def test_a_linear_basis_of_full_width_changes_nothing(kind: str, width: int, out: int, seed: int) -> None:
    covariance = covariance_of(kind, 2, width, seed)
    basis = linear_basis(covariance, normal(2, width, seed=seed), normal(2, out, width, seed=seed), width)
    assert_exact(basis, width)


@settings(deadline=None, max_examples=40)
@given(kind=kinds, width=st.integers(1, 40), seed=seeds)
def test_a_unit_basis_of_full_width_changes_nothing(kind: str, width: int, seed: int) -> None:
    covariance = covariance_of(kind, 2, width, seed)
    basis = unit_basis(covariance, normal(2, width, seed=seed), normal(2, 5, width, seed=seed), width)
    assert torch.equal(basis.projector, torch.eye(width, dtype=DOUBLE).expand(2, width, width))


@settings(deadline=None, max_examples=60)
@given(first=kinds, second=kinds, width=st.integers(1, 40), seed=seeds)
def test_bilinear_bases_of_full_width_change_nothing(first: str, second: str, width: int, seed: int) -> None:
    pair = bilinear_bases(covariance_of(first, 2, width, seed), covariance_of(second, 2, width, seed + 1), width)
    for basis in pair:
        assert_exact(basis, width)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("keep", [1, 5, 11])
def test_reducing_what_was_lifted_changes_nothing_at_any_width(kind: str, keep: int) -> None:
    covariance, mean, reader = covariance_of(kind, 3, 12, 1), normal(3, 12, seed=2), normal(3, 20, 12, seed=3)
    pair = bilinear_bases(covariance, covariance_of("plain", 3, 12, 4), keep)
    for basis in (linear_basis(covariance, mean, reader, keep), unit_basis(covariance, mean, reader, keep), *pair):
        inner = basis.reduce @ basis.lift
        torch.testing.assert_close(inner, torch.eye(keep, dtype=DOUBLE).expand_as(inner), rtol=0, atol=1e-11)
        assert basis.reduce.shape == (3, keep, 12)
        assert basis.lift.shape == (3, 12, keep)
        assert basis.reduce.isfinite().all()
        assert basis.lift.isfinite().all()


# ---------------------------------------------------------------------------------------------- linear


@settings(deadline=None, max_examples=40)
@given(width=st.integers(2, 16), out=st.integers(1, 24), seed=seeds, data=st.data())
def test_a_linear_basis_reaches_the_eckart_young_bound(width: int, out: int, seed: int, data: st.DataObject) -> None:
    keep = data.draw(st.integers(1, width - 1))
    covariance = covariance_of("plain", 2, width, seed) + 0.01 * torch.eye(width, dtype=DOUBLE)
    reader = normal(2, out, width, seed=seed + 1)
    basis = linear_basis(covariance, torch.zeros(2, width, dtype=DOUBLE), reader, keep)
    error = linear_error(basis.projector, covariance, reader)
    total = linear_error(torch.zeros_like(basis.projector), covariance, reader)
    # The metric is regularised by 1e-6, hence the tolerance.
    torch.testing.assert_close(error / total, tail(reader @ root(covariance), keep) / total, rtol=1e-4, atol=1e-6)


def test_no_other_linear_basis_does_better() -> None:
    covariance, reader = covariance_of("plain", 1, 10, 0), normal(1, 7, 10, seed=1)
    best = linear_error(linear_basis(covariance, normal(1, 10, seed=2), reader, 4).projector, covariance, reader)
    principal = torch.linalg.eigh(covariance).eigenvectors[..., -4:]
    assert best < linear_error(principal @ principal.mT, covariance, reader)
    for seed in range(50):
        reduce = normal(1, 4, 10, seed=seed)
        # The best lift for this `reduce`: regression of the activations on the coordinates.
        lift = covariance @ reduce.mT @ torch.linalg.inv(reduce @ covariance @ reduce.mT)
        assert best < linear_error(lift @ reduce, covariance, reader)


@settings(deadline=None, max_examples=40)
@given(kind=kinds, width=st.integers(2, 24), seed=seeds, data=st.data())
def test_a_linear_basis_has_orthonormal_coordinates(kind: str, width: int, seed: int, data: st.DataObject) -> None:
    keep = data.draw(st.integers(1, width))
    basis = linear_basis(
        covariance_of(kind, 2, width, seed), normal(2, width, seed=seed), normal(2, 3, width, seed=seed), keep
    )
    gram = basis.reduce @ basis.reduce.mT
    torch.testing.assert_close(gram, torch.eye(keep, dtype=DOUBLE).expand_as(gram), rtol=0, atol=1e-12)


def test_a_linear_basis_loses_nothing_where_the_activations_have_no_more_directions() -> None:
    covariance, reader = covariance_of("rank-deficient", 2, 12, 0), normal(2, 9, 12, seed=1)
    basis = linear_basis(covariance, torch.zeros(2, 12, dtype=DOUBLE), reader, 4)
    total = linear_error(torch.zeros_like(basis.projector), covariance, reader)
    assert (linear_error(basis.projector, covariance, reader) < 1e-5 * total).all()


def test_the_groups_of_a_basis_are_independent() -> None:
    covariance, mean, reader = covariance_of("plain", 3, 8, 0), normal(3, 8, seed=1), normal(3, 6, 8, seed=2)
    for form in (linear_basis, unit_basis):
        together = form(covariance, mean, reader, 3).projector
        for g in range(3):
            alone = form(covariance[g : g + 1], mean[g : g + 1], reader[g : g + 1], 3).projector
            torch.testing.assert_close(together[g : g + 1], alone, rtol=1e-9, atol=1e-9)


# ---------------------------------------------------------------------------------------------- units


@settings(deadline=None, max_examples=40)
@given(kind=kinds, width=st.integers(2, 24), seed=seeds, data=st.data())
def test_a_unit_basis_passes_kept_units_through_untouched(
    kind: str, width: int, seed: int, data: st.DataObject
) -> None:
    keep = data.draw(st.integers(1, width))
    basis = unit_basis(
        covariance_of(kind, 2, width, seed), normal(2, width, seed=seed), normal(2, 3, width, seed=seed), keep
    )
    for g in range(2):
        kept = basis.reduce[g].argmax(1)
        assert len(set(kept.tolist())) == keep
        assert torch.equal(basis.reduce[g], torch.nn.functional.one_hot(kept, width).double())
        assert torch.equal(basis.lift[g, kept], torch.eye(keep, dtype=DOUBLE))


@pytest.mark.parametrize("keep", [1, 4, 9])
def test_units_are_reconstructed_as_numpy_does_by_least_squares_on_the_samples(keep: int) -> None:
    samples = normal(400, 10, seed=0) @ normal(10, 10, seed=1) + 5
    mean = samples.mean(0)
    centred = samples - mean
    basis = unit_basis((centred.mT @ centred / 400)[None], mean[None], normal(1, 6, 10, seed=2), keep)
    kept = basis.reduce[0].argmax(1)
    expected = np.linalg.lstsq(centred[:, kept].numpy(), centred.numpy())[0]
    got = samples[:, kept] @ basis.lift[0].mT + (mean - basis.projector[0] @ mean)
    np.testing.assert_allclose(basis.lift[0].mT, expected, rtol=1e-3, atol=1e-4)  # the ridge is 1e-6
    np.testing.assert_allclose(got, centred[:, kept].numpy() @ expected + mean.numpy(), rtol=0, atol=1e-3)


def residual(covariance: Tensor, chosen: list[int]) -> Tensor:
    """Covariance of what regression on the chosen units leaves, from the formula."""
    if not chosen:
        return covariance
    cross = covariance[:, chosen]
    return covariance - cross @ torch.linalg.solve(cross[chosen], cross.mT)


@settings(deadline=None, max_examples=30)
@given(width=st.integers(2, 12), out=st.integers(1, 8), seed=seeds, data=st.data())
def test_units_are_chosen_as_brute_force_would_choose_them(
    width: int, out: int, seed: int, data: st.DataObject
) -> None:
    keep = data.draw(st.integers(1, width))
    covariance = covariance_of("plain", 1, width, seed)[0] + 0.05 * torch.eye(width, dtype=DOUBLE)
    reader = normal(out, width, seed=seed + 1)
    chosen: list[int] = []
    for _ in range(keep):
        lacking = [
            float("inf")
            if unit in chosen
            else float((reader @ residual(covariance, [*chosen, unit]) @ reader.mT).trace())
            for unit in range(width)
        ]
        chosen.append(int(np.argmin(lacking)))
    assert order_units([covariance], [reader], keep).tolist() == chosen


def test_one_of_each_is_chosen_where_units_are_copies_of_a_few() -> None:
    source = torch.arange(15) % 5
    samples = normal(200, 5, seed=0)[:, source]
    covariance, reader = samples.mT @ samples / 200, normal(4, 15, seed=1)
    chosen = order_units([covariance], [reader], 5)
    assert sorted(source[chosen].tolist()) == [0, 1, 2, 3, 4]
    basis = unit_basis(covariance[None], torch.zeros(1, 15, dtype=DOUBLE), reader[None], 5)
    total = linear_error(torch.zeros(1, 15, 15, dtype=DOUBLE), covariance[None], reader[None])
    assert linear_error(basis.projector, covariance[None], reader[None]) < 1e-9 * total


def test_an_exact_subset_is_found_where_units_are_mixtures_of_a_few() -> None:
    samples = normal(300, 6, seed=0) @ normal(6, 20, seed=1)
    covariance, reader = samples.mT @ samples / 300, normal(7, 20, seed=2)
    basis = unit_basis(covariance[None], torch.zeros(1, 20, dtype=DOUBLE), reader[None], 6)
    total = linear_error(torch.zeros(1, 20, 20, dtype=DOUBLE), covariance[None], reader[None])
    assert linear_error(basis.projector, covariance[None], reader[None]) < 1e-6 * total


def test_dead_and_constant_units_are_chosen_last() -> None:
    covariance = covariance_of("dead units", 1, 12, 0)[0]
    assert sorted(order_units([covariance], [normal(5, 12, seed=1)], 6).tolist()) == [1, 3, 5, 7, 9, 11]


def test_a_unit_that_nobody_reads_and_nothing_depends_on_is_chosen_last() -> None:
    covariance, reader = torch.eye(6, dtype=DOUBLE), normal(4, 6, seed=0)
    reader[:, 2] = 0
    assert 2 not in order_units([covariance], [reader], 5).tolist()


# ---------------------------------------------------------------------------------------------- bilinear


@settings(deadline=None, max_examples=40)
@given(width=st.integers(2, 16), seed=seeds, data=st.data())
def test_bilinear_bases_reach_the_eckart_young_bound(width: int, seed: int, data: st.DataObject) -> None:
    keep = data.draw(st.integers(1, width - 1))
    first, second = (covariance_of("plain", 2, width, s) + 0.01 * torch.eye(width, dtype=DOUBLE) for s in (seed, -seed))
    basis, _ = bilinear_bases(first, second, keep)
    error = product_error(basis.projector, first, second)
    total = product_error(torch.zeros_like(basis.projector), first, second)
    torch.testing.assert_close(error / total, tail(root(first) @ root(second), keep) / total, rtol=1e-4, atol=1e-6)


def test_a_moment_that_rounding_took_below_zero_gives_a_pair_of_usual_size() -> None:
    first, second = covariance_of("rank-deficient", 2, 12, 0), covariance_of("plain", 2, 12, 1)
    below = first - 1e-5 * first.diagonal(dim1=-2, dim2=-1).mean() * torch.eye(12, dtype=DOUBLE)
    for basis, expected in zip(bilinear_bases(below, second, 8), bilinear_bases(first, second, 8), strict=True):
        assert float(basis.reduce.abs().max()) < 10 * float(expected.reduce.abs().max())
        assert basis.lift.isfinite().all()


def test_no_other_pair_does_better() -> None:
    first, second = covariance_of("plain", 1, 9, 0), covariance_of("plain", 1, 9, 1)
    best = product_error(bilinear_bases(first, second, 3)[0].projector, first, second)
    for seed in range(50):
        orthonormal = torch.linalg.qr(normal(1, 9, 3, seed=seed)).Q
        oblique = normal(1, 9, 3, seed=seed) @ normal(1, 3, 9, seed=seed + 50) / 9
        for projector in (orthonormal @ orthonormal.mT, oblique):
            assert best < product_error(projector, first, second)


@pytest.mark.parametrize("keep", [1, 4, 9])
def test_both_streams_of_a_product_have_the_same_diagonal_second_moment(keep: int) -> None:
    first, second = covariance_of("plain", 2, 9, 0), 1e4 * covariance_of("plain", 2, 9, 1)
    query, key = bilinear_bases(first, second, keep)
    for basis, moment in ((query, first), (key, second)):
        expected = torch.diag_embed(torch.linalg.svdvals(root(first) @ root(second))[:, :keep])
        got = basis.reduce @ moment @ basis.reduce.mT
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4 * float(expected.max()))


@pytest.mark.parametrize("keep", [2, 9])
def test_the_two_projectors_of_a_product_are_each_other_s_transpose(keep: int) -> None:
    query, key = bilinear_bases(covariance_of("plain", 2, 9, 0), covariance_of("plain", 2, 9, 1), keep)
    torch.testing.assert_close(query.projector, key.projector.mT, rtol=1e-12, atol=1e-12)
    q, k = normal(5, 2, 9, seed=3), normal(5, 2, 9, seed=4)
    narrow = torch.einsum("gkw,ngw,gkv,ngv->ng", query.reduce, q, key.reduce, k)
    lifted = torch.einsum("ngw,ngw->ng", torch.einsum("gvw,ngw->ngv", query.projector, q), k)
    torch.testing.assert_close(narrow, lifted, rtol=1e-10, atol=1e-10)
    assert not query.mean.any()
    assert not key.mean.any()


# ---------------------------------------------------------------------------------------------- all of them


@pytest.mark.parametrize("scale", [1e-12, 1e-3, 1e6])
def test_projectors_do_not_depend_on_the_unit_of_the_activations(scale: float) -> None:
    covariance, mean, reader = covariance_of("plain", 2, 8, 0), normal(2, 8, seed=1), normal(2, 6, 8, seed=2)
    other = covariance_of("plain", 2, 8, 3)
    for form in (
        lambda c: linear_basis(c, mean, reader, 3),
        lambda c: unit_basis(c, mean, reader, 3),
        lambda c: bilinear_bases(c, other, 3)[0],
    ):
        torch.testing.assert_close(form(covariance * scale).projector, form(covariance).projector, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("form", [linear_basis, unit_basis])
def test_the_mean_is_carried_along(form) -> None:
    mean = normal(2, 8, seed=1)
    assert torch.equal(form(covariance_of("plain", 2, 8, 0), mean, normal(2, 6, 8, seed=2), 3).mean, mean)


def test_fewer_units_are_the_first_of_more() -> None:
    """So that one choice serves all widths of a site."""
    root, reader = normal(12, 12, seed=3), normal(5, 12, seed=4)
    covariance = root @ root.mT
    orders: dict[int, torch.Tensor] = {}
    mean = torch.zeros(1, 12, dtype=torch.float64)
    for keep in (9, 4, 7, 12, 11):
        kept = unit_bases([covariance[None]], [mean], [reader[None]], keep, orders=orders)[0]
        anew = unit_basis(covariance[None], mean, reader[None], keep)
        assert torch.equal(kept.reduce, anew.reduce)
        assert torch.equal(kept.lift, anew.lift)
    assert len(orders[0]) == 11
