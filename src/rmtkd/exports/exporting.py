"""The one verb: write a classifier in a format, once it is shown to be the same network."""

import json
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import nn

from rmtkd import batches as batching
from rmtkd.artifact import vouch
from rmtkd.batches import Batch
from rmtkd.conformance import random_batches
from rmtkd.environment import machine, versions
from rmtkd.errors import ExportError
from rmtkd.exports.comparison import TOLERANCE, compare, hold_to, in_shapes, some_of
from rmtkd.exports.formats import Format, find_format, start
from rmtkd.exports.tracing import IMAGES, OUTPUT, complete, input_names, quiet, told, trace
from rmtkd.measurement import count_disk_bytes, quality, time_forward
from rmtkd.pretrained import save_tokenizer
from rmtkd.sites import longest_input, random_images
from rmtkd.writing import check_new, new_folder, write_json

FORMAT_VERSION = 1
RECORD = "export.json"
PYTORCH = "PyTorch"
BATCHES = (1, 32)
"""Rows of the batches that are timed."""
RANDOM_TOKENS = 4096
"""Positions of the random rows that are compared where there are no others."""
LENGTH = 64
"""Tokens of the batch that is timed where none is given."""


def export(
    model: nn.Module,
    folder: str | Path,
    *,
    to: str = "onnx",
    rows: Iterable[Batch] | None = None,
    example: Batch | None = None,
    tokenizer: Any = None,
    preprocessor: Mapping[str, Any] | None = None,
    int8: bool = False,
    repeats: int = 20,
) -> dict[str, Any]:
    """Write a model as a file for another runtime, checked against PyTorch on rows and timed beside it.

    Batch and length of all inputs are dynamic. The folder gets the network, the tokenizer and `export.json`.

    Args:
        model: a classifier of a supported family, of any widths, on the CPU in float32; left as it was.
        folder: where to; must not exist.
        to: the format: see `rmtkd.exports.FORMATS`.
        rows: rows that it is compared on; random tokens by default.
        example: the batch that is timed, its first 32 rows and its first row; 32 rows of 64 random tokens by default.
        tokenizer: travels with the network.
        preprocessor: of images, travels with it as `preprocessor_config.json`.
        int8: make weights 8-bit integers, and say what it costs.
        repeats: timed passes.

    Returns:
        What `export.json` holds.

    Raises:
        ExportError: if the folder exists, a package is missing, the exporter does not know an operation, or what it
            wrote is not the same network. Nothing is left behind.
        OptionError: if there is no such format, or it has no 8-bit form.
        UnsupportedModelError: if the model is of no known family, or not in float32.
        DataError: if rows are none that it takes.
    """
    form, folder = find_format(to, int8=int8), check_free(Path(folder))
    names = input_names(model)
    whole = [complete(batch, names) for batch in (random_batches(model, RANDOM_TOKENS) if rows is None else rows)]
    given = [piece for batch in whole for piece in _at_most(form.most_rows, batch)]
    shown = list(in_shapes(some_of(given)))
    longest = longest_input(model) or max(batching.length(batch) for batch in given)
    timed = complete(_random_example(model, min(longest, LENGTH)) if example is None else example, names)
    if form.most_tokens is not None:
        longest = min(longest, max(form.most_tokens, *(batching.length(batch) for batch in (timed, *given))))

    if int8 and names == IMAGES:
        raise ExportError(
            "8-bit weights are for networks of matrix products. Got a convolutional one. Leave --int8 out; nothing "
            "was written."
        )
    program = trace(model, names, timed, longest, form.most_rows)
    with new_folder(folder) as partial, tempfile.TemporaryDirectory() as aside:
        full = Path(aside if int8 else partial) / form.file
        with quiet(), told(model, form.describe):
            form.write(program, full)
        engines = {form.describe: _open(model, form, full)}
        sizes = {form.describe: _size(full.parent)}
        checks = {form.describe: hold_to(compare(model, engines[form.describe], shown), int8=False)}
        if int8:
            assert form.quantize is not None, "find_format says so"
            name = f"{form.describe}, int8"
            with quiet(), told(model, name):
                form.quantize(full, partial / form.file)
            engines[name] = _open(model, form, partial / form.file)
            sizes[name] = _size(partial)
            compare(model, engines[name], shown)  # it runs in every shape; how well it does is told of whole rows
            checks[name] = hold_to(compare(model, engines[name], given), int8=True)
        if tokenizer is not None:
            save_tokenizer(tokenizer, partial, names)
        if preprocessor is not None:
            write_json(partial / "preprocessor_config.json", dict(preprocessor))
        record = {
            "format_version": FORMAT_VERSION,
            "to": to,
            "int8": int8,
            "file": form.file,
            "model_class": type(model).__name__,
            "inputs": list(names),
            "output": OUTPUT,
            "most_rows": form.most_rows,
            "longest": longest,
            "labels": _labels(model),
            "checked_on": f"random {'images' if names == IMAGES else 'tokens'}" if rows is None else "rows",
            "tolerance": TOLERANCE,
            "checks": {name: asdict(check) for name, check in checks.items()},
            "measured": _measure({PYTORCH: model, **engines}, sizes, timed, given if int8 else [], repeats),
            "files": {file.name: vouch(file) for file in _files(partial)},
            "versions": versions(),
            "machine": machine(),
        }
        if form.facts is not None:
            record |= form.facts(partial / form.file)
        write_json(partial / RECORD, record)
    return json.loads(json.dumps(record))


def check_free(folder: Path) -> Path:
    """Return the folder if it can come into being.

    Raises:
        ExportError: if it exists.
    """
    return check_new(folder, "the folder of an export", ExportError)


def table(record: Mapping[str, Any]) -> Table:
    """What was measured, one line for PyTorch and one for every exported network."""
    lines = record["measured"]
    threads = lines[0]["latency_ms"][0]["threads"]
    on = f"{threads} {'thread' if threads == 1 else 'threads'}"
    title = f"{record['model_class']}, checked on {record['checked_on']}, timed on {on}"
    made = Table(title=title, title_justify="left")
    of = "images" if record["inputs"] == list(IMAGES) else "tokens"
    sizes = [f"{at['batch']} x {at['length']}" if of == "tokens" else at["batch"] for at in lines[0]["latency_ms"]]
    columns = ["", "MB", *(f"ms, {size} {of}" for size in sizes)]
    for name in [*columns, "difference", "same answers", "accuracy"]:
        made.add_column(name, justify="right" if name else "left")
    for line in lines:
        check, accuracy = record["checks"].get(line["engine"]), line["accuracy"]
        made.add_row(
            line["engine"],
            f"{line['bytes'] / 1e6:.1f}",
            *(f"{at['median']:.2f} ± {at['iqr'] / 2:.2f}" for at in line["latency_ms"]),
            f"{check['difference']:.0e}" if check else "",
            f"{check['agreement']:.2%} of {check['rows']}" if check else "",
            f"{accuracy['value']:.2%} ± {accuracy['stderr']:.2%}" if accuracy else "",
        )
    return made


def _open(model: nn.Module, form: Format, path: Path) -> nn.Module:
    with told(model, form.describe):
        return start(form, path)


def _measure(
    engines: Mapping[str, nn.Module], sizes: Mapping[str, int], example: Batch, rows: Sequence[Batch], repeats: int
) -> list[dict[str, Any]]:
    """Size, time and accuracy of PyTorch's model, which is the first, and of exported networks, side by side."""
    model, *_ = engines.values()
    times = [time_forward(list(engines.values()), batching.head(example, count), repeats=repeats) for count in BATCHES]
    labelled = bool(rows) and all(batching.labels(batch) is not None for batch in rows)
    return [
        {
            "engine": name,
            "bytes": sizes.get(name) or count_disk_bytes(model),
            "latency_ms": [asdict(latencies[i]) for latencies in times],
            "accuracy": asdict(quality(engine, rows)["accuracy"]) if labelled else None,
        }
        for i, (name, engine) in enumerate(engines.items())
    ]


def _at_most(rows: int | None, batch: Batch) -> list[Batch]:
    """The batch in pieces of at most so many rows."""
    return [batch] if rows is None else batching.split(batch, -(-batching.rows(batch) // rows))


def _random_example(model: nn.Module, length: int) -> Batch:
    if (images := random_images(model, max(BATCHES))) is not None:
        return images
    config: Any = model.config
    ids = torch.randint(0, config.vocab_size, (max(BATCHES), length), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids}


def _labels(model: nn.Module) -> list[str]:
    config: Any = model.config
    return [config.id2label[i] for i in range(config.num_labels)]


def _files(folder: Path) -> list[Path]:
    return sorted(file for file in folder.iterdir() if file.is_file())


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in _files(folder))
