"""The tables of the published evaluation: published against measured, row by row, with the reason of every difference;
what each model is and costs; how well it does; and below them rows, machines and commands."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from records import at_best_rate, percent, spread

Record = Mapping[str, Any]
Pair = tuple[Record, Record]
"""The records of a model and of its teacher."""
Key = tuple[str, str, str]
"""Scale, network and task."""
COMPARED = ("published", "same-size")
"""Parts, beside the teacher, that something published stands against."""


@dataclass(frozen=True, kw_only=True)
class Reported:
    """What the source of a table reports, in its words, and why what is measured here differs.

    Attributes:
        published: by network and task, the measures that it tells.
        peers: by network, of every other method that it names the reduction of the parameters and the accuracy, and
            what this method is called among the records of `peers.py`, if it is there.
        reasons: by `part, measure`, or by measure; those of a network by `network: part, measure`.
        notes: by task, what must be known of its rows.
    """

    published: Mapping[tuple[str, str], Mapping[str, str]] = field(default_factory=dict)
    peers: Mapping[str, Mapping[str, tuple[str, str, str | None]]] = field(default_factory=dict)
    reasons: Mapping[str, str] = field(default_factory=dict)
    notes: Mapping[str, str] = field(default_factory=dict)

    def reason(self, network: str, part: str, measure: str) -> str:
        """Why a measure of a part differs, as narrowly as is known."""
        keys = (f"{network}: {part}, {measure}", f"{part}, {measure}", measure)
        return next((self.reasons[key] for key in keys if key in self.reasons), "")


def _change(of: Callable[[Record], float | None]) -> Callable[[Record, Record], float | None]:
    """By how many percent a model has more of something than its teacher; None where it is not known of both."""

    def change(record: Record, teacher: Record) -> float | None:
        mine, theirs = of(record), of(teacher)
        return None if mine is None or not theirs else 100 * (mine / theirs - 1)

    return change


def _points(record: Record, teacher: Record) -> float:
    return 100 * (record["accuracy"]["value"] - teacher["accuracy"]["value"])


def _faster(record: Record, _: Record) -> float:
    return record["teacher_latency_at_1_ms"]["median"] / record["latency_at_1_ms"]["median"]


MEASURES: Mapping[str, tuple[str, Callable[[Record, Record], float | None], str, str]] = {
    "parameters": ("parameters", lambda r, _: r["cost"]["parameters"] / 1e6, ".1f", " M"),
    "reduction": ("parameters", _change(lambda r: r["cost"]["parameters"]), "+.1f", " %"),
    "accuracy": ("accuracy", _points, "+.2f", " points"),
    "speed_up": ("speed at batch 1", _faster, ".2f", "×"),
    "memory": ("memory", _change(lambda r: r["memory_bytes"]), "+.0f", " %"),
    "power": ("power", _change(lambda r: r["energy_at_1"]["watts"]), "+.0f", " %"),
    "energy": ("energy at batch 1", _change(lambda r: r["energy_at_1"]["joules"]), "+.0f", " %"),
}
"""By name: what it is called, its value from a record and its teacher's, how it is written, its unit."""


def table(results: Path, reported: Reported) -> str:
    """All tables as Markdown; nothing where there is no record.

    Args:
        results: folder of the records; those of other methods are in `peers` beside it.
        reported: what stands beside them.
    """
    found = [json.loads(path.read_text()) for path in sorted(results.glob("*.json"))]
    if not found:
        return ""
    groups = _grouped(found)
    others = [json.loads(path.read_text()) for path in sorted((results.parent / "peers").glob("*.json"))]
    blocks = [_against(groups, reported, others), _costs(groups), _quality(groups), _notes(found, reported)]
    return "\n\n".join("\n".join(lines) for lines in blocks if lines)


def _grouped(found: Sequence[Record]) -> dict[Key, dict[str, list[Pair]]]:
    """By scale, network and task the records of every part with those of their teachers, the teacher's own first."""
    teachers = {(r["scale"], r["network"], r["task"], r["seed"]): r for r in found if r["part"] == "teacher"}
    groups: dict[Key, dict[str, list[Pair]]] = {}
    for record in sorted(found, key=lambda r: (r["scale"], r["network"], r["task"], r["part"] != "teacher", r["part"])):
        key = record["scale"], record["network"], record["task"]
        teacher = teachers.get((*key, record["seed"]))
        if teacher is not None and record.get("teacher_id") in (None, teacher.get("teacher_id")):
            groups.setdefault(key, {}).setdefault(record["part"], []).append((record, teacher))
    return groups


def _against(groups: Mapping[Key, Any], reported: Reported, others: Sequence[Record]) -> list[str]:
    """Published against measured: a line a measure, of all networks and tasks that the source reports on; what has no
    record of any scale is one line each."""
    lines: list[str] = []
    begun = {(network, task) for _, network, task in groups}
    for (scale, network, task), parts in groups.items():
        said = reported.published.get((network, task), {})
        named = f"{scale} | {network}, {task}"
        for part in ("teacher", *COMPARED):
            measures = [m for m in said if (m == "parameters") == (part == "teacher")]
            if measures and part not in parts:
                lines.append(f"| {named} | {part} | all | {_all_of({m: said[m] for m in measures})} | not run yet | |")
            for measure in measures if part in parts else ():
                title, reason = MEASURES[measure][0], reported.reason(network, part, measure)
                lines.append(
                    f"| {named} | {part} | {title} | {said[measure]} | {_told(measure, parts[part])} | {reason} |"
                )
        if "accuracy" in said:
            lines += _peers(named, reported, network, parts["teacher"], [r for r in others if r["task"] == task])
    for (network, task), said in reported.published.items():
        if (network, task) not in begun:
            reason = reported.reasons.get("not run", "")
            lines.append(f"| – | {network}, {task} | all | all | {_all_of(said)} | not run yet | {reason} |")
    heading = "| scale | network, task | part | measure | published | measured | why they differ |"
    return [heading, "|---|---|---|---|--:|--:|---|", *lines] if lines else []


def _all_of(said: Mapping[str, str]) -> str:
    """All that is published of a part, in one cell."""
    return "; ".join(f"{MEASURES[measure][0]} {figure}" for measure, figure in said.items())


def _told(measure: str, pairs: Sequence[Pair]) -> str:
    """A measure over seeds; where there is none, why."""
    _, of, form, unit = MEASURES[measure]
    values = [value for pair in pairs if (value := of(*pair)) is not None]
    if values:
        return _signed(spread(values, form)) + unit
    return "not measured" + (f": {_missing(pairs)}" if measure in ("power", "energy") else "")


def _missing(pairs: Sequence[Pair]) -> str:
    return next((r["energy_at_1"]["reason"] for pair in pairs for r in pair if r["energy_at_1"]["reason"]), "unknown")


def _signed(number: str) -> str:
    return number.replace("-", "−")


def _peers(
    named: str, reported: Reported, network: str, teachers: Sequence[Pair], others: Sequence[Record]
) -> list[str]:
    """What the source reports of other methods, beside those of the same teachers."""
    ids = {teacher.get("teacher_id") for _, teacher in teachers}
    size = teachers[0][0]["cost"]["parameters"]
    lines = []
    for title, (parameters, accuracy, name) in reported.peers.get(network, {}).items():
        cells = at_best_rate([r for r in others if r["peer"] == name and r["teacher_id"] in ids])
        told = "not run on this network"
        if cells:
            share = [100 * (r["parameters"] / size - 1) for r in cells]
            against = [a - b for a, b in zip(percent(cells, "accuracy"), percent(cells, "teacher"), strict=True)]
            told = f"{_signed(spread(share, '+.1f'))} %; {_signed(spread(against, '+.2f'))} points"
        reason = reported.reasons.get("peers" if cells else "peers, not run", "")
        lines.append(f"| {named} | {title} | parameters; accuracy | {parameters}; {accuracy} | {told} | {reason} |")
    return lines


def _costs(groups: Mapping[Key, Any]) -> list[str]:
    """What every model is and costs."""
    lines = [
        "| scale | network, task | part | seeds | parameters (encoder) | of teacher | disk, MB | operations a row "
        "| memory, MB | latency at 1, ms | speed-up | rows a second | energy at 1 | power at work (at rest) |",
        "|---|---|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for (scale, network, task), parts in groups.items():
        for part, pairs in parts.items():
            cells = [scale, f"{network}, {task}", part, str(len(pairs)), *_cost(part, pairs)]
            lines.append("| " + " | ".join(cells) + " |")
    return lines


def _cost(part: str, pairs: Sequence[Pair]) -> list[str]:
    first = pairs[0][0]
    cost, is_teacher = first["cost"], part == "teacher"

    def mean(of: Callable[[Record, Record], float | None], form: str) -> str:
        values = [value for pair in pairs if (value := of(*pair)) is not None]
        return spread(values, form) if values else "–"

    encoder = f" ({cost['parameters_encoder']:,})" if cost["parameters_encoder"] else ""
    batch = cost["latency_ms"]["batch"]
    watts = mean(lambda r, _: r["energy_at_1"]["watts"], ".1f")
    rest = mean(lambda r, _: r["energy_at_1"]["rest_watts"], ".1f")
    iqrs = first["latency_at_1_ms"]["iqr"], first["rows_per_second"]["iqr"]
    return [
        f"{cost['parameters']:,}{encoder}",
        "" if is_teacher else mean(lambda r, t: 100 * r["cost"]["parameters"] / t["cost"]["parameters"], ".1f") + " %",
        mean(lambda r, _: r["cost"]["disk_bytes"] / 1e6, ".1f"),
        mean(lambda r, _: r["cost"]["flops"] / batch / 1e9, ".3f") + " G",
        mean(lambda r, _: None if r["memory_bytes"] is None else r["memory_bytes"] / 1e6, ",.0f"),
        mean(lambda r, _: r["latency_at_1_ms"]["median"], ".2f") + f" (IQR {iqrs[0]:.2f})",
        "" if is_teacher else mean(_faster, ".2f") + "×",
        mean(lambda r, _: r["rows_per_second"]["median"], ",.0f") + f" (IQR {iqrs[1]:,.0f})",
        mean(lambda r, _: r["energy_at_1"]["joules"], ".3g") + (" J" if first["energy_at_1"]["joules"] else ""),
        "–" if watts == "–" else f"{watts} W ({rest})",
    ]


def _quality(groups: Mapping[Key, Any]) -> list[str]:
    """How well every model does."""
    lines = [
        "| scale | network, task | part | seeds | selection, before recovery | accuracy | F1 | against teacher |",
        "|---|---|---|--:|--:|--:|--:|--:|",
    ]
    for (scale, network, task), parts in groups.items():
        for part, pairs in parts.items():
            records = [record for record, _ in pairs]
            before = [r for r in records if r.get("before_recovery") and r["rounds"] == 1]  # of the whole cut
            told = [
                "" if not before else spread(percent(before, "before_recovery")) + " %",
                *(f"{_estimated(records, key)} %" for key in ("accuracy", "f1")),
                "" if part == "teacher" else _told("accuracy", pairs),
            ]
            lines.append(f"| {scale} | {network}, {task} | {part} | {len(pairs)} | " + " | ".join(told) + " |")
    return lines


def _estimated(records: Sequence[Record], key: str) -> str:
    over_rows = f" ± {100 * records[0][key]['stderr']:.2f}" if len(records) == 1 else ""
    return spread(percent(records, key)) + over_rows


def _notes(found: Sequence[Record], reported: Reported) -> list[str]:
    """What the numbers are of: rows, training, energy, machines and commands, each once."""
    lines = [
        "± is over seeds, or of one seed the standard error over rows. Memory is weights and the most that a batch of "
        "the recipe's rows takes beyond them; latency is of one such row. Speed-ups are of the two models in turns; "
        "times in different rows of the table may be of different hours. Before recovery: of one round, the whole cut."
    ]
    for r in found:
        if r["part"] == "teacher":
            more = f" {reported.notes[r['task']]}" if r["task"] in reported.notes else ""
            length = r["latency_at_1_ms"]["length"]
            timed = f" Costs are of rows of {length} tokens." if length > 1 else ""
            lines.append(f"{r['task']}: {r['rows']}.{more}{timed}")
            enough = f"{100 * r['threshold']:g} % of the selection rows"
            until = "the epochs were over" if r["threshold"] >= 1 else f"{enough} or the epochs were over"
            lines.append(
                f"{r['network']}, {r['task']}: its teacher, {r['start']} start, {r['epochs']:g} epochs, until {until}."
            )
    for r in found:
        if r["energy_at_1"]["reason"]:
            lines.append(f"No energy at scale {r['scale']}: {r['energy_at_1']['reason']}.")
        elif r["energy_at_1"]["source"]:
            lines.append(f"Energy at scale {r['scale']}: measured, {r['energy_at_1']['source']}, rest subtracted.")
        lines.append(f"Scale {r['scale']}, seed {r['seed']}: {_machine(r)}.")
        lines.append(f"Made by `{r['command']}`.")
    return [f"* {line}" for line in dict.fromkeys(lines)]


def _machine(record: Record) -> str:
    """Where and with what it was measured."""
    machine, made_with = record["machine"], record["versions"]
    device = machine.get("accelerator", machine["processor"])
    names = [f"{name} {made_with[name]}" for name in ("python", "torch", "transformers", "rmtkd") if name in made_with]
    bf16 = "with" if machine["bf16 matrix instructions"] == "True" else "without"
    threads = f"cores {machine['cores']}, threads {machine['threads']}, {bf16} bf16 instructions"
    return f"{device} ({record['latency_at_1_ms']['device']}), {threads}; {', '.join(names)}"
