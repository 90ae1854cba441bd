"""What a model costs at given widths: counted on its skeleton, and for any widths by one exact formula."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any, Literal

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import flop_registry

from rmtkd import batches as batching
from rmtkd.batches import Batch
from rmtkd.errors import OptionError, UnsupportedModelError, check_choice
from rmtkd.measurement import count_flops, count_parameters
from rmtkd.sites import Site, by_width
from rmtkd.surgery import fill, skeleton

_NUMBER = r"(\d+\.?\d*|\.\d+)"

LATENCY: Literal["latency_ms"] = "latency_ms"
"""The cost that is not counted but measured, see `latency`."""

Amount = int | float
Cost = Mapping[str, Amount]
"""`params` and `flops` of a model; `latency_ms`, where a table of measured times was made."""

_WORDS: Mapping[str, Literal["params", "flops", "latency_ms"]] = {
    "params": "params",
    "flops": "flops",
    "latency": LATENCY,
}
"""What a target calls a cost."""


@dataclass(frozen=True, kw_only=True)
class Target:
    """The share, or number, of a cost that remains: `25%params`, `40%flops`, `40%latency`, `2.5x`, `5M`."""

    cost: Literal["params", "flops", "latency_ms"]
    amount: float
    """At most this much: a fraction of the untouched model's cost if `is_share`, else a count."""
    is_share: bool

    @classmethod
    def parse(cls, text: str) -> "Target":
        """Read `25%params`, `40%flops`, `40%latency`, `2.5x` (a speed-up), `5M`, `800k`, `1200000` or `1,200,000`.

        Raises:
            OptionError: if the text is none of these, the share is not within (0, 100], the speed-up not within
                [1, 10000], or the number is so small that a share was meant.
        """
        words = re.sub(r"(?<=\d),(?=\d{3}\b)", "", text.strip().lower())
        if share := re.fullmatch(rf"{_NUMBER}\s*%\s*([a-z]+)", words):
            amount = float(share[1]) / 100
            if not 0 < amount <= 1:
                raise OptionError(f"--target must leave more than 0 % and at most 100 %. Got {text!r}.")
            check_choice("the cost in --target", share[2], _WORDS)
            return cls(cost=_WORDS[share[2]], amount=amount, is_share=True)
        if speed_up := re.fullmatch(rf"{_NUMBER}\s*[x×]", words):
            if not 1 <= float(speed_up[1]) <= 10_000:
                raise OptionError(f"--target must be a speed-up from 1x to 10000x. Got {text!r}.")
            return cls(cost=LATENCY, amount=1 / float(speed_up[1]), is_share=True)
        if number := re.fullmatch(rf"{_NUMBER}\s*([kmb]?)", words):
            amount = float(number[1]) * {"": 1, "k": 1e3, "m": 1e6, "b": 1e9}[number[2]]
            if amount <= 100:
                raise OptionError(
                    f"--target must leave more than 100 parameters. Got {text!r}. A share is written 25%params."
                )
            return cls(cost="params", amount=amount, is_share=False)
        raise OptionError(f"--target must be what remains, such as 25%params, 40%flops, 2.5x or 5M. Got {text!r}.")

    def limit(self, baseline: Cost) -> float:
        """The largest count that meets the target."""
        return self.amount * baseline[self.cost] if self.is_share else self.amount

    def __str__(self) -> str:
        return f"{self.amount * 100:.10g}%{word(self.cost)}" if self.is_share else f"{self.amount:,.0f}"


def word(cost: str) -> str:
    """What a target calls this cost."""
    return "latency" if cost == LATENCY else cost


def shown(cost: str, amount: Amount) -> str:
    """An amount of this cost, as messages say it."""
    return f"{amount:.4g} ms" if cost == LATENCY else f"{amount:,.0f}"


def predict_cost(model: nn.Module, sites: Sequence[Site], widths: Mapping[str, int], batch: Batch) -> dict[str, int]:
    """Parameters and FLOPs of the model at these widths, counted on its skeleton: exact, and no model is built."""
    shape = skeleton(model, sites, widths)
    return {"params": count_parameters(shape), "flops": _flops_of(shape, model, batch)}


def check_described(model: nn.Module, sites: Sequence[Site], batch: Batch) -> None:
    """Hold sites that a user describes against the model: it must run with each of the widths at its least, as it will
    have to when costs are counted.

    Raises:
        OptionError: if there are none, or two have one name.
        UnsupportedModelError: naming a width around which something was left out.
    """
    names = [site.name for site in sites]
    if not names or len(set(names)) < len(names):
        twice = next((name for name in names if names.count(name) > 1), None)
        came = "none" if twice is None else f"two of the name {twice!r}"
        raise OptionError(f"sites must be at least one, each with a name of its own. Got {came}. See rmtkd.sites.")
    row = batching.head(batch, 1)
    predict_cost(model, sites, {}, row)  # what does not run whole says so itself
    for group in by_width(sites).values():
        widths = {site.name: site.least for site in group}
        try:
            predict_cost(model, sites, widths, row)
        except Exception as error:  # whatever its own code may raise
            raise UnsupportedModelError(
                "a site must name all that write and read its width, and the least that they run at. With "
                f"{_pairs(widths)} the model gave: {error!r}. Add what is missing to writers, readers or attributes, "
                "or raise `least`; nothing was changed."
            ) from error


def _pairs(widths: Mapping[str, int]) -> str:
    return ", ".join(f"{name}={width}" for name, width in widths.items())


def _parameters(model: nn.Module, sites: Sequence[Site], widths: Mapping[str, int], batch: Batch) -> int:
    return count_parameters(skeleton(model, sites, widths))


def _flops(model: nn.Module, sites: Sequence[Site], widths: Mapping[str, int], batch: Batch) -> int:
    return _flops_of(skeleton(model, sites, widths), model, batch)


def _flops_of(shape: nn.Module, model: nn.Module, batch: Batch) -> int:
    # Zeros in place of weights, a single one for all of a tensor: a forward pass may look at values, which the meta
    # device has none of.
    zero = torch.zeros((), device=next(model.parameters()).device)
    fill(shape, {name: zero.to(value.dtype).expand(value.shape) for name, value in list(shape.named_parameters())})
    with _ZeroProducts():
        return count_flops(shape, batch)


class _ZeroProducts(TorchDispatchMode):
    """Matrix products and convolutions give zeros of the right shape: what zero weights make of them, in no time."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func._overloadpacket not in flop_registry:
            return func(*args, **kwargs)
        device = next(part.device for part in args if isinstance(part, torch.Tensor))
        on_meta, named = tree_map_only(torch.Tensor, lambda tensor: tensor.to("meta"), (args, kwargs))
        return tree_map_only(torch.Tensor, lambda out: torch.zeros_like(out, device=device), func(*on_meta, **named))


COSTS: Mapping[str, Callable[[nn.Module, Sequence[Site], Mapping[str, int], Batch], int]] = {
    "params": _parameters,
    "flops": _flops,
}
"""What a target can name, and how it is counted for given widths."""

PAIR = " & "
"""Between the names of two widths in `CostTable.together`."""


@dataclass(frozen=True, kw_only=True)
class CostTable:
    """Parameters and FLOPs as an exact formula of the widths, so that a plan can be changed without its model.

    A width is one side of a matrix; two widths may be the two sides of one. So a cost is a line in every width, and has
    a product for every two that meet. With `x` units dropped of every width:

        cost = full + Σ_a [x_a > 0] (once_a − per_unit_a · x_a) + Σ_ab together_ab · x_a · x_b

    Attributes:
        once: by cost and name of a shared width: what the first cut adds, such as the factors of an embedding.
        per_unit: by cost and name of a shared width: what every unit is worth.
        together: by cost and pair of names: what every pair of units is worth, which the two lines count twice.
    """

    once: dict[str, dict[str, int]]
    per_unit: dict[str, dict[str, int]]
    together: dict[str, dict[str, int]]

    @classmethod
    def measure(
        cls, model: nn.Module, sites: Sequence[Site], batch: Batch
    ) -> tuple[dict[str, int], "CostTable | None"]:
        """The cost at full width, and the coefficients, all counted on skeletons.

        The formula is held against counts of the whole batch at all least widths, where a product that is missing
        would show, as products only add, and half way, where a curve would. Where it fails there is no table.
        """
        groups = by_width(sites)
        full = {shares: group[0].width for shares, group in groups.items()}

        def count(kept: Mapping[str, int], rows: Batch) -> dict[str, int]:
            widths = {site.name: kept[shares] for shares in kept for site in groups[shares]}
            return predict_cost(model, sites, widths, rows)

        whole, row = count({}, batch), batching.head(batch, 1)
        small = count({}, row)
        # Lines are found on one row, which is fast, and have as many times the slope on all of them.
        scale = {cost: whole[cost] // max(small[cost], 1) for cost in COSTS}
        table = cls(**{name: {cost: {} for cost in COSTS} for name in ("once", "per_unit", "together")})
        least = {shares: group[0].least for shares, group in groups.items() if group[0].width > group[0].least}
        for shares in full:
            has_step = any(site.factorizes for site in groups[shares])
            low = count({shares: least[shares]}, row) if shares in least else small
            high = count({shares: full[shares] - 1}, row) if has_step and shares in least else None
            table._fit_line(small, low, high, shares, full[shares] - least.get(shares, 1))
        for pair in _meeting(groups):
            if all(shares in least for shares in pair):
                both = count({shares: least[shares] for shares in pair}, row)
                dropped = {shares: full[shares] - least[shares] for shares in pair}
                for cost in COSTS:
                    missing = both[cost] - small[cost] - table.change(cost, dropped)
                    if missing:
                        table.together[cost][PAIR.join(pair)] = missing // (dropped[pair[0]] * dropped[pair[1]])
        for cost, times in scale.items():
            for part in (table.once, table.per_unit, table.together):
                part[cost] = {name: times * value for name, value in part[cost].items()}
        for kept in (least, {shares: (1 + width) // 2 for shares, width in full.items() if width > 1}):
            dropped = {shares: full[shares] - width for shares, width in kept.items()}
            counted = count(kept, batch)
            if any(whole[cost] + table.change(cost, dropped) != counted[cost] for cost in COSTS):
                return whole, None
        return whole, table

    def change(self, cost: str, dropped: Mapping[str, int]) -> int:
        """What is added to a cost, mostly a negative number, when so many units are dropped of these shared widths."""
        once, per_unit = self.once[cost], self.per_unit[cost]
        lines = sum(once[shares] - per_unit[shares] * x for shares, x in dropped.items() if x > 0)
        products = 0
        for pair, each in self.together[cost].items():
            a, b = pair.split(PAIR)
            products += each * dropped.get(a, 0) * dropped.get(b, 0)
        return lines + products

    def _fit_line(
        self, whole: Mapping[str, int], low: Mapping[str, int], high: Mapping[str, int] | None, shares: str, most: int
    ) -> None:
        """The line through the costs with no unit dropped and with `most` (`low`); or, with a step at the first,
        through 1 and `most`."""
        for cost in COSTS:
            if high is None:
                slope, step = (whole[cost] - low[cost]) // max(most, 1), 0
            else:
                slope = (high[cost] - low[cost]) // max(most - 1, 1)
                step = high[cost] - whole[cost] + slope
            self.per_unit[cost][shares], self.once[cost][shares] = slope, step


def _meeting(groups: Mapping[str, Sequence[Site]]) -> Iterator[tuple[str, str]]:
    """Every two shared widths that are sides of one parameter."""
    sides: dict[str, set[str]] = {}
    for shares, group in groups.items():
        for site in group:
            for stream in site.streams:
                for axis in (*stream.writers, *stream.readers):
                    sides.setdefault(axis.parameter, set()).add(shares)
    yield from sorted({pair for names in sides.values() for pair in combinations(sorted(names), 2)})
