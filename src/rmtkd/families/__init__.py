"""One short table per architecture family: where the widths of its models are, as names."""

from rmtkd.families.albert import ALBERT
from rmtkd.families.bert import BERT, CAMEMBERT, ELECTRA, ROBERTA, XLM_ROBERTA
from rmtkd.families.distilbert import DISTILBERT
from rmtkd.families.encoder import Attention, EncoderFamily, FeedForward
from rmtkd.families.gated import EUROBERT, MODERNBERT

FAMILIES: tuple[EncoderFamily, ...] = (
    BERT,
    ROBERTA,
    XLM_ROBERTA,
    CAMEMBERT,
    ELECTRA,
    DISTILBERT,
    ALBERT,
    MODERNBERT,
    EUROBERT,
)
"""Every family that `rmtkd` knows."""

__all__ = ["FAMILIES", "Attention", "EncoderFamily", "FeedForward"]
