"""The claims of `rmtkd.sites`: every width of a BERT is found and described, all else is refused by name, unchanged."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForTokenClassification,
    BertLMHeadModel,
    BertModel,
    ConvBertConfig,
    ConvBertForSequenceClassification,
)

from conftest import assert_untouched, random_rows, snapshot, tiny_bert
from rmtkd.activations import attach
from rmtkd.batches import logits
from rmtkd.errors import UnsupportedModelError
from rmtkd.families import FAMILIES
from rmtkd.sites import (
    Attribute,
    Quantity,
    Site,
    after_cuts,
    attention_sites,
    by_width,
    feed_forward_site,
    find_family,
    find_sites,
)
from rmtkd.surgery import factorize, fill_with_ones, skeleton

SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "vocab_size": 50,
}
"""Keys of a tiny configuration."""


def described(sites: tuple[Site, ...]) -> list[tuple[str, str, str, int, int, str]]:
    return [(s.name, s.kind, s.block, s.width, s.groups, s.shares) for s in sites]


def of_layer(i: int, head: int = 16, ffn: int = 48) -> list[tuple[str, str, str, int, int, str]]:
    block = f"layer.{i}"
    return [
        (f"{block}.heads", "heads", block, 2, 1, f"{block}.heads"),
        (f"{block}.query_key", "bilinear", block, head, 2, f"{block}.head"),
        (f"{block}.value", "linear", block, head, 2, f"{block}.head"),
        (f"{block}.ffn", "pointwise", block, ffn, 1, f"{block}.ffn"),
    ]


# ---------------------------------------------------------------------------------------------- what is found


@pytest.mark.parametrize("layers", [1, 3])
def test_every_width_of_a_bert_is_found_from_shallow_to_deep(layers: int) -> None:
    words = [("embeddings.word", "linear", "embeddings", 32, 1, "embeddings.word")]
    expected = words + [row for i in range(layers) for row in of_layer(i)]
    assert described(find_sites(tiny_bert(layers=layers))) == expected


def test_query_key_and_value_of_a_layer_share_one_width(model: nn.Module) -> None:
    groups = by_width(find_sites(model))
    of_layers = [f"layer.{i}.{part}" for i in range(2) for part in ("heads", "head", "ffn")]
    assert list(groups) == ["embeddings.word", *of_layers]
    assert [site.name for site in groups["layer.1.head"]] == ["layer.1.query_key", "layer.1.value"]
    assert len({site.width for site in groups["layer.0.head"]}) == 1


def test_every_axis_is_as_long_as_its_width_times_its_groups(model: nn.Module) -> None:
    sites = find_sites(model)
    factorize(model, sites[0].factorizes or "")
    for site in sites:
        for stream in site.streams:
            for axis in stream.writers + stream.readers:
                assert model.get_parameter(axis.parameter).shape[axis.dim] == site.groups * site.size, axis
            if stream.intercept:
                reader = model.get_parameter(stream.readers[0].parameter)
                assert len(model.get_parameter(stream.intercept)) == len(reader)


def test_every_stream_carries_its_width_in_the_last_dimension(model: nn.Module) -> None:
    seen: dict[tuple[str, str], int] = {}

    def note(key: tuple[str, str], activations: Tensor) -> None:
        seen[key] = activations.shape[-1]

    sites = find_sites(model)
    for site in sites:
        for stream in site.streams:
            attach(model, stream, lambda h, key=(site.name, stream.module): note(key, h))
    logits(model, next(iter(random_rows(4))))
    expected = {(site.name, stream.module): site.groups * site.size for site in sites for stream in site.streams}
    assert seen == expected


def test_attributes_are_what_the_stock_attention_module_holds(model: nn.Module) -> None:
    attributes = [(site, attribute) for site in find_sites(model) for attribute in site.attributes]
    assert len(attributes) == 2 * (3 + 2)
    for site, attribute in attributes:
        stored = getattr(model.get_submodule(attribute.module), attribute.name)
        assert attribute.value(site.width, site.groups, site.each) == stored


def test_an_attribute_knows_its_value_at_every_width() -> None:
    quantities: list[Quantity] = ["width", "total", "scaling", "groups"]
    assert [Attribute(module="m", name="n", quantity=q).value(16, 3) for q in quantities] == [16, 48, 0.25, 3]
    assert Attribute(module="m", name="n", quantity="total").value(3, 1, 16) == 48


def test_the_sites_of_a_compressed_model_are_found_again_with_their_new_widths(model: nn.Module) -> None:
    sites = find_sites(model)
    keep = {"embeddings.word": 12, "layer.0.query_key": 8, "layer.0.value": 8, "layer.1.ffn": 20}
    small = skeleton(model, sites, keep)
    again = find_sites(small)
    assert described(again) == [
        ("embeddings.word", "linear", "embeddings", 12, 1, "embeddings.word"),
        *of_layer(0, head=8),
        *of_layer(1, ffn=20),
    ]
    assert sites[0].factorizes == "bert.embeddings.word_embeddings"
    assert again[0].factorizes is None
    assert again[1:] == after_cuts(sites, keep)[1:]
    fill_with_ones(small, "cpu")
    assert logits(small, next(iter(random_rows(2)))).shape == (2, 3)


def test_the_family_names_parts_that_exist(model: nn.Module) -> None:
    family = find_family(model)
    assert family in FAMILIES
    for path in (family.encoder, family.word_embeddings):
        model.get_submodule(path)


# ---------------------------------------------------------------------------------------------- what is refused


def bert(change: Callable[[Any], object], **config: Any) -> Callable[[], nn.Module]:
    """Makes a tiny BERT to which something was done."""

    def make() -> nn.Module:
        model = tiny_bert(**config)
        change(model)
        return model

    return make


def nothing(model: nn.Module) -> None:
    """Leaves the model as it is."""


class AdaptedLinear(nn.Linear):
    """A linear map that computes something else with its weight."""


class GatedAttention(nn.Module):
    """An attention module of one's own."""


def adapt(model: Any) -> None:
    model.bert.encoder.layer[1].attention.self.key = AdaptedLinear(32, 32)


def replace_attention(model: Any) -> None:
    model.bert.encoder.layer[0].attention.self = GatedAttention()


def replace_ffn(model: Any) -> None:
    model.bert.encoder.layer[0].intermediate = nn.Sequential(nn.Linear(32, 48))


def replace_words(model: Any) -> None:
    model.bert.embeddings.word_embeddings = nn.EmbeddingBag(50, 32)


def stale_head_size(model: Any) -> None:
    model.bert.encoder.layer[1].attention.self.attention_head_size = 8


def odd_scaling(model: Any) -> None:
    model.bert.encoder.layer[1].attention.self.scaling = 1.0


def pruned(model: Any) -> None:
    prune.l1_unstructured(model.bert.encoder.layer[0].output.dense, "weight", amount=0.5)


def parametrized(model: Any) -> None:
    parametrizations.weight_norm(model.bert.encoder.layer[0].output.dense)


def shared_layer(model: Any) -> None:
    model.bert.encoder.layer[1] = model.bert.encoder.layer[0]


def tied_parameter(model: Any) -> None:
    first, second = (model.bert.encoder.layer[i].attention.self for i in range(2))
    second.query.weight = first.query.weight


def half_classifier(model: Any) -> None:
    model.classifier.to(torch.bfloat16)


def in_chunks(model: Any) -> None:
    model.bert.encoder.layer[1].chunk_size_feed_forward = 4


REFUSED = {
    "regression by problem type": (bert(nothing, problem_type="regression"), "regression"),
    "regression by one output": (bert(nothing, labels=1), r"regression \(one output\)"),
    "multi-label": (bert(nothing, problem_type="multi_label_classification"), "multi_label"),
    "decoder": (bert(nothing, is_decoder=True), "decoder"),
    "token classification": (lambda: BertForTokenClassification(BertConfig(**SMALL)), "token-classification"),
    "masked language model": (lambda: BertForMaskedLM(BertConfig(**SMALL)), "masked-language-model"),
    "language model": (lambda: BertLMHeadModel(BertConfig(**SMALL, is_decoder=True)), "generative"),
    "no head": (lambda: BertModel(BertConfig(**SMALL)), "no head"),
    "another architecture": (
        lambda: ConvBertForSequenceClassification(ConvBertConfig(**{**SMALL, "num_attention_heads": 4})),
        "ConvBertForSequenceClassification, whose widths",
    ),
    "no architecture": (lambda: nn.Linear(3, 3), "Linear, whose widths"),
    "a subclass of Linear": (bert(adapt), r"layer\.1\.attention\.self\.key must be Linear. Got AdaptedLinear"),
    "an unknown attention": (bert(replace_attention), r"layer\.0\.attention\.self.* Got nothing"),
    "an unknown feed-forward": (bert(replace_ffn), r"layer\.0\.intermediate\.dense must be Linear. Got nothing"),
    "an unknown embedding": (bert(replace_words), "must be Embedding or .*FactorizedEmbedding.*. Got EmbeddingBag"),
    "a stale head size": (bert(stale_head_size), r"layer\.1\.attention\.self\.attention_head_size must be 16.*Got 8"),
    "an odd scaling": (bert(odd_scaling), r"layer\.1\.attention\.self\.scaling must be 0\.25.*Got 1\.0"),
    "a pruned weight": (bert(pruned), r"layer\.0\.output\.dense must hold its weight .* weight_orig"),
    "a parametrized weight": (bert(parametrized), r"layer\.0\.output\.dense must be Linear. Got Parametrized"),
    "layers that are one": (bert(shared_layer), r"layer\.0\..* and .*layer\.1\..* are the same"),
    "a tied parameter": (bert(tied_parameter), r"layer\.0\.attention\.self\.query\.weight and .*layer\.1"),
    "half precision": (bert(lambda model: model.half()), r"must be float32 or float64.* is torch\.float16"),
    "half precision in one place": (bert(half_classifier), r"classifier\.weight is torch\.bfloat16"),
    "a feed-forward in chunks": (bert(in_chunks), r"layer\.1\.chunk_size_feed_forward must be 0"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_model_that_is_not_understood_is_refused_by_name_and_left_as_it_was(case: str) -> None:
    make, message = REFUSED[case]
    model = make()
    before, modules = snapshot(model), [(name, type(module)) for name, module in model.named_modules()]
    with pytest.raises(UnsupportedModelError, match=message) as caught:
        find_sites(model)
    assert "othing was changed" in str(caught.value)
    assert_untouched(model, before)
    assert [(name, type(module)) for name, module in model.named_modules()] == modules


def test_an_attention_of_another_class_with_the_same_parts_is_refused(model: Any) -> None:
    attention = model.bert.encoder.layer[0].attention.self
    attention.__class__ = type("BertRotarySelfAttention", (type(attention),), {})
    with pytest.raises(UnsupportedModelError, match="BertRotarySelfAttention"):
        find_sites(model)


def test_every_refused_sibling_is_a_class_of_transformers() -> None:
    import transformers

    for family in FAMILIES:
        for name in (family.model_class, *family.refused_classes):
            assert hasattr(transformers, name) or not hasattr(transformers, family.model_class)


def test_a_frozen_model_is_understood() -> None:
    assert len(find_sites(tiny_bert().double().requires_grad_(False))) == 9


class Plain(nn.Module):
    """One attention and one block, with names that a description may get wrong."""

    act = "gelu"
    heads = 2

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o, self.up, self.down = (nn.Linear(32, 32) for _ in range(6))


@pytest.mark.parametrize(
    ("describe", "told"),
    [
        (
            lambda net: attention_sites(
                net, "a", query="q", key="k", value="v", output="o", heads=2, attributes={"b.heads": "groups"}
            ),
            "b.heads must be an attribute of the model. There is none",
        ),
        (
            lambda net: feed_forward_site(net, "f", writers=["up"], reader="down", activation="gelu"),
            "gelu must be an attribute of the model. There is none",
        ),
        (
            lambda net: feed_forward_site(net, "f", writers=["up"], reader="down", activation="act"),
            "an activation must be a module or a function. act is 'gelu'",
        ),
    ],
)
def test_a_description_of_what_is_not_there_is_refused_by_name(describe: Callable[[Plain], Any], told: str) -> None:
    with pytest.raises(UnsupportedModelError, match=told):
        describe(Plain())
