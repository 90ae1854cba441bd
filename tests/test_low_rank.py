"""The claims of low-rank pairs: one convolution becomes two, of the best rank for what it writes, and stays so."""

import copy
import json
import shutil
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

import rmtkd
from conftest import random_rows, tiny_bert
from rmtkd import artifact
from rmtkd.activations import collect
from rmtkd.bases import linear_basis
from rmtkd.cli import app
from rmtkd.cutting import cut_in_order
from rmtkd.errors import ArtifactError, OptionError, UnsupportedModelError
from rmtkd.measurement import count_flops, count_parameters
from rmtkd.modeling_cifar_resnet import CifarResNetConfig, CifarResNetForImageClassification
from rmtkd.modeling_rmtkd import LowRankPair
from rmtkd.modules import low_rank
from rmtkd.planning import Plan, retarget
from rmtkd.planning.costs import CostTable, predict_cost
from rmtkd.recipes.cifar import small_network
from rmtkd.sites import find_sites
from rmtkd.surgery import check_cut, fold
from test_artifact import reseal
from test_tracing import Everything, batches, labelled, trained


class Plain(nn.Module):
    """Convolutions with and without bias, norm and padding; one that reads more channels than it writes."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.narrow = nn.Conv2d(3, 24, 3), nn.Conv2d(24, 6, 3)
        self.padded, self.norm = nn.Conv2d(6, 12, 3, 2, 1, bias=False), nn.BatchNorm2d(12)
        self.bare, self.strided = nn.Conv2d(12, 12, 3, 1, 1, bias=False), nn.Conv2d(12, 12, 1, 2)
        self.head = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.narrow(torch.relu(self.wide(x))))
        x = torch.relu(self.bare(torch.relu(self.norm(self.padded(x)))))
        return self.head(torch.tanh(self.strided(x)).mean((2, 3)))


@pytest.fixture(scope="module")
def plain() -> tuple[Any, list[Any]]:
    torch.manual_seed(0)
    rows = batches(side=12)
    return trained(Plain(), rows), rows


@pytest.mark.parametrize("side", ["input", "output"])
@pytest.mark.parametrize("options", [{}, {"stride": 2, "padding": 1}, {"dilation": 2, "padding": "same"}])
@pytest.mark.parametrize("bias", [False, True])
def test_a_pair_of_full_rank_is_the_convolution(side: str, options: dict[str, Any], bias: bool) -> None:
    convolution = nn.Conv2d(5, 7, 3, bias=bias, padding_mode="reflect" if "padding" in options else "zeros", **options)
    x = torch.randn(2, 5, 9, 9)
    torch.testing.assert_close(low_rank(convolution, side)(x), convolution(x))


def test_every_convolution_of_one_group_may_become_two_on_the_cheaper_side(plain: tuple[Any, list[Any]]) -> None:
    model, rows = plain
    found = {site.name: site for site in find_sites(model, rows[0], low_rank=True)}
    assert list(found) == [f"{name}.rank" for name in ("wide", "narrow", "padded", "bare", "strided")]
    assert {name: (site.width, site.streams[0].side) for name, site in found.items()} == {
        "wide.rank": (24, "output"),
        "narrow.rank": (24, "input"),  # 24 channels are read, 6 written
        "padded.rank": (12, "output"),
        "bare.rank": (12, "output"),
        "strided.rank": (12, "output"),  # four times as many positions are read as written
    }
    for site in found.values():
        costs = {}
        for side in ("input", "output"):
            whole = model.get_submodule(site.factorizes)
            costs[side] = count_flops(LowRankPair(whole, 2, side), (torch.randn(1, whole.in_channels, 8, 8),))
        assert costs[site.streams[0].side] == min(costs.values())
    others = find_sites(trained(Everything(), batches()), batches()[0], low_rank=True)
    assert "depthwise.rank" not in {site.name for site in others}


def test_a_layer_that_is_called_rank_is_no_pair() -> None:
    parts = {"stem": nn.Conv2d(3, 8, 3), "pool": nn.AdaptiveAvgPool2d(1), "flat": nn.Flatten(), "act": nn.ReLU()}
    inner = nn.Sequential(OrderedDict(rank=nn.Linear(8, 8)))
    model = nn.Sequential(OrderedDict(parts, inner=inner, head=nn.Linear(8, 4)))
    sites = {site.name: site.is_rank for site in find_sites(model.eval(), batches()[0])}
    assert sites == {"stem": False, "inner.rank": False}
    assert all(site.is_rank for site in find_sites(model, batches()[0], low_rank=True))


def test_a_pair_is_the_best_of_its_rank_for_what_the_convolution_writes(plain: tuple[Any, list[Any]]) -> None:
    """The error of the output is what the eigenvalues of its covariance say that are left out (Eckart–Young)."""
    model, rows = plain
    (site,) = [site for site in find_sites(model, rows[0], low_rank=True) if site.name == "wide.rank"]
    (moments,) = collect(model, (site,), rows)[site.name]
    basis = linear_basis(moments.covariance(), moments.mean, torch.eye(24, dtype=torch.float64)[None], 5)
    student = fold(model, (site,), {site.name: (basis,)})
    x = torch.cat([x for x, _ in rows])
    with torch.no_grad():
        error = (model.wide(x) - student.wide(x)).double().square().sum(1).mean()  # type: ignore[operator]
    left_out = torch.linalg.eigvalsh(moments.covariance()[0])[:-5].sum()
    assert float(error) == pytest.approx(float(left_out), rel=1e-3)


@pytest.mark.parametrize("rank", [1, 4])
def test_a_cut_of_all_convolutions_is_its_projected_reference(plain: tuple[Any, list[Any]], rank: int) -> None:
    model, rows = plain
    sites = find_sites(model, rows[0], low_rank=True)
    student, bases = cut_in_order(model, sites, {site.name: rank for site in sites}, rows)
    assert check_cut(model, student, sites, bases, rows[0]) < 1e-4
    pairs = [module for module in student.modules() if isinstance(module, LowRankPair)]
    assert [pair.rank for pair in pairs] == [rank] * len(sites)


def test_costs_of_pairs_are_predicted_exactly(plain: tuple[Any, list[Any]]) -> None:
    model, rows = plain
    sites = find_sites(model, rows[0], low_rank=True)
    baseline, table = CostTable.measure(model, sites, rows[0])
    assert table is not None and baseline["flops"] == count_flops(model, rows[0])
    widths = {site.name: 1 + i for i, site in enumerate(sites)}
    student, _ = cut_in_order(model, sites, widths, rows)
    dropped = {site.shares: site.width - widths[site.name] for site in sites}
    counted = {"params": count_parameters(student), "flops": count_flops(student, rows[0])}
    assert counted == predict_cost(model, sites, widths, rows[0])
    assert counted == {cost: baseline[cost] + table.change(cost, dropped) for cost in counted}


def test_the_width_of_a_pair_is_found_again_and_may_be_rotated(plain: tuple[Any, list[Any]]) -> None:
    model, rows = plain
    sites = find_sites(model, rows[0], low_rank=True)[:2]
    student, _ = cut_in_order(model, sites, {site.name: 4 for site in sites}, rows)
    again = {site.name: site for site in find_sites(student, rows[0])}
    assert {name for name, site in again.items() if site.kind == "linear"} == {"wide.0", "narrow.0"}
    assert again["wide.1"].kind == "pointwise"
    assert not {"wide.0.rank", "wide.1.rank"} & {s.name for s in find_sites(student, rows[0], low_rank=True)}
    twice, bases = cut_in_order(student, tuple(again.values()), {n: s.width - 1 for n, s in again.items()}, rows)
    assert check_cut(student, twice, tuple(again.values()), bases, rows[0]) < 1e-4


def test_two_linear_maps_with_nothing_between_may_be_rotated() -> None:
    model = nn.Sequential(nn.Linear(8, 12), nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 4)).eval()
    kinds = {site.name: site.kind for site in find_sites(model, (torch.randn(4, 8),))}
    assert kinds == {"0": "linear", "1": "pointwise"}


def test_a_model_of_ones_own_goes_to_a_folder_and_back(plain: tuple[Any, list[Any]], tmp_path: Path) -> None:
    model = copy.deepcopy(plain[0])
    rows = labelled(model, plain[1])
    result = rmtkd.compress(
        model,
        train=rows,
        selection=rows,
        report=None,
        target="80%flops",
        low_rank=True,
        multiple_of=1,
        epochs=1.0,
        out=tmp_path / "run",
    )
    assert result.plan.low_rank and Plan.read(tmp_path / "run" / "plan.json") == result.plan
    assert count_flops(result.model, rows[0]) <= 0.8 * count_flops(model, rows[0])
    again = rmtkd.load(tmp_path / "run" / "model", Plain)
    with torch.no_grad():
        assert torch.equal(again(rows[0][0]), result.model(rows[0][0]))
    narrower, _ = rmtkd.plan(again, calibration=rows, target="70%params", multiple_of=1, policy="paper")
    twice = rmtkd.narrow(again, narrower, calibration=rows)
    assert count_parameters(twice) < count_parameters(again)


@pytest.fixture(scope="module")
def cifar(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a network with one pair."""
    config = CifarResNetConfig(low_rank={"layer1.0.conv1": [3, "output"]}, id2label=dict(enumerate("abcd")))
    folder = tmp_path_factory.mktemp("cifar") / "model"
    rmtkd.save(CifarResNetForImageClassification(config).eval(), folder)
    again: Any = rmtkd.load(folder)
    assert again.config.low_rank == {"layer1.0.conv1": [3, "output"]}
    return folder


@pytest.mark.parametrize("family", ["cifar", "transformers"])
def test_a_known_network_goes_to_a_folder_and_back(family: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    if family == "cifar":
        model: Any = small_network(20)
    else:
        from transformers import ResNetConfig, ResNetForImageClassification

        config = ResNetConfig(embedding_size=8, hidden_sizes=[16, 32], depths=[1, 2], id2label=dict(enumerate("abcd")))
        model = ResNetForImageClassification(config).eval()
    rows = [{"pixel_values": torch.randn(16, 3, 32, 32)} for _ in range(2)]
    plan, _ = rmtkd.plan(model, calibration=rows, target="75%flops", low_rank=True, multiple_of=1, policy="paper")
    student = rmtkd.narrow(model, plan, calibration=rows)
    rmtkd.save(student, tmp_path / "model")
    again = rmtkd.load(tmp_path / "model")
    with torch.no_grad():
        assert torch.equal(again(**rows[0]).logits, student(**rows[0]).logits)
    assert any(isinstance(module, LowRankPair) for module in again.modules())


@pytest.mark.parametrize(
    "strange",
    [{"nowhere": [3, "output"]}, {"": [3, "input"]}, {"layer1.0.conv1": [10**12, "output"]}, {}, None, 5]
    + [{"layer1.0.conv1": pair} for pair in (3, [3, "behind"], [3, {}], ["x", "input"], [-1, "input"], [3.5, "input"])],
)
def test_a_folder_that_tells_of_other_pairs_is_refused(strange: object, cifar: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(cifar, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"low_rank": strange}))
    reseal(folder)
    with pytest.raises(ArtifactError):
        rmtkd.load(folder)


@pytest.mark.parametrize("strange", [{"nowhere": "output"}, {"wide": "behind"}, {"wide": 3}, {"norm": "input"}, {}, 5])
def test_a_folder_of_ones_own_that_tells_of_other_pairs_is_refused(
    strange: object, plain: tuple[Any, list[Any]], tmp_path: Path
) -> None:
    model, rows = plain
    sites = find_sites(model, rows[0], low_rank=True)[:1]
    student, _ = cut_in_order(model, sites, {site.name: 4 for site in sites}, rows)
    artifact.save(student, tmp_path / "model", sites=sites, example=rows[0])
    assert type(rmtkd.load(tmp_path / "model", Plain)) is Plain
    reseal(tmp_path / "model", lambda manifest: manifest["narrowed"].update(low_rank=strange))
    with pytest.raises(ArtifactError):
        rmtkd.load(tmp_path / "model", Plain)


def test_from_the_command_line_after_widths(tmp_path: Path) -> None:
    def invoke(*words: object) -> str:
        result = CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return result.output

    invoke("compress", "digits_cnn", "--out", tmp_path / "widths", "--epochs", 1, "--target", "60%flops")
    words = ("--model", tmp_path / "widths" / "model", "--low-rank", "--target", "80%flops")
    invoke("plan", "digits_cnn", *words, "--out", tmp_path / "plan")
    plan = json.loads((tmp_path / "plan" / "plan.json").read_text())
    assert plan["low_rank"] and all(site["name"].endswith(".rank") for site in plan["sites"])
    assert any("1 × 1 behind it" in remark for remark in plan["remarks"])
    applied = ("--plan", tmp_path / "plan" / "plan.json", "--epochs", 0.5, "--out", tmp_path / "pairs")
    invoke("compress", "digits_cnn", *words[:2], *applied)
    record = json.loads((tmp_path / "pairs" / "summary.json").read_text())
    assert record["compressed"]["flops"] <= 0.8 * record["baseline"]["flops"]


def test_a_model_narrowed_first_and_then_given_pairs_goes_to_a_folder_and_back(tmp_path: Path) -> None:
    """The second run's sites know nothing of norms and depthwise filters that the first one has narrowed."""
    rows = batches()
    torch.manual_seed(0)
    model = trained(Everything(), rows)
    widths, _ = rmtkd.plan(model, calibration=rows, target="60%flops", multiple_of=1, policy="paper")
    narrower = rmtkd.narrow(model, widths, calibration=rows)
    ranks, _ = rmtkd.plan(narrower, calibration=rows, target="85%flops", multiple_of=1, policy="paper", low_rank=True)
    student = rmtkd.narrow(narrower, ranks, calibration=rows)
    sites = find_sites(narrower, rows[0], low_rank=True)
    artifact.save(student, tmp_path / "model", sites=sites, example=rows[0])
    again = rmtkd.load(tmp_path / "model", Everything)
    with torch.no_grad():
        assert torch.equal(again(rows[0][0]), student(rows[0][0]))


class Normed(nn.Module):
    """Norms over groups of channels: no width can be narrowed."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.norm = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3), nn.GroupNorm(4, 16)
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.a(x.to(self.a.weight.dtype))))
        x = torch.relu(self.norm(self.b(x))).mean((2, 3))
        return self.head(x.view(-1, self.b.out_channels))


def test_where_no_width_can_be_narrowed_convolutions_may_still_become_two() -> None:
    """Also where a forward asks its convolutions for their shapes."""
    rows = batches(side=9)
    model = Normed().eval()
    with pytest.raises(UnsupportedModelError, match="group_norm"):
        find_sites(model, rows[0])
    plan, _ = rmtkd.plan(model, calibration=rows, target="70%flops", low_rank=True, multiple_of=1, policy="paper")
    student = rmtkd.narrow(model, plan, calibration=rows)
    assert count_flops(student, rows[0]) <= 0.7 * count_flops(model, rows[0])


class Branches(nn.Module):
    """Convolutions behind one another that are no pairs: widths with several readers, or joined with others."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1), nn.Conv2d(16, 8, 1)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        u = self.a(x)
        v = torch.cat([self.b(u), torch.relu(self.c(u))], 1)
        return self.head(torch.relu(self.d(v)).mean((2, 3)))


def test_convolutions_that_only_look_like_halves_of_a_pair_may_become_two() -> None:
    found = {site.name for site in find_sites(Branches().eval(), batches()[0], low_rank=True)}
    assert found == {"a.rank", "b.rank", "c.rank", "d.rank"}


def test_a_convolution_under_two_names_is_refused() -> None:
    model = Normed().eval()
    model.other = model.b
    with pytest.raises(UnsupportedModelError, match="are the same"):
        find_sites(model, batches(side=9)[0], low_rank=True)


def test_other_sites_than_ranks_are_refused(plain: tuple[Any, list[Any]]) -> None:
    model, rows = plain
    with pytest.raises(OptionError, match="must be those of find_sites"):
        rmtkd.plan(model, calibration=rows, sites=find_sites(model, rows[0]), low_rank=True)


def test_a_plan_made_anew_tells_the_sides_too(plain: tuple[Any, list[Any]]) -> None:
    model, rows = plain
    made, spectrums = rmtkd.plan(model, calibration=rows, target="80%flops", low_rank=True, multiple_of=1)
    anew = retarget(made, spectrums, target="70%flops")
    assert anew.low_rank and any("ahead, and cheaper there, in narrow.rank" in remark for remark in anew.remarks)


def test_where_there_is_no_convolution_pairs_are_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="must have convolutions"):
        rmtkd.plan(tiny_bert(), calibration=random_rows(), low_rank=True)
    with pytest.raises(OptionError, match="low_rank must be the only change"):
        rmtkd.plan(tiny_bert(), calibration=random_rows(), low_rank=True, embedding_levels=2)
