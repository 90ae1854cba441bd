"""The claims of plans in the user's hand: every mistake in a file is named with its line, all at once; widths that are
asked for stay; a plan made anew without its model says exactly what the model would cost."""

import contextlib
import itertools
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from torch import nn

from conftest import random_rows, tiny_bert
from rmtkd import reporting
from rmtkd.activations import observe
from rmtkd.checkpoint import RunFolder, read_planned
from rmtkd.errors import OptionError, PlanError, RmtkdError, RunError
from rmtkd.planning import (
    CostTable,
    Plan,
    Spectrum,
    Target,
    fixed_widths,
    make_plan,
    parse_keep,
    predict_cost,
    retarget,
    settle,
    spectra_of,
    uniform_sites,
)
from rmtkd.reporting.plans import plan_columns
from rmtkd.schedule import Options
from rmtkd.sites import Axis, Site, Stream, by_width, find_sites
from rmtkd.spectra import RULES

MODEL = tiny_bert()
SITES = find_sites(MODEL)
BATCH = next(iter(random_rows(4)))
SPECTRUMS = spectra_of(observe(MODEL, SITES, random_rows(64)))
PLAN = make_plan(MODEL, SITES, SPECTRUMS, BATCH, multiple_of=2, target=Target.parse("60%params"))
LINES = PLAN.to_json().splitlines()
ANY_WIDTHS = st.fixed_dictionaries(
    {shares: st.integers(group[0].least, group[0].width) for shares, group in by_width(SITES).items()}
)


def line_of(name: str, key: str = "keep") -> int:
    """The line, from 1, of a site's field in the JSON of `PLAN`."""
    start = next(i for i, line in enumerate(LINES) if line.strip() == f'"name": "{name}",')
    return next(i for i in range(start, len(LINES)) if LINES[i].strip().startswith(f'"{key}"')) + 1


def edited(**changes: tuple[str, Any]) -> str:
    """The JSON of `PLAN` with lines changed in place: `L<line>=(old, new)`."""
    lines = list(LINES)
    for number, (old, new) in changes.items():
        index = int(number[1:]) - 1
        assert old in lines[index], lines[index]
        lines[index] = lines[index].replace(old, str(new))
    return "\n".join(lines)


def with_fields(change: Callable[[dict[str, Any]], object]) -> str:
    fields = json.loads(PLAN.to_json())
    change(fields)
    return json.dumps(fields, indent=1)


def refusal(text: str, *, sites: Any = SITES) -> list[str]:
    """The lines of the one error that reading the text gives."""
    with pytest.raises(PlanError) as caught:
        Plan.from_json(text, sites=sites)
    return str(caught.value).splitlines()


# ---------------------------------------------------------------------------------------------- reading


def test_an_edited_width_is_all_that_must_be_changed() -> None:
    line = line_of("layer.0.ffn")
    old = PLAN.widths["layer.0.ffn"]
    made = Plan.from_json(edited(**{f"L{line}": (str(old), 31)}), sites=SITES)
    assert made.widths == {**PLAN.widths, "layer.0.ffn": 31}
    assert [site.name for site in made.sites if site.by_hand] == ["layer.0.ffn"]


def test_all_problems_are_named_at_once_each_with_its_line_and_site() -> None:
    ffn, head, tau = line_of("layer.0.ffn"), line_of("layer.1.value"), LINES.index(' "tau": 0.5,') + 1
    name, q = line_of("layer.1.ffn", "name"), line_of("layer.0.value", "q")
    found = refusal(
        edited(
            **{
                f"L{ffn}": (str(PLAN.widths["layer.0.ffn"]), 1600),
                f"L{head}": (str(PLAN.widths["layer.1.value"]), 1),
                f"L{tau}": ("0.5", "NaN"),
                f"L{name}": ("layer.1.ffn", "layer.1.fnn"),
                f"L{q}": ('"q"', '"Q"'),
            }
        )
    )
    first = line_of("layer.1.query_key")
    kept = PLAN.widths["layer.1.value"]
    assert found[0] == "a plan must be whole and fit its model. plan.json has 7 problems:"
    assert found[1:-1] == sorted(found[1:-1], key=lambda line: int(line.split(":")[1]))
    for expected in (
        f"plan.json:{ffn}: layer.0.ffn: keep must be a whole number from 0 to 48. Got 1600.",
        f"plan.json:{head}: layer.1.value: keep must be that of layer.1.query_key on line {first}, whose width it "
        f"shares. Got 1 and {kept}.",
        f"plan.json:{tau}: tau must be a finite number. Got NaN.",
        f"plan.json:{name}: layer.1.fnn: the model has no such site. Did you mean layer.1.ffn?",
        f"plan.json:{q}: layer.0.value: there must be no other field than rmtkd writes. Got Q.",
        f"plan.json:{line_of('layer.0.value', 'name') - 1}: layer.0.value: the field q must be there. It is missing.",
    ):
        assert expected in found
    assert any("layer.1.ffn: every site of the model must be in the plan" in line for line in found)
    assert "nothing was changed" in found[-1]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "plan.json:1: a plan must be JSON. At column 1"),
        ("{\n 5}", "plan.json:2: a plan must be JSON. At column 2"),
        ("[" * 100_000, "plan.json:1: a plan must be JSON that can be read. Got RecursionError"),
        ('{"format": ' + "9" * 5000 + "}", "plan.json:1: a plan must be JSON that can be read. Got ValueError"),
        ("[]", "plan.json:1: must be an object. Got a list."),
        ('{"format": 1}', "plan.json:1: format must be 5. Got 1."),
        ('{"format": null}', "plan.json:1: format must be 5. Got null."),
        (with_fields(lambda plan: plan.pop("format")), "plan.json:1: the field format must be there"),
        (with_fields(lambda plan: plan.update(sites=3)), "sites must be a list. Got 3."),
        (with_fields(lambda plan: plan.update(sites=[3])), "sites[0]: must be an object. Got 3."),
        (with_fields(lambda plan: plan.update(target="25%parms")), "target must be one of params, flops"),
        (with_fields(lambda plan: plan.update(rule="mpp")), f"rule must be one of {', '.join(RULES)}. Got 'mpp'."),
        (with_fields(lambda plan: plan.update(tau=1)), "tau must be within (0, 1). Got 1."),
        (with_fields(lambda plan: plan.update(multiplier=1e999)), "multiplier must be a finite number. Got Infinity."),
        (with_fields(lambda plan: plan.update(multiple_of=0)), "multiple_of must be at least 1. Got 0."),
        (with_fields(lambda plan: plan.update(multiple_of=True)), "multiple_of must be a whole number. Got true."),
        (with_fields(lambda plan: plan["baseline"].update(flops=0)), "baseline must be params and flops"),
        (with_fields(lambda plan: plan["baseline"].pop("flops")), "baseline must be params and flops"),
        (
            with_fields(lambda plan: plan["fixed"].update({"layer.9.ffn": 3})),
            "fixed must give widths from the least to",
        ),
        (with_fields(lambda plan: plan["costs"]["once"].pop("flops")), "costs must have an entry for every cost"),
        (with_fields(lambda plan: plan["sites"][0].update(keep=True)), "keep must be a whole number. Got true."),
        (with_fields(lambda plan: plan["sites"][0].update(keep=8.5)), "keep must be a whole number. Got 8.5."),
        (with_fields(lambda plan: plan["sites"][0].update(keep="8")), "keep must be a whole number. Got '8'."),
        (with_fields(lambda plan: plan["sites"][0].update(remarks=[3])), "remarks[0] must be text. Got 3."),
        (with_fields(lambda plan: plan["sites"][0].update(why="\ud800")), "why must be text. Got '\\ud800'."),
        (with_fields(lambda plan: plan["sites"][0].update(kind="quadratic")), "kind must be one of linear"),
        (with_fields(lambda plan: plan["sites"][0].update(width=64)), "width must be 32, the model's. Got 64."),
        (with_fields(lambda plan: plan["sites"][2].update(groups=4)), "groups must be 2, the model's. Got 4."),
        (with_fields(lambda plan: plan["sites"].append(plan["sites"][0])), "a site must come once. It also stands on"),
        (with_fields(lambda plan: plan["sites"].pop()), "every site of the model must be in the plan"),
        (
            PLAN.to_json().replace(' "tau": 0.5,', ' "tau": 0.5,\n "tau": 0.6,'),
            "a name must come once. tau also stands",
        ),
    ],
)
def test_what_is_wrong_is_said_with_its_line(text: str, message: str) -> None:
    found = refusal(text)
    assert any(message in line and re.match(r"plan\.json:\d+: ", line) for line in found), found


def test_a_plan_of_another_model_is_refused_in_all_that_differs() -> None:
    other = find_sites(tiny_bert(layers=1, intermediate_size=64))
    found = refusal(PLAN.to_json(), sites=other)
    assert any("layer.0.ffn: width must be 64, the model's. Got 48." in line for line in found)
    assert sum("layer.1." in line and "no such site" in line for line in found) == 4
    with pytest.raises(PlanError, match=r"layer\.0\.ffn: width must be 64(.|\n)*layer\.1\.value"):
        PLAN.check_fits(other)


def test_a_file_that_is_no_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_bytes(b"\xff\xfe\x00")
    for path in (tmp_path / "plan.json", tmp_path, tmp_path / "nowhere.json"):
        with pytest.raises(PlanError, match="must be a text file"):
            Plan.read(path)


def test_an_editor_may_write_a_byte_order_mark_and_other_line_ends(tmp_path: Path) -> None:
    text = PLAN.to_json()
    (tmp_path / "plan.json").write_bytes(b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode())
    assert Plan.read(tmp_path / "plan.json", sites=SITES) == PLAN


VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(-(10**400), 10**400),
    st.floats(),
    st.text(max_size=5),
    st.just([]),
    st.just({}),
    st.sampled_from(["layer.0.ffn", "layer.0.head", "mp", [1], {"params": 1, "flops": -1}, 8, 1e308]),
)


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_a_broken_plan_is_refused_with_a_line_or_does_no_harm(data: st.DataObject) -> None:
    fields = json.loads(PLAN.to_json())
    for _ in range(data.draw(st.integers(1, 3))):
        place: Any = fields
        while True:
            keys = sorted(place) if isinstance(place, dict) else range(len(place))
            if not keys:
                break
            key = data.draw(st.sampled_from(list(keys)))
            if not (isinstance(place[key], dict | list) and data.draw(st.booleans())):
                if data.draw(st.integers(0, 4)) == 0:
                    del place[key]
                else:
                    place[key] = data.draw(VALUES)
                break
            place = place[key]
    text = json.dumps(fields, indent=1)
    if data.draw(st.integers(0, 9)) == 0:  # a slip of the finger
        at = data.draw(st.integers(0, len(text)))
        text = text[:at] + data.draw(st.sampled_from(['"', "{", ",", "}", "x", "\\", "\n"])) + text[at + 1 :]
    try:
        made = Plan.from_json(text, sites=SITES)
    except PlanError as error:
        assert re.search(r"^plan\.json:\d+: .", str(error), re.MULTILINE)
        return
    # What is accepted can be shown, written, and planned anew, or is refused as it should be.
    with Console(width=120).capture():
        Console(width=120).print(reporting.plan_table(made), *reporting.plan_notes(made))
    assert Plan.from_json(made.to_json(), sites=SITES) == made
    with contextlib.suppress(RmtkdError):
        assert retarget(made, SPECTRUMS).meets_target


# ---------------------------------------------------------------------------------------------- costs


@settings(deadline=None, max_examples=5)
@given(ANY_WIDTHS)
def test_the_formula_of_the_cost_is_exact_at_any_widths(widths: dict[str, int]) -> None:
    assert PLAN.costs is not None
    dropped = {shares: group[0].width - widths[shares] for shares, group in by_width(SITES).items()}
    by_site = {site.name: widths[site.shares] for site in SITES}
    predicted = {cost: PLAN.baseline[cost] + PLAN.costs.change(cost, dropped) for cost in ("params", "flops")}
    assert predicted == predict_cost(MODEL, SITES, by_site, BATCH)


class Chain(nn.Module):
    """Linear maps in a row: neighbouring widths are two sides of one matrix. The last map may be used twice."""

    def __init__(self, widths: tuple[int, ...]):
        super().__init__()
        self.maps = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(widths))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.maps:
            x = layer(x).relu()
        return x


def chain_sites(model: Chain, shares: Callable[[int], str]) -> list[Site]:
    sites = []
    for i in range(len(model.maps) - 1):
        weight, bias = (Axis(parameter=f"maps.{i}.{leaf}", dim=0) for leaf in ("weight", "bias"))
        reader = Axis(parameter=f"maps.{i + 1}.weight", dim=1)
        stream = Stream(module=f"maps.{i + 1}", side="input", writers=(weight, bias), readers=(reader,))
        layer: Any = model.maps[i]
        sites.append(
            Site(
                name=f"width.{i}",
                kind="pointwise",
                block="chain",
                width=layer.out_features,
                streams=(stream,),
                shares=shares(i),
            )
        )
    return sites


@settings(deadline=None, max_examples=5)
@given(st.tuples(st.integers(1, 9), st.integers(1, 1), st.integers(1, 12), st.integers(1, 7)))
def test_widths_that_meet_in_one_matrix_have_a_product(kept: tuple[int, ...]) -> None:
    model = Chain((5, 9, 1, 12, 7, 3))
    sites, batch = chain_sites(model, lambda i: f"width.{i}"), (torch.zeros(4, 5), torch.zeros(4).long())
    whole, table = CostTable.measure(model, sites, batch)
    assert table is not None and table.together["params"] == {"width.2 & width.3": 1}
    assert table.together["flops"] == {"width.2 & width.3": 8}
    widths = {site.name: width for site, width in zip(sites, kept, strict=True)}
    dropped = {site.name: site.width - widths[site.name] for site in sites}
    predicted = {cost: whole[cost] + table.change(cost, dropped) for cost in whole}
    assert predicted == predict_cost(model, sites, widths, batch)


def test_a_cost_that_is_no_such_formula_is_counted_on_skeletons_and_not_planned_anew_without_the_model() -> None:
    model = Chain((4, 8, 8, 3))
    sites = chain_sites(model, lambda i: "stream")  # both sides of the middle matrix: a square
    batch = (torch.zeros(4, 4), torch.zeros(4).long())
    rng = np.random.default_rng(0)
    spectrums = {
        site.name: (Spectrum(eigenvalues=np.sort(rng.lognormal(0, 1, (1, 8)))[:, ::-1].copy(), samples=100),)
        for site in sites
    }
    made = make_plan(model, sites, spectrums, batch, multiple_of=1, target=Target.parse("60%params"))
    assert made.costs is None
    assert made.predicted == predict_cost(model, sites, made.widths, batch)
    assert made.meets_target and made.predicted["params"] < made.baseline["params"]
    with pytest.raises(PlanError, match="formula"):
        retarget(made, spectrums, target="50%params")


# ---------------------------------------------------------------------------------------------- made anew


@pytest.mark.parametrize("target", ["70%params", "50%flops", "16000"])
def test_a_plan_made_anew_is_the_plan_that_the_model_would_give(target: str) -> None:
    fixed: dict[str, Any] = {"exclude": ["layer.1.ffn"], "keep": [("layer.0.value", 8)]}
    options: dict[str, Any] = {"multiple_of": 4, "min_share": 0.1, "tau": 0.4, **fixed}
    expected = make_plan(MODEL, SITES, SPECTRUMS, BATCH, target=Target.parse(target), **options)
    assert retarget(PLAN, SPECTRUMS, target=target, **options) == expected


def test_what_is_not_given_stays_as_it_was() -> None:
    first = retarget(PLAN, SPECTRUMS, tau=0.4, min_share=0.2, exclude=["embeddings.word"], target="80%params")
    again = retarget(first, SPECTRUMS, target="70%params")
    assert (again.tau, again.min_share, again.multiple_of, again.rule) == (0.4, 0.2, 2, "mp")
    assert again.fixed == {"embeddings.word": 32}
    assert retarget(first, SPECTRUMS) == first


def test_a_width_changed_by_hand_stays_when_a_plan_is_made_anew() -> None:
    sites = tuple(replace(site, keep=37) if site.name == "layer.0.ffn" else site for site in PLAN.sites)
    made = retarget(replace(PLAN, sites=sites), SPECTRUMS, target="65%params")
    assert made.fixed == {"layer.0.ffn": 37}
    assert made.widths["layer.0.ffn"] == 37 and made.meets_target
    assert retarget(made, SPECTRUMS, keep=[("layer.0.ffn", 40)]).widths["layer.0.ffn"] == 40


def test_spectra_of_another_plan_are_refused() -> None:
    with pytest.raises(PlanError, match=r"differ in layer\.1\.ffn"):
        retarget(PLAN, {name: value for name, value in SPECTRUMS.items() if name != "layer.1.ffn"})
    wider = {**SPECTRUMS, "layer.0.ffn": (Spectrum(eigenvalues=np.ones((1, 64)), samples=100),)}
    with pytest.raises(PlanError, match=r"differ in layer\.0\.ffn"):
        retarget(PLAN, wider)


def test_a_folder_gives_back_its_plan_and_spectra(tmp_path: Path) -> None:
    RunFolder.for_plan(tmp_path).save_plan(PLAN, SPECTRUMS)
    made, spectrums = read_planned(tmp_path)
    assert made == PLAN
    assert retarget(made, spectrums, target="55%params") == retarget(PLAN, SPECTRUMS, target="55%params")
    (tmp_path / "spectra.npz").write_bytes(b"no archive")
    with pytest.raises(RunError, match="must be the arrays that rmtkd wrote"):
        read_planned(tmp_path)
    (tmp_path / "spectra.npz").unlink()
    with pytest.raises(RunError, match=r"has no spectra\.npz"):
        read_planned(tmp_path)


# ---------------------------------------------------------------------------------------------- widths asked for


def test_the_other_sites_meet_the_target_around_widths_that_are_asked_for() -> None:
    made = retarget(PLAN, SPECTRUMS, exclude=["layer.0.*"], keep=[("layer.1.ffn", 7)], target="75%params")
    widths = {site.name: (site.keep, site.width) for site in made.sites}
    assert all(keep == width for name, (keep, width) in widths.items() if name.startswith("layer.0."))
    assert widths["layer.1.ffn"][0] == 7
    assert widths["layer.1.value"][0] < 16
    assert made.meets_target
    why = {site.name: site.why for site in made.sites}
    assert why["layer.1.ffn"].endswith("width 7 as asked") and why["layer.0.ffn"].endswith("whole as asked")


def test_impossible_wishes_are_named_all_at_once() -> None:
    with pytest.raises(PlanError) as caught:
        fixed_widths(
            SITES,
            ["layer.0.fnn", "layer.1.value"],
            [("layer.1.query_key", 8), ("layer.0.ffn", 49), ("*.word", 0), ("x", 1)],
        )
    found = str(caught.value).splitlines()
    assert found[1:-1] == [
        "--exclude layer.0.fnn: some site must have this name. None has. Did you mean layer.0.ffn?",
        "--keep layer.0.ffn=49: layer.0.ffn must keep from 0 to 48. Got 49.",
        "--keep *.word=0: embeddings.word must keep from 1 to 32. Got 0.",
        "--keep x=1: some site must have this name. None has. There are embeddings.word, layer.0.heads, "
        "layer.0.query_key, layer.0.head, layer.0.value, layer.0.ffn, layer.1.heads, layer.1.query_key, ….",
        "layer.1.head: there must be one width for all sites that share it. Got 16 (--exclude layer.1.value) and 8 "
        "(--keep layer.1.query_key=8).",
    ]


def test_a_target_out_of_reach_says_that_widths_are_fixed() -> None:
    with pytest.raises(PlanError, match=r"every free site at its least width.*or fix fewer widths"):
        retarget(PLAN, SPECTRUMS, exclude=["*"], target="99%params")
    assert retarget(PLAN, SPECTRUMS, exclude=["*"], target="100%params").predicted == PLAN.baseline


def test_a_dead_width_can_be_left_whole() -> None:
    spectrums = {**SPECTRUMS, "layer.0.ffn": (Spectrum(eigenvalues=np.zeros((1, 48)), samples=100),)}
    made = retarget(PLAN, spectrums, exclude=["layer.0.ffn"], target="70%params")
    assert made.widths["layer.0.ffn"] == 48 and made.meets_target
    assert Plan.from_json(made.to_json(), sites=SITES) == made


@pytest.mark.parametrize(
    "words", [["layer.0.ffn"], ["=3"], ["layer.0.ffn=x"], ["layer.0.ffn=-1"], ["a=1", "b=", "c=2.5"]]
)
def test_what_is_no_site_with_a_width_is_refused(words: list[str]) -> None:
    with pytest.raises(OptionError, match=r"SITE=WIDTH"):
        parse_keep(words)


def test_options_take_wishes_as_mappings_and_as_json() -> None:
    options = Options(exclude=["a"], keep={"b": 3})  # type: ignore[arg-type]
    assert (options.exclude, options.keep) == (("a",), (("b", 3),))
    values = json.loads(json.dumps(options.to_dict()))
    assert Options(exclude=values["exclude"], keep=values["keep"]) == options
    for wrong in ({"b": -1}, [("b", True)], [("", 3)], [("b",)]):
        with pytest.raises(OptionError, match="keep must be"):
            Options(keep=wrong)  # type: ignore[arg-type]


# ---------------------------------------------------------------------------------------------- applied


def by_hand(**widths: int) -> Plan:
    """`PLAN` with these widths, dots of names written as underscores doubled."""
    named = {name.replace("__", "."): width for name, width in widths.items()}
    return replace(
        PLAN, sites=tuple(replace(site, keep=named.get(site.shares, site.keep), energy=0.5) for site in PLAN.sites)
    )


def test_an_applied_plan_has_all_but_its_widths_derived_anew() -> None:
    stale = replace(by_hand(layer__0__ffn=37), predicted={"params": 1, "flops": 1}, remarks=("old",))
    made = settle(stale, MODEL, SITES, SPECTRUMS, BATCH)
    assert made.widths == {**PLAN.widths, "layer.0.ffn": 37}
    assert made.predicted == predict_cost(MODEL, SITES, made.widths, BATCH)
    assert "old" not in made.remarks
    changed, same = made.sites[4], made.sites[8]
    assert changed.why.startswith(f"changed by hand: {changed.planned} → 37; planned: ")
    assert changed.energy == pytest.approx(
        SPECTRUMS["layer.0.ffn"][0].eigenvalues[0, :37].sum() / SPECTRUMS["layer.0.ffn"][0].eigenvalues.sum()
    )
    assert same == PLAN.sites[8]
    assert settle(made, MODEL, SITES, SPECTRUMS, BATCH) == made
    assert settle(PLAN, MODEL, SITES, SPECTRUMS, BATCH) == PLAN


def test_no_share_of_the_variance_is_told_where_heads_go() -> None:
    """A head that goes takes its directions along: no sum over all heads says what is left."""
    made = by_hand(layer__0__heads=1)
    told = dict(zip(made.widths, plan_columns(made)["energy"], strict=True))
    assert {name for name, share in told.items() if share == "–"} == {"layer.0.query_key", "layer.0.value"}


def test_a_plan_that_misses_its_target_and_factors_that_do_not_pay_are_remarked() -> None:
    made = settle(by_hand(layer__0__ffn=48, embeddings__word=31), MODEL, SITES, SPECTRUMS, BATCH)
    more = 50 * 31 + 31 * 32 + 32 - 50 * 32
    factors, target = made.remarks
    assert f"two factors of width 31 have {more:,} parameters more" in factors
    excess = made.predicted["params"] - 0.6 * made.baseline["params"]
    assert not made.meets_target and f"{np.ceil(excess):,.0f} too many" in target
    notes = "\n".join(reporting.plan_notes(made))
    assert "changed by hand: embeddings.word" in notes and "is not met" in notes


def test_options_follow_the_plan_that_is_applied_and_must_not_contradict_it() -> None:
    made = retarget(PLAN, SPECTRUMS, exclude=["layer.1.ffn"], target="80%params")
    followed = Options(seed=3).follow(made, given=["seed"])
    assert (followed.target, followed.multiple_of, followed.seed) == ("80%params", 2, 3)
    assert followed.keep == (("layer.1.ffn", 48),)
    assert followed.follow(made, given=followed.to_dict()) == followed
    with pytest.raises(
        OptionError, match=r"target 70%params, not 80%params, tau 0\.4, not 0\.5, width 8 of layer\.1\.ffn"
    ):
        Options(target="70%params", tau=0.4, keep={"layer.1.ffn": 8}).follow(  # type: ignore[arg-type]
            made, given=["target", "tau", "keep"]
        )


# ---------------------------------------------------------------------------------------------- uniform


UNIFORM = make_plan(MODEL, SITES, SPECTRUMS, BATCH, multiple_of=2, target=Target.parse("85%params"), uniform=True)
WHOLE = {"embeddings.word": 32} | {f"layer.{i}.{part}": n for i in range(2) for part, n in (("heads", 2), ("head", 16))}


def ffn_width(plan: Plan) -> int:
    """The one feed-forward width of a plan in which all other widths are whole."""
    (width,) = {site.keep for site in plan.sites if site.kind == "pointwise"}
    assert all(site.keep == site.width for site in plan.sites if site.kind != "pointwise")
    return width


def refusal_of_uniform(change: Callable[[dict[str, Any]], object]) -> tuple[list[str], list[str]]:
    """The lines of a uniform plan after a change, and those of the error that reading it gives."""
    fields = json.loads(UNIFORM.to_json())
    change(fields)
    text = json.dumps(fields, indent=1)
    return text.splitlines(), refusal(text)


def test_a_uniform_plan_narrows_one_width_for_all_layers_and_the_wider_wish_counts() -> None:
    each = make_plan(MODEL, SITES, SPECTRUMS, BATCH, multiple_of=1, tau=0.8)
    wishes = [each.widths[f"layer.{i}.ffn"] for i in range(2)]
    assert wishes[0] != wishes[1] and max(wishes) < 48
    made = make_plan(MODEL, SITES, SPECTRUMS, BATCH, multiple_of=1, tau=0.8, uniform=True)
    assert ffn_width(made) == max(wishes)
    assert made.predicted == predict_cost(MODEL, SITES, made.widths, BATCH)
    assert made.uniform and not each.uniform and made.fixed == WHOLE
    assert {site.why.rpartition(": ")[2] for site in made.sites if site.kind != "pointwise"} == {"whole with --uniform"}


@pytest.mark.parametrize("target", ["75%params", "70%flops", "16000"])
def test_a_uniform_plan_made_anew_is_the_uniform_plan_that_the_model_would_give(target: str) -> None:
    expected = make_plan(
        MODEL, SITES, SPECTRUMS, BATCH, multiple_of=2, target=Target.parse(target), uniform=True, min_share=0.1
    )
    assert retarget(UNIFORM, SPECTRUMS, target=target, min_share=0.1) == expected
    assert retarget(UNIFORM, SPECTRUMS, target=target, min_share=0.1, uniform=True) == expected
    assert 2 <= ffn_width(expected) < 48 and expected.meets_target
    assert settle(expected, MODEL, SITES, SPECTRUMS, BATCH) == expected
    assert Plan.from_json(expected.to_json(), sites=SITES) == expected


def test_a_plan_made_anew_cannot_become_uniform_or_cease_to_be() -> None:
    with pytest.raises(PlanError, match=r"as uniform as it was \(False\)\. Got True"):
        retarget(PLAN, SPECTRUMS, uniform=True)
    with pytest.raises(PlanError, match=r"as uniform as it was \(True\)\. Got False"):
        retarget(UNIFORM, SPECTRUMS, uniform=False)
    fields = json.loads(UNIFORM.to_json())
    fields["fixed"] = {}  # what was taken out of the file by hand is not freed
    freed = Plan.from_json(json.dumps(fields), sites=SITES)
    assert retarget(freed, SPECTRUMS, target="75%params") == retarget(UNIFORM, SPECTRUMS, target="75%params")


@pytest.mark.parametrize("name", ["intermediate_size", "layer.1.ffn", "layer.*.ffn", "*size"])
def test_the_uniform_width_is_asked_for_by_its_name_or_by_that_of_any_layer(name: str) -> None:
    made = make_plan(MODEL, SITES, SPECTRUMS, BATCH, uniform=True, keep=[(name, 21)])
    assert ffn_width(made) == 21 and made.fixed == {**WHOLE, "intermediate_size": 21}
    assert retarget(UNIFORM, SPECTRUMS, target="90%params", keep=[(name, 21)]).widths == made.widths
    assert ffn_width(retarget(UNIFORM, SPECTRUMS, target="100%params", exclude=[name])) == 48


def test_a_uniform_plan_refuses_other_widths_by_name() -> None:
    message = r"--keep layer\.0\.value=8: with --uniform layer\.0\.value must keep 16\. Got 8\."
    with pytest.raises(PlanError, match=message):
        make_plan(MODEL, SITES, SPECTRUMS, BATCH, uniform=True, keep=[("layer.0.value", 8)])
    with pytest.raises(PlanError, match=message):
        retarget(UNIFORM, SPECTRUMS, keep=[("layer.0.value", 8)])
    assert retarget(UNIFORM, SPECTRUMS, keep=[("layer.0.value", 16)]) == UNIFORM
    narrow = tuple(replace(site, keep=8) if site.name == "embeddings.word" else site for site in UNIFORM.sites)
    with pytest.raises(PlanError, match=r"embeddings\.word must keep its whole width 32.*Got 8\."):
        replace(UNIFORM, sites=narrow)


def test_what_makes_an_edited_plan_no_longer_uniform_is_refused_with_its_line() -> None:
    ffn = ffn_width(UNIFORM)
    lines, found = refusal_of_uniform(lambda plan: plan["sites"][8].update(keep=31))
    first, second = (i + 1 for i, line in enumerate(lines) if line.strip() in (f'"keep": {ffn},', '"keep": 31,'))
    expected = f"keep must be that of layer.0.ffn on line {first}, whose width it shares. Got 31 and {ffn}."
    assert found[1] == f"plan.json:{second}: layer.1.ffn: {expected}"

    lines, found = refusal_of_uniform(lambda plan: plan["sites"][0].update(keep=8))
    line = next(i for i, line in enumerate(lines) if '"keep"' in line) + 1
    expected = "keep must be 32, the whole width, as the plan is uniform. Got 8."
    assert found[1] == f"plan.json:{line}: embeddings.word: {expected}"

    _, found = refusal_of_uniform(lambda plan: plan.update(uniform=False))
    assert sum("shares must be layer." in line and "Got 'intermediate_size'" in line for line in found) == 2
    fields = json.loads(PLAN.to_json())
    found = refusal(json.dumps({**fields, "uniform": True}, indent=1))
    assert any("layer.0.ffn: shares must be intermediate_size, the model's" in line for line in found)
    found = refusal_of_uniform(lambda plan: plan["sites"][0].update(setting="hidden_size"))[1]
    assert any("embeddings.word: setting must be None, the model's. Got 'hidden_size'." in line for line in found)


@pytest.mark.parametrize("cost", ["params", "flops"])
def test_a_target_out_of_reach_of_a_uniform_plan_names_the_least_and_the_option(cost: str) -> None:
    with pytest.raises(PlanError) as caught:
        retarget(UNIFORM, SPECTRUMS, target=f"5%{cost}")
    words = str(caught.value)
    assert "--uniform narrows intermediate_size alone" in words
    assert words.endswith("or leave --uniform out: widths per layer go lower.") and "fix fewer" not in words
    least = words.split("at least ")[1].split(", which")[0]
    made = retarget(UNIFORM, SPECTRUMS, target=least.split("(")[1].split("%")[0] + f"%{cost}")
    assert f"{made.predicted[cost]:,} {cost}" in least and ffn_width(made) == 2
    assert f"a plan goes down to {least}; with widths per layer, lower." in made.remarks[0]
    assert retarget(PLAN, SPECTRUMS, target=f"{made.predicted['params'] - 1}").meets_target
    with pytest.raises(PlanError, match=r"fix fewer widths, or leave --uniform out"):
        retarget(UNIFORM, SPECTRUMS, target=f"5%{cost}", exclude=["layer.0.ffn"])


def test_a_uniform_plan_tells_the_least_without_a_target_too() -> None:
    made = make_plan(MODEL, SITES, SPECTRUMS, BATCH, multiple_of=2, uniform=True)
    least = retarget(made, SPECTRUMS, keep=[("intermediate_size", 2)]).predicted["params"]
    (note,) = (note for note in reporting.plan_notes(made) if note.startswith("!") and "--uniform" in note)
    assert f"{least:,} params (" in note


def test_sites_that_no_stock_configuration_gives_cannot_be_uniform() -> None:
    nameless = tuple(replace(site, setting=None) for site in SITES)
    with pytest.raises(OptionError, match=r"None of embeddings\.word, layer\.0\.heads, .* has such an entry"):
        make_plan(MODEL, nameless, SPECTRUMS, BATCH, uniform=True)
    uneven = tuple(replace(site, width=40) if site.name == "layer.1.ffn" else site for site in SITES)
    with pytest.raises(PlanError, match=r"one intermediate_size.*Got 48 in layer\.0\.ffn, 40 in layer\.1\.ffn"):
        uniform_sites(uneven)


def test_options_follow_a_uniform_plan_and_must_not_contradict_it() -> None:
    followed = Options(seed=3).follow(UNIFORM, given=["seed"])
    assert followed.uniform and dict(followed.pairs) == WHOLE
    assert followed.follow(UNIFORM, given=followed.to_dict()) == followed
    with pytest.raises(OptionError, match="uniform True, not False"):
        Options(uniform=True).follow(PLAN, given=["uniform"])
