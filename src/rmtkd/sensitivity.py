"""What narrowing a width costs, measured: the loss on held-out rows of cuts that are made in closed form, by hooks.

The loss is the Kullback–Leibler divergence from the teacher's answers, averaged over rows: it needs no labels, moves
before the accuracy does, and is nothing at full width. Nothing is built and nothing trained: a stream is replaced by
its projection `mean + lift reduce (h - mean)` at full width, which is what the narrowed model computes.
"""

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from operator import itemgetter
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from rmtkd import batches as batching
from rmtkd.activations import attach, in_groups
from rmtkd.bases import Basis
from rmtkd.batches import Batch
from rmtkd.covariance import Covariance
from rmtkd.cutting import Fit, fitting, follow_each_other, tensors_in
from rmtkd.errors import DataError
from rmtkd.fisher import Metrics
from rmtkd.measurement import answers, at_least_zero, evaluation
from rmtkd.memory import Pieces, available_bytes
from rmtkd.norms import norms_of, of_each_batch, without_single_rows
from rmtkd.planning import Curve, Plan
from rmtkd.sites import Site, blocks_of, by_width

ROWS = 400
"""Held-out rows on which losses are measured, spread evenly over all of them."""
TOGETHER = 64
"""Of these rows, how many are run at once."""
STRETCH = 1.5
"""To how many times its length a row is padded, to be run with others."""
ALIKE = 1e-3
"""How far padding may move answers, in nats: as far as rounding does."""
SHARES = (0.06, 0.15, 0.35, 0.65)
"""Shares of a full width at which its loss is measured, beside the least one and those that the rules count."""
PASSES = 1
"""How often curves are weighed by the losses around a plan."""
STEP = 0.25
"""Of a width, by which it is moved either way to weigh its curve."""
LARGEST_WEIGHT = 4.0
"""A ratio of two small measured losses says no more than this, or its inverse."""
KEPT_SHARE = 0.25
"""Of the memory that is free, how much the kept outputs of blocks may take: they save time and nothing else."""


class Sensitivity:
    """The teacher's answers to some held-out rows, and how far cuts move them.

    Args:
        model: the untouched model.
        sites: its sites.
        moments: of their activations, from `activations.collect`.
        rows: held-out batches.
        metrics: in which errors of a cut are small, see `cutting.cut_in_order`.
        most_rows: how many of their rows are used, spread over all.
        bf16: whether forward passes run under bfloat16 autocast (teacher and cuts alike).
        pieces: in how many pieces a batch is run, should memory run out.
    """

    def __init__(
        self,
        model: nn.Module,
        sites: Sequence[Site],
        moments: Mapping[str, Sequence[Covariance]],
        rows: Iterable[Batch],
        *,
        metrics: Metrics | None = None,
        most_rows: int = ROWS,
        bf16: bool = False,
        pieces: Pieces | None = None,
    ):
        self.metrics = metrics
        self.model, self.groups, self.moments = copy.deepcopy(model).eval(), by_width(sites), moments
        self.device = next(model.parameters()).device
        self.autocast = partial(torch.autocast, self.device.type, torch.bfloat16) if bf16 else nullcontext
        self.pieces = pieces or Pieces()
        # Never more at once than the caller runs: in how many pieces a batch fits into memory is found for those.
        most = min(TOGETHER, max(map(batching.rows, rows), default=TOGETHER))
        few = every_nth_row(rows, most_rows)
        together = gathered(few, most)
        if not self._answer_alike(apart := gathered(few, most, stretch=1.0), together):
            together = apart
        if norms_of(sites):
            together = list(without_single_rows(together))
        self.batches = [batching.to(batch, self.device) for batch in together]
        self.blocks = blocks_of(sites) if follow_each_other(self.model, self.batches, blocks_of(sites)) else []
        """Those whose outputs are kept."""
        free = available_bytes(self.device)
        self.room = math.inf if free is None else KEPT_SHARE * free
        self._bases: dict[str, dict[int, tuple[tuple[Basis, ...], ...]]] = {}
        """Of each shared width, those at the width where we stand and those that were fitted last."""
        self._orders: dict[str, dict[int, Tensor]] = {}
        """Of the sites with units, in which order these are chosen."""
        self._fits: tuple[str, list[Fit]] = "", []
        """Of the shared width that was fitted last: several widths of one come one after the other, and what they have
        in common is as large as the moments."""
        self._curves: Mapping[str, Curve] | None = None
        self.teacher = self.stand_at({})

    def _answer_alike(self, apart: Sequence[Batch], together: Sequence[Batch]) -> bool:
        """Whether rows have the answers that they have as they came once they are padded to be run with others: a model
        may read what stands at padding."""
        sizes = [
            sum(batching.rows(batch) * batching.length(batch) for batch in batches) for batches in (apart, together)
        ]
        if sizes[0] == sizes[1]:  # none is padded
            return True
        with self.autocast():
            plain, padded = (
                torch.cat([answers(self.model, batch, self.pieces) for batch in batches]).double().log_softmax(-1)
                for batches in (apart, together)
            )
        return float((plain.exp() * (plain - padded)).sum(-1).mean()) <= ALIKE

    def stand_at(self, widths: Mapping[str, int]) -> Float[Tensor, "rows classes"]:
        """Cut these shared widths from now on: losses near them are measured without running again what lies before the
        first change. The log-probabilities there."""
        self.here = dict(widths)
        self.kept: dict[int, list[Any]] = {}
        """By the number of a batch, what each block puts out; of those alone that are run in one piece."""
        return self._log_probabilities(widths)

    def loss(self, widths: Mapping[str, int]) -> float:
        """The divergence with these shared widths cut, all others full. In nats a row."""
        return self.disturbance(widths)[0]

    def disturbance(self, widths: Mapping[str, int]) -> tuple[float, float]:
        """That divergence, and the share of rows that keep their answer."""
        student = self._log_probabilities(widths, replayed=self._first_change(widths))
        agreement = float((student.argmax(-1) == self.teacher.argmax(-1)).double().mean())
        return at_least_zero(float((self.teacher.exp() * (self.teacher - student)).sum(-1).mean())), agreement

    def curve(self, shares: str, widths: Iterable[int]) -> Curve:
        """The losses of one shared width, all others full.

        Args:
            shares: its name.
            widths: where to measure; those that are not below the full width are left out.
        """
        full = self.groups[shares][0].width
        # The largest first: fewer units are the first of more.
        losses = {width: self.loss({shares: width}) for width in sorted({*widths}, reverse=True) if width < full}
        return Curve(widths=(*reversed(losses), full), losses=(*reversed(losses.values()), 0.0))

    def guarded(self, published: Plan, again: Callable[[Mapping[str, Curve]], Plan]) -> Plan:
        """The plan of least loss: from curves of single widths, then from curves weighed where the plan stands.

        Losses do not add up: a width that costs little by itself may cost much once another is narrow, or the other
        way round. So the loss is measured with all cuts of the plan together, and each curve is weighed by how much it
        moves that loss there. The best plan by measurement wins.

        Args:
            published: the plan by noise edges. What its rule and the detector count are two more widths to measure.
                It must be that of the first call in later ones, for other targets: curves are measured once.
            again: the plan for these curves.

        Raises:
            PlanError: see `planning.make_plan`.
        """
        curves = self._single(published)
        plans: list[tuple[float, Plan]] = []
        for _ in range(1 + PASSES):
            if plans:
                curves = self._weighed(curves, plans[-1][1])
            plan = again(curves)
            loss = self.loss(_shared(plan))
            plans.append((loss, replace(plan, loss=loss)))
        return min(plans, key=lambda pair: pair[0])[1]

    def _single(self, published: Plan) -> Mapping[str, Curve]:
        """The curves of single widths, measured when a plan first asks for them."""
        if self._curves is None:
            counts: dict[str, list[float]] = {shares: [] for shares in self.groups}
            for site in published.sites:
                counts[site.shares] += [count for count in (site.count, site.floor) if count is not None]
            self._curves = {
                shares: self.curve(shares, _ladder(group[0], counts[shares], published.multiple_of))
                for shares, group in self.groups.items()
            }
        return self._curves

    def _weighed(self, curves: Mapping[str, Curve], plan: Plan) -> dict[str, Curve]:
        """The curves with the weights that the loss around a plan gives them, half way, in logarithms, from before."""
        widths, weighed = _shared(plan), dict(curves)
        self.stand_at(widths)
        for shares, curve in curves.items():
            full, step = self.groups[shares][0].width, STEP * widths[shares]
            low, high = (round(widths[shares] + sign * step) for sign in (-1, 1))
            low, high = max(curve.least, low), min(full, high)
            plain = replace(curve, weight=1.0)
            alone = plain.loss(low) - plain.loss(high)
            if shares in plan.fixed or alone <= 0:
                continue
            together = self.loss(widths | {shares: low}) - self.loss(widths | {shares: high})
            ratio = min(max(together / alone, 1 / LARGEST_WEIGHT), LARGEST_WEIGHT)
            weighed[shares] = replace(curve, weight=math.sqrt(curve.weight * ratio))
        return weighed

    def _fit(self, shares: str, width: int) -> tuple[tuple[Basis, ...], ...]:
        known = self._bases.setdefault(shares, {})
        if width not in known:
            if self._fits[0] != shares:
                self._fits = shares, [self._fitting(site) for site in self.groups[shares]]
            for left in known.keys() - {self.here.get(shares)}:
                del known[left]
            known[width] = tuple(fit(width) for fit in self._fits[1])
        return known[width]

    def _fitting(self, site: Site) -> Fit:
        orders = self._orders.setdefault(site.name, {})
        return fitting(self.model, site, self.moments[site.name], self.metrics, orders)

    def _width(self, widths: Mapping[str, int], shares: str) -> int:
        return widths.get(shares, self.groups[shares][0].width)

    def _first_change(self, widths: Mapping[str, int]) -> int:
        """How many blocks compute the same at these widths as where we stand."""
        first = len(self.blocks)
        for shares, group in self.groups.items():
            if self._width(widths, shares) != self._width(self.here, shares):
                scopes = {site.scope for site in group}
                first = min(first, *(self.blocks.index(scope) if scope in self.blocks else 0 for scope in scopes))
        return first

    @contextmanager
    def _keeping(self, number: int) -> Iterator[None]:
        """What blocks put out for this batch is kept, once it is run: of all batches, or of none."""
        outputs: list[Any] = []
        with ExitStack() as hooks:
            for path in self.blocks:
                module = self.model.get_submodule(path)
                hooks.callback(module.register_forward_hook(partial(_keep, outputs)).remove)
            yield
        if self.blocks:
            self.kept[number] = outputs
            if _bytes(list(self.kept.values())) > self.room:
                self.blocks, self.kept = [], {}

    @contextmanager
    def _replaying(self, number: int, count: int) -> Iterator[None]:
        """The first blocks put out what was kept of them for this batch."""
        outputs = self.kept.get(number, [])[:count]
        whole = {path: self.model.get_submodule(path) for path in self.blocks[: len(outputs)]}
        for path, output in zip(whole, outputs, strict=True):
            self.model.set_submodule(path, _Kept(whole[path], output))
        try:
            yield
        finally:
            for path, module in whole.items():
                self.model.set_submodule(path, module)

    def _log_probabilities(
        self, widths: Mapping[str, int], *, replayed: int | None = None
    ) -> Float[Tensor, "rows classes"]:
        """The first `replayed` blocks are not run again; with None what all blocks put out is kept."""
        with ExitStack() as hooks, evaluation(self.model), self.autocast():
            for shares in reversed(list(self.groups)):  # what is cut last is projected first, as in `surgery.check_cut`
                width = self._width(widths, shares)
                if width == self.groups[shares][0].width:
                    continue
                for site, bases in zip(self.groups[shares], self._fit(shares, width), strict=True):
                    for stream, basis in zip(site.projected, bases, strict=False):
                        hooks.callback(attach(self.model, stream, projection(basis, self.device)).remove)
                hooks.enter_context(of_each_batch(self.model, norms_of(self.groups[shares])))
            scores = [self.pieces(batch, partial(self._scores, i, replayed)) for i, batch in enumerate(self.batches)]
            return torch.cat(scores).double().log_softmax(-1)

    def _scores(self, number: int, replayed: int | None, parts: Sequence[Batch]) -> Float[Tensor, "rows classes"]:
        """Of one batch, see `_log_probabilities`."""
        if len(parts) > 1:
            self.kept.pop(number, None)
            around = nullcontext()
        else:
            around = self._keeping(number) if replayed is None else self._replaying(number, replayed)
        with around:
            return torch.cat([batching.logits(self.model, part).float() for part in parts])


class _Kept(nn.Module):
    """Stands for a block: what it put out for a batch, and its attributes, as forwards around it read them."""

    def __init__(self, block: nn.Module, output: Any):
        super().__init__()
        vars(self).update(block=block, output=output)  # off the tree of modules

    def __getattr__(self, name: str) -> Any:
        return getattr(vars(self)["block"], name)

    def forward(self, *_: Any, **__: Any) -> Any:
        return self.output


def _keep(outputs: list[Any], _: nn.Module, __: Any, output: Any) -> None:
    outputs.append(output)


def _bytes(value: Any) -> int:
    """Of all tensors in a value."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors_in(value))


def _ladder(site: Site, counts: Iterable[float], multiple_of: int) -> set[int]:
    """The widths at which a site is measured: nothing, where that may be, and such as a plan gives."""
    multiple = 1 if site.kind == "heads" else multiple_of
    wishes = (multiple, *counts, *(share * site.width for share in SHARES))
    found = {multiple * math.ceil(max(wish, site.least) / multiple) for wish in wishes if wish > 0}
    return found | ({0} if site.least == 0 else set())


def _shared(plan: Plan) -> dict[str, int]:
    return {site.shares: site.keep for site in plan.sites}


Projection = Callable[[Tensor], Tensor]


def projection(basis: Basis, device: torch.device) -> Projection:
    """A hook that replaces activations by what a basis keeps of them."""
    reduce, lift, mean = (part.to(device, torch.float32) for part in (basis.reduce, basis.lift, basis.mean))
    if (units := _units(reduce)) is not None:
        return _reconstruction(units, lift, mean)
    if 2 * reduce.shape[1] > reduce.shape[2]:  # one product with the projector is less than two
        return partial(_projected, mean, (lift @ reduce,))
    return partial(_projected, mean, (reduce, lift))


def _projected(
    mean: Float[Tensor, "groups width"], maps: Sequence[Float[Tensor, "groups _ _"]], activations: Tensor
) -> Tensor:
    """Deviations from the mean, mapped one time after the other, and the mean."""
    kept = in_groups(activations, len(mean)).float() - mean
    for each in maps:
        kept = torch.einsum("...gv,gwv->...gw", kept, each)
    return (kept + mean).flatten(-2).to(activations.dtype)


def _units(reduce: Float[Tensor, "groups kept width"]) -> Tensor | None:
    """The units that a choice of units keeps, if that is what it is, of a single group."""
    if len(reduce) != 1 or reduce.shape[1] == 0 or torch.count_nonzero(reduce) != reduce.shape[1]:
        return None
    kept = reduce[0].argmax(-1)
    return kept if bool((reduce[0, torch.arange(len(kept)), kept] == 1).all()) else None


def _reconstruction(kept: Tensor, lift: Float[Tensor, "1 width kept"], mean: Float[Tensor, "1 width"]) -> Projection:
    """The projection onto units: those that are kept pass, the others are computed from them."""
    is_dropped = torch.ones(lift.shape[1], dtype=torch.bool, device=lift.device).index_fill(0, kept, False)
    dropped = is_dropped.nonzero().flatten()
    weight, bias = lift[0, dropped], mean[0, dropped] - lift[0, dropped] @ mean[0, kept]
    return partial(_reconstructed, kept, dropped, weight, bias)


def _reconstructed(kept: Tensor, dropped: Tensor, weight: Tensor, bias: Tensor, activations: Tensor) -> Tensor:
    rest = torch.nn.functional.linear(activations[..., kept].float(), weight, bias)
    return activations.index_copy(-1, dropped, rest.to(activations.dtype))


def every_nth_row(rows: Iterable[Batch], most: int) -> list[Batch]:
    """At most about so many rows, every n-th of each batch: collections that are sorted by length stay in proportion.

    Raises:
        DataError: if there are no rows.
    """
    total = sum(batching.rows(batch) for batch in rows)
    if total == 0:
        raise DataError("held-out rows must hold at least one row. Got none. Pass selection rows.")
    step = -(-total // most)
    found = [batching.map_tensors(batch, itemgetter(slice(i % step, None, step))) for i, batch in enumerate(rows)]
    return [batch for batch in found if batching.rows(batch)]


def gathered(batches: Iterable[Batch], most: int = TOGETHER, stretch: float = STRETCH) -> list[Batch]:
    """The same rows in fewer batches, each of at most so many rows: those of one shape together, and where there is an
    attention mask those of nearly one length, padded to at most `stretch` times theirs. A forward pass over a handful
    of rows costs mostly its calls."""
    found: list[Batch] = []
    shortest = 0
    for batch in sorted(batches, key=batching.length):
        joined = None
        if found and batching.length(batch) <= stretch * shortest:
            joined = batching.joined(found[-1], batch)
        if joined is None or batching.rows(joined) > most:
            found.append(batch)
            shortest = batching.length(batch)
        else:
            found[-1] = joined
    return found
