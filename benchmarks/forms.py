"""The widths of one plan in several forms: folded in two orders, without reconstruction, and as maps that are inserted.

`work` has the `teacher`, the `plan` and the `calibration` rows.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from rmtkd.activations import collect
from rmtkd.bases import Basis, linear_basis
from rmtkd.cutting import cut_in_order, fit_bases
from rmtkd.sites import Site, by_width
from rmtkd.surgery import fold


def folded(work: Any, sites: Sequence[Site], metrics: Any) -> nn.Module:
    """The library's way."""
    return cut_in_order(work.teacher, sites, work.plan.widths, work.calibration, metrics=metrics)[0]


def deep_to_shallow(work: Any, sites: Sequence[Site], metrics: Any) -> nn.Module:
    """The same, the last width first: each is cut on the activations of layers that are whole yet."""
    return cut_in_order(work.teacher, sites[::-1], work.plan.widths, work.calibration, metrics=metrics)[0]


def unreconstructed(work: Any, sites: Sequence[Site], metrics: Any) -> nn.Module:
    """The same units and directions; of what is dropped nothing is put back, not even its mean."""
    student = work.teacher
    for group in by_width(sites).values():
        student = cut(work, student, group, metrics, plainly)
    return student


def cut(work: Any, model: nn.Module, group: Sequence[Site], metrics: Any, change: Callable[..., Basis]) -> nn.Module:
    """One shared width cut by the library's bases, changed."""
    moments = collect(model, group, work.calibration)
    made = {s.name: fit_bases(model, s, moments[s.name], work.plan.widths[s.name], metrics) for s in group}
    return fold(model, group, {s.name: tuple(change(s, basis) for basis in made[s.name]) for s in group})


def plainly(site: Site, basis: Basis) -> Basis:
    """The basis with the shortest way back, and about zero. Of a product there is no other."""
    if site.kind == "bilinear":
        return basis
    return replace(basis, lift=torch.linalg.pinv(basis.reduce), mean=torch.zeros_like(basis.mean))


def inserted(work: Any, sites: Sequence[Site], metrics: Any) -> nn.Module:
    """Principal directions in front of every feed-forward reader, as a map that stays. Heads, and an embedding, which
    has no reader to stand in front of, are folded."""
    student = work.teacher
    for group in by_width(sites).values():
        (site, *others) = group
        if others or site.kind != "pointwise":
            student = cut(work, student, group, metrics, lambda _, basis: basis)
            continue
        (moments,) = collect(student, group, work.calibration)[site.name]
        identity = torch.eye(site.size, dtype=torch.float64)[None]
        basis = linear_basis(moments.covariance(), moments.mean, identity, work.plan.widths[site.name])
        student = with_projection(student, site.streams[0].module, basis)
    return student


def with_projection(model: nn.Module, path: str, basis: Basis) -> nn.Module:
    """The model with a projection in front of the linear map at this path."""
    student = copy.deepcopy(model)
    old: Any = student.get_submodule(path)
    first = nn.Linear(old.in_features, basis.reduce.shape[1], bias=False)
    second = nn.Linear(basis.reduce.shape[1], old.out_features)
    with torch.no_grad():
        weight = old.weight.double()
        first.weight.copy_(basis.reduce[0])
        second.weight.copy_(weight @ basis.lift[0])
        dropped = basis.mean[0] - basis.projector[0] @ basis.mean[0]
        second.bias.copy_((0 if old.bias is None else old.bias.double()) + weight @ dropped)
    student.set_submodule(path, nn.Sequential(first, second))
    return student.eval()


FORM: Mapping[str, Callable[..., nn.Module]] = {
    "folded": folded,
    "folded, deep to shallow": deep_to_shallow,
    "no reconstruction": unreconstructed,
    "inserted": inserted,
}
"""By name; each is given the work, the sites and the metrics of their outputs."""
