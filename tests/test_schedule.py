"""Options are checked when made; the stop rules are a table from histories to reasons."""

import json
import math
from dataclasses import asdict, replace

import pytest

import rmtkd
from rmtkd.distillation import Recovery
from rmtkd.errors import OptionError
from rmtkd.schedule import History, Options, Round, stop_reason, too_much_lost


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rule": "mpp"}, r"rule must be one of .* Got 'mpp'\. Did you mean 'mp'"),
        ({"target": "25%parms"}, "Did you mean 'params'"),
        ({"target": "0%params"}, "more than 0 %"),
        ({"target": "101%flops"}, "at most 100 %"),
        ({"target": "small"}, "25%params, 40%flops, 2.5x or 5M"),
        ({"tau": 0.0}, r"tau must be within \(0, 1\)\. Got 0\.0"),
        ({"tau": 1.0}, "tau must be within"),
        ({"tau": float("nan")}, "tau must be within"),
        ({"epochs": -1.0}, "epochs must be at least 0"),
        ({"epochs": float("inf")}, "epochs must be at least 0"),
        ({"tolerance": -0.1}, "tolerance must be within"),
        ({"tolerance": 2.0}, "tolerance must be within"),
        ({"max_rounds": 0}, "max_rounds must be at least 1"),
        ({"multiple_of": 0}, "multiple_of must be at least 1"),
        ({"min_share": 1.5}, "min_share must be within"),
        ({"calibration_share": 0.0}, "calibration_share must be within"),
        ({"seed": -1}, "seed must be at least 0"),
        ({"device": "gpu"}, "device must be cpu"),
    ],
)
def test_an_option_out_of_range_is_refused_when_made(options: dict, message: str):
    with pytest.raises(OptionError, match=message):
        Options(**options)


@pytest.mark.parametrize(
    "values",
    [
        {"alpha": 1.1},
        {"alpha": float("nan")},
        {"warmup": -0.1},
        {"weight_decay": float("inf")},
        {"temperature": 0.0},
        {"lr": 0.0},
        {"lr": float("inf")},
        {"clip": -1.0},
        {"optimizer": "adam"},
    ],
)
def test_a_recovery_out_of_range_is_refused_when_made(values: dict):
    with pytest.raises(OptionError, match=f"{next(iter(values))} must be"):
        Recovery(**values)


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("targett", "an argument of compress must be one of model, train, .*Got 'targett'. Did you mean 'target'?"),
        ("reports", "Did you mean 'report'?"),
        ("lr", r"lr must be said of recovery. Got lr=1. Pass recovery=rmtkd.Recovery\(lr=1\)"),
    ],
)
def test_what_is_no_option_is_refused_with_the_nearest_that_is_one(name: str, told: str):
    with pytest.raises(OptionError, match=told):
        Options.of({"epochs": 2.0, name: 1}, rmtkd.compress)
    assert Options.of({"epochs": 2.0}, rmtkd.compress) == Options(epochs=2.0)


@pytest.mark.parametrize(("epochs", "steps"), [(0.0, 0), (1e-3, 1), (0.25, 2), (1.0, 8), (2.5, 20)])
def test_recovery_is_at_least_a_step_unless_there_is_none(epochs: float, steps: int):
    assert Options(epochs=epochs).steps(8) == steps


def test_options_become_plain_json():
    options = Options(target="25%params", recovery=Recovery(lr=1e-3))
    assert json.loads(json.dumps(options.to_dict(), allow_nan=False))["recovery"]["lr"] == 1e-3


def test_a_run_that_began_before_there_were_gentle_and_blend_goes_on_without():
    values = Options().to_dict()
    assert Options.from_dict(values) == Options()
    values["recovery"] |= {name: values.pop(name) for name in ("gentle", "blend")}  # as they were for a while
    assert Options.from_dict(values) == Options()
    for name in ("gentle", "blend"):
        del values["recovery"][name]
    assert Options.from_dict(values) == Options(gentle=0.0, blend=False)


def test_options_of_another_machine_can_be_read_here():
    with pytest.raises(OptionError, match="device must be there"):
        Options(device="cuda:99")
    values = {**Options().to_dict(), "device": "cuda:99"}
    read = Options.from_dict(values)
    assert read.device == "cuda:99" and read.to_dict() == values


@pytest.mark.parametrize(
    ("gentle", "divergence", "share"),
    [
        (0.4, 0.1, 0.5),
        (0.4, 0.004, 0.1),
        (0.4, 0.4, 1.0),
        (0.4, 3.0, 1.0),
        (0.4, 0.0, 0.001),  # no rate at all would be none
        (0.4, float("nan"), 1.0),
        (0.4, None, 1.0),
        (0.0, 0.01, 1.0),
    ],
)
def test_the_rate_after_a_mild_cut_is_less_by_the_square_root(gentle: float, divergence: float | None, share: float):
    options = Options(gentle=gentle, recovery=Recovery(lr=2e-4))
    assert options.rate_after(divergence) == pytest.approx(share * 2e-4)


def made_round(number: int = 1, accuracy: float = 0.9, **fields: object) -> Round:
    values = {
        "number": number,
        "sites": ("layer.0.ffn",),
        "widths": {"layer.0.ffn": (48, 8)},
        "parameters": 100,
        "check_error": 0.0,
        "accuracy_cut": accuracy,
        "accuracy": accuracy,
        "steps": 3,
        "loss_first": 1.0,
        "loss_last": 0.5,
        "seconds_cut": 0.1,
        "seconds_recovery": 0.1,
    }
    return Round(**{**values, **fields})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "accuracies", "pending", "reason"),
    [
        ({}, [], 3, None),
        ({}, [0.2], 1, None),
        ({}, [], 0, "plan: every site has the width the rule gives it"),
        ({}, [0.9], 0, "plan: every site has the width the rule gives it"),
        ({"target": "25%params"}, [0.9], 0, "target: 25%params reached"),
        ({"tolerance": 0.02}, [0.89], 1, None),
        ({"tolerance": 0.02}, [0.95], 1, None),
        ({"tolerance": 0.02}, [0.9, 0.85], 1, "tolerance: round 2 lost 5.00% of selection accuracy, more than 2.00%"),
        ({"tolerance": 0.02}, [0.85], 0, "tolerance: round 1 lost 5.00% of selection accuracy, more than 2.00%"),
        ({"tolerance": 0.0}, [0.9], 1, None),
        ({"max_rounds": 2}, [0.9], 2, None),
        ({"max_rounds": 2}, [0.9, 0.9], 4, "max_rounds: 2 rounds done, 4 left out"),
        ({"max_rounds": 2}, [0.9, 0.9], 0, "plan: every site has the width the rule gives it"),
        ({"max_rounds": 1, "tolerance": 0.01}, [0.5], 1, "tolerance: round 1 lost 40.00%"),
    ],
)
def test_a_history_has_this_reason_to_stop(options: dict, accuracies: list[float], pending: int, reason: str | None):
    rounds = tuple(made_round(i + 1, accuracy) for i, accuracy in enumerate(accuracies))
    history = History(options=Options(**options), baseline_accuracy=0.9, rounds=rounds, pending=pending)
    got = stop_reason(history)
    assert got is None if reason is None else got is not None and got.startswith(reason)


def test_only_the_last_round_can_break_the_tolerance():
    history = History(
        options=Options(tolerance=0.02),
        baseline_accuracy=0.9,
        rounds=(made_round(1, 0.5, rolled_back=True), made_round(2, 0.9)),
        pending=1,
    )
    assert too_much_lost(history) is None
    assert too_much_lost(replace(history, rounds=history.rounds[:1])) is not None


def test_what_is_no_number_is_none_in_a_round_and_so_in_a_record():
    done = made_round(divergence_cut=math.inf, divergence=math.nan, way=((1.0, math.nan), (0.25, 0.1)))
    assert (done.divergence_cut, done.divergence, done.way) == (None, None, ((1.0, None), (0.25, 0.1)))
    stored = json.loads(json.dumps(asdict(done), allow_nan=False))
    assert Round.from_dict(stored) == done
    earlier = {**stored, "divergence": math.nan, "way": [[1.0, math.nan], [0.25, 0.1]]}
    assert Round.from_dict(earlier) == done
