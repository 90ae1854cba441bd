"""What a model costs and how well it does: parameters, FLOPs, latency, disk, accuracy."""

import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.backends import cudnn, mha, mkldnn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from rmtkd import batches as batching
from rmtkd.batches import Batch
from rmtkd.environment import Precision, precision_on
from rmtkd.errors import DataError, OptionError
from rmtkd.memory import Pieces, is_out_of_memory
from rmtkd.storage import apart, state_of


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A measured proportion, or a score of proportions, with its standard error over `n` rows."""

    value: float
    n: int
    stderr: float


@dataclass(frozen=True, kw_only=True)
class Latency:
    """Wall-clock time of one forward pass in milliseconds: median and interquartile range of `repeats` passes."""

    median: float
    iqr: float
    batch: int
    length: int
    threads: int
    repeats: int
    device: str


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """What a model costs. `parameters` counts tied weights once; `parameters_encoder` leaves out embeddings and head;
    `flops` (2 per multiply-add) and `latency_ms` are those of the batch that was measured."""

    parameters: int
    parameters_encoder: int | None
    flops: int
    disk_bytes: int
    latency_ms: Latency | None

    def to_dict(self) -> dict[str, Any]:
        """The footprint as plain JSON values."""
        return asdict(self)


def count_parameters(module: nn.Module) -> int:
    """The number of parameters, those shared between modules once."""
    return sum(parameter.numel() for parameter in module.parameters())


@contextmanager
def evaluation(*models: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; each module gets its own training flag back."""
    flags = [(module, module.training) for model in models for module in model.modules()]
    for model in models:
        model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, flag in flags:
            module.training = flag


def precision_for(model: nn.Module, batch: Batch, asked: str) -> Precision:
    """What one of `PRECISIONS` is for a model where it lies: 32 bits for `auto` if the model does not run
    under autocast.

    Raises:
        OptionError: if bf16 was asked for and it does not run.
    """
    device = next(model.parameters()).device
    if precision_on(device, asked) == "fp32":
        return "fp32"
    try:
        with evaluation(model), torch.autocast(device.type, torch.bfloat16):
            batching.logits(model, batching.to(batching.head(batch, 2), device))
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise
        if asked == "bf16":
            raise OptionError(
                f"a model must run under autocast for bf16. {type(model).__name__} gave: {error} Leave precision at "
                "auto, or take fp32."
            ) from error
        return "fp32"
    return "bf16"


def count_flops(model: nn.Module, batch: Batch) -> int:
    """Floating-point operations of one forward pass, attention included, by torch's counter.

    The counter knows no formula for the fused kernels of attention on the CPU, of torch's own transformer layers and of
    recurrent ones, and counts them as zero, so they are computed by their plain matrix products here.
    """
    batch = batching.to(batch, next(model.parameters()).device)
    counter = FlopCounterMode(display=False)
    with evaluation(model), sdpa_kernel(SDPBackend.MATH), _unfused_layers(model), counter:
        batching.logits(model, batch)
    return counter.get_total_flops()


@contextmanager
def _unfused_layers(model: nn.Module) -> Iterator[None]:
    """`nn.TransformerEncoderLayer`, `nn.MultiheadAttention` and recurrent layers call their parts one by one."""
    was_fused = mha.get_fastpath_enabled()
    is_recurrent = any(isinstance(module, nn.RNNBase) for module in model.modules())
    backends: tuple[Any, ...] = (mkldnn, cudnn) if is_recurrent else ()
    were_enabled = [backend.enabled for backend in backends]
    mha.set_fastpath_enabled(False)
    try:
        for backend in backends:
            backend.enabled = False
        yield
    finally:
        mha.set_fastpath_enabled(was_fused)
        for backend, was_enabled in zip(backends, were_enabled, strict=True):
            backend.enabled = was_enabled


def count_disk_bytes(model: nn.Module) -> int:
    """Size of the weights as a safetensors file, in bytes."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        save_file(apart(state_of(model)), path)
        return path.stat().st_size


def time_forward(models: Sequence[nn.Module], batch: Batch, *, repeats: int = 20, warm_up: int = 3) -> list[Latency]:
    """Time the forward passes of several models on the same batch, interleaved, so that drift hits all alike.

    Args:
        models: models on one device.
        batch: the batch to run.
        repeats: timed passes of each model.
        warm_up: untimed passes of each model before.

    Returns:
        One `Latency` per model, in order.
    """
    device = next(models[0].parameters()).device
    batch = batching.to(batch, device)
    with evaluation(*models):
        calls = [partial(batching.logits, model, batch) for model in models]
        times = time_calls(calls, device, repeats=repeats, warm_up=warm_up)
    return [
        Latency(
            median=statistics.median(record),
            iqr=float(torch.tensor(record).quantile(0.75) - torch.tensor(record).quantile(0.25)),
            batch=batching.rows(batch),
            length=batching.length(batch),
            threads=torch.get_num_threads(),
            repeats=repeats,
            device=str(device),
        )
        for record in times
    ]


def time_calls(
    calls: Sequence[Callable[[], object]],
    device: torch.device,
    *,
    repeats: int,
    warm_up: int,
    clock: Callable[[], float] | None = None,
) -> list[list[float]]:
    """Milliseconds of every timed repetition of each call, interleaved.

    Args:
        calls: what to time.
        device: that they compute on, which is waited for.
        repeats: timed repetitions of each call.
        warm_up: untimed repetitions of each call before.
        clock: seconds now; the wall clock by default.
    """
    clock = clock or time.perf_counter
    times: list[list[float]] = [[] for _ in calls]
    for i in range(warm_up + repeats):
        for call, record in zip(calls, times, strict=True):
            start = clock()
            call()
            wait(device)
            if i >= warm_up:
                record.append((clock() - start) * 1e3)
    return times


def measure(model: nn.Module, batch: Batch, *, encoder: str | None = None, latency: Latency | None = None) -> Footprint:
    """The footprint of a model on one batch.

    Args:
        model: the model, left as it was.
        batch: the batch whose FLOPs are counted.
        encoder: path of the submodule whose parameters are counted as the encoder's.
        latency: a measurement from `time_forward`; taken here when it is left out.
    """
    return Footprint(
        parameters=count_parameters(model),
        parameters_encoder=None if encoder is None else count_parameters(model.get_submodule(encoder)),
        flops=count_flops(model, batch),
        disk_bytes=count_disk_bytes(model),
        latency_ms=latency or time_forward([model], batch)[0],
    )


def relative_difference(got: Tensor, expected: Tensor) -> float:
    """The largest difference of two tensors of one shape, relative to the largest entry of the expected one."""
    return float((got - expected).abs().max() / expected.abs().max().clamp_min(1e-12))


def proportion(hits: int, n: int) -> Estimate:
    """A proportion with its binomial standard error, sqrt(p (1 - p) / n)."""
    if n == 0:
        raise DataError("at least one labelled row is needed to measure accuracy. Got none. Pass more rows.")
    p = hits / n
    return Estimate(value=p, n=n, stderr=math.sqrt(p * (1 - p) / n))


def predict(
    model: nn.Module, rows: Iterable[Batch], *, pieces: Pieces | None = None
) -> tuple[Float[Tensor, "rows classes"], Int[Tensor, " rows"]]:
    """Scores and labels of all rows, on the CPU, computed in the model's own precision."""
    pieces = pieces or Pieces()
    scores, labels = [], []
    for batch in rows:
        batch_labels = batching.labels(batch)
        if batch_labels is None:
            raise DataError("rows that are evaluated must have labels. Got a batch without. Add `labels`.")
        scores.append(answers(model, batch, pieces))
        labels.append(batch_labels.cpu())
    if not scores:
        raise DataError("at least one labelled row is needed to measure accuracy. Got none. Pass more rows.")
    return torch.cat(scores), torch.cat(labels)


def answers(model: nn.Module, batch: Batch, pieces: Pieces) -> Float[Tensor, "rows classes"]:
    """Scores of the rows of one batch, on the CPU."""
    with evaluation(model):
        return pieces(batch, partial(_answers, model))


def _answers(model: nn.Module, parts: Sequence[Batch]) -> Float[Tensor, "rows classes"]:
    device = next(model.parameters()).device
    return torch.cat([batching.logits(model, batching.to(part, device)).float().cpu() for part in parts])


def accuracy(model: nn.Module, rows: Iterable[Batch], *, pieces: Pieces | None = None) -> Estimate:
    """Share of rows whose highest score is the label's."""
    scores, labels = predict(model, rows, pieces=pieces)
    return proportion(int((scores.argmax(-1) == labels).sum()), len(labels))


def divergence(
    student: nn.Module,
    teacher: nn.Module | Sequence[Float[Tensor, "_ classes"]],
    rows: Iterable[Batch],
    *,
    pieces: Pieces | None = None,
) -> float:
    """`KL(teacher ‖ student)` of the answers, in nats, averaged over rows, with or without labels. The teacher is a
    model, or what `answers` gave of it for each batch."""
    total, count, pieces = 0.0, 0, pieces or Pieces()
    for i, batch in enumerate(rows):
        known = answers(teacher, batch, pieces) if isinstance(teacher, nn.Module) else teacher[i]
        theirs, mine = (scores.double().log_softmax(-1) for scores in (known, answers(student, batch, pieces)))
        total, count = total + float((theirs.exp() * (theirs - mine)).sum()), count + len(mine)
    if count == 0:
        raise DataError("at least one row is needed to compare answers. Got none. Pass more rows.")
    return at_least_zero(total / count)


def at_least_zero(divergence: float) -> float:
    """A divergence without what rounding takes it below; NaN, of answers that are not numbers, stays NaN."""
    return divergence if math.isnan(divergence) else max(0.0, divergence)


def quality(model: nn.Module, rows: Iterable[Batch], *, pieces: Pieces | None = None) -> dict[str, Estimate]:
    """Accuracy and F1 from one pass: see `accuracy` and `f1`.

    Raises:
        DataError: if there are no rows, or labels are missing or outside the head's range.
    """
    scores, labels = predict(model, rows, pieces=pieces)
    answers, classes = scores.argmax(-1), scores.shape[1]
    check_labels(labels, classes)
    confusion = torch.bincount(labels * classes + answers, minlength=classes**2).reshape(classes, classes)
    return {"accuracy": proportion(int(confusion.diagonal().sum()), len(labels)), "f1": f1(confusion)}


def compare(
    before: nn.Module,
    after: nn.Module,
    example: Batch,
    rows: Mapping[str, Iterable[Batch] | None],
    *,
    encoder: str | None,
    pieces: Pieces,
) -> dict[str, dict[str, Any]]:
    """What two models cost and how well they do, measured side by side on the same rows and batch.

    Args:
        before, after: become `baseline` and `compressed`.
        example: the batch whose FLOPs and latency are measured.
        rows: labelled rows by the suffix that their measures get; None leaves the measures empty.
        encoder: path of the submodule whose parameters are counted as the encoder's.
        pieces: in how many pieces a batch is run, should memory run out.
    """
    found: dict[str, dict[str, Any]] = {}
    models = {"baseline": before, "compressed": after}
    for (name, model), latency in zip(models.items(), time_forward([before, after], example), strict=True):
        found[name] = measure(model, example, encoder=encoder, latency=latency).to_dict()
        for suffix, part in rows.items():
            none: dict[str, Estimate | None] = {"accuracy": None, "f1": None}
            for key, value in (none if part is None else quality(model, part, pieces=pieces)).items():
                found[name][key + suffix] = value and asdict(value)
    return found


def check_labels(labels: Int[Tensor, " rows"], classes: int, what: str = "labels") -> None:
    """Raise `DataError` for labels outside the range of the model's head."""
    if not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        raise DataError(
            f"{what} must be within 0..{classes - 1}, the range of the model's head. Got "
            f"{int(labels.min())}..{int(labels.max())}. Map the labels, or use a model with that many classes."
        )


def f1(confusion: Int[Tensor, "labels answers"]) -> Estimate:
    """F1 of class 1 where there are two classes; else the plain mean over classes that occur ("macro").

    The standard error is the delta method's on the multinomial counts. F1 of class k is `2 C[k,k] / D[k]` with the row
    and column sums `D[k]`; its gradient is orthogonal to the counts, so that the variance is a plain sum.
    A class that occurs neither as label nor as answer has no F1: without any positive the F1 of two classes is 0.

    Args:
        confusion: counts of rows by label and answer.

    Reference:
        Takahashi, Yamamoto, Kuchiba, Koyama, Applied Intelligence 52 (2022) 4961, doi 10.1007/s10489-021-02635-5, §3.
    """
    n = int(confusion.sum())
    if n == 0:
        raise DataError("at least one labelled row is needed to measure F1. Got none. Pass more rows.")
    counts = confusion.double()
    either = counts.sum(0) + counts.sum(1)
    occurs = either > 0
    weights = torch.tensor([0.0, 1.0], dtype=torch.float64) if len(counts) == 2 else occurs.double() / occurs.sum()
    per_count = torch.where(occurs, weights / either.clamp_min(1), 0)
    scores = 2 * counts.diagonal() * per_count
    slope = scores / either.clamp_min(1)
    gradient = 2 * torch.diag(per_count) - slope[:, None] - slope[None, :]
    return Estimate(value=float(scores.sum()), n=n, stderr=math.sqrt(float((counts * gradient**2).sum())))


def right_by_chance(labels: Int[Tensor, " rows"], answers: Int[Tensor, " rows"]) -> tuple[float, float]:
    """Mean and standard deviation of how many rows are right when the same answers are dealt to the rows at random.

    With `n_k` labels and `m_k` answers of class k among n rows, the mean is `μ = Σ n_k m_k / n` and the variance
    `(μ (n + μ) − Σ n_k m_k (n_k + m_k) / n) / (n − 1)`: the theorem below for the table of hits, summed by class.
    Accuracy cannot say as much of rare classes: a model that finds half of them at a few false alarms is hardly above
    one that always answers the commonest class.

    Reference:
        Hoeffding, Annals of Mathematical Statistics 22 (1951) 558, doi 10.1214/aoms/1177729545, Theorem 2.
    """
    n, classes = len(labels), 1 + int(torch.cat([labels, answers]).max())
    by_label, by_answer = (which.bincount(minlength=classes).double() for which in (labels, answers))
    pairs = by_label * by_answer
    mean = float(pairs.sum()) / n  # of one answer alone exactly the rows that are right
    variance = (mean * (n + mean) - float(pairs @ (by_label + by_answer)) / n) / max(n - 1, 1)
    return mean, math.sqrt(max(variance, 0.0))  # rounding may take it below


def wait(device: torch.device) -> None:
    """Return once the device has done what it was given: accelerators work on while Python goes on."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
