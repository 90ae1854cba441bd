"""Renderings of a plan and of a record: terminal tables, model card. Nothing here computes a result."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from rmtkd.planning import LATENCY, Plan, SitePlan


def plan_table(plan: Plan, width: int = 120) -> Table:
    """A plan as a table, one line a site: how many directions (of one head) stand above the edge, how many stay.

    A guarded plan also tells how many the detector tells from noise (`signal`), and what the width that stays loses by
    itself. Of n activation vectors n_eff are independent. Where the console is narrow, these and the noise level are
    left to plan.json, which also has the reasons in words.
    """
    is_guarded = plan.policy == "guarded"
    measured = "" if plan.loss is None else f", measured loss {plan.loss:.2g}"
    edges = "" if is_guarded else f", edge × {plan.multiplier:.3g}"
    table = Table(
        title=(
            f"{plan.model} · rule {plan.rule}, τ {plan.tau:g}"
            + (f" · guarded{measured}" if is_guarded else "")
            + (f" · target {plan.target}{edges}" if plan.target else "")
        ),
        caption=(
            f"before recovery: {plan.predicted['params']:,} of {plan.baseline['params']:,} parameters "
            f"({plan.predicted['params'] / plan.baseline['params']:.1%}), "
            f"{plan.predicted['flops'] / 1e6:,.1f} of {plan.baseline['flops'] / 1e6:,.1f} MFLOPs "
            f"({plan.predicted['flops'] / plan.baseline['flops']:.1%})"
            + (
                f", {plan.predicted[LATENCY]:.4g} of {plan.baseline[LATENCY]:.4g} ms "
                f"({plan.predicted[LATENCY] / plan.baseline[LATENCY]:.1%}, predicted from measured shapes)"
                if LATENCY in plan.baseline
                else ""
            )
        ),
        title_justify="left",
        caption_justify="left",
    )
    columns = {
        "site": [site.name for site in plan.sites],
        "kind": [site.kind for site in plan.sites],
        "width": [_per_head(site, site.width) for site in plan.sites],
        "signal": [_directions(site, site.floor) for site in plan.sites],
        "above": [_directions(site, site.count) for site in plan.sites],
        "keep": [_kept(site, plan) + _mark(site, plan) for site in plan.sites],
        "loss": ["–" if site.loss is None else f"{site.loss:.2g}" for site in plan.sites],
        "n_eff/n": [_independent(site) for site in plan.sites],
        "q": [f"{site.q:.2g}" for site in plan.sites],
        "noise σ²": [f"{site.sigma2:.3g}" for site in plan.sites],
        "edge": [f"{site.edge:.3g}" for site in plan.sites],
        "KS": [f"{site.ks:.2f}{'!' if site.misfit else ''}" for site in plan.sites],
        "energy": [f"{site.energy:.1%}" for site in plan.sites],
    }
    left_out = {"noise σ²", "edge"} if is_guarded else {"signal", "loss"}
    if width < 100:
        left_out |= {"n_eff/n", "q", "noise σ²", "edge"}
    for name in left_out:
        del columns[name]
    for name in columns:
        table.add_column(name, justify="left" if name in ("site", "kind") else "right", no_wrap=True)
    for row in zip(*columns.values(), strict=True):
        table.add_row(*row)
    return table


def _per_head(site: SitePlan, width: int) -> str:
    return f"{site.groups}×{width}" if site.groups > 1 else str(width)


def _directions(site: SitePlan, count: float | None) -> str:
    return "–" if count is None else f"{count:.1f}" if site.groups > 1 else f"{count:.0f}"


def _kept(site: SitePlan, plan: Plan) -> str:
    """The width that stays, in as many heads as stay."""
    heads = plan.widths.get(site.groups_of or "", site.groups)
    if heads == site.groups:
        return _per_head(site, site.keep)
    return f"{heads}×{site.keep}" if heads else "0"


def _independent(site: SitePlan) -> str:
    return "–" if site.effective_samples is None else f"{site.effective_samples / site.samples:.0%}"


def _mark(site: SitePlan, plan: Plan) -> str:
    """`*` for a width changed by hand, `=` for one that was asked for, or stays whole with `--uniform`."""
    return "*" if site.by_hand else "=" if site.shares in plan.fixed else ""


def plan_notes(plan: Plan) -> list[str]:
    """What a reader of the plan must know beside the table, in sentences."""
    notes = [note for note in (misfit_note(plan), floor_note(plan)) if note]
    if by_hand := [f"{site.name} {site.planned} → {site.keep}" for site in plan.sites if site.by_hand]:
        notes.append(f"* changed by hand: {', '.join(by_hand)}.")
    if any(_mark(site, plan) == "=" for site in plan.sites):
        notes.append("= the width that was asked for" + (", or whole with --uniform." if plan.uniform else "."))
    return [*notes, *(f"! {remark}" for remark in plan.remarks)]


def misfit_note(plan: Plan) -> str | None:
    """One sentence on the sites whose spectra hold no Marchenko–Pastur bulk, if there are any."""
    bad = [site.name for site in plan.sites if site.misfit]
    if not bad:
        return None
    return (
        f"! {len(bad)} of {len(plan.sites)} spectra show no Marchenko–Pastur bulk (KS > 0.1): there the edge is a "
        "threshold on a quantile, not a test for noise."
    )


def floor_note(plan: Plan) -> str | None:
    """One sentence on the sites where the rule counts fewer directions than the detector tells from noise, if there are
    any in a guarded plan."""
    if plan.policy != "guarded":
        return None
    above = [site for site in plan.sites if site.floor is not None and site.floor > site.count]
    if not above:
        return None
    told = ", ".join(f"{s.name} {_directions(s, s.floor)} > {_directions(s, s.count)}" for s in above[:8])
    return (
        f"! At {len(above)} of {len(plan.sites)} sites more directions are told from noise (signal) than the rule "
        f"{plan.rule} keeps (above): {told}{', …' * (len(above) > 8)}."
    )


def summary_rows(record: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    """Lines of the result: name, before, after, ratio."""
    before, after = record["baseline"], record["compressed"]

    def ratio(a: int | float, b: int | float) -> str:
        return f"{b / a:.1%}"

    def accuracy(cost: Mapping[str, Any], key: str) -> str:
        value = cost[key]
        return "–" if value is None else f"{value['value']:.2%} ± {value['stderr']:.2%}"

    rows = [
        (
            "parameters",
            f"{before['parameters']:,}",
            f"{after['parameters']:,}",
            ratio(before["parameters"], after["parameters"]),
        )
    ]
    if before["parameters_encoder"]:
        rows.append(
            (
                "  of these in the encoder",
                f"{before['parameters_encoder']:,}",
                f"{after['parameters_encoder']:,}",
                ratio(before["parameters_encoder"], after["parameters_encoder"]),
            )
        )
    slow, fast = before["latency_ms"], after["latency_ms"]
    rows += [
        (
            "MFLOPs a batch",
            f"{before['flops'] / 1e6:,.1f}",
            f"{after['flops'] / 1e6:,.1f}",
            ratio(before["flops"], after["flops"]),
        ),
        (
            f"latency, batch {_batch_of(slow)}",
            f"{slow['median']:.1f} ms (IQR {slow['iqr']:.1f})",
            f"{fast['median']:.1f} ms (IQR {fast['iqr']:.1f})",
            f"{slow['median'] / fast['median']:.2f}× faster",
        ),
        (
            "on disk",
            f"{before['disk_bytes'] / 1e6:,.2f} MB",
            f"{after['disk_bytes'] / 1e6:,.2f} MB",
            ratio(before["disk_bytes"], after["disk_bytes"]),
        ),
    ]
    if (more := before.get("energy", {}).get("joules")) and (less := after["energy"]["joules"]):
        rows.append(
            (f"energy a batch ({before['energy']['source']})", f"{more:.3g} J", f"{less:.3g} J", ratio(more, less))
        )
    for key, role in (("accuracy", "report"), ("f1", "report"), ("accuracy_selection", "selection")):
        by_teacher = record["measured_against"].get(role) == "teacher"
        if before[key] is not None and not (key == "f1" and by_teacher):
            measure = "agreement with the teacher" if by_teacher else _measure(key, record["classes"])
            name = f"{measure}, {role} rows"
            points = 100 * (after[key]["value"] - before[key]["value"])
            rows.append(
                (
                    f"{name} (n = {before[key]['n']})",
                    accuracy(before, key),
                    accuracy(after, key),
                    f"{points:+.2f} points",
                )
            )
    if record.get("control"):
        control = record["control"]
        value = control["accuracy"]
        rows.append(
            (
                f"same shape, random start, {control['steps']} steps",
                "",
                f"{value['value']:.2%} ± {value['stderr']:.2%}",
                f"{100 * (value['value'] - before['accuracy']['value']):+.2f} points" if before["accuracy"] else "",
            )
        )
    return rows


def _measure(key: str, classes: int) -> str:
    """The name of what is measured."""
    if key.startswith("f1"):
        return "F1" if classes == 2 else "macro F1"
    return "accuracy"


def quality_line(quality: Mapping[str, Any], classes: int) -> str:
    """Accuracy and F1 with their spread in one line."""
    told = [
        f"{_measure(key, classes)} {quality[key]['value']:.2%} ± {quality[key]['stderr']:.2%}"
        for key in ("accuracy", "f1")
    ]
    return f"{', '.join(told)} (n = {quality['accuracy']['n']})"


def summary(record: Mapping[str, Any]) -> Table:
    """The result as a table."""
    table = Table(title="what it costs and how well it does", title_justify="left", caption_justify="left")
    table.add_column("")
    for name in ("before", "after", ""):
        table.add_column(name, justify="right")
    for row in summary_rows(record):
        table.add_row(*row)
    done = record["rounds"]
    table.caption = f"{len(done)} round{'s' if len(done) != 1 else ''}; stopped: {record['stop_reason']}"
    return table


def summary_table(record: Mapping[str, Any], width: int = 110) -> str:
    """The result as plain text."""
    console = Console(width=width, color_system=None)
    with console.capture() as captured:
        console.print(summary(record))
    return captured.get()


def sizes_table(records: Sequence[Mapping[str, Any]]) -> Table:
    """Several sizes of one model in one table, a line for each target; the first is the untouched model."""
    first = records[0]
    slow = first["baseline"]["latency_ms"]
    table = Table(title="several sizes of one model", title_justify="left", caption_justify="left")
    role, key = ("selection", "accuracy_selection") if first["baseline"]["accuracy"] is None else ("report", "accuracy")
    by_teacher = first["measured_against"].get(role) == "teacher"
    measure = "agreement with the teacher" if by_teacher else "accuracy"
    table.add_column("target", no_wrap=True)
    for name in (
        "parameters",
        "",
        "MFLOPs",
        "on disk",
        f"latency, {_batch_of(slow)}",
        f"{measure}, {role} rows (n = {first['baseline'][key]['n']})",
        "",
    ):
        table.add_column(name, justify="right")
    whole = first["baseline"]
    costs = [("untouched", whole, whole), *((r["config"]["target"], r["baseline"], r["compressed"]) for r in records)]
    for target, before, cost in costs:
        latency = f"{cost['latency_ms']['median']:.1f} ms"
        if cost is not before:  # measured in turns with the untouched model
            latency += f", {before['latency_ms']['median'] / cost['latency_ms']['median']:.2f}×"
        value = cost[key]
        table.add_row(
            target,
            f"{cost['parameters']:,}",
            f"{cost['parameters'] / before['parameters']:.1%}",
            f"{cost['flops'] / 1e6:,.1f}",
            f"{cost['disk_bytes'] / 1e6:,.2f} MB",
            latency,
            "–" if value is None else f"{value['value']:.2%} ± {value['stderr']:.2%}",
            "" if value is None or cost is before else f"{100 * (value['value'] - before[key]['value']):+.2f} points",
        )
    told = [
        f"{r['config']['target']}: {r['stop_reason']}" for r in records if not r["stop_reason"].startswith("target:")
    ]
    table.caption = "\n".join(told) or None
    return table


def sizes_text(records: Sequence[Mapping[str, Any]], width: int = 120) -> str:
    """That table as plain text."""
    console = Console(width=width, color_system=None)
    with console.capture() as captured:
        console.print(sizes_table(records))
    return captured.get()


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


def model_card(
    record: Mapping[str, Any], plan: Plan, loads_with: Iterable[str], vocabulary: Mapping[str, Any] | None = None
) -> str:
    """A model card in Markdown.

    Args:
        record: of the run.
        plan: that it applied.
        loads_with: what reads the model, each in a few words.
        vocabulary: the facts of a trimmed one.
    """
    lines = [
        "---",
        "tags: [rmtkd, model-compression, knowledge-distillation]",
        "---",
        f"# {plan.model}, narrowed by rmtkd",
        "",
        "Random matrix theory chose the widths, exact folding cut them, self-distillation recovered the accuracy "
        "(RMT-KD, arXiv 2509.15724). The model is dense.",
        "",
        "| | before | after | |",
        "|---|--:|--:|--:|",
        *(f"| {' | '.join(row)} |" for row in summary_rows(record)),
        "",
        f"Load it with {'; '.join(loads_with)}. There is no pickle in it. `rmtkd.load` and `rmtkd inspect FOLDER` "
        "verify every file by its checksum, and the model by the outputs stored for a synthetic batch.",
        "",
        *(() if vocabulary is None else ("## Vocabulary", "", _vocabulary_card(vocabulary), "")),
        "## Widths",
        "",
        "| site | before | after | why |",
        "|---|--:|--:|---|",
        *(f"| {site.name} | {_per_head(site, site.width)} | {_kept(site, plan)} | {site.why} |" for site in plan.sites),
        "",
        *(f"{remark}\n" for remark in plan.remarks),
        f"Stopped: {record['stop_reason']}. Seed {record['seed']}. Versions: "
        + ", ".join(f"{name} {version}" for name, version in record["versions"].items())
        + ".",
        "",
    ]
    return "\n".join(lines)


def _vocabulary_card(facts: Mapping[str, Any]) -> str:
    line = vocabulary_line(facts)
    return (
        f"The tokenizer is not that of the model before: it was trimmed. {line[:1].upper()}{line[1:]}. The "
        "figures above are of models with this tokenizer, before and after. Use the tokenizer files beside this card; "
        "`vocabulary.json` lists the tokens that stayed."
    )


def _batch_of(latency: Mapping[str, Any]) -> str:
    """The batch that was timed: rows, positions where rows have several, and threads."""
    positions = f" × {latency['length']}" if latency["length"] > 1 else ""
    return f"{latency['batch']}{positions}, {latency['threads']} threads"
