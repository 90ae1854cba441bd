"""From a classifier to a graph of operations with dynamic batch and, of texts, length."""

import inspect
import io
import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from rmtkd import batches as batching
from rmtkd.batches import Batch
from rmtkd.errors import DataError, ExportError, UnsupportedModelError
from rmtkd.measurement import evaluation
from rmtkd.sites import find_family, find_image_family

IMAGES = ("pixel_values",)
"""What image classifiers are called with, float32 of shape `(batch, channels, height, width)`."""
INPUTS = ("input_ids", "attention_mask", "token_type_ids")
"""What networks for texts are called with, int64 of shape `(batch, length)` each, in the order of an exported one."""
OUTPUT = "logits"
"""What an exported network gives: class scores, float32 of shape `(batch, classes)`."""


class _Scores(nn.Module):
    """The network with one tensor as its output."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, token_type_ids: Tensor | None = None
    ) -> Tensor:
        given = {"input_ids": input_ids, "attention_mask": attention_mask, "token_type_ids": token_type_ids}
        return batching.logits(self.model, {name: value for name, value in given.items() if value is not None})


class _ImageScores(_Scores):
    """The same for images."""

    def forward(self, pixel_values: Tensor) -> Tensor:  # type: ignore[override]
        return batching.logits(self.model, {"pixel_values": pixel_values})


def input_names(model: nn.Module) -> tuple[str, ...]:
    """The inputs of a network, token types among them where it knows more than one.

    Raises:
        UnsupportedModelError: if the network is of no known family, or not in float32 on the CPU.
    """
    is_of_images = find_image_family(model) is not None
    if not is_of_images:
        find_family(model)
    kinds = {f"{str(parameter.dtype).removeprefix('torch.')} on {parameter.device}" for parameter in model.parameters()}
    if kinds != {"float32 on cpu"}:
        came = ", ".join(sorted(kinds))
        raise UnsupportedModelError(
            f"a model that is exported must be in float32 on the cpu. Got {came}. Call model.float().cpu() before."
        )
    if is_of_images:
        return IMAGES
    known = inspect.signature(model.forward).parameters
    typed = "token_type_ids" in known and getattr(model.config, "type_vocab_size", 0) > 1
    return INPUTS if typed else INPUTS[:2]


def complete(batch: Batch, names: tuple[str, ...]) -> dict[str, Tensor]:
    """A batch with every input of an exported network: without a mask all positions are real, without types all are 0.

    Raises:
        DataError: if it is no mapping, or has inputs that the network does not take.
    """
    _, given = batching.inputs(batch) if not isinstance(batch, batching.Call) else ((), {})
    unknown = sorted({*given} - {*names})
    if unknown or names[0] not in given:
        came = ", ".join(unknown) or f"a {type(batch).__name__} without {names[0]}"
        raise DataError(
            f"rows for an export must be mappings with {', '.join(names)} as inputs. Got {came}. Pass such rows."
        )
    ids = given[names[0]]
    absent = {"attention_mask": torch.ones_like, "token_type_ids": torch.zeros_like}
    inputs = {name: given[name] if name in given else absent[name](ids) for name in names}
    found = batching.labels(batch)
    return inputs if found is None else {**inputs, "labels": found}


def dynamic(inputs: Mapping[str, Tensor], batch: Any, length: Any) -> dict[str, dict[int, Any]]:
    """Which dimensions of the inputs may be of any size: the rows, and of texts the tokens."""
    return {name: {0: batch} if value.ndim > 2 else {0: batch, 1: length} for name, value in inputs.items()}


def trace(
    model: nn.Module, names: tuple[str, ...], example: Mapping[str, Tensor], longest: int, most_rows: int | None
) -> ExportedProgram:
    """The graph of a network, for every batch of any or up to `most_rows` rows, of up to `longest` tokens each or of
    images of the example's size.

    Raises:
        ExportError: if torch.export stops.
    """
    # Another size than 0 or 1, which would be taken for constants. What the tensors hold is not looked at.
    inputs = {name: torch.ones(2, min(8, longest), dtype=torch.int64) for name in names}
    scores = _Scores(model)
    if names == IMAGES:
        scores, inputs = _ImageScores(model), {name: torch.zeros(2, *example[name].shape[1:]) for name in names}
    batch, length = Dim("batch", max=most_rows), Dim("length", max=longest)
    with evaluation(model), quiet(), told(model, "torch.export"):
        program = torch.export.export(scores, (), inputs, dynamic_shapes=dynamic(inputs, batch, length), strict=False)
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # formats would carry the paths of this machine
    return program


@contextmanager
def quiet() -> Iterator[None]:
    """Keep to themselves what exporters print, warn of and log: it is about their insides."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


@contextmanager
def told(model: nn.Module, what: str) -> Iterator[None]:
    """Errors of an exporter in our own words."""
    try:
        yield
    except ExportError:
        raise
    except Exception as error:  # whatever exporters make of an operation that they do not know, or of their own parts
        raise ExportError(
            f"{type(model).__name__} must be understood by {what}. It stops with: {first_line(error)}. Export to "
            "another format, or with other versions; nothing was written."
        ) from error


def first_line(error: Any) -> str:
    """The gist of a long message."""
    return (str(error).strip() or repr(error)).splitlines()[0].rstrip(".")
