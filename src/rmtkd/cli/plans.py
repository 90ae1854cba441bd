"""The dry run: `rmtkd plan`."""

import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rmtkd.cli.console import app, log, out_console, say
from rmtkd.cli.options import (
    AsJson,
    Calibration,
    Columns,
    Data,
    Device,
    EmbeddingLevels,
    Exclude,
    Keep,
    Label,
    LowRank,
    MaxLength,
    MaxLoss,
    Metric,
    MinShare,
    Model,
    MultipleOf,
    Policy,
    Precision,
    Rule,
    Seed,
    Target,
    Tau,
    TrimVocabulary,
    Uniform,
    check_tau,
    given,
    needed,
    plan_options,
    tell_timing,
)

if TYPE_CHECKING:
    from rmtkd.planning import Plan


@app.command()
def plan(
    recipe: Annotated[
        str,
        typer.Argument(
            metavar="RECIPE|FOLDER",
            help="The task (`rmtkd ls`), or a folder with a plan to make anew without the model.",
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder for plan.json and spectra.npz; new, or holding only a plan. A given FOLDER by default."
        ),
    ] = None,
    model: Model = None,
    data: Data = None,
    columns: Columns = None,
    label: Label = None,
    max_length: MaxLength = None,
    target: Target = None,
    policy: Policy = None,
    max_loss: MaxLoss = None,
    metric: Metric = None,
    rule: Rule = None,
    tau: Tau = None,
    multiple_of: MultipleOf = None,
    min_share: MinShare = None,
    uniform: Uniform = False,
    embedding_levels: EmbeddingLevels = None,
    trim_vocabulary: TrimVocabulary = False,
    low_rank: LowRank = False,
    exclude: Exclude = None,
    keep: Keep = None,
    calibration_share: Calibration = None,
    epochs: Annotated[
        float | None, typer.Option(help="Recovery that the forecast counts; the recipe's by default.")
    ] = None,
    precision: Precision = "auto",
    seed: Seed = 0,
    device: Device = "cpu",
    as_json: AsJson = False,
) -> None:
    """Dry run: look at the spectra and choose the widths. Nothing is trained, no run is touched.

    With a FOLDER that holds a plan, choose them anew from its spectra: no model, no data, seconds. What is not given
    stays as it was, widths changed by hand too.

    \b
    $ rmtkd plan sst2 --model teacher --data DIR --out p --target 25%params
    $ rmtkd plan digits --model runs/digits-teacher --out runs/planned
    site              │ kind      │ width │ signal │ above │ keep │    loss │
    embeddings.word   │ linear    │   128 │      3 │    64 │   48 │ 0.00029 │
    layer.0.ffn       │ pointwise │   512 │     12 │   255 │  160 │  0.0012 │
    ...
    before recovery: 160,666 of 648,202 parameters (24.8%), ...
    $ rmtkd plan runs/planned --target 15%params --keep layer.0.ffn=96
    before recovery: 95,874 of 648,202 parameters (14.8%), ...
    """
    from rmtkd import compression, recipes
    from rmtkd.checkpoint import RunFolder
    from rmtkd.dry_run import Survey
    from rmtkd.environment import precision_on
    from rmtkd.errors import OptionError, RunError
    from rmtkd.forecast import forecast
    from rmtkd.progress import forecast_line
    from rmtkd.schedule import Options

    shape = plan_options(
        target, policy, max_loss, rule, tau, multiple_of, min_share, uniform, embedding_levels, low_rank, exclude, keep
    )
    if recipe not in recipes.names() and Path(recipe).is_dir():
        unused = {
            "--model": model,
            "--data": data,
            "--columns": columns,
            "--label": label,
            "--max-length": max_length,
            "--calibration-share": calibration_share,
            "--epochs": epochs,
            "--metric": metric,
            "--precision": None if precision == "auto" else precision,
            "--seed": seed or None,
            "--device": None if device == "cpu" else device,
            "--embedding-levels": shape.pop("embedding_levels", None),
            "--low-rank": shape.pop("low_rank", None),
            "--trim-vocabulary": trim_vocabulary or None,
        }
        _plan_anew(Path(recipe), out, shape, [name for name, value in unused.items() if value is not None], as_json)
        return
    if "/" in recipe:
        raise RunError(
            f"a plan is made for a recipe, or anew from a folder. There is no folder {recipe}. See `rmtkd ls`."
        )
    task = recipes.get(recipe, columns=columns, label=label, max_length=max_length)
    if out is None:
        raise OptionError(f"--out must be a folder for the plan. Got none. Pass --out FOLDER, such as runs/{recipe}.")
    options: dict[str, Any] = {**task.options, **shape, "precision": precision, "seed": seed, "device": device}
    options |= given({"calibration_share": calibration_share, "epochs": epochs, "metric": metric})
    chosen = Options(**options)  # before anything takes time
    RunFolder.check_free(out)
    source = task.load(needed(model, recipe), data)
    rows = task.rows(data, source, seed)
    log(rows.note)
    if trim_vocabulary:
        from rmtkd.recipes.trimmed import trimmed
        from rmtkd.reporting import vocabulary_line

        source, rows, facts = trimmed(task, source, rows, data, seed)
        log(vocabulary_line(facts))
    tell_timing(chosen.target)
    calibration = compression.share_of(rows.train, chosen.calibration_share)
    survey = Survey(
        source.model.to(device),
        calibration=calibration,
        selection=rows.selection,
        example=task.example(source.model, rows),
        train=rows.train,
        options=chosen,
    )
    made = survey.plan(chosen.target)
    RunFolder.for_plan(out).save_plan(made, survey.spectrums)
    show_plan(made, out, as_json=as_json)
    expected = forecast(
        survey.model,
        survey.sites,
        made.widths,
        rows.train,
        steps=chosen.steps(len(rows.train)),
        recovery=chosen.recovery,
        blend=chosen.blend,
        precision=precision_on(device, precision),
        calibration=calibration,
        seconds_observed=survey.seconds_observed,
    )
    log(f"`rmtkd compress` will take {forecast_line(asdict(expected))}")


def _plan_anew(folder: Path, out: Path | None, shape: dict[str, Any], unused: list[str], as_json: bool) -> None:
    from rmtkd.checkpoint import RunFolder, read_planned
    from rmtkd.errors import OptionError, RunError
    from rmtkd.planning import retarget

    if unused:
        raise OptionError(
            f"a plan made anew from a folder needs neither model nor data. Got {', '.join(unused)}. Leave them out, or "
            "name the recipe instead of the folder."
        )
    earlier, spectrums = read_planned(folder)
    check_tau(shape.get("tau"), shape.get("rule", earlier.rule))
    if out is None:
        try:
            RunFolder.check_free(folder)
        except RunError:
            raise RunError(
                f"--out must be given where the folder holds more than a plan. {folder} does. Pass --out NEW_FOLDER."
            ) from None
    place = out or folder
    RunFolder.check_free(place)
    made = retarget(earlier, spectrums, **shape)
    RunFolder.for_plan(place).save_plan(made, spectrums)
    show_plan(made, place, as_json=as_json)


def show_plan(made: "Plan", out: Path, *, as_json: bool) -> None:
    from rmtkd import reporting

    if as_json:
        sys.stdout.write(made.to_json() + "\n")
        return
    out_console.print(reporting.plan_table(made, out_console.width))
    for note in reporting.plan_notes(made):
        say(note)
    say(f"saved {out / 'plan.json'}")
