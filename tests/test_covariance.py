"""The claims of `rmtkd.covariance`: right small eigenvalues, exact merges, honest edge cases.

The reference is always NumPy in float64 on all vectors at once; it shares no code with the class.
"""

from collections.abc import Iterator
from functools import reduce
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rmtkd.covariance import Covariance
from rmtkd.errors import DataError, OptionError


def vectors_of(n: int, groups: int, width: int, seed: int = 0, mean: float = 1.0) -> Tensor:
    """Correlated float64 vectors with a different mean and scale in every coordinate."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(groups, width, width, generator=generator, dtype=torch.float64) / width**0.5
    white = torch.randn(n, groups, width, generator=generator, dtype=torch.float64)
    centre = mean * torch.randn(groups, width, generator=generator, dtype=torch.float64)
    return torch.einsum("ngi,gij->ngj", white, mixing + torch.eye(width, dtype=torch.float64)) + centre


def one_shot(vectors: Tensor) -> np.ndarray:
    x = vectors.double().numpy()
    return np.stack([np.cov(x[:, g].T, bias=True).reshape(x.shape[2], -1) for g in range(x.shape[1])])


def streamed(vectors: Tensor, sizes: list[int], **options: Tensor) -> Covariance:
    covariance = Covariance(vectors.shape[2], groups=vectors.shape[1], **options)
    for part in vectors.split(sizes):
        covariance.update(part)
    return covariance


def assert_same_moments(a: Covariance, b: Covariance, rtol: float) -> None:
    assert a.count == b.count
    for x, y in ((a.mean, b.mean), (a.covariance(), b.covariance()), (a.eigenvalues(), b.eigenvalues())):
        torch.testing.assert_close(x, y, rtol=rtol, atol=rtol * float(y.abs().max()))


@pytest.fixture
def float32_precision() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


# ---------------------------------------------------------------------------------------------- moments


@pytest.mark.parametrize(("n", "groups", "width"), [(1, 1, 1), (7, 1, 3), (300, 4, 8), (9000, 2, 5)])
def test_moments_are_those_of_numpy(n: int, groups: int, width: int) -> None:
    vectors = vectors_of(n, groups, width, mean=3.0)
    covariance = streamed(vectors, [n])
    expected = one_shot(vectors)
    assert covariance.count == n
    np.testing.assert_allclose(covariance.mean, vectors.numpy().mean(0), rtol=1e-13, atol=1e-13)
    np.testing.assert_allclose(covariance.covariance(), expected, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(
        covariance.eigenvalues(), np.linalg.eigvalsh(expected)[:, ::-1].clip(min=0), rtol=1e-10, atol=1e-12
    )
    uncentred = np.einsum("ngi,ngj->gij", vectors.numpy(), vectors.numpy()) / n
    np.testing.assert_allclose(covariance.second_moment(), uncentred, rtol=1e-12, atol=1e-12)


def test_second_moment_is_covariance_plus_the_mean() -> None:
    covariance = streamed(vectors_of(500, 3, 6, mean=4.0), [100, 400])
    mean = covariance.mean
    expected = covariance.covariance() + mean[:, :, None] * mean[:, None, :]
    torch.testing.assert_close(covariance.second_moment(), expected, rtol=1e-13, atol=1e-13)


def test_answers_are_float64_and_exactly_symmetric() -> None:
    covariance = streamed(vectors_of(1000, 2, 40).float(), [300, 700])
    for matrix in (covariance.covariance(), covariance.second_moment()):
        assert matrix.dtype == torch.float64
        assert torch.equal(matrix, matrix.mT)
    assert covariance.mean.dtype == covariance.eigenvalues().dtype == torch.float64


def test_eigenvalues_descend_and_are_not_negative() -> None:
    eigenvalues = streamed(vectors_of(10, 3, 30), [10]).eigenvalues()
    assert (eigenvalues.diff(dim=-1) <= 0).all()
    assert (eigenvalues >= 0).all()


def test_groups_are_independent_of_one_another() -> None:
    vectors = vectors_of(200, 3, 4)
    together = streamed(vectors, [50, 150])
    for group in range(3):
        alone = streamed(vectors[:, group : group + 1], [50, 150])
        torch.testing.assert_close(together.covariance()[group], alone.covariance()[0], rtol=1e-13, atol=1e-13)
    changed = vectors.clone()
    changed[:, 1] *= 1e6
    other = streamed(changed, [50, 150])
    for group in (0, 2):
        assert torch.equal(together.covariance()[group], other.covariance()[group])


# ---------------------------------------------------------------------------------------------- numerics


def test_small_eigenvalues_survive_a_mean_of_ten_thousand_deviations() -> None:
    generator = torch.Generator().manual_seed(0)
    vectors = 1e4 + torch.randn(40_000, 1, 48, generator=generator)  # float32
    covariance = streamed(vectors, [1000] * 40)
    expected = np.linalg.eigvalsh(one_shot(vectors))[:, ::-1]
    np.testing.assert_allclose(covariance.eigenvalues()[:, -24:], expected[:, -24:], rtol=1e-6)
    x = vectors[:, 0]
    naive = x.T @ x / len(x) - x.mean(0).outer(x.mean(0))
    wrong = torch.linalg.eigvalsh(naive.double()).flip(0)[-24:].numpy()
    assert np.max(np.abs(wrong / expected[0, -24:] - 1)) > 1e-2  # the test would notice


def test_small_eigenvalues_survive_massive_channels() -> None:
    """Four channels of mean 300 and one of deviation 300, as some units of a transformer are."""
    generator = torch.Generator().manual_seed(1)
    vectors = torch.randn(60_000, 1, 64, generator=generator)
    vectors[:, :, :4] += 300
    vectors[:, :, 4] *= 300
    covariance = streamed(vectors, [2000] * 30)
    expected = np.linalg.eigvalsh(one_shot(vectors))[:, ::-1]
    np.testing.assert_allclose(covariance.eigenvalues()[:, -40:], expected[:, -40:], rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_upcast_before_it_is_multiplied(dtype: torch.dtype) -> None:
    vectors = vectors_of(3000, 2, 16, mean=2.0).to(dtype)
    covariance = streamed(vectors, [1000, 2000])
    np.testing.assert_allclose(covariance.covariance(), one_shot(vectors), rtol=1e-5, atol=1e-5)


def test_autocast_does_not_reach_the_products() -> None:
    vectors = vectors_of(3000, 1, 16).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = streamed(vectors, [3000])
    assert torch.equal(inside.covariance(), streamed(vectors, [3000]).covariance())


@pytest.mark.parametrize("precision", ["high", "medium"])
def test_relaxed_float32_products_are_avoided(precision: str, float32_precision: None) -> None:
    vectors = vectors_of(5000, 1, 12).float()
    torch.set_float32_matmul_precision(precision)
    covariance = streamed(vectors, [5000])
    assert torch.get_float32_matmul_precision() == precision  # and the process is left as it was
    np.testing.assert_allclose(covariance.covariance(), one_shot(vectors), rtol=1e-12, atol=1e-12)


def test_long_batches_are_as_exact_as_short_ones() -> None:
    """One call with 200,000 float32 rows: a single float32 sum of that length would lose three digits."""
    generator = torch.Generator().manual_seed(2)
    vectors = 3 + torch.rand(200_000, 1, 3, generator=generator)
    covariance = Covariance(3, shift=torch.zeros(1, 3))  # a poor shift: every product is positive
    covariance.update(vectors)
    x = vectors[:, 0].double()
    np.testing.assert_allclose(covariance.second_moment()[0], x.T @ x / len(x), rtol=1e-7)
    squares = vectors[:, 0, 0].square().numpy()
    single = np.add.accumulate(squares)[-1]  # one after the other; how a matrix product adds is the machine's business
    assert abs(float(single) / float(squares.sum(dtype=np.float64)) - 1) > 1e-6


def test_what_lies_below_the_diagonal_is_what_lies_above() -> None:
    """Wide vectors are multiplied in blocks, on and above the diagonal only."""
    vectors = vectors_of(700, 2, 600)
    covariance = streamed(vectors, [300, 400])
    x = vectors.transpose(0, 1)
    np.testing.assert_allclose(covariance.second_moment(), x.mT @ x / 700, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(covariance.covariance(), one_shot(vectors), rtol=1e-9, atol=1e-12)
    for matrix in (covariance.state()["scatter"], covariance.covariance(), covariance.second_moment()):
        assert torch.equal(matrix, matrix.mT)


def test_dtypes_may_change_between_batches() -> None:
    """A shift that float32 cannot hold, fixed by float64 vectors, would be another for float32 vectors."""
    vectors = (vectors_of(600, 2, 6) + 1e4).float()
    mixed = Covariance(6, groups=2)
    for part, dtype in zip(vectors.split(200), (torch.float64, torch.float32, torch.float64), strict=True):
        mixed.update(part.to(dtype))
    np.testing.assert_allclose(mixed.mean, vectors.double().numpy().mean(0), rtol=1e-13)
    np.testing.assert_allclose(mixed.covariance(), one_shot(vectors), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("scale", [1e-12, 1e-23, 1e-30])
def test_squares_of_tiny_vectors_do_not_vanish(scale: float) -> None:
    vectors = (scale * vectors_of(500, 1, 6)).float()
    covariance = streamed(vectors, [200, 300])
    np.testing.assert_allclose(covariance.covariance() / scale**2, one_shot(vectors.double() / scale), rtol=1e-4)


def test_gradients_are_not_recorded() -> None:
    vectors = vectors_of(20, 1, 3).requires_grad_()
    covariance = streamed(vectors, [10, 10])
    assert not covariance.covariance().requires_grad
    assert not any(value.requires_grad for value in covariance.state().values())


# ---------------------------------------------------------------------------------------------- merging


@settings(max_examples=40, deadline=None)
@given(
    cuts=st.lists(st.integers(0, 120), max_size=7).map(sorted),
    seed=st.integers(0, 1000),
    mean=st.sampled_from([0.0, 1.0, 1e3]),
    order=st.randoms(use_true_random=False),
)
def test_any_split_merged_in_any_order_equals_one_shot(cuts: list[int], seed: int, mean: float, order) -> None:
    vectors = vectors_of(120, 2, 5, seed=seed, mean=mean)
    bounds = [0, *cuts, 120]
    sizes = [b - a for a, b in pairwise(bounds)]  # some are empty
    whole, stream = streamed(vectors, [120]), streamed(vectors, sizes)
    parts = [streamed(part, [len(part)]) for part in vectors.split(sizes)]
    order.shuffle(parts)
    merged = reduce(Covariance.merge, parts)
    backwards = reduce(lambda right, left: left.merge(right), reversed(parts))
    expected = np.linalg.eigvalsh(one_shot(vectors))[:, ::-1]
    for candidate in (whole, stream, merged, backwards):
        assert candidate.count == 120
        np.testing.assert_allclose(candidate.eigenvalues(), expected, rtol=1e-10, atol=1e-14 * expected.max())
        np.testing.assert_allclose(candidate.mean, vectors.numpy().mean(0), rtol=1e-10, atol=1e-10)


def test_merge_is_associative_with_different_shifts() -> None:
    a, b, c = (streamed(vectors_of(50 * k, 1, 6, seed=k, mean=100.0), [50 * k]) for k in (1, 2, 3))
    assert_same_moments(a.merge(b).merge(c), a.merge(b.merge(c)), rtol=1e-12)
    assert_same_moments(a.merge(b), b.merge(a), rtol=1e-12)


def test_merging_far_apart_parts_keeps_the_small_eigenvalues() -> None:
    """Means 1e4 deviations apart: the gap is one large eigenvalue, the others stay those of the noise."""
    near, far = vectors_of(400, 1, 6, seed=1), vectors_of(400, 1, 6, seed=1) + 1e4
    merged = streamed(near, [400]).merge(streamed(far, [400]))
    assert float(merged.eigenvalues()[0, 0]) == pytest.approx(6 * 1e8 / 4, rel=1e-3)
    np.testing.assert_allclose(merged.covariance(), one_shot(torch.cat([near, far])), rtol=1e-12)
    restored = merged.covariance() - torch.full((6, 6), 1e8 / 4, dtype=torch.float64)
    torch.testing.assert_close(restored, streamed(near, [400]).covariance(), rtol=1e-6, atol=1e-6)


def test_a_merged_object_goes_on_streaming() -> None:
    vectors = vectors_of(300, 2, 4, mean=50.0)
    first, second, third = vectors.split(100)
    merged = streamed(first, [100]).merge(streamed(second, [100]))
    merged.update(third)
    np.testing.assert_allclose(merged.covariance(), one_shot(vectors), rtol=1e-11, atol=1e-11)


def test_merge_leaves_its_operands_alone() -> None:
    a, b = (streamed(vectors_of(30, 1, 3, seed=k), [30]) for k in (1, 2))
    before = [a.state(), b.state()]
    a.merge(b).update(vectors_of(5, 1, 3))
    for state, now in zip(before, (a.state(), b.state()), strict=True):
        assert all(torch.equal(state[name], now[name]) for name in state)


@pytest.mark.parametrize("shift", [None, torch.full((2, 3), 7.0)])
def test_empty_operands_merge_to_nothing_new(shift: Tensor | None) -> None:
    empty, full = Covariance(3, groups=2, shift=shift), streamed(vectors_of(40, 2, 3), [40])
    for merged in (empty.merge(full), full.merge(empty)):
        assert_same_moments(merged, full, rtol=1e-14)
    nothing = empty.merge(Covariance(3, groups=2))
    assert nothing.count == 0
    assert ("shift" in nothing.state()) == (shift is not None)


@pytest.mark.parametrize("workers", [1, 2, 8])
def test_all_reduce_over_workers_with_a_common_shift_is_exact(workers: int) -> None:
    """Adding (count, sum, scatter), as an all-reduce does, and merging give the answer of one worker."""
    vectors = vectors_of(800, 2, 6, mean=20.0)
    shift = vectors[:50].mean(0)
    alone = streamed(vectors, [100] * 8, shift=shift)
    parts = [streamed(part, [len(part)], shift=shift) for part in vectors.split(800 // workers)]
    states = [part.state() for part in parts]
    summed = {name: torch.stack([state[name] for state in states]).sum(0) for name in ("count", "sum", "scatter")}
    reduced = Covariance.from_state({**summed, "shift": states[0]["shift"]})
    assert_same_moments(reduced, alone, rtol=1e-12)
    assert_same_moments(reduce(Covariance.merge, parts), alone, rtol=1e-12)


def test_shapes_must_agree_to_merge() -> None:
    with pytest.raises(DataError, match="equal shapes"):
        Covariance(3).merge(Covariance(4))
    with pytest.raises(DataError, match="equal shapes"):
        Covariance(3).merge(Covariance(3, groups=2))


# ---------------------------------------------------------------------------------------------- state


def test_state_survives_a_round_trip_and_goes_on() -> None:
    first, second = vectors_of(120, 2, 5, mean=9.0).split(60)
    original = streamed(first, [60])
    restored = Covariance.from_state(original.state())
    original.update(second)
    restored.update(second)
    for name, value in original.state().items():
        assert torch.equal(restored.state()[name], value)


def test_state_of_nothing_survives_a_round_trip() -> None:
    restored = Covariance.from_state(Covariance(5, groups=2).state())
    assert (restored.width, restored.groups, restored.count) == (5, 2, 0)


def test_broken_states_are_refused() -> None:
    state = streamed(vectors_of(10, 1, 3), [10]).state()
    for name in state:
        with pytest.raises(DataError, match="must hold count"):
            Covariance.from_state({key: value for key, value in state.items() if key != name})
    with pytest.raises(DataError, match="scatter"):
        Covariance.from_state({**state, "scatter": torch.zeros(1, 3, 2)})


# ---------------------------------------------------------------------------------------------- edge cases


def test_fewer_vectors_than_dimensions_leave_exact_rank() -> None:
    eigenvalues = streamed(vectors_of(12, 1, 30), [5, 7]).eigenvalues()[0]
    assert (eigenvalues[:11] > 1e-6).all()  # centring costs one
    assert (eigenvalues[11:] < 1e-13 * eigenvalues[0]).all()


@pytest.mark.parametrize("constant", [0.0, 0.1, -1e4])
def test_dead_and_constant_coordinates_have_no_variance(constant: float) -> None:
    vectors = vectors_of(500, 1, 8).float()
    vectors[:, :, 3:5] = constant
    covariance = streamed(vectors, [100, 400])
    assert (covariance.covariance()[0, 3:5].abs() == 0).all()
    assert (covariance.eigenvalues()[0, -2:] < 1e-14).all()
    torch.testing.assert_close(
        covariance.mean[0, 3:5], torch.full((2,), float(np.float32(constant)), dtype=torch.float64)
    )


def test_width_one_works() -> None:
    vectors = torch.tensor([1.0, 2.0, 6.0]).reshape(3, 1, 1)
    covariance = streamed(vectors, [1, 2])
    assert float(covariance.mean) == pytest.approx(3.0, rel=1e-15)
    assert float(covariance.covariance()) == pytest.approx(14 / 3, rel=1e-15)
    assert float(covariance.eigenvalues()) == pytest.approx(14 / 3, rel=1e-15)


def test_no_vectors_change_nothing() -> None:
    covariance = Covariance(4)
    covariance.update(torch.zeros(0, 1, 4))
    assert covariance.count == 0
    covariance.update(vectors_of(20, 1, 4))
    before = covariance.state()
    covariance.update(torch.zeros(0, 1, 4))
    assert all(torch.equal(before[name], value) for name, value in covariance.state().items())


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf, 1e30])
@pytest.mark.parametrize("fresh", [True, False])
def test_values_that_are_not_finite_are_refused_and_nothing_is_added(bad: float, fresh: bool) -> None:
    vectors = vectors_of(50, 2, 3).float()
    covariance = Covariance(3, groups=2) if fresh else streamed(vectors, [50])
    before = covariance.state()
    broken = vectors.clone()
    broken[49, 1, 2] = bad
    with pytest.raises(DataError, match="finite"):
        covariance.update(broken)
    assert covariance.state().keys() == before.keys()
    assert all(torch.equal(before[name], value) for name, value in covariance.state().items())


def test_answers_need_a_vector() -> None:
    covariance = Covariance(3)
    for ask in (
        covariance.covariance,
        covariance.second_moment,
        covariance.eigenvalues,
        lambda: covariance.mean,
    ):
        with pytest.raises(DataError, match="at least one vector"):
            ask()


def test_wrong_shapes_and_options_are_refused() -> None:
    with pytest.raises(DataError, match=r"\[n, 2, 3\]"):
        Covariance(3, groups=2).update(torch.zeros(5, 3, 2))
    for width, groups in ((0, 1), (3, 0)):
        with pytest.raises(OptionError, match="at least 1"):
            Covariance(width, groups=groups)
    with pytest.raises(OptionError, match="shift"):
        Covariance(3, shift=torch.zeros(2, 3))
    with pytest.raises(OptionError, match="shift"):
        Covariance(3, shift=torch.tensor([[0.0, torch.nan, 0.0]]))
