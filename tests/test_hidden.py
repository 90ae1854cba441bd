"""Hidden states are compared where that can be done, and a run that asks for more is refused before it trains."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import rmtkd
from conftest import random_rows, tiny
from rmtkd.distillation import Recovery
from rmtkd.errors import OptionError

QUICK: dict[str, Any] = {
    "target": "60%params",
    "policy": "paper",
    "multiple_of": 2,
    "epochs": 1.0,
    "calibration_share": 1.0,
    "precision": "fp32",
}


class Block(nn.Module):
    """A residual block of two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(12, 24), nn.Linear(24, 12)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(self.up(x).relu())


class Residual(nn.Module):
    """Blocks that all put out the same width, which may be narrowed."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.blocks, self.head = nn.Linear(6, 12), nn.Sequential(Block(), Block()), nn.Linear(12, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.blocks(self.stem(x).relu()).relu())


def compress(model: nn.Module, **options: Any) -> rmtkd.Compressed:
    rows = [(part,) for part in torch.randn(64, 6, generator=torch.Generator().manual_seed(1)).split(8)]
    return rmtkd.compress(model, train=rows[:6], selection=rows[6:], **{**QUICK, **options})


def test_blocks_whose_outputs_a_plan_narrows_cannot_be_compared(tmp_path: Path):
    model, events = Residual().eval(), []
    options: dict[str, Any] = {"keep": {"stem": 6}, "target": None, "recovery": Recovery(hidden=1.0)}
    message = r"narrowed.*2 of 2 blocks are, such as of blocks\.0: from \[12\] to \[6\].*exclude the sites"
    with pytest.raises(OptionError, match=message):
        compress(model, **options, out=tmp_path / "run", on_event=events.append)
    assert not (tmp_path / "run").exists()
    assert not {"forecast", "cut", "step"} & {event["event"] for event in events}
    made = compress(model, **{**options, "recovery": Recovery()}, epochs=0.0).plan
    with pytest.raises(OptionError, match="hidden must be 0 where"):
        compress(model, plan=made, target=None, recovery=Recovery(hidden=1.0))


def test_blocks_whose_outputs_stay_as_wide_are_compared():
    model = Residual().eval()
    options: dict[str, Any] = {"exclude": ["stem"]}
    by_answers, by_both = (
        compress(model, recovery=Recovery(hidden=weight), **options).rounds[0].loss_first or 0.0
        for weight in (0.0, 100.0)
    )
    assert by_both > 2 * by_answers > 0


def test_a_model_without_blocks_has_no_hidden_states_to_compare():
    options: dict[str, Any] = {**QUICK, "recovery": Recovery(hidden=1.0)}
    with pytest.raises(OptionError, match=r"sites lie in no blocks.*Got 1 for Sequential\. Leave it out"):
        compress(nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 3)).eval(), **options)
    rows = random_rows(64)
    with pytest.raises(OptionError, match=r"Got 1 for Albert"):
        rmtkd.compress(tiny("albert"), train=rows, selection=rows, **options)
