"""The page of one run: what it gave, how it went, and why, from its record alone."""

from collections.abc import Mapping
from itertools import groupby
from typing import Any

from rmtkd.planning import SitePlan
from rmtkd.reporting import numbers
from rmtkd.reporting.bulks import bulk_sentence, decided, kept_sentence, spectrum_picture
from rmtkd.reporting.evidence import Evidence
from rmtkd.reporting.markup import Child, Html, element, join, table
from rmtkd.reporting.notebook import result_table
from rmtkd.reporting.page import Section, figure, key, listed, page
from rmtkd.reporting.plans import plan_columns, plan_notes, plan_prediction, plan_title
from rmtkd.reporting.reproduction import changed, configuration, how_to_go_on, how_to_repeat, made_by
from rmtkd.reporting.rows import (
    Row,
    energy_lines,
    is_by_teacher,
    measure_of,
    role_of,
    round_columns,
    round_row,
    stopped,
    summary_rows,
)
from rmtkd.reporting.silhouette import silhouette
from rmtkd.reporting.story import accuracy_picture, losses_picture

MOST_SPECTRA = 200
"""More pictures would make the page larger than it may be."""
MOST_OPEN = 16
"""Sites whose spectra are all shown at once; of more, those of the first block."""

EXPLAINED = (
    "above: directions above the noise edge, of one head. keep: the width that stays. n_eff/n: how many vectors of n "
    "are independent. q: width over vectors. KS: distance of what lies below the edge from the law of noise, "
    "with “!” where it is too far. energy: share of the variance in as many largest directions as stay, “–” where heads"
    " go."
)
GUARDED = " signal: directions that the detector tells from noise. loss: what the width costs by itself, in nats."
SPECTRA = (
    "Eigenvalues of each site’s activations, by factors: at the left in order, at the right how many lie where. Where "
    "the edge comes from a Marchenko–Pastur law, its line says where they would lie if all below the edge were noise. "
    "It is dotted where it does not fit: then the edge is a threshold on a quantile, no test for noise. As many "
    "directions as are kept are marked; which they are is chosen by what the answers care for, not by size alone."
)


def run_page(evidence: Evidence) -> str:
    """The page, as HTML."""
    sections = [
        ("result", "Result", _result(evidence)),
        ("widths", "Widths before and after", _widths(evidence)),
        ("rounds", "Rounds", _rounds(evidence)),
        ("plan", "The plan and its reasons", _plan(evidence)),
        ("spectra", "Spectra", _spectra(evidence)),
        ("energy", "Energy", _energy(evidence)),
        ("repeat", "To repeat it", _repeat(evidence)),
    ]
    return page(
        over=f"rmtkd report · {evidence.name}",
        title=_title(evidence),
        lead=_lead(evidence),
        notes=[*_standing(evidence), *_missing(evidence)],
        sections=[Section(*found) for found in sections if found[2] is not None],
    )


def _title(evidence: Evidence) -> str:
    if evidence.summary is None:
        return f"{evidence.plan.model}: {'a plan' if evidence.config is None else 'a run under way'}"
    rows = {row.key: row for row in summary_rows(evidence.summary)}
    return f"{evidence.plan.model} at {rows['parameters'].change} of its parameters, {rows['latency'].change}"


def _lead(evidence: Evidence) -> str:
    if evidence.summary is None:
        told = plan_prediction(evidence.plan)
        return f"{told[:1].upper()}{told[1:]}."
    rows = {row.key: row for row in summary_rows(evidence.summary)}
    quality = rows[role_of(evidence.summary)[1]]
    told = f"{quality.name}: {quality.after}, the untouched model {quality.before}. {stopped(evidence.summary)}."
    return f"{told[:1].upper()}{told[1:]}"


def _standing(evidence: Evidence) -> list[Child]:
    """How far it came, where it is no finished run, and how to go on."""
    if evidence.summary is not None:
        return []
    what = (
        "No run has applied this plan: its numbers are predictions before recovery. "
        if evidence.config is None
        else f"This run is not finished: {len(evidence.rounds)} rounds are over, and no report rows were read yet. "
    )
    return [[what, "Go on: ", element("code", how_to_go_on(evidence))]]


def _missing(evidence: Evidence) -> list[Child]:
    """What a reader would look for in vain."""
    missing = []
    if not evidence.spectrums:
        missing.append("spectra.npz is missing: spectra are not shown.")
    if evidence.summary is not None and evidence.summary["baseline"]["accuracy"] is None:
        measure = measure_of(evidence.summary, "selection")
        missing.append(f"No report rows were given: {measure} is that of selection rows, which steered the run.")
    recovered = [done for done in evidence.rounds if done.steps]
    if recovered and not any(done.losses for done in recovered):
        missing.append("The record is of an earlier version, which kept neither losses by step nor latencies by round.")
    return missing


def _result(evidence: Evidence) -> Html | None:
    if evidence.summary is None:
        return None
    rows = summary_rows(evidence.summary)
    shown = [role_of(evidence.summary)[1], "parameters", "latency", "flops", "disk", "energy"]
    tiles = [_tile(row) for name in shown for row in rows if row.key == name]
    return join([element("dl", tiles, class_="tiles"), result_table(evidence.summary)])


def _tile(row: Row) -> Html:
    """A number that is read first: what is measured as it is now, a cost as what remains of it."""
    is_quality = row.key.startswith("accuracy")
    value, _, spread = (row.after if is_quality else row.change).partition(" ± ")
    big = element("dd", value, element("small", f" ± {spread}") if spread else None, class_="big")
    below = f"before {row.before}, {row.change}" if is_quality else f"{row.before} → {row.after}"
    return element("div", element("dt", row.name), big, element("dd", below))


def _widths(evidence: Evidence) -> Html:
    sites, widths = evidence.plan.sites, evidence.widths
    drawing = silhouette("widths-picture", sites, widths)
    marks = key(("", "--of:var(--kept);--by:.2", "full width"), ("", "--of:var(--kept)", "kept"))
    told = (
        "as planned" if evidence.config is None else "as cut so far" if evidence.summary is None else "as they are now"
    )
    below = f"One bar a site, on one scale, {told}; numbers are widths, of heads as heads × width."
    return join([marks, figure("Every width of the network", below, drawing, wide=True)])


def _rounds(evidence: Evidence) -> Html | None:
    rounds, baseline, summary = evidence.rounds, evidence.baseline, evidence.summary
    if not rounds:
        return None
    measure = "accuracy" if summary is None else measure_of(summary, "selection")
    drawings = []
    if (losses := losses_picture("losses-picture", rounds)) is not None:
        drawings.append(figure("Loss of recovery", "each point the mean of a stretch of steps", losses))
    if (measured := accuracy_picture("accuracy-picture", rounds, baseline, measure)) is not None:
        told = "on selection rows: hollow after the cut, full after recovery"
        drawings.append(figure(f"{measure.capitalize()} of each round", told, measured))
    by_teacher = summary is not None and is_by_teacher(summary, "selection")
    start = [] if baseline is None else [element("p", _start(baseline, by_teacher=by_teacher))]
    rows = [round_row(done) for done in rounds]
    caption = (
        f"What each round left. {measure.capitalize()} is of selection rows, latency in turns with the untouched "
        "model; the reference is the model before the cut in float64, its activations projected"
    )
    charts = element("div", drawings, class_="charts")
    return join([start, charts, table(round_columns(measure), rows, caption=caption)])


def _start(baseline: Mapping[str, Any], *, by_teacher: bool) -> str:
    """What rounds are held against."""
    count = numbers.count(baseline["n"])
    if by_teacher:
        return f"The {count} selection rows have no labels: the answers of the untouched model stand in for them."
    return f"The untouched model has {numbers.estimate(baseline)} of {count} selection rows right."


def _plan(evidence: Evidence) -> Html:
    plan = evidence.plan
    columns = {**plan_columns(plan), "why": [site.why for site in plan.sites]}
    widths = [name for name in ("site", "width", "signal", "above", "keep", "loss", "energy", "why") if name in columns]
    noise = ["site", "kind", *(name for name in columns if name not in (*widths, "kind"))]
    explained = EXPLAINED + (GUARDED if plan.policy == "guarded" else "")
    remarks = listed(note.removeprefix("! ") for note in plan_notes(plan))
    tables = [
        table(names, zip(*(columns[name] for name in names), strict=True), caption=caption, texts=[names.index(words)])
        for names, words, caption in (
            (widths, "why", f"Widths: {plan_title(plan)}; {plan_prediction(plan)}"),
            (noise, "kind", "Noise: what the spectra say, of the stream that decided"),
        )
    ]
    return join([remarks, tables, element("p", explained, class_="muted")])


def _spectra(evidence: Evidence) -> Html | None:
    if not evidence.spectrums:
        return None
    sites, widths = evidence.plan.sites, evidence.widths
    drawn = sites[:MOST_SPECTRA]
    marks = key(
        ("line", "--of:var(--kept)", "as many as are kept"),
        ("line", "--of:var(--muted)", "dropped"),
        ("line", "--of:var(--law)", "law of noise"),
        ("line", "--of:var(--law);--style:dotted", "law that does not fit"),
        ("line", "--of:var(--edge);--style:dashed", "edge"),
    )
    cards = [_card(f"spectrum-{i}", site, evidence, widths) for i, site in enumerate(drawn)]
    if len(cards) <= MOST_OPEN:
        blocks = [element("div", cards, class_="charts")]
    else:
        paired = groupby(zip(drawn, cards, strict=True), key=lambda pair: pair[0].block)
        blocks = [_block(block, [card for _, card in pairs], i == 0) for i, (block, pairs) in enumerate(paired)]
    rest = len(sites) - len(drawn)
    more = element("p", f"The spectra of {numbers.count(rest)} more sites are in spectra.npz.") if rest else None
    return join([element("p", SPECTRA), marks, blocks, more])


def _block(name: str, cards: list[Html], is_open: bool) -> Html:
    heading = element("summary", f"{name or 'outside of blocks'}: {len(cards)} sites")
    return element("details", heading, element("div", cards, class_="charts"), open=is_open)


def _card(name: str, site: SitePlan, evidence: Evidence, widths: dict[str, int]) -> Html:
    spectrum = decided(site, evidence.spectrums.get(site.name, ()))
    if spectrum is None:
        return figure(site.name, kept_sentence(site, widths), element("p", "Its spectrum is not stored."))
    drawing = spectrum_picture(name, site, spectrum, widths)
    return figure(site.name, kept_sentence(site, widths), drawing, bulk_sentence(site, spectrum))


def _energy(evidence: Evidence) -> Html | None:
    if evidence.summary is None:
        return None
    return table(
        ("model", "energy"),
        energy_lines(evidence.summary),
        caption="Energy of a pass, from counters of the hardware",
        texts=[1],
    )


def _repeat(evidence: Evidence) -> Html:
    usual = [pair for pair in configuration(evidence) if pair not in changed(evidence)]
    asked = table(("option", "value"), changed(evidence), caption="Configuration: what was asked for", texts=[1])
    rest = table(("option", "value"), usual, caption="Configuration: the rest, as usual", texts=[1])
    made = table(("what", "which"), made_by(evidence), caption="Versions and machine", texts=[1])
    others = element("details", element("summary", "All other options"), rest)
    command = element("pre", element("code", how_to_repeat(evidence)), tabindex=0)
    return join([command, element("div", element("div", asked, others), made, class_="pairs")])
