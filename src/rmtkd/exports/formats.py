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
from rmtkd.exports.tracing import OUTPUT, dynamic, quiet

Call = Callable[[Mapping[str, Tensor]], Tensor]
"""Class scores from the inputs by name."""


@dataclass(frozen=True, kw_only=True)
class Format:
    """One format.

    Attributes:
        describe: what runs it, in a word or two.
        file: name of the file of the network.
        packages: modules that must be there, by the names that they are imported by.
        extra: the extra of `rmtkd` that brings them.
        write: write a traced network to a file.
        start: make a file ready to run, on so many threads.
        quantize: make an 8-bit file of a written one; None where it is not offered.
        quantize_packages: modules that it takes besides.
        facts: what else is told of a written file.
        most_rows: largest batch, where there is one.
        most_tokens: longest row, where it is not the model's to say, and no row that is given is longer.
    """

    describe: str
    file: str
    packages: tuple[str, ...] = ()
    extra: str = ""
    write: Callable[[ExportedProgram, Path], None]
    start: Callable[[Path, int], Call]
    quantize: Callable[[Path, Path], None] | None = None
    quantize_packages: tuple[str, ...] = ()
    facts: Callable[[Path], dict[str, Any]] | None = None
    most_rows: int | None = None
    most_tokens: int | None = None


class Runner(nn.Module):
    """An exported network that is called as PyTorch's own are, `runner(**inputs)`, to be measured like them."""

    def __init__(self, call: Call):
        super().__init__()
        self.call = call
        self.nothing = nn.Parameter(torch.empty(0), requires_grad=False)  # says on which device it is

    def forward(self, **inputs: Tensor) -> Tensor:
        return self.call(inputs)


def needed(form: Format, *, int8: bool = False) -> tuple[str, ...]:
    """The modules that an export takes."""
    return (*form.packages, *(form.quantize_packages if int8 else ()))


def absent(form: Format, *, int8: bool = False) -> list[str]:
    """Those that are not installed."""
    return [package for package in needed(form, int8=int8) if importlib.util.find_spec(package) is None]


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
    if missing := absent(found, int8=int8):
        raise ExportError(
            f"an export to {name} must have {', '.join(needed(found, int8=int8))}. Not installed: "
            f"{', '.join(missing)}. Run: pip install 'rmtkd[{found.extra}]'."
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
        dynamic_shapes=dynamic(inputs, "batch", "length"),
        dynamo=True,
        verbose=False,
    )
    assert written is not None  # with dynamo=True
    for node in written.model.graph.all_nodes():
        node.metadata_props.clear()  # of the exporter's own debugging: 0.7 MB of a BERT of six layers
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


def _write_openvino(program: ExportedProgram, path: Path) -> None:
    import openvino  # type: ignore[import-not-found]

    network = openvino.convert_model(program)
    network.outputs[0].get_tensor().set_names({OUTPUT})
    openvino.save_model(network, path, compress_to_fp16=False)


def _start_openvino(path: Path, threads: int) -> Call:
    import openvino  # type: ignore[import-not-found]

    # Left alone it computes in bfloat16 where the processor can: faster, and another network.
    config = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}
    request = openvino.Core().compile_model(path, "CPU", config).create_infer_request()
    return lambda inputs: torch.from_numpy(
        request.infer({name: value.numpy() for name, value in inputs.items()})[OUTPUT].copy()
    )


def _quantize_openvino(source: Path, path: Path) -> None:
    """Weights as 8-bit integers, one scale for each column; the runtime rounds activations as they come."""
    import nncf  # type: ignore[import-not-found]
    import openvino  # type: ignore[import-not-found]

    network = openvino.Core().read_model(source)
    openvino.save_model(nncf.compress_weights(network, mode=nncf.CompressWeightsMode.INT8_SYM), path)


def _write_executorch(program: ExportedProgram, path: Path) -> None:
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import (  # type: ignore[import-not-found]
        XnnpackPartitioner,
    )
    from executorch.exir import to_edge_transform_and_lower  # type: ignore[import-not-found]

    lowered = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()]).to_executorch()
    with path.open("wb") as file:
        lowered.write_to_file(file)


def _start_executorch(path: Path, threads: int) -> Call:
    from executorch.extension.pybindings import portable_lib  # type: ignore[import-not-found]
    from executorch.runtime import Runtime  # type: ignore[import-not-found]

    portable_lib._unsafe_reset_threadpool(threads)  # of the whole process; the only way to say it from Python
    program = Runtime.get().load_program(path)
    method = program.load_method("forward")
    return lambda inputs: method.execute([value.contiguous() for value in inputs.values()])[0].clone()


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
    "torch-export": Format(describe="torch.export", file="model.pt2", write=_write_torch, start=_start_torch),
    "openvino": Format(
        describe="OpenVINO",
        file="openvino_model.xml",  # and .bin
        packages=("openvino",),
        extra="openvino",
        write=_write_openvino,
        start=_start_openvino,
        quantize=_quantize_openvino,
        quantize_packages=("nncf",),
    ),
    "executorch": Format(
        describe="ExecuTorch",
        file="model.pte",
        packages=("executorch",),
        extra="executorch",
        write=_write_executorch,
        start=_start_executorch,
        most_rows=32,  # memory is set aside for the largest batch of the longest rows
        most_tokens=128,
    ),
}
"""By the names that `--to` takes."""


def start(form: Format, path: Path) -> Runner:
    """A written network, ready to run on as many threads as PyTorch has."""
    with quiet():
        return Runner(form.start(path, torch.get_num_threads()))
