"""Runs: `rmtkd compress` and `rmtkd resume`."""

import json
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rmtkd.cli.console import app, command_line, log, log_console, out_console, say
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
    RecipeName,
    Rule,
    Seed,
    Targets,
    Tau,
    TrimVocabulary,
    Uniform,
    given,
    needed,
    plan_options,
    tell_timing,
)

if TYPE_CHECKING:
    from rmtkd.progress import Listener
    from rmtkd.recipes.recipe import Recipe
    from rmtkd.result import Compressed
    from rmtkd.schedule import Options
    from rmtkd.sizes import Sizes


@app.command()
def compress(
    recipe: RecipeName,
    out: Annotated[
        Path, typer.Option(help="Run folder; new, or holding only a plan. With several targets, the folder of theirs.")
    ],
    model: Model = None,
    data: Data = None,
    columns: Columns = None,
    label: Label = None,
    max_length: MaxLength = None,
    plan_file: Annotated[
        Path | None,
        typer.Option(
            "--plan",
            metavar="FILE",
            exists=True,
            dir_okay=False,
            help="Apply this plan.json, edited or not, instead of making a plan.",
        ),
    ] = None,
    targets: Targets = None,
    policy: Policy = None,
    max_loss: MaxLoss = None,
    metric: Metric = None,
    rule: Rule = None,
    tau: Tau = None,
    granularity: Annotated[
        str | None, typer.Option(help="What is cut between recoveries: site, layer or round.")
    ] = None,
    epochs: Annotated[float | None, typer.Option(help="Recovery of the whole run, in epochs; 0 cuts only.")] = None,
    optimizer: Annotated[
        str | None, typer.Option(help="Of recovery: adamw, or sgd (with momentum; wants a larger --lr, such as 0.05).")
    ] = None,
    lr: Annotated[float | None, typer.Option(help="Peak learning rate of recovery; see --gentle.")] = None,
    gentle: Annotated[
        float | None,
        typer.Option(help="Nats that a cut must cost for the whole learning rate; milder cuts take less. 0: any cut."),
    ] = None,
    alpha: Annotated[float | None, typer.Option(help="Weight of the labels against the teacher.")] = None,
    temperature: Annotated[float | None, typer.Option(help="Of both softmaxes.")] = None,
    hidden: Annotated[float | None, typer.Option(help="Weight of the difference of hidden states.")] = None,
    blend: Annotated[
        bool | None,
        typer.Option(
            "--blend/--no-blend", help="Go back towards the cut as far as selection rows say. [default: blend]"
        ),
    ] = None,
    average: Annotated[
        float | None, typer.Option(help="Decay of a moving average of the weights; 0 keeps the last weights.")
    ] = None,
    teacher: Annotated[str | None, typer.Option(help="previous (before the cut) or original.")] = None,
    teacher_model: Annotated[
        str | None,
        typer.Option(
            help="In place of both another model that answers the same rows, a folder or a name on the hub: a larger "
            "one, or the one that an earlier cut was made from."
        ),
    ] = None,
    tolerance: Annotated[
        float | None,
        typer.Option(help="Largest loss of selection accuracy (0.02 is two points); else roll back."),
    ] = None,
    max_rounds: Annotated[int | None, typer.Option(help="Stop after as many rounds.")] = None,
    multiple_of: MultipleOf = None,
    min_share: MinShare = None,
    uniform: Uniform = False,
    embedding_levels: EmbeddingLevels = None,
    trim_vocabulary: TrimVocabulary = False,
    low_rank: LowRank = False,
    exclude: Exclude = None,
    keep: Keep = None,
    calibration_share: Calibration = None,
    control: Annotated[bool, typer.Option("--control", help="Also train the same shape from a random start.")] = False,
    precision: Precision = "auto",
    seed: Seed = 0,
    device: Device = "cpu",
    as_json: AsJson = False,
) -> None:
    """Narrow a trained model and let it recover by self-distillation.

    \b
    $ rmtkd compress sst2 --model teacher --data DIR --out runs/sst2 --epochs 2
    $ rmtkd compress sst2 --model t --data DIR --out o --target 9M --target 5M
    $ rmtkd compress sst2 --model t --data DIR --out r --plan r/plan.json
    $ rmtkd compress text --model M --data r.csv --columns a --label b --out o
    $ rmtkd compress digits --out runs/digits   (trains its own teacher first)
    parameters                         │        648,202 │        160,666 │   24.8%
    accuracy, report rows (n = 450)    │ 96.44% ± 0.87% │ 96.00% ± 0.92% │ -0.44
    accuracy, selection rows (n = 150) │ 96.67% ± 1.47% │ 96.67% ± 1.47% │ +0.00
    1 round; stopped: target: 25%params reached
    runs/digits/summary.json holds the record, runs/digits/model the model
    """
    from rmtkd import batches as batching
    from rmtkd import compression, recipes
    from rmtkd.checkpoint import RunFolder
    from rmtkd.errors import OptionError, PlanError
    from rmtkd.planning import Plan
    from rmtkd.schedule import OF_PLANS, Options
    from rmtkd.sites import find_sites
    from rmtkd.sizes import check_place, check_targets, compress_sizes

    task = recipes.get(recipe, columns=columns, label=label, max_length=max_length)
    target, several = (targets or [None])[0], len(targets or ()) > 1
    shape = plan_options(
        target, policy, max_loss, rule, tau, multiple_of, min_share, uniform, embedding_levels, low_rank, exclude, keep
    )
    schedule = {
        "metric": metric,
        "calibration_share": calibration_share,
        "granularity": granularity,
        "epochs": epochs,
        "teacher": teacher,
        "gentle": gentle,
        "blend": blend,
        "tolerance": tolerance,
        "max_rounds": max_rounds,
    }
    steps = {
        "optimizer": optimizer,
        "lr": lr,
        "alpha": alpha,
        "temperature": temperature,
        "hidden": hidden,
        "average": average,
    }
    options: dict[str, Any] = {
        **task.options,
        **shape,
        **given(schedule),
        "precision": precision,
        "seed": seed,
        "device": device,
    }
    usual = options.get("recovery", Options().recovery)
    if optimizer not in (None, usual.optimizer) and lr is None:
        raise OptionError(
            f"--optimizer {optimizer} must come with a learning rate of its own: that of {usual.optimizer} is "
            f"{usual.lr:g} here. Add --lr, such as 0.001 for adamw or 0.05 for sgd."
        )
    options["recovery"] = replace(usual, **given(steps))
    for flag, other in (("--teacher", teacher), ("--trim-vocabulary", trim_vocabulary)):
        if teacher_model is not None and other:
            raise OptionError(f"--teacher-model must come without {flag}. Got both. Leave one out.")
    if plan_file is not None:
        if shape:
            flags = ", ".join(f"--{name.replace('_', '-')}" for name in given(shape))
            raise OptionError(
                f"with --plan the plan decides. Got {flags} too. Make the plan anew with them first: "
                "`rmtkd plan FOLDER`, which takes seconds; or leave out --plan."
            )
        options = {name: value for name, value in options.items() if name not in OF_PLANS}  # the recipe's
    elif several:
        targets = check_targets(targets or ())
        check_place(out, targets)
    chosen = Options(**options)  # before anything takes time
    for aim in targets or [chosen.target]:
        tell_timing(aim)
    if not several:
        RunFolder.check_free(out)
        if plan_file is None and (out / "plan.json").exists():
            log(f"{out / 'plan.json'} is not applied: a new plan is made. To apply it: --plan {out / 'plan.json'}")
    if model is None and task.needs_no_checkpoint:
        if plan_file is not None:
            Plan.read(plan_file)  # a broken one is not worth a teacher
        model = str(own_teacher(task, out, chosen))
    model = needed(model, recipe)
    command = {
        "recipe": recipe,
        "model": absolute(model),
        "data": None if data is None else str(data.absolute()),
        "columns": columns,
        "label": label,
        "max_length": max_length,
        "teacher_model": teacher_model and absolute(teacher_model),
        "trim_vocabulary": trim_vocabulary,
        "words": command_line(),
    }
    with prepared(command, seed) as (given_to_run, on_event):
        if several:
            del options["target"]
            sizes = compress_sizes(
                **given_to_run,
                targets=targets or (),
                control=control,
                out=out,
                command=command,
                on_event=on_event,
                **options,
            )
            show_sizes(sizes, out, given_to_run["extra_files"], as_json=as_json)
            return
        made = None
        if plan_file is not None:
            example = batching.first(given_to_run["selection"], "selection")
            low_rank = False
            with suppress(PlanError):  # told below, with what does not fit the model
                low_rank = Plan.read(plan_file).low_rank
            made = Plan.read(plan_file, sites=find_sites(given_to_run["model"], example, low_rank=low_rank))
        result = compression.compress(
            **given_to_run, plan=made, control=control, out=out, command=command, on_event=on_event, **options
        )
        show_result(result, out, given_to_run["extra_files"], as_json=as_json)


def own_teacher(task: "Recipe", out: Path, chosen: "Options") -> Path:
    """The teacher beside the run's folder, trained where there is none yet."""
    from rmtkd.progress import watcher
    from rmtkd.teaching import train_teacher

    folder = out.absolute().with_name(f"{out.absolute().name}-teacher")
    if folder.exists():
        log(f"no --model: using the teacher in {folder}")
        return folder
    log(f"no --model: training a teacher into {folder}")
    how = {"precision": chosen.precision, "seed": chosen.seed, "device": chosen.device}
    with watcher(log_console) as on_event:
        train_teacher(task, out=folder, on_event=on_event, **how)  # type: ignore[arg-type]
    return folder


def absolute(model: str) -> str:
    """A path that is right from any folder; other names as they are."""
    return str(Path(model).absolute()) if Path(model).exists() else model


@app.command()
def resume(
    run: Annotated[Path, typer.Argument(help="Run folder of `rmtkd compress` that was stopped.")],
    model: Annotated[str | None, typer.Option(help="Where the model is now, if it was moved.")] = None,
    data: Annotated[Path | None, typer.Option(help="Where the rows are now, if they were moved.")] = None,
    teacher_model: Annotated[
        str | None, typer.Option(help="Where the run's --teacher-model is now, if it was moved.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Go on with a run that was stopped anywhere, to the same result.

    \b
    $ rmtkd resume runs/digits
    [    0.1 s] this run is finished: target: 25%params reached
    """
    from rmtkd import compression
    from rmtkd.checkpoint import RunFolder
    from rmtkd.errors import RunError

    config = RunFolder(run).config()
    command = dict(config.get("command") or {})
    if not command:
        raise RunError(
            f"the command line goes on with what it began. {run} was begun from Python. Go on with rmtkd.resume there."
        )
    moved = given({"model": model, "data": data, "teacher_model": teacher_model})
    command |= {key: str(value) for key, value in moved.items()}
    with prepared(command, config["options"]["seed"]) as (given_to_run, on_event):
        result = compression.resume(run, **given_to_run, on_event=on_event)
        show_result(result, run, given_to_run["extra_files"], as_json=as_json)


@contextmanager
def prepared(command: Mapping[str, Any], seed: int) -> Iterator[tuple[dict[str, Any], "Listener"]]:
    """Model, rows and extra files of a run, and who watches it."""
    from rmtkd import recipes
    from rmtkd.progress import watcher
    from rmtkd.recipes.checkpoints import check_same_inputs, save_companions
    from rmtkd.result import VOCABULARY

    task = recipes.get(command["recipe"], **{name: command[name] for name in ("columns", "label", "max_length")})
    data = None if command["data"] is None else Path(command["data"])
    source = task.load(command["model"], data)
    rows = task.rows(data, source, seed)
    log(rows.note)
    facts = None
    if command.get("trim_vocabulary"):
        from rmtkd.recipes.trimmed import trimmed
        from rmtkd.reporting import vocabulary_line

        source, rows, facts = trimmed(task, source, rows, data, seed)
        log(vocabulary_line(facts))
    with tempfile.TemporaryDirectory() as written, watcher(log_console) as on_event:
        if facts is not None:
            (Path(written) / VOCABULARY).write_text(json.dumps(facts) + "\n")
        save_companions(source, Path(written))
        parts = {
            "model": source.model,
            "train": rows.train,
            "selection": rows.selection,
            "report": rows.report,
            "example": task.example(source.model, rows),
            "extra_files": sorted(Path(written).iterdir()),
        }
        if command.get("teacher_model"):
            teacher = task.load(command["teacher_model"], data)
            check_same_inputs(source, teacher)
            parts["teacher_model"] = teacher.model
        yield parts, on_event


def show_result(result: "Compressed", out: Path, extra_files: Iterable[Path], *, as_json: bool) -> None:
    """The result, or what there is of it and how to go on."""
    from rmtkd import reporting

    save_unfinished(result, out, extra_files)
    if as_json:
        sys.stdout.write(json.dumps(result.record, indent=1) + "\n")
    else:
        out_console.print(reporting.plan_table(result.plan, out_console.width))
        for note in reporting.plan_notes(result.plan):
            say(note)
        out_console.print(reporting.summary(result.record))
    if not result.record["finished"]:
        log(f"the model as it is: {out}/model-so-far")
        log(f"continue with:  rmtkd resume {out}")
        sys.exit(130)
    if not as_json:
        say(f"{out}/summary.json holds the record, {out}/model the model: rmtkd.load({str(out / 'model')!r})")


def show_sizes(results: "Sizes", out: Path, extra_files: Iterable[Path], *, as_json: bool) -> None:
    """All sizes in one table; of a run that was interrupted, how to go on."""
    from rmtkd import reporting

    records = [result.record for result in results.values()]
    last = list(results)[-1]
    save_unfinished(results[last], out / last, extra_files)
    if as_json:
        sys.stdout.write(json.dumps(records, indent=1) + "\n")
    else:
        out_console.print(reporting.sizes_table(records))
    if not records[-1]["finished"]:
        log(f"the model as it is: {out / last}/model-so-far")
        log(f"continue with the same command, or only this size:  rmtkd resume '{out / last}'")
        sys.exit(130)
    if not as_json:
        say(f"{out}/TARGET/model holds each model, such as rmtkd.load({str(out / last / 'model')!r})")


def save_unfinished(result: "Compressed", out: Path, extra_files: Iterable[Path]) -> None:
    """The model of a run that was interrupted, as it is."""
    if not result.record["finished"]:
        so_far = out / "model-so-far"
        shutil.rmtree(so_far, ignore_errors=True)
        result.save(so_far, extra_files=extra_files)
