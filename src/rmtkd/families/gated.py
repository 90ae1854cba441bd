"""Encoders with rotary attention and a gated feed-forward block: ModernBERT and EuroBERT of transformers v5.

Their attention is left alone. A free change of basis of queries and keys does not commute with the rotation by
position, and the stock forward wants values as wide as queries.
"""

import torch

from rmtkd.families.encoder import EncoderFamily, FeedForward, siblings

MODERNBERT = EncoderFamily(
    name="modernbert",
    model_class="ModernBertForSequenceClassification",
    refused_classes=siblings(
        "ModernBert", "Model", "ForMaskedLM", "ForMultipleChoice", "ForTokenClassification", "ForQuestionAnswering"
    ),
    encoder="model.layers",
    word_embeddings="model.embeddings.tok_embeddings",
    layers="model.layers.*",
    feed_forward=FeedForward(
        writers=("mlp.Wi",), reader="mlp.Wo", activation="mlp.act", copies=2, stock={"mlp": "ModernBertMLP"}
    ),
    precision=torch.float32,
)

EUROBERT = EncoderFamily(
    name="eurobert",
    model_class="EuroBertForSequenceClassification",
    refused_classes=siblings("EuroBert", "Model", "ForMaskedLM", "ForTokenClassification"),
    encoder="model.layers",
    word_embeddings="model.embed_tokens",
    layers="model.layers.*",
    feed_forward=FeedForward(
        writers=("mlp.gate_proj", "mlp.up_proj"),
        reader="mlp.down_proj",
        activation="mlp.act_fn",
        stock={"mlp": "EuroBertMLP"},
    ),
    precision=torch.float32,
)
