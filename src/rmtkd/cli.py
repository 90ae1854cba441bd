"""The command line: the same words as in Python."""

import json
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.console import Console

from rmtkd.errors import DataError, RmtkdError

if TYPE_CHECKING:
    from rmtkd.planning import Plan
    from rmtkd.progress import Listener
    from rmtkd.run import Compressed

app = typer.Typer(
    help="Make a trained model several times smaller and faster, dense and as accurate, with the evidence.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)
EXTRAS = frozenset({"transformers", "datasets", "pyarrow", "sklearn"})
"""Packages that come with the extras."""
out_console = Console(width=None if sys.stdout.isatty() else 120)  # a pipe has no width
log_console = Console(stderr=True)

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
Precision = Annotated[str, typer.Option(help="Of training: auto (bf16 where the machine has it), fp32 or bf16.")]
Target = Annotated[str | None, typer.Option(help="What remains: 25%params, 40%flops, 5M. Tied weights count once.")]
Tau = Annotated[
    float | None, typer.Option(help="Quantile that starts the noise level; larger cuts more; 0.5 by default.")
]
Rule = Annotated[str | None, typer.Option(help="Spectral rule; mp by default.")]
MultipleOf = Annotated[int | None, typer.Option(help="Kept widths are multiples of this; 8 by default.")]
MinShare = Annotated[float | None, typer.Option(help="No width below this share of its full size; 0 by default.")]
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
    float | None, typer.Option(help="Share of the training batches whose activations are seen; 0.1 by default.")
]


@app.command()
def train(
    recipe: RecipeName,
    out: Annotated[Path, typer.Option(help="Folder for the trained model; must be new.")],
    model: Model = None,
    data: Data = None,
    columns: Columns = None,
    label: Label = None,
    max_length: MaxLength = None,
    epochs: Annotated[
        float | None, typer.Option(help="Passes over the training rows; the recipe's by default.")
    ] = None,
    lr: Annotated[float | None, typer.Option(help="Peak learning rate; the recipe's by default.")] = None,
    precision: Precision = "auto",
    seed: Seed = 0,
    device: Device = "cpu",
) -> None:
    """Train a teacher.

    \b
    rmtkd train sst2 --model PATH_OR_HUB_NAME --data DIR --out teacher
    """
    from rmtkd import recipes, reporting
    from rmtkd.progress import watcher
    from rmtkd.teaching import train_teacher

    with watcher(log_console) as on_event:
        record = train_teacher(
            recipes.get(recipe, columns=columns, label=label, max_length=max_length),
            model=model,
            data=data,
            out=out,
            epochs=epochs,
            lr=lr,
            precision=precision,  # type: ignore[arg-type]
            seed=seed,
            device=device,
            on_event=on_event,
        )
    told = reporting.quality_line(record, record["classes"])
    out_console.print(
        f"{out}: {record['parameters']:,} parameters, {told} on report rows", highlight=False, soft_wrap=True
    )


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
    rule: Rule = None,
    tau: Tau = None,
    multiple_of: MultipleOf = None,
    min_share: MinShare = None,
    exclude: Exclude = None,
    keep: Keep = None,
    calibration_share: Calibration = None,
    seed: Seed = 0,
    device: Device = "cpu",
    as_json: AsJson = False,
) -> None:
    """Dry run: look at the spectra and choose the widths. Nothing is trained, no run is touched.

    With a FOLDER that holds a plan, choose them anew from its spectra: no model, no data, seconds. What is not given
    stays as it was, widths changed by hand too.

    \b
    rmtkd plan sst2 --model teacher --data DIR --out runs/sst2 --target 25%params
    rmtkd plan runs/sst2 --target 20%params --keep layer.0.ffn=160
    """
    from rmtkd import compression, recipes
    from rmtkd.checkpoint import RunFolder
    from rmtkd.schedule import Options

    shape = _plan_options(target, rule, tau, multiple_of, min_share, exclude, keep)
    if recipe not in recipes.names() and Path(recipe).is_dir():
        unused = {
            "--model": model,
            "--data": data,
            "--columns": columns,
            "--label": label,
            "--max-length": max_length,
            "--calibration-share": calibration_share,
        }
        _plan_anew(Path(recipe), out, shape, [name for name, value in unused.items() if value is not None], as_json)
        return
    task = recipes.get(recipe, columns=columns, label=label, max_length=max_length)
    if out is None:
        raise typer.BadParameter("a folder for the plan is needed: pass --out FOLDER.")
    options: dict[str, Any] = {"target": task.options.get("target"), **shape, "seed": seed, "device": device}
    if calibration_share is not None:
        options["calibration_share"] = calibration_share
    Options(**options)  # before anything takes time
    RunFolder.check_free(out)
    source = task.load(_needed(model))
    rows = task.rows(data, source, seed)
    log_console.print(rows.note, highlight=False, soft_wrap=True)
    made, spectrums = compression.plan(
        source.model.to(device),
        calibration=compression.share_of(rows.train, Options(**options).calibration_share),
        example=task.example(source.model, rows),
        **options,
    )
    RunFolder.for_plan(out).save_plan(made, spectrums)
    _show_plan(made, out, as_json=as_json)


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
    _show_plan(made, place, as_json=as_json)


def _show_plan(made: "Plan", out: Path, *, as_json: bool) -> None:
    from rmtkd import reporting

    if as_json:
        sys.stdout.write(made.to_json() + "\n")
        return
    out_console.print(reporting.plan_table(made, out_console.width))
    for note in reporting.plan_notes(made):
        out_console.print(note, highlight=False, soft_wrap=True, markup=False)
    out_console.print(f"saved {out / 'plan.json'}", highlight=False, soft_wrap=True)


@app.command()
def compress(
    recipe: RecipeName,
    out: Annotated[Path, typer.Option(help="Run folder; new, or holding only a plan.")],
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
    target: Target = None,
    rule: Rule = None,
    tau: Tau = None,
    granularity: Annotated[
        str | None, typer.Option(help="What is cut between recoveries: site, layer or round.")
    ] = None,
    epochs: Annotated[float | None, typer.Option(help="Recovery of the whole run, in epochs; 0 cuts only.")] = None,
    lr: Annotated[float | None, typer.Option(help="Peak learning rate of recovery.")] = None,
    alpha: Annotated[float | None, typer.Option(help="Weight of the labels against the teacher.")] = None,
    temperature: Annotated[float | None, typer.Option(help="Of both softmaxes.")] = None,
    teacher: Annotated[str | None, typer.Option(help="previous (before the cut) or original.")] = None,
    tolerance: Annotated[
        float | None,
        typer.Option(help="Largest loss of selection accuracy (0.02 is two points); else roll back."),
    ] = None,
    max_rounds: Annotated[int | None, typer.Option(help="Stop after as many rounds.")] = None,
    multiple_of: MultipleOf = None,
    min_share: MinShare = None,
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
    rmtkd compress sst2 --model teacher --data DIR --out runs/sst2 --epochs 2
    rmtkd compress sst2 --model teacher --data DIR --out runs/sst2 --plan runs/sst2/plan.json
    rmtkd compress digits --out runs/digits   (trains its own teacher first)
    rmtkd compress text --model MY_CHECKPOINT --data rows.csv --columns text --label label --out runs/mine
    """
    from rmtkd import compression, recipes
    from rmtkd.checkpoint import RunFolder
    from rmtkd.errors import OptionError
    from rmtkd.planning import Plan
    from rmtkd.progress import watcher
    from rmtkd.schedule import Options
    from rmtkd.sites import find_sites
    from rmtkd.teaching import train_teacher

    task = recipes.get(recipe, columns=columns, label=label, max_length=max_length)
    shape = _plan_options(target, rule, tau, multiple_of, min_share, exclude, keep)
    given = {
        "calibration_share": calibration_share,
        "granularity": granularity,
        "epochs": epochs,
        "teacher": teacher,
        "tolerance": tolerance,
        "max_rounds": max_rounds,
    }
    steps = {
        name: value for name, value in (("lr", lr), ("alpha", alpha), ("temperature", temperature)) if value is not None
    }
    options: dict[str, Any] = {
        **task.options,
        **shape,
        **{name: value for name, value in given.items() if value is not None},
        "precision": precision,
        "seed": seed,
        "device": device,
    }
    options["recovery"] = replace(options.get("recovery", Options().recovery), **steps)
    if plan_file is not None:
        if shape:
            flags = ", ".join(f"--{name.replace('_', '-')}" for name in shape)
            raise OptionError(
                f"with --plan the plan decides. Got {flags} too. Make the plan anew with them first: "
                "`rmtkd plan FOLDER`, which takes seconds; or leave out --plan."
            )
        options.pop("target", None)  # the recipe's
    elif (out / "plan.json").exists():
        note = f"{out / 'plan.json'} is not applied: a new plan is made. To apply it: --plan {out / 'plan.json'}"
        log_console.print(note, highlight=False, soft_wrap=True, markup=False)
    Options(**options)  # before anything takes time
    RunFolder.check_free(out)
    if model is None and task.needs_no_checkpoint:
        teacher_folder = out.absolute().with_name(f"{out.absolute().name}-teacher")
        if teacher_folder.exists():
            log_console.print(f"no --model: using the teacher in {teacher_folder}", highlight=False, soft_wrap=True)
        else:
            if plan_file is not None:
                Plan.read(plan_file)  # a broken one is not worth a teacher
            log_console.print(f"no --model: training a teacher into {teacher_folder}", highlight=False, soft_wrap=True)
            with watcher(log_console) as on_event:
                train_teacher(task, out=teacher_folder, seed=seed, device=device, on_event=on_event)
        model = str(teacher_folder)
    model = _needed(model)
    command = {
        "recipe": recipe,
        "model": str(Path(model).absolute()) if Path(model).exists() else model,
        "data": None if data is None else str(data.absolute()),
        "columns": columns,
        "label": label,
        "max_length": max_length,
    }
    with _prepared(command, seed) as (given_to_run, on_event):
        made = None if plan_file is None else Plan.read(plan_file, sites=find_sites(given_to_run["model"]))
        result = compression.compress(
            **given_to_run, plan=made, control=control, out=out, command=command, on_event=on_event, **options
        )
    _show_result(result, out, as_json=as_json)


@app.command()
def resume(
    run: Annotated[Path, typer.Argument(help="Run folder of `rmtkd compress` that was stopped.")],
    model: Annotated[str | None, typer.Option(help="Where the model is now, if it was moved.")] = None,
    data: Annotated[Path | None, typer.Option(help="Where the rows are now, if they were moved.")] = None,
    as_json: AsJson = False,
) -> None:
    """Go on with a run that was stopped anywhere, to the same result.

    \b
    rmtkd resume runs/sst2
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
    command |= {key: str(value) for key, value in (("model", model), ("data", data)) if value is not None}
    with _prepared(command, config["options"]["seed"]) as (given_to_run, on_event):
        result = compression.resume(run, **given_to_run, on_event=on_event)
    _show_result(result, run, as_json=as_json)


@app.command()
def evaluate(
    model_dir: Annotated[str, typer.Argument(help="Model folder, compressed or not.")],
    recipe: Annotated[str, typer.Option(help="The task whose columns the rows have.")],
    file: Annotated[Path | None, typer.Option(help="File of labelled rows; the report rows by default.")] = None,
    data: Data = None,
    columns: Columns = None,
    label: Label = None,
    max_length: MaxLength = None,
    device: Device = "cpu",
    as_json: AsJson = False,
) -> None:
    """Accuracy and F1 of a model on labelled rows.

    \b
    rmtkd evaluate runs/sst2/model --recipe sst2 --file rows.parquet --json
    rmtkd evaluate runs/mine/model --recipe text --file rows.csv --columns text --label label
    """
    from rmtkd import recipes, reporting
    from rmtkd.environment import check_device
    from rmtkd.measurement import quality

    task = recipes.get(recipe, columns=columns, label=label, max_length=max_length)
    check_device(device)
    source = task.load(model_dir)
    if file is None:
        everything = task.rows(data, source, 0)
        log_console.print(everything.note, highlight=False, soft_wrap=True)
        rows = everything.report
    else:
        rows = task.file_rows(file, source)
    if rows.labels is None:
        raise DataError("rows that are evaluated must have labels. Got no --label. Name the column of labels.")
    result = {name: asdict(estimate) for name, estimate in quality(source.model.to(device), rows).items()}
    if as_json:
        sys.stdout.write(json.dumps(result) + "\n")
    else:
        out_console.print(reporting.quality_line(result, len(source.labels)), highlight=False, soft_wrap=True)


@app.command()
def check(
    model: Annotated[str, typer.Argument(help="Model folder, or a name on the hub.")],
    recipe: Annotated[str | None, typer.Option(help="The task whose rows are used; random tokens by default.")] = None,
    data: Data = None,
    columns: Columns = None,
    as_json: AsJson = False,
) -> None:
    """Try on a model what a compression would do to it, site by site. Exit code 1 if a site fails.

    \b
    rmtkd check MY_CHECKPOINT
    rmtkd check MY_CHECKPOINT --recipe sst2 --data DIR --json
    """
    from rmtkd import conformance, recipes
    from rmtkd.recipes.checkpoints import load_any_classifier

    if recipe is None and data is not None:
        raise typer.BadParameter("--data needs --recipe NAME, which says what the rows mean.")
    if recipe is None:
        verdicts = conformance.check(load_any_classifier(model))
    else:
        task = recipes.get(recipe, columns=columns)
        source = task.load(model)
        verdicts = conformance.check(source.model, task.rows(data, source, 0).train)
    if as_json:
        sys.stdout.write(json.dumps([asdict(verdict) for verdict in verdicts], indent=1) + "\n")
    else:
        out_console.print(conformance.verdict_table(verdicts))
    raise typer.Exit(0 if all(verdict.ok for verdict in verdicts) else 1)


@app.command("ls")
def list_recipes() -> None:
    """The tasks that come with rmtkd.

    \b
    rmtkd ls
    """
    from rmtkd import recipes

    for name in recipes.names():
        out_console.print(f"{name:8} {recipes.get(name).describe}", highlight=False, soft_wrap=True)


@app.command()
def env() -> None:
    """Versions and machine, to paste into a bug report.

    \b
    rmtkd env
    """
    from rmtkd.environment import machine, versions

    for name, value in {**versions(), **machine()}.items():
        out_console.print(f"- {name}: {value}", highlight=False, soft_wrap=True)


def main() -> None:
    """Run the command line; errors of rmtkd are one message, not a traceback."""
    try:
        app()
    except KeyboardInterrupt:
        _fail("interrupted", "stopped at once. A run that had begun goes on with: rmtkd resume RUN")
    except RmtkdError as error:
        _fail(type(error).__name__, str(error))
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in EXTRAS:
            raise
        _fail("missing package", f"{error.name} must be installed for this. Run: pip install 'rmtkd[text,demo]'.")


def _fail(kind: str, message: str) -> NoReturn:
    log_console.print(f"[bold red]error:[/] {kind}", highlight=False)
    log_console.print(message, markup=False, highlight=False, soft_wrap=True)
    sys.exit(2)


def _plan_options(
    target: str | None,
    rule: str | None,
    tau: float | None,
    multiple_of: int | None,
    min_share: float | None,
    exclude: list[str] | None,
    keep: list[str] | None,
) -> dict[str, Any]:
    """What shapes a plan, as far as it is given."""
    from rmtkd.planning import parse_keep

    given = {
        "target": target,
        "rule": rule,
        "tau": tau,
        "multiple_of": multiple_of,
        "min_share": min_share,
        "exclude": tuple(exclude) if exclude else None,
        "keep": parse_keep(keep) if keep else None,
    }
    return {name: value for name, value in given.items() if value is not None}


@contextmanager
def _prepared(command: Mapping[str, Any], seed: int) -> Iterator[tuple[dict[str, Any], "Listener"]]:
    """Model, rows and extra files of a run, and who watches it."""
    from rmtkd import recipes
    from rmtkd.progress import watcher

    task = recipes.get(command["recipe"], **{name: command[name] for name in ("columns", "label", "max_length")})
    source = task.load(command["model"])
    rows = task.rows(None if command["data"] is None else Path(command["data"]), source, seed)
    log_console.print(rows.note, highlight=False, soft_wrap=True)
    with tempfile.TemporaryDirectory() as written, watcher(log_console) as on_event:
        if source.tokenizer is not None:
            source.tokenizer.save_pretrained(written)
        given = {
            "model": source.model,
            "train": rows.train,
            "selection": rows.selection,
            "report": rows.report,
            "example": task.example(source.model, rows),
            "extra_files": sorted(Path(written).iterdir()),
        }
        yield given, on_event


def _show_result(result: "Compressed", out: Path, *, as_json: bool) -> None:
    """The result, or what there is of it and how to go on."""
    from rmtkd import reporting

    if not result.record["finished"]:
        so_far = out / "model-so-far"
        shutil.rmtree(so_far, ignore_errors=True)
        result.save(so_far)
    if as_json:
        sys.stdout.write(json.dumps(result.record, indent=1) + "\n")
    else:
        out_console.print(reporting.plan_table(result.plan, out_console.width))
        for note in reporting.plan_notes(result.plan):
            out_console.print(note, highlight=False, soft_wrap=True, markup=False)
        out_console.print(reporting.summary(result.record))
    if not result.record["finished"]:
        log_console.print(f"the model as it is: {out}/model-so-far", highlight=False, soft_wrap=True)
        log_console.print(f"continue with:  rmtkd resume {out}", highlight=False, soft_wrap=True)
        sys.exit(130)
    if not as_json:
        out_console.print(
            f"{out}/summary.json holds the record, {out}/model the model: rmtkd.load({str(out / 'model')!r})",
            highlight=False,
            soft_wrap=True,
        )


def _needed(model: str | None) -> str:
    if model is None:
        raise typer.BadParameter("this recipe needs a trained model: pass --model PATH_OR_HUB_NAME.")
    return model
