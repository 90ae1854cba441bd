"""The formats as data: how each writes a traced network, runs it, and makes it 8 bits wide."""

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from rmtkd.errors import ExportError, OptionError, check_choice
from rmtkd.exports.tracing import MOST_ROWS, OUTPUT, quiet

Call = Callable[[Mapping[str, Tensor]], Tensor]
"""Class scores from the inputs by name."""


@dataclass(frozen=True, kw_only=True)
class Format:
    """One format.

    Attributes:
        describe: what runs it, in a few words.
        file: name of the file of the network.
        packages: modules that must be there, by the names that they are imported by.
        write: write a traced network to a file.
        start: make a file ready to run, on so many threads.
        quantize: make an 8-bit file of a written one; None where it is not offered.
        facts: what else is told of a written file.
        most_rows: largest batch.
        extra: the extra of `rmtkd` that brings the packages.
    """

    describe: str
    file: str
    packages: tuple[str, ...]
    write: Callable[[ExportedProgram, Path], None]
    start: Callable[[Path, int], Call]
    quantize: Callable[[Path, Path], None] | None = None
    facts: Callable[[Path], dict[str, Any]] | None = None
    most_rows: int = MOST_ROWS
    extra: str = ""


class Runner(nn.Module):
    """An exported network that is called as PyTorch's own are, `runner(**inputs)`, to be measured like them."""

    def __init__(self, call: Call):
        super().__init__()
        self.call = call
        self.nothing = nn.Parameter(torch.empty(0), requires_grad=False)  # says on which device it is

    def forward(self, **inputs: Tensor) -> Tensor:
        return self.call(inputs)


def find_format(name: str, *, int8: bool = False) -> Format:
    """The format of this name, if it can be used here.

    Raises:
        OptionError: if there is no such format, or it has no 8-bit form.
        ExportError: if a package is not installed.
    """
    found = FORMATS[check_choice("--to", name, FORMATS)]
    if int8 and found.quantize is None:
        offered = ", ".join(other for other, form in FORMATS.items() if form.quantize)
        raise OptionError(f"--int8 must go with a format that has it: {offered}. Got {name}. Leave --int8 out.")
    missing = [package for package in found.packages if importlib.util.find_spec(package) is None]
    if missing:
        raise ExportError(
            f"an export to {name} must have {', '.join(found.packages)}. Not installed: {', '.join(missing)}. "
            f"Run: pip install 'rmtkd[{found.extra}]'."
        )
    return found


def _write_torch(program: ExportedProgram, path: Path) -> None:
    torch.export.save(program, path)


def _start_torch(path: Path, threads: int) -> Call:
    module: Any = torch.export.load(path).module()  # threads are PyTorch's own
    return lambda inputs: module(**inputs)


def _write_onnx(program: ExportedProgram, path: Path) -> None:
    _, inputs = program.example_inputs or ((), {})
    names = list(inputs)
    written = torch.onnx.export(
        program,
        kwargs=dict(inputs),
        input_names=names,
        output_names=[OUTPUT],
        dynamic_shapes={name: {0: "batch", 1: "length"} for name in names},
        dynamo=True,
        verbose=False,
    )
    assert written is not None  # with dynamo=True
    written.save(path)


def _start_onnx(path: Path, threads: int) -> Call:
    import onnxruntime  # type: ignore[import-not-found]

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda inputs: torch.from_numpy(
        session.run([OUTPUT], {name: value.numpy() for name, value in inputs.items()})[0]
    )


def _quantize_onnx(source: Path, path: Path) -> None:
    """Weights of matrix products and of embeddings as 8-bit integers; activations are rounded as they come.

    One scale for each column of a matrix costs no time and less accuracy than one for all of it.
    """
    from onnxruntime.quantization import QuantType, quantize_dynamic  # type: ignore[import-not-found]

    kinds = ["MatMul", "Gemm", "Gather"]
    quantize_dynamic(source, path, op_types_to_quantize=kinds, weight_type=QuantType.QInt8, per_channel=True)


def _facts_onnx(path: Path) -> dict[str, Any]:
    import onnx  # type: ignore[import-not-found]

    sets = onnx.load(path, load_external_data=False).opset_import
    return {"opsets": {opset.domain or "ai.onnx": opset.version for opset in sets}}


FORMATS: dict[str, Format] = {
    "onnx": Format(
        describe="ONNX Runtime",
        file="model.onnx",
        packages=("onnx", "onnxscript", "onnxruntime"),
        extra="onnx",
        write=_write_onnx,
        start=_start_onnx,
        quantize=_quantize_onnx,
        facts=_facts_onnx,
    ),
    "torch-export": Format(
        describe="torch.export",
        file="model.pt2",
        packages=(),
        write=_write_torch,
        start=_start_torch,
    ),
}
"""By the names that `--to` takes."""


def start(form: Format, path: Path) -> Runner:
    """A written network, ready to run on as many threads as PyTorch has."""
    with quiet():
        return Runner(form.start(path, torch.get_num_threads()))
