"""The model card, in Markdown."""

from collections.abc import Iterable, Mapping
from typing import Any

from rmtkd.planning import Plan, SitePlan
from rmtkd.reporting import numbers
from rmtkd.reporting.plans import kept, per_head, widths_of
from rmtkd.reporting.rows import summary_rows, vocabulary_line


def model_card(
    record: Mapping[str, Any], plan: Plan, loads_with: Iterable[str], vocabulary: Mapping[str, Any] | None = None
) -> str:
    """A model card in Markdown.

    Args:
        record: of the run. Of one that was interrupted within a round it has the `widths` that are cut by then.
        plan: that it applied, as far as it came.
        loads_with: what reads the model, each in a few words.
        vocabulary: the facts of a trimmed one.
    """
    widths = widths_of(record, plan)
    lines = [
        "---",
        "tags: [rmtkd, model-compression, knowledge-distillation]",
        "---",
        f"# {plan.model}, narrowed by rmtkd",
        "",
        _made(record, plan),
        "",
        "| | before | after | |",
        "|---|--:|--:|--:|",
        *(f"| {' | '.join(row.cells)} |" for row in summary_rows(record)),
        "",
        f"Load it with {'; '.join(loads_with)}. There is no pickle in it. `rmtkd.load` and `rmtkd inspect FOLDER` "
        "verify every file by its checksum, and the model by the outputs stored for a synthetic batch.",
        "",
        *(() if vocabulary is None else ("## Vocabulary", "", _vocabulary_card(vocabulary), "")),
        "## Widths",
        "",
        "| site | before | after | why |",
        "|---|--:|--:|---|",
        *(
            f"| {site.name} | {per_head(site, site.width)} | {kept(site, widths)} | {_why(site, plan, widths)} |"
            for site in plan.sites
        ),
        "",
        *(f"{remark}\n" for remark in plan.remarks),
        f"Stopped: {record['stop_reason']}. Seed {record['seed']}. Versions: "
        + ", ".join(f"{name} {version}" for name, version in record["versions"].items())
        + ".",
        "",
    ]
    return "\n".join(lines)


def _made(record: Mapping[str, Any], plan: Plan) -> str:
    """How the model was made, in sentences."""
    guarded = "the loss that each costs, as measured, chose the widths"
    edges = f"the rule {plan.rule} chose the widths by the spectra of the activations"
    steps = [guarded if plan.policy == "guarded" else edges, "exact folding cut them"]
    if any(done["steps"] for done in record["rounds"] if not done.get("rolled_back")):
        other = record.get("teacher_model")
        teacher = (
            f"distillation from another model, of {numbers.count(other['parameters'])} parameters," if other else ""
        )
        steps.append(f"{teacher or 'self-distillation'} trained what was left")
    told = ", ".join(steps)
    return f"{told[:1].upper()}{told[1:]} (RMT-KD, arXiv 2509.15724). The model is dense."


def _why(site: SitePlan, plan: Plan, widths: Mapping[str, int]) -> str:
    planned = kept(site, plan.widths)
    return site.why if kept(site, widths) == planned else f"planned {planned}: {site.why}"


def _vocabulary_card(facts: Mapping[str, Any]) -> str:
    line = vocabulary_line(facts)
    return (
        f"The tokenizer is not that of the model before: it was trimmed. {line[:1].upper()}{line[1:]}. The "
        "figures above are of models with this tokenizer, before and after. Use the tokenizer files beside this card; "
        "`vocabulary.json` lists the tokens that stayed."
    )
