"""Cutting a network: fold bases into its weights, slice, resize; and the check against the full-width reference.

A cut touches only what its sites name. The caller's model is never modified.
"""

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.utils.hooks import RemovableHandle

from rmtkd import batches as batching
from rmtkd.activations import attach, folded, in_groups, reader, unfolded
from rmtkd.bases import Basis
from rmtkd.batches import Batch
from rmtkd.errors import PlanError, SurgeryError
from rmtkd.measurement import evaluation, relative_difference
from rmtkd.modeling_rmtkd import FactorizedEmbedding, NoHeads
from rmtkd.modules import factorized, low_rank, order_of, plain_copy
from rmtkd.sites import Axis, Site, Stream, after_cuts

ROUNDINGS = 1000
"""A cut model may differ from its reference, relatively, by this many roundings of its dtype: folds are made in float64
and stored in the model's own precision, one after the other."""


def fold(model: nn.Module, sites: Sequence[Site], bases: Mapping[str, Sequence[Basis]]) -> nn.Module:
    """A narrower copy of the model, with every basis folded into the weights around its site.

    Args:
        model: the model, left as it was.
        sites: the sites to cut, of this model.
        bases: for each site's name one basis per stream.

    Returns:
        A new dense model, sharing no storage with `model`, in the same dtype, on the same device, and as it lies in
        memory (channels last or not). Nothing is hooked onto it.

    Raises:
        PlanError: if sites that share a width are given different widths.
    """
    _check_shared(sites, bases)
    student = plain_copy(model)
    for site in sites:
        _prepare(student, site)
        for i, (stream, basis) in enumerate(zip(site.streams, bases[site.name], strict=True)):
            _fold_stream(student, stream, basis, rescale=site.scaled and i == 0)
        _finish(student, replace(site, width=bases[site.name][0].reduce.shape[1] // site.each))
    return student


def skeleton(model: nn.Module, sites: Sequence[Site], widths: Mapping[str, int]) -> nn.Module:
    """The shape of the model at the given widths: parameters on the meta device, without memory or values.

    Args:
        model: the model, left as it was.
        sites: the sites that may be narrowed.
        widths: for each site's name the width that is kept; full, and then left alone, where a site is missing.
    """
    # deepcopy takes what the memo holds in place of a copy: no parameter is ever duplicated.
    meta = {id(p): nn.Parameter(p.detach().to("meta"), requires_grad=p.requires_grad) for p in model.parameters()}
    student = copy.deepcopy(model, meta)
    full = {site.name: site for site in sites}
    for site in after_cuts(sites, widths):
        if site == full[site.name]:
            continue
        _prepare(student, site)
        for stream in site.streams:
            for axis in (*stream.writers, *stream.readers):
                tensor = _tensor(student, axis.parameter)
                shape = list(tensor.shape)
                shape[axis.dim] = axis.copies * site.groups * site.size * axis.positions
                # Buffers are what they are: only parameters have no values.
                _replace(student, axis.parameter, tensor.new_zeros(shape))
        _finish(student, site)
    return student


def fill(model: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Put values in place of the parameters and buffers of these names, of any shape; shared ones stay shared, and a
    parameter with its channels last has them there again: files know one order alone."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    buffers = dict(model.named_buffers(remove_duplicate=False))
    for name, buffer in buffers.items():
        names.setdefault(id(buffer), []).append(name)
    for name, value in values.items():
        if name in buffers:
            for alias in names[id(buffers[name])]:
                path, _, leaf = alias.rpartition(".")
                model.get_submodule(path)._buffers[leaf] = value
            continue
        old = model.get_parameter(name)
        if (order := order_of(old)) is not torch.contiguous_format:
            value = value.to(memory_format=order)
        new = nn.Parameter(value, requires_grad=old.requires_grad)
        for alias in names[id(old)]:
            path, _, leaf = alias.rpartition(".")
            setattr(model.get_submodule(path), leaf, new)


def fill_with_ones(model: nn.Module, device: torch.device | str) -> None:
    """Give the parameters of a skeleton values, in place, so that it runs: such as a network may divide by."""
    fill(model, {name: torch.ones_like(value, device=device) for name, value in list(model.named_parameters())})


def resize(model: nn.Module, shapes: Mapping[str, Sequence[int]]) -> None:
    """Give the model's parameters and buffers these shapes, in place, without values: what a loader does before it
    loads."""
    for name, shape in shapes.items():
        tensor = _tensor(model, name)
        if list(tensor.shape) != list(shape):
            _replace(model, name, tensor.new_zeros(tuple(shape)))


def factorize(model: nn.Module, path: str, side: str = "output") -> None:
    """Replace the embedding or convolution at `path`, in place, by the same function in two factors.

    Args:
        model: that has it. What is factorised already stays as it is.
        path: of the module.
        side: of a convolution, on which the identity is put, see `modeling_rmtkd.LowRankPair`.
    """
    whole = model.get_submodule(path)
    if isinstance(whole, _ConvNd):
        model.set_submodule(path, low_rank(whole, side))
    elif isinstance(whole, nn.Embedding) and not isinstance(whole, FactorizedEmbedding):
        model.set_submodule(path, factorized(whole))


def check_cut(
    reference: nn.Module,
    student: nn.Module,
    sites: Sequence[Site],
    bases: Mapping[str, Sequence[Basis]],
    batch: Batch,
) -> float:
    """Compare a cut model with the uncut one whose activations are projected by hooks at full width.

    The reference shares no code with the folding: it is the unmodified model, in which every stream is replaced by
    `mean + lift reduce (h - mean)` on the fly. Both run in float64, or in float32 if the forward casts to it.

    Args:
        reference: the model before the cut.
        student: the model after the cut of exactly these sites and bases.
        batch: a few real rows.

    Returns:
        The largest difference of the outputs, relative to the largest output.

    Raises:
        SurgeryError: if it exceeds what rounding of the folded weights explains, or if the cut model does not run.
    """
    dtype = next(student.parameters()).dtype
    batch = batching.to(batch, "cpu")
    reference, precision = exact(reference, batch)
    student = _on_cpu(student, precision)
    if any(stream.norm for site in sites for stream in site.streams):
        # Statistics that were gathered anew are not those of the reference: the folded ones are.
        fill(student, dict(fold(reference, sites, bases).named_buffers()))
    batch = batching.in_precision(batch, precision)
    expected = projected_logits(reference, sites, bases, batch)
    try:
        with evaluation(student):
            got = batching.logits(student, batch)
        error = relative_difference(got, expected)
        found = f"It differs by {error:.1e}"
    except Exception as failure:  # shapes that do not fit, or what the forward asserts of them
        error, found = math.nan, f"It fails with {failure}"
    allowed = max(1e-9, ROUNDINGS * torch.finfo(dtype).eps)
    if not error <= allowed:
        raise SurgeryError(
            f"a cut model must compute what its projected full-width reference computes, to {allowed:.1e}. {found} "
            f"after cutting {', '.join(site.name for site in sites)}. This is a fault of rmtkd or an unusual forward "
            "of the model (an attention that divides by a constant, say, is described with scaled=False; one that "
            "scales by embedding_dim of its embedding finds another number there): keep these sites whole in the plan, "
            "and report it.",
            error=error,
        )
    return error


def _on_cpu(model: nn.Module, precision: torch.dtype) -> nn.Module:
    """A copy in this precision; complex buffers stay what they are."""
    return copy.deepcopy(model).cpu()._apply(lambda value: value.to(precision) if value.is_floating_point() else value)


def exact(model: nn.Module, batch: Batch) -> tuple[nn.Module, torch.dtype]:
    """A copy of the model on the CPU in float64, in evaluation mode, and that precision; in float32 if it does not run
    on this batch otherwise: its forward casts to it on the way."""
    copied = _on_cpu(model, torch.float64).eval()
    try:
        with evaluation(copied):
            batching.logits(copied, batching.in_precision(batch, torch.float64))
    except RuntimeError:
        return copied.float(), torch.float32
    return copied, torch.float64


def projected_logits(
    model: nn.Module, sites: Sequence[Site], bases: Mapping[str, Sequence[Basis]], batch: Batch
) -> Tensor:
    """Outputs of the full-width model with the streams of these sites projected by hooks."""
    handles: list[RemovableHandle] = []
    try:
        for site in reversed([site for site in sites if site.name in bases]):
            # What was cut last is projected first: the width of heads, then the heads. And only in those that stay.
            heads = bases.get(site.groups_of or "")
            kept = None if heads is None else _kept_units(heads[0], site.groups)
            for stream, basis in zip(site.projected, bases[site.name], strict=False):
                # What statistics take up that are gathered anew is not a matter of the cut itself.
                plain = replace(basis, mean=torch.zeros_like(basis.mean)) if stream.intercept is None else basis
                handles.append(attach(model, stream, partial(_project, plain, site.groups, kept)))
        with evaluation(model):
            return batching.logits(model, batching.to(batch, next(model.parameters()).device))
    finally:
        for handle in handles:
            handle.remove()


def _project(basis: Basis, groups: int, kept: Tensor | None, activations: Tensor) -> Tensor:
    """Activations with the groups that are kept, all by default, projected."""
    projector, mean = basis.projector.to(activations), basis.mean.to(activations)
    split = in_groups(activations, groups)
    kept = torch.arange(groups) if kept is None else kept
    projected = torch.einsum("...gw,gvw->...gv", split[..., kept, :] - mean, projector) + mean
    return split.index_copy(-2, kept.to(split.device), projected).flatten(-2)


def _kept_units(basis: Basis, units: int) -> Tensor:
    """Which of so many units a basis keeps, each of several coordinates."""
    return in_groups(basis.reduce[0], units).any(-1).any(0).nonzero().flatten()


def _check_shared(sites: Sequence[Site], bases: Mapping[str, Sequence[Basis]]) -> None:
    widths: dict[str, int] = {}
    for site in sites:
        for basis in bases[site.name]:
            kept = basis.reduce.shape[1]
            if widths.setdefault(site.shares, kept) != kept:
                raise PlanError(
                    f"sites that share the width {site.shares} must keep the same. Got {widths[site.shares]} and "
                    f"{kept}. Give them one width; nothing was changed."
                )


def _prepare(model: nn.Module, site: Site) -> None:
    if site.factorizes:
        factorize(model, site.factorizes, site.streams[0].side)


def _fold_stream(model: nn.Module, stream: Stream, basis: Basis, *, rescale: bool) -> None:
    reduce = basis.reduce
    if rescale:
        # The module divides the product by the square root of the new width; the old one was meant.
        kept, width = reduce.shape[-2:]
        reduce = reduce * (kept / width) ** 0.5
    if stream.intercept:
        dropped = basis.mean - (basis.projector @ basis.mean[..., None])[..., 0]
        bias = model.get_parameter(stream.intercept)
        shifts = [reader(model, axis) @ dropped.flatten() for axis in stream.readers]
        shift = sum(shift.unflatten(0, (len(bias), -1)).sum(-1) for shift in shifts)  # over the taps
        _replace(model, stream.intercept, bias.detach().double().cpu() + shift)
    for axis in stream.writers:
        _apply(model, axis, reduce)
    for axis in stream.readers:
        _apply(model, axis, basis.lift.mT)


def _apply(model: nn.Module, axis: Axis, maps: Float[Tensor, "groups kept width"]) -> None:
    """Multiply one dimension of a parameter, group by group, in float64; each copy of the width alike."""
    maps = maps.repeat(axis.copies, 1, 1)
    weight = unfolded(_tensor(model, axis.parameter).detach().double().cpu(), axis)
    mapped = torch.einsum("...gw,gkw->...gk", in_groups(weight, len(maps)), maps).flatten(-2)
    _replace(model, axis.parameter, folded(mapped, axis))


def _tensor(model: nn.Module, name: str) -> Tensor:
    """The parameter or buffer of this name."""
    path, _, leaf = name.rpartition(".")
    return getattr(model.get_submodule(path), leaf)


def _replace(model: nn.Module, name: str, value: Tensor) -> None:
    """Put a new value of any shape in place of a parameter or buffer, in memory as that lay, and tell its module the
    new sizes."""
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    old = _tensor(model, name)
    # Of 1 × 1 filters `contiguous` cannot tell in which order they lie, which would decide on the order of all outputs.
    new = torch.empty(value.shape, device=old.device, dtype=old.dtype, memory_format=order_of(old)).copy_(value)
    is_parameter = isinstance(old, nn.Parameter)
    setattr(module, leaf, nn.Parameter(new, requires_grad=old.requires_grad) if is_parameter else new)
    if leaf in ("weight", "running_mean"):
        _tell_sizes(module, new)


def _tell_sizes(module: nn.Module, weight: Tensor) -> None:
    """Let a module know the sizes of its weight, or of its statistics."""
    if isinstance(module, _NormBase):
        module.num_features = len(weight)
    elif isinstance(module, nn.PReLU):
        module.num_parameters = len(weight)
    elif isinstance(module, nn.Linear):
        module.out_features, module.in_features = weight.shape
    elif isinstance(module, nn.Embedding):
        module.num_embeddings, module.embedding_dim = weight.shape
    elif isinstance(module, _ConvNd):
        module.out_channels, module.in_channels = weight.shape[0], weight.shape[1] * module.groups


def set_attribute(model: nn.Module, path: str, name: str, value: Any) -> None:
    """Set an attribute of the module at `path`, and what hangs on it: a convolution reads so many channels a group."""
    module = model.get_submodule(path)
    setattr(module, name, value)
    if isinstance(module, _ConvNd):
        _tell_sizes(module, module.weight)


def _finish(model: nn.Module, site: Site) -> None:
    """Let modules know a site's new width; the one that does not run without units is replaced."""
    for attribute in site.attributes:
        value = attribute.value(site.width, site.groups, site.each)
        set_attribute(model, attribute.module, attribute.name, value)
    if site.absent and site.width == 0:
        absent = site.absent
        model.set_submodule(absent.module, NoHeads(model.get_submodule(absent.module), absent.after, absent.norm))
