"""The vocabulary in which a family of transformer encoders is described."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class EncoderFamily:
    """Names of the parts of an encoder with a classification head. Paths below `layer` are relative to one layer.

    `head_size`, `all_head_size` and `scaling` are the attributes by which the stock attention module knows its head
    width: they go stale, silently, when the weights are cut and these are not.
    """

    name: str
    model_class: str
    """The transformers class with a classification head that is supported."""
    refused_classes: Mapping[str, str]
    """Sibling classes and the head for which they are refused."""
    encoder: str
    """Module whose parameters count as the encoder's."""
    word_embeddings: str
    layers: str
    """Module list of the layers."""
    attention: str
    attention_class: str
    """The stock attention module; another may do more than a scaled product."""
    query: str
    key: str
    value: str
    attention_output: str
    ffn_in: str
    ffn_out: str
    head_size: str
    all_head_size: str
    scaling: str
    heads: str
    """Attribute of the attention module that holds the number of heads."""
    chunk_size: str
    """Attribute of a layer by which its feed-forward part runs in pieces if it is not 0."""
