"""What a compression gives back."""

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


@dataclass(frozen=True)
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

    def save(self, folder: str | Path, *, extra_files: Iterable[Path] = ()) -> None:
        """Write the model folder that `rmtkd.load` reads: weights, shapes, checksums, self-test, model card."""
        loads_with = artifact.ways_to_load(
            type(self.model).__name__, is_own=self.sites is not None, own_forward=isinstance(self.example, Call)
        )
        artifact.save(
            self.model,
            folder,
            card=reporting.model_card(self.record, self.plan, loads_with),
            provenance=self.record,
            extra_files=extra_files,
            sites=self.sites,
            example=self.example,
        )
