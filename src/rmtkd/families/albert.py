"""ALBERT of transformers v5: few layers, called again and again."""

from rmtkd.families.encoder import Attention, EncoderFamily, FeedForward, siblings

ALBERT = EncoderFamily(
    name="albert",
    model_class="AlbertForSequenceClassification",
    refused_classes=siblings(
        "Albert",
        "Model",
        "ForPreTraining",
        "ForMaskedLM",
        "ForMultipleChoice",
        "ForTokenClassification",
        "ForQuestionAnswering",
    ),
    encoder="albert.encoder",
    word_embeddings="albert.embeddings.word_embeddings",
    layers="albert.encoder.albert_layer_groups.*.albert_layers.*",
    attention=Attention(
        module="attention",
        module_class="AlbertAttention",
        query="attention.query",
        key="attention.key",
        value="attention.value",
        output="attention.dense",
        heads="num_attention_heads",
        after=("dense", "output_dropout"),
        norm="LayerNorm",
    ),
    feed_forward=FeedForward(
        writers=("ffn",),
        reader="ffn_output",
        activation="activation",
        stock={"": "AlbertLayer"},
        chunk_size="chunk_size_feed_forward",
    ),
    repeats_layers=True,
)
