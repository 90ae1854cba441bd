"""An exported network is the model that it was made of, for every batch and length, or there is none."""

import hashlib
import json
import sys
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rmtkd
from conftest import (
    FAMILY_NAMES,
    Sentiment,
    assert_untouched,
    make_tokenizer,
    pair_batches,
    random_rows,
    snapshot,
    tiny,
)
from rmtkd import cli
from rmtkd.batches import logits
from rmtkd.cutting import cut_in_order
from rmtkd.errors import DataError, ExportError, OptionError, UnsupportedModelError
from rmtkd.exports import FORMATS, comparison, formats, tracing
from rmtkd.sites import find_sites

SHAPES = ((1, 1), (1, 7), (2, 24), (13, 5))
INSTALLED = [name for name in FORMATS if not formats.absent(FORMATS[name])]
INT8 = [name for name in INSTALLED if FORMATS[name].quantize and not formats.absent(FORMATS[name], int8=True)]

EVERYWHERE = "onnx" if "onnx" in INSTALLED else "torch-export"
COMBINATIONS = [*((name, EVERYWHERE) for name in FAMILY_NAMES), *(("bert", to) for to in INSTALLED if to != EVERYWHERE)]
"""Every family in one format, and one family in every format: each takes seconds."""


def narrowed(name: str) -> nn.Module:
    """A model of a family with every width cut to half."""
    model = tiny(name)
    sites = find_sites(model)
    return cut_in_order(model, sites, {site.name: site.width // 2 for site in sites}, pair_batches(model))[0]


def make_batch(names: list[str], rows: int, length: int) -> dict[str, Tensor]:
    """Random tokens, the last of some rows padding; the second half is of the second type."""
    generator = torch.Generator().manual_seed(rows * 100 + length)
    batch = {
        "input_ids": torch.randint(4, 50, (rows, length), generator=generator),
        "attention_mask": torch.ones(rows, length, dtype=torch.int64),
        "token_type_ids": (torch.arange(length) >= length // 2).long().expand(rows, length).contiguous(),
    }
    batch["attention_mask"][::2, max(1, length - 2) :] = 0
    return {name: batch[name] for name in names}


def open_export(folder: Path, record: dict[str, Any]) -> nn.Module:
    return formats.start(FORMATS[record["to"]], folder / record["file"])


def quick(model: nn.Module, folder: Path, **options: Any) -> dict[str, Any]:
    return rmtkd.export(model, folder, **{"rows": pair_batches(model), "repeats": 1, **options})


def content(path: Path) -> bytes:
    """The bytes of a file, and of all files in it where it is an archive."""
    if not zipfile.is_zipfile(path):
        return path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        return b"".join(archive.read(name) for name in archive.namelist())


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Change how a format that needs nothing works."""

    def change(**fields: Any) -> None:
        monkeypatch.setitem(FORMATS, "torch-export", replace(FORMATS["torch-export"], **fields))

    return change


# What is exported


@pytest.mark.parametrize(("name", "to"), COMBINATIONS)
def test_a_narrowed_model_is_the_same_exported_at_every_batch_and_length(name: str, to: str, tmp_path: Path) -> None:
    model = narrowed(name)
    before = snapshot(model)
    record = quick(model, tmp_path / "out", to=to)
    exported = open_export(tmp_path / "out", record)
    assert ("token_type_ids" in record["inputs"]) == (getattr(model.config, "type_vocab_size", 0) > 1)
    for shape in SHAPES:
        batch = make_batch(record["inputs"], *shape)
        with torch.no_grad():
            expected, got = logits(model.eval(), batch), exported(**batch)
        assert got.shape == expected.shape
        assert float((got - expected).abs().max() / expected.abs().max()) < 1e-5, shape
    assert_untouched(model, before)
    for path in (tmp_path / "out").iterdir():  # exporters like to note where the code of each operation is
        for folder in ("site-packages", str(Path(rmtkd.__file__).parent), str(tmp_path)):
            assert folder.encode() not in content(path), path.name


def test_what_is_recorded_is_what_was_made(tmp_path: Path) -> None:
    model = tiny("bert").train()
    out = tmp_path / "new" / "out"
    rows = random_rows(40, labels=3)
    record = rmtkd.export(model, out, to="torch-export", rows=rows, tokenizer=make_tokenizer(), repeats=3)
    assert model.training
    assert json.loads((out / "export.json").read_text()) == record
    assert set(record["files"]) == {path.name for path in out.iterdir()} - {"export.json"}
    assert {"model.pt2", "tokenizer.json", "tokenizer_config.json"} == set(record["files"])
    for name, facts in record["files"].items():
        written = (out / name).read_bytes()
        assert facts == {"bytes": len(written), "sha256": hashlib.sha256(written).hexdigest()}
    (check,) = record["checks"].values()
    assert check["difference"] < 1e-6 and check["agreement"] == 1 and check["flipped"] == 0
    shapes = [tuple(shape) for shape in check["shapes"]]
    assert len(shapes) >= 3 and any(rows == 1 for rows, _ in shapes)
    assert any(rows % 2 and rows > 1 and length % 2 for rows, length in shapes)
    torch_line, line = record["measured"]
    assert (torch_line["engine"], line["engine"]) == ("PyTorch", "torch.export")
    assert line["bytes"] == record["files"]["model.pt2"]["bytes"]
    for at, batch in zip(line["latency_ms"], (1, 32), strict=True):
        assert (at["batch"], at["threads"], at["repeats"]) == (batch, torch.get_num_threads(), 3)
        assert at["median"] > 0
    assert record["labels"] == ["LABEL_0", "LABEL_1", "LABEL_2"] and record["checked_on"] == "rows"


def test_the_tokenizer_beside_it_makes_just_what_it_takes(tmp_path: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    tokenizer = make_tokenizer()
    before = list(tokenizer.model_input_names)
    for name in ("bert", "roberta"):
        record = quick(tiny(name), tmp_path / name, to="torch-export", tokenizer=tokenizer)
        made = PreTrainedTokenizerFast.from_pretrained(tmp_path / name)(["good film", "a"], padding=True)
        assert set(made) == set(record["inputs"])
    assert tokenizer.model_input_names == before


def test_rows_without_mask_or_types_are_completed_as_the_model_would() -> None:
    ids = torch.arange(4, 12).reshape(2, 4)
    names = tracing.input_names(model := tiny("bert"))
    batch = tracing.complete({"input_ids": ids, "labels": torch.tensor([0, 1])}, names)
    assert list(batch) == [*names, "labels"]
    with torch.no_grad():
        assert torch.equal(logits(model, batch), logits(model, {"input_ids": ids}))


# What is refused


@pytest.mark.parametrize("to", ["onnx", "openvino", "executorch"])
def test_a_missing_package_is_named_with_the_extra_that_brings_it(
    to: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ExportError, match=rf"Not installed: {FORMATS[to].packages[0]}.*pip install 'rmtkd\[{to}\]'"):
        rmtkd.export(tiny("bert"), tmp_path / "out", to=to)
    assert list(tmp_path.iterdir()) == []


def test_the_extras_that_are_named_are_there() -> None:
    import tomllib

    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    for form in FORMATS.values():
        wanted = formats.needed(form, int8=True)
        offered = " ".join(project["optional-dependencies"].get(form.extra, []))
        assert all(package in offered for package in wanted)


def test_unknown_formats_and_8_bits_where_there_are_none_are_refused(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="Did you mean 'onnx'"):
        quick(tiny("bert"), tmp_path / "out", to="onxx")
    with pytest.raises(OptionError, match="--int8 must go with a format that has it: onnx, openvino"):
        quick(tiny("bert"), tmp_path / "out", to="torch-export", int8=True)


@pytest.mark.parametrize("made", ["folder", "link"])
def test_a_folder_that_is_there_is_refused_and_left_alone(made: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir() if made == "folder" else out.symlink_to(tmp_path / "nowhere")
    with pytest.raises(ExportError, match="must be new"):
        quick(tiny("bert"), out, to="torch-export")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_models_that_nobody_knows_and_other_precisions_are_refused_by_name(tmp_path: Path) -> None:
    rows = random_rows()
    with pytest.raises(UnsupportedModelError, match="Linear"):
        rmtkd.export(nn.Linear(2, 2), tmp_path / "out", to="torch-export", rows=rows)
    with pytest.raises(UnsupportedModelError, match="float64 on cpu"):
        rmtkd.export(tiny("bert").double(), tmp_path / "out", to="torch-export", rows=rows)


def test_rows_that_it_does_not_take_are_refused(tmp_path: Path) -> None:
    ids = torch.ones(2, 3, dtype=torch.int64)
    for rows, told in (
        ([(ids, torch.zeros(2))], "a tuple without input_ids"),
        ([{"input_ids": ids, "pixels": ids}], "pixels"),
        ([], "at least one batch"),
    ):
        with pytest.raises(DataError, match=told):
            rmtkd.export(tiny("bert"), tmp_path / "out", to="torch-export", rows=rows)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (lambda scores: scores + 0.01 * scores.abs().max(), "Scores differ by 1.0e-02"),
        (lambda scores: scores * float("nan"), "must give numbers"),
        (lambda scores: scores[:, None].squeeze(5), "must run on every batch. It fails on"),
    ],
)
def test_another_network_than_the_model_leaves_nothing_behind(
    spoil: Callable[[Tensor], Tensor], told: str, broken: Callable[..., None], tmp_path: Path
) -> None:
    start = FORMATS["torch-export"].start

    def start_spoilt(path: Path, threads: int) -> formats.Call:
        call = start(path, threads)
        return lambda inputs: spoil(call(inputs))

    broken(start=start_spoilt)
    with pytest.raises(ExportError, match=told):
        quick(tiny("bert"), tmp_path / "out", to="torch-export")
    assert list(tmp_path.iterdir()) == []


def test_an_exporter_that_stops_is_told_in_one_line(broken: Callable[..., None], tmp_path: Path) -> None:
    def write(program: Any, path: Path) -> None:
        path.write_text("half")
        raise NotImplementedError("no rule for aten.erfinv.\nmany\nlines")

    broken(write=write)
    message = (
        r"BertForSequenceClassification must be understood by torch.export. It stops with: no rule for aten.erfinv\."
    )
    with pytest.raises(ExportError, match=message):
        quick(tiny("bert"), tmp_path / "out", to="torch-export")
    assert list(tmp_path.iterdir()) == []


def test_answers_may_differ_only_where_the_two_best_are_as_good_as_equal() -> None:
    class Fixed(nn.Module):
        def __init__(self, scores: Tensor):
            super().__init__()
            self.scores = nn.Parameter(scores)

        def forward(self, input_ids: Tensor) -> Tensor:
            return self.scores

    rows = [{"input_ids": torch.ones(2, 3, dtype=torch.int64)}]
    model = Fixed(torch.tensor([[1.0, 1.00001], [0.5, -0.5]]))
    near = comparison.compare(model, Fixed(torch.tensor([[1.00001, 1.0], [0.5, -0.5]])), rows)
    assert (near.agreement, near.flipped) == (0.5, 0) and comparison.hold_to(near, int8=False)
    far = comparison.compare(model, Fixed(torch.tensor([[1.0, 1.00001], [-0.5, 0.5]])), rows)
    assert (far.agreement, far.flipped) == (0.5, 1)
    for int8 in (False, True):
        with pytest.raises(ExportError):
            comparison.hold_to(far, int8=int8)


def test_a_difference_that_is_no_number_is_none_that_passes() -> None:
    found = comparison.Agreement(rows=2, shapes=((2, 3),), difference=float("nan"), agreement=1.0, flipped=0)
    with pytest.raises(ExportError, match="Scores differ by nan"):
        comparison.hold_to(found, int8=False)


# 8 bits


@pytest.mark.parametrize("to", INT8)
def test_8_bits_make_the_file_smaller_and_are_measured(to: str, sentiment: Sentiment, tmp_path: Path) -> None:
    from rmtkd import recipes

    task = recipes.get("sst2")
    source = task.load(str(sentiment.teacher))
    rows = task.rows(sentiment.data, source, 0).report
    record = rmtkd.export(source.model, tmp_path / "out", to=to, rows=rows, int8=True, repeats=1)
    assert json.loads((tmp_path / "out" / "export.json").read_text()) == record
    torch_line, full, small = record["measured"]
    assert small["engine"] == full["engine"] + ", int8"
    networks = [path for path in (tmp_path / "out").iterdir() if path.name != "export.json"]
    assert small["bytes"] == sum(path.stat().st_size for path in networks)
    assert torch_line["accuracy"] == full["accuracy"] and torch_line["accuracy"]["n"] == 90
    assert small["accuracy"]["value"] > 0.8
    check = record["checks"][small["engine"]]
    assert 1e-4 < check["difference"] < 0.5 and check["agreement"] > 0.9
    exported = open_export(tmp_path / "out", record)
    batch = make_batch(record["inputs"], 3, 7)
    with torch.no_grad():
        expected = source.model(**batch).logits
    assert 0 < float((exported(**batch) - expected).abs().max() / expected.abs().max()) < 0.5


@pytest.mark.parametrize("to", INT8)
def test_8_bits_of_a_larger_model_are_a_fraction(to: str, tmp_path: Path) -> None:
    model = tiny("bert", hidden_size=128, intermediate_size=512, vocab_size=2000)
    record = rmtkd.export(model, tmp_path / "out", to=to, int8=True, repeats=1)
    _, full, small = record["measured"]
    assert small["bytes"] < 0.45 * full["bytes"]
    assert record["checked_on"] == "random tokens" and small["accuracy"] is None


# The command line


def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["rmtkd", "export", *map(str, words)])
    capsys.readouterr()
    with pytest.raises(SystemExit) as left:
        cli.main()
    captured = capsys.readouterr()
    return int(left.value.code or 0), captured.out, captured.err


def test_the_command_writes_checks_and_tells(
    sentiment: Sentiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = (sentiment.teacher, "--to", "torch-export", "--recipe", "sst2", "--data", sentiment.data)
    code, out, err = run(monkeypatch, capsys, *words, "--out", tmp_path / "a")
    assert (code, err) == (0, "")
    assert "torch.export" in out and "100.00% of" in out and "any batch, length up to 40" in out
    assert {"model.pt2", "tokenizer.json"} <= {path.name for path in (tmp_path / "a").iterdir()}
    code, out, err = run(monkeypatch, capsys, *words, "--out", tmp_path / "a")
    assert code == 2 and "must be new" in err
    words = (sentiment.teacher, "--to", "torch-export", "--out", tmp_path / "b", "--json")
    code, out, err = run(monkeypatch, capsys, *words)
    assert code == 0 and "checked on random tokens" in err
    assert json.loads(out) == json.loads((tmp_path / "b" / "export.json").read_text())
