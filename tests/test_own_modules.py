"""From Python: any module whose widths are described, any iterable of batches, any call, with or without labels."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import rmtkd
from conftest import assert_untouched, random_rows, snapshot, tiny_bert
from rmtkd import environment
from rmtkd.errors import DataError, OptionError, PlanError, SurgeryError, UnsupportedModelError
from rmtkd.measurement import count_parameters
from rmtkd.sites import embedding_site, feed_forward_site, linear_site


class Classifier(nn.Module):
    """Of points in the plane: not of any family, and with two inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.out = nn.Linear(6, 64), nn.Linear(64, 32), nn.Linear(32, 3)

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return self.out(self.down(torch.relu(self.up(x * scale))))


@pytest.fixture(scope="module")
def points() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(600, 6, generator=generator)
    return x, (x[:, 0] > 0).long() + (x[:, 1] * x[:, 2] > 0).long()


@pytest.fixture(scope="module")
def model(points: tuple[Tensor, Tensor]) -> Classifier:
    torch.manual_seed(0)
    model = Classifier()
    x, labels = points
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(150):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), labels).backward()
        optimizer.step()
    return model.eval()


def sites(model: nn.Module) -> tuple[Any, ...]:
    return (
        feed_forward_site(model, "inner", writers=["up"], reader="down"),
        linear_site(model, "bottleneck", writer="down", reader="out"),
    )


OPTIONS: dict[str, Any] = {"target": "40%params", "multiple_of": 1, "epochs": 3.0, "calibration_share": 1.0}


def parts(points: tuple[Tensor, Tensor]) -> dict[str, list[tuple[Tensor, Tensor]]]:
    pairs = list(zip(*(part.split(50) for part in points), strict=True))
    return {"train": pairs[:8], "selection": pairs[8:10], "report": pairs[10:]}


def test_a_module_of_ones_own_is_compressed_and_resumed(
    model: Classifier, points: tuple[Tensor, Tensor], tmp_path: Path
):
    before = snapshot(model)
    small = rmtkd.compress(model, **parts(points), sites=sites(model), out=tmp_path / "run", **OPTIONS)  # type: ignore
    assert_untouched(model, before)
    assert small.record["compressed"]["parameters"] <= 0.4 * small.record["baseline"]["parameters"]
    assert small.record["compressed"]["accuracy"]["value"] > small.record["baseline"]["accuracy"]["value"] - 0.05
    down = small.model.get_parameter("down.weight")
    assert tuple(down.shape) == (small.plan.widths["bottleneck"], small.plan.widths["inner"])
    assert down.numel() < 32 * 64
    assert small.record["baseline"]["parameters_encoder"] is None
    again = rmtkd.resume(tmp_path / "run", model, **parts(points), sites=sites(model))  # type: ignore
    assert_untouched(again.model, snapshot(small.model))


def test_a_module_of_ones_own_has_no_stock_widths(model: Classifier, points: tuple[Tensor, Tensor], tmp_path: Path):
    with pytest.raises(OptionError, match=r"--uniform .* None of inner, bottleneck has such an entry"):
        rmtkd.compress(model, **parts(points), sites=sites(model), uniform=True, out=tmp_path / "run", **OPTIONS)  # type: ignore
    assert not (tmp_path / "run").exists()


def test_without_sites_its_widths_are_followed(model: Classifier, points: tuple[Tensor, Tensor]):
    small = rmtkd.compress(model, **parts(points), **OPTIONS)  # type: ignore
    assert {site.name: site.width for site in small.plan.sites} == {"up": 64, "down": 32}
    assert small.record["compressed"]["parameters"] < small.record["baseline"]["parameters"]


def test_a_data_loader_will_do(model: Classifier, points: tuple[Tensor, Tensor]):
    data = TensorDataset(*points)
    loaders = {"train": DataLoader(data, batch_size=50, shuffle=True), "selection": DataLoader(data, batch_size=100)}
    small = rmtkd.compress(model, **loaders, sites=sites(model), **OPTIONS)  # type: ignore
    assert small.record["compressed"]["accuracy_selection"]["value"] > 0.9


def test_an_unusual_call_is_the_users(model: Classifier, points: tuple[Tensor, Tensor], tmp_path: Path):
    """Batches are mappings that the module is not called with."""

    class Unusual(nn.Module):
        def __init__(self, inner: nn.Module):
            super().__init__()
            self.inner = inner

        def forward(self, payload: dict[str, Tensor]) -> dict[str, Tensor]:
            return {"scores": self.inner(payload["points"])}

    whole = Unusual(model)
    described = (
        feed_forward_site(whole, "inner", writers=["inner.up"], reader="inner.down"),
        linear_site(whole, "bottleneck", writer="inner.down", reader="inner.out"),
    )
    rows = {role: [{"points": x, "labels": labels} for x, labels in batches] for role, batches in parts(points).items()}

    def call(module: nn.Module, batch: Any) -> Tensor:
        return module({"points": batch["points"]})["scores"]

    assert all(verdict.ok for verdict in rmtkd.check(whole, rows["train"], described, forward=call))
    small = rmtkd.compress(whole, **rows, sites=described, forward=call, **OPTIONS)  # type: ignore
    small.save(tmp_path / "small")
    assert "forward=forward" in (tmp_path / "small" / "README.md").read_text()
    loaded = rmtkd.load(tmp_path / "small", lambda: Unusual(Classifier()), forward=call)
    assert_untouched(loaded, snapshot(small.model))
    assert small.record["compressed"]["parameters"] <= 0.4 * small.record["baseline"]["parameters"]
    assert small.record["compressed"]["accuracy"]["value"] > small.record["baseline"]["accuracy"]["value"] - 0.05
    assert small.record["compressed"]["latency_ms"]["batch"] == 50


class Unlabelled:
    def __init__(self, batches: list[Any]):
        self.batches = batches

    def __iter__(self) -> Iterator[Any]:
        return iter(self.batches)


def test_without_labels_the_teacher_is_all_there_is_to_learn(model: Classifier, points: tuple[Tensor, Tensor]):
    rows = {role: Unlabelled([(x,) for x, _ in batches]) for role, batches in parts(points).items()}
    small = rmtkd.compress(model, **rows, sites=sites(model), **OPTIONS)  # type: ignore
    record = small.record
    assert record["measured_against"] == {"selection": "teacher", "report": "teacher"}
    assert record["baseline"]["accuracy"]["value"] == 1
    assert 0.85 < record["compressed"]["accuracy"]["value"] <= 1
    assert "agreement with the teacher, report rows" in small.summary()
    assert "accuracy" not in small.summary()


def test_labels_of_some_roles_are_used_where_they_are(model: Classifier, points: tuple[Tensor, Tensor]):
    rows: dict[str, Any] = parts(points)
    rows["train"] = [(x,) for x, _ in rows["train"]]
    rows["selection"] = [(x,) for x, _ in rows["selection"]]
    rows["report"] = [(x, (labels + (torch.arange(len(x)) == 0)) % 3) for x, labels in rows["report"]]  # one is wrong
    small = rmtkd.compress(model, **rows, sites=sites(model), **OPTIONS)
    assert small.record["measured_against"] == {"selection": "teacher", "report": "labels"}
    assert small.record["baseline"]["accuracy"]["value"] < 1
    assert "accuracy, report rows" in small.summary()


def test_a_teacher_with_a_single_answer_is_refused_without_labels_too():
    model = tiny_bert()
    with torch.no_grad():
        model.classifier.bias[1] += 1000
    rows = random_rows(64)
    rows.labels = None
    with pytest.raises(DataError, match="better than chance"):
        rmtkd.compress(model, train=rows, selection=rows, multiple_of=2, target="70%params")


def test_report_labels_are_checked_before_anything_takes_time():
    model, rows, report = tiny_bert(), random_rows(64), random_rows(32)
    rows.labels = None
    assert report.labels is not None
    report.labels[3] = 7
    events: list[Any] = []
    with pytest.raises(DataError, match=r"labels must be within 0\.\.2"):
        rmtkd.compress(model, train=rows, selection=rows, report=report, on_event=events.append, multiple_of=2)
    assert events == []


def test_labels_on_some_batches_only_are_refused(model: Classifier, points: tuple[Tensor, Tensor]):
    for role in ("selection", "report"):
        rows: dict[str, Any] = parts(points)
        rows[role] = [*rows[role][:1], *((x,) for x, _ in rows[role][1:])]
        with pytest.raises(DataError, match=f"{role} rows must all have labels, or none"):
            rmtkd.compress(model, **rows, sites=sites(model), **OPTIONS)


# What is refused, and what is left alone


def test_a_row_that_the_teacher_cannot_answer_is_refused(model: Classifier, points: tuple[Tensor, Tensor]):
    rows = parts(points)
    spoiled = rows["selection"][1][0].clone()
    spoiled[7, 2] = torch.nan
    rows["selection"][1] = (spoiled, rows["selection"][1][1])
    with pytest.raises(DataError, match=r"finite scores. Of 100 rows 1 give NaN"):
        rmtkd.compress(model, **rows, sites=sites(model), **OPTIONS)  # type: ignore


def test_sites_that_are_given_are_checked_for_precision_and_ties(model: Classifier, points: tuple[Tensor, Tensor]):
    with pytest.raises(UnsupportedModelError, match=r"torch.bfloat16"):
        rmtkd.compress(Classifier().bfloat16(), **parts(points), sites=sites(model), **OPTIONS)  # type: ignore
    tied = Classifier()
    tied.again = tied.up.weight
    with pytest.raises(UnsupportedModelError, match=r"up.weight"):
        rmtkd.narrow(tied, _plan(model, points), calibration=parts(points)["train"], sites=sites(tied))  # type: ignore


def test_a_plan_that_cuts_nothing_gives_a_copy_in_evaluation_mode(model: Classifier, points: tuple[Tensor, Tensor]):
    made = _plan(model, points)
    whole = replace(made, sites=tuple(replace(site, keep=site.width) for site in made.sites))
    given = Classifier().train()
    small = rmtkd.narrow(given, whole, calibration=parts(points)["train"], sites=sites(given))  # type: ignore
    assert small is not given
    assert given.training
    assert not small.training


def test_a_listener_that_fails_at_the_end_does_not_cost_the_run(
    model: Classifier, points: tuple[Tensor, Tensor], tmp_path: Path
):
    def fail(event: Any) -> None:
        if event["event"] == "done":
            raise ValueError("a listener")

    run = tmp_path / "run"
    with pytest.raises(ValueError, match="a listener"):
        rmtkd.compress(model, **parts(points), sites=sites(model), out=run, on_event=fail, **OPTIONS)  # type: ignore
    assert rmtkd.resume(run, model, **parts(points), sites=sites(model)).record["finished"]  # type: ignore


def test_what_a_forward_asserts_of_a_width_is_a_refused_cut(model: Classifier, points: tuple[Tensor, Tensor]):
    class Asserting(Classifier):
        def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
            hidden = self.down(torch.relu(self.up(x * scale)))
            assert hidden.shape[-1] == 32
            return self.out(hidden)

    strict = Asserting()
    strict.load_state_dict(model.state_dict())
    with pytest.raises(SurgeryError):
        rmtkd.narrow(strict, _plan(model, points), calibration=parts(points)["train"], sites=sites(strict))  # type: ignore


def _plan(model: Classifier, points: tuple[Tensor, Tensor]) -> Any:
    rows = parts(points)
    calibration, options = rows["train"], {"target": "40%params", "multiple_of": 1}
    return rmtkd.plan(model, calibration=calibration, selection=rows["selection"], sites=sites(model), **options)[0]  # type: ignore


@pytest.mark.parametrize("role", ["calibration", "selection"])
def test_rows_that_are_used_up_after_once_are_refused_in_planning_too(
    model: Classifier, points: tuple[Tensor, Tensor], role: str
):
    rows: dict[str, Any] = {"calibration": parts(points)["train"], "selection": parts(points)["selection"]}
    with pytest.raises(DataError, match=f"{role} rows are gone through several times. Got list_iterator"):
        rmtkd.plan(model, **{**rows, role: iter(rows[role])}, sites=sites(model))


class Pooled(nn.Module):
    """A classifier of texts: a mean over tokens, and a feed-forward head behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.up, self.out = nn.Embedding(20, 12), nn.Linear(12, 32), nn.Linear(32, 2)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        weights = attention_mask[..., None].float()
        pooled = (self.embedding(input_ids) * weights).sum(1) / weights.sum(1)
        return self.out(torch.relu(self.up(pooled)))


def test_behind_pooling_no_position_is_masked():
    torch.manual_seed(0)
    model = Pooled().eval()
    ids = torch.randint(1, 20, (96, 10))
    mask = (torch.arange(10) < torch.randint(2, 11, (96, 1))).long()
    rows = [{"input_ids": a, "attention_mask": b} for a, b in zip(ids.split(16), mask.split(16), strict=True)]
    site = feed_forward_site(model, "head", writers=["up"], reader="out")
    made, spectrums = rmtkd.plan(
        model, calibration=rows[:4], selection=rows[4:], sites=[site], keep={"head": 16}, multiple_of=1
    )
    assert spectrums["head"][0].samples == 64
    assert rmtkd.narrow(model, made, calibration=rows[:4], sites=[site]).get_parameter("up.weight").shape == (16, 12)


class Gated(nn.Module):
    """Value and gate are halves of what one matrix puts out, which reads a width that is cut, too."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.both, self.out = nn.Linear(6, 12), nn.Linear(12, 32), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.both(self.inner(x)).chunk(2, -1)
        return self.out(value * torch.sigmoid(gate))


def test_a_gated_matrix_may_read_a_width_that_is_cut(points: tuple[Tensor, Tensor]):
    torch.manual_seed(0)
    model, rows = Gated().eval(), parts(points)["train"]
    both = (
        linear_site(model, "before", writer="inner", reader="both"),
        feed_forward_site(model, "gated", writers=["both"], reader="out", copies=2),
    )
    made, _ = rmtkd.plan(model, calibration=rows, sites=both, keep={"before": 6, "gated": 8}, multiple_of=1)
    assert rmtkd.narrow(model, made, calibration=rows, sites=both).get_parameter("both.weight").shape == (16, 6)


def test_a_model_that_was_trained_with_gradient_checkpointing_is_cut():
    model, rows = tiny_bert(), random_rows(64)
    model.enable_input_require_grads()  # as gradient checkpointing does
    whole = {site.name: site.width // 2 for site in rmtkd.find_sites(model) if site.name.startswith("embedding")}
    made, _ = rmtkd.plan(model, calibration=rows, keep=whole, multiple_of=2)
    assert made.widths["embeddings.word"] == whole["embeddings.word"]
    small = rmtkd.narrow(model, made, calibration=rows)
    assert count_parameters(small) < count_parameters(model)


def test_sites_that_leave_something_out_are_refused_before_anything_takes_time(
    model: Classifier, points: tuple[Tensor, Tensor]
):
    rows = [points]
    inner, bottleneck = sites(model)
    (stream,) = inner.streams
    little = replace(inner, streams=(replace(stream, readers=()),))
    refused: list[tuple[tuple[Any, ...], type[Exception], str]] = [
        ((), OptionError, "at least one.*Got none"),
        ((inner, bottleneck, inner), OptionError, "Got two of the name 'inner'"),
        ((little, bottleneck), UnsupportedModelError, "With inner=0 the model gave"),
    ]
    for given, kind, told in refused:
        with pytest.raises(kind, match=told):
            rmtkd.compress(model, train=rows, selection=rows, sites=given, **OPTIONS)
        with pytest.raises(kind, match=told):
            rmtkd.plan(model, calibration=rows, sites=given)


class Encoder(nn.Module):
    """Of padded sequences, by torch's own layers."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
        self.words, self.layers, self.head = nn.Embedding(50, 16), nn.TransformerEncoder(layer, 2), nn.Linear(16, 3)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden = self.layers(self.words(input_ids), src_key_padding_mask=attention_mask == 0)
        return self.head(hidden[:, 0])


def test_torchs_own_layers_are_cut_with_padded_rows():
    """Which it would pack as nested tensors, in evaluation mode."""
    torch.manual_seed(0)
    model, rows = Encoder().eval(), random_rows(96)
    rows.labels = None
    layers = [f"layers.layers.{i}" for i in range(2)]
    sites = [
        feed_forward_site(model, path, writers=[f"{path}.linear1"], reader=f"{path}.linear2", block=path)
        for path in layers
    ]
    before = snapshot(model)
    small = rmtkd.compress(
        model, train=rows, selection=rows, sites=sites, target="70%params", multiple_of=2, epochs=0.5
    ).model
    assert count_parameters(small) <= 0.7 * count_parameters(model)
    made, _ = rmtkd.plan(model, calibration=rows, sites=sites, target="70%params", multiple_of=2)
    narrow = rmtkd.narrow(model, made, calibration=rows, sites=sites)
    assert count_parameters(narrow) == count_parameters(small)
    assert_untouched(model, before)
    assert model.layers.use_nested_tensor
    assert all(verdict.ok for verdict in rmtkd.check(model, rows, sites))


def test_answers_that_depend_on_what_stands_at_padding_are_refused():
    """They would be others after loading: torch packs rows in evaluation mode, and leaves zeros there."""

    class Careless(Encoder):
        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            return self.head(self.layers(self.words(input_ids), src_key_padding_mask=attention_mask == 0).mean(1))

    torch.manual_seed(0)
    model, rows = Careless().eval(), random_rows(96)
    rows.labels = None
    with pytest.raises(UnsupportedModelError, match=r"must not depend on what stands at padding\. layers packs"):
        rmtkd.compress(model, train=rows, selection=rows, target="70%params")


def test_a_model_that_runs_at_some_widths_alone_is_cut_to_these(model: Classifier, points: tuple[Tensor, Tensor]):
    class Even(Classifier):
        def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
            return super().forward(x, scale) + 0 * self.up(x).view(len(x), -1, 8).sum((1, 2))[:, None]

    even, rows = Even(), [points]
    even.load_state_dict(model.state_dict())
    made, _ = rmtkd.plan(even, calibration=rows, sites=sites(even)[:1], multiple_of=8, target="70%params")
    assert made.widths["inner"] in range(8, 64, 8)


def test_a_model_that_does_not_run_whole_says_so_itself(model: Classifier, points: tuple[Tensor, Tensor]):
    with pytest.raises(RuntimeError, match="same reduction dim"):
        rmtkd.plan(model, calibration=[(points[0][:, :5], points[1])], sites=sites(model))


def test_a_teacher_model_whose_answers_depend_on_padding_is_refused_too():
    class Careless(Encoder):
        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            return self.head(self.layers(self.words(input_ids), src_key_padding_mask=attention_mask == 0).mean(1))

    torch.manual_seed(0)
    model, careless, rows = Encoder().eval(), Careless().eval(), random_rows(96)
    rows.labels = None
    with pytest.raises(UnsupportedModelError, match=r"must not depend on what stands at padding\. layers packs"):
        rmtkd.compress(model, train=rows, selection=rows, teacher_model=careless, target="70%params")


class SharedMean(Classifier):
    """Two parts that are centred by one buffer."""

    def __init__(self) -> None:
        super().__init__()
        mean = torch.zeros(6)
        self.one, self.other = nn.Module(), nn.Module()
        self.one.register_buffer("mean", mean)
        self.other.register_buffer("mean", mean)

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return super().forward(x - (self.one.mean + self.other.mean) / 2, scale)  # type: ignore[operator]


class Overlapping(Classifier):
    """A buffer that is a part of another."""

    def __init__(self) -> None:
        super().__init__()
        ones = torch.ones(12)
        self.register_buffer("all", ones)
        self.register_buffer("part", ones[:6])

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return super().forward(x * self.part + self.all[6:] - 1, scale)  # type: ignore[operator,index]


class Turning(Classifier):
    """Turns pairs of its inputs by a complex buffer, as some positions are encoded."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("turns", torch.polar(torch.ones(3), 0.3 * torch.arange(3.0)))

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        turned = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) * self.turns  # type: ignore[operator]
        return super().forward(torch.view_as_real(turned).flatten(-2).to(x.dtype), scale)


class Versioned(Classifier):
    """Keeps something beside its tensors."""

    def get_extra_state(self) -> dict[str, int]:
        return {"version": 3}

    def set_extra_state(self, state: Any) -> None:
        pass


@pytest.mark.parametrize("kind", [SharedMean, Overlapping, Turning, Versioned])
def test_a_module_with_unusual_buffers_or_a_state_of_its_own_is_compressed_and_loaded(
    kind: type[Classifier], model: Classifier, points: tuple[Tensor, Tensor], tmp_path: Path
):
    own = kind()
    own.load_state_dict(model.state_dict(), strict=False)
    if isinstance(own, SharedMean):
        own.one.mean.fill_(0.1)  # type: ignore[operator]
    small = rmtkd.compress(
        own,
        **parts(points),  # type: ignore[arg-type]
        sites=sites(own),
        out=tmp_path / "run",
        save_every_s=0.0,
        **{**OPTIONS, "epochs": 0.5},
    )
    loaded = rmtkd.load(tmp_path / "run" / "model", kind)
    with torch.no_grad():
        assert torch.equal(loaded(points[0][:50]), small.model(points[0][:50]))


class Filling(Classifier):
    """Writes into a tensor of 32 bits what a map gives: under autocast this is of another type."""

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        hidden = torch.zeros(len(x), self.down.out_features)
        hidden[x[:, 0] > -9] = self.down(torch.relu(self.up(x[x[:, 0] > -9])))
        return self.out(hidden)


def test_a_model_that_does_not_run_in_bf16_runs_in_32_bits_and_the_plan_says_so(
    model: Classifier, points: tuple[Tensor, Tensor], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(environment, "has_bf16", lambda device: True)
    filling = Filling()
    filling.load_state_dict(model.state_dict())
    given: dict[str, Any] = {
        **parts(points),
        **OPTIONS,
        "epochs": 0.5,
        "sites": sites(filling)[:1],
        "target": "60%params",
    }
    small = rmtkd.compress(filling, **given)
    assert small.record["precision"] == "fp32"
    assert any("does not run: all is in 32 bits" in remark for remark in small.plan.remarks)
    with pytest.raises(OptionError, match=r"must run under autocast for bf16\. Filling gave"):
        rmtkd.compress(filling, **given, precision="bf16")


def test_a_model_without_a_score_for_every_class_is_refused(points: tuple[Tensor, Tensor]):
    class Single(Classifier):
        def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
            return super().forward(x, scale)[:, 0]

    single = Single()
    with pytest.raises(UnsupportedModelError, match=r"a score for every class.*gave \[1\] for one row"):
        rmtkd.compress(single, **parts(points), sites=sites(single), **OPTIONS)  # type: ignore[arg-type]


@pytest.mark.parametrize("head", [nn.Linear(32, 4), nn.Sequential(nn.Linear(32, 8), nn.Tanh(), nn.Linear(8, 3))])
def test_a_stock_model_whose_head_its_configuration_does_not_say_is_refused_or_a_module_of_its_own(head: nn.Module):
    model, rows = tiny_bert(), random_rows(64)
    model.classifier, rows.labels = head, None  # type: ignore[assignment]
    given: dict[str, Any] = {"train": rows, "selection": rows, "target": "70%params", "multiple_of": 2, "epochs": 0.2}
    with pytest.raises(UnsupportedModelError, match=r"must say its shapes\. classifier.*sites=rmtkd.find_sites"):
        rmtkd.compress(model, **given)
    small = rmtkd.compress(model, **given, sites=rmtkd.find_sites(model))
    assert count_parameters(small.model) <= 0.7 * count_parameters(model)


@pytest.mark.parametrize("policy", ["guarded", "paper"])
def test_no_width_is_planned_below_the_least_of_its_site(model: Classifier, points: tuple[Tensor, Tensor], policy: Any):
    inner, bottleneck = sites(model)
    given = (replace(inner, least=20), replace(bottleneck, least=18))
    made, _ = rmtkd.plan(model, calibration=[points], sites=given, policy=policy, target="65%params", multiple_of=1)
    assert made.widths["inner"] >= 20 and made.widths["bottleneck"] >= 18
    with pytest.raises(PlanError, match="target must be at least"):
        rmtkd.plan(model, calibration=[points], sites=given, policy=policy, target="20%params", multiple_of=1)


def test_an_embedding_of_sparse_gradients_is_cut_and_recovered():
    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.out = nn.Embedding(50, 32, sparse=True), nn.Linear(32, 3)

        def forward(self, ids: Tensor) -> Tensor:
            return self.out(self.words(ids).mean(1))

    torch.manual_seed(0)
    model, rows = Words(), [(torch.randint(0, 50, (32, 9)),) for _ in range(8)]
    given = [embedding_site(model, "words")]
    small = rmtkd.compress(model, train=rows, selection=rows, sites=given, target="50%params", multiple_of=1).model
    assert count_parameters(small) <= 0.5 * count_parameters(model)
    assert model.words.sparse


def test_a_forward_that_gives_other_things_in_training_is_refused_before_anything_takes_time(
    model: Classifier, points: tuple[Tensor, Tensor]
):
    class Deep(Classifier):
        """With scores of a layer within, beside those of the last, in training."""

        def forward(self, x: Tensor, scale: float = 1.0) -> Any:
            scores = super().forward(x, scale)
            return (scores, scores) if self.training else scores

    deep = Deep()
    events: list[Any] = []
    deep.load_state_dict(model.state_dict())
    given: dict[str, Any] = {**parts(points), "sites": sites(model), "on_event": events.append, **OPTIONS}
    with pytest.raises(UnsupportedModelError, match=r"must return class scores.*Deep returned tuple"):
        rmtkd.compress(deep.eval(), **given)
    assert "plan" not in [event["event"] for event in events]
    given["epochs"] = 0.0
    assert rmtkd.compress(deep, **given).rounds[0].steps == 0
