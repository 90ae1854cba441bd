"""What it takes to do a run again: the command, the options, versions and machine."""

import shlex
from collections.abc import Mapping
from typing import Any

from rmtkd.progress import duration
from rmtkd.reporting import numbers
from rmtkd.reporting.evidence import Evidence
from rmtkd.schedule import Options
from rmtkd.spectra import takes


def how_to_repeat(evidence: Evidence) -> str:
    """The command that does the same again; of a run from Python, the call."""
    if evidence.config is None:
        return how_to_go_on(evidence)
    words = (evidence.config.get("command") or {}).get("words")
    return shlex.join(words) if words else _call(evidence)


def how_to_go_on(evidence: Evidence) -> str:
    """What to type next, of a plan or of a run that is not finished."""
    if evidence.config is None:
        plan = shlex.quote(str(evidence.folder / "plan.json"))
        return f"rmtkd compress RECIPE --model MODEL --out {shlex.quote(str(evidence.folder))} --plan {plan}"
    if evidence.config.get("command"):
        return f"rmtkd resume {shlex.quote(str(evidence.folder))}"
    return f"rmtkd.resume({str(evidence.folder)!r}, model, train=…, selection=…)"


def _call(evidence: Evidence) -> str:
    """The call in Python, with the options that are not the usual ones."""
    given = dict(_arguments(evidence))
    if evidence.config and evidence.config.get("plan"):
        given = {"plan": "rmtkd.Plan.read(…)", **given}
    if evidence.config and evidence.config.get("control"):
        given["control"] = "True"
    if "teacher model" in ((evidence.config or {}).get("began_with") or {}):
        given["teacher_model"] = "…"
    options = "".join(f", {name}={value}" for name, value in given.items())
    rows = "train=…, selection=…" + (", report=…" if _has_report(evidence) else "")
    return f"rmtkd.compress(model, {rows}{options})"


def _has_report(evidence: Evidence) -> bool:
    return "report rows" in ((evidence.config or {}).get("began_with") or {})


def _arguments(evidence: Evidence) -> list[tuple[str, str]]:
    """Options of the run that are not the usual ones, as arguments of the call in Python."""
    asked, usual = evidence.options, Options().to_dict()
    found = []
    for name, value in asked.items():
        if value == usual.get(name):
            continue
        if isinstance(value, Mapping):
            inner = ", ".join(f"{k}={v!r}" for k, v in value.items() if v != usual[name].get(k))
            found.append((name, f"rmtkd.Recovery({inner})"))
        else:
            found.append((name, repr(value)))
    return found


def configuration(evidence: Evidence) -> list[tuple[str, str]]:
    """Every option by name, those of training after the others; no quantile of a rule that has none."""
    unused = () if takes(evidence.plan.rule, "tau") else ("tau",)
    if evidence.config is None:
        names = ("target", "policy", "max_loss", "rule", "tau", "multiple_of", "min_share", "uniform", "low_rank")
        return [(name, _shown(getattr(evidence.plan, name))) for name in names if name not in unused]
    command = {k: v for k, v in (evidence.config.get("command") or {}).items() if k != "words" and v is not None}
    found = {**command, **_flat(evidence.options), "control": evidence.config["control"]}
    return [(name, _shown(value)) for name, value in found.items() if name not in unused]


def changed(evidence: Evidence) -> list[tuple[str, str]]:
    """Those of them that are not what they are when nothing is said."""
    usual = {**_flat(Options().to_dict()), "control": False, "trim_vocabulary": False}
    return [(name, value) for name, value in configuration(evidence) if value != _shown(usual.get(name))]


def _flat(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options with those of recovery among them."""
    flat: dict[str, Any] = {}
    for name, value in options.items():
        flat |= {f"{name}.{k}": v for k, v in value.items()} if isinstance(value, Mapping) else {name: value}
    return flat


def _shown(value: Any) -> str:
    if value is None or value == []:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def made_by(evidence: Evidence) -> list[tuple[str, str]]:
    """Versions, machine, and what the run took of it."""
    record = evidence.summary or {}
    versions = record.get("versions") or (evidence.config or {}).get("made_with") or {}
    found = [*versions.items(), *(record.get("machine") or {}).items()]
    if "precision" in record:
        found.append(("precision of training", record["precision"]))
    if record.get("peak_memory_bytes"):
        found.append(("peak memory", numbers.megabytes(record["peak_memory_bytes"])))
    if "seconds" in record:
        found.append(("time", duration(record["seconds"])))
    return [*found, ("plan format", str(evidence.plan.format))]
