"""The claims of `rmtkd.planning`: a plan says what the narrowed model will cost, meets its target, and no more."""

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import nn

from conftest import assert_untouched, random_rows, snapshot, tiny_bert
from rmtkd import spectra
from rmtkd.activations import observe
from rmtkd.bases import Basis
from rmtkd.batches import Batch
from rmtkd.errors import DataError, OptionError, PlanError
from rmtkd.measurement import count_flops, count_parameters
from rmtkd.planning import Plan, Spectrum, Target, make_plan, predict_cost, retarget, spectra_of
from rmtkd.sites import Site, by_width, find_sites
from rmtkd.surgery import fold

MODEL = tiny_bert()
SITES = find_sites(MODEL)
BATCH: Batch = next(iter(random_rows(4)))
SPECTRUMS = spectra_of(observe(MODEL, SITES, random_rows(64)))


PLANNED = make_plan(MODEL, SITES, SPECTRUMS, BATCH)

SLOW = settings(deadline=None, phases=[Phase.explicit, Phase.reuse, Phase.generate])
"""Without shrinking: a plan takes long enough."""


def plan(**options: object) -> Plan:
    return make_plan(MODEL, SITES, SPECTRUMS, BATCH, **{"multiple_of": 2, **options})  # type: ignore[arg-type]


def planned(spectrums: dict[str, tuple[Spectrum, ...]], **options: object) -> Plan:
    """The plan of the tiny model with these spectra, made anew without the model, see `test_plans`."""
    return retarget(PLANNED, spectrums, **{"multiple_of": 8, **options})  # type: ignore[arg-type]


def random_spectrums(seed: int, *, dead: bool = False) -> dict[str, tuple[Spectrum, ...]]:
    """Spectra with a tail, for every site of the tiny model."""
    rng = np.random.default_rng(seed)
    spectrums = {}
    for site in SITES:
        streams = []
        for _ in site.streams:
            values = np.sort(rng.lognormal(0, rng.uniform(0.2, 2), (site.groups, site.size)))[:, ::-1].copy()
            if dead:
                values[:, site.size // 2 :] = 0
            streams.append(Spectrum(eigenvalues=values, samples=int(rng.integers(site.width, 50 * site.width))))
        spectrums[site.name] = tuple(streams)
    return spectrums


def any_bases(sites: Sequence[Site], widths: dict[str, int]) -> dict[str, tuple[Basis, ...]]:
    """Bases of the right shape for every stream."""
    bases = {}
    for site in sites:
        kept = widths[site.name] * site.each
        reduce = torch.eye(site.size, dtype=torch.float64)[:kept].expand(site.groups, -1, -1)
        mean = torch.zeros(site.groups, site.size, dtype=torch.float64)
        bases[site.name] = tuple(Basis(reduce=reduce, lift=reduce.mT, mean=mean) for _ in site.streams)
    return bases


def narrowed(widths: dict[str, int], model: nn.Module = MODEL) -> nn.Module:
    """The really narrowed model; sites that stay whole are left alone."""
    cut = [site for site in find_sites(model) if widths[site.name] < site.width]
    return fold(model, cut, any_bases(cut, widths))


# ---------------------------------------------------------------------------------------------- targets


@pytest.mark.parametrize(
    ("text", "cost", "amount", "is_share"),
    [
        ("25%params", "params", 0.25, True),
        ("40%flops", "flops", 0.4, True),
        (" 12.5 % PARAMS ", "params", 0.125, True),
        (".5%params", "params", 0.005, True),
        ("100%params", "params", 1.0, True),
        ("40%latency", "latency_ms", 0.4, True),
        ("2.5x", "latency_ms", 0.4, True),
        ("4 X", "latency_ms", 0.25, True),
        ("1×", "latency_ms", 1.0, True),
        ("5M", "params", 5e6, False),
        ("1.5m", "params", 1.5e6, False),
        ("800k", "params", 8e5, False),
        ("0.1B", "params", 1e8, False),
        ("1200000", "params", 1.2e6, False),
        ("1,200,000", "params", 1.2e6, False),
    ],
)
def test_a_target_is_read(text: str, cost: str, amount: float, is_share: bool) -> None:
    target = Target.parse(text)
    assert (target.cost, target.is_share) == (cost, is_share)
    assert target.amount == pytest.approx(amount, rel=1e-12)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("25%parms", "Did you mean 'params'"),
        ("25%flop", "Did you mean 'flops'"),
        ("25%accuracy", "one of params, flops, latency"),
        ("50%latencies", "Did you mean 'latency'"),
        ("0.5x", "speed-up from 1x"),
        ("1000000x", "speed-up from 1x"),
        ("x", "such as 25%params"),
        ("0%params", "more than 0 %"),
        ("101%params", "at most 100 %"),
        ("25%", "such as 25%params"),
        ("1.2.3%params", "such as 25%params"),
        (".", "such as 25%params"),
        ("..%params", "such as 25%params"),
        ("-5M", "such as 25%params"),
        ("0,25M", "such as 25%params"),
        ("nan", "such as 25%params"),
        ("", "such as 25%params"),
        ("5 apples", "such as 25%params"),
        ("0.25", "more than 100 parameters"),
        ("25", "A share is written 25%params"),
    ],
)
def test_what_is_no_target_is_refused_and_the_nearest_word_is_named(text: str, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        Target.parse(text)


@given(st.floats(0.01, 100), st.sampled_from(["params", "flops"]))
def test_a_share_is_written_as_it_is_read(percent: float, cost: str) -> None:
    target = Target.parse(f"{percent:.4f}%{cost}")
    again = Target.parse(str(target))
    assert (again.cost, again.is_share) == (target.cost, True)
    assert again.amount == pytest.approx(target.amount, rel=1e-9)


@given(st.integers(101, 10**12))
def test_a_number_is_written_as_it_is_read(count: int) -> None:
    target = Target.parse(str(count))
    assert Target.parse(str(target)) == target


def test_the_limit_of_a_share_is_a_share_of_the_baseline() -> None:
    baseline = {"params": 1000, "flops": 500}
    limits = [Target.parse(text).limit(baseline) for text in ("25%params", "40%flops", "123")]
    assert limits == [250, 200, 123]


# ---------------------------------------------------------------------------------------------- cost


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("target", [None, "70%params", "60%flops", "15000"])
def test_predicted_cost_is_that_of_the_really_narrowed_model(target: str | None, attention: str) -> None:
    model = tiny_bert(attn_implementation=attention)
    made = make_plan(
        model, SITES, SPECTRUMS, BATCH, multiple_of=2, target=None if target is None else Target.parse(target)
    )
    student = narrowed(made.widths, model)
    assert made.baseline == {"params": count_parameters(model), "flops": count_flops(model, BATCH)}
    assert made.predicted == {"params": count_parameters(student), "flops": count_flops(student, BATCH)}
    assert made.predicted["params"] < made.baseline["params"]


def test_predicting_costs_leaves_the_model_alone() -> None:
    before = snapshot(MODEL)
    predict_cost(MODEL, SITES, dict.fromkeys((site.name for site in SITES), 4), BATCH)
    assert_untouched(MODEL, before)


@pytest.mark.parametrize("rule", ["mp", "rdpa"])
def test_constant_units_of_a_float64_model_are_no_negative_variances(rule: str) -> None:
    """Shifted by what float32 holds of them, their variances are rounding, to either side of zero."""
    model = tiny_bert().double()
    with torch.no_grad():
        for i in range(2):
            dense: Any = model.get_submodule(f"bert.encoder.layer.{i}.intermediate.dense")
            dense.weight[:20], dense.bias[:20] = 0, torch.linspace(0.1, 2, 20)
    sites = find_sites(model)
    spectrums = spectra_of(observe(model, sites, random_rows(64)))
    plan = make_plan(model, sites, spectrums, next(iter(random_rows(64))), rule=rule)
    assert max(site.count for site in plan.sites if site.name.endswith("ffn")) <= 28


def test_costs_are_predicted_in_float64_too() -> None:
    model = tiny_bert().double()
    assert predict_cost(model, SITES, {}, BATCH) == predict_cost(MODEL, SITES, {}, BATCH)


# ---------------------------------------------------------------------------------------------- meeting a target


def naive_widths(spectrums: dict[str, tuple[Spectrum, ...]], multiplier: float, multiple_of: int) -> dict[str, int]:
    """Widths above a multiple of the edges, written down once more, site by site."""
    widths = {}
    for group in by_width(SITES).values():
        wishes = []
        for site in group:
            counts = []
            for spectrum in spectrums[site.name]:
                edge = spectra.MarchenkoPasturRule()(spectrum).edge
                counts.append(np.sum(spectrum.eigenvalues > multiplier * edge) / site.groups)
            wishes.append(min(counts))
        width = group[0].width
        keep = min(width, multiple_of * math.ceil(max(*wishes, 1) / multiple_of))
        if group[0].factorizes and 50 * keep + (keep + 1) * width > 50 * width:
            keep = width
        widths |= {site.name: keep for site in group}
    return widths


@settings(SLOW, max_examples=6)
@given(seed=st.integers(0, 1000), share=st.floats(0.45, 0.95))
def test_the_target_is_met_by_the_smallest_multiplier_that_meets_it(seed: int, share: float) -> None:
    spectrums = random_spectrums(seed)
    made = planned(spectrums, target=f"{100 * share:.10f}%params", multiple_of=4)
    limit = share * made.baseline["params"]
    assert made.predicted["params"] <= limit
    assert made.widths == naive_widths(spectrums, made.multiplier, 4)
    steps = {0.0}
    for site in (site for site in SITES if site.kind != "heads"):
        for spectrum in spectrums[site.name]:
            edge = spectra.MarchenkoPasturRule()(spectrum).edge
            steps |= set((spectrum.eigenvalues.ravel() / edge).tolist())
    # Between the two next lower steps a direction more is kept: that must be too much.
    lower = sorted(step for step in steps if step < made.multiplier)[-2:]
    widths = naive_widths(spectrums, sum(lower) / 2, 4)
    assert predict_cost(MODEL, SITES, widths, BATCH)["params"] > limit


@pytest.mark.parametrize("target", ["50%params", "50%flops", "12000"])
def test_every_kind_of_target_is_met(target: str) -> None:
    made = plan(target=Target.parse(target))
    parsed = Target.parse(target)
    assert made.predicted[parsed.cost] <= parsed.limit(made.baseline)
    assert made.target is not None
    assert Target.parse(made.target) == parsed


@pytest.mark.parametrize("dead", [False, True])
def test_a_target_of_everything_keeps_every_living_direction(dead: bool) -> None:
    made = planned(random_spectrums(0, dead=dead), target="100%params", multiple_of=1)
    expected = {site.name: site.width // 2 if dead and site.kind != "heads" else site.width for site in SITES}
    assert made.widths == expected
    assert made.predicted["params"] <= made.baseline["params"]


@pytest.mark.parametrize("cost", ["params", "flops"])
@pytest.mark.parametrize("min_share", [0.0, 0.4])
def test_an_impossible_target_says_the_least_which_can_then_be_had(cost: str, min_share: float) -> None:
    with pytest.raises(PlanError, match="must be at least") as caught:
        plan(target=Target.parse(f"1%{cost}"), min_share=min_share)
    words = str(caught.value)
    least = int(words.split("at least ")[1].split()[0].replace(",", ""))
    share = words.split("(")[1].split("%")[0]
    made = plan(target=Target.parse(f"{share}%{cost}"), min_share=min_share)
    assert made.predicted[cost] == least
    if cost == "params":
        made = plan(target=Target.parse(words.split("at least ")[1].split()[0]), min_share=min_share)
        assert made.predicted["params"] == least
        with pytest.raises(PlanError):
            plan(target=Target.parse(str(least - 1)), min_share=min_share)


# ---------------------------------------------------------------------------------------------- widths


@settings(SLOW, max_examples=15)
@given(
    seed=st.integers(0, 1000),
    multiple_of=st.integers(1, 20),
    min_share=st.floats(0, 1),
    tau=st.floats(0.05, 0.95),
    dead=st.booleans(),
)
def test_widths_are_rounded_shared_and_within_bounds(
    seed: int, multiple_of: int, min_share: float, tau: float, dead: bool
) -> None:
    made = planned(random_spectrums(seed, dead=dead), tau=tau, multiple_of=multiple_of, min_share=min_share)
    for site in made.sites:
        assert 1 <= site.keep <= site.width
        assert site.keep % multiple_of == 0 or site.keep == site.width
        assert site.keep >= min_share * site.width - 1e-6
        assert site.keep >= site.count
        assert 0 <= site.energy <= 1
        assert site.edge == pytest.approx(site.sigma2 * (1 + math.sqrt(site.q)) ** 2)
        assert site.margin is None or site.margin >= 1
    for group in by_width(SITES).values():
        assert len({made.widths[site.name] for site in group}) == 1
    assert made.predicted["params"] <= made.baseline["params"]
    assert made.multiplier == 1


@settings(SLOW, max_examples=15)
@given(seed=st.integers(0, 1000), taus=st.tuples(st.floats(0.05, 0.95), st.floats(0.05, 0.95)))
def test_a_larger_tau_never_keeps_more(seed: int, taus: tuple[float, float]) -> None:
    spectrums = random_spectrums(seed)
    less, more = (planned(spectrums, tau=tau, multiple_of=1).widths for tau in sorted(taus, reverse=True))
    assert all(less[name] <= more[name] for name in less)


def test_without_rounding_a_site_keeps_what_stands_above_its_edge() -> None:
    made = plan(multiple_of=1)
    for site in made.sites:
        if site.name.endswith("ffn"):
            values = SPECTRUMS[site.name][0].eigenvalues
            assert site.keep == site.count == np.sum(values > site.edge)
    heads = {site.name: site for site in made.sites if site.groups > 1}
    for i in range(2):
        pair = [heads[f"layer.{i}.{part}"] for part in ("query_key", "value")]
        assert pair[0].keep == math.ceil(max(site.count for site in pair))


def test_a_product_keeps_no_more_than_the_poorer_of_its_streams() -> None:
    spectrums = random_spectrums(3)
    rich, poor = np.full((2, 16), 1.0), np.full((2, 16), 1.0)
    rich[:, :10], poor[:, :4] = 100.0, 100.0
    pair = (Spectrum(eigenvalues=rich, samples=1000), Spectrum(eigenvalues=poor, samples=1000))
    for name in ("layer.0.query_key", "layer.0.value"):
        spectrums[name] = pair if name.endswith("key") else pair[1:]
    made = planned(spectrums, multiple_of=1, tau=0.3)
    assert made.widths["layer.0.query_key"] == made.widths["layer.0.value"] == 4


@pytest.mark.parametrize(("share", "width"), [(0.1, 3), (0.28, 7), (0.29, 8), (0.56, 14), (1.0, 25)])
def test_the_least_share_is_kept_and_not_rounded_up_by_binary_fractions(share: float, width: int) -> None:
    model = tiny_bert(intermediate_size=25)  # 0.28 · 25 is 7.000000000000001 in binary
    site = next(site for site in find_sites(model) if site.name == "layer.0.ffn")
    values = np.full((1, 25), 1.0)
    values[0, 0] = 1e3
    spectrums = {site.name: (Spectrum(eigenvalues=values, samples=10_000),)}
    made = make_plan(model, [site], spectrums, BATCH, multiple_of=1, min_share=share)
    assert made.widths == {"layer.0.ffn": width}
    assert made.sites[0].count == 1


def test_widths_that_are_no_multiple_stay_whole_rather_than_grow() -> None:
    made = planned(random_spectrums(0), multiple_of=10, min_share=0.9)
    assert made.widths["layer.0.query_key"] == 16
    assert made.widths["layer.0.ffn"] == 48


@pytest.mark.parametrize("keep", range(1, 32, 3))
def test_an_embedding_is_factorised_only_where_that_saves_parameters(keep: int) -> None:
    spectrums = random_spectrums(0)
    values = np.full((1, 32), 1.0)
    values[0, :keep] = 1e4
    spectrums["embeddings.word"] = (Spectrum(eigenvalues=values, samples=10_000),)
    made = planned(spectrums, multiple_of=1, tau=0.01)
    word = made.sites[0]
    pays = 50 * word.count + (word.count + 1) * 32 <= 50 * 32
    assert word.keep == (word.count if pays else 32)
    assert ("two factors would be larger" in word.why) == (not pays)


# ---------------------------------------------------------------------------------------------- plans as values


def test_a_plan_names_every_site_and_says_why() -> None:
    made = plan()
    assert [(s.name, s.kind, s.block, s.shares, s.width, s.groups) for s in made.sites] == [
        (s.name, s.kind, s.block, s.shares, s.width, s.groups) for s in SITES
    ]
    assert all(site.why for site in made.sites)
    assert made.model == "BertForSequenceClassification"
    assert all(site.samples == SPECTRUMS[site.name][0].samples for site in made.sites)


@pytest.mark.parametrize("target", [None, "60%params", "50%flops"])
def test_a_plan_comes_back_from_json_equal(target: str | None, tmp_path: Path) -> None:
    made = plan(target=None if target is None else Target.parse(target))
    assert Plan.from_json(made.to_json()) == made
    made.save(tmp_path / "plan.json")
    assert Plan.from_json((tmp_path / "plan.json").read_text()) == made
    json.loads(made.to_json(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


def broken(change) -> str:
    fields = json.loads(plan().to_json())
    change(fields)
    return json.dumps(fields)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "5",
        "null",
        "{}",
        '{"format": 1}',
        '{"format": 1, "sites": 3}',
        '{"format": 1, "sites": ["a"]}',
        '{"format": 1, "sites": [{"remarks": []}]}',
        broken(lambda plan: plan.update(format=99)),
        broken(lambda plan: plan.pop("tau")),
        broken(lambda plan: plan.update(extra=1)),
        broken(lambda plan: plan["sites"][0].pop("keep")),
        broken(lambda plan: plan["sites"][0].update(keep=0)),
        broken(lambda plan: plan["sites"][0].update(keep=33)),
        broken(lambda plan: plan["sites"][0].update(keep=8.5)),
        broken(lambda plan: plan["sites"][0].update(keep="8")),
        broken(lambda plan: plan["sites"][0].update(keep=None)),
        broken(lambda plan: plan["sites"][1].update(keep=3)),
        broken(lambda plan: plan["sites"][2].update(keep=3)),
    ],
)
def test_what_is_no_plan_is_refused(text: str) -> None:
    with pytest.raises(PlanError):
        Plan.from_json(text)


def test_an_edited_plan_is_checked() -> None:
    made = plan()
    site = made.sites[2]
    other = 5 if site.keep != 5 else 6
    with pytest.raises(PlanError, match=r"share the width layer\.0\.head"):
        replace(made, sites=(*made.sites[:2], replace(site, keep=other), *made.sites[3:]))
    with pytest.raises(PlanError, match=r"layer\.0\.query_key of width 16 was given 17"):
        replace(site, keep=17)


# ---------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rule": "mpp"}, "Did you mean 'mp'"),
        ({"min_share": -0.1}, "min_share"),
        ({"min_share": 1.1}, "min_share"),
        ({"min_share": float("nan")}, "min_share"),
        ({"multiple_of": 0}, "multiple_of"),
        ({"tau": 0.0}, "tau"),
        ({"tau": 1.0}, "tau"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        plan(**options)


def test_a_dead_width_goes_to_its_least_and_says_so() -> None:
    spectrums = random_spectrums(0)
    spectrums["layer.1.ffn"] = (Spectrum(eigenvalues=np.zeros((1, 48)), samples=100),)
    made = planned(spectrums, target="70%params", multiple_of=2)
    (dead,) = (site for site in made.sites if site.name == "layer.1.ffn")
    assert dead.keep == 2 and dead.count == 0 and made.meets_target
    assert dead.remarks == ("The width is dead on these data: a constant does for it.",)


def test_a_site_whose_spectrum_is_no_spectrum_is_named() -> None:
    spectrums = random_spectrums(0)
    spectrums["layer.1.value"] = (Spectrum(eigenvalues=np.full((2, 16), np.nan), samples=100),)
    with pytest.raises(DataError, match=r"^site layer\.1\.value: .*--exclude layer\.1\.value"):
        make_plan(MODEL, SITES, spectrums, BATCH)


def test_the_aspect_ratio_is_that_of_one_group() -> None:
    assert Spectrum(eigenvalues=np.ones((4, 16)), samples=64).q == 0.25


def test_spectra_are_the_eigenvalues_of_every_stream() -> None:
    observed = observe(MODEL, SITES, random_rows(32))
    for name, spectrums in spectra_of(observed).items():
        for spectrum, stream in zip(spectrums, observed[name], strict=True):
            moment = stream.moments
            expected = np.linalg.eigvalsh(moment.covariance().numpy())[:, ::-1]
            np.testing.assert_allclose(spectrum.eigenvalues, expected, rtol=1e-9, atol=1e-12)
            assert spectrum.samples == moment.count
            assert spectrum.variances is not None and spectrum.effective_samples is not None
            np.testing.assert_allclose(spectrum.variances.sum(-1), expected.sum(-1))
            assert 0 < spectrum.effective_samples <= moment.count
            assert spectrum.replicate is None
