"""The page that compares several runs: how accurate, how large, how fast."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from string import ascii_uppercase
from typing import Any

from rmtkd.reporting.evidence import Evidence
from rmtkd.reporting.front import Point, front_picture
from rmtkd.reporting.markup import Child, Html, element, join, table
from rmtkd.reporting.page import Section, figure, key, listed, page
from rmtkd.reporting.plans import kept, per_head
from rmtkd.reporting.reproduction import how_to_go_on, how_to_repeat
from rmtkd.reporting.rows import is_by_teacher, measure_of, role_of, size_headings, size_row, sizes_notes

Named = Mapping[str, Evidence]
"""Runs by what they are called on the page."""


def comparison_page(title: str, runs: Named) -> str:
    """The page, as HTML.

    Args:
        title: what is compared.
        runs: at least one of them finished.
    """
    finished = {name: run for name, run in runs.items() if run.summary is not None}
    models = _models(finished)
    return page(
        over="rmtkd report",
        title=title,
        lead=f"{len(finished)} runs side by side. Letters stand for the same model in every picture and table.",
        notes=[*_unfinished(runs), *_differences(finished)],
        sections=[
            Section("front", "Accuracy, size and time", _front(models)),
            Section("widths", "Widths", _widths(finished)),
            Section("repeat", "To repeat them", _repeat(finished)),
        ],
    )


@dataclass(frozen=True, kw_only=True)
class Model:
    """One model of the page: what runs began with, or what one gave.

    Attributes:
        letter: by which pictures name it.
        name: in words.
        record: of its run, or of the first that began with it.
        is_untouched: whether it is what runs began with.
    """

    letter: str
    name: str
    record: Mapping[str, Any]
    is_untouched: bool

    @property
    def cost(self) -> Mapping[str, Any]:
        """What it costs and how well it does."""
        return self.record["baseline" if self.is_untouched else "compressed"]


def _models(runs: Named) -> list[Model]:
    """Every model: what runs began with, once each, then what they gave."""
    first: dict[str, str] = {}
    for name, run in runs.items():
        first.setdefault(_began(run).get("model", name), name)
    untouched = [("untouched" if len(first) == 1 else f"untouched, of {name}", name, True) for name in first.values()]
    found = [*untouched, *((name, name, False) for name in runs)]
    return [
        Model(letter=letter(i), name=words, record=_summary(runs[name]), is_untouched=is_untouched)
        for i, (words, name, is_untouched) in enumerate(found)
    ]


def letter(number: int) -> str:
    """A, B, …, Z, A1, B1, …"""
    return ascii_uppercase[number % 26] + (str(number // 26) if number >= 26 else "")


def _front(models: Sequence[Model]) -> Html:
    first = models[0].record
    headings = size_headings(first)
    timed, quality = headings[4], headings[5]
    is_one = sum(model.is_untouched for model in models) == 1
    axis = "time of a batch, untouched = 1" if is_one else "time of a batch, ms"
    measure = measure_of(first, role_of(first)[0])
    by_size, by_time = (f"{measure.capitalize()} and {cost}" for cost in ("size", "time"))
    sizes = front_picture("size-picture", by_size, "parameters, millions", measure, list(map(_by_size, models)))
    times = front_picture("time-picture", by_time, axis, measure, [_by_time(model, is_one) for model in models])
    charts = [figure(by_size, quality, sizes), figure(by_time, f"{quality}; {timed}", times)]
    marks = key(
        ("ring", "--of:var(--kept)", "untouched"),
        ("", "--of:var(--kept)", "compressed"),
        ("line", "--of:var(--ink)", "± standard error; ± half the interquartile range of time"),
        ("line", "--of:var(--kept);--by:.55", "no other is smaller (faster) and as accurate"),
    )
    rows = [
        size_row(f"{model.letter}\u2002{model.name}", model.record, is_untouched=model.is_untouched) for model in models
    ]
    caption = (
        "What each model costs and how well it does; a run measures its latencies in turns with its untouched model"
    )
    costs = table(("model", *headings), rows, caption=caption)
    return join([marks, element("div", charts, class_="charts large"), costs])


def _by_size(model: Model) -> Point:
    size = model.cost["parameters"] / 1e6
    return Point(cost=size, low=size, high=size, **_common(model))


def _by_time(model: Model, is_one: bool) -> Point:
    """Where all runs began with one model, times are held against its time as each run measured it: the machine may
    have been slower in one of them."""
    latency = model.cost["latency_ms"]
    whole = model.record["baseline"]["latency_ms"]["median"] if is_one else 1.0
    median, half = latency["median"] / whole, latency["iqr"] / 2 / whole
    return Point(cost=median, low=median - half, high=median + half, **_common(model))


def _common(model: Model) -> dict[str, Any]:
    quality = model.cost[role_of(model.record)[1]]
    return {"letter": model.letter, "name": model.name, "quality": quality, "is_untouched": model.is_untouched}


def _widths(runs: Named) -> Html:
    """Kept widths, where the runs narrow the same sites."""
    first = next(iter(runs.values()))
    sites = first.plan.sites
    shape = [(site.name, site.width, site.groups) for site in sites]
    if any([(s.name, s.width, s.groups) for s in run.plan.sites] != shape for run in runs.values()):
        return element("p", "The runs have other sites: see the report of each.")
    rows = [
        (site.name, per_head(site, site.width), *(kept(site, run.widths) for run in runs.values())) for site in sites
    ]
    return table(("site", "untouched", *runs), rows, caption="Kept width of every site, of heads as heads × width")


def _repeat(runs: Named) -> Html:
    commands = dict.fromkeys(how_to_repeat(run) for run in runs.values())
    told = listed(f"{note}." for note in sizes_notes({name: _summary(run) for name, run in runs.items()}))
    return join([told, *(element("pre", element("code", command), tabindex=0) for command in commands)])


def _unfinished(runs: Named) -> list[Child]:
    return [
        [f"{name} is not finished, and left out. Go on: ", element("code", how_to_go_on(run))]
        for name, run in runs.items()
        if run.summary is None
    ]


def _differences(runs: Named) -> list[Child]:
    """What keeps the numbers of some runs from being held against each other."""
    found: list[Child] = []
    evidence = list(runs.values())
    began = [_began(run) for run in evidence]
    names = dict.fromkeys(name for one in began for name in one)
    if differ := [name for name in names if len({one.get(name) for one in began}) > 1]:
        found.append(f"The runs did not begin with the same {', '.join(differ)}: compare across them with care.")
    records = [_summary(run) for run in evidence]
    measures = {(role_of(r), is_by_teacher(r, role_of(r)[0]), r["baseline"][role_of(r)[1]]["n"]) for r in records}
    if len(measures) > 1:
        found.append(
            "Accuracies are of unlike rows, or held against other answers: headings are those of the first run."
        )
    batches = {tuple(r["baseline"]["latency_ms"][k] for k in ("batch", "length", "threads", "device")) for r in records}
    if len(batches) > 1 or any(r.get("machine") != records[0].get("machine") for r in records):
        found.append(
            "Latencies are of unlike batches, threads or machines: only the ratios within a run can be compared."
        )
    return found


def _began(run: Evidence) -> Mapping[str, str]:
    return (run.config or {}).get("began_with") or {}


def _summary(run: Evidence) -> Mapping[str, Any]:
    assert run.summary is not None
    return run.summary
