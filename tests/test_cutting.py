"""Cuts in order see the activations that earlier cuts leave; keeping the calls of blocks changes only the time."""

from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn
from torch.nn import functional

from conftest import assert_untouched, random_rows, snapshot, tiny_bert
from rmtkd import cutting
from rmtkd.activations import collect
from rmtkd.cutting import BlockCalls, cut_in_order
from rmtkd.sensitivity import Sensitivity
from rmtkd.sites import blocks_of, feed_forward_site, find_sites
from rmtkd.surgery import check_cut

WIDTHS = {"heads": 1, "query_key": 6, "value": 6, "ffn": 20, "word": 12}


def widths(model: nn.Module) -> dict[str, int]:
    return {site.name: WIDTHS[site.name.rpartition(".")[2]] for site in find_sites(model)}


def cut(model: nn.Module, **options: Any) -> nn.Module:
    return cut_in_order(model, find_sites(model), widths(model), random_rows(200), **options)[0]


@pytest.fixture(scope="module")
def deep() -> nn.Module:
    return tiny_bert(layers=4)


@pytest.fixture(scope="module")
def the_long_way(deep: nn.Module) -> nn.Module:
    """The cut that collects from the first block on for every width."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cutting, "follow_each_other", lambda *_: False)
        return cut(deep)


def test_kept_calls_give_the_same_bits_as_whole_forward_passes(deep: nn.Module, the_long_way: nn.Module):
    assert_untouched(cut(deep), snapshot(the_long_way))


def test_a_pass_runs_one_block_and_not_the_network(deep: nn.Module, monkeypatch: pytest.MonkeyPatch):
    runs: Counter[str] = Counter()
    layer = type(deep.get_submodule("bert.encoder.layer.0"))
    forward = layer.forward

    def counted(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        runs["blocks"] += 1
        return forward(self, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(layer, "forward", counted)
    batches = len(random_rows(200))
    cut(deep)
    # heads, their width, the feed-forward part and the step to the next block; the first watches all on one batch
    assert runs["blocks"] <= 4 * 4 * batches + 4
    short = runs["blocks"]
    monkeypatch.setattr(cutting, "follow_each_other", lambda *_: False)
    runs.clear()
    cut(deep)
    assert runs["blocks"] > 1.5 * short


def test_calls_are_kept_in_files_that_are_gone_afterwards(deep: nn.Module, tmp_path: Path):
    with BlockCalls(deep, random_rows(64), blocks_of(find_sites(deep)), scratch=tmp_path) as calls:
        assert calls.follow_each_other
        calls.move_to(deep, "bert.encoder.layer.2")
        assert len(list(tmp_path.glob("*/*"))) == 4
        assert len(list(calls)) == 4
    assert list(tmp_path.iterdir()) == []


def test_calls_of_a_later_block_are_those_of_the_network(deep: nn.Module):
    sites = [site for site in find_sites(deep) if site.block == "layer.3"]
    expected = collect(deep, sites, random_rows(200))
    with BlockCalls(deep, random_rows(200), blocks_of(find_sites(deep))) as calls:
        for block in ("bert.encoder.layer.1", "bert.encoder.layer.3"):  # one in between is passed
            calls.move_to(deep, block)
        got = collect(deep, sites, calls)
    for name, streams in expected.items():
        for mine, theirs in zip(got[name], streams, strict=True):
            assert mine.count == theirs.count
            assert torch.equal(mine.covariance(), theirs.covariance())


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), MemoryError()])
def test_without_room_for_the_calls_the_long_way_is_taken(
    deep: nn.Module, the_long_way: nn.Module, monkeypatch: pytest.MonkeyPatch, error: Exception
):
    written = []

    def no_room(value: Any, path: Path) -> None:
        written.append(path)
        if len(written) > 20:
            raise error
        save(value, path)

    save = torch.save
    monkeypatch.setattr(torch, "save", no_room)
    assert_untouched(cut(deep), snapshot(the_long_way))
    assert len(written) == 21


def test_without_room_for_a_folder_the_long_way_is_taken_too(
    deep: nn.Module, the_long_way: nn.Module, monkeypatch: pytest.MonkeyPatch
):
    def no_room(**_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cutting.tempfile, "TemporaryDirectory", no_room)
    assert_untouched(cut(deep), snapshot(the_long_way))


class Block(nn.Module):
    def __init__(self, *, in_place: bool = False) -> None:
        super().__init__()
        self.up, self.down, self.in_place = nn.Linear(8, 16), nn.Linear(16, 8), in_place

    def forward(self, state: torch.Tensor, first: torch.Tensor) -> torch.Tensor:
        change = self.down(torch.relu(self.up(state + first)))
        return state.add_(change) if self.in_place else state + change


class Stack(nn.Module):
    """Blocks in a row, wired in one of several ways."""

    def __init__(self, wiring: str):
        super().__init__()
        self.wiring = wiring
        self.blocks = nn.ModuleList(Block(in_place=wiring == "within, in place") for _ in range(3))
        self.head = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        state, first = x.clone(), x
        for i, block in enumerate(self.blocks):
            state = block(state, first)
            if self.wiring == "other argument":
                first = first * 2
            if self.wiring == "between":
                state = state * 1.5
            if self.wiring == "between, in place":
                state *= 1.5
            if self.wiring == "twice" and i == 1:
                state = block(state, first)
        return self.head(state)


@pytest.mark.parametrize(
    "wiring", ["in a row", "other argument", "between", "between, in place", "within, in place", "twice"]
)
def test_only_blocks_that_follow_each_other_are_run_alone(wiring: str):
    torch.manual_seed(0)
    model = Stack(wiring).eval()
    sites = [
        feed_forward_site(model, f"ffn.{i}", writers=[f"blocks.{i}.up"], reader=f"blocks.{i}.down", scope=f"blocks.{i}")
        for i in range(3)
    ]
    batches = [(torch.randn(64, 8), torch.zeros(64, dtype=torch.long)) for _ in range(3)]
    with BlockCalls(model, batches, blocks_of(sites)) as calls:
        assert calls.follow_each_other is (wiring == "in a row")
    if wiring == "twice":
        return
    kept = {site.name: 5 for site in sites}
    short, _ = cut_in_order(model, sites, kept, batches)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cutting, "follow_each_other", lambda *_: False)
        long, _ = cut_in_order(model, sites, kept, batches)
    assert_untouched(short, snapshot(long))
    keeping, whole = (Sensitivity(model, sites, collect(model, sites, batches), batches) for _ in range(2))
    whole.blocks = []
    whole.stand_at({})
    for site in sites:  # kept outputs of blocks change no loss
        assert keeping.loss({site.name: 5}) == pytest.approx(whole.loss({site.name: 5}), rel=1e-6)


class Given(nn.Module):
    """Blocks in a row that are all given one thing more."""

    def __init__(self, given: Any):
        super().__init__()
        self.given = given
        self.blocks = nn.ModuleList(GivenBlock() for _ in range(2))
        self.head = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x, given=self.given)
        return self.head(x)


class GivenBlock(Block):
    def forward(self, state: torch.Tensor, given: Any) -> torch.Tensor:
        change = given if callable(given) else torch.relu
        return state + self.down(change(self.up(state)))


class Pair(NamedTuple):
    one: int = 1
    other: int = 2


@pytest.mark.parametrize(
    ("given", "can_be_kept"),
    [
        (None, True),
        ({"scale": 2.0, "masks": [(torch.ones(2), None), ("a", True)]}, True),
        (functional.relu, False),
        (nn.ReLU(), False),
        (Pair(), False),
        ([Pair()], False),
        ({3: slice(2)}, False),
    ],
)
def test_blocks_are_run_alone_only_where_their_arguments_can_be_kept(given: Any, can_be_kept: bool):
    torch.manual_seed(0)
    model = Given(given).eval()
    sites = [
        feed_forward_site(model, f"ffn.{i}", writers=[f"blocks.{i}.up"], reader=f"blocks.{i}.down", scope=f"blocks.{i}")
        for i in range(2)
    ]
    batches = [(torch.randn(64, 8), torch.zeros(64, dtype=torch.long)) for _ in range(3)]
    with BlockCalls(model, batches, blocks_of(sites)) as calls:
        assert calls.follow_each_other is can_be_kept
    student, bases = cut_in_order(model, sites, {site.name: 5 for site in sites}, batches)
    assert check_cut(model, student, sites, bases, batches[0]) < 1e-6
