"""The claims of `rmtkd.conformance`: a sound model passes at every site, a fault is told at the site where it is."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rmtkd
from conftest import FAMILY_NAMES, assert_untouched, pair_batches, random_rows, snapshot, tiny
from rmtkd.activations import collect
from rmtkd.conformance import LONGEST, Verdict, random_batches
from rmtkd.cutting import cut_in_order
from rmtkd.errors import DataError, SurgeryError, UnsupportedModelError
from rmtkd.sites import attention_sites, embedding_site, feed_forward_site, find_sites, linear_site
from rmtkd.surgery import check_cut


def failed(verdicts: tuple[Verdict, ...]) -> dict[str, str]:
    return {verdict.site: verdict.why for verdict in verdicts if not verdict.ok}


# ---------------------------------------------------------------------------------------------- sound models


@pytest.mark.parametrize("rows", ["random", "given"])
@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_every_family_passes_at_every_site(name: str, rows: str) -> None:
    model = tiny(name).train()
    before = snapshot(model)
    verdicts = rmtkd.check(model, None if rows == "random" else pair_batches(model))
    assert failed(verdicts) == {}
    assert [verdict.site for verdict in verdicts] == [site.name for site in find_sites(model)]
    for verdict in verdicts:
        assert verdict.full_width_error is not None and verdict.full_width_error < 1e-10
        assert verdict.cut_error is not None and verdict.cut_error < 1e-4
        assert verdict.keep in ((1,) if verdict.site.endswith("heads") else (8, 16, 24))
    assert_untouched(model, before)
    assert model.training


def test_a_model_that_was_cut_before_passes() -> None:
    model = tiny("bert")
    sites = find_sites(model)
    student, _ = cut_in_order(model, sites, {s.name: s.width // 2 for s in sites}, pair_batches(model))
    assert failed(rmtkd.check(student)) == {}


@pytest.mark.parametrize("name", ["bert", "roberta"])
def test_random_batches_hold_padding_and_enough_positions_and_fit_the_model(name: str) -> None:
    model = tiny(name)
    batches = random_batches(model, 200)
    masks = [batch["attention_mask"] for batch in batches if isinstance(batch, dict)]
    assert sum(int(mask.sum()) for mask in masks) >= 200
    assert all((mask == 0).any() and mask[0].all() and mask.shape[1] <= LONGEST for mask in masks)
    for batch in batches:
        assert isinstance(batch, dict)
        padded = batch["input_ids"] == model.config.pad_token_id
        assert torch.equal(padded, batch["attention_mask"] == 0)
        assert model(**batch).logits.isfinite().all()


def test_no_more_rows_are_read_than_are_needed() -> None:
    taken = []

    def endless() -> Any:
        while True:
            taken.append(1)
            yield next(iter(random_rows(16)))

    assert failed(rmtkd.check(tiny("bert"), endless())) == {}
    assert len(taken) < 5


# ---------------------------------------------------------------------------------------------- faults


def patch(module: nn.Module, change: Any) -> None:
    """Let a module's forward do something more with its output."""
    stock = type(module).forward

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return change(stock(self, *args, **kwargs))

    module.forward = forward.__get__(module)


def test_a_forward_that_bends_the_values_fails_at_full_width_and_names_the_site() -> None:
    model = tiny("bert")
    patch(model.bert.encoder.layer[1].attention.self.value, torch.tanh)
    verdicts = {verdict.site: verdict for verdict in rmtkd.check(model)}
    assert set(failed(tuple(verdicts.values()))) == {"layer.1.query_key", "layer.1.value"}
    error = verdicts["layer.1.value"].full_width_error
    assert error is not None and error > 1e-4
    assert "at full width must change nothing" in verdicts["layer.1.value"].why
    whole = verdicts["layer.1.query_key"].full_width_error
    assert whole is not None and whole < 1e-10  # queries and keys are sound, but share the width of the cut


def test_a_forward_that_mixes_units_fails_the_cut_and_names_the_site() -> None:
    model = tiny("bert")
    patch(model.bert.encoder.layer[0].intermediate, lambda h: h - h.mean(-1, keepdim=True))
    (why,) = [failed(rmtkd.check(model))["layer.0.ffn"]]
    assert set(failed(rmtkd.check(model))) == {"layer.0.ffn"}
    assert "layer.0.ffn" in why and "projected full-width reference" in why


def test_a_forward_with_a_constant_in_place_of_the_scaling_fails_the_cut() -> None:
    model = tiny("bert")
    attention = model.bert.encoder.layer[1].attention.self
    stock = type(attention).forward

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        self.scaling = 0.25
        return stock(self, *args, **kwargs)

    attention.forward = forward.__get__(attention)
    assert set(failed(rmtkd.check(model))) == {"layer.1.query_key", "layer.1.value"}


def test_a_stale_head_size_is_told_at_its_layer_and_the_others_are_tried() -> None:
    model = tiny("bert")
    model.bert.encoder.layer[1].attention.self.attention_head_size = 8
    verdicts = rmtkd.check(model)
    assert set(failed(verdicts)) == {"layer.1.attention"}
    assert "attention_head_size must be 16" in failed(verdicts)["layer.1.attention"]
    assert [verdict.site for verdict in verdicts if verdict.ok] == [
        "embeddings.word",
        "layer.0.heads",
        "layer.0.query_key",
        "layer.0.value",
        "layer.0.ffn",
        "layer.1.ffn",
    ]


def test_a_model_that_does_not_run_fails_everywhere_and_names_the_cause() -> None:
    model = tiny("bert")
    model.bert.encoder.layer[1].attention.self.attention_head_size = 12
    verdicts = rmtkd.check(model)
    assert not any(verdict.ok for verdict in verdicts)
    assert "attention_head_size must be 16" in failed(verdicts)["layer.1.attention"]
    assert "must run on these rows" in failed(verdicts)["layer.0.ffn"]


def test_what_no_table_describes_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="whose widths rmtkd does not know"):
        rmtkd.check(nn.Linear(3, 3))
    with pytest.raises(UnsupportedModelError, match="float32 or float64"):
        rmtkd.check(tiny("bert").half())
    with pytest.raises(DataError, match="at least one batch"):
        rmtkd.check(tiny("bert"), [])


# ---------------------------------------------------------------------------------------------- a model of one's own


class Block(nn.Module):
    """Attention by torch's own function, a bottleneck of two linear maps, a gated feed-forward block."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key = nn.Linear(24, 24), nn.Linear(24, 24, bias=False)
        self.value, self.output = nn.Linear(24, 24, bias=False), nn.Linear(24, 24, bias=False)
        self.down, self.up = nn.Linear(24, 10), nn.Linear(10, 24)
        self.gated, self.reader = nn.Linear(24, 2 * 20, bias=False), nn.Linear(20, 24, bias=False)
        self.heads = 3

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            part(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (self.query, self.key, self.value)
        )
        context = nn.functional.scaled_dot_product_attention(q, k, v)
        x = nn.functional.layer_norm(x + self.output(context.transpose(1, 2).flatten(2)), (24,))
        x = x + self.up(self.down(x))
        value, gate = self.gated(x).chunk(2, -1)
        return x + self.reader(nn.functional.silu(gate) * value)


class Own(nn.Module):
    """A classifier that no table knows; its block is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.block, self.head = nn.Embedding(40, 24), Block(), nn.Linear(24, 3)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.block(self.block(self.words(ids))).mean(1))


def own_model() -> Any:
    torch.manual_seed(0)
    model = Own()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


def own_sites(model: nn.Module) -> tuple[Any, ...]:
    return (
        embedding_site(model, "words"),
        *attention_sites(
            model, "block", query="block.query", key="block.key", value="block.value", output="block.output", heads=3
        ),
        linear_site(model, "block.bottleneck", writer="block.down", reader="block.up"),
        feed_forward_site(model, "block.ffn", writers=["block.gated"], reader="block.reader", copies=2),
    )


BATCHES = [(torch.randint(40, (8, 12), generator=torch.Generator().manual_seed(i)), torch.zeros(8)) for i in range(2)]


def test_a_short_table_describes_a_model_of_one_s_own() -> None:
    model = own_model()
    sites = own_sites(model)
    assert {site.name: (site.kind, site.width, site.groups) for site in sites} == {
        "embeddings.word": ("linear", 24, 1),
        "block.query_key": ("bilinear", 8, 3),
        "block.value": ("linear", 8, 3),
        "block.bottleneck": ("linear", 10, 1),
        "block.ffn": ("pointwise", 20, 1),
    }
    verdicts = rmtkd.check(model, BATCHES, sites)
    assert failed(verdicts) == {}
    assert len(verdicts) == 5
    # Both calls of the block are seen.
    moments = collect(model, sites, BATCHES)
    assert moments["block.ffn"][0].count == 2 * moments["embeddings.word"][0].count


def test_rows_may_be_numbers_of_their_own_precision() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 20), nn.ReLU(), nn.Linear(20, 12), nn.Linear(12, 3))
    sites = [
        feed_forward_site(model, "units", writers=["0"], reader="2", activation="1"),
        linear_site(model, "bottleneck", writer="2", reader="3"),
    ]
    verdicts = rmtkd.check(model, [(torch.randn(64, 6), torch.zeros(64))], sites)
    assert failed(verdicts) == {}
    assert [verdict.keep for verdict in verdicts] == [8, 6]


class Casting(Own):
    """Casts to float32 on its way, as code that was written for half precision does."""

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.block(self.words(ids).float()).mean(1))


def test_a_forward_that_casts_to_float32_is_checked_in_float32() -> None:
    torch.manual_seed(0)
    model = Casting()
    with pytest.raises(RuntimeError):
        model.double()(BATCHES[0][0])
    model.float()
    sites = own_sites(model)
    verdicts = rmtkd.check(model, BATCHES, sites)
    assert failed(verdicts) == {}
    assert all(verdict.full_width_error is not None and verdict.full_width_error < 1e-4 for verdict in verdicts)
    student, bases = cut_in_order(model, sites, {site.name: site.width // 2 for site in sites}, BATCHES)
    assert check_cut(model, student, sites, bases, BATCHES[0]) < 1e-4
    with torch.no_grad():
        student.get_parameter("block.reader.weight").mul_(1.01)
    with pytest.raises(SurgeryError):
        check_cut(model, student, sites, bases, BATCHES[0])


def test_a_table_that_is_wrong_fails_at_the_site_that_is_wrong() -> None:
    model = own_model()
    words, query_key, value, bottleneck, ffn = own_sites(model)
    patch(model.block.down, torch.relu)
    assert set(failed(rmtkd.check(model, BATCHES, [words, bottleneck, ffn]))) == {"block.bottleneck"}
    unscaled = type(query_key)(**{**vars(query_key), "scaled": False})
    assert set(failed(rmtkd.check(model, BATCHES, [unscaled, value]))) == {"block.query_key", "block.value"}


def test_a_site_that_a_forward_pass_does_not_come_by_is_named() -> None:
    model = own_model()
    model.idle = nn.Sequential(nn.Linear(24, 4), nn.Linear(4, 24))
    site = linear_site(model, "idle", writer="idle.0", reader="idle.1")
    with pytest.raises(UnsupportedModelError, match=r"call idle\.1 for the site idle"):
        rmtkd.check(model, BATCHES, [site])


@pytest.mark.parametrize(
    ("describe", "message"),
    [
        (lambda m: linear_site(m, "s", writer="block.query", reader="block.up"), "query must write 10"),
        (lambda m: linear_site(m, "s", writer="block.down", reader="nothing"), "nothing must be Linear. Got nothing"),
        (lambda m: linear_site(m, "s", writer="block.down", reader="block.up", groups=3), "whole width for each of 3"),
        (lambda m: embedding_site(m, "block.up"), r"must be Embedding or .*\. Got Linear"),
        (lambda m: feed_forward_site(m, "s", writers=["block.gated"], reader="block.reader"), "gated must write 20"),
        (
            lambda m: attention_sites(
                m,
                "block",
                query="block.query",
                key="block.key",
                value="block.value",
                output="block.output",
                heads=3,
                attributes={"block.heads": "width"},
            ),
            r"block\.heads must be 8",
        ),
    ],
)
def test_a_table_that_does_not_fit_the_model_is_refused_by_name(describe: Any, message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message) as caught:
        describe(own_model())
    assert "othing was changed" in str(caught.value)


def test_a_model_of_one_s_own_needs_batches() -> None:
    model = own_model()
    with pytest.raises(DataError, match=r"batches must be given .* Got none for Own"):
        rmtkd.check(model, sites=own_sites(model))
