"""The claims of `rmtkd.activations`: moments of the real positions and nothing else, and no trace left in the model.

The reference runs every row alone, without padding and without a mask, and keeps what plain hooks see.
"""

from collections.abc import Iterable

import pytest
import torch
from torch import Tensor, nn

from conftest import assert_untouched, random_rows, snapshot, tiny_bert
from rmtkd.activations import attach, collect, in_groups, moments_of, observe, readers
from rmtkd.covariance import Covariance
from rmtkd.effective import EffectiveSize
from rmtkd.errors import DataError, UnsupportedModelError
from rmtkd.memory import Pieces
from rmtkd.recipes.rows import TokenRows
from rmtkd.replicates import Replicates
from rmtkd.sites import Site, embedding_site, feed_forward_site, find_sites
from rmtkd.surgery import factorize, fill_with_ones, skeleton


def double_bert() -> nn.Module:
    return tiny_bert().double()


def seen_without_padding(model: nn.Module, site: Site, rows: TokenRows) -> list[Tensor]:
    """All vectors of each stream, `n × groups × width`, one row at a time."""
    streams = []
    for stream in site.streams:
        seen: list[Tensor] = []
        module = model.get_submodule(stream.module)

        def keep(
            _: nn.Module, inputs: tuple[Tensor], output: Tensor, seen: list = seen, side: str = stream.side
        ) -> None:
            vectors = inputs[0] if side == "input" else output
            seen.append(vectors[0].reshape(-1, site.groups, site.size))

        handle = module.register_forward_hook(keep)
        with torch.no_grad():
            for ids in rows.ids:
                model(input_ids=torch.tensor([ids]))
        handle.remove()
        streams.append(torch.cat(seen))
    return streams


def hooks(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


# ---------------------------------------------------------------------------------------------- what is seen


@pytest.mark.parametrize("factorized", [False, True])
def test_moments_are_those_of_every_real_token_and_of_no_padding(factorized: bool) -> None:
    model, rows = double_bert(), random_rows(40)
    if factorized:
        factorize(model, "bert.embeddings.word_embeddings")
    sites = find_sites(model)
    assert any((batch["attention_mask"] == 0).any() for batch in rows)
    moments = collect(model, sites, rows)
    assert list(moments) == [site.name for site in sites]
    for site in sites:
        expected = seen_without_padding(model, site, rows)
        assert len(moments[site.name]) == len(expected) == (2 if site.kind == "bilinear" else 1)
        for moment, vectors in zip(moments[site.name], expected, strict=True):
            assert moment.count == len(vectors) == sum(rows.lengths)
            torch.testing.assert_close(moment.mean, vectors.mean(0), rtol=1e-9, atol=1e-9)
            second = torch.einsum("ngi,ngj->gij", vectors, vectors) / len(vectors)
            torch.testing.assert_close(moment.second_moment(), second, rtol=1e-9, atol=1e-9)


def test_batch_by_batch_is_all_at_once() -> None:
    model = double_bert()
    sites = find_sites(model)
    one, many = (collect(model, sites, random_rows(32, batch_size=size)) for size in (32, 3))
    for name in one:
        for a, b in zip(one[name], many[name], strict=True):
            assert a.count == b.count
            torch.testing.assert_close(a.covariance(), b.covariance(), rtol=1e-9, atol=1e-9)


def test_what_stands_in_the_padding_does_not_matter() -> None:
    model = double_bert()
    (batch,) = random_rows(16)
    other = {**batch, "input_ids": torch.where(batch["attention_mask"] == 1, batch["input_ids"], 7)}
    assert not torch.equal(other["input_ids"], batch["input_ids"])
    sites = find_sites(model)
    a, b = collect(model, sites, [batch]), collect(model, sites, [other])
    for name in a:
        torch.testing.assert_close(a[name][0].covariance(), b[name][0].covariance(), rtol=1e-10, atol=1e-10)


def test_without_a_mask_every_position_counts(model: nn.Module) -> None:
    batch = {"input_ids": torch.randint(1, 50, (8, 10))}
    assert collect(model, find_sites(model), [batch])["layer.1.ffn"][0].count == 80


def test_a_site_is_seen_alike_alone_and_among_others() -> None:
    model, rows = double_bert(), random_rows(32)
    sites = find_sites(model)
    together = collect(model, sites, rows)
    for site in sites:
        (alone,) = collect(model, [site], rows).values()
        torch.testing.assert_close(alone[0].covariance(), together[site.name][0].covariance(), rtol=1e-12, atol=1e-12)


def test_dropout_is_off_while_activations_are_seen() -> None:
    model, rows = double_bert(), random_rows(16)
    sites = find_sites(model)
    a, b = collect(model, sites, rows), collect(model.train(), sites, rows)
    assert torch.equal(a["layer.1.ffn"][0].covariance(), b["layer.1.ffn"][0].covariance())


# ---------------------------------------------------------------------------------------------- rows


def effective(model: nn.Module, batches: Iterable, **options) -> dict[str, list[float | None]]:
    observed = observe(model, find_sites(model), batches, **options)
    return {name: [stream.effective_samples for stream in streams] for name, streams in observed.items()}


def test_vectors_of_a_row_belong_together() -> None:
    model, rows = double_bert(), random_rows(60)
    found = effective(model, rows)
    for site in find_sites(model):
        ids = torch.arange(60).repeat_interleave(torch.tensor(rows.lengths))
        for value, vectors in zip(found[site.name], seen_without_padding(model, site, rows), strict=True):
            expected = EffectiveSize(site.groups * site.size)
            expected.update(vectors.flatten(1), ids)
            assert value == pytest.approx(expected.value(), rel=1e-6)
            assert value is not None and 0 < value <= sum(rows.lengths)


def test_the_effective_number_is_that_of_the_rows_and_not_of_the_batches() -> None:
    model = double_bert()
    (whole,) = random_rows(60, batch_size=60)
    bare = {name: value for name, value in whole.items() if name != "row_ids"}
    shuffled = list(random_rows(60, batch_size=9, shuffle=True))
    for one, others in (
        (whole, [shuffled, shuffled[::-1], list(random_rows(60, batch_size=7))]),
        (bare, [[{name: value[i : i + 7] for name, value in bare.items()} for i in range(0, 60, 7)]]),
    ):
        expected = effective(model, [one])
        for found in (effective(model, [one], pieces=Pieces(count=4)), *(effective(model, x) for x in others)):
            for name in expected:
                assert found[name] == pytest.approx(expected[name], rel=1e-6)


def test_one_row_says_nothing_of_its_effective_number() -> None:
    batch = {"input_ids": torch.randint(1, 50, (1, 24)).repeat(1, 1)}
    model = double_bert()
    heads = [site for site in find_sites(model) if site.groups == 2]
    observed = observe(model, heads, [batch])
    assert all(stream.effective_samples is None for streams in observed.values() for stream in streams)


def test_what_observing_and_collecting_give_is_the_same() -> None:
    model, rows = tiny_bert(), random_rows(40)
    sites = find_sites(model)
    collected, observed = collect(model, sites, rows), moments_of(observe(model, sites, rows, replicate_seed=0))
    for name in collected:
        for a, b in zip(collected[name], observed[name], strict=True):
            assert torch.equal(a.covariance(), b.covariance())


# ---------------------------------------------------------------------------------------------- two stochastic passes


def replicated(
    model: nn.Module, name: str, seed: int = 0, rows: TokenRows | None = None
) -> tuple[Covariance, Replicates]:
    (stream,) = observe(model, find_sites(model), rows or random_rows(60), replicate_seed=seed)[name]
    assert stream.replicates is not None
    return stream.moments, stream.replicates


def test_two_stochastic_passes_share_what_is_before_any_dropout_and_differ_after() -> None:
    moments, replicates = replicated(double_bert(), "embeddings.word")
    torch.testing.assert_close(replicates.covariance(), moments.covariance(), rtol=1e-10, atol=1e-10)
    _, replicates = replicated(double_bert(), "layer.1.ffn")
    found = replicates.eigenvalues()
    assert found.shape == (1, 48)
    assert float(found.min()) < -1e-4 * float(found.max())
    assert (found.diff(dim=-1) <= 0).all()


def test_replicates_are_drawn_from_their_seed_and_leave_random_numbers_alone() -> None:
    model = double_bert()
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first, again, other = (replicated(model, "layer.1.ffn", seed)[1].covariance() for seed in (1, 1, 2))
    assert torch.equal(torch.rand(3), expected)
    assert torch.equal(first, again)
    assert not torch.allclose(first, other, rtol=1e-6)


def test_replicates_train_no_norm_and_leave_every_mode_as_it_was() -> None:
    model = double_bert()
    model.get_submodule("bert.encoder.layer.0").register_module("counter", nn.BatchNorm1d(2).double())
    modes, before = [module.training for module in model.modules()], snapshot(model)
    seen = []
    for module in (model.get_submodule("bert.encoder.layer.0.output"), model.get_submodule("bert.embeddings.dropout")):
        module.register_forward_hook(lambda module, *_: seen.append((type(module).__name__, module.training)))
    rows = random_rows(60)
    replicated(model, "layer.0.ffn", rows=rows)
    assert {training for name, training in seen if name != "Dropout"} == {False}
    assert [training for name, training in seen if name == "Dropout"] == [False, True, True] * len(list(rows))
    assert [module.training for module in model.modules()] == modes
    assert_untouched(model, before)


def test_a_model_without_dropout_has_no_stochastic_pass() -> None:
    model = tiny_bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    with pytest.raises(UnsupportedModelError, match="BertForSequenceClassification has no stochastic pass"):
        replicated(model, "layer.0.ffn")
    assert hooks(model) == 0


# ---------------------------------------------------------------------------------------------- what is left behind


def test_forward_passes_after_the_first_go_no_deeper_than_the_deepest_site(model: nn.Module) -> None:
    rows, ran, parts = random_rows(48, batch_size=16), [], ("encoder.layer.0", "encoder.layer.1", "pooler")
    for path in parts:
        module = model.get_submodule(f"bert.{path}")
        module.register_forward_pre_hook(lambda _, __, path=path: ran.append(path))
    shallow = [site for site in find_sites(model) if site.block in ("embeddings", "layer.0")]
    moments = collect(model, shallow, rows)
    assert ran == [*parts, "encoder.layer.0", "encoder.layer.0"]
    assert moments["layer.0.ffn"][0].count == sum(rows.lengths)


def test_no_hook_and_no_flag_is_left_and_no_weight_changed(model: nn.Module, rows: TokenRows) -> None:
    model.train()
    model.get_submodule("bert.pooler").eval()
    before, flags = snapshot(model), [module.training for module in model.modules()]
    collect(model, find_sites(model), rows)
    assert hooks(model) == 0
    assert [module.training for module in model.modules()] == flags
    assert_untouched(model, before)
    assert all(parameter.grad is None for parameter in model.parameters())


def broken_batches() -> Iterable[dict[str, Tensor]]:
    yield from random_rows(16)
    raise KeyError("the data loader broke")


@pytest.mark.parametrize(
    ("batches", "error"),
    [
        (broken_batches(), KeyError),
        ([{"input_ids": torch.full((2, 4), 999)}], IndexError),
        ([{"input_ids": torch.ones(2, 4, dtype=torch.long), "nonsense": 3}], AttributeError),
    ],
)
def test_nothing_is_left_behind_after_an_error_either(model: nn.Module, batches, error: type[Exception]) -> None:
    model.train()
    with pytest.raises(error):
        collect(model, find_sites(model), batches)
    assert hooks(model) == 0
    assert all(module.training for module in model.modules())


# ---------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    ("module", "site"),
    [
        ("bert.encoder.layer.1.attention.self.key", r"layer\.1\.query_key"),
        ("bert.encoder.layer.0.intermediate.dense", r"layer\.0\.ffn"),
        ("bert.embeddings.word_embeddings", r"embeddings\.word"),
    ],
)
def test_activations_that_are_not_finite_name_the_site(
    model: nn.Module, rows: TokenRows, module: str, site: str, value: float
) -> None:
    with torch.no_grad():
        model.get_parameter(f"{module}.weight")[3] = value
    with pytest.raises(DataError, match=rf"^site {site}: Vectors must be finite"):
        collect(model, find_sites(model), rows)
    assert hooks(model) == 0


def test_no_rows_are_refused(model: nn.Module) -> None:
    with pytest.raises(DataError, match=r"at least one real .* Got none"):
        collect(model, find_sites(model), [])


def test_rows_of_padding_only_are_refused(model: nn.Module) -> None:
    batch = {"input_ids": torch.zeros(4, 6, dtype=torch.long), "attention_mask": torch.zeros(4, 6, dtype=torch.long)}
    with pytest.raises(DataError, match=r"at least one real .* padding"):
        collect(model, find_sites(model), [batch])


def test_fewer_vectors_than_the_width_are_refused_and_the_site_is_named(model: nn.Module) -> None:
    sites = find_sites(model)
    batch = {"input_ids": torch.randint(1, 50, (2, 10))}  # 20 vectors: enough for heads of 16, not for a ffn of 48
    with pytest.raises(DataError, match=r"layer\.0\.ffn of width 48 .* Got 20"):
        collect(model, sites[2:], [batch])
    heads = [site for site in sites if site.groups == 2]
    assert collect(model, heads, [batch])["layer.0.value"][0].count == 20


def test_as_many_vectors_as_the_width_are_enough(model: nn.Module) -> None:
    batch = {"input_ids": torch.randint(1, 50, (4, 12))}
    assert collect(model, find_sites(model), [batch])["layer.0.ffn"][0].count == 48


def test_a_mask_that_does_not_say_which_positions_are_real_is_refused(model: nn.Module) -> None:
    batch = {"input_ids": torch.ones(2, 5, dtype=torch.long), "attention_mask": torch.ones(2, 1, 5, 5)}
    with pytest.raises(DataError, match=r"attention_mask must have shape \[rows, length\]"):
        collect(model, find_sites(model), [batch])


# ---------------------------------------------------------------------------------------------- the parts


def test_groups_are_neighbouring_coordinates() -> None:
    assert in_groups(torch.arange(6), 2).tolist() == [[0, 1, 2], [3, 4, 5]]


@pytest.mark.parametrize("name", ["bert.encoder.layer.0.output.dense", "bert.embeddings.word_embeddings"])
def test_an_attached_function_sees_and_may_replace_a_stream(name: str) -> None:
    model = double_bert()
    (batch,) = random_rows(4, batch_size=4)
    stream = next(s.streams[0] for s in find_sites(model) if s.streams[0].module == name)
    with torch.no_grad():
        before = model(**batch).logits
        for see, same in ((lambda h: None, True), (lambda h: h.clone(), True), (lambda h: h * 2, False)):
            handle = attach(model, stream, see)
            assert torch.allclose(model(**batch).logits, before) == same
            handle.remove()
        assert torch.equal(model(**batch).logits, before)


def test_a_module_that_is_called_by_keyword_is_seen_and_replaced_alike() -> None:
    class Model(nn.Module):
        def __init__(self, by_keyword: bool):
            super().__init__()
            self.up, self.down, self.by_keyword = nn.Linear(3, 8), nn.Linear(8, 2), by_keyword

        def forward(self, x: Tensor) -> Tensor:
            hidden = self.up(x).relu()
            return self.down(input=hidden) if self.by_keyword else self.down(hidden)

    model, named, batch = Model(False), Model(True), torch.randn(20, 3)
    named.load_state_dict(model.state_dict())
    site = feed_forward_site(model, "inner", writers=["up"], reader="down")
    found = [collect(net, [site], [(batch,)])["inner"][0].covariance() for net in (model, named)]
    assert torch.equal(*found)
    for net in (model, named):
        attach(net, site.streams[0], lambda h: h * 2)
    assert torch.equal(model(batch), named(batch))


def test_readers_are_what_turns_activations_into_the_next_layer_s_input() -> None:
    model = double_bert()
    for site in find_sites(model):
        if site.kind == "bilinear" or site.factorizes:
            continue
        module = model.get_submodule(site.streams[0].module)
        assert isinstance(module, nn.Linear)
        activations = torch.randn(5, site.groups * site.size, dtype=torch.float64)
        got = torch.einsum("gow,ngw->no", readers(model, site)[0], in_groups(activations, site.groups))
        torch.testing.assert_close(got + module.bias, module(activations))


def test_the_reader_of_an_embedding_is_the_identity_until_it_is_factorised() -> None:
    model = double_bert()
    site = find_sites(model)[0]
    assert torch.equal(readers(model, site)[0], torch.eye(32, dtype=torch.float64)[None])
    small = skeleton(model, [site], {site.name: 5})
    fill_with_ones(small, "cpu")
    assert readers(small, find_sites(small)[0])[0].shape == (1, 32, 5)


class Residual(nn.Module):
    """Adds to its stream in place, or not."""

    def __init__(self, in_place: bool):
        super().__init__()
        self.words, self.up, self.down, self.out = (
            nn.Embedding(40, 8),
            nn.Linear(8, 16),
            nn.Linear(16, 8),
            nn.Linear(8, 3),
        )
        self.in_place = in_place

    def forward(self, ids: Tensor) -> Tensor:
        state = self.words(ids)
        change = self.down(torch.relu(self.up(state)))
        if self.in_place:
            state += change
        else:
            state = state + change
        return self.out(state.mean(1))


def test_what_is_seen_of_a_stream_is_what_was_there_when_it_passed() -> None:
    torch.manual_seed(0)
    plain, in_place = Residual(False), Residual(True)
    in_place.load_state_dict(plain.state_dict())
    rows = [(torch.randint(0, 40, (16, 10)),) for _ in range(4)]
    seen = [
        collect(model, [embedding_site(model, "words")], rows)["embeddings.word"][0].covariance()
        for model in (plain, in_place)
    ]
    assert torch.equal(*seen)
