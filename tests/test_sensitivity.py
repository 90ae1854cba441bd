"""The claims of guarded plans: the measured loss is that of the narrowed model, budgets are kept, and the plan that is
chosen loses no more than the one of common edges."""

import json
from dataclasses import replace
from typing import Any

import pytest
import torch

import rmtkd
from conftest import assert_untouched, random_rows, snapshot, tiny_bert
from rmtkd import batches as batching
from rmtkd import environment, reporting
from rmtkd.activations import collect
from rmtkd.bases import linear_basis, unit_basis
from rmtkd.cutting import fit_bases, fitting
from rmtkd.dry_run import metrics_of
from rmtkd.errors import DataError, OptionError, PlanError
from rmtkd.measurement import evaluation
from rmtkd.memory import Pieces
from rmtkd.planning import Plan, retarget, settle
from rmtkd.schedule import Options
from rmtkd.sensitivity import STRETCH, TOGETHER, Sensitivity, every_nth_row, gathered, projection
from rmtkd.sites import by_width, feed_forward_site, find_sites
from rmtkd.surgery import fold

MODEL = tiny_bert()
SITES = find_sites(MODEL)
ROWS = random_rows(200)
HELD_OUT = random_rows(60, seed=1)
MOMENTS = collect(MODEL, SITES, ROWS)
SENSITIVITY = Sensitivity(MODEL, SITES, MOMENTS, HELD_OUT)


@pytest.fixture(scope="module")
def planned() -> tuple[Plan, dict]:
    return rmtkd.plan(MODEL, calibration=ROWS, selection=HELD_OUT, target="50%params", multiple_of=2)


@torch.no_grad()
def divergence(student: torch.nn.Module) -> float:
    """Of a model's answers from those of `MODEL`, over all held-out rows."""
    total = count = 0.0
    with evaluation(MODEL), evaluation(student):
        for batch in HELD_OUT:
            a, b = (batching.logits(net, batch).double().log_softmax(-1) for net in (MODEL, student))
            total, count = total + float((a.exp() * (a - b)).sum()), count + len(a)
    return total / count


@pytest.mark.parametrize("shares", list(by_width(SITES)))
def test_the_loss_of_a_width_is_that_of_the_narrowed_model(shares: str) -> None:
    group = by_width(SITES)[shares]
    width = max(1, group[0].width // 2)
    bases = {site.name: fit_bases(MODEL, site, MOMENTS[site.name], width) for site in group}
    assert SENSITIVITY.loss({shares: width}) == pytest.approx(divergence(fold(MODEL, group, bases)), rel=1e-3, abs=1e-6)


def test_a_last_batch_of_one_row_does_not_end_measuring_behind_norms() -> None:
    """A norm has no statistics of a single row."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Linear(6, 16), torch.nn.BatchNorm1d(16), torch.nn.ReLU(), torch.nn.Linear(16, 8),
        torch.nn.BatchNorm1d(8), torch.nn.Linear(8, 3),
    ).eval()  # fmt: skip
    inputs = torch.randn(65, 6)
    rows = [(part, part[:, :3].argmax(-1)) for part in inputs.split(32)]
    made, _ = rmtkd.plan(model, calibration=rows[:2], selection=rows, target="60%params", multiple_of=2)
    assert made.policy == "guarded"


def test_nothing_is_lost_at_full_width() -> None:
    assert SENSITIVITY.loss({}) == 0
    assert SENSITIVITY.loss({shares: group[0].width for shares, group in by_width(SITES).items()}) == 0


def test_bases_where_it_stands_are_fitted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    fitted: list[tuple[str, int]] = []

    def watched(model: Any, site: Any, *rest: Any) -> Any:
        fit = fitting(model, site, *rest)

        def counted(keep: int) -> Any:
            fitted.append((site.name, keep))
            return fit(keep)

        return counted

    monkeypatch.setattr("rmtkd.sensitivity.fitting", watched)
    judge = Sensitivity(MODEL, SITES, MOMENTS, HELD_OUT)
    here = {shares: max(2, group[0].width // 2) for shares, group in by_width(SITES).items() if group[0].width > 3}
    judge.stand_at(here)
    for shares, width in here.items():
        for near in (width - 1, width + 1):
            judge.loss(here | {shares: near})
    assert len(fitted) == len(set(fitted))
    assert len(judge._bases["layer.0.ffn"]) == 2  # no more than these are held


def out_of_memory_at(model: torch.nn.Module, path: str, *calls: int) -> Any:
    """Memory runs out at these calls of a module, counted from now on."""
    seen = 0

    def fail(*_: object) -> None:
        nonlocal seen
        seen += 1
        if seen in calls:
            raise torch.OutOfMemoryError("CUDA out of memory")

    return model.get_submodule(path).register_forward_hook(fail)


def test_memory_that_runs_out_behind_what_is_kept_changes_no_loss() -> None:
    pieces = Pieces()
    judge = Sensitivity(MODEL, SITES, MOMENTS, HELD_OUT, pieces=pieces)
    assert len(judge.batches) > 2 and judge.blocks
    handle = out_of_memory_at(judge.model, "bert.encoder.layer.1.output.dense", 2)
    for _ in range(2):  # once more in pieces
        loss = judge.loss({"layer.1.ffn": 12})
        assert loss == pytest.approx(SENSITIVITY.loss({"layer.1.ffn": 12}), rel=1e-4)
    handle.remove()
    assert pieces.count == 2


def test_memory_that_runs_out_while_blocks_are_kept_changes_no_loss() -> None:
    judge, here = Sensitivity(MODEL, SITES, MOMENTS, HELD_OUT), {"layer.0.ffn": 12}
    handle = out_of_memory_at(judge.model, "bert.encoder.layer.1.output.dense", 2)
    judge.stand_at(here)
    handle.remove()
    assert judge.pieces.count == 2
    wanted = here | {"layer.1.ffn": 12}
    assert judge.loss(wanted) == pytest.approx(SENSITIVITY.loss(wanted), rel=1e-4)


@pytest.mark.parametrize(("free", "is_kept"), [(None, True), (10**9, True), (20_000, False)])
def test_blocks_are_kept_only_as_far_as_memory_allows(
    monkeypatch: pytest.MonkeyPatch, free: int | None, is_kept: bool
) -> None:
    monkeypatch.setattr("rmtkd.sensitivity.available_bytes", lambda _: free)
    judge = Sensitivity(MODEL, SITES, MOMENTS, HELD_OUT)
    assert bool(judge.kept) is is_kept
    assert judge.loss({"layer.1.ffn": 12}) == SENSITIVITY.loss({"layer.1.ffn": 12})
    judge.stand_at({"layer.0.ffn": 12})
    assert bool(judge.kept) is is_kept


def test_a_curve_ends_at_full_width_without_loss() -> None:
    curve = SENSITIVITY.curve("layer.0.ffn", [4, 99, 12, 4])
    assert curve.widths == (4, 12, 48)
    assert curve.losses[-1] == 0 < curve.losses[0]
    assert curve.is_sound


def test_measuring_leaves_the_model_as_it_was() -> None:
    model = tiny_bert(seed=3)
    before = snapshot(model)
    rmtkd.plan(model, calibration=ROWS, selection=HELD_OUT, target="60%params", multiple_of=4)
    assert_untouched(model, before)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_guarded_plan_meets_its_target_and_says_what_it_loses(planned: tuple[Plan, dict]) -> None:
    made, _ = planned
    assert made.policy == "guarded"
    assert made.meets_target
    assert made.predicted["params"] >= 0.47 * made.baseline["params"]
    metrics = metrics_of(MODEL, SITES, ROWS, Options())
    again = Sensitivity(MODEL, SITES, MOMENTS, HELD_OUT, metrics=metrics)
    assert made.loss == pytest.approx(again.loss({site.shares: site.keep for site in made.sites}), rel=0.1)
    assert all(site.loss is not None for site in made.sites)


def test_it_loses_no_more_than_the_plan_of_common_edges(planned: tuple[Plan, dict]) -> None:
    paper, _ = rmtkd.plan(MODEL, calibration=ROWS, target="50%params", multiple_of=2, policy="paper")
    metrics = metrics_of(MODEL, SITES, ROWS, Options())
    judge = Sensitivity(MODEL, SITES, MOMENTS, HELD_OUT, metrics=metrics)
    made = planned[0]
    assert made.loss is not None
    assert made.loss <= judge.loss({site.shares: site.keep for site in paper.sites})


def test_without_a_target_the_sum_of_losses_is_bounded() -> None:
    tight, loose = (
        rmtkd.plan(MODEL, calibration=ROWS, selection=HELD_OUT, multiple_of=2, max_loss=bound)[0]
        for bound in (0.001, 0.2)
    )
    for plan, bound in ((tight, 0.001), (loose, 0.2)):
        assert plan.curves is not None
        kept = {site.shares: site.keep for site in plan.sites}
        assert sum(curve.loss(kept[shares]) for shares, curve in plan.curves.items()) <= bound
    assert loose.predicted["params"] < tight.predicted["params"]


def test_several_targets_come_from_one_measurement(planned: tuple[Plan, dict]) -> None:
    made, spectrums = planned
    made = Plan.from_json(made.to_json())
    sizes = [
        retarget(made, spectrums, target=target).predicted["params"]
        for target in ("70%params", "40%params", "30%params")
    ]
    assert sizes == sorted(sizes, reverse=True)
    assert retarget(made, spectrums, target="40%params").loss is None  # a prediction, not a measurement
    assert retarget(made, spectrums, policy="paper").policy == "paper"


def test_guarding_a_plan_without_curves_takes_the_model() -> None:
    paper, spectrums = rmtkd.plan(MODEL, calibration=ROWS, multiple_of=2, policy="paper")
    for asked in ({"policy": "guarded"}, {"max_loss": 0.1}):
        with pytest.raises(PlanError, match="Plan with the model"):
            retarget(paper, spectrums, **asked)  # type: ignore[arg-type]


def test_a_largest_loss_takes_the_place_of_the_target(planned: tuple[Plan, dict]) -> None:
    made, spectrums = planned
    assert made.curves is not None
    tight = retarget(made, spectrums, max_loss=0.001)
    assert tight.target is None and tight.max_loss == 0.001
    kept = {site.shares: site.keep for site in tight.sites}
    assert sum(curve.loss(kept[shares]) for shares, curve in made.curves.items()) <= 0.001
    assert retarget(made, spectrums, max_loss=0.001, target="50%params").target == "50%params"
    with pytest.raises(OptionError, match=r"max_loss must be greater than 0\. Got 0"):
        retarget(made, spectrums, max_loss=0.0)


def test_a_policy_that_there_is_not_is_refused(planned: tuple[Plan, dict]) -> None:
    with pytest.raises(OptionError, match="Did you mean 'guarded'"):
        retarget(*planned, policy="gaurded")


def test_a_plan_that_is_applied_as_it_was_keeps_its_measured_loss(planned: tuple[Plan, dict]) -> None:
    made, spectrums = planned
    batch = next(iter(HELD_OUT))
    assert settle(made, MODEL, SITES, spectrums, batch).loss == made.loss
    first = next(site for site in made.sites if site.name == "layer.0.ffn")
    wider = tuple(replace(site, keep=48) if site is first else site for site in made.sites)
    assert settle(replace(made, sites=wider), MODEL, SITES, spectrums, batch).loss is None


def test_the_table_of_a_guarded_plan_tells_signal_and_loss(planned: tuple[Plan, dict]) -> None:
    made, spectrums = planned
    told = reporting.plan_table(made, 160)
    assert "guarded, measured loss" in str(told.title) and "edge ×" not in str(told.title)
    names = [str(column.header) for column in told.columns]
    assert names[3:7] == ["signal", "above", "keep", "loss"] and "edge" not in names
    paper = reporting.plan_table(retarget(made, spectrums, policy="paper"), 160)
    assert "signal" not in [column.header for column in paper.columns] and "edge ×" in str(paper.title)
    assert "measured" not in str(reporting.plan_table(retarget(made, spectrums, target="40%params")).title)


def test_a_floor_above_what_the_rule_keeps_is_told(planned: tuple[Plan, dict]) -> None:
    made, _ = planned
    changed = [replace(site, floor=site.count - 1) for site in made.sites]
    assert not any("told from noise" in note for note in reporting.plan_notes(replace(made, sites=tuple(changed))))
    above = replace(changed[-1], floor=changed[-1].count + 1)
    plan = replace(made, sites=(*changed[:-1], above))
    (note,) = (note for note in reporting.plan_notes(plan) if "told from noise" in note)
    assert f"At 1 of {len(changed)} sites" in note and f"{above.name} {above.floor:.0f} > {above.count:.0f}" in note
    assert not any("told from noise" in note for note in reporting.plan_notes(replace(plan, policy="paper")))


def test_losses_on_calibration_rows_are_told() -> None:
    made, spectrums = rmtkd.plan(MODEL, calibration=ROWS, multiple_of=4)
    again = retarget(made, spectrums, target="80%params")
    applied = settle(made, MODEL, find_sites(MODEL), spectrums, next(iter(ROWS)))
    for plan in (made, again, applied):
        assert any("calibration rows" in remark for remark in plan.remarks)
    paper = retarget(made, spectrums, policy="paper")
    assert not any("calibration rows" in remark for remark in paper.remarks)


def test_fixed_widths_stay() -> None:
    made, _ = rmtkd.plan(
        MODEL,
        calibration=ROWS,
        selection=HELD_OUT,
        target="60%params",
        multiple_of=2,
        keep={"layer.0.ffn": 21},
        exclude=["layer.1.head"],
    )
    assert made.widths["layer.0.ffn"] == 21
    assert made.widths["layer.1.value"] == 16
    assert made.meets_target


def test_an_unreachable_target_names_the_least() -> None:
    with pytest.raises(PlanError, match="at least"):
        rmtkd.plan(MODEL, calibration=ROWS, selection=HELD_OUT, target="1%params")


@pytest.mark.parametrize(
    "change",
    [
        lambda curves: curves.pop("layer.0.ffn"),
        lambda curves: curves["layer.0.ffn"].update(widths=[3, 2, 48]),
        lambda curves: curves["layer.0.ffn"].update(weight=0.0),
        lambda curves: curves["layer.0.ffn"]["losses"].pop(),
    ],
)
def test_broken_curves_in_a_plan_are_named(planned: tuple[Plan, dict], change) -> None:
    fields = json.loads(planned[0].to_json())
    change(fields["curves"])
    with pytest.raises(PlanError, match="curves must"):
        Plan.from_json(json.dumps(fields))


def test_rows_are_spread_over_batches() -> None:
    rows = random_rows(100, batch_size=10)
    picked = every_nth_row(rows, 20)
    assert sum(batching.rows(batch) for batch in picked) == 20
    assert len(picked) == 10
    assert sum(batching.rows(batch) for batch in every_nth_row(rows, 1000)) == 100
    with pytest.raises(DataError, match="at least one row"):
        every_nth_row([], 10)


def test_a_plan_is_a_value(planned: tuple[Plan, dict]) -> None:
    made = planned[0]
    assert Plan.from_json(made.to_json()) == made
    assert replace(made, remarks=()) != made or not made.remarks


def test_rows_are_run_together_in_fewer_batches() -> None:
    """The same rows with the same answers; none is padded to more than `STRETCH` times its length."""
    few = every_nth_row(random_rows(300, seed=5, batch_size=10), 150)
    together = gathered(few)
    assert len(together) < len(few) / 2
    assert max(batching.rows(batch) for batch in together) <= TOGETHER
    before = {tuple(row[mask == 1].tolist()): (len(row), answer) for row, mask, answer in answered(few)}
    after = [(tuple(row[mask == 1].tolist()), len(row), answer) for row, mask, answer in answered(together)]
    assert len(after) == len(list(answered(few))) == 150
    for tokens, length, answer in after:
        assert length <= STRETCH * before[tokens][0]
        torch.testing.assert_close(answer, before[tokens][1], rtol=1e-4, atol=1e-4)


def answered(batches: Any) -> Any:
    for batch in batches:
        with torch.no_grad():
            yield from zip(batch["input_ids"], batch["attention_mask"], batching.logits(MODEL, batch), strict=True)


def test_what_does_not_fit_together_stays_apart() -> None:
    pairs = [(torch.ones(2, 3), torch.zeros(2)), (torch.ones(1, 3), torch.zeros(1)), (torch.ones(1, 4), torch.zeros(1))]
    assert [batching.rows(batch) for batch in gathered(pairs)] == [3, 1]
    plain = [{"ids": torch.ones(2, 5, dtype=torch.long)}, {"ids": torch.ones(2, 6, dtype=torch.long)}]
    assert len(gathered(plain)) == 2  # nothing says what a mask hides
    assert len(gathered([plain[0], {"words": plain[0]["ids"]}])) == 2
    assert len(gathered([batching.Call({"ids": plain[0]["ids"]}, len), batching.Call(plain[0], max)])) == 2  # type: ignore[arg-type]


@pytest.mark.parametrize("keep", [1, 5, 11, 16])
@pytest.mark.parametrize("kind", ["units", "directions"])
def test_a_projection_is_that_of_its_basis(kind: str, keep: int) -> None:
    """However it is computed."""
    generator = torch.Generator().manual_seed(keep)
    samples = torch.randn(200, 16, generator=generator, dtype=torch.float64) @ torch.randn(
        16, 16, generator=generator, dtype=torch.float64
    )
    covariance, mean = torch.cov(samples.mT)[None], samples.mean(0)[None] + 3
    reader = torch.randn(1, 6, 16, generator=generator, dtype=torch.float64)
    basis = (unit_basis if kind == "units" else linear_basis)(covariance, mean, reader, keep)
    activations = torch.randn(4, 7, 16, generator=generator)
    expected = mean + (activations.double() - mean) @ basis.projector[0].mT
    got = projection(basis, torch.device("cpu"))(activations)
    torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-4)


def test_losses_are_measured_in_the_precision_that_is_asked_for(monkeypatch: pytest.MonkeyPatch):
    def losses(precision: str) -> str:
        options: dict[str, Any] = {"target": "60%params", "multiple_of": 4, "precision": precision}
        return rmtkd.plan(MODEL, calibration=ROWS, selection=HELD_OUT, **options)[0].to_json()

    monkeypatch.setattr(environment, "has_bf16", lambda _: True)
    half, whole = losses("auto"), losses("fp32")
    monkeypatch.setattr(environment, "has_bf16", lambda _: False)
    assert whole == losses("auto") == losses("fp32")
    assert half == losses("bf16") != whole


def test_a_forward_may_read_attributes_of_blocks_that_are_not_run_again() -> None:
    from transformers import ModernBertConfig, ModernBertForSequenceClassification

    torch.manual_seed(0)
    special = {f"{name}_token_id": number for number, name in enumerate(("pad", "bos", "eos", "cls", "sep"))}
    config = ModernBertConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=2,
        global_attn_every_n_layers=1,  # pyright: ignore[reportCallIssue]
        **special,
    )
    model = ModernBertForSequenceClassification(config).eval()
    ids = torch.randint(5, 40, (96, 10), generator=torch.Generator().manual_seed(0))
    rows = [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in ids.split(16)]
    made, _ = rmtkd.plan(model, calibration=rows[:4], selection=rows[4:], target="80%params", multiple_of=1)
    assert made.loss is not None


class Last(torch.nn.Module):
    """Reads the last position, whatever stands there: for rows that are padded on the left."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.up, self.out = torch.nn.Embedding(40, 8), torch.nn.Linear(8, 16), torch.nn.Linear(16, 3)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return self.out(torch.relu(self.up(self.words(input_ids)[:, -1])))


def test_rows_are_not_padded_for_a_model_that_reads_what_stands_there() -> None:
    torch.manual_seed(0)
    model, rows = Last(), []
    for count, length in ((16, 10), (4, 11), (4, 12), (4, 13)):
        ids = torch.randint(1, 40, (count, length))
        rows.append({"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    sites = [feed_forward_site(model, "inner", writers=["up"], reader="out")]
    assert len(Sensitivity(model, sites, collect(model, sites, rows), rows).batches) == 4
    assert len(Sensitivity(MODEL, SITES, MOMENTS, rows).batches) == 2
