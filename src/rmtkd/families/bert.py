"""BERT of transformers v5, with a classification head."""

from rmtkd.families.encoder import EncoderFamily

BERT = EncoderFamily(
    name="bert",
    model_class="BertForSequenceClassification",
    refused_classes={
        "BertModel": "no head",
        "BertForPreTraining": "pre-training heads",
        "BertLMHeadModel": "a generative head",
        "BertForMaskedLM": "a masked-language-model head",
        "BertForNextSentencePrediction": "a next-sentence head",
        "BertForMultipleChoice": "a multiple-choice head",
        "BertForTokenClassification": "a token-classification head",
        "BertForQuestionAnswering": "a span head",
    },
    encoder="bert.encoder",
    word_embeddings="bert.embeddings.word_embeddings",
    layers="bert.encoder.layer",
    attention="attention.self",
    attention_class="BertSelfAttention",
    query="attention.self.query",
    key="attention.self.key",
    value="attention.self.value",
    attention_output="attention.output.dense",
    ffn_in="intermediate.dense",
    ffn_out="output.dense",
    head_size="attention_head_size",
    all_head_size="all_head_size",
    scaling="scaling",
    heads="num_attention_heads",
    chunk_size="chunk_size_feed_forward",
)
