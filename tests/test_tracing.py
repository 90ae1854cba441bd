"""The claims of following channels: which widths a network has, what is read where, and that cuts of them are exact."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import rmtkd
from conftest import assert_untouched, snapshot
from rmtkd.batches import Calls
from rmtkd.cutting import cut_in_order
from rmtkd.errors import PlanError, SurgeryError, UnsupportedModelError
from rmtkd.measurement import count_flops, count_parameters
from rmtkd.planning.costs import CostTable, predict_cost
from rmtkd.sites import find_sites, trace_sites
from rmtkd.surgery import check_cut, fill, fold, skeleton


def batches(channels: int = 3, side: int = 8, rows: int = 16, count: int = 4) -> list[Any]:
    generator = torch.Generator().manual_seed(0)
    return [
        (
            torch.randn(rows, channels, side, side, generator=generator) + torch.randn(rows, channels, 1, 1),
            torch.randint(0, 4, (rows,), generator=generator),
        )
        for _ in range(count)
    ]


class Basic(nn.Module):
    def __init__(self, before: int, after: int, stride: int = 1, norm: Callable[[int], nn.Module] = nn.BatchNorm2d):
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(before, after, 3, stride, 1, bias=False), norm(after)
        self.conv2, self.norm2 = nn.Conv2d(after, after, 3, 1, 1, bias=False), norm(after)
        self.down = None if stride == 1 else nn.Sequential(nn.Conv2d(before, after, 1, stride, bias=False), norm(after))

    def forward(self, x: Tensor) -> Tensor:
        inner = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        inner += x if self.down is None else self.down(x)
        return F.relu_(inner)


class Excite(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.down, self.up = nn.Conv2d(width, width // 4, 1), nn.Conv2d(width // 4, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.up(F.silu(self.down(x.mean((2, 3), keepdim=True)))))


class Everything(nn.Module):
    """Residual stages, a depthwise convolution, channel attention, dilation, PReLU, a flattened image."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, 1, 2, dilation=2), nn.BatchNorm2d(16), nn.PReLU(16))
        self.stages = nn.Sequential(Basic(16, 16), Basic(16, 24, 2), Basic(24, 24))
        self.depthwise, self.norm = nn.Conv2d(24, 24, 3, padding=1, groups=24), nn.BatchNorm2d(24)
        self.pointwise, self.excite = nn.Conv2d(24, 20, 1), Excite(20)
        self.hidden, self.drop, self.head = nn.Linear(20 * 4, 32), nn.Dropout(0.1), nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stages(F.max_pool2d(self.stem(x), 1))
        x = F.hardswish(self.pointwise(F.relu6(self.norm(self.depthwise(x)))))
        x = F.adaptive_avg_pool2d(self.excite(x), 2)
        return self.head(self.drop(torch.tanh(self.hidden(x.view(x.size(0), -1)))))


def trained(model: Any, rows: list[Any]) -> Any:
    """Norms with statistics and gains of their own."""
    torch.manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.3)
    model.train()
    with torch.no_grad():
        for x, _ in rows:
            model(x)
    return model.eval()


@pytest.fixture(scope="module")
def everything() -> tuple[Any, list[Any]]:
    torch.manual_seed(0)
    rows = batches()
    return trained(Everything(), rows), rows


def test_every_width_of_a_network_is_found_with_all_that_writes_and_reads_it(everything: tuple[Any, list[Any]]) -> None:
    model, rows = everything
    found = {site.name: site for site in find_sites(model, rows[0])}
    assert {name: site.width for name, site in found.items()} == {
        "stem.0": 16,
        "stages.0.conv1": 16,
        "stages.1.conv1": 24,
        "stages.1.conv2": 24,
        "stages.2.conv1": 24,
        "pointwise": 20,
        "excite.down": 5,
        "hidden": 32,
    }
    stage = found["stages.1.conv2"]
    writers = {axis.parameter for stream in stage.streams for axis in stream.writers}
    assert {
        "stages.1.conv2.weight",
        "stages.1.down.0.weight",
        "stages.2.norm2.running_var",
        "depthwise.bias",
    } <= writers
    assert [(s.module, s.norm, s.intercept) for s in stage.streams] == [
        ("stages.2.conv1", "stages.2.norm1", None),
        ("pointwise", None, "pointwise.bias"),
    ]
    assert [stream.positions for stream in found["pointwise"].streams] == [1, 4]
    assert found["stages.2.conv1"].scope == "stages.2"


def test_a_fold_at_full_width_changes_nothing(everything: tuple[Any, list[Any]]) -> None:
    model, rows = everything
    sites = find_sites(model, rows[0])
    full = {site.name: site.width for site in sites}
    double = copy.deepcopy(model).double()
    _, bases = cut_in_order(model, sites, full, rows)
    x = rows[0][0].double()  # type: ignore[index]
    torch.testing.assert_close(fold(double, sites, bases)(x), double(x), rtol=0, atol=1e-12)


def test_a_cut_of_all_widths_is_its_masked_full_width_reference(everything: tuple[Any, list[Any]]) -> None:
    model, rows = everything
    sites = find_sites(model, rows[0])
    widths = {site.name: site.width // 2 for site in sites}
    student: Any
    student, bases = cut_in_order(model, sites, widths, rows)
    assert check_cut(model, student, sites, bases, rows[0]) < 1e-5
    assert {site.name: site.width for site in find_sites(student, rows[0])} == widths
    assert student.depthwise.groups == 12


def test_costs_at_any_widths_are_predicted_exactly(everything: tuple[Any, list[Any]]) -> None:
    model, rows = everything
    sites = find_sites(model, rows[0])
    widths = {site.name: max(1, site.width // 3) for site in sites}
    student, _ = cut_in_order(model, sites, widths, rows)
    costs = {"params": count_parameters(student), "flops": count_flops(student, rows[0])}
    assert predict_cost(model, sites, widths, rows[0]) == costs
    whole, table = CostTable.measure(model, sites, rows[0])
    assert table is not None
    dropped = {site.name: site.width - widths[site.name] for site in sites}
    assert {cost: whole[cost] + table.change(cost, dropped) for cost in costs} == costs


def test_a_wrong_description_is_caught(everything: tuple[Any, list[Any]]) -> None:
    """The check would see a reader that was forgotten."""
    model, rows = everything
    sites = [site for site in find_sites(model, rows[0]) if site.name == "stages.0.conv1"]
    student: Any
    student, bases = cut_in_order(model, sites, {"stages.0.conv1": 8}, rows)
    with torch.no_grad():
        student.stages[0].conv2.weight.mul_(1.01)
    with pytest.raises(SurgeryError):
        check_cut(model, student, sites, bases, rows[0])


def test_frozen_norms_keep_their_statistics_through_a_cut_which_is_about_zero_before_them(
    everything: tuple[Any, list[Any]],
) -> None:
    model, rows = everything
    model = copy.deepcopy(model)
    frozen = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in frozen:
        norm.running_mean.add_(0.3)  # type: ignore[union-attr]
        norm.train = lambda mode=True, norm=norm: norm  # type: ignore[method-assign, assignment]
    sites = find_sites(model, rows[0])
    assert not any(stream.norm for site in sites for stream in site.streams)
    whole, _ = cut_in_order(model, sites, {site.name: site.width for site in sites}, rows)
    torch.testing.assert_close(whole(rows[0][0]), model(rows[0][0]), rtol=1e-4, atol=1e-5)
    widths = {site.name: site.width // 2 for site in sites}
    student, bases = cut_in_order(model, sites, widths, rows)
    assert check_cut(model, student, sites, bases, rows[0]) < 1e-5


def test_a_convolution_that_writes_the_width_that_it_reads_is_cut_on_both_sides() -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.same, self.head = nn.Conv2d(3, 12, 3), nn.Conv2d(12, 12, 3, padding=1), nn.Linear(12, 4)

        def forward(self, x: Tensor) -> Tensor:
            x = F.relu(self.stem(x))
            return self.head((x + F.relu(self.same(x))).mean((2, 3)))

    torch.manual_seed(0)
    model, rows = Plain().eval(), batches()
    sites = find_sites(model, rows[0])
    assert [site.name for site in sites] == ["stem"]
    student: Any
    student, bases = cut_in_order(model, sites, {"stem": 7}, rows)
    assert tuple(student.same.weight.shape) == (7, 7, 3, 3)
    assert check_cut(model, student, sites, bases, rows[0]) < 1e-5
    assert predict_cost(model, sites, {"stem": 7}, rows[0])["params"] == count_parameters(student)


class Head(nn.Module):
    """Two convolutions with something between or around them."""

    def __init__(self, between: Any, second: nn.Module | None = None, first: int = 8):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, first, 3, padding=1), second or nn.Conv2d(8, 8, 3, padding=1)
        self.between, self.head = between, nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.second(self.between(self.first(x)))).mean((2, 3)))


class Frozen(nn.Module):
    """A norm whose statistics and gains are buffers, as detectors have it."""

    scale: Tensor
    shift: Tensor

    def __init__(self, width: int):
        super().__init__()
        self.register_buffer("scale", torch.rand(width) + 0.5)
        self.register_buffer("shift", torch.rand(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale.view(1, -1, 1, 1) + self.shift.view(1, -1, 1, 1)


@pytest.mark.parametrize(
    ("model", "path", "why"),
    [
        (Head(Frozen(8)), "first", "mul at between has a factor or term for each channel"),
        (Head(nn.BatchNorm2d(8, track_running_stats=False)), "first", "between takes its statistics from the batch"),
        (Head(nn.GroupNorm(2, 8)), "first", "group_norm at between is not known to act channel by channel"),
        (Head(nn.Softmax(1)), "first", "softmax at between is not known to act channel by channel"),
        (Head(nn.GLU(1), first=16), "first", "glu at between is not known to act channel by channel"),
        (Head(lambda x: F.pad(x, (0, 0, 0, 0, 4, 0))[:, :8]), "first", "pad at the network itself is not known"),
        (Head(lambda x: torch.cat([x[:, 4:], x[:, :4]], 1)), "first", "slice at the network itself is not known"),
        (Head(nn.PixelShuffle(2), first=32), "first", "pixel_shuffle at between is not known"),
        (Head(lambda x: torch.clamp(x, torch.zeros(8, 1, 1))), "first", "clamp at the network itself is not known"),
        (Head(lambda x: sum(x.chunk(2, 1)), first=16), "first", "chunk at the network itself is not known"),
    ],
)
def test_what_is_not_understood_leaves_its_width_whole_by_name(model: Any, path: str, why: str) -> None:
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = trace_sites(model.eval(), batches()[0])
    assert why in found.whole[path]
    assert [site.name for site in found.sites] == ["second"]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


class Pointwise(nn.Module):
    """Functions of every number by itself, each between two convolutions."""

    FUNCTIONS = (
        *(
            lambda x: x.clamp(-0.5, 0.5),
            lambda x: x.clamp_(min=0),
            lambda x: torch.clamp_max(x, 1),
            nn.Threshold(0.1, 0.2),
        ),
        *(
            lambda x: torch.clip(x, -1, 1),
            torch.exp,
            torch.sin,
            torch.cos,
            torch.erf,
            F.logsigmoid,
            F.softsign,
            F.rrelu,
        ),
        *(F.hardshrink, F.softshrink, lambda x: x**2, lambda x: torch.sqrt(x.abs()), lambda x: 1 / (1 + x.abs())),
        *(lambda x: torch.rsqrt(1 + x**2), lambda x: torch.log(1 + x.abs()), lambda x: x.to(x.dtype)),
    )

    def __init__(self) -> None:
        super().__init__()
        count = len(self.FUNCTIONS)
        self.stem, self.head = nn.Conv2d(3, 8, 1), nn.Linear(8, 4)
        self.maps = nn.ModuleList(nn.Conv2d(8, 8, 1) for _ in range(count))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for function, module in zip(self.FUNCTIONS, self.maps, strict=True):
            x = module(function(x))
        return self.head(x.mean((2, 3)))


def test_functions_of_every_number_by_itself_are_gone_through() -> None:
    torch.manual_seed(0)
    model, rows = Pointwise().eval(), batches(side=4)
    found = trace_sites(model, rows[0])
    assert found.whole == {}
    assert [site.name for site in found.sites] == ["stem", *(f"maps.{i}" for i in range(len(model.maps)))]
    widths = {site.name: 7 for site in found.sites}
    student, bases = cut_in_order(model, found.sites, widths, rows)
    assert check_cut(model, student, found.sites, bases, rows[0]) < 1e-5


def test_channels_are_followed_behind_an_operator_of_several_outputs() -> None:
    class Split(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.left, self.right = nn.Conv2d(3, 16, 3), nn.Conv2d(8, 12, 3), nn.Conv2d(8, 12, 3)
            self.last, self.head = nn.Conv2d(12, 6, 3), nn.Linear(6, 4)

        def forward(self, x: Tensor) -> Tensor:
            a, b = self.stem(x).chunk(2, 1)
            return self.head(F.relu(self.last(F.relu(self.left(a) + self.right(b)))).mean((2, 3)))

    torch.manual_seed(0)
    model, rows = Split().eval(), batches()
    found = trace_sites(model, rows[0])
    assert [site.name for site in found.sites] == ["left", "last"]
    assert list(found.whole) == ["stem"]
    student, bases = cut_in_order(model, found.sites, {"left": 5, "last": 4}, rows)
    assert check_cut(model, student, found.sites, bases, rows[0]) < 1e-5


def test_a_layer_that_is_called_before_and_after_a_split_stays_whole() -> None:
    class Around(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.wide, self.same = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 16, 3), nn.Conv2d(8, 8, 3, padding=1)
            self.last, self.head = nn.Conv2d(8, 6, 1), nn.Linear(6, 4)

        def forward(self, x: Tensor) -> Tensor:
            a, b = F.relu(self.wide(F.relu(self.same(F.relu(self.stem(x)))))).chunk(2, 1)
            return self.head(F.relu(self.last(F.relu(self.same(a)) + b)).mean((2, 3)))

    torch.manual_seed(0)
    found = trace_sites(Around().eval(), batches()[0])
    assert [site.name for site in found.sites] == ["last"]
    assert all("chunk" in found.whole[path] for path in ("stem", "wide", "same"))


def test_a_network_of_which_nothing_can_be_narrowed_is_refused_with_all_reasons() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Softmax(1), nn.Flatten(), nn.Linear(8 * 36, 4)).eval()
    with pytest.raises(UnsupportedModelError, match="0: softmax at 1 is not known to act channel by channel"):
        find_sites(model, batches()[0])


def test_a_convolution_in_groups_leaves_both_its_widths_whole() -> None:
    with pytest.raises(UnsupportedModelError, match="second is a convolution in 2 groups"):
        find_sites(Head(F.relu, nn.Conv2d(8, 8, 3, groups=2)).eval(), batches()[0])


def test_a_forward_that_cannot_be_followed_is_refused_by_name() -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x).sum((2, 3)) if x.sum() > 0 else self.conv(-x).sum((2, 3))

    with pytest.raises(UnsupportedModelError, match=r"torch\.export can follow\. Branches gave"):
        find_sites(Branches().eval(), batches()[0])


def test_tied_weights_are_refused_by_name() -> None:
    model = nn.Sequential(
        *(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3)),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)),
    )
    model[4].weight = model[2].weight
    with pytest.raises(UnsupportedModelError, match=r"2\.weight and 4\.weight are the same"):
        find_sites(model.eval(), batches()[0])


class SharedNorm(nn.Module):
    """What two convolutions write goes through the same norm, or the same slopes."""

    def __init__(self, shared: nn.Module) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3)
        self.shared, self.head = shared, nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self.shared(self.second(F.silu(self.shared(self.first(x))))))
        return self.head(F.relu(self.third(x)).mean((2, 3)))


@pytest.mark.parametrize("shared", [nn.BatchNorm2d(8), nn.PReLU(8)], ids=["norm", "slopes"])
def test_widths_that_go_through_one_norm_are_one(shared: nn.Module) -> None:
    torch.manual_seed(0)
    rows = batches()
    model = trained(SharedNorm(shared), rows)
    found = {site.name: site for site in find_sites(model, rows[0])}
    assert list(found) == ["first", "third"]
    assert [stream.norm for stream in found["first"].streams] == [None, None]  # it cannot take up two constants
    widths = {"first": 5, "third": 4}
    student, bases = cut_in_order(model, list(found.values()), widths, rows)
    assert check_cut(model, student, list(found.values()), bases, rows[0]) < 1e-5


def test_statistics_that_two_norms_share_leave_their_widths_whole_by_name() -> None:
    model = nn.Sequential(
        *(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU()),
        *(nn.Conv2d(8, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)),
    )
    model[4].running_mean = model[1].running_mean
    found = trace_sites(model.eval(), batches()[0])
    assert found.whole == dict.fromkeys(["0", "3"], "1.running_mean and 4.running_mean are the same")
    assert [site.name for site in found.sites] == ["6"]


def test_a_module_that_is_called_twice_has_one_width_on_each_side() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.again, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, padding=1), nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            x = F.relu(self.stem(x))
            for _ in range(2):
                x = F.relu(self.again(x))
            return self.head(x.mean((2, 3)))

    torch.manual_seed(0)
    model, rows = Twice().eval(), batches()
    sites = find_sites(model, rows[0])
    assert [site.name for site in sites] == ["stem"]
    student: Any
    student, bases = cut_in_order(model, sites, {"stem": 5}, rows)
    assert check_cut(model, student, sites, bases, rows[0]) < 1e-5


def test_a_module_shared_with_another_model_stays_as_it_was(everything: tuple[Any, list[Any]]) -> None:
    model, rows = everything
    other = nn.Sequential(model.stem, nn.Flatten())
    before = other(rows[0][0])
    sites = find_sites(model, rows[0])
    cut_in_order(model, sites, {site.name: 4 for site in sites}, rows)
    assert torch.equal(other(rows[0][0]), before)


def test_memory_stays_in_the_order_of_the_model(everything: tuple[Any, list[Any]]) -> None:
    """Weights of 1 × 1 filters in another order would make all outputs lie in it, which `view` refuses."""
    model, rows = everything
    sites = find_sites(model, rows[0])
    student, _ = cut_in_order(model, sites, {site.name: site.width // 2 for site in sites}, rows)
    for name, parameter in student.named_parameters():
        assert parameter.stride() == torch.empty(parameter.shape).stride(), name


@pytest.mark.parametrize("low_rank", [False, True])
def test_channels_stay_last_where_they_were(low_rank: bool) -> None:
    torch.manual_seed(0)
    model, rows = trained(nn.Sequential(Basic(3, 8, 2), Basic(8, 8), Mean(8)), batches()), batches()
    model.to(memory_format=torch.channels_last)
    sites = find_sites(model, rows[0], low_rank=low_rank)
    widths = {site.name: min(site.width, 3) for site in sites}
    student, bases = cut_in_order(model, sites, widths, rows)
    written = dict(student.named_parameters())
    fill(student, {name: torch.empty(value.shape).copy_(value.detach()) for name, value in written.items()})
    narrow: dict[str, Tensor] = {**written, **{f"filled.{name}": p for name, p in student.named_parameters()}}
    narrow |= {f"shape.{name}": p for name, p in skeleton(model, sites, widths).named_parameters()}
    for name, parameter in narrow.items():
        if parameter.ndim == 4:
            expected = torch.empty(parameter.shape, memory_format=torch.channels_last).stride()
            assert parameter.stride() == expected, name
    assert check_cut(model, student, sites, bases, rows[0]) < 1e-5


class Mean(nn.Module):
    """The head of a network of so many channels."""

    def __init__(self, width: int):
        super().__init__()
        self.head = nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x.mean((2, 3)))


def labelled(model: Any, rows: list[Any]) -> list[Any]:
    """The same rows, on whose labels the model is always right."""
    with torch.no_grad():
        scores = [model(x) for x, _ in rows]
    middle = torch.cat(scores).median(0).values
    with torch.no_grad():
        model.head.bias -= middle
    return [(x, (score - middle).argmax(-1)) for (x, _), score in zip(rows, scores, strict=True)]


def test_a_model_of_ones_own_is_compressed_without_naming_its_sites(
    tmp_path: Path, everything: tuple[Any, list[Any]]
) -> None:
    """And its folder gives it back from the class alone."""
    model, rows = everything
    model = copy.deepcopy(model)
    answered = labelled(model, rows)
    result = rmtkd.compress(
        model,
        train=answered,
        selection=answered,
        calibration=answered,
        target="60%flops",
        multiple_of=1,
        epochs=1.0,
        out=tmp_path / "run",
    )
    assert result.record["compressed"]["flops"] <= 0.6 * result.record["baseline"]["flops"]
    again = rmtkd.load(tmp_path / "run" / "model", Everything)
    assert torch.equal(again(rows[0][0]), result.model(rows[0][0]))


def test_what_stays_whole_stands_in_the_plan() -> None:
    torch.manual_seed(0)
    model, rows = Head(nn.Softmax(1)).eval(), batches()
    answered = labelled(model, rows)
    result = rmtkd.compress(model, train=answered, selection=answered, policy="paper", epochs=0.0, multiple_of=1)
    assert any("What first writes stays whole: softmax" in remark for remark in result.plan.remarks)
    with pytest.raises(PlanError, match=r"(?s)target must be at least.*What first writes stays whole: softmax"):
        rmtkd.compress(model, train=answered, selection=answered, policy="paper", target="200", multiple_of=1)


# ------------------------------------------------------------------------- how networks are written, and what is seen


MASK = torch.rand(1, 8, 1, 1)


class Net(nn.Module):
    """Two convolutions and a linear map; `middle` and `end` of a case may do anything with what goes through."""

    def __init__(self, **parts: nn.Module) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 12, 3, padding=1)
        self.head = nn.Linear(12, 4)
        for name, module in parts.items():
            self.add_module(name, module)

    def middle(self, x: Tensor) -> Tensor:
        return F.relu(x)

    def end(self, x: Tensor) -> Tensor:
        return self.head(x.mean((2, 3)))

    def forward(self, x: Tensor) -> Tensor:
        return self.end(F.relu(self.second(self.middle(self.first(x)))))


def as_written(**methods: Any) -> Net:
    parts = {name: module for name, module in methods.items() if isinstance(module, nn.Module)}
    torch.manual_seed(0)
    kind = type("Written", (Net,), {name: part for name, part in methods.items() if name not in parts})
    return kind(**parts).eval()


def constant_view(net: Any, x: Tensor) -> Tensor:
    return net.flat(F.max_pool2d(x, 4).view(-1, 12 * 2 * 2))


def only_in_training(net: Any, x: Tensor) -> Tensor:
    return net.head(x.mean((2, 3))) + (net.other(x.mean((2, 3))) if net.training else 0)


def counted(net: Any, x: Tensor) -> Tensor:
    if len(net.first.weight) + len(net.second.weight) < 14:  # each may be halved alone
        raise RuntimeError("too few channels")
    return net.head(x.mean((2, 3)))


def by_hand(net: Any, x: Tensor) -> Tensor:
    return F.relu(F.conv2d(F.relu(x), net.other.weight, net.other.bias))


def tied(net: Any, x: Tensor) -> Tensor:
    return net.head(F.linear(F.relu(net.other(x.mean((2, 3)))), net.other.weight.t()))


@pytest.mark.parametrize(
    ("net", "sites", "path", "why"),
    [
        (
            as_written(end=constant_view, flat=nn.Linear(48, 4)),
            ["first"],
            "second",
            "the network does not run with fewer",
        ),
        (
            as_written(end=only_in_training, other=nn.Linear(12, 4)),
            ["first"],
            "second",
            "in training the network does not run with fewer",
        ),
        (
            as_written(
                end=lambda net, x: net.last(net.wide(counted(net, x))), wide=nn.Linear(4, 8), last=nn.Linear(8, 4)
            ),
            ["first", "head", "wide"],
            "second",
            "the network does not run with fewer: too few channels",
        ),
        (as_written(middle=by_hand, other=nn.Conv2d(8, 8, 1)), ["second"], "first", "other.weight is used at"),
        (as_written(end=tied, other=nn.Linear(12, 6)), ["first"], "second", "other.weight is used at"),
        (as_written(middle=lambda net, x: x * MASK), ["second"], "first", "has a factor or term for each channel"),
        (
            as_written(end=lambda net, x: net.six(F.max_pool1d(x.mean((2, 3)), 2)), six=nn.Linear(6, 4)),
            ["first"],
            "second",
            "max_pool1d at the network itself mixes channels",
        ),
        (
            as_written(
                end=lambda net, x: net.last(F.max_pool2d(x, 4).flatten(1).unsqueeze(-1)).flatten(1),
                last=nn.Conv1d(48, 4, 1),
            ),
            ["first"],
            "second",
            "last is a convolution over channels that lie flattened",
        ),
    ],
)
def test_what_cannot_run_narrower_or_is_used_elsewhere_stays_whole(net: Net, sites: Any, path: str, why: str) -> None:
    before, modes = snapshot(net), [module.training for module in net.modules()]
    rows, state = batches()[0], torch.get_rng_state()
    found = trace_sites(net, rows)
    assert [site.name for site in found.sites] == sites
    assert why in found.whole[path]
    assert_untouched(net, before)
    assert modes == [module.training for module in net.modules()]
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    "net",
    [
        as_written(middle=lambda net, x: F.adaptive_max_pool2d(x, 4)),
        as_written(middle=lambda net, x: x * torch.tensor(0.5)),
        as_written(
            end=lambda net, x: net.flat(net.norm(F.max_pool2d(x, 4).flatten(1))),
            flat=nn.Linear(48, 4),
            norm=nn.BatchNorm1d(48),
        ),
        as_written(end=lambda net, x: net.flat(net.slope(x.flatten(1))), flat=nn.Linear(768, 4), slope=nn.PReLU(768)),
        as_written(
            middle=lambda net, x: F.relu(net.a(net.again(x))) + F.relu(net.b(net.again(F.relu(x)))),
            again=nn.Conv2d(8, 8, 1, bias=False),
            a=nn.BatchNorm2d(8),
            b=nn.BatchNorm2d(8),
        ),
    ],
)
def test_widths_are_cut_however_the_network_is_written(net: Any) -> None:
    rows = batches()
    found = trace_sites(net, rows[0])
    assert found.whole == {}
    widths = {site.name: site.width // 2 for site in found.sites}
    assert {"first", "second"} <= widths.keys()
    student, bases = cut_in_order(net, found.sites, widths, rows)
    assert check_cut(net, student, found.sites, bases, rows[0]) < 1e-5
    for module in student.modules():
        if isinstance(module, nn.Conv2d):
            assert module.weight.shape[:2] == (module.out_channels, module.in_channels // module.groups)
        if isinstance(module, nn.PReLU):
            assert module.num_parameters == len(module.weight)


def test_a_batch_with_a_forward_of_its_own_is_followed_as_it_is_called() -> None:
    net = as_written()
    images = [{"image": batch[0], "labels": batch[1]} for batch in batches()]
    calls = list(Calls(images, lambda model, batch: model(2 * batch["image"])))
    found = trace_sites(net, calls[0])
    assert found.sites == trace_sites(net, batches()[0]).sites
    widths = {site.name: 4 for site in found.sites}
    student, bases = cut_in_order(net, found.sites, widths, calls)
    assert check_cut(net, student, found.sites, bases, calls[0]) < 1e-5


def test_linear_maps_over_positions_of_an_image_have_widths_between_them() -> None:
    class Over(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(64, 12), nn.Linear(12, 10), nn.Linear(10, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.c(F.relu(self.b(F.relu(self.a(x.flatten(2))))).mean(1))

    torch.manual_seed(0)
    model, rows = Over().eval(), batches()
    found = trace_sites(model, rows[0])
    assert [site.name for site in found.sites] == ["a", "b"]
    student, bases = cut_in_order(model, found.sites, {"a": 6, "b": 5}, rows)
    assert check_cut(model, student, found.sites, bases, rows[0]) < 1e-5


class Series(nn.Module):
    """Linear maps of every moment, and a norm with an entry for each of them."""

    def __init__(self, moments: int):
        super().__init__()
        self.up, self.norm, self.down = nn.Linear(6, 32), nn.BatchNorm1d(moments), nn.Linear(32, 16)
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.down(F.relu(self.norm(self.up(x))))).mean(1))


@pytest.mark.parametrize("moments", [4, 16])  # 16: as many as half of the width
def test_a_norm_of_moments_is_none_of_channels(moments: int) -> None:
    found = trace_sites(Series(moments).eval(), (torch.randn(8, moments, 6), torch.zeros(8).long()))
    assert [site.name for site in found.sites] == ["down"]
    assert found.whole == {"up": "norm is over another dimension than that of the channels"}
