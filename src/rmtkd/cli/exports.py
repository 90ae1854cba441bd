"""The command that writes models for other runtimes: export."""

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from rmtkd.cli.console import app, log, out_console, say
from rmtkd.cli.options import AsJson, Columns, Data, Label, MaxLength, check_without_recipe


@app.command("export")
def export_model(
    model: Annotated[str, typer.Argument(help="Model folder, compressed or not, or a name on the hub.")],
    out: Annotated[Path, typer.Option(help="Folder for the exported model; must be new.")],
    to: Annotated[str, typer.Option(help="Format: onnx, torch-export, openvino, executorch.")] = "onnx",
    int8: Annotated[bool, typer.Option("--int8", help="Weights as 8-bit integers; says what it costs.")] = False,
    recipe: Annotated[
        str | None, typer.Option(help="The task on whose report rows it is checked; random tokens by default.")
    ] = None,
    data: Data = None,
    columns: Columns = None,
    label: Label = None,
    max_length: MaxLength = None,
    as_json: AsJson = False,
) -> None:
    """Write a model for another runtime, checked against PyTorch on rows and timed beside it.

    \b
    $ rmtkd export runs/sst2/model --int8 --recipe sst2 --data DIR --out ONNX
    $ rmtkd export runs/digits/model --recipe digits --out runs/digits/onnx
                 │  MB │ ms, 1 x 17 tokens │ difference │   same answers
    PyTorch      │ 0.6 │       3.87 ± 3.05 │            │
    ONNX Runtime │ 0.7 │       0.45 ± 0.05 │      5e-07 │ 100.00% of 316
    """
    from rmtkd import exports, recipes
    from rmtkd.recipes.checkpoints import load_any_classifier, load_tokenizer

    exports.find_format(to, int8=int8)
    exports.check_free(out)
    if recipe is None:
        check_without_recipe({"--data": data, "--columns": columns, "--label": label, "--max-length": max_length})
        network = load_any_classifier(model)
        log("checked on random tokens or images: name a --recipe to check on rows")
        record = exports.export(network, out, to=to, int8=int8, tokenizer=load_tokenizer(model, network))
    else:
        task = recipes.get(recipe, columns=columns, label=label, max_length=max_length)
        source = task.load(model, data)
        rows = task.rows(data, source, 0)
        record = exports.export(
            source.model,
            out,
            to=to,
            int8=int8,
            rows=rows.report,
            example=task.example(source.model, rows),
            tokenizer=source.tokenizer,
            preprocessor=source.preprocessor,
        )
    if as_json:
        sys.stdout.write(json.dumps(record) + "\n")
        return
    out_console.print(exports.table(record))
    rows = "any batch" if record["most_rows"] is None else f"batch up to {record['most_rows']}"
    if record["inputs"] == ["pixel_values"]:
        say(f"{out / record['file']}: pixel_values, float32 of shape [batch, channels, height, width]; {rows}")
        return
    inputs = f"{', '.join(record['inputs'])}, int64 of shape [batch, length]"
    say(f"{out / record['file']}: {inputs}; {rows}, length up to {record['longest']:,}")
