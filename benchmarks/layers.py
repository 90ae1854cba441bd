"""The spectra of real layers: how much of them is noise by each rule, and how many of their vectors are independent.

    python benchmarks/layers.py --task sst2 --model TEACHER --data DIR   # collect and count
    python benchmarks/layers.py needed --task sst2 --model TEACHER --data DIR
    python benchmarks/layers.py table                                    # Markdown and docs/layers.svg of all records

What was collected is kept beside the record (`TASK.npz`), so that rules which come later are counted without the model.
The column `needed` is the least width at which, this one alone cut in closed form, the KL to the teacher on all
selection rows is at most 0.02 and 99 % of the answers agree: `needed-TASK.json` (site → width), by bisection.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from records import cell
from rmtkd import compression, recipes
from rmtkd.activations import collect, observe
from rmtkd.environment import has_bf16
from rmtkd.errors import RmtkdError
from rmtkd.fisher import output_metrics
from rmtkd.planning import spectra_of
from rmtkd.sensitivity import Sensitivity
from rmtkd.sites import by_width, find_sites
from rmtkd.spectra import RULES, Spectrum, rule_named

RESULTS = Path(__file__).parent / "results" / "layers"
FIGURE = Path(__file__).parent.parent / "docs" / "layers.svg"
MOST_KL, LEAST_AGREEMENT = 0.02, 0.99
SHOWN = ("mp", "rdpa")
"""Rules whose edges are marked in the figure."""


def spectra_cell(task_name: str, teacher: str, data: Path, share: float, batches: int | None) -> dict[str, Any]:
    """Collect the spectra of all streams into `TASK.npz`."""
    task = recipes.get(task_name)
    source = task.load(teacher)
    rows = task.rows(data, source, 0)
    calibration = list(islice(compression.share_of(rows.train, share), batches))
    observed = observe(source.model, find_sites(source.model), calibration, replicate_seed=0)
    arrays: dict[str, Any] = {
        f"{name}/{i}/{field}": np.asarray(value)
        for name, streams in spectra_of(observed).items()
        for i, spectrum in enumerate(streams)
        for field, value in asdict(spectrum).items()
        if value is not None
    }
    np.savez_compressed(RESULTS / f"{task_name}.npz", **arrays)
    return {"task": task_name, "share": share, "batches": len(calibration)}


def needed_widths(task_name: str, teacher: str, data: Path, share: float, batches: int | None) -> dict[str, int]:
    """By site, the least width that hardly moves an answer. Query/key and value share theirs."""
    task = recipes.get(task_name)
    source = task.load(teacher)
    rows, sites = task.rows(data, source, 0), find_sites(source.model)
    calibration = list(islice(compression.share_of(rows.train, share), batches))
    judge = Sensitivity(
        source.model,
        sites,
        collect(source.model, sites, calibration),
        rows.selection,
        metrics=output_metrics(source.model, sites, calibration, bf16=has_bf16("cpu")),
        most_rows=10**9,
        bf16=has_bf16("cpu"),
    )
    found: dict[str, int] = {}
    for shares, group in by_width(sites).items():
        low, high = group[0].least - 1, group[0].width  # `high` is enough, `low` is not
        while high > 1.05 * low + 1:
            middle = round((max(low, 1) * high) ** 0.5) if low > 0 else (low + high) // 2
            middle = min(max(middle, low + 1), high - 1)
            loss, agreement = judge.disturbance({shares: middle})
            low, high = (low, middle) if loss <= MOST_KL and agreement >= LEAST_AGREEMENT else (middle, high)
        found |= {site.name: high for site in group}
        print(shares, high, flush=True)
    return found


def read_spectra(task: str) -> dict[str, Spectrum]:
    """By name of the stream: `layer.0.ffn`, or `layer.0.query_key/1` where a site has several."""
    with np.load(RESULTS / f"{task}.npz") as arrays:
        prefixes = sorted({key.rsplit("/", 1)[0] for key in arrays})
        return {
            prefix if f"{prefix[:-2]}/1" in prefixes else prefix[:-2]: Spectrum(
                **{
                    f.name: value if (value := arrays[f"{prefix}/{f.name}"]).ndim else value.item()
                    for f in fields(Spectrum)
                    if f"{prefix}/{f.name}" in arrays
                }
            )
            for prefix in prefixes
        }


def count_cell(spectrum: Spectrum) -> dict[str, Any]:
    """What every rule makes of one stream; None where it can make nothing of it."""
    found: dict[str, Any] = {
        "width": spectrum.width,
        "groups": spectrum.groups,
        "samples": spectrum.samples,
        "effective_samples": spectrum.effective_samples,
        "rules": {},
    }
    pooled = spectrum.eigenvalues.ravel()
    for name in RULES:
        try:
            edge = rule_named(name)(spectrum)
        except RmtkdError as error:
            found["rules"][name] = {"error": str(error)}
            continue
        found["rules"][name] = {
            "count": edge.count(pooled) / spectrum.groups,
            "edge": edge.edge,
            "ks": edge.ks,
            "misfit": edge.misfit,
        }
    return found


def tasks() -> list[str]:
    """Those with a record."""
    return sorted(path.stem for path in RESULTS.glob("*.npz"))


def table(task: str) -> str:
    """One line a stream."""
    record = json.loads((RESULTS / f"{task}.json").read_text())
    path = RESULTS / f"needed-{task}.json"
    needed: Mapping[str, int] = json.loads(path.read_text()) if path.exists() else {}
    names = [name for name in RULES if name != "fixed"]
    lines = [
        f"| {task} | d | n | n_eff/n | KS | {' | '.join(names)} | needed |",
        "|---|--:|--:|--:|--:|" + "--:|" * (len(names) + 1),
    ]
    for stream, found in record["streams"].items():
        heads = f"{found['groups']}×" if found["groups"] > 1 else ""
        effective = found["effective_samples"]
        published = found["rules"]["mp"]
        cells = [
            stream,
            f"{heads}{found['width']}",
            f"{found['samples']:,}",
            "–" if effective is None else f"{effective / found['samples']:.2f}",
            "–" if "error" in published else f"{published['ks']:.2f}{'!' if published['misfit'] else ''}",
            *(
                "–"
                if "error" in (rule := found["rules"].get(name, {"error": ""}))
                else f"{rule['count']:.{1 if heads else 0}f}"
                for name in names
            ),
            str(needed.get(stream.split("/")[0], "–")),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------- the figure

PANELS = {
    "embedding": "embeddings",
    "queries": "query_key/0",
    "keys": "query_key/1",
    "values": "value",
    "feed-forward": "ffn",
}
COLOURS = ("#440154", "#443a83", "#31688e", "#21918c", "#35b779", "#c8b020", "#d95f02", "#b2182b")
SIZE, GAP = 190, 46


def figure() -> str:
    """All spectra of all records, log-log, with the edges of the rules in `SHOWN`, as SVG."""
    found = tasks()
    width, height = len(PANELS) * (SIZE + GAP) + GAP, len(found) * (SIZE + GAP) + GAP
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        'font-family="sans-serif" font-size="11">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        f'<text x="{GAP}" y="14">eigenvalue over the median against rank (pooled over heads); '
        "dark blue: first layer. ● edge of mp, ○ edge of rdpa</text>",
    ]
    for row, task in enumerate(found):
        record = json.loads((RESULTS / f"{task}.json").read_text())["streams"]
        spectra = read_spectra(task)
        for column, (title, part) in enumerate(PANELS.items()):
            streams = [name for name in spectra if part in name]
            at = (GAP + column * (SIZE + GAP), GAP + row * (SIZE + GAP))
            parts += panel(f"{task}: {title}", {n: (spectra[n], record[n]["rules"]) for n in streams}, at)
    return "\n".join([*parts, "</svg>\n"])


def panel(title: str, streams: Mapping[str, tuple[Spectrum, Mapping[str, Any]]], at: tuple[int, int]) -> list[str]:
    """One square of the figure."""
    x, y = at
    curves = []
    for spectrum, rules in streams.values():
        values = np.sort(spectrum.eigenvalues.ravel())[::-1]
        curves.append((values / np.median(values), rules, float(np.median(values))))
    last = max(len(values) for values, _, _ in curves)
    top, bottom = 1.2 * max(values[0] for values, _, _ in curves), 1e-2

    def place(rank: float, value: float) -> tuple[float, float]:
        across, up = np.log(rank) / np.log(last), np.log(max(value, bottom) / bottom) / np.log(top / bottom)
        return x + SIZE * float(across), y + SIZE * (1 - float(up))

    lines = [
        f'<rect x="{x}" y="{y}" width="{SIZE}" height="{SIZE}" fill="none" stroke="#999"/>',
        f'<text x="{x}" y="{y - 4}">{title}</text>',
        f'<text x="{x - 4}" y="{y + 9}" text-anchor="end">{top:.0f}</text>',
        f'<text x="{x - 4}" y="{y + SIZE}" text-anchor="end">{bottom:g}</text>',
        f'<text x="{x}" y="{y + SIZE + 12}">1</text>',
        f'<text x="{x + SIZE}" y="{y + SIZE + 12}" text-anchor="end">{last}</text>',
    ]
    for i, (values, rules, median) in enumerate(curves):
        colour = COLOURS[i % len(COLOURS)]
        ranks = np.unique(np.geomspace(1, len(values), 120).astype(int))
        points = " ".join("{:.1f},{:.1f}".format(*place(r, values[r - 1])) for r in ranks)
        lines.append(f'<polyline points="{points}" fill="none" stroke="{colour}"/>')
        for name, fill in zip(SHOWN, (colour, "white"), strict=True):
            if "edge" in rules.get(name, {}):
                edge = rules[name]["edge"] / median
                cx, cy = place(max(1, int((values > edge).sum())), edge)
                lines.append(f'<circle cx="{cx:.1f}" cy="{cy:.1f}" r="3" fill="{fill}" stroke="{colour}"/>')
    return lines


def main(arguments: Sequence[str] | None = None) -> None:
    """Collect a model's spectra, or render what was collected."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", nargs="?", default="collect", choices=("collect", "needed", "table"))
    parser.add_argument("--task", choices=("sst2", "ag_news"))
    parser.add_argument("--model")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--share", type=float, default=0.1)
    parser.add_argument("--batches", type=int, help="at most so many of them")
    chosen = parser.parse_args(arguments)
    RESULTS.mkdir(parents=True, exist_ok=True)
    if chosen.part == "collect":
        run = lambda: spectra_cell(chosen.task, chosen.model, chosen.data, chosen.share, chosen.batches)  # noqa: E731
        cell(RESULTS / f"{chosen.task}.json", run)
    if chosen.part == "needed":
        widths = needed_widths(chosen.task, chosen.model, chosen.data, chosen.share, chosen.batches)
        (RESULTS / f"needed-{chosen.task}.json").write_text(json.dumps(widths, indent=1) + "\n")
    for task in tasks():
        path = RESULTS / f"{task}.json"
        record = json.loads(path.read_text())
        record["streams"] = {name: count_cell(spectrum) for name, spectrum in read_spectra(task).items()}
        path.write_text(json.dumps(record, indent=1) + "\n")
        print(table(task), end="\n\n")
    if chosen.part == "table":
        FIGURE.write_text(figure())


if __name__ == "__main__":
    main()
