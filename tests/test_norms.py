"""The claims of norms by batch statistics: gathered anew they are those of the rows, and nothing else changes."""

from typing import Any

import pytest
import torch
from torch import nn

from rmtkd.memory import Pieces
from rmtkd.norms import batch_norms, gather_statistics, of_each_batch


def network() -> Any:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5)
    ).eval()


def rows(count: int = 3) -> list[tuple[torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [(2 + torch.randn(32, 3, 8, 8, generator=generator),) for _ in range(count)]


def test_statistics_are_those_of_the_inputs() -> None:
    model = network()
    gather_statistics(Scores(model), ["body.1"], rows())
    with torch.no_grad():
        seen = [model[0](x) for (x,) in rows()]
    mean = torch.stack([part.mean((0, 2, 3)) for part in seen]).mean(0)
    var = torch.stack([part.var((0, 2, 3), correction=1) for part in seen]).mean(0)
    torch.testing.assert_close(model[1].running_mean, mean)
    torch.testing.assert_close(model[1].running_var, var)


class Scores(nn.Module):
    """A network that gives one number a class."""

    def __init__(self, body: nn.Module):
        super().__init__()
        self.body = body

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x).mean((2, 3))


def test_nothing_but_the_statistics_changes() -> None:
    model = network()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    gather_statistics(Scores(model), ["body.4"], rows())
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"4.running_mean", "4.running_var"}
    assert not any(module.training for module in model.modules())
    assert model[4].momentum == 0.1


def test_a_batch_of_one_row_does_not_count_where_there_are_others() -> None:
    model: Any = Scores(network())
    single = (torch.full((1, 3, 8, 8), 100.0),)
    gather_statistics(model, batch_norms(model), rows())
    alone = model.body[1].running_mean.clone()
    for batches in ([*rows(), single], [single, *rows()]):
        gather_statistics(model, batch_norms(model), batches)
        assert torch.equal(model.body[1].running_mean, alone)
    means = []
    for batches in ([single], [(2 * single[0],)], [single, (2 * single[0],)]):
        gather_statistics(model, batch_norms(model), batches)
        means.append(model.body[1].running_mean.clone())
    assert torch.allclose((means[0] + means[1]) / 2, means[2], rtol=1e-5)  # where there is none, all count


@pytest.mark.parametrize("fails", [False, True])
def test_statistics_of_each_batch_are_for_the_time_being(fails: bool) -> None:
    model: Any = Scores(network())
    before, x = model(rows()[0][0]), rows()[0][0]
    state = {name: value.clone() for name, value in model.state_dict().items() if "tracked" not in name}
    try:
        with of_each_batch(model, batch_norms(model)):
            inside = model(x)
            if fails:
                raise KeyError
    except KeyError:
        pass
    assert not torch.allclose(inside, before)
    assert torch.equal(model(x), before)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in state.items())


class FrozenNorm(nn.BatchNorm2d):
    """Stays in evaluation mode, as a detector's backbone has it."""

    def train(self, mode: bool = True) -> "FrozenNorm":
        return super().train(False)


def frozen_by_its_class(model: Any) -> None:
    frozen = FrozenNorm(6).eval()
    frozen.load_state_dict(model.body[1].state_dict())
    model.body[1] = frozen


def frozen_by_itself(model: Any) -> None:
    norm = model.body[1]
    norm.train = lambda mode=True: norm


def frozen_by_what_is_around(model: Any) -> None:
    norm, train = model.body[1], model.train
    model.train = lambda mode=True: (train(mode), norm.eval())[0]


@pytest.mark.parametrize("freeze", [frozen_by_its_class, frozen_by_itself, frozen_by_what_is_around])
def test_a_frozen_norm_keeps_its_statistics_and_others_are_gathered_behind_it(freeze: Any) -> None:
    model: Any = Scores(network())
    gather_statistics(model, ["body.1"], rows())
    freeze(model)
    mean, var = model.body[1].running_mean.clone(), model.body[1].running_var.clone()
    with torch.no_grad():
        behind = torch.stack([model.body[:4](x).mean((0, 2, 3)) for (x,) in rows()]).mean(0)
        x = rows()[0][0]
        before = model(x)
        with of_each_batch(model, ["body.1"]):
            assert torch.equal(model(x), before)
    gather_statistics(model, ["body.1", "body.4"], rows())
    assert torch.equal(model.body[1].running_mean, mean)
    assert torch.equal(model.body[1].running_var, var)
    torch.testing.assert_close(model.body[4].running_mean, behind)


def test_a_norm_that_is_not_called_keeps_its_statistics() -> None:
    model: Any = Scores(network())
    aside: Any = nn.BatchNorm2d(6)
    aside.running_mean += 3
    model.aside = aside
    gather_statistics(model.eval(), batch_norms(model), rows())
    assert torch.equal(aside.running_mean, torch.full((6,), 3.0))


def test_a_norm_that_has_no_count_of_its_batches_is_gathered_like_any_other() -> None:
    model: Any = Scores(network())
    gather_statistics(model, ["body.1"], rows())
    expected = model.body[1].running_mean.clone()
    model.body[1].num_batches_tracked = None  # as checkpoints of old have it
    gather_statistics(model, ["body.1"], rows())
    assert torch.equal(model.body[1].running_mean, expected)
    assert model.body[1].num_batches_tracked is None


def test_statistics_are_those_of_the_pieces_when_memory_ran_out_half_way() -> None:
    expected: Any = Scores(network())
    got: Any = Scores(network())
    halves = [(x[i : i + 16],) for (x,) in rows() for i in (0, 16)]
    gather_statistics(expected, batch_norms(expected), halves)

    def fail_late(_: object, arguments: tuple[torch.Tensor]) -> None:  # the first norm has seen the batch by then
        if len(arguments[0]) > 16:
            raise torch.OutOfMemoryError

    got.body[3].register_forward_pre_hook(fail_late)
    gather_statistics(got, batch_norms(got), rows(), pieces=Pieces())
    assert torch.equal(got.body[1].running_mean, expected.body[1].running_mean)
    assert torch.equal(got.body[4].running_var, expected.body[4].running_var)


def test_a_piece_of_one_row_is_left_out() -> None:
    body = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).eval()
    gather_statistics(body, ["1"], [(torch.randn(5, 3),)], pieces=Pieces(count=4))  # of 2, 2 and 1
    assert torch.isfinite(body[1].running_var).all()  # type: ignore[union-attr, arg-type]
