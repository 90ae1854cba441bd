"""The spectra of real layers: how much of them is noise by each rule, and how many of their vectors are independent.

    python benchmarks/layers.py --task sst2 --model TEACHER --data DIR   # collect and count
    python benchmarks/layers.py needed --task sst2 --model TEACHER --data DIR
    python benchmarks/layers.py table                                    # Markdown and docs/layers.svg of all records

A record is named after its task, or after the published network where the task is `cifar10`. What was collected is kept
beside it (`NAME.npz`), so that rules which come later are counted without the model. The column `needed` is the least
width at which, this one alone cut in closed form, the KL to the teacher on all selection rows is at most 0.02 and 99 %
of the answers agree: `needed-NAME.json` (site → width), by bisection.
"""

import argparse
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from records import cell, publish
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


def record_name(task: str, model: str) -> str:
    """What the records of a model are named after."""
    return Path(model).name if task == "cifar10" else task


def spectra_cell(task_name: str, teacher: str, data: Path, share: float, batches: int | None) -> dict[str, Any]:
    """Collect the spectra of all streams into `NAME.npz`."""
    task = recipes.get(task_name)
    source = task.load(teacher, data)
    rows = task.rows(data, source, 0)
    calibration = list(islice(compression.share_of(rows.train, share), batches))
    draws = None if task_name == "cifar10" else 0  # networks without dropout have no second pass
    observed = observe(source.model, find_sites(source.model), calibration, replicate_seed=draws)
    arrays: dict[str, Any] = {
        f"{name}/{i}/{field}": np.asarray(value)
        for name, streams in spectra_of(observed).items()
        for i, spectrum in enumerate(streams)
        for field, value in asdict(spectrum).items()
        if value is not None
    }
    np.savez_compressed(RESULTS / f"{record_name(task_name, teacher)}.npz", **arrays)
    return {"task": task_name, "share": share, "batches": len(calibration)}


def needed_widths(task_name: str, teacher: str, data: Path, share: float, batches: int | None) -> dict[str, int]:
    """By site, the least width that hardly moves an answer. Query/key and value share theirs."""
    task = recipes.get(task_name)
    source = task.load(teacher, data)
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


def read_spectra(name: str) -> dict[str, Spectrum]:
    """By name of the stream: `layer.0.ffn`, or `layer.0.query_key/1` where a site has several."""
    with np.load(RESULTS / f"{name}.npz") as arrays:
        prefixes = sorted({key.rsplit("/", 1)[0] for key in arrays})
        return {
            prefix if f"{prefix.rsplit('/', 1)[0]}/1" in prefixes else prefix.rsplit("/", 1)[0]: Spectrum(
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
    for name in RULES:
        try:
            edge = rule_named(name)(spectrum)
        except RmtkdError as error:
            found["rules"][name] = {"error": str(error)}
            continue
        found["rules"][name] = {
            "count": edge.count(spectrum.eigenvalues) / spectrum.groups,
            "edge": rounded(edge.edge),
            "ks": rounded(edge.ks),
            "misfit": edge.misfit,
            **({"levels": list(map(rounded, edge.levels))} if edge.levels else {}),
            **{key: rounded(value) for key, value in edge.diagnostics.items() if key == "massive"},
        }
    return found


def rounded(value: float) -> float:
    """To ten digits: the last bits of a sum are the processor's."""
    return float(f"{value:.10g}")


def recorded() -> list[str]:
    """The names of all records."""
    return sorted(path.stem for path in RESULTS.glob("*.npz"))


def table(name: str) -> str:
    """One line a stream."""
    record = json.loads((RESULTS / f"{name}.json").read_text())
    path = RESULTS / f"needed-{name}.json"
    needed: Mapping[str, int] = json.loads(path.read_text()) if path.exists() else {}
    names = [rule for rule in RULES if rule != "fixed"]
    lines = [
        f"| {name} | d | n | n_eff/n | KS | {' | '.join(names)} | needed |",
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
                if "error" in (counted := found["rules"].get(rule, {"error": ""}))
                else f"{counted['count']:.{1 if heads else 0}f}"
                for rule in names
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
    "first stage": "^conv1|^layer1",
    "second stage": "^layer2",
    "third stage": "^layer3",
}
"""By title, what the names of the streams of a panel match."""
COLOURS = ("#440154", "#443a83", "#31688e", "#21918c", "#35b779", "#c8b020", "#d95f02", "#b2182b")
SIZE, GAP = 190, 46


def figure() -> str:
    """All spectra of all records, log-log, with the edges of the rules in `SHOWN`, as SVG."""
    found = {name: read_spectra(name) for name in recorded()}
    rows = {
        name: {title: [s for s in spectra if re.search(part, s)] for title, part in PANELS.items()}
        for name, spectra in found.items()
    }
    rows = {name: {title: streams for title, streams in row.items() if streams} for name, row in rows.items()}
    width, height = max(map(len, rows.values())) * (SIZE + GAP) + GAP, len(rows) * (SIZE + GAP) + GAP
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        'font-family="sans-serif" font-size="11">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        f'<text x="{GAP}" y="14">eigenvalue over the median against rank (pooled over heads); '
        "dark blue: first layer. ● edge of mp, ○ edge of rdpa (mean over heads)</text>",
    ]
    for down, (name, row) in enumerate(rows.items()):
        record = json.loads((RESULTS / f"{name}.json").read_text())["streams"]
        for across, (title, streams) in enumerate(row.items()):
            at = (GAP + across * (SIZE + GAP), GAP + down * (SIZE + GAP))
            parts += panel(f"{name}: {title}", {s: (found[name][s], record[s]["rules"]) for s in streams}, at)
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
    parser.add_argument("--task", choices=("sst2", "ag_news", "cifar10"))
    parser.add_argument("--model")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--share", type=float, default=0.1)
    parser.add_argument("--batches", type=int, help="at most so many of them")
    chosen = parser.parse_args(arguments)
    RESULTS.mkdir(parents=True, exist_ok=True)
    name = None if chosen.part == "table" else record_name(chosen.task, chosen.model)
    if chosen.part == "collect":
        run = lambda: spectra_cell(chosen.task, chosen.model, chosen.data, chosen.share, chosen.batches)  # noqa: E731
        cell(RESULTS / f"{name}.json", run)
    if chosen.part == "needed":
        widths = needed_widths(chosen.task, chosen.model, chosen.data, chosen.share, chosen.batches)
        (RESULTS / f"needed-{name}.json").write_text(json.dumps(widths, indent=1) + "\n")
    for known in recorded():
        path = RESULTS / f"{known}.json"
        record = json.loads(path.read_text())
        record["streams"] = {stream: count_cell(spectrum) for stream, spectrum in read_spectra(known).items()}
        path.write_text(json.dumps(record, indent=1) + "\n")
    tables = "\n\n".join(table(known) for known in recorded())
    if chosen.part == "table":
        publish("layers", tables)
        FIGURE.write_text(figure())
    else:
        print(tables)


if __name__ == "__main__":
    main()
