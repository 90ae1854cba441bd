"""The rows of a result: what every table, card, page and notebook shows, in words. Made of the record alone."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rmtkd.progress import duration
from rmtkd.reporting import numbers
from rmtkd.schedule import Round

AGREEMENT = "agreement with the teacher"
"""What is measured on rows without labels."""


@dataclass(frozen=True)
class Row:
    """One line of a result.

    Attributes:
        key: what it is about, for renderings that treat some lines apart.
        name: in words.
        before, after, change: ready to be shown; empty where there is none.
        is_part: whether it is a part of the line above.
    """

    key: str
    name: str
    before: str
    after: str
    change: str
    is_part: bool = False

    @property
    def cells(self) -> tuple[str, str, str, str]:
        """As the cells of a table; a part is indented."""
        return "  " * self.is_part + self.name, self.before, self.after, self.change


def summary_rows(record: Mapping[str, Any]) -> list[Row]:
    """Lines of the result: what both models cost and how well they do."""
    rows = [*_size_rows(record), *_cost_rows(record), *_quality_rows(record)]
    if taught_by := record.get("teacher_model"):
        name = f"teacher of {numbers.count(taught_by['parameters'])} parameters, selection rows"
        rows.append(Row("teacher_model", name, numbers.estimate(taught_by["accuracy_selection"]), "", ""))
    if record.get("control"):
        control, (role, key) = record["control"], role_of(record)
        before, value = record["baseline"][key], control["accuracy"]
        change = numbers.points(before["value"], value["value"]) if value else ""
        name = f"same shape, random start, {control['steps']} steps" + ", selection rows" * (role == "selection")
        rows.append(Row("control", name, "", numbers.estimate(value) if value else "failed", change))
    return rows


def _size_rows(record: Mapping[str, Any]) -> list[Row]:
    before, after = record["baseline"], record["compressed"]
    rows = []
    for key, name in (("parameters", "parameters"), ("parameters_encoder", "of these in the encoder")):
        if more := before[key]:
            less = after[key]
            cells = numbers.count(more), numbers.count(less), numbers.share(less, more)
            rows.append(Row(key, name, *cells, is_part=key != "parameters"))
    return rows


def _cost_rows(record: Mapping[str, Any]) -> list[Row]:
    before, after = record["baseline"], record["compressed"]
    slow, fast = before["latency_ms"], after["latency_ms"]
    rows = [
        Row(
            "flops",
            "MFLOPs a batch",
            numbers.megaflops(before["flops"]),
            numbers.megaflops(after["flops"]),
            numbers.share(after["flops"], before["flops"]),
        ),
        Row(
            "latency",
            f"latency, batch {numbers.batch_of(slow)}",
            numbers.spread_of(slow),
            numbers.spread_of(fast),
            numbers.faster(slow, fast),
        ),
        Row(
            "disk",
            "on disk",
            numbers.megabytes(before["disk_bytes"]),
            numbers.megabytes(after["disk_bytes"]),
            numbers.share(after["disk_bytes"], before["disk_bytes"]),
        ),
    ]
    if (more := before.get("energy", {}).get("joules")) and (less := after["energy"]["joules"]):
        name = f"energy a batch ({before['energy']['source']})"
        rows.append(Row("energy", name, numbers.joules(more), numbers.joules(less), numbers.share(less, more)))
    return rows


def _quality_rows(record: Mapping[str, Any]) -> list[Row]:
    before, after = record["baseline"], record["compressed"]
    rows = []
    for key, role in (("accuracy", "report"), ("f1", "report"), ("accuracy_selection", "selection")):
        by_teacher = is_by_teacher(record, role)
        if before[key] is not None and not (key == "f1" and by_teacher):
            measure = AGREEMENT if by_teacher else numbers.measure(key, record["classes"])
            rows.append(
                Row(
                    key,
                    f"{measure}, {role} rows (n = {before[key]['n']})",
                    numbers.estimate(before[key]),
                    numbers.estimate(after[key]),
                    numbers.points(before[key]["value"], after[key]["value"]),
                )
            )
    return rows


def is_by_teacher(record: Mapping[str, Any], role: str) -> bool:
    """Whether the rows of this role have no labels, and are held against the teacher's answers."""
    return record["measured_against"].get(role) == "teacher"


def measure_of(record: Mapping[str, Any], role: str) -> str:
    """What is measured on the rows of this role, in words."""
    return AGREEMENT if is_by_teacher(record, role) else "accuracy"


def role_of(record: Mapping[str, Any]) -> tuple[str, str]:
    """On which rows results are told, and the key of the measure: report rows, where there are any."""
    if record["baseline"]["accuracy"] is None:
        return "selection", "accuracy_selection"
    return "report", "accuracy"


def stopped(record: Mapping[str, Any]) -> str:
    """How a run ended, and its control, where that gave no model."""
    done, failed = record["rounds"], (record.get("control") or {}).get("failed")
    told = f"{len(done)} round{'s' if len(done) != 1 else ''}; stopped: {record['stop_reason']}"
    return f"{told}; the same shape from a random start failed: {failed.rstrip('.')}" if failed else told


def size_headings(record: Mapping[str, Any]) -> tuple[str, ...]:
    """What stands above the cells of `size_row`, but for the name."""
    role, key = role_of(record)
    return (
        "parameters",
        "",
        "MFLOPs",
        "on disk",
        f"latency, {numbers.batch_of(record['baseline']['latency_ms'])}",
        f"{measure_of(record, role)}, {role} rows (n = {record['baseline'][key]['n']})",
        "",
    )


def size_row(name: str, record: Mapping[str, Any], *, is_untouched: bool = False) -> tuple[str, ...]:
    """One model among several sizes: the one that a record's run gave, or the one that it began with."""
    before = record["baseline"]
    cost, key = before if is_untouched else record["compressed"], role_of(record)[1]
    latency, value = numbers.milliseconds(cost["latency_ms"]), cost[key]
    if not is_untouched:  # measured in turns with the untouched model
        latency += f", {numbers.ratio_of(before['latency_ms'], cost['latency_ms'])}"
    change = "" if value is None or is_untouched else numbers.points(before[key]["value"], value["value"])
    return (
        name,
        numbers.count(cost["parameters"]),
        numbers.share(cost["parameters"], before["parameters"]),
        numbers.megaflops(cost["flops"]),
        numbers.megabytes(cost["disk_bytes"]),
        latency,
        numbers.estimate(value),
        change,
    )


def round_columns(measure: str) -> tuple[str, ...]:
    """What stands above the cells of `round_row`, where this was measured."""
    return (
        "round",
        "sites",
        "parameters",
        f"{measure} after the cut",
        "after recovery",
        "nats from the teacher, cut → recovered",
        "steps",
        "learning rate",
        "kept of recovery",
        "loss, first → last",
        "latency",
        "off the reference",
        "time to cut, to recover",
    )


def round_row(done: Round) -> tuple[str, ...]:
    """A round in the columns of `round_columns`."""
    return (
        f"{done.number}{' (taken back)' if done.rolled_back else ''}",
        numbers.count(len(done.sites)),
        numbers.count(done.parameters),
        numbers.percent(done.accuracy_cut),
        numbers.percent(done.accuracy),
        _change(done.divergence_cut, done.divergence),
        numbers.count(done.steps),
        "–" if done.lr is None else f"{done.lr:.2g}",
        "–" if done.blend is None else f"{done.blend:.0%}",
        _change(done.loss_first, done.loss_last),
        _round_latency(done),
        f"{done.check_error:.0e}",
        f"{duration(done.seconds_cut)}, {duration(done.seconds_recovery)}",
    )


def _change(first: float | None, last: float | None) -> str:
    """From one number to another; a dash where they are not known."""
    return "–" if first is None or last is None else f"{numbers.small(first)} → {numbers.small(last)}"


def _round_latency(done: Round) -> str:
    """Measured in turns with the untouched model; a dash in records of earlier versions."""
    if done.latency_ms is None or done.latency_ms_untouched is None:
        return "–"
    own, untouched = vars(done.latency_ms), vars(done.latency_ms_untouched)
    return f"{numbers.spread_of(own)}, {numbers.faster(untouched, own)}"


def quality_line(quality: Mapping[str, Any], classes: int) -> str:
    """Accuracy and F1 with their spread in one line."""
    told = [f"{numbers.measure(key, classes)} {numbers.estimate(quality[key])}" for key in ("accuracy", "f1")]
    return f"{', '.join(told)} (n = {quality['accuracy']['n']})"


def energy_lines(record: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What is known of the energy of both models, or why nothing is."""
    lines = []
    for name, part in (("untouched", "baseline"), ("compressed", "compressed")):
        energy = record[part].get("energy")
        if not energy:
            lines.append((name, "not measured"))
        elif energy["joules"] is None:
            lines.append((name, f"no number: {energy['reason']}"))
        else:
            power = f"{numbers.watts(energy['watts'])} at work, {numbers.watts(energy['rest_watts'])} at rest"
            told = f"{numbers.joules(energy['joules'])} a batch beyond rest ({power}; {energy['passes']:,} passes"
            lines.append((name, f"{told}, {energy['source']})"))
    return lines


def sizes_notes(records: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Why runs stopped that did not reach a target."""
    return [f"{name}: {r['stop_reason']}" for name, r in records.items() if not r["stop_reason"].startswith("target:")]


def vocabulary_line(facts: Mapping[str, Any]) -> str:
    """What trimming the vocabulary did, in a sentence; of the facts of `recipes.trimmed`."""
    line = (
        f"vocabulary: {facts['tokens']:,} of {facts['tokens_before']:,} tokens stay, those of the training rows and "
        f"{facts['kept_though_unseen']:,} to spell others with; {facts['selection_rows_tokenised_differently']:,} of "
        f"{facts['selection_rows']:,} selection rows are tokenised differently"
    )
    if "teacher_selection_accuracy_before" in facts:
        before, after = (facts[f"teacher_selection_accuracy_{name}"] for name in ("before", "trimmed"))
        line += f", the untouched model has {before:.2%} of them right, trimmed, which is the baseline, {after:.2%}"
    return line


__all__ = [
    "Row",
    "energy_lines",
    "is_by_teacher",
    "measure_of",
    "quality_line",
    "role_of",
    "round_columns",
    "round_row",
    "size_headings",
    "size_row",
    "sizes_notes",
    "stopped",
    "summary_rows",
    "vocabulary_line",
]
