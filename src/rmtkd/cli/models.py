"""Commands on single models: train, evaluate, check."""

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from rmtkd.cli.console import app, log, log_console, out_console, say
from rmtkd.cli.options import (
    AsJson,
    Columns,
    Data,
    Device,
    Label,
    MaxLength,
    Model,
    Precision,
    RecipeName,
    Seed,
    check_without_recipe,
)
from rmtkd.errors import DataError


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
    """Train a teacher: what is to be compressed, on the rows that the recipe trains on.

    After Ctrl-C, or worse, the same command goes on.

    \b
    $ rmtkd train sst2 --model PATH_OR_HUB_NAME --data DIR --out teacher
    $ rmtkd train digits_cnn --out runs/digits-images-teacher
    runs/digits-images-teacher: 42,874 parameters, accuracy 99.33% ± 0.38%,
    macro F1 99.32% ± 0.39% (n = 450) on report rows
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
    say(f"{out}: {record['parameters']:,} parameters, {told} on report rows")


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
    """Accuracy and F1 of a model on labelled rows, with the spread.

    \b
    $ rmtkd evaluate runs/digits/model --recipe digits
    accuracy 96.00% ± 0.92%, macro F1 96.13% ± 0.88% (n = 450)
    $ rmtkd evaluate runs/digits/model --recipe digits --json
    {"accuracy": {"value": 0.96, "n": 450, "stderr": 0.0092376...
    $ rmtkd evaluate m --recipe text --file rows.csv --columns a,b --label c
    """
    from rmtkd import recipes, reporting
    from rmtkd.environment import check_device
    from rmtkd.measurement import quality

    task = recipes.get(recipe, columns=columns, label=label, max_length=max_length)
    check_device(device)
    source = task.load(model_dir, data)
    if file is None:
        everything = task.rows(data, source, 0)
        log(everything.note)
        rows = everything.report
    else:
        rows = task.file_rows(file, source)
    if rows.labels is None:
        raise DataError(
            "rows that are evaluated must have labels. Got no --label. Name the column of labels: --label COLUMN"
        )
    result = {name: asdict(estimate) for name, estimate in quality(source.model.to(device), rows).items()}
    if as_json:
        sys.stdout.write(json.dumps(result) + "\n")
    else:
        say(reporting.quality_line(result, len(task.labels or source.labels)))


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
    $ rmtkd check MY_CHECKPOINT --recipe sst2 --data DIR --json
    $ rmtkd check runs/digits-teacher
    site              │ width │ full width │ cut to │     cut │ verdict
    embeddings.word   │   128 │    4.1e-16 │     64 │ 1.8e-08 │ ok
    layer.0.query_key │    32 │    3.6e-16 │     16 │ 1.9e-08 │ ok
    ...
    all 13 ok
    """
    from rmtkd import conformance, recipes
    from rmtkd.recipes.checkpoints import load_any_classifier

    if recipe is None:
        check_without_recipe({"--data": data, "--columns": columns})
        verdicts = conformance.check(load_any_classifier(model))
    else:
        task = recipes.get(recipe, columns=columns)
        source = task.load(model, data)
        verdicts = conformance.check(source.model, task.rows(data, source, 0).train)
    if as_json:
        sys.stdout.write(json.dumps([asdict(verdict) for verdict in verdicts], indent=1) + "\n")
    else:
        out_console.print(conformance.verdict_table(verdicts))
    raise typer.Exit(0 if all(verdict.ok for verdict in verdicts) else 1)


@app.command()
def inspect(
    folder: Annotated[Path, typer.Argument(help="Model folder, such as RUN/model.")],
    as_json: AsJson = False,
) -> None:
    """Verify a model folder – every file, and the model by its self-test – and tell what it is.

    \b
    $ rmtkd inspect runs/digits/model
    runs/digits/model: whole, and as it was written
    - model: RmtkdBertForSequenceClassification, 160,666 parameters, 0.67 MB
    - widths: embeddings.word 48, layer.0.heads 4, layer.0.head 8, ...
    - self-test: answers differ by 0.0e+00 from the stored ones, of 0.001 allowed
    ...
    """
    from rmtkd import artifact

    found = artifact.inspect(folder)
    if as_json:
        sys.stdout.write(json.dumps(asdict(found), indent=1) + "\n")
    else:
        for line in found.lines():
            say(line)


@app.command()
def seal(
    folder: Annotated[Path, typer.Argument(help="Model folder, such as RUN/model.")],
    files: Annotated[list[str], typer.Argument(help="Files in it that you have changed, added or removed.")],
) -> None:
    """Vouch for files of a model folder that you have changed, such as the model card. The model itself stays.

    \b
    $ rmtkd seal runs/digits/model README.md
    runs/digits/model: sealed, with README.md
    """
    from rmtkd import artifact

    artifact.seal(folder, files)
    say(f"{folder}: sealed, with {', '.join(files)}")
