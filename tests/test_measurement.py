"""The claims of `rmtkd.measurement`: costs that a pencil confirms, spreads with every number, models left alone."""

import itertools
import math
import operator
import statistics
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import f1_score
from torch import Tensor, nn

from conftest import assert_untouched, random_rows, snapshot, tiny_bert
from rmtkd import measurement
from rmtkd.errors import DataError
from rmtkd.measurement import (
    Latency,
    accuracy,
    count_disk_bytes,
    count_flops,
    count_parameters,
    divergence,
    evaluation,
    f1,
    measure,
    predict,
    proportion,
    quality,
    right_by_chance,
    time_forward,
)
from rmtkd.memory import Pieces

BATCH = next(iter(random_rows(6, batch_size=6)))
PAIR = (torch.zeros(5, 7), torch.zeros(5, dtype=torch.long))


def flags(model: nn.Module) -> list[bool]:
    return [module.training for module in model.modules()]


# ---------------------------------------------------------------------------------------------- size


def test_parameters_are_counted_and_tied_ones_once() -> None:
    first, second = nn.Linear(7, 3), nn.Linear(7, 3)
    assert count_parameters(nn.Sequential(first, second)) == 2 * 24
    second.weight = first.weight
    assert count_parameters(nn.Sequential(first, second)) == 24 + 3
    assert count_parameters(nn.Sequential(first, first)) == 24


def test_parameters_of_a_bert_are_those_of_the_formula() -> None:
    d, f, words = 32, 48, 50 + 24 + 2
    layer = 4 * (d * d + d) + (d * f + f) + (f * d + d) + 2 * 2 * d
    assert count_parameters(tiny_bert()) == words * d + 2 * d + 2 * layer + (d * d + d) + (d * 3 + 3)


def test_the_file_is_as_large_as_its_weights_and_a_header() -> None:
    model = tiny_bert()
    weights = 4 * count_parameters(model)
    assert weights < count_disk_bytes(model) < weights + 8192
    assert count_disk_bytes(tiny_bert().double()) > 2 * weights


# ---------------------------------------------------------------------------------------------- operations


@pytest.mark.parametrize(("batch", "inputs", "outputs"), [(1, 1, 1), (5, 7, 3), (8, 64, 10)])
def test_a_linear_map_costs_two_operations_a_weight_and_row(batch: int, inputs: int, outputs: int) -> None:
    rows = (torch.randn(batch, inputs), torch.zeros(batch, dtype=torch.long))
    assert count_flops(nn.Linear(inputs, outputs), rows) == 2 * batch * inputs * outputs


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_operations_of_a_bert_are_those_of_the_formula_attention_included(attention: str) -> None:
    b, n = BATCH["input_ids"].shape
    d, f = 32, 48
    projections, products, feed_forward = 4 * b * n * d * d, 2 * b * n * n * d, 2 * b * n * d * f
    layers, head = 2 * (projections + products + feed_forward), b * d * d + b * d * 3
    expected = 2 * (layers + head)
    assert count_flops(tiny_bert(attn_implementation=attention), BATCH) == expected


def test_operations_of_torchs_own_layers_are_counted_although_they_run_fused() -> None:
    b, n, d, f = 4, 6, 16, 32
    layer = nn.TransformerEncoderLayer(d, 2, f, batch_first=True)
    rows = (torch.randn(b, n, d), torch.zeros(b, dtype=torch.long))
    assert count_flops(layer, rows) == 2 * (4 * b * n * d * d + 2 * b * n * n * d + 2 * b * n * d * f)
    assert torch.backends.mha.get_fastpath_enabled()


class Recurrent(nn.Module):
    def __init__(self, d: int, h: int):
        super().__init__()
        self.cells, self.head = nn.LSTM(d, h, batch_first=True), nn.Linear(h, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.cells(x)[0][:, -1])


def test_operations_of_recurrent_layers_are_counted_although_they_run_fused() -> None:
    b, n, d, h = 4, 6, 16, 32
    rows = (torch.randn(b, n, d), torch.zeros(b, dtype=torch.long))
    assert count_flops(Recurrent(d, h), rows) == 2 * b * (n * 4 * h * (d + h) + h * 3)
    assert torch.backends.mkldnn.enabled


def test_counting_operations_brings_the_batch_to_the_model() -> None:
    seen = []

    class Device(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            seen.append(input.device.type)
            return super().forward(input)

    assert count_flops(Device(7, 3, device="meta"), PAIR) == 2 * 5 * 7 * 3
    assert seen == ["meta"]


# ---------------------------------------------------------------------------------------------- evaluation mode


@pytest.mark.parametrize("error", [False, True])
def test_evaluation_gives_every_module_its_flag_back(error: bool) -> None:
    models = [tiny_bert().train(), tiny_bert()]
    models[0].get_submodule("bert.encoder.layer.1").eval()
    before = [flags(model) for model in models]
    try:
        with evaluation(*models):
            assert not any(flag for model in models for flag in flags(model))
            assert not torch.is_grad_enabled()
            if error:
                raise KeyError("something broke")
    except KeyError:
        assert error
    assert [flags(model) for model in models] == before
    assert torch.is_grad_enabled()


def test_measuring_leaves_the_model_as_it_was() -> None:
    model = tiny_bert().train()
    before, was = snapshot(model), flags(model)
    footprint = measure(model, BATCH, encoder="bert.encoder")
    accuracy(model, random_rows(8))
    assert_untouched(model, before)
    assert flags(model) == was
    assert all(parameter.grad is None for parameter in model.parameters())
    assert footprint.parameters == count_parameters(model)
    assert footprint.parameters_encoder == count_parameters(model.get_submodule("bert.encoder"))
    assert footprint.flops == count_flops(model, BATCH)
    assert footprint.disk_bytes == count_disk_bytes(model)
    assert footprint.latency_ms is not None
    assert footprint.latency_ms.median > 0


def test_a_footprint_is_plain_values_and_keeps_the_latency_it_is_given() -> None:
    latency = Latency(median=1.0, iqr=0.1, batch=5, length=1, threads=1, repeats=3, device="cpu")
    footprint = measure(nn.Linear(7, 3), PAIR, latency=latency)
    assert footprint.latency_ms is latency
    assert footprint.parameters_encoder is None
    assert footprint.to_dict()["latency_ms"]["median"] == 1.0


# ---------------------------------------------------------------------------------------------- time


class Timed(nn.Linear):
    """Notes its name when it runs, and turns the clock by so many seconds."""

    def __init__(self, name: str, durations: list[float], clock: "Clock"):
        super().__init__(7, 3)
        self.name, self.durations, self.clock = name, durations, clock

    def forward(self, input: Tensor) -> Tensor:
        self.clock.order.append(self.name)
        self.clock.now += self.durations.pop(0)
        return super().forward(input)


class Clock:
    """A clock that stands still unless a model runs."""

    def __init__(self) -> None:
        self.now, self.order = 0.0, list[str]()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(measurement.time, "perf_counter", lambda: clock.now)
    return clock


def test_models_are_timed_in_turns_and_warm_up_is_left_out(clock: Clock) -> None:
    models = [Timed("a", [9.0, 0.001, 0.005, 0.002, 0.004], clock), Timed("b", [9.0, 0.01, 0.03, 0.02, 0.04], clock)]
    fast, slow = time_forward(models, PAIR, repeats=4, warm_up=1)
    assert clock.order == ["a", "b"] * 5
    assert fast.median == pytest.approx(statistics.median([1, 2, 4, 5]))
    assert slow.median == pytest.approx(25)
    assert fast.iqr == pytest.approx(4.25 - 1.75)
    assert (fast.batch, fast.length, fast.repeats, fast.device) == (5, 1, 4, "cpu")
    assert fast.threads == torch.get_num_threads()


@pytest.mark.parametrize("drop", [(), ("attention_mask",)])
def test_the_length_that_was_timed_is_that_of_the_rows(drop: tuple[str, ...]) -> None:
    batch = {name: value for name, value in BATCH.items() if name not in drop}
    (latency,) = time_forward([tiny_bert()], batch, repeats=1, warm_up=0)
    assert (latency.batch, latency.length) == tuple(BATCH["input_ids"].shape)


# ---------------------------------------------------------------------------------------------- accuracy


@given(st.integers(1, 10_000), st.data())
def test_a_proportion_has_the_binomial_standard_error(n: int, data: st.DataObject) -> None:
    hits = data.draw(st.integers(0, n))
    estimate = proportion(hits, n)
    p = hits / n
    assert (estimate.value, estimate.n) == (p, n)
    assert estimate.stderr == pytest.approx(math.sqrt(p * (1 - p) / n))


def test_accuracy_is_the_share_of_rows_whose_highest_score_is_the_label_s() -> None:
    scores = torch.tensor([[3.0, 1, 2], [0, 5, 1], [0, 1, 9], [4, 1, 1], [1, 2, 0]])
    labels = torch.tensor([0, 1, 0, 0, 2])
    whole = accuracy(Scores(), [(scores, labels)])
    assert (whole.value, whole.n) == (3 / 5, 5)
    parts = accuracy(Scores(), [(scores[:2], labels[:2]), (scores[2:], labels[2:])])
    assert parts == whole


@st.composite
def answers(draw: st.DrawFn) -> tuple[int, list[int], list[int]]:
    """A number of classes, and labels and answers of some rows."""
    classes, n = draw(st.integers(2, 5)), draw(st.integers(1, 60))
    rows = st.lists(st.integers(0, classes - 1), min_size=n, max_size=n)
    return classes, draw(rows), draw(rows)


@given(answers())
def test_f1_is_that_of_scikit_learn(drawn: tuple[int, list[int], list[int]]) -> None:
    classes, labels, answered = drawn
    scores = nn.functional.one_hot(torch.tensor(answered), classes).float()
    measured = quality(Scores(), [(scores, torch.tensor(labels))])
    average = "binary" if classes == 2 else "macro"
    assert measured["f1"].value == pytest.approx(f1_score(labels, answered, average=average, zero_division=0.0))  # type: ignore[arg-type]
    assert measured["accuracy"] == accuracy(Scores(), [(scores, torch.tensor(labels))])
    assert measured["f1"].n == len(labels)


@pytest.mark.parametrize(
    "confusion",
    [[[500, 60], [90, 350]], [[900, 20], [30, 50]], [[300, 20, 9], [40, 200, 30], [2, 50, 349]], [[0, 0], [300, 700]]],
)
def test_the_spread_of_f1_is_that_of_drawing_the_rows_again(confusion: list[list[int]]) -> None:
    counts = torch.tensor(confusion)
    n = int(counts.sum())
    drawn = np.random.default_rng(0).multinomial(n, (counts.flatten() / n).double().numpy(), 1000)
    again = [f1(torch.from_numpy(draw).reshape(counts.shape)).value for draw in drawn]
    assert f1(counts).stderr == pytest.approx(statistics.stdev(again), rel=0.1)


def test_the_spread_of_the_f1_of_two_classes_is_the_closed_form() -> None:
    a, wrong, n = 350, 150, 1000
    expected = math.sqrt(4 * a * wrong * (a + wrong)) / (2 * a + wrong) ** 2
    measured = f1(torch.tensor([[500, 60], [90, 350]]))
    assert measured.stderr == pytest.approx(expected)
    assert measured.n == n


def test_quality_takes_one_pass_and_refuses_labels_that_the_head_lacks() -> None:
    scores, passes = torch.eye(3), []

    class Once:
        def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
            passes.append(1)
            yield scores, torch.tensor([0, 1, 2])

    assert quality(Scores(), Once())["f1"].value == 1
    assert len(passes) == 1
    for labels in ([0, 1, 3], [-1, 0, 1]):
        with pytest.raises(DataError, match=r"labels must be within 0\.\.2"):
            quality(Scores(), [(scores, torch.tensor(labels))])
    with pytest.raises(DataError, match="to measure F1"):
        f1(torch.zeros(2, 2, dtype=torch.long))


class Scores(nn.Module):
    """Answers with the scores that it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.anchor = nn.Parameter(torch.zeros(1))

    def forward(self, scores: Tensor) -> Tensor:
        return scores + self.anchor


def test_the_divergence_is_that_of_the_formula_and_nothing_from_itself() -> None:
    rows, student, teacher = random_rows(30, batch_size=7), tiny_bert(seed=1), tiny_bert(seed=2)
    assert divergence(teacher, teacher, rows) == 0
    p, q = (predict(model, rows)[0].double().softmax(-1) for model in (teacher, student))
    expected = float((p * (p / q).log()).sum(-1).mean())
    assert divergence(student, teacher, rows) == pytest.approx(expected, rel=1e-9) and expected > 0
    kept = [measurement.answers(teacher, batch, Pieces()) for batch in rows]
    assert divergence(student, kept, rows) == divergence(student, teacher, rows)
    with pytest.raises(DataError, match="at least one row"):
        divergence(student, teacher, [])
    student.get_parameter("classifier.bias").data.fill_(float("nan"))
    assert math.isnan(divergence(student, teacher, rows))  # not the nearest of all


def test_predictions_come_in_order_without_gradient_and_without_dropout() -> None:
    model, rows = tiny_bert().train(), random_rows(20, batch_size=6)
    scores, labels = predict(model, rows)
    again, _ = predict(model, rows)
    assert torch.equal(scores, again)
    assert not scores.requires_grad
    assert labels.tolist() == [label for batch in rows for label in batch["labels"].tolist()]
    with torch.no_grad():
        torch.testing.assert_close(scores[:6], model.eval()(**next(iter(rows))).logits)


def test_rows_without_labels_and_no_rows_are_refused() -> None:
    model = tiny_bert()
    with pytest.raises(DataError, match="must have labels"):
        accuracy(model, [{"input_ids": torch.ones(2, 3, dtype=torch.long)}])
    with pytest.raises(DataError, match="at least one labelled row"):
        accuracy(model, [])
    with pytest.raises(DataError, match="at least one labelled row"):
        proportion(0, 0)


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2)), min_size=1, max_size=6))
def test_right_by_chance_is_the_mean_and_spread_over_all_orders_of_the_answers(rows: list[tuple[int, int]]) -> None:
    labels, answers = map(list, zip(*rows, strict=True))
    right = [sum(map(operator.eq, labels, order)) for order in itertools.permutations(answers)]
    expected = statistics.mean(right), statistics.pstdev(right)
    assert right_by_chance(torch.tensor(labels), torch.tensor(answers)) == pytest.approx(expected, abs=1e-7)


def test_a_single_answer_is_never_better_than_chance() -> None:
    """Not by rounding either."""
    for n in range(1, 120):
        for right in range(n + 1):
            labels = (torch.arange(n) < right).long()
            mean, deviation = right_by_chance(labels, torch.ones(n, dtype=torch.long))
            assert right <= mean + 2 * deviation
