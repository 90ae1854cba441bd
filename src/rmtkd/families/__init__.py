"""One short table per architecture family: where the widths of its models are, as names; and which image classifiers
can be saved at any widths."""

from rmtkd.families.albert import ALBERT
from rmtkd.families.bert import BERT, CAMEMBERT, ELECTRA, ROBERTA, XLM_ROBERTA
from rmtkd.families.distilbert import DISTILBERT
from rmtkd.families.encoder import Attention, EncoderFamily, FeedForward
from rmtkd.families.gated import EUROBERT, MODERNBERT
from rmtkd.families.images import IMAGE_FAMILIES, ImageFamily

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
"""Every family of texts that `rmtkd` knows."""

__all__ = ["FAMILIES", "IMAGE_FAMILIES", "Attention", "EncoderFamily", "FeedForward", "ImageFamily"]
