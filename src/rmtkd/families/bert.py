"""BERT of transformers v5, and the families that differ from it in names alone."""

from dataclasses import replace

from rmtkd.families.encoder import Attention, EncoderFamily, FeedForward, siblings

BERT = EncoderFamily(
    name="bert",
    model_class="BertForSequenceClassification",
    refused_classes=siblings(
        "Bert",
        "Model",
        "ForPreTraining",
        "LMHeadModel",
        "ForMaskedLM",
        "ForNextSentencePrediction",
        "ForMultipleChoice",
        "ForTokenClassification",
        "ForQuestionAnswering",
    ),
    encoder="bert.encoder",
    word_embeddings="bert.embeddings.word_embeddings",
    layers="bert.encoder.layer.*",
    attention=Attention(
        module="attention.self",
        module_class="BertSelfAttention",
        query="attention.self.query",
        key="attention.self.key",
        value="attention.self.value",
        output="attention.output.dense",
        heads="num_attention_heads",
    ),
    feed_forward=FeedForward(
        writers=("intermediate.dense",),
        reader="output.dense",
        activation="intermediate.intermediate_act_fn",
        stock={"intermediate": "BertIntermediate", "output": "BertOutput"},
        chunk_size="chunk_size_feed_forward",
    ),
)


def _like_bert(name: str, prefix: str, base: str, *endings: str) -> EncoderFamily:
    """A family whose modules have BERT's names, in classes of its own."""
    attention, feed_forward = BERT.attention, BERT.feed_forward
    stock = {"intermediate": f"{prefix}Intermediate", "output": f"{prefix}Output"}
    return replace(
        BERT,
        name=name,
        model_class=f"{prefix}ForSequenceClassification",
        refused_classes=siblings(prefix, "Model", "ForMaskedLM", "ForMultipleChoice", "ForTokenClassification")
        | siblings(prefix, "ForQuestionAnswering", *endings),
        encoder=f"{base}.encoder",
        word_embeddings=f"{base}.embeddings.word_embeddings",
        layers=f"{base}.encoder.layer.*",
        attention=attention and replace(attention, module_class=f"{prefix}SelfAttention"),
        feed_forward=replace(feed_forward, stock=stock),
    )


ROBERTA = replace(_like_bert("roberta", "Roberta", "roberta", "ForCausalLM"), positions_after_padding=True)
XLM_ROBERTA = replace(_like_bert("xlm-roberta", "XLMRoberta", "roberta", "ForCausalLM"), positions_after_padding=True)
CAMEMBERT = replace(_like_bert("camembert", "Camembert", "roberta", "ForCausalLM"), positions_after_padding=True)
ELECTRA = _like_bert("electra", "Electra", "electra", "ForPreTraining", "ForCausalLM")
"""The embedding may be narrower than the encoder; `embeddings_project` widens it after a norm, and is left alone."""
