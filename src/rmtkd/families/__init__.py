"""One short table per architecture family: where the widths of its models are, as names."""

from rmtkd.families.bert import BERT
from rmtkd.families.encoder import EncoderFamily

FAMILIES: tuple[EncoderFamily, ...] = (BERT,)
"""Every family that `rmtkd` knows."""

__all__ = ["BERT", "FAMILIES", "EncoderFamily"]
