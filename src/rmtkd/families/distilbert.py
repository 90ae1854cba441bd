"""DistilBERT of transformers v5."""

from rmtkd.families.encoder import Attention, EncoderFamily, FeedForward, siblings

DISTILBERT = EncoderFamily(
    name="distilbert",
    model_class="DistilBertForSequenceClassification",
    refused_classes=siblings(
        "DistilBert", "Model", "ForMaskedLM", "ForMultipleChoice", "ForTokenClassification", "ForQuestionAnswering"
    ),
    encoder="distilbert.transformer",
    word_embeddings="distilbert.embeddings.word_embeddings",
    layers="distilbert.transformer.layer.*",
    attention=Attention(
        module="attention",
        module_class="DistilBertSelfAttention",
        query="attention.q_lin",
        key="attention.k_lin",
        value="attention.v_lin",
        output="attention.out_lin",
        heads="n_heads",
        all_head_size=None,
        after=("out_lin",),
    ),
    feed_forward=FeedForward(
        writers=("ffn.lin1",),
        reader="ffn.lin2",
        activation="ffn.activation",
        stock={"ffn": "FFN"},
        chunk_size="ffn.chunk_size_feed_forward",
        setting="hidden_dim",
    ),
)
