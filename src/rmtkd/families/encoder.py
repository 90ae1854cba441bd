"""The vocabulary in which a family of transformer encoders is described: names, never code of theirs."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

HEADS: Mapping[str, str] = {
    "Model": "no head",
    "ForPreTraining": "pre-training heads",
    "LMHeadModel": "a generative head",
    "ForCausalLM": "a generative head",
    "ForMaskedLM": "a masked-language-model head",
    "ForNextSentencePrediction": "a next-sentence head",
    "ForMultipleChoice": "a multiple-choice head",
    "ForTokenClassification": "a token-classification head",
    "ForQuestionAnswering": "a span head",
}
"""Endings of transformers' class names, and the heads they stand for."""


def siblings(prefix: str, *endings: str) -> dict[str, str]:
    """Classes of a family that have another head, and which."""
    return {prefix + ending: HEADS[ending] for ending in endings}


@dataclass(frozen=True, kw_only=True)
class Attention:
    """Names of the parts of an attention whose scores are a plain scaled product. Paths are relative to one layer.

    `head_size`, `all_head_size` and `scaling` are the attributes by which the stock module knows its head width: they
    go stale, silently, when the weights are cut and these are not.
    """

    module: str
    module_class: str
    """The stock class; another may do more than a scaled product."""
    query: str
    key: str
    value: str
    output: str
    heads: str
    """Attribute that holds the number of heads."""
    head_size: str = "attention_head_size"
    scaling: str = "scaling"
    all_head_size: str | None = "all_head_size"
    after: tuple[str, ...] = ()
    """What the module's own code passes its context through, in order: all that remains of it without heads."""
    norm: str | None = None
    """The norm that its own code then takes of the sum with its input, if it does."""


@dataclass(frozen=True, kw_only=True)
class FeedForward:
    """Names of the parts of a feed-forward block: `reader(activation(writer))`, or gated, `reader(activation(writer) ·
    other writer)`. Paths are relative to one layer."""

    writers: tuple[str, ...]
    reader: str
    activation: str
    """Attribute that holds the non-linearity; it must act on each unit by itself."""
    stock: Mapping[str, str]
    """Modules whose own code lies between writers and reader, and their stock class: another may do more."""
    copies: int = 1
    """How many times a writer lays out the width, one after the other: 2 where value and gate are one matrix."""
    chunk_size: str | None = None
    """Attribute by which the block runs in pieces if it is not 0."""
    setting: str = "intermediate_size"
    """Entry of the stock configuration that gives this width to all layers."""


@dataclass(frozen=True, kw_only=True)
class EncoderFamily:
    """Where the widths of an encoder with a classification head are."""

    name: str
    """What transformers calls the model type."""
    model_class: str
    """The transformers class with a classification head that is supported."""
    refused_classes: Mapping[str, str]
    """Sibling classes and the head for which they are refused."""
    encoder: str
    """Module whose parameters count as the encoder's."""
    word_embeddings: str
    layers: str
    """Path of the layers; each `*` stands for every index of a module list, in order."""
    feed_forward: FeedForward
    attention: Attention | None = None
    """None where queries and keys are rotated by position, which allows no change of their basis: left alone."""
    repeats_layers: bool = False
    """Whether a layer is called more than once in a forward pass."""
    positions_after_padding: bool = False
    """Whether positions are counted from the padding id on, which shortens the longest input by as much."""
    precision: torch.dtype = torch.float64
    """What the stock forward computes in throughout, at best: some cast to float32 inside."""

    @property
    def config_class(self) -> str:
        """The transformers class of its configuration."""
        return self.model_class.replace("ForSequenceClassification", "Config")

    def longest_input(self, config: Any) -> int:
        """The longest input of a model with this configuration, in tokens."""
        offset = config.pad_token_id + 1 if self.positions_after_padding else 0
        return config.max_position_embeddings - offset
