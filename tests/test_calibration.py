"""The claims of `rmtkd.calibration`: an even share, the same in every pass, and no more read or kept than it takes."""

from collections.abc import Iterable, Iterator
from functools import partial
from itertools import chain
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, RandomSampler

from rmtkd import memory
from rmtkd.batches import Batch, Calls
from rmtkd.calibration import evenly, share_of
from rmtkd.errors import DataError

DRAWN = 40


class Reads(Dataset):
    """Numbers, remembering which were read."""

    def __init__(self) -> None:
        self.seen: list[int] = []

    def __len__(self) -> int:
        return DRAWN

    def __getitem__(self, number: int) -> Tensor:
        self.seen.append(number)
        return torch.tensor(number)


class Stream(IterableDataset):
    """Rows that come in their order alone."""

    def __iter__(self) -> Iterator[Tensor]:
        return iter(torch.arange(DRAWN))


class Own(DataLoader):
    """A loader with a way of its own."""

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        return ((rows + 100,) for (rows,) in super().__iter__())


def pairs(rows: list[Tensor]) -> tuple[Tensor, ...]:
    return (torch.stack(rows),)


def numbers(batches: Iterable[Batch]) -> list[list[int]]:
    return [batch[0].tolist() for batch in batches]  # type: ignore[index]


@pytest.mark.parametrize(
    ("share", "taken"),
    [
        (0.1, [0]),
        (0.25, [0, 4, 8]),
        (1 / 3, [0, 3, 6, 9]),
        (0.4, [0, 2, 5, 7]),
        (0.7, [0, 1, 2, 4, 5, 7, 8]),
        (1.0, range(10)),
    ],
)
def test_a_share_of_the_batches_is_spread_evenly_from_the_first_on(share: float, taken: Iterable[int]) -> None:
    assert list(evenly(range(10), share)) == list(taken)


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("is_called", [False, True])
def test_of_a_loader_only_the_share_is_read_once(shuffle: bool, is_called: bool) -> None:
    rows = Reads()
    loader: Any = DataLoader(rows, batch_size=4, shuffle=shuffle, collate_fn=pairs, drop_last=True)
    share = share_of(Calls(loader, lambda model, rows: model(rows)) if is_called else loader, 0.3)
    first = [batch.rows for batch in share] if is_called else list(share)  # type: ignore[union-attr]
    assert len(set(rows.seen)) == len(rows.seen) == 12
    assert sorted(chain(*numbers(first))) == sorted(rows.seen)
    assert not shuffle or sorted(rows.seen) == list(evenly(range(DRAWN), 0.3))
    assert shuffle or numbers(first) == [[0, 1, 2, 3], [12, 13, 14, 15], [24, 25, 26, 27]]
    assert len(list(share)) == 3 and len(rows.seen) == 12


@pytest.mark.parametrize("workers", [0, 1])
def test_a_loader_s_way_of_reading_rows_is_kept(workers: int) -> None:
    loader = DataLoader(Reads(), batch_size=4, collate_fn=pairs, num_workers=workers)
    assert numbers(share_of(loader, 0.5)) == [list(range(i, i + 4)) for i in (0, 8, 16, 24, 32)]


@pytest.mark.parametrize(
    "loader",
    [
        DataLoader(Stream(), batch_size=4, collate_fn=pairs),
        DataLoader([(torch.arange(i, i + 4),) for i in range(0, DRAWN, 4)], batch_size=None),  # type: ignore[arg-type]
        [(torch.arange(i, i + 4),) for i in range(0, DRAWN, 4)],
    ],
)
def test_of_rows_without_numbers_every_other_batch_is_kept_too(loader: Iterable[Any]) -> None:
    assert numbers(share_of(loader, 0.5)) == [list(range(i, i + 4)) for i in (0, 8, 16, 24, 32)]


def test_a_loader_with_a_way_of_its_own_is_gone_through() -> None:
    loader = Own(Reads(), batch_size=20, collate_fn=pairs)
    assert numbers(share_of(loader, 0.5)) == [list(range(100, 120))]


def test_whoever_watches_sees_what_is_read() -> None:
    seen: list[Any] = []

    def look(batches: Iterable[Any]) -> Iterator[Any]:
        return (seen.append(batch) or batch for batch in batches)

    share_of(DataLoader(Reads(), batch_size=4, collate_fn=pairs), 0.3, look)
    share_of([(torch.arange(4),)] * 10, 0.3, look)
    assert len(seen) == 3 + 10


def test_batches_that_memory_cannot_hold_are_refused_with_a_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    free = iter([64e9, 40e9, 20e9, 6e9])
    monkeypatch.setattr(memory, "available_bytes", partial(next, free))
    with pytest.raises(DataError, match=r"Of 64\.0 GB that were free 6\.0 are left after 3 batches.*calibration_share"):
        share_of([(torch.arange(4),)] * 100, 0.5)


def test_a_share_of_shuffled_rows_is_the_same_whatever_the_loader_draws() -> None:
    generator = torch.Generator().manual_seed(0)
    loader = DataLoader(Reads(), batch_size=4, shuffle=True, collate_fn=pairs, generator=generator)
    shares = []
    for _ in range(3):
        list(loader)
        shares.append(numbers(share_of(loader, 0.25)))
    assert shares[0] == shares[1] == shares[2]
    assert sorted(chain(*shares[0])) == list(range(0, DRAWN, 4))
    assert sorted(shares[0]) != [[0, 4, 8, 12], [16, 20, 24, 28], [32, 36]]


@pytest.mark.parametrize("count", [6, DRAWN])
def test_rows_that_are_drawn_in_another_way_come_by_the_loader_s_batches(count: int) -> None:
    rows = Reads()
    sampler = RandomSampler(rows, replacement=count == DRAWN, num_samples=count)
    share = share_of(DataLoader(rows, batch_size=2, sampler=sampler, collate_fn=pairs), 0.5)
    assert len(rows.seen) == 2 * len(list(share)) == {6: 4, DRAWN: DRAWN // 2}[count]
