"""A report says what the record says, needs nothing but its one file, and never stands in the way of a run."""

import json
import re
import shlex
import shutil
from collections.abc import Mapping
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import rmtkd
from conftest import random_rows, tiny_bert
from rmtkd import checkpoint, reporting
from rmtkd.checkpoint import RunFolder
from rmtkd.errors import OptionError, RmtkdError, RunError
from rmtkd.planning import Plan
from rmtkd.progress import describe
from rmtkd.reporting.bulks import bulk_sentence, spectrum_picture
from rmtkd.reporting.evidence import Evidence, read_evidence
from rmtkd.reporting.frame import Scale
from rmtkd.reporting.markup import element, table
from rmtkd.reporting.page import style
from rmtkd.reporting.plans import kept, plan_title
from rmtkd.reporting.reproduction import configuration
from rmtkd.reporting.run_page import MOST_SPECTRA, run_page
from rmtkd.reporting.silhouette import silhouette
from rmtkd.schedule import Round, thinned
from rmtkd.sizes import Sizes
from rmtkd.spectra import MarchenkoPastur, Spectrum
from test_sizes import Taught

TARGETS = ("70%params", "50%params")
COMMON: dict[str, Any] = {
    "multiple_of": 4,
    "precision": "fp32",
    "epochs": 2.0,
    "policy": "paper",
    "granularity": "layer",
}


@pytest.fixture(scope="module")
def roles() -> dict[str, Any]:
    model = tiny_bert(layers=1)
    train = Taught(model, random_rows(64, seed=3))
    return {
        "model": model,
        "train": train,
        "calibration": train,
        "selection": Taught(model, random_rows(48, seed=4)),
        "report": Taught(model, random_rows(40, seed=5)),
    }


@pytest.fixture(scope="module")
def results(roles: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Sizes]:
    """The folder of two sizes, and what came back."""
    place = tmp_path_factory.mktemp("reports") / "sizes"
    return place, rmtkd.compress_sizes(targets=TARGETS, out=place, **COMMON, **roles)


@pytest.fixture(scope="module")
def written(results: tuple[Path, Sizes]) -> Path:
    """The folder, as the runs left it."""
    return results[0]


@pytest.fixture
def sizes(written: Path, tmp_path: Path) -> Path:
    """A copy of it to change."""
    return Path(shutil.copytree(written, tmp_path / "sizes"))


@pytest.fixture
def run(sizes: Path) -> Path:
    return sizes / TARGETS[0]


class Reading(HTMLParser):
    """What a page holds: the cells of its tables by caption, its words, and its elements with their attributes."""

    def __init__(self, page: str):
        super().__init__()
        self.tables: dict[str, list[list[str]]] = {}
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words = ""
        self._rows: list[list[str]] = []
        self._cell: str | None = None
        self._caption = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag == "table":
            self._rows = []
        if tag == "tr":
            self._rows.append([])
        if tag in ("th", "td", "caption"):
            self._cell = ""

    def handle_data(self, data: str) -> None:
        self.words += data
        if self._cell is not None:
            self._cell += data

    def handle_endtag(self, tag: str) -> None:
        if tag in ("th", "td") and self._cell is not None:
            self._rows[-1].append(self._cell)
            self._cell = None
        if tag == "caption":
            self._caption, self._cell = self._cell or "", None
        if tag == "table":
            self.tables[self._caption] = self._rows

    def table(self, caption: str) -> list[list[str]]:
        return next(rows for name, rows in self.tables.items() if name.startswith(caption))


def read(page: Path) -> Reading:
    return Reading(page.read_text(encoding="utf-8"))


def numbers_of(cost: Mapping[str, Any]) -> dict[str, str]:
    """The numbers of one model as the page must show them, written here by other means than the page's."""
    accuracy = cost["accuracy"]
    return {
        "parameters": format(cost["parameters"], ","),
        "MFLOPs a batch": format(cost["flops"] / 10**6, ",.1f"),
        "on disk": "%.2f MB" % (cost["disk_bytes"] / 10**6),
        "accuracy, report rows (n = 40)": "{:.2f}% ± {:.2f}%".format(100 * accuracy["value"], 100 * accuracy["stderr"]),
    }


def faster(ratio: float) -> str:
    return f"{ratio:.2f}× faster" if ratio >= 1 else f"{1 / ratio:.2f}× slower"


def test_every_number_of_the_result_is_the_record_s(run: Path):
    record = json.loads((run / "summary.json").read_text())
    page = read(run / "report.html")
    cells = {row[0]: row[1:] for row in page.table("What it costs")}
    before, after = numbers_of(record["baseline"]), numbers_of(record["compressed"])
    for name in before:
        assert cells[name][:2] == [before[name], after[name]], name
    slow, fast = record["baseline"]["latency_ms"], record["compressed"]["latency_ms"]
    timed = next(row for name, row in cells.items() if name.startswith("latency"))
    assert timed == [
        *("{:.1f} ms (IQR {:.1f})".format(latency["median"], latency["iqr"]) for latency in (slow, fast)),
        faster(slow["median"] / fast["median"]),
    ]
    share = record["compressed"]["parameters"] / record["baseline"]["parameters"]
    assert cells["parameters"][2] == "%.1f%%" % (100 * share)
    assert after["accuracy, report rows (n = 40)"] in page.words and record["stop_reason"] in page.words


def test_every_round_stands_there_with_size_accuracy_and_latency(run: Path):
    record = json.loads((run / "summary.json").read_text())
    heading, *rows = read(run / "report.html").table("What each round left")
    assert len(rows) == len(record["rounds"]) > 1
    for row, done in zip(rows, record["rounds"], strict=True):
        found = dict(zip(heading, row, strict=True))
        assert found["round"] == str(done["number"])
        assert found["parameters"] == format(done["parameters"], ",")
        assert found["accuracy after the cut"] == "%.2f%%" % (100 * done["accuracy_cut"])
        assert found["after recovery"] == "%.2f%%" % (100 * done["accuracy"])
        assert found["steps"] == str(done["steps"])
        own, untouched = done["latency_ms"]["median"], done["latency_ms_untouched"]["median"]
        assert found["latency"].startswith(f"{own:.1f} ms") and faster(untouched / own) in found["latency"]
        assert done["losses"][-1][0] == done["steps"]


def test_rows_without_labels_are_agreed_on_not_right(run: Path):
    summary = json.loads((run / "summary.json").read_text())
    summary |= {"measured_against": {"selection": "teacher"}, "baseline": {**summary["baseline"], "accuracy": None}}
    summary["compressed"] |= {"accuracy": None}
    (run / "summary.json").write_text(json.dumps(summary))
    page = read(reporting.write_report(run)[0])
    assert "The 48 selection rows have no labels" in page.words and "rows right" not in page.words
    assert "No report rows were given: agreement with the teacher is that of selection rows" in page.words
    assert "Agreement with the teacher of each round" in page.words and "Accuracy" not in page.words
    assert page.table("What each round left")[0][3] == "agreement with the teacher after the cut"
    compared = read(reporting.write_report(run.parent, out=run / "compared.html")[0])
    assert "Agreement with the teacher and size" in compared.words


def test_a_control_without_report_rows_is_told_on_selection_rows(run: Path):
    summary = json.loads((run / "summary.json").read_text())
    told = {"value": summary["baseline"]["accuracy_selection"]["value"] - 0.25, "n": 48, "stderr": 0.06}
    record = {**summary, "control": {"start": "random", "steps": 7, "accuracy": told}}
    row = reporting.summary_rows(record)[-1]
    assert row.name == "same shape, random start, 7 steps"
    row = reporting.summary_rows({**record, "baseline": {**summary["baseline"], "accuracy": None}})[-1]
    assert row.name == "same shape, random start, 7 steps, selection rows" and row.change == "-25.00 points"


def test_the_sites_are_told_with_their_reasons_and_the_plan_s_remarks(run: Path):
    plan = Plan.read(run / "plan.json")
    page = read(run / "report.html")
    rows = {row[0]: row for row in page.table("Widths")[1:]}
    noise = {row[0]: row for row in page.table("Noise")[1:]}
    assert list(rows) == list(noise) == [site.name for site in plan.sites]
    for site in plan.sites:
        assert site.why in rows[site.name]
        assert f"{site.edge:.3g}" in noise[site.name] or site.edge == 0
    for note in (*plan.remarks, *reporting.plan_notes(plan)):
        assert note.removeprefix("! ") in page.words


def test_machine_versions_options_and_the_reason_for_no_energy_are_told(run: Path):
    record, page = json.loads((run / "summary.json").read_text()), read(run / "report.html")
    made = dict(page.table("Versions and machine"))
    assert made["torch"] == record["versions"]["torch"] and made["processor"] == record["machine"]["processor"]
    assert dict(page.table("Configuration: what was asked for"))["target"] == TARGETS[0]
    energy = record["compressed"]["energy"]
    assert (energy["reason"] or "{:.3g} J".format(energy["joules"])) in dict(page.table("Energy"))["compressed"]


def test_a_quantile_is_told_only_of_a_rule_that_has_one(run: Path):
    evidence = read_evidence(run)
    other = replace(evidence, plan=replace(evidence.plan, rule="energy"))
    assert "rule mp, τ 0.5" in plan_title(evidence.plan) and "τ" not in plan_title(other.plan)
    for found in (evidence, replace(evidence, config=None)):
        assert "tau" in dict(configuration(found))
        assert "tau" not in dict(configuration(replace(found, plan=other.plan)))


def test_the_bars_are_as_long_as_the_widths(run: Path):
    evidence = read_evidence(run)
    drawn = Reading(silhouette("x", evidence.plan.sites, evidence.widths))
    bars = {"full": [], "kept": []}
    for tag, attributes in drawn.elements:
        if tag == "rect":
            bars[str(attributes["class"])].append(float(str(attributes["width"]).removesuffix("%")))
    full = [site.width * site.groups * site.each for site in evidence.plan.sites]
    assert bars["full"] == pytest.approx([max(bars["full"]) * count / max(full) for count in full], abs=0.01)
    kept = [k / f for k, f in zip(bars["kept"], bars["full"], strict=True)]
    heads = {site.name: evidence.widths.get(site.groups_of or "", site.groups) for site in evidence.plan.sites}
    told = [evidence.widths[site.name] * heads[site.name] / (site.width * site.groups) for site in evidence.plan.sites]
    assert kept == pytest.approx(told, abs=0.01)
    assert any(share < 1 for share in kept)


def test_the_widths_are_those_that_rounds_have_cut_not_those_planned(run: Path):
    summary = json.loads((run / "summary.json").read_text())
    summary["rounds"][-1]["rolled_back"] = True
    (run / "summary.json").write_text(json.dumps(summary))
    evidence = read_evidence(run)
    for site in evidence.plan.sites:
        is_back = site.name in summary["rounds"][-1]["sites"]
        assert evidence.widths[site.name] == (site.width if is_back else site.keep)


def told_by_the_card(record: Mapping[str, Any], plan: Plan) -> dict[str, list[str]]:
    """Of every site the widths before and after, and why."""
    table = reporting.model_card(record, plan, ["rmtkd"]).partition("## Widths")[2]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines() if line[:1] == "|"]
    return {name: cells for name, *cells in rows[2:]}


def test_the_card_tells_the_widths_that_rounds_have_cut_not_those_planned(run: Path):
    summary, plan = json.loads((run / "summary.json").read_text()), Plan.read(run / "plan.json")
    told = told_by_the_card(summary, plan)
    assert {name: after for name, (_, after, _) in told.items()} == {s.name: kept(s, plan.widths) for s in plan.sites}
    summary["rounds"][-1]["rolled_back"] = True
    back = told_by_the_card(summary, plan)
    for site in plan.sites:
        before, after, why = back[site.name]
        if site.name in summary["rounds"][-1]["sites"]:
            assert after == before and why == f"planned {kept(site, plan.widths)}: {site.why}"
        else:
            assert back[site.name] == told[site.name]


def test_the_card_tells_how_this_model_was_made_and_no_other(run: Path):
    summary, plan = json.loads((run / "summary.json").read_text()), Plan.read(run / "plan.json")

    def told(record: Mapping[str, Any], **changes: Any) -> str:
        card = reporting.model_card(record, replace(plan, **changes), ["rmtkd"])
        return next(line for line in card.splitlines() if "exact folding" in line)

    assert "The rule mp chose the widths by the spectra" in told(summary) and "self-distillation" in told(summary)
    assert "The rule energy chose" in told(summary, rule="energy")
    assert told(summary, policy="guarded").startswith("The loss that each costs, as measured, chose the widths, exact")
    taught = {**summary, "teacher_model": {"parameters": 1234, "accuracy_selection": {"value": 0.5, "stderr": 0.1}}}
    assert "distillation from another model, of 1,234 parameters" in told(taught) and "self-" not in told(taught)
    uncared = {**summary, "rounds": [{**done, "steps": 0} for done in summary["rounds"]]}
    assert "distillation" not in told(uncared)


LAW = MarchenkoPastur(q=0.25, sigma2=2.0)


def spiked(noise: np.ndarray) -> Spectrum:
    """Three directions of signal, and others of something else."""
    return Spectrum(eigenvalues=np.sort(np.r_[40.0, 30.0, 20.0, noise])[::-1][None].copy(), samples=400)


def points(path: str) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in (pair.split() for pair in path.strip("MZ").split("L"))]


def paths(picture: str) -> dict[str, list[tuple[float, float]]]:
    """The first path of every class of a picture."""
    found: dict[str, list[tuple[float, float]]] = {}
    for tag, attributes in Reading(picture).elements:
        if tag == "path":
            found.setdefault(str(attributes["class"]), points(str(attributes["d"])))
    return found


def test_the_law_lies_on_the_eigenvalues_where_they_are_noise_and_beside_them_where_not(run: Path):
    law, spectrum = LAW, spiked(LAW.ppf((np.arange(97) + 0.5) / 97))
    site = replace(
        Plan.read(run / "plan.json").sites[0],
        **{"width": 100, "keep": 3, "planned": 3, "groups": 1, "groups_of": None, "each": 1, "rule": "mp"},
        **{"q": law.q, "sigma2": law.sigma2, "edge": law.upper, "ks": 0.01, "misfit": False, "multiplier": 1.0},
    )
    drawing = spectrum_picture("x", site, spectrum, {site.name: 3})
    assert "noise explains what lies below" in drawing
    curves = paths(drawing)
    eigenvalues = dict([*curves["curve stays"], *curves["curve dropped"]])
    near = [(y, eigenvalues[x]) for x, y in curves["law"] if x in eigenvalues]
    assert len(near) > 10 and all(abs(y - z) < 1.5 for y, z in near)

    power = spiked(4.0 * np.arange(1, 98.0) ** -1.5)
    wrong = spectrum_picture("x", replace(site, misfit=True, ks=0.8), power, {site.name: 3})
    assert "KS 0.80: no bulk of noise fits here, so the edge is only a threshold on a quantile" in wrong
    curves = paths(wrong)
    assert "law" not in curves
    eigenvalues = dict([*curves["curve stays"], *curves["curve dropped"]])
    assert max(abs(y - eigenvalues[x]) for x, y in curves["law misfit"] if x in eigenvalues) > 20

    other = spectrum_picture("x", replace(site, rule="rdpa"), spectrum, {site.name: 3})
    assert not any(name.startswith("law") for name in paths(other))


def test_noise_is_said_to_explain_what_lies_below_only_where_it_does(run: Path):
    site = replace(Plan.read(run / "plan.json").sites[0], edge=LAW.upper, levels=(), multiplier=1.0, misfit=False)
    few, many = (spiked(LAW.ppf((np.arange(count) + 0.5) / count)) for count in (16, 97))
    assert "noise explains what lies below" in bulk_sentence(replace(site, ks=0.05), many)
    assert "noise explains what lies below" in bulk_sentence(replace(site, ks=0.15), few)
    told = bulk_sentence(replace(site, rule="energy", ks=0.4), many)  # a rule without a law finds no misfit of its own
    assert "KS 0.40: white noise does not explain what lies below, nor does energy take it to" in told


def test_the_page_is_one_small_file_that_points_nowhere_and_runs_nothing(sizes: Path):
    for page in (sizes / "report.html", *(sizes / target / "report.html" for target in TARGETS)):
        text = page.read_text(encoding="utf-8")
        assert len(text.encode()) < 2_000_000
        assert "http" not in text and "url(" not in text and "@import" not in text
        found = Reading(text)
        assert not {tag for tag, _ in found.elements} & {"script", "img", "link", "iframe", "object", "form"}
        ids = {attributes.get("id") for _, attributes in found.elements}
        for tag, attributes in found.elements:
            assert "src" not in attributes and not any(name.startswith("on") for name in attributes), tag
            if "href" in attributes:
                assert str(attributes["href"])[:1] == "#" and str(attributes["href"])[1:] in ids
            for name in ("aria-labelledby",):
                assert set(str(attributes.get(name) or "").split()) <= ids


def test_every_picture_can_be_read_aloud(sizes: Path):
    for page in (sizes / "report.html", sizes / TARGETS[0] / "report.html"):
        found = read(page)
        names = [str(a["id"]) for _, a in found.elements if a.get("id")]
        assert len(names) == len(set(names))
        pictures = [attributes for tag, attributes in found.elements if tag == "svg"]
        assert pictures and all(a["role"] == "img" and len(str(a["aria-labelledby"]).split()) == 2 for a in pictures)
        assert sum(tag == "caption" for tag, _ in found.elements) == sum(tag == "table" for tag, _ in found.elements)
        assert [tag for tag, _ in found.elements].count("h1") == 1


def luminance(colour: str) -> float:
    digits = colour.lstrip("#")
    digits = digits if len(digits) == 6 else "".join(2 * digit for digit in digits)
    parts = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return float(np.dot(linear, [0.2126, 0.7152, 0.0722]))


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_every_colour_of_words_stands_out_from_every_ground(scheme: int):
    blocks = re.findall(r":root \{(.*?)\}", style("page.css"), re.DOTALL)
    colours = dict(re.findall(r"--(\w+): (#\w+)", blocks[scheme]))
    for ground in ("ground", "card", "note", "code"):
        for words in ("ink", "muted", "kept", "law", "edge"):
            if (ground, words) not in (("note", "law"), ("code", "law")):
                bright, dark = sorted((luminance(colours[ground]), luminance(colours[words])), reverse=True)
                assert (bright + 0.05) / (dark + 0.05) > 4.5, (ground, words)


def test_hostile_names_are_words_and_nothing_else(run: Path):
    name = "<script>alert(1)</script>\"'&<b>"
    evidence = read_evidence(run)
    first, *rest = evidence.plan.sites
    widths = {name: evidence.spectrums[first.name]}
    sites = (replace(first, name=name, why=name, block=name), *rest)
    plan = replace(evidence.plan, model=name, sites=sites, remarks=(name,))
    config = {**(evidence.config or {}), "command": {"recipe": name, "words": ["rmtkd", name]}}
    hostile = replace(evidence, plan=plan, config=config, spectrums={**evidence.spectrums, **widths})
    found, clean = Reading(run_page(hostile)), read(run / "report.html")
    assert {tag for tag, _ in found.elements} <= {tag for tag, _ in clean.elements}
    assert found.words.count(name) > 5 and shlex.join(["rmtkd", name]) in found.words
    assert str(element("p", name, title=name)).count("<") == 2
    assert "<script>" not in str(table(("<script>",), [("<script>",)], caption="<script>"))


def test_a_network_of_hundreds_of_sites_stays_under_two_megabytes(run: Path):
    evidence = read_evidence(run)
    spectrum = Spectrum(eigenvalues=np.linspace(1, 1e-3, 1536)[None] ** 3, samples=4096)
    site = next(found for found in evidence.plan.sites if found.kind == "pointwise")
    many = [f"layer.{i}.ffn" for i in range(MOST_SPECTRA + 100)]
    sites = tuple(replace(site, name=name, shares=name, block=f"layer.{i}") for i, name in enumerate(many))
    large = replace(evidence, plan=replace(evidence.plan, sites=sites), spectrums=dict.fromkeys(many, (spectrum,)))
    page = run_page(large)
    assert len(page.encode()) < 2_000_000
    assert "The spectra of 100 more sites are in spectra.npz." in page
    assert all(name in page for name in many)


def test_it_is_made_without_weights(run: Path):
    before = (run / "report.html").read_bytes()
    shutil.rmtree(run / "model")
    (run / "report.html").unlink()
    assert reporting.write_report(run) == [run / "report.html"]
    assert (run / "report.html").read_bytes() == before


def test_it_is_made_without_spectra_and_says_so(run: Path):
    (run / "spectra.npz").unlink()
    (page,) = reporting.write_report(run)
    assert "spectra.npz is missing" in read(page).words


def test_records_of_earlier_versions_are_shown_as_far_as_they_go(run: Path):
    summary = json.loads((run / "summary.json").read_text())
    del summary["machine"]
    for done in summary["rounds"]:
        for name in ("losses", "latency_ms", "latency_ms_untouched"):
            del done[name]
    (run / "summary.json").write_text(json.dumps(summary))
    found = read(reporting.write_report(run)[0])
    assert "The record is of an earlier version" in found.words
    assert all("–" in row for row in found.table("What each round left")[1:])


def test_an_unfinished_run_tells_how_far_it_came_and_how_to_go_on(roles: dict[str, Any], tmp_path: Path):
    class Killed(BaseException):
        pass

    def kill(event: Mapping[str, Any]) -> None:
        if event["event"] == "cut" and event["number"] == 2:
            raise Killed

    out = tmp_path / "run"
    with pytest.raises(Killed):
        rmtkd.compress(out=out, target="50%params", on_event=kill, **{**COMMON, "epochs": 0.5}, **roles)
    assert not (out / "report.html").exists()
    found = read(reporting.write_report(out)[0])
    assert "This run is not finished: 1 rounds are over" in found.words and f"rmtkd.resume({str(out)!r}" in found.words
    assert len(found.table("What each round left")) == 2
    model = roles["model"]
    rmtkd.resume(out, model, **{name: rows for name, rows in roles.items() if name != "model"})
    assert "not finished" not in read(out / "report.html").words  # the run has put its own in place
    with (out / "record.jsonl").open("a") as file:
        file.write('{"event": "rou')
    reporting.write_report(out)  # a line that is being written


def test_a_plan_is_shown_as_one_and_stays_a_place_to_run_in(run: Path, tmp_path: Path):
    place = tmp_path / "planned"
    place.mkdir()
    for name in ("plan.json", "spectra.npz"):
        shutil.copy(run / name, place / name)
    found = read(reporting.write_report(place)[0])
    assert "No run has applied this plan" in found.words and f"--plan {place / 'plan.json'}" in found.words
    RunFolder.check_free(place)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda run: run / "nowhere", "made of a run folder.*There is no folder"),
        (lambda run: run / "model", r"is a model folder\. Its run may be .*: rmtkd report "),
        (lambda run: (run / "empty").mkdir() or run / "empty", "no run and no plan.*Make one: rmtkd plan"),
        (lambda run: (run / "plan.json").unlink() or run, "has none yet.*rmtkd resume"),
        (lambda run: (run / "plan.json").write_text("{}") and run, "plan.json"),
        (lambda run: (run / "summary.json").write_text("{") and run, "summary.json must be as it was written"),
        (lambda run: (run / "summary.json").write_text("{}") and run, "summary.json must be .*KeyError.*Restore it"),
        (
            lambda run: (run / "summary.json").write_text('{"baseline": 1, "compressed": 1}') and run,
            "summary.json must be .*TypeError",
        ),
        (lambda run: (run / "record.jsonl").write_text("{\n") and run, "record.jsonl must be as it was written"),
        (lambda run: (run / "report.html").write_text("mine") and run, "takes the place of an earlier report alone"),
    ],
)
def test_other_folders_are_refused_with_what_to_do(run: Path, make: Any, message: str):
    before = {path: path.read_bytes() for path in run.glob("*.html")}
    with pytest.raises(RmtkdError, match=message):
        reporting.write_report(make(run))
    assert all(path.read_bytes() in (content, b"mine") for path, content in before.items())


def test_a_page_that_cannot_be_made_leaves_the_run_finished(
    roles: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def fail(*_: Any) -> None:
        raise ZeroDivisionError("no page today")

    monkeypatch.setattr(reporting, "write_report", fail)
    events: list[Any] = []
    out = tmp_path / "run"
    result = rmtkd.compress(out=out, target="70%params", on_event=events.append, **{**COMMON, "epochs": 0.0}, **roles)
    assert result.record["finished"] and (out / "summary.json").exists() and (out / "model").exists()
    (told,) = (event for event in events if event["event"] == "unreported")
    assert told["reason"] == "no page today" and "rmtkd report" in str(describe(told))
    assert not (out / "report.html").exists()


def test_several_sizes_stand_on_one_page(sizes: Path):
    page = read(sizes / "report.html")
    rows = {row[0][2:]: row for row in page.table("What each model costs")[1:]}
    assert list(rows) == ["untouched", *TARGETS]
    for target in TARGETS:
        record = json.loads((sizes / target / "summary.json").read_text())
        shown = numbers_of(record["compressed"])
        assert {shown["parameters"], shown["on disk"], shown["accuracy, report rows (n = 40)"]} <= set(rows[target])
    dots = [a for tag, a in page.elements if tag == "circle"]
    assert len(dots) == 2 * len(rows)
    assert {path.name for path in sizes.iterdir()} == {*TARGETS, "report.html"}
    assert reporting.write_report(sizes)[0] == sizes / "report.html"
    assert "several sizes of one model" in page.words


def test_the_same_sizes_go_on_beside_their_page(written: Path, roles: dict[str, Any]):
    again = rmtkd.compress_sizes(targets=TARGETS, out=written, **COMMON, **roles)
    assert list(again) == list(TARGETS)
    shown = again._repr_html_()
    assert all(target in shown for target in TARGETS)


def test_runs_that_began_with_other_models_are_told_apart(sizes: Path, tmp_path: Path):
    one, other = (sizes / target for target in TARGETS)
    summary = json.loads((other / "summary.json").read_text())
    summary["baseline"]["accuracy"]["n"] += 1
    (other / "summary.json").write_text(json.dumps(summary))
    config = json.loads((other / "config.json").read_text())
    config["began_with"]["model"] = "another"
    RunFolder(other).save_json("config.json", checkpoint._sealed(config))
    (page,) = reporting.write_report(one, other, out=tmp_path / "both.html")
    found = read(page)
    assert "did not begin with the same model" in found.words and "unlike rows" in found.words
    assert sum("untouched, of" in row[0] for row in found.table("What each model costs")) == 2
    with pytest.raises(OptionError, match="twice"):
        reporting.write_report(one, one, out=tmp_path / "twice.html")


def test_an_unfinished_size_is_left_out_and_named(sizes: Path):
    (sizes / TARGETS[1] / "summary.json").unlink()
    page = read(reporting.write_report(sizes)[0])
    assert f"{TARGETS[1]} is not finished, and left out" in page.words
    (sizes / TARGETS[0] / "summary.json").unlink()
    with pytest.raises(RunError, match=r"at least one must be finished.*rmtkd report"):
        reporting.write_report(sizes)


def test_a_notebook_shows_the_rows_of_the_terminal(results: tuple[Path, Sizes]):
    result = results[1][TARGETS[0]]
    shown = Reading(result._repr_html_())
    rows = shown.table("What it costs")[1:]
    for row in reporting.summary_rows(result.record):
        assert [row.name, row.before, row.after, row.change] in rows
        assert row.name in result.summary() and row.after in result.summary()
    assert any(tag == "svg" for tag, _ in shown.elements)


def test_a_notebook_shows_the_widths_of_a_run_that_was_left_within_a_round(results: tuple[Path, Sizes]):
    result = results[1][TARGETS[0]]
    site = next(site for site in result.plan.sites if site.keep < site.width)
    left = replace(result, record={**result.record, "rounds": [], "widths": {site.name: site.keep}}, rounds=())
    none = replace(result, record={**result.record, "rounds": []}, rounds=())
    drawn, whole = (re.sub("widths-[0-9a-f]+", "", each._repr_html_()) for each in (left, none))
    assert drawn != whole


def test_losses_are_kept_as_means_over_stretches():
    losses = np.random.default_rng(0).random(1234).tolist()
    kept = thinned(losses)
    assert len(kept) == 100 and kept[-1][0] == 1234
    starts = [0, *(step for step, _ in kept)]
    for start, (step, loss) in zip(starts, kept, strict=False):
        assert loss == pytest.approx(np.mean(losses[start:step]), rel=1e-3)
    assert thinned([0.5, 0.25]) == ((1, 0.5), (2, 0.25)) and thinned([]) == ()


def test_rounds_survive_their_file(run: Path):
    summary = json.loads((run / "summary.json").read_text())
    rounds = [Round.from_dict(done) for done in summary["rounds"]]
    assert json.loads(json.dumps([Round.from_dict(json.loads(json.dumps(d))).losses for d in summary["rounds"]])) == [
        done["losses"] for done in summary["rounds"]
    ]
    assert all(done.latency_ms is not None and done.latency_ms.median > 0 for done in rounds)


def test_scales_put_values_where_they_belong():
    scale = Scale(low=1e-3, high=10, start=100, end=0, log=True)
    assert scale(1e-3) == 100 and scale(10) == 0 and scale(0.1) == pytest.approx(50)
    assert scale(0) == 100 and scale(1e9) == 0
    assert scale.ticks() == pytest.approx([1e-3, 1e-2, 1e-1, 1, 10])
    assert Scale(low=0, high=7, start=0, end=1).ticks() == pytest.approx([0, 2, 4, 6])
    assert len(Scale(low=1e-9, high=1e3, start=0, end=1, log=True).ticks()) <= 5


def test_the_torch_state_is_not_needed(run: Path, monkeypatch: pytest.MonkeyPatch):
    """A report draws no random numbers and reads no tensors."""
    state = torch.get_rng_state()
    monkeypatch.setattr(checkpoint, "safe_open", None)
    assert isinstance(read_evidence(run), Evidence)
    reporting.write_report(run)
    assert torch.equal(torch.get_rng_state(), state)
