"""The table of the published evaluation: published against measured, row by row."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from records import spread

COMPARABLE = ("teacher", "published", "same-size")
"""Parts of a table that something published stands beside."""


def table(results: Path, published: Mapping[str, Mapping[str, Any]], reasons: Mapping[str, str]) -> str:
    """Published against measured, row by row, as Markdown.

    Args:
        results: folder of the records.
        published: by network: its parameters, accuracy against its own baseline, speed-up.
        reasons: why a row differs, by `network-part`, or by network.
    """
    lines = [
        "| scale | network | task | part | parameters, of all (encoder) | published | report accuracy | F1 | against "
        "teacher | published | latency at 1 | speed-up | published | rows a second | memory | energy at 1 | reason |",
        "|---|---|---|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|---|",
    ]
    found = [json.loads(path.read_text()) for path in sorted(results.glob("*.json"))]
    teachers = {(r["scale"], r["network"], r["task"], r["seed"]): r for r in found if r["part"] == "teacher"}
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for record in found:
        groups.setdefault((record["scale"], record["network"], record["task"], record["part"]), []).append(record)
    order = sorted(groups.items(), key=lambda item: (*item[0][:3], item[0][3] != "teacher", item[0][3]))
    for (scale, network, task, part), cells in order:
        paired = [(record, teachers.get((scale, network, task, record["seed"]))) for record in cells]
        lines.append("| " + " | ".join(_line(scale, network, task, part, paired, published, reasons)) + " |")
    return "\n".join(lines)


def _line(
    scale: str, network: str, task: str, part: str, paired: Sequence[Any], published: Any, reasons: Any
) -> list[str]:
    said = published.get(network, {}) if part in COMPARABLE else {}
    first = paired[0][0]
    is_teacher = part == "teacher"

    def mean(of: Callable[[Any, Any], float | None], form: str) -> str:
        values = [value for pair in paired if pair[1] is not None and (value := of(*pair)) is not None]
        return spread(values, form) if values else "–"

    share = mean(lambda r, t: 100 * (r["cost"]["parameters"] / t["cost"]["parameters"] - 1), "+.1f")
    encoder = first["cost"]["parameters_encoder"]
    counted = f"{first['cost']['parameters']:,}" + (f" ({encoder:,})" if encoder else "")
    energy = first["energy_at_1"]
    return [
        scale,
        network,
        task,
        part + (f" ({len(paired)} seeds)" if len(paired) > 1 else ""),
        counted if is_teacher else f"{counted}: {share} %",
        str(said.get("parameters", "")) if is_teacher else str(said.get("reduction", "")),
        mean(lambda r, t: 100 * r["accuracy"]["value"], ".2f") + " %",
        mean(lambda r, t: 100 * r["f1"]["value"], ".2f") + " %",
        "" if is_teacher else mean(lambda r, t: 100 * (r["accuracy"]["value"] - t["accuracy"]["value"]), "+.2f"),
        "" if is_teacher else str(said.get("accuracy", "")),
        mean(lambda r, t: r["latency_at_1_ms"]["median"], ".2f") + f" ms (IQR {first['latency_at_1_ms']['iqr']:.2f})",
        ""
        if is_teacher
        else mean(lambda r, _: r["teacher_latency_at_1_ms"]["median"] / r["latency_at_1_ms"]["median"], ".2f") + "×",
        "" if is_teacher else str(said.get("speed_up", "")),
        mean(lambda r, t: r["rows_per_second"]["median"], ",.0f"),
        "–" if first["memory_bytes"] is None else f"{first['memory_bytes'] / 1e6:,.0f} MB",
        f"{energy['joules']:.3g} J" if energy["joules"] else f"none: {energy['reason']}",
        reasons.get(f"{network}-{part}", reasons.get(network, "")),
    ]
