"""Does the algebra hold for this very model? The two checks that every cut is made of, site by site.

At full width a cut must change nothing: float64 outputs of the folded model against those of the untouched one
(float32 where the forward casts to it). At half width it must compute what the untouched model computes with its
activations projected by hooks.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn

from rmtkd import batches as batching
from rmtkd.activations import collect
from rmtkd.batches import Batch, Calls, Forward
from rmtkd.covariance import Covariance
from rmtkd.cutting import fit_bases
from rmtkd.errors import DataError, RmtkdError, SurgeryError, UnsupportedModelError
from rmtkd.measurement import evaluation, relative_difference
from rmtkd.modules import check_module, unpacked
from rmtkd.sites import Site, by_width, check_parameters, find_family, is_known, random_images, search, trace_sites
from rmtkd.surgery import ROUNDINGS, check_cut, exact, fold

FULL_WIDTH_TOLERANCE = 1e-10
"""Largest relative difference of float64 outputs at full width."""
ROWS = 4
"""Rows whose outputs are compared."""
VECTORS_A_UNIT = 2
"""As many activation vectors are seen for every unit of the widest site: less and its covariance is singular."""
LONGEST = 64
"""Tokens of the longest random row."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What the checks found for one site, or why it could not be described.

    Attributes:
        site: its name; that of the part of the network where no site could be described.
        ok: whether both checks passed.
        width: its full width; None where it could not be described.
        keep: the width of the second check; sites that share a width are cut together.
        full_width_error: largest difference of float64 outputs after a fold at full width, relative to the largest
            output; None where there is no number, because the model does not run or nothing was tried.
        cut_error: the same for the cut model against its projected full-width reference, in the model's own precision.
        why: what is wrong; empty if nothing is.
    """

    site: str
    ok: bool
    width: int | None = None
    keep: int | None = None
    full_width_error: float | None = None
    cut_error: float | None = None
    why: str = ""


def check(
    model: nn.Module,
    batches: Iterable[Any] | None = None,
    sites: Sequence[Site] | None = None,
    *,
    forward: Forward | None = None,
) -> tuple[Verdict, ...]:
    """Try on this model what a compression will do to it: fold every site at full width, and cut it to half.

    Args:
        model: the model, left as it was.
        batches: rows that it is made for, read until they are enough; random tokens, some padded, by default.
        sites: the sites of a model of one's own; those of its family by default.
        forward: class scores from the model and a batch, as `compress` takes it.

    Returns:
        One verdict per site, shallow to deep.

    Raises:
        UnsupportedModelError: if the model is of no known family and no sites are given, or is in half precision.
        DataError: if the batches are too few, or missing where they cannot be made up.
    """
    check_module(model)
    model = unpacked(model)
    if batches is not None and forward is not None:
        batches = Calls(batches, forward)
    refused: dict[str, Verdict] = {}
    described: list[Site | str] = list(sites) if sites is not None else []
    if sites is None:
        for part, describe in _parts(model, batches):
            try:
                described += describe()
            except UnsupportedModelError as error:
                described.append(part)
                refused[part] = Verdict(site=part, ok=False, why=str(error))
    known = [site for site in described if isinstance(site, Site)]
    check_parameters(model, known)
    widest = max((site.size for site in known), default=1)
    positions = VECTORS_A_UNIT * widest
    rows = _enough(random_batches(model, positions) if batches is None else batches, positions)
    verdicts = {**refused, **_try_all(model, known, rows)}
    return tuple(verdicts[site.name if isinstance(site, Site) else site] for site in described)


def _parts(model: nn.Module, batches: Iterable[Batch] | None) -> Iterator[tuple[str, Callable[[], tuple[Site, ...]]]]:
    """Parts of the network, each with a function that describes its sites or says why they stay whole."""
    images = random_images(model, 2)
    if images is None and (is_known(model) or batches is None):
        yield from search(model)
        return
    traced = trace_sites(model, batching.first(batches or (), "batches") if images is None else images)

    def refuse(path: str, why: str) -> tuple[Site, ...]:
        raise UnsupportedModelError(f"what {path} writes stays whole: {why}.")

    yield "", lambda: traced.sites
    for path, why in traced.whole.items():
        yield path, partial(refuse, path, why)


def random_batches(model: nn.Module, positions: int, *, batch_size: int = 16, seed: int = 0) -> list[Batch]:
    """Batches of random images; or of random tokens in rows of unequal length, padded, with at least so many real
    positions.

    Raises:
        DataError: if the model is of no known family: nobody knows what it eats.
    """
    made = [random_images(model, batch_size, seed=seed + i) for i in range(-(-positions // batch_size))]
    if images := [batch for batch in made if batch is not None]:
        return images  # type: ignore[return-value]
    try:
        family = find_family(model)
    except UnsupportedModelError as error:
        raise DataError(
            f"batches must be given for a model of no known family. Got none for {type(model).__name__}. Pass a few "
            "batches that it is called with."
        ) from error
    config = getattr(model, "config", None)
    longest = min(LONGEST, family.longest_input(config))
    vocabulary, padding = int(getattr(config, "vocab_size", 0)), int(getattr(config, "pad_token_id", None) or 0)
    generator = torch.Generator().manual_seed(seed)
    batches: list[Batch] = []
    while positions > 0:
        lengths = torch.randint(1 + longest // 4, longest + 1, (batch_size,), generator=generator)
        lengths[0] = longest
        mask = (torch.arange(longest) < lengths[:, None]).long()
        ids = torch.randint(0, vocabulary, (batch_size, longest), generator=generator)
        ids = torch.where(ids == padding, (padding + 1) % vocabulary, ids).masked_fill(mask == 0, padding)
        batches.append({"input_ids": ids, "attention_mask": mask})
        positions -= int(lengths.sum())
    return batches


def verdict_table(verdicts: Sequence[Verdict]) -> Table:
    """The verdicts as a table, one line a site."""
    failed = sum(not verdict.ok for verdict in verdicts)
    table = Table(
        title="errors of a fold and of a cut",
        caption=f"{failed} of {len(verdicts)} failed" if failed else f"all {len(verdicts)} ok",
        title_justify="left",
        caption_justify="left",
    )
    for name in ("site", "width", "full width", "cut to", "cut", "verdict"):
        table.add_column(name, justify="left" if name in ("site", "verdict") else "right", no_wrap=name != "verdict")
    for verdict in verdicts:
        table.add_row(
            verdict.site,
            _number(verdict.width),
            _magnitude(verdict.full_width_error),
            _number(verdict.keep),
            _magnitude(verdict.cut_error),
            "ok" if verdict.ok else verdict.why,
        )
    return table


def _number(value: int | None) -> str:
    return "–" if value is None else str(value)


def _magnitude(error: float | None) -> str:
    return "–" if error is None else f"{error:.1e}"


def _enough(batches: Iterable[Batch], positions: int) -> list[Batch]:
    """As many of the batches as hold so many real positions."""
    taken: list[Batch] = []
    for batch in batches:
        taken.append(batch)
        mask = batching.real_positions(batch)
        positions -= batching.rows(batch) * batching.length(batch) if mask is None else int(mask.sum())
        if positions <= 0:
            break
    return taken


def _try_all(model: nn.Module, sites: Sequence[Site], rows: Sequence[Batch]) -> dict[str, Verdict]:
    """Both checks of every site."""
    if not sites:
        return {}
    sample = batching.to(batching.head(batching.first(rows, "batches"), ROWS), "cpu")
    whole, precision = exact(model, sample)
    try:
        moments = collect(model, sites, rows)
        expected = _outputs(whole, sample)
    except RmtkdError:
        raise
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        why = f"the model must run on these rows. It fails with {error}. Look at the parts that are refused, if any."
        return {site.name: Verdict(site=site.name, ok=False, width=site.width, why=why) for site in sites}
    tolerance = _tolerance(model, precision)
    verdicts = {}
    for group in by_width(sites).values():
        keep, cut_error, cut_fault = _try_cut(model, group, moments, sample)
        for site in group:
            error, fault = _try_full_width(whole, site, moments, sample, expected, tolerance)
            why = " ".join(part for part in (fault, cut_fault) if part)
            verdicts[site.name] = Verdict(
                site=site.name,
                ok=not why,
                width=site.width,
                keep=keep,
                full_width_error=error,
                cut_error=cut_error,
                why=why,
            )
    return verdicts


def _try_full_width(
    whole: nn.Module,
    site: Site,
    moments: Mapping[str, Sequence[Covariance]],
    sample: Batch,
    expected: Tensor,
    tolerance: float,
) -> tuple[float | None, str]:
    """The error of a fold that keeps everything, and what is wrong with it."""
    try:
        student = fold(whole, [site], {site.name: fit_bases(whole, site, moments[site.name], site.width)})
        got = _outputs(student, sample)
    except Exception as failure:
        return None, f"a fold at full width must run. It fails with {failure}."
    error = relative_difference(got, expected)
    if error <= tolerance:
        return error, ""
    found = f"It changes the outputs by {error:.1e}. The network does more there than the site says: leave it whole."
    return _finite(error), f"a fold at full width must change nothing, to {tolerance:.0e}. {found}"


def _try_cut(
    model: nn.Module, group: Sequence[Site], moments: Mapping[str, Sequence[Covariance]], sample: Batch
) -> tuple[int, float | None, str]:
    """The width of a cut, its error, and what is wrong with it."""
    half = max(1, group[0].width // 2)
    keep = half // 8 * 8 or half
    try:
        bases = {site.name: fit_bases(model, site, moments[site.name], keep) for site in group}
        return keep, check_cut(model, fold(model, group, bases), group, bases, sample), ""
    except SurgeryError as error:
        return keep, _finite(error.error), str(error)
    except Exception as failure:
        return keep, None, f"a cut must be possible. It fails with {failure}."


def _finite(error: float) -> float | None:
    return error if math.isfinite(error) else None


def _tolerance(model: nn.Module, precision: torch.dtype) -> float:
    """Where all or a part of the forward is in float32, its rounding may fall to the other side."""
    if precision == torch.float32:
        return ROUNDINGS * torch.finfo(torch.float32).eps
    try:
        inside = find_family(model).precision
    except UnsupportedModelError:
        inside = torch.float64
    return max(FULL_WIDTH_TOLERANCE, 10 * torch.finfo(inside).eps)


def _outputs(model: nn.Module, batch: Batch) -> Tensor:
    with evaluation(model):
        return batching.logits(model, batching.in_precision(batch, next(model.parameters()).dtype))
