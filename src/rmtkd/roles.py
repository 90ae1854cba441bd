"""The rows of a run by role, and what must hold of them before anything takes time."""

import hashlib
import itertools
import math
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from rmtkd import batches as batching
from rmtkd.batches import Batch, Forward, called
from rmtkd.calibration import Look
from rmtkd.checkpoint import checksum
from rmtkd.errors import DataError, UnsupportedModelError
from rmtkd.measurement import Estimate, answers, check_labels, predict, proportion, right_by_chance
from rmtkd.memory import Pieces
from rmtkd.seeding import seeded

MOST = 1024
"""About as many numbers of each tensor of a row tell it from others."""
FEW = 8
"""Batches that are looked at twice: what is drawn for one of them may happen to come again."""
ANEW = "drawn anew in every pass"
"""In place of a fingerprint."""


@dataclass(frozen=True, kw_only=True)
class Roles:
    """The rows of a run by role: see `rmtkd.compress`."""

    train: Iterable[Any]
    selection: Iterable[Any]
    report: Iterable[Any] | None = None
    calibration: Iterable[Any] | None = None
    example: Any = None

    def check_again(self) -> None:
        """Raise `DataError` for a collection that can be gone through only once."""
        batching.check_again(
            train=self.train, selection=self.selection, report=self.report, calibration=self.calibration
        )

    def called(self, forward: Forward | None) -> "Roles":
        """The same rows, with a `forward` of their own."""
        rows = {name: called(getattr(self, name), forward) for name in ("train", "selection", "report", "calibration")}
        example = None if self.example is None else batching.first(called([self.example], forward), "example")
        return Roles(**rows, example=example)  # type: ignore[arg-type]


class Answered:
    """Rows without labels, labelled with a model's answers: accuracy then is agreement with it.

    The answers to all batches of the first whole pass are kept. A batch is known again by what it holds, as collections
    may come in another order.
    """

    def __init__(self, batches: Iterable[Batch], model: nn.Module, pieces: Pieces):
        self.batches, self.model, self.pieces = batches, model, pieces
        self.known: dict[str, Tensor] = {}
        self.is_whole = False

    def __iter__(self) -> Iterator[Batch]:
        for batch in self.batches:
            content = checksum(_tensors(batch))
            found = self.known.get(content)
            if found is None:
                found = answers(self.model, batch, self.pieces).argmax(-1)
                if not self.is_whole:
                    self.known[content] = found
            yield batching.labelled(batch, found)
        self.is_whole = True


def check_finite(scores: Float[Tensor, "rows classes"]) -> None:
    """Raise `DataError` for rows that a model answers with what is no number."""
    faulty = int((~scores.isfinite()).any(-1).sum())
    if faulty:
        raise DataError(
            f"the teacher must answer every selection row with finite scores. Of {len(scores)} rows {faulty} give NaN "
            "or infinity. Look for NaN among their values, and leave these rows out."
        )


def check_teacher(model: nn.Module, selection: Iterable[Batch], *, pieces: Pieces | None = None) -> Estimate:
    """Selection accuracy of the teacher.

    Raises:
        DataError: if scores are not finite, labels are outside the head's range, or the teacher has no more rows right
            than the same answers would have by chance, within two standard deviations: there is nothing to distil.
    """
    scores, labels = predict(model, selection, pieces=pieces)
    check_finite(scores)
    check_labels(labels, scores.shape[1])
    given = scores.argmax(-1)
    right = int((given == labels).sum())
    mean, deviation = right_by_chance(labels, given)
    if right <= mean + 2 * deviation:
        raise DataError(
            f"the teacher must do better than chance. It has {right} of {len(labels)} selection rows right; its "
            f"answers in random order have {mean:.0f} ± {deviation:.1f}. Check the labels, pass more selection rows if "
            "these are few, or train it first:\nrmtkd train RECIPE --model PATH_OR_HUB_NAME --out TEACHER"
        )
    return proportion(right, len(labels))


def check_packed(model: nn.Module, packs: Sequence[str], rows: Iterable[Batch]) -> None:
    """Raise `UnsupportedModelError` if answers change when these modules pack rows, as those of the user's model do."""
    if not packs:
        return
    plain, _ = predict(model, rows)
    modules: list[Any] = [model.get_submodule(path) for path in packs]
    for module in modules:
        module.use_nested_tensor = True
    try:
        with warnings.catch_warnings(action="ignore"):  # torch tells that nested tensors are a prototype
            packed, _ = predict(model, rows)
    finally:
        for module in modules:
            module.use_nested_tensor = False
    if not torch.allclose(packed, plain, rtol=1e-3, atol=1e-3):
        raise UnsupportedModelError(
            f"answers must not depend on what stands at padding. {packs[0]} packs its rows and leaves zeros there, and "
            "something behind it reads them. Let it read real positions alone, or build nn.TransformerEncoder with "
            "enable_nested_tensor=False; nothing was changed."
        )


def fingerprint(rows: Iterable[Batch], role: str) -> tuple[str, bool]:
    """SHA-256 of all rows, in their order and batches, and whether they have labels.

    Raises:
        DataError: if there are none, or only some have labels.
    """
    digest, labelled = hashlib.sha256(), set()
    for batch in rows:
        named = _tensors(batching.check(batch))
        digest.update(checksum(named).encode())
        labelled.add("labels" in named)
    if not labelled:
        raise DataError(f"{role} rows must hold at least one batch. Got none. Pass more rows.")
    if len(labelled) == 2:
        raise DataError(f"{role} rows must all have labels, or none. Got both. Label them, or leave labels out.")
    return digest.hexdigest(), labelled.pop()


def fingerprint_of_all(rows: Iterable[Batch], classes: int | None = None) -> tuple[str, int]:
    """A fingerprint of rows in whatever order and padding they come, and how many batches these are: collections may
    shuffle, by random numbers of their own, too. Every row is hashed by itself, and the hashes are added.

    Raises:
        DataError: for labels that are none of so many classes.
    """
    total = count = 0
    for batch in rows:
        batching.check(batch)
        if classes is not None and (labels := batching.labels(batch)) is not None:
            check_labels(labels, classes, "training labels")
        count += 1
        total += sum(int.from_bytes(hashlib.sha256(content).digest(), "big") for content in _contents(batch))
    return f"{total % 2**256:064x}", count


def fingerprint_of_training(
    rows: Iterable[Batch], device: torch.device | str, classes: int | None = None, look: Look = iter
) -> tuple[str, int]:
    """The same of training rows; `ANEW` in its place if they are other rows in every pass, whatever our random numbers:
    augmented by random numbers of another library, say. The caller's random numbers are left as after one pass.

    Args:
        rows: training batches.
        device: of the run.
        classes: between which the head chooses: recovery would stumble over other labels hours later.
        look: through which whole passes go.

    Raises:
        DataError: for labels of other classes.
    """
    batching.set_epoch(rows, 0)
    seen, count = fingerprint_of_all(look(rows), classes)
    with seeded(None, device):
        is_anew = not _come_again(rows) and fingerprint_of_all(look(rows))[0] != seen
    return ANEW if is_anew else seen, count


def _come_again(rows: Iterable[Batch]) -> bool:
    """Whether the first batches are the same when random numbers are: else a collection has some of its own."""
    seen = set()
    for _ in range(2):
        with seeded(0):
            seen.add(tuple(checksum(_tensors(batch)) for batch in itertools.islice(rows, FEW)))
    return len(seen) == 1


def _contents(batch: Batch) -> Iterator[bytes]:
    """What each row holds at its real positions: of long tensors, numbers that are evenly spread."""
    count, named = batching.rows(batch), _tensors(batch)
    mask = named.get("attention_mask")
    real = mask.cpu().bool().numpy() if mask is not None and mask.ndim == 2 else None
    parts = []
    for name, value in sorted(named.items()):
        by_position = real is not None and value.shape[:2] == real.shape
        shape = (count, value.shape[1] if by_position else math.prod(value.shape[1:]), -1)
        flat = value.detach().cpu().contiguous().flatten().view(torch.uint8)
        if len(flat):
            parts.append((name.encode(), flat.numpy().reshape(shape), real if by_position else None))
    for i in range(count):
        row = []
        for name, values, where in parts:
            numbers = values[i] if where is None else values[i][where[i]]
            row += [name, str(len(numbers)).encode(), numbers[:: max(1, len(numbers) // MOST)].tobytes()]
        yield b" ".join(row)


def _tensors(batch: Batch) -> dict[str, Tensor]:
    """What a batch holds, by name or place, its labels among them."""
    args, kwargs = batching.inputs(batch)
    named = {str(key): value for key, value in [*enumerate(args), *kwargs.items(), ("labels", batching.labels(batch))]}
    return {name: value for name, value in named.items() if isinstance(value, Tensor)}


def check_report(rows: Iterable[Batch], classes: int) -> None:
    """Raise `DataError` for labels of report rows outside the head's range: these rows are read last."""
    for batch in rows:
        check_labels(batching.labels(batch), classes)  # type: ignore[arg-type]
