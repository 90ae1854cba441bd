"""Do 8-bit weights compose with the cut? A teacher and what was made of it, each in several runtimes, on SST-2.

    python benchmarks/export.py --teacher TEACHER --compressed MODEL --data DIR

Accuracy and agreement are of all 872 dev rows, agreement is with the teacher in PyTorch; latencies are interleaved
medians of all runtimes, of 1 and of 32 rows of 32 tokens, on one thread. Records are files in
`benchmarks/results/export/`, named after the weights; what has its record is not run again. Runtimes that are not
installed are left out.
"""

import argparse
import copy
import io
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import rmtkd
from records import cell
from rmtkd import batches as batching
from rmtkd import recipes
from rmtkd.checkpoint import checksum
from rmtkd.exports import FORMATS, formats, tracing
from rmtkd.measurement import count_disk_bytes, count_parameters, predict, proportion, time_forward
from rmtkd.recipes.recipe import Rows, Source

RESULTS = Path(__file__).parent / "results" / "export"
ENGINES = {
    "PyTorch fp32": None,
    "PyTorch int8": None,
    "ONNX Runtime fp32": ("onnx", False),
    "ONNX Runtime int8": ("onnx", True),
    "OpenVINO fp32": ("openvino", False),
    "OpenVINO int8": ("openvino", True),
}
"""The format and whether it is 8-bit, of those that are exported."""
ROWS = (1, 32)


def installed() -> list[str]:
    """The runtimes that are here."""
    return [name for name, how in ENGINES.items() if how is None or not formats.absent(FORMATS[how[0]], int8=how[1])]


def quantized(model: nn.Module) -> nn.Module:
    """PyTorch's own dynamic quantisation: linear maps in 8 bits, embeddings as they were."""
    with tracing.quiet():
        small = torch.ao.quantization.quantize_dynamic(copy.deepcopy(model), {nn.Linear}, dtype=torch.qint8)
    small.register_parameter("device_of_benchmark", nn.Parameter(torch.empty(0), requires_grad=False))
    return small


def engine(name: str, source: Source, rows: Rows, work: Path) -> tuple[nn.Module, int]:
    """A model in a runtime, called as PyTorch's are, and the size of its file in bytes."""
    how = ENGINES[name]
    if name == "PyTorch fp32":
        return source.model, count_disk_bytes(source.model)
    if how is None:
        small, stored = quantized(source.model), io.BytesIO()
        torch.save(small.state_dict(), stored)
        return small, len(stored.getvalue())
    to, int8 = how
    folder = work / f"{to}{'-int8' * int8}"
    if not folder.exists():
        rmtkd.export(source.model, folder, to=to, int8=int8, rows=rows.report, repeats=1)
    networks = [path for path in folder.iterdir() if path.name != "export.json"]
    runner = formats.start(FORMATS[to], folder / FORMATS[to].file)
    return runner, sum(path.stat().st_size for path in networks)


def answer(model: nn.Module, source: Source, rows: Rows) -> tuple[Tensor, Tensor]:
    """Answers and labels of all report rows."""
    names = tracing.input_names(source.model)
    scores, labels = predict(model, [tracing.complete(batch, names) for batch in rows.report])
    return scores.argmax(-1), labels


def quality_cell(name: str, source: Source, rows: Rows, work: Path, teacher: Tensor) -> dict[str, Any]:
    """How large a model is in a runtime, how well it does, and how often it says what the teacher says."""
    model, size = engine(name, source, rows, work)
    answers, labels = answer(model, source, rows)
    return {
        "engine": name,
        "parameters": count_parameters(source.model),
        "bytes": size,
        "accuracy": asdict(proportion(int((answers == labels).sum()), len(labels))),
        "agreement": asdict(proportion(int((answers == teacher).sum()), len(labels))),
    }


def latency_cell(models: dict[str, tuple[Source, Path]], rows: Rows, repeats: int) -> dict[str, Any]:
    """Times of all models in all runtimes, interleaved, in milliseconds."""
    engines = {
        f"{kind}, {name}": engine(name, source, rows, work)[0]
        for kind, (source, work) in models.items()
        for name in installed()
    }
    teacher, _ = models["teacher"]
    task = recipes.get("sst2")
    batch = tracing.complete(task.example(teacher.model, rows), tracing.input_names(teacher.model))
    found: dict[str, Any] = {name: {} for name in engines}
    for count in ROWS:
        times = time_forward(list(engines.values()), batching.head(batch, count), repeats=repeats)
        for name, latency in zip(engines, times, strict=True):
            found[name][str(count)] = asdict(latency)
    return {"latency_ms": found}


def table(records: dict[str, dict[str, Any]], latency: dict[str, Any]) -> str:
    """The records as Markdown."""
    lines = [
        "| model | runtime | parameters | MB | accuracy | same answer as the teacher | ms, 1 × 32 | ms, 32 × 32 |",
        "|---|---|--:|--:|--:|--:|--:|--:|",
    ]
    for name, record in records.items():
        kind, runtime = name.split(", ", 1)
        times = latency["latency_ms"][name]
        accuracy, agreement = record["accuracy"], record["agreement"]
        lines.append(
            f"| {kind} | {runtime} | {record['parameters'] / 1e6:.2f} M | {record['bytes'] / 1e6:.1f} "
            f"| {accuracy['value']:.2%} ± {accuracy['stderr']:.2%} | {agreement['value']:.2%} "
            f"| {times['1']['median']:.2f} | {times['32']['median']:.1f} |"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what has no record, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--compressed", required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("runs/export"), help="Where exported networks are kept.")
    parser.add_argument("--repeats", type=int, default=30)
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(1)
    task = recipes.get("sst2")
    models = {}
    for kind in ("teacher", "compressed"):
        source = task.load(getattr(chosen, kind))
        weights = checksum(dict(source.model.state_dict()))[:8]
        models[kind] = (source, chosen.work / f"{kind}-{weights}")
    teacher, _ = models["teacher"]
    rows = task.rows(chosen.data, teacher, 0)
    expected, _ = answer(teacher.model, teacher, rows)
    records = {
        f"{kind}, {name}": cell(
            RESULTS / f"sst2-{work.name}-{name.replace(' ', '_')}.json",
            lambda name=name, source=source, work=work: quality_cell(name, source, rows, work, expected),
        )
        for kind, (source, work) in models.items()
        for name in installed()
    }
    both = "-".join(work.name for _, work in models.values())
    latency = cell(RESULTS / f"sst2-latency-{both}.json", lambda: latency_cell(models, rows, chosen.repeats))
    print(table(records, latency))


if __name__ == "__main__":
    main()
