"""The claims that hold for every family: full width changes nothing, less width computes what the projected model
computes, the caller's model stays, and models come from checkpoints and go to folders. In float64, on rows of two
sequences with padding, and with token types where the family has them.
"""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification
from transformers.activations import ACT2FN

import rmtkd
from conftest import FAMILY_NAMES, assert_untouched, pair_batches, snapshot, tiny
from rmtkd import artifact
from rmtkd.activations import collect
from rmtkd.batches import logits
from rmtkd.cutting import cut_in_order
from rmtkd.errors import UnsupportedModelError
from rmtkd.families import FAMILIES
from rmtkd.measurement import count_parameters
from rmtkd.modules import randomize
from rmtkd.sites import find_family, find_sites, longest_input
from rmtkd.surgery import check_cut

VARIANTS: dict[str, dict[str, Any]] = {
    "bert/gated by nothing": {"hidden_act": "gelu_new"},
    "electra/embedding as wide as the encoder": {"embedding_size": 32},
    "albert/groups of layers": {"num_hidden_layers": 4, "num_hidden_groups": 2, "inner_group_num": 2},
    "modernbert/biased": {"mlp_bias": True, "attention_bias": True, "norm_bias": True},
    "modernbert/mean pooling": {"classifier_pooling": "mean"},
    "eurobert/biased": {"mlp_bias": True, "classifier_pooling": "mean"},
}
"""Configurations of a family that lead through other code."""
MODELS = [*FAMILY_NAMES, *(name for name in VARIANTS if name.partition("/")[0] in FAMILY_NAMES)]


def make(name: str, **config: Any) -> Any:
    return tiny(name.partition("/")[0], **{**VARIANTS.get(name, {}), **config})


def run(model: nn.Module, batch: Any) -> Tensor:
    with torch.no_grad():
        return logits(model.eval(), batch)


def difference(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


def full_width_difference(model: nn.Module) -> float:
    """What cutting every site at its full width changes, in float64."""
    model = model.double()
    batches, sites = pair_batches(model), find_sites(model)
    student, _ = cut_in_order(model, sites, {site.name: site.width for site in sites}, batches)
    return max(difference(run(student, batch), run(model, batch)) for batch in batches)


def halved(model: nn.Module) -> nn.Module:
    sites = find_sites(model)
    return cut_in_order(model, sites, {site.name: site.width // 2 for site in sites}, pair_batches(model))[0]


# ---------------------------------------------------------------------------------------------- what is found


def test_these_tests_see_every_family_that_transformers_has() -> None:
    assert len(FAMILY_NAMES) >= 8
    assert {type(make(name)).__name__ for name in FAMILY_NAMES} <= {family.model_class for family in FAMILIES}


@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_the_batches_of_these_tests_hold_padding_and_two_sequences(name: str) -> None:
    model = make(name)
    batches = pair_batches(model)
    assert any((batch["attention_mask"] == 0).any() for batch in batches)
    knows_types = getattr(model.config, "type_vocab_size", 0) > 1
    assert knows_types == any(batch.get("token_type_ids", torch.zeros(1)).any() for batch in batches)


@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_a_family_s_widths_are_found(name: str) -> None:
    model = make(name)
    words = {"electra": 16, "albert": 16}.get(name, 32)
    layers = 1 if name == "albert" else 2
    expected: dict[str, tuple[int, int]] = {"embeddings.word": (words, 1)}
    for i in range(layers):
        if name not in ("modernbert", "eurobert"):  # rotary attention is left alone
            expected |= {f"layer.{i}.heads": (2, 1), f"layer.{i}.query_key": (16, 2), f"layer.{i}.value": (16, 2)}
        expected[f"layer.{i}.ffn"] = (48, 1)
    sites = find_sites(model)
    assert {site.name: (site.width, site.groups) for site in sites} == expected
    scopes = {site.block: site.scope for site in sites if site.block != "embeddings"}
    if name == "albert":
        assert set(scopes.values()) == {None}
    else:
        assert len({id(model.get_submodule(scope or "?")) for scope in scopes.values()}) == layers


@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_a_family_names_its_encoder(name: str) -> None:
    model = make(name)
    encoder = model.get_submodule(find_family(model).encoder)
    outside = {axis.parameter for site in find_sites(model)[:1] for axis in site.streams[0].writers}
    inside = {
        axis.parameter
        for site in find_sites(model)[1:]
        for stream in site.streams
        for axis in (*stream.writers, *stream.readers)
    }
    own = {id(parameter) for parameter in encoder.parameters()}
    assert all(id(model.get_parameter(parameter)) in own for parameter in inside)
    assert not any(parameter.startswith(find_family(model).encoder + ".") for parameter in outside)


@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_the_longest_input_runs_and_one_more_does_not_where_positions_are_learned(name: str) -> None:
    model = make(name)
    longest = longest_input(model)
    assert longest is not None and longest == find_family(model).longest_input(model.config)
    assert run(model, {"input_ids": torch.full((1, longest), 5)}).isfinite().all()
    if name not in ("modernbert", "eurobert"):  # rotary positions have no end
        with pytest.raises((IndexError, RuntimeError)):
            run(model, {"input_ids": torch.full((1, longest + 1), 5)})


# ---------------------------------------------------------------------------------------------- what is exact


@pytest.mark.parametrize("name", MODELS)
def test_a_cut_at_full_width_changes_nothing(name: str) -> None:
    assert full_width_difference(make(name)) < 1e-10


@pytest.mark.parametrize("name", MODELS)
def test_a_cut_computes_what_the_projected_model_computes_and_leaves_that_model_alone(name: str) -> None:
    model = make(name).double().train()
    before = snapshot(model)
    batches, sites = pair_batches(model), find_sites(model)
    student, bases = cut_in_order(model, sites, {site.name: site.width // 2 for site in sites}, batches)
    for batch in batches:
        assert check_cut(model, student, sites, bases, batch) < 1e-9
        assert difference(run(student, batch), run(model.eval(), batch)) > 1e-4  # the cut did cut
    assert_untouched(model, before)


@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_a_model_is_cut_twice(name: str) -> None:
    model = make(name).double()
    once = halved(model)
    batches, sites = pair_batches(model), find_sites(once)
    assert {s.name: s.width for s in sites} == {s.name: s.width // 2 for s in find_sites(model)}
    assert all(site.factorizes is None for site in sites)
    twice, bases = cut_in_order(once, sites, {site.name: site.width // 2 for site in sites}, batches)
    assert check_cut(once, twice, sites, bases, batches[1]) < 1e-9
    assert full_width_difference(once) < 1e-10


@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_gradients_reach_every_parameter_of_a_cut_model_that_they_reached_before(name: str) -> None:
    def reached(model: nn.Module, names: set[str]) -> set[str]:
        model.train()
        model(**pair_batches(model)[1]).loss.backward()
        return {n for n, p in model.named_parameters() if n in names and p.grad is not None and p.grad.any()}

    model = make(name)
    names = {
        parameter for parameter, _ in model.named_parameters() if not parameter.endswith(("k_lin.bias", "key.bias"))
    }
    student = halved(model)
    assert reached(student, names) == reached(model, names)


def test_a_layer_that_is_called_again_and_again_is_seen_at_each_call() -> None:
    model = make("albert").double()
    layer, seen = model.albert.encoder.albert_layer_groups[0].albert_layers[0], []
    batches = pair_batches(model)
    handle = layer.ffn_output.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    for batch in batches:
        run(model, batch)
    handle.remove()
    masks = [batch["attention_mask"].bool() for batch in batches for _ in range(3)]
    vectors = torch.cat([activations[mask] for activations, mask in zip(seen, masks, strict=True)])
    ((moment,),) = (collect(model, [site for site in find_sites(model) if site.kind == "pointwise"], batches)).values()
    assert moment.count == len(vectors) == 3 * sum(int(batch["attention_mask"].sum()) for batch in batches)
    torch.testing.assert_close(moment.covariance()[0], vectors.T.cov(correction=0), rtol=1e-9, atol=1e-9)


def test_a_reader_without_a_bias_is_cut_about_zero() -> None:
    model = make("modernbert").double()
    site = find_sites(model)[1]
    assert not site.streams[0].is_centred
    batches = pair_batches(model)
    with torch.no_grad():
        model.model.layers[0].mlp.act = nn.Sigmoid()  # far from zero on average
    _, bases = cut_in_order(model, [site], {site.name: 20}, batches)
    assert not bases[site.name][0].mean.any()


@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_a_family_is_compressed_from_plan_to_record(name: str) -> None:
    model = make(name)
    batches = pair_batches(model, 60)
    (head,) = (module for module in model.modules() if isinstance(module, nn.Linear) and module.out_features == 3)
    with torch.no_grad():  # a random head may answer one class always
        head.bias.sub_(torch.cat([run(model, batch) for batch in batches]).median(0).values)
    batches = [{**batch, "labels": run(model, batch).argmax(-1)} for batch in batches]
    small = rmtkd.compress(
        model,
        train=batches,
        selection=batches,
        report=batches,
        calibration=batches,
        target="80%params",
        multiple_of=4,
        epochs=1.0,
        precision="fp32",
        tolerance=1.0,
        control=True,
    )
    before, after = small.record["baseline"], small.record["compressed"]
    assert after["parameters"] == count_parameters(small.model) <= 0.8 * before["parameters"]
    assert after["parameters_encoder"] < before["parameters_encoder"]
    assert after["parameters"] == small.plan.predicted["params"]
    assert after["flops"] == small.plan.predicted["flops"] < before["flops"]
    assert all(done.check_error < 1e-4 and done.steps > 0 for done in small.rounds)
    assert small.record["control"]["accuracy"]["value"] <= 1


@pytest.mark.parametrize("name", MODELS)
def test_a_uniform_plan_gives_a_model_that_the_stock_class_loads(name: str) -> None:
    model = make(name)
    batches = pair_batches(model, 60)
    made, _ = rmtkd.plan(model, calibration=batches, uniform=True, target="90%params", multiple_of=4, policy="paper")
    small = rmtkd.narrow(model, made, calibration=batches)
    assert count_parameters(small) == made.predicted["params"] <= 0.9 * made.baseline["params"]
    before, after = ({site.name: site.width for site in find_sites(m)} for m in (model, small))
    (width,) = {after[site.name] for site in find_sites(model) if site.kind == "pointwise"}
    assert width < 48
    assert after == {name: width if name.endswith(".ffn") else whole for name, whole in before.items()}
    config = copy.deepcopy(model.config)
    setattr(config, "hidden_dim" if name == "distilbert" else "intermediate_size", width)
    stock = type(model)(config)
    stock.load_state_dict(small.state_dict(), strict=True)
    for batch in batches:
        assert torch.equal(run(stock, batch), run(small, batch))


@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_a_random_start_keeps_nothing_of_the_trained_model(name: str) -> None:
    model = make(name)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(7)
    randomize(model, seed=0)
    assert not any((parameter == 7).any() for parameter in model.parameters())


# ---------------------------------------------------------------------------------------------- activations


@pytest.mark.parametrize("activation", sorted(set(ACT2FN) - {"linear"}))
def test_every_activation_of_transformers_is_exact_at_full_width(activation: str) -> None:
    model = make("bert", num_hidden_layers=1, hidden_act=activation)
    assert full_width_difference(model) < 1e-10


class Rolled(nn.Module):
    """Gives every unit its neighbour's value."""

    def forward(self, x: Tensor) -> Tensor:
        return x.roll(1, -1)


@pytest.mark.parametrize(
    "activation",
    [
        nn.Softmax(-1),
        nn.LayerNorm(48),
        nn.PReLU(48),
        nn.GLU(),
        nn.LayerNorm(48, elementwise_affine=False),
        Rolled(),
    ],
)
def test_an_activation_that_mixes_units_is_refused(activation: Any) -> None:
    model = make("bert")
    model.bert.encoder.layer[1].intermediate.intermediate_act_fn = activation
    with pytest.raises(UnsupportedModelError, match=r"layer\.1\.intermediate\.intermediate_act_fn must act on every"):
        find_sites(model)


# ---------------------------------------------------------------------------------------------- what is refused


SIBLINGS = [
    (family.name, name) for family in FAMILIES if family.name in FAMILY_NAMES for name in family.refused_classes
]


@pytest.mark.parametrize(("family", "name"), SIBLINGS)
def test_a_sibling_with_another_head_is_refused_by_name(family: str, name: str) -> None:
    config = make(family).config
    config.is_decoder = name.endswith(("LMHeadModel", "ForCausalLM"))
    config.num_labels = 2
    model = getattr(transformers, name)(config)
    with pytest.raises(UnsupportedModelError, match=rf"{name} has .*{make(family).__class__.__name__}"):
        find_sites(model)


@pytest.mark.parametrize("name", FAMILY_NAMES)
@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"problem_type": "regression"}, "regression"),
        ({"num_labels": 1}, "regression"),
        ({"problem_type": "multi_label_classification"}, "multi_label"),
    ],
)
def test_another_task_is_refused(name: str, config: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        find_sites(make(name, **config))


@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_parts_of_another_class_are_refused_by_name(name: str) -> None:
    family = next(family for family in FAMILIES if family.name == name)
    parts = {**family.feed_forward.stock, **({family.attention.module: ""} if family.attention else {})}
    for part in parts:
        model = make(name)
        module = model.get_submodule(f"{family.layers.replace('*', '0')}.{part}".rstrip("."))
        module.__class__ = type("AnotherClass", (type(module),), {})
        with pytest.raises(UnsupportedModelError, match=r"Got AnotherClass"):
            find_sites(model)


# ---------------------------------------------------------------------------------------------- folders


@pytest.mark.parametrize("name", MODELS)
def test_a_cut_model_is_saved_and_loaded_to_the_bit(name: str, tmp_path: Path) -> None:
    model = halved(make(name))
    artifact.save(model, tmp_path / "model")
    loaded = rmtkd.load(tmp_path / "model")
    for batch in pair_batches(model):
        assert torch.equal(run(loaded, batch), run(model, batch))
    assert find_sites(loaded) == find_sites(model)
    manifest = json.loads((tmp_path / "model" / artifact.MANIFEST).read_text())
    assert manifest["model_class"] == f"Rmtkd{type(model).__name__}" == type(loaded).__name__


HEADS: dict[str, tuple[str, dict[str, tuple[int, ...]]]] = {
    "bert": (
        "google-bert/bert-base-uncased",
        {
            "cls.predictions.bias": (50,),
            "cls.predictions.transform.dense.weight": (32, 32),
            "cls.predictions.transform.dense.bias": (32,),
            "cls.predictions.transform.LayerNorm.gamma": (32,),
            "cls.predictions.transform.LayerNorm.beta": (32,),
            "cls.seq_relationship.weight": (2, 32),
            "cls.seq_relationship.bias": (2,),
        },
    ),
    "roberta": (
        "FacebookAI/roberta-base",
        {
            "lm_head.bias": (50,),
            "lm_head.dense.weight": (32, 32),
            "lm_head.dense.bias": (32,),
            "lm_head.layer_norm.weight": (32,),
            "lm_head.layer_norm.bias": (32,),
            "roberta.pooler.dense.weight": (32, 32),
            "roberta.pooler.dense.bias": (32,),
        },
    ),
    "electra": (
        "google/electra-small-discriminator",
        {
            "discriminator_predictions.dense.weight": (32, 32),
            "discriminator_predictions.dense.bias": (32,),
            "discriminator_predictions.dense_prediction.weight": (1, 32),
            "discriminator_predictions.dense_prediction.bias": (1,),
        },
    ),
    "distilbert": (
        "distilbert/distilbert-base-uncased",
        {
            "vocab_transform.weight": (32, 32),
            "vocab_transform.bias": (32,),
            "vocab_layer_norm.weight": (32,),
            "vocab_layer_norm.bias": (32,),
            "vocab_projector.weight": (50, 32),
            "vocab_projector.bias": (50,),
        },
    ),
    "albert": (
        "albert/albert-base-v2",
        {
            "predictions.bias": (50,),
            "predictions.LayerNorm.weight": (16,),
            "predictions.LayerNorm.bias": (16,),
            "predictions.dense.weight": (16, 32),
            "predictions.dense.bias": (16,),
            "predictions.decoder.weight": (50, 16),
            "predictions.decoder.bias": (50,),
        },
    ),
    "modernbert": ("answerdotai/ModernBERT-base", {"decoder.bias": (50,)}),
    "eurobert": ("EuroBERT/EuroBERT-210m", {"lm_head.weight": (50, 32)}),
}
"""A public checkpoint of the family, and what its file holds beside the encoder."""
HEADS["xlm-roberta"] = ("FacebookAI/xlm-roberta-base", HEADS["roberta"][1])
HEADS["camembert"] = ("almanach/camembert-base", HEADS["roberta"][1])
POSITION_IDS = {"bert": "bert.embeddings", "roberta": "roberta.embeddings", "distilbert": "distilbert.embeddings"}
"""Where older checkpoints hold the buffer of positions."""


def write_checkpoint(folder: Path, model: Any, tensors: dict[str, Tensor]) -> Path:
    folder.mkdir()
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors", {"format": "pt"}
    )
    (folder / "config.json").write_text(json.dumps(model.config.to_dict()))
    return folder


def classifier_from(folder: Path) -> Any:
    return AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3, dtype=torch.float32)


@pytest.mark.filterwarnings("ignore")  # transformers tells of the heads that it drops and makes
@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_a_checkpoint_of_pretraining_is_understood_and_exact_at_full_width(name: str, tmp_path: Path) -> None:
    model = make(name)
    _, head = HEADS[name]
    encoder = {key: t for key, t in model.state_dict().items() if key.startswith(f"{model.base_model_prefix}.")}
    if name == "bert":  # the names of TensorFlow, which the hub's file still has
        encoder = {
            key.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): tensor
            for key, tensor in encoder.items()
        }
    if name in POSITION_IDS:
        encoder[f"{POSITION_IDS[name]}.position_ids"] = torch.arange(model.config.max_position_embeddings)[None]
    tensors = {**encoder, **{key: torch.randn(shape) for key, shape in head.items()}}
    loaded = classifier_from(write_checkpoint(tmp_path / "checkpoint", model, tensors))
    base = loaded.base_model.state_dict()
    assert type(loaded) is type(model)
    for key, tensor in model.base_model.state_dict().items():
        if not key.startswith("pooler"):
            assert torch.equal(base[key], tensor), key
    assert len(find_sites(loaded)) == len(find_sites(model))
    assert full_width_difference(loaded) < 1e-10


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_a_checkpoint_of_a_bare_encoder_is_understood_and_exact_at_full_width(name: str, tmp_path: Path) -> None:
    """As many small encoders are stored: names without the family's prefix."""
    model = make(name)
    loaded = classifier_from(write_checkpoint(tmp_path / "checkpoint", model, model.base_model.state_dict()))
    word = find_family(model).word_embeddings
    assert torch.equal(loaded.get_submodule(word).weight, model.get_submodule(word).weight)
    assert full_width_difference(loaded) < 1e-10


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_a_fine_tuned_checkpoint_gives_the_same_model(name: str, tmp_path: Path) -> None:
    model = make(name)
    loaded = classifier_from(write_checkpoint(tmp_path / "checkpoint", model, model.state_dict())).eval()
    batch = pair_batches(model)[1]
    assert torch.equal(run(loaded, batch), run(model, batch))
    assert full_width_difference(loaded) < 1e-10
