"""The self-test of a model folder: a synthetic batch – never a user's row – and what the model must answer."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from rmtkd import batches as batching
from rmtkd.artifact.files import read_shapes
from rmtkd.batches import Batch, Call, Forward
from rmtkd.errors import ArtifactError
from rmtkd.measurement import evaluation, relative_difference
from rmtkd.sites import find_family, random_images

SELF_TEST = "self-test.safetensors"
NOT_RUN = "not_run"
ANSWERS = "logits"
TOLERANCE = 1e-3
"""Largest difference of the answers, relative to the largest answer: other processors round differently."""
ROWS = 2


def write(model: nn.Module, folder: Path, batch: Batch) -> dict[str, Any]:
    """Store the batch and the model's answers; what the manifest says of them.

    Args:
        model: any that runs on the batch.
        folder: where to.
        batch: synthetic.

    Raises:
        ArtifactError: if an answer is not finite.
    """
    answers = _answers(model, batch)
    if not answers.isfinite().all():
        raise ArtifactError(f"a saved model must give finite outputs. Got {answers.tolist()}. Look at its training.")
    rows = batch.rows if isinstance(batch, Call) else batch
    inputs = rows if isinstance(rows, Mapping) else {str(i): value for i, value in enumerate(rows)}
    tensors = {f"inputs.{name}": value.contiguous() for name, value in inputs.items()} | {ANSWERS: answers}
    save_file(tensors, folder / SELF_TEST)
    return {"named_inputs": isinstance(rows, Mapping), "own_forward": isinstance(batch, Call)}


def write_if_it_runs(model: nn.Module, folder: Path, example: Batch) -> dict[str, Any]:
    """The same for a model of one's own, on random rows like an example. It may want more of its rows than that: then
    there is no self-test, and the manifest says why."""
    try:
        return write(model, folder, random_like(example))
    except Exception as error:  # whatever a forward of somebody else's makes of random values
        (folder / SELF_TEST).unlink(missing_ok=True)
        return {NOT_RUN: f"the model did not run on random rows: {error}"}


def verify(model: nn.Module, folder: Path, facts: Mapping[str, Any], forward: Forward | None, *, is_own: bool) -> float:
    """Hold the model against the stored answers.

    Returns:
        The largest difference, relative to the largest answer.

    Raises:
        ArtifactError: if it is more than `TOLERANCE`, a forward is missing, or a model of transformers is to be asked
            anything else than is written: attention takes the square of an input's length.
    """
    if facts["own_forward"] != (forward is not None):
        how = "the forward= that compress was given" if facts["own_forward"] else "no forward="
        raise ArtifactError(f"the model must be called as it was when it was compressed. Pass {how}.")
    shapes = read_shapes(folder / SELF_TEST)
    if not is_own:
        asked = {f"inputs.{name}": list(value.shape) for name, value in random_inputs(model).items()}
        if {name: shape for name, shape in shapes.items() if name != ANSWERS} != asked or not facts["named_inputs"]:
            raise ArtifactError(f"{SELF_TEST} must ask what rmtkd asks. It does not. Fetch the folder again.")
    tensors = load_file(folder / SELF_TEST)
    expected = tensors.pop(ANSWERS)
    inputs = {name.removeprefix("inputs."): value for name, value in tensors.items()}
    rows = inputs if facts["named_inputs"] else tuple(inputs[str(i)] for i in range(len(inputs)))
    got = _answers(model, rows if forward is None else Call(rows, forward))
    same_shape = got.shape == expected.shape
    error = relative_difference(got, expected) if same_shape else float("inf")
    if not error <= TOLERANCE:
        raise ArtifactError(
            f"the loaded model must give the outputs stored with it, to {TOLERANCE:g}. They differ by {error:.1e}. "
            "The folder was altered, or the code of the model, or this version of its library, computes something else."
        )
    return error


def random_inputs(model: nn.Module) -> dict[str, Tensor]:
    """Two random images for a model of a supported family, or two rows of tokens, the second half padding."""
    if (images := random_images(model, ROWS)) is not None:
        return images
    config: Any = model.config
    length = min(8, find_family(model).longest_input(config))
    ids = torch.randint(0, config.vocab_size, (ROWS, length), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, length // 2 :] = 0
    return {"input_ids": ids, "attention_mask": mask}


def random_like(example: Batch) -> Batch:
    """Two rows of random values, of the range and spread of the example's as a whole."""
    generator = torch.Generator().manual_seed(0)

    def draw(value: Tensor) -> Tensor:
        shape, value = (ROWS, *value.shape[1:]), value.cpu()
        if value.is_floating_point():
            drawn = torch.randn(shape, generator=generator, dtype=torch.float64)
            return (drawn * value.double().std(correction=0) + value.double().mean()).to(value.dtype)
        low, high = int(value.min()), int(value.max())
        if value.dtype == torch.bool or (low, high) == (0, 1):  # a mask: everything is there
            return torch.ones(shape, dtype=value.dtype)
        return torch.randint(low, high + 1, shape, generator=generator).to(value.dtype)

    if not isinstance(example, Call):  # which may look at all that its rows hold
        args, kwargs = batching.inputs(example)
        example = kwargs or args
    return batching.map_tensors(example, draw)


def _answers(model: nn.Module, batch: Batch) -> Tensor:
    device = next(model.parameters()).device
    with evaluation(model):
        return batching.logits(model, batching.to(batch, device)).float().cpu()
