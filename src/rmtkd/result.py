"""What a compression gives back."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from rmtkd import artifact, reporting
from rmtkd.batches import Batch, Call
from rmtkd.planning import Plan
from rmtkd.schedule import Round
from rmtkd.sites import Site

VOCABULARY = "vocabulary.json"
"""The extra file that holds the facts of a trimmed vocabulary."""


@dataclass(frozen=True, repr=False)
class Compressed:
    """A compressed model and the evidence: what was planned, what happened, what it costs now."""

    model: nn.Module
    plan: Plan
    rounds: tuple[Round, ...]
    record: dict[str, Any]
    """What `summary.json` holds."""
    sites: tuple[Site, ...] | None = None
    """Of a model of one's own."""
    example: Batch | None = None
    """The batch whose costs were measured; its shape, not its values, is what the self-test of a model of one's own is
    made after."""

    def summary(self) -> str:
        """The result as a table of plain text."""
        return reporting.summary_table(self.record)

    def __str__(self) -> str:
        return self.summary()

    def __repr__(self) -> str:
        before, after = (self.record[name]["parameters"] for name in ("baseline", "compressed"))
        return f"<Compressed {type(self.model).__name__}: {before:,} → {after:,} parameters>"

    def _repr_html_(self) -> str:
        """The same in a notebook, with the widths as a picture."""
        return reporting.summary_html(self.record, self.plan)

    def save(self, folder: str | Path, *, extra_files: Iterable[str | Path] = ()) -> None:
        """Write the model folder that `rmtkd.load` reads: weights, shapes, checksums, self-test, model card."""
        files = [Path(file) for file in extra_files]
        vocabulary = next((_facts(file) for file in files if file.name == VOCABULARY), None)
        loads_with = artifact.ways_to_load(
            type(self.model).__name__, is_own=self.sites is not None, own_forward=isinstance(self.example, Call)
        )
        artifact.save(
            self.model,
            folder,
            card=reporting.model_card(self.record, self.plan, loads_with, vocabulary),
            provenance=self.record,
            extra_files=files,
            sites=self.sites,
            example=self.example,
        )


def _facts(file: Path) -> dict[str, Any] | None:
    """The facts of a trimmed vocabulary; None if the file is somebody's own of that name."""
    try:
        facts = json.loads(file.read_bytes())
    except ValueError:
        return None
    return facts if isinstance(facts, dict) and "selection_rows_tokenised_differently" in facts else None
