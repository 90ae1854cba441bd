"""The claims of `rmtkd.modules`: factorising changes nothing, and a random start is what its seed says."""

import pytest
import torch
from torch import nn

from conftest import assert_untouched, random_rows, snapshot, tiny_bert
from rmtkd.measurement import count_parameters
from rmtkd.modules import factorized, randomize
from rmtkd.surgery import factorize_embedding

WORDS = "bert.embeddings.word_embeddings"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_factorized_computes_bit_for_bit_what_the_embedding_does(dtype: torch.dtype) -> None:
    embedding = nn.Embedding(11, 6, padding_idx=0, dtype=dtype)
    ids = torch.randint(0, 11, (4, 7))
    made = factorized(embedding)
    assert torch.equal(made(ids), embedding(ids))
    assert made(ids).dtype == dtype
    assert made.weight is embedding.weight
    assert made.padding_idx == 0


@pytest.mark.parametrize("training", [True, False])
def test_factorized_keeps_the_mode_of_the_embedding(training: bool) -> None:
    made = factorized(nn.Embedding(5, 3).train(training))
    assert {module.training for module in made.modules()} == {training}


def test_factorizing_an_embedding_without_memory_takes_none() -> None:
    made = factorized(nn.Embedding(5, 3, device="meta"))
    assert all(parameter.is_meta for parameter in made.parameters())


def test_factorizing_twice_is_factorizing_once() -> None:
    model = tiny_bert()
    factorize_embedding(model, WORDS)
    once = model.get_submodule(WORDS)
    factorize_embedding(model, WORDS)
    assert model.get_submodule(WORDS) is once


def test_what_transformers_asks_of_its_input_embedding_still_works() -> None:
    model = tiny_bert()
    total = count_parameters(model)
    factorize_embedding(model, WORDS)
    assert model.get_input_embeddings() is model.get_submodule(WORDS)
    assert model.num_parameters() == count_parameters(model) == total + 32 * 32 + 32
    embeddings = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Embedding))
    assert model.num_parameters(exclude_embeddings=True) == model.num_parameters() - embeddings
    model.tie_weights()
    model.enable_input_require_grads()
    batch = next(iter(random_rows(4)))
    assert torch.isfinite(model(**batch).loss)


def test_the_vocabulary_of_a_factorised_model_can_grow() -> None:
    model = tiny_bert()
    factorize_embedding(model, WORDS)
    ids = torch.arange(4, 12)[None]
    before = model(ids).logits
    model.resize_token_embeddings(60, mean_resizing=False)
    assert torch.equal(model(ids).logits, before)
    assert torch.isfinite(model(ids + 48).logits).all()


def test_a_random_start_depends_on_its_seed_alone() -> None:
    models = [tiny_bert(seed=i) for i in range(3)]
    for model, seed in zip(models, (5, 5, 6), strict=True):
        randomize(model, seed=seed)
    assert_untouched(models[1], snapshot(models[0]))
    assert not torch.equal(models[2].classifier.weight, models[0].classifier.weight)


def test_a_random_start_leaves_the_global_generator_alone() -> None:
    before = torch.random.get_rng_state()
    model = tiny_bert()
    torch.random.set_rng_state(before)
    randomize(model, seed=1)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_a_random_start_is_the_same_in_every_precision() -> None:
    single, double = tiny_bert(), tiny_bert().double()
    randomize(single, seed=3)
    randomize(double, seed=3)
    assert_untouched(double, snapshot(single.double()))


def test_a_random_start_is_xavier_and_small_and_keeps_nothing() -> None:
    model = tiny_bert()
    before = snapshot(model)
    randomize(model, seed=0)
    for name, parameter in model.named_parameters():
        module = model.get_submodule(name.rpartition(".")[0])
        if isinstance(module, nn.Linear) and name.endswith("weight"):
            bound = (6 / (module.in_features + module.out_features)) ** 0.5
            assert 0.8 * bound < parameter.abs().max() <= bound, name
        elif isinstance(module, nn.Embedding):
            assert parameter.abs().max() < 0.1, name
        elif name.endswith("weight"):
            assert torch.equal(parameter, torch.ones_like(parameter)), name
        else:
            assert not parameter.any(), name
        if "LayerNorm" not in name:
            assert not torch.equal(parameter, before[name]), name
