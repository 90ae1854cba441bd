"""Options that several commands have."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from rmtkd.cli.console import log
from rmtkd.errors import OptionError

RecipeName = Annotated[str, typer.Argument(help="The task: see `rmtkd ls`.")]
Model = Annotated[str | None, typer.Option("--model", help="Model folder, or a name on the hub.")]
Data = Annotated[
    Path | None, typer.Option("--data", help="Folder of parquet files; the hub by default. For text: a file or folder.")
]
Columns = Annotated[
    str | None, typer.Option("--columns", help="Recipe text: column of texts, or two as FIRST,SECOND; text by default.")
]
Label = Annotated[str | None, typer.Option("--label", help="Recipe text: column of labels; without it no row has one.")]
MaxLength = Annotated[int | None, typer.Option("--max-length", help="Longest row of text in tokens; 128 by default.")]
Seed = Annotated[int, typer.Option(help="Of everything random.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON to standard output.")]
Precision = Annotated[
    str, typer.Option(help="Of training and measuring: auto (bf16 where the machine has it), fp32 or bf16.")
]
Target = Annotated[
    str | None,
    typer.Option(
        help="What remains: 25%params, 5M, 40%flops; 40%latency or 2.5x (faster), by times of the real shapes that are "
        "measured on this machine first. Tied weights count once."
    ),
]
Targets = Annotated[
    list[str] | None,
    typer.Option(
        "--target",
        help="What remains: 25%params, 5M, 40%flops; 40%latency or 2.5x (faster), by times of the real shapes that are "
        "measured on this machine first. Tied weights count once. Several give as many models from one measurement, "
        "in folders of --out.",
    ),
]
Policy = Annotated[
    str | None,
    typer.Option(
        help="How widths are chosen: guarded (the default) by the loss that each costs on selection rows, measured; "
        "paper by the noise edges alone, as published. Such as --policy paper."
    ),
]
MaxLoss = Annotated[
    float | None,
    typer.Option(
        help="In place of --target, what guarded widths may cost in sum: nats of divergence from the teacher, such as "
        "--max-loss 0.02; 0.05 by default."
    ),
]
Metric = Annotated[
    str | None,
    typer.Option(
        help="In which errors of a cut are small: fisher (the default) weighs them by how much the answers care, "
        "output counts all alike. Such as --metric output."
    ),
]
Tau = Annotated[
    float | None,
    typer.Option(help="Of --rule mp: quantile that starts the noise level; larger cuts more; 0.5 by default."),
]
Rule = Annotated[str | None, typer.Option(help="Spectral rule; mp by default.")]
MultipleOf = Annotated[
    int | None, typer.Option(help="Kept widths are multiples of this; the recipe's by default (rmtkd ls), else 8.")
]
MinShare = Annotated[float | None, typer.Option(help="No width below this share of its full size; 0 by default.")]
Uniform = Annotated[
    bool,
    typer.Option(
        "--uniform",
        help="Narrow only what the stock configuration can say (one feed-forward width for all layers): a stock model.",
    ),
]
EmbeddingLevels = Annotated[
    int | None,
    typer.Option(
        help="Embedding tables, each of a width of its own, for tokens by how often they occur; 1 by default."
    ),
]
TrimVocabulary = Annotated[
    bool,
    typer.Option(
        "--trim-vocabulary",
        help="First drop tokens that no training row holds; other words are spelled by smaller pieces.",
    ),
]
LowRank = Annotated[
    bool,
    typer.Option(
        "--low-rank",
        help="In place of narrowing widths, make two convolutions of lower rank of one: for what narrowing leaves.",
    ),
]
Exclude = Annotated[
    list[str] | None,
    typer.Option(
        "--exclude", metavar="SITE", help="Leave this site whole; a pattern such as 'layer.*.ffn'; repeatable."
    ),
]
Keep = Annotated[
    list[str] | None,
    typer.Option("--keep", metavar="SITE=WIDTH", help="Give this site, or pattern, this width; repeatable."),
]
Calibration = Annotated[
    float | None,
    typer.Option(help="Share of the training batches whose activations are seen; the recipe's by default, else 0.1."),
]


def given(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options that stand on the command line."""
    return {name: value for name, value in options.items() if value is not None}


def check_without_recipe(options: Mapping[str, Any]) -> None:
    """Where no recipe is named, hold what takes one: by flag.

    Raises:
        OptionError: naming what was given.
    """
    if found := given(options):
        raise OptionError(
            f"{', '.join(found)} must come with --recipe, which says what the rows mean. Got none. Add --recipe NAME: "
            "rmtkd ls"
        )


def check_tau(tau: float | None, rule: str | None) -> None:
    """Hold a quantile against the rule that it is for; without a name the usual one, which has it.

    Raises:
        OptionError: if the rule has none.
    """
    from rmtkd.spectra import RULES, takes

    if tau is not None and rule in RULES and not takes(rule, "tau"):
        having = ", ".join(name for name in RULES if takes(name, "tau"))
        raise OptionError(f"--tau must come with a rule that has it: {having}. Got the rule {rule}. Leave --tau out.")


def plan_options(
    target: str | None,
    policy: str | None,
    max_loss: float | None,
    rule: str | None,
    tau: float | None,
    multiple_of: int | None,
    min_share: float | None,
    uniform: bool,
    embedding_levels: int | None,
    low_rank: bool,
    exclude: list[str] | None,
    keep: list[str] | None,
) -> dict[str, Any]:
    """What shapes a plan, as far as it is given. A largest loss takes the place of the recipe's target.

    Raises:
        OptionError: if two of them contradict each other, or `keep` is none.
    """
    from rmtkd.planning import parse_keep

    check_tau(tau, rule)
    if max_loss is not None and target is not None:
        raise OptionError(
            "--max-loss must come without --target, which it takes the place of. Got both. Leave one out."
        )
    if max_loss is not None and policy == "paper":
        raise OptionError(
            "--max-loss must come with guarded widths, whose losses are measured. Got --policy paper. Leave one out."
        )
    shape = {
        "target": target,
        "policy": policy,
        "max_loss": max_loss,
        "rule": rule,
        "tau": tau,
        "multiple_of": multiple_of,
        "min_share": min_share,
        "uniform": uniform or None,
        "embedding_levels": embedding_levels,
        "low_rank": low_rank or None,
        "exclude": tuple(exclude) if exclude else None,
        "keep": parse_keep(keep) if keep else None,
    }
    return given(shape) | ({"target": None} if target is None and max_loss is not None else {})


def tell_timing(target: str | None) -> None:
    """Say what the first plan for a latency takes time for."""
    from rmtkd.planning import LATENCY, Target

    if target is not None and Target.parse(target).cost == LATENCY:
        log("the model's real shapes are timed on this machine, if they were not before: up to a minute")


def needed(model: str | None, recipe: str) -> str:
    """The model, which this command cannot do without.

    Raises:
        OptionError: if there is none.
    """
    if model is None:
        raise OptionError(
            f"--model must be a trained classifier, for {recipe}. Got none. Pass its folder or hub name, or train one:"
            f"\nrmtkd train {recipe} --model PATH_OR_HUB_NAME --out {recipe}-teacher"
        )
    return model
