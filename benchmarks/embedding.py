"""What ranks by token frequency, a metric and a trimmed vocabulary buy at a tenth of the parameters.

    python benchmarks/embedding.py run --teacher TEACHER --task sst2 --data DIR
    python benchmarks/embedding.py run --teacher TEACHER --task sst2 --data DIR --steps 300
    python benchmarks/embedding.py table

All variants have the same widths elsewhere and at most as many parameters in the embedding as one common rank of 32.
Selection rows alone are read. Every cell is one file in `benchmarks/results/embedding/`; cells whose record is there
are not run again. `table` writes docs/results/text.md.
"""

import argparse
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from records import cell, identity, publish
from recovery import compare
from rmtkd import compression, recipes
from rmtkd.activations import collect
from rmtkd.cutting import cut_in_order
from rmtkd.distillation import Recovery, Teacher
from rmtkd.fisher import Metrics, output_metrics, weighed
from rmtkd.levels import count_tokens, in_levels
from rmtkd.measurement import count_parameters
from rmtkd.recipes.recipe import Source
from rmtkd.seeding import seeded
from rmtkd.sites import Site, blocks_of, find_family, find_sites
from rmtkd.surgery import check_cut
from rmtkd.training import Phase
from rmtkd.vocabulary import trim

RESULTS = Path(__file__).parent / "results" / "embedding"
RANK, HEAD, FFN = 32, 4, 96
"""Widths of MiniLM-L6-H384 at which a tenth of its parameters remains."""
METRIC_BATCHES = 60
VARIANTS = {
    f"{'trimmed, ' * trimmed}{levels} level{'s' * (levels > 1)}{', gradient' * gradient}": (trimmed, levels, gradient)
    for trimmed, gradient, levels in itertools.product((False, True), (False, True), (1, 2, 3, 4))
}


def cut_cell(task_name: str, variant: str, teacher: str, data: Path, share: float, steps: int) -> dict[str, Any]:
    """Cut to a tenth, train for so many steps, and compare with the teacher on selection rows."""
    is_trimmed, levels, has_metric = VARIANTS[variant]
    task = recipes.get(task_name)
    source = task.load(teacher)
    rows = task.rows(data, source, 0)
    whole: Any = source.model
    path, before = find_family(whole).word_embeddings, None
    budget = RANK * sum(whole.get_submodule(path).weight.shape)
    if is_trimmed:
        full = count_parameters(whole)
        old = compare(whole, whole, rows.selection)
        whole, tokenizer, trimming = trim(whole, source.tokenizer, path, count_tokens(whole, path, rows.train))
        before = {
            "parameters": full,
            "accuracy": old["teacher"],
            "tokens": trimming.before,
            "unseen_kept": trimming.unseen_kept,
            "rows_changed": trimming.changed(rows.selection.ids),
        }
        source = Source(model=whole, tokenizer=tokenizer)
        rows = task.rows(data, source, 0)
    model, sites = in_levels(whole, find_sites(whole), rows.train, levels)
    words = [site for site in sites if site.block == "embeddings"]
    calibration = list(compression.share_of(rows.train, share))
    metrics = output_metrics(model, words, calibration[:METRIC_BATCHES]) if has_metric else {}
    ranks = ranks_of(model, words, calibration, metrics, budget)
    widths = {site.name: site.width for site in sites} | ranks
    widths |= {site.name: HEAD if site.shares.endswith("head") else FFN for site in sites if site not in words}
    cut = [site for site in sites if widths[site.name] < site.width]
    student, bases = cut_in_order(model, cut, widths, calibration, blocks=blocks_of(sites), metrics=metrics)
    check_cut(model, student, cut, bases, next(iter(rows.selection)))
    if steps:
        recovery = Recovery()
        with seeded(0):
            Phase(student, rows.train, steps=steps, recovery=recovery, teacher=Teacher(whole), precision="fp32").run(
                lambda _: None
            )
    return {
        "task": task_name,
        "variant": variant,
        "steps": steps,
        "ranks": list(ranks.values()),
        "rows": [len(model.get_parameter(site.streams[0].writers[0].parameter)) for site in words],
        "parameters": count_parameters(student),
        "embedding_parameters": count_parameters(student.get_submodule(path)),
        "calibration_batches": len(calibration),
        "before_trimming": before,
        **compare(whole, student.eval(), rows.selection),
    }


def ranks_of(
    model: nn.Module, words: Sequence[Site], calibration: Sequence[Any], metrics: Metrics, budget: int
) -> dict[str, int]:
    """Ranks of the tables that together lose least of the (weighted) squared error."""
    moments = collect(model, words, calibration)
    gains, prices = [], []
    for site in words:
        (moment,) = moments[site.name]
        second = moment.covariance()[0] if site.streams[0].is_centred else moment.second_moment()[0]
        root = weighed([torch.eye(site.width, dtype=torch.float64)[None]], site, metrics)[0][0]
        gains.append(torch.linalg.eigvalsh(root @ second @ root.mT).flip(0).clamp_min(0))
        prices.append(len(model.get_parameter(site.streams[0].writers[0].parameter)) + site.width)
    if len(words) == 1:
        return {words[0].name: budget // prices[0]}
    return dict(zip((site.name for site in words), share_out(gains, prices, budget), strict=True))


def share_out(gains: Sequence[Tensor], prices: Sequence[int], budget: int, *, least: int = 1) -> list[int]:
    """Ranks of several tables that together lose least at this price: the directions are bought in the order of what
    each is worth for its price (water-filling).

    Exact for errors that add, up to the last direction, which may be too dear.

    Args:
        gains: for each table the eigenvalues of its second moment, descending, in one unit for all.
        prices: for each table what a direction costs: parameters of a column and of its row in the projection.
        budget: what may be spent.
        least: rank that each table has whatever its worth.
    """
    ranks = [min(least, len(values)) for values in gains]
    left = budget - sum(rank * price for rank, price in zip(ranks, prices, strict=True))
    worth = [
        (float(value) / price, i)
        for i, (values, price, rank) in enumerate(zip(gains, prices, ranks, strict=True))
        for value in values[rank:]
    ]
    for _, i in sorted(worth, key=lambda pair: -pair[0]):
        if prices[i] <= left:
            ranks[i] += 1
            left -= prices[i]
    return ranks


def table() -> str:
    """The records as Markdown."""
    lines = [
        "| task | variant | tokens | ranks | embedding | parameters | steps | KL | accuracy | teacher | untouched |"
    ]
    lines.append("|---|---|---|---|--:|--:|--:|--:|--:|--:|--:|")
    records = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))]
    order = {name: i for i, name in enumerate(VARIANTS)}
    for r in sorted(records, key=lambda r: (r["task"], r["steps"], order[r["variant"]])):
        tokens, ranks = (" / ".join(f"{n:,}" for n in r[key]) for key in ("rows", "ranks"))
        untouched = (r["before_trimming"] or {"accuracy": r["teacher"]})["accuracy"]
        lines.append(
            f"| {r['task']} | {r['variant']} | {tokens} | {ranks} | {r['embedding_parameters']:,} "
            f"| {r['parameters']:,} | {r['steps']} | {r['kl']:.4f} | {r['accuracy']:.2%} | {r['teacher']:.2%} "
            f"| {untouched:.2%} |"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the named part of the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("run", "table"))
    parser.add_argument("--task", default="sst2")
    parser.add_argument("--teacher")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--share", type=float, default=0.1, help="Of the training batches, for calibration.")
    parser.add_argument("--steps", type=int, default=0, help="Of recovery.")
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    chosen = parser.parse_args(arguments)
    if chosen.part == "table":
        publish("embedding", table())
        return
    teacher_id = identity(recipes.get(chosen.task).load(chosen.teacher).model)
    for variant in chosen.variants:
        name = f"{chosen.task}-{variant.replace(', ', '-').replace(' ', '_')}-{chosen.steps}"
        cell(
            RESULTS / f"{name}.json",
            lambda variant=variant: cut_cell(
                chosen.task, variant, chosen.teacher, chosen.data, chosen.share, chosen.steps
            ),
            teacher_id=teacher_id,
        )


if __name__ == "__main__":
    main()
