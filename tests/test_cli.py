"""The command line does what it promises, and says what is wrong in one message without a trace behind."""

import copy
import html
import json
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from pyarrow import csv

import rmtkd
from conftest import Sentiment, contents, make_tokenizer, tiny_bert, write_sentiment_rows
from rmtkd import artifact, cli, recipes
from rmtkd.checkpoint import RunFolder
from rmtkd.errors import DataError
from rmtkd.planning import LatencyTable, Plan
from rmtkd.recipes.checkpoints import check_same_inputs, load_classifier
from rmtkd.sites import find_sites

Result = tuple[int, str, str]
Command = Callable[..., Result]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Run `rmtkd` with these words; gives exit code, standard output and standard error."""

    def run(*words: object) -> Result:
        monkeypatch.setattr(sys, "argv", ["rmtkd", *map(str, words)])
        monkeypatch.setenv("COLUMNS", "200")
        monkeypatch.setenv("TERM", "dumb")
        capsys.readouterr()
        with pytest.raises(SystemExit) as left:
            cli.main()
        captured = capsys.readouterr()
        return int(left.value.code or 0), captured.out, captured.err

    return run


QUICK = ("--target", "70%params", "--multiple-of", 4, "--calibration-share", 0.3)
"""Options with which the little task is planned."""
PAPER = ("--policy", "paper")


def test_from_training_to_evaluation(sentiment: Sentiment, command: Command, tmp_path: Path):
    """The promised commands, one after the other."""
    data, teacher, out = sentiment.data, tmp_path / "teacher", tmp_path / "run"
    train = ("train", "sst2", "--model", sentiment.start, "--data", data, "--out", teacher)
    code, told, log = command(*train, "--epochs", 6, "--lr", 3e-3, "--precision", "fp32", "--seed", 0)
    assert code == 0 and "(n = 90) on report rows" in told and "step 144/144" in log

    common = ("sst2", "--model", teacher, "--data", data, "--out", out, *QUICK, "--precision", "fp32")
    code, told, _ = command("plan", *common, "--json")
    assert code == 0
    assert {path.name for path in out.iterdir()} == {"plan.json", "spectra.npz"}
    assert told == (out / "plan.json").read_text()
    planned = json.loads(told)
    code, told, _ = command("plan", *common)
    assert code == 0 and "layer.0.ffn" in told

    compress = ("compress", *common, "--epochs", 0.5, "--lr", 1e-3, "--device", "cpu")
    code, told, log = command(*compress, "--json")
    assert code == 0
    record = json.loads(told)
    assert record == json.loads((out / "summary.json").read_text())
    words = [str(word) for word in ("rmtkd", *compress, "--json")]
    assert json.loads((out / "config.json").read_text())["command"]["words"] == words
    assert html.escape(shlex.join(words), quote=False) in (out / "report.html").read_text()
    assert record["compressed"]["parameters"] == planned["predicted"]["params"]
    assert "stopped: target" in log

    code, told, _ = command("report", out, "--out", out / "other.html")
    assert code == 0 and told.strip() == str(out / "other.html")
    assert (out / "other.html").read_text() == (out / "report.html").read_text()
    code, _, log = command("report", out / "model")
    assert code == 2 and f"rmtkd report {out}" in log

    rows = write_sentiment_rows(tmp_path / "rows.parquet", 40, seed=5)
    code, told, _ = command("evaluate", out / "model", "--recipe", "sst2", "--file", rows, "--json")
    assert code == 0
    accuracy = json.loads(told)
    assert set(accuracy) == {"accuracy", "f1"}
    assert all(set(estimate) == {"value", "n", "stderr"} for estimate in accuracy.values())
    assert accuracy["accuracy"]["n"] == 40
    assert accuracy["accuracy"]["value"] == pytest.approx(expected_accuracy(out / "model", rows))

    code, told, _ = command("evaluate", out / "model", "--recipe", "sst2", "--data", data, "--json")
    assert json.loads(told)["accuracy"] == record["compressed"]["accuracy"]
    code, told, _ = command("evaluate", out / "model", "--recipe", "sst2", "--data", data)
    assert code == 0 and "(n = 90)" in told

    code, _, _ = command(*(out.with_name("again") if word == out else word for word in compress))
    assert code == 0
    first, again = contents(out / "model"), contents(tmp_path / "again" / "model")
    assert first["model.safetensors"] == again["model.safetensors"]


def test_texts_of_the_user_s_own_from_training_to_evaluation(command: Command, sentiment: Sentiment, tmp_path: Path):
    """A CSV file and nothing else: the same rows have the same roles in every command."""
    table = pq.read_table(write_sentiment_rows(tmp_path / "rows.parquet", 500, seed=3))
    names = pa.array([("bad", "good")[label] for label in table["label"].to_pylist()])
    csv.write_csv(pa.table({"review": table["text"], "verdict": names}), tmp_path / "rows.csv")
    words = ("--data", tmp_path / "rows.csv", "--columns", "review", "--label", "verdict")
    teacher, out = tmp_path / "teacher", tmp_path / "run"
    train = ("train", "text", "--model", sentiment.start, "--out", teacher, *words)
    code, told, log = command(*train, "--epochs", 8, "--lr", 3e-3, "--precision", "fp32")
    assert code == 0 and "F1" in told and "report rows of one file, divided by a hash" in log
    common = ("text", "--model", teacher, "--out", out, *words, *QUICK)
    assert command("plan", *common)[0] == 0
    code, _, log = command("compress", *common, "--epochs", 0.5, "--lr", 1e-3, "--precision", "fp32")
    assert code == 0 and "report rows of one file, divided by a hash" in log
    record = json.loads((out / "summary.json").read_text())
    config: Any = rmtkd.load(out / "model").config
    assert config.id2label == {0: "bad", 1: "good"}
    code, told, _ = command("evaluate", out / "model", "--recipe", "text", *words, "--json")
    assert code == 0 and json.loads(told)["accuracy"] == record["compressed"]["accuracy"]
    evaluate = ("evaluate", out / "model", "--recipe", "text", "--file", tmp_path / "rows.csv", *words[2:])
    code, told, _ = command(*evaluate)
    assert code == 0 and "accuracy" in told and "F1" in told and "(n = 500)" in told
    code, _, log = command(*evaluate[:-2])
    assert code == 2 and "Got no --label" in log


def expected_accuracy(model: Path, rows: Path) -> float:
    """The share of rows that the model has right, asked one by one."""
    loaded, tokenizer, table = rmtkd.load(model), make_tokenizer(), pq.read_table(rows).to_pylist()
    hits = 0
    for row in table:
        with torch.no_grad():
            hits += int(loaded(**tokenizer(row["text"], return_tensors="pt")).logits.argmax()) == row["label"]
    return hits / len(table)


def test_a_plan_is_made_anew_edited_and_applied(sentiment: Sentiment, command: Command, tmp_path: Path):
    """The plan is the user's."""
    run, common = tmp_path / "run", ("--model", sentiment.teacher, "--data", sentiment.data)
    code, *_ = command("plan", "sst2", *common, "--out", run, *QUICK, "--exclude", "embeddings.word")
    assert code == 0

    code, told, _ = command("plan", run, "--target", "40%params", "--keep", "layer.0.ffn=20", "--json")
    made = json.loads(told)
    kept = {site["name"]: site["keep"] for site in made["sites"]}
    assert code == 0 and made["target"] == "40%params" and made["multiple_of"] == 4
    assert made["fixed"] == {"embeddings.word": 32, "layer.0.ffn": 20}
    assert kept["layer.0.ffn"] == 20 and kept["embeddings.word"] == 32
    assert made["predicted"]["params"] <= 0.4 * made["baseline"]["params"]
    assert sorted(path.name for path in run.iterdir()) == ["plan.1.json", "plan.json", "spectra.1.npz", "spectra.npz"]

    # narrow at this target whatever the teacher: wider, the target cannot be met
    site = next(site for site in made["sites"] if site["name"] == "layer.1.ffn")
    site["keep"], planned = 47, site["keep"]
    (run / "plan.json").write_text(json.dumps(made, indent=1))
    compress = ("compress", "sst2", *common, "--out", run, "--plan", run / "plan.json", "--epochs", 0)
    code, _, log = command(*compress, "--tau", 0.4)
    assert code == 2 and "the plan decides. Got --tau too" in log
    code, told, log = command(*compress)
    assert code == 0
    assert "47*" in told and f"changed by hand: layer.1.ffn {planned} → 47." in told
    assert "the target 40%params is not met" in told.replace("The", "the") and "reached" not in told + log

    record = json.loads((run / "summary.json").read_text())
    applied = json.loads((run / "plan.json").read_text())
    assert record["stop_reason"] == "plan: every cut is made; its widths do not meet the target 40%params"
    assert record["compressed"]["parameters"] == applied["predicted"]["params"] > made["predicted"]["params"]
    assert record["rounds"][0]["widths"]["layer.1.ffn"] == [48, 47]
    assert record["config"]["target"] == "40%params" and record["config"]["multiple_of"] == 4
    assert f"changed by hand: {planned} → 47" in (run / "model" / "README.md").read_text()

    code, _, log = command("plan", run, "--target", "50%params")
    assert code == 2 and "--out must be given" in log and "Pass --out" in log
    code, told, _ = command("plan", run, "--target", "85%params", "--out", tmp_path / "next", "--json")
    assert code == 0 and json.loads(told)["fixed"]["layer.1.ffn"] == 47
    words = ("--model", sentiment.teacher, "--seed", 3, "--device", "cuda", "--out", tmp_path / "other")
    code, _, log = command("plan", run, *words)
    assert code == 2 and "needs neither model nor data. Got --model, --seed, --device" in log
    assert not (tmp_path / "other").exists()


def test_a_plan_is_applied_whatever_the_recipe_would_choose(command: Command, tmp_path: Path):
    """Multiples of 8, where this recipe's are of 4. The teacher, from a random start, is refused only afterwards."""
    model: Any = recipes.get("digits_cnn").start(None, 0, None).model
    model.save_pretrained(tmp_path / "model")
    made, _ = rmtkd.plan(model, calibration=[{"pixel_values": torch.randn(64, 1, 8, 8)}], policy="paper")
    made.save(tmp_path / "plan.json")
    words = ("--model", tmp_path / "model", "--plan", tmp_path / "plan.json", "--out", tmp_path / "run")
    code, _, log = command("compress", "digits_cnn", *words)
    assert code != 0 and "must do better than chance" in log


def test_a_uniform_plan_stays_uniform_when_made_anew_and_applied(
    sentiment: Sentiment, command: Command, tmp_path: Path
):
    run, common = tmp_path / "run", ("--model", sentiment.teacher, "--data", sentiment.data)
    code, told, _ = command("plan", "sst2", *common, "--out", run, "--multiple-of", 4, "--uniform", *PAPER)
    assert code == 0 and "With --uniform, which narrows intermediate_size alone, a plan goes down to" in told
    code, told, _ = command("plan", run, "--target", "85%params", "--json")
    made = json.loads(told)
    kept = {site["name"]: site["keep"] for site in made["sites"]}
    assert code == 0 and made["uniform"] and kept["layer.0.ffn"] == kept["layer.1.ffn"] < 48
    code, _, log = command("plan", run, "--target", "1%params")
    assert code == 2 and "leave --uniform out" in log
    compress = ("compress", "sst2", *common, "--out", run, "--epochs", 0)
    code, _, log = command(*compress, "--plan", run / "plan.json", "--uniform")
    assert code == 2 and "Got --uniform too" in log
    assert command(*compress, "--plan", run / "plan.json")[0] == 0
    record = json.loads((run / "summary.json").read_text())
    assert record["config"]["uniform"] and record["compressed"]["parameters"] == made["predicted"]["params"]
    other = tmp_path / "other"
    words = ("--multiple-of", 4, "--uniform", "--target", "85%params", *PAPER)
    code, *_ = command("compress", "sst2", *common, "--out", other, "--epochs", 0, *words)
    assert code == 0 and contents(other)["plan.json"] == contents(run)["plan.json"]


def test_a_target_of_latency_rests_on_times_that_are_measured_once(
    sentiment: Sentiment, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("RMTKD_CACHE", str(tmp_path / "cache"))
    task = recipes.get("sst2")
    source = task.load(str(sentiment.teacher))
    example = task.example(source.model, task.rows(sentiment.data, source, 0))
    # Times as if they had been measured before: of no clock, but the number of parameters of what is called.
    table = LatencyTable.cached(
        source.model, find_sites(source.model), example, stopwatch=lambda calls, _: [parameters_of(c) for c in calls]
    )
    run, common = tmp_path / "run", ("--model", sentiment.teacher, "--data", sentiment.data)
    code, told, log = command("plan", "sst2", *common, "--out", run, *QUICK[2:], "--target", "1.4x")
    assert code == 0 and "are timed on this machine, if they were not before" in log
    assert "Latency is predicted" in told and "predicted from measured shapes" in told
    made = Plan.read(run / "plan.json")
    assert made.latency == table and made.predicted["latency_ms"] == table.cost(made.widths)

    for path in (tmp_path / "cache").iterdir():
        path.unlink()  # from here on the plan's own times count
    code, told, _ = command("plan", run, "--target", "60%latency", "--json")
    again = Plan.from_json(told)
    assert code == 0 and again.latency == table and again.predicted["latency_ms"] <= 0.6 * table.full_ms
    code, _, log = command("compress", "sst2", *common, "--out", run, "--plan", run / "plan.json", "--epochs", 0)
    assert code == 0 and "stopped: target: 60%latency reached, as predicted from measured shapes" in log
    assert Plan.read(run / "plan.json").latency == table
    assert not list((tmp_path / "cache").iterdir())

    other = tmp_path / "other"
    assert command("plan", "sst2", *common, "--out", other, *QUICK)[0] == 0
    code, _, log = command("plan", other, "--target", "2x")
    assert code == 2 and "must rest on measured times" in log and "rmtkd plan RECIPE --model MODEL" in log


def test_the_policy_the_largest_loss_and_the_metric_are_the_user_s(
    sentiment: Sentiment, command: Command, tmp_path: Path
):
    run, common = tmp_path / "run", ("--model", sentiment.teacher, "--data", sentiment.data)
    words = (*QUICK[2:], "--max-loss", 0.02, "--metric", "output")
    code, told, _ = command("plan", "sst2", *common, "--out", run, *words)
    made = Plan.read(run / "plan.json")
    assert code == 0 and "guarded, measured loss" in told and "signal" in told
    assert made.policy == "guarded" and made.target is None and made.max_loss == 0.02
    code, told, _ = command("plan", run, "--target", "60%params", "--json")
    assert code == 0 and Plan.from_json(told).target == "60%params" and Plan.from_json(told).policy == "guarded"
    code, told, _ = command("plan", run, "--max-loss", 0.5, "--json")
    looser = Plan.from_json(told)
    assert code == 0 and looser.target is None and looser.predicted["params"] <= made.predicted["params"]
    code, _, log = command("compress", "sst2", *common, "--out", run, "--plan", run / "plan.json", *PAPER)
    assert code == 2 and "Got --policy too" in log
    more = ("--epochs", 0, "--gentle", 0.1, "--no-blend", "--json")
    code, told, _ = command("compress", "sst2", *common, "--out", run, *words, *more)
    config = json.loads(told)["config"]
    assert code == 0 and (config["metric"], config["gentle"], config["blend"]) == ("output", 0.1, False)
    code, told, _ = command("plan", run, *PAPER, "--rule", "energy", "--out", tmp_path / "paper", "--json")
    assert code == 0 and Plan.from_json(told).policy == "paper"
    code, _, log = command("plan", tmp_path / "paper", "--tau", 0.4)
    assert code == 2 and "Got the rule energy. Leave --tau out" in log
    code, _, log = command("plan", tmp_path / "paper", "--max-loss", 0.1)
    assert code == 2 and "This plan has none" in log
    code, _, log = command("plan", run, "--metric", "output", "--out", tmp_path / "other")
    assert code == 2 and "Got --metric" in log


def parameters_of(call: Any) -> float:
    module = call.func if isinstance(call.func, torch.nn.Module) else call.args[0]
    return float(sum(parameter.numel() for parameter in module.parameters()))


def test_a_broken_plan_is_refused_line_by_line_and_leaves_nothing_behind(
    sentiment: Sentiment, command: Command, tmp_path: Path
):
    common = ("--model", sentiment.teacher, "--data", sentiment.data)
    command("plan", "sst2", *common, "--out", tmp_path / "planned", *QUICK)
    path = tmp_path / "planned" / "plan.json"
    text = path.read_text().replace('"layer.0.ffn"', '"layer.0.fnn"', 1).replace('"tau": 0.5', '"tau": "half"')
    path.write_text(text)
    site, tau = (text[: text.index(word)].count("\n") + 1 for word in ('"layer.0.fnn"', '"half"'))
    before = contents(tmp_path)
    code, told, log = command("compress", "sst2", *common, "--out", tmp_path / "run", "--plan", path)
    assert code == 2 and told == "" and "PlanError" in log
    assert f"{path}:{site}: layer.0.fnn: the model has no such site. Did you mean layer.0.ffn?" in log
    assert f"{path}:{tau}: tau must be a finite number. Got 'half'." in log
    assert contents(tmp_path) == before
    code, _, log = command("plan", tmp_path / "planned", "--target", "50%params")
    assert code == 2 and f"{path}:{tau}: tau must be" in log
    assert contents(tmp_path) == before


def test_digits_train_their_own_teacher_once(command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from rmtkd import teaching

    calls = []

    def train_teacher(*_: object, out: Path, **__: object) -> dict[str, Any]:
        calls.append(out)
        tiny_bert(labels=10, vocab_size=258, max_position_embeddings=17).save_pretrained(out)
        return {}

    monkeypatch.setattr(teaching, "train_teacher", train_teacher)
    for told in ("training a teacher into", "using the teacher in"):
        code, _, log = command("compress", "digits", "--out", tmp_path / "run", "--epochs", 0)
        assert code == 2 and "better than chance" in log  # this teacher has learned nothing
        assert told in log
    assert calls == [tmp_path / "run-teacher"]
    assert [path.name for path in tmp_path.iterdir()] == ["run-teacher"]


COMMANDS = [
    "bench",
    "check",
    "compress",
    "env",
    "evaluate",
    "export",
    "inspect",
    "ls",
    "plan",
    "resume",
    "seal",
    "train",
]


@pytest.mark.parametrize("name", COMMANDS)
def test_help_shows_an_example_with_its_output_and_every_option_is_explained(command: Command, name: str):
    code, told, _ = command(name, "--help")
    assert code == 0
    if name == "bench":  # where help is about the benchmarks
        told = cli.benchmarks.bench.__doc__ or ""
    lines = [line.strip() for line in told.splitlines()]
    below = [lines[i + 1] for i, line in enumerate(lines) if line.startswith(f"$ rmtkd {name}")]
    assert any(line and not line.startswith("$") for line in below)
    assert all(len(line) <= 78 for line in lines if line.startswith("$ "))  # as wide as a terminal of 80 columns shows
    for option in re.findall(r"(--[a-z-]+)\s+<", told):
        (line,) = (line for line in told.splitlines() if re.search(rf"{option}\s+<", line))
        assert len(line.partition(option)[2].split()) > 3, line


def test_the_examples_of_the_help_are_commands_that_parse(command: Command):
    for name in ("train", "plan", "compress", "evaluate"):
        _, told, _ = command(name, "--help")
        for line in re.findall(rf"^\s*\$ rmtkd ({name} .*)$", told, re.MULTILINE):
            words = line.partition("(")[0].split()
            code, _, log = command(*words, "--device", "nowhere")
            assert code == 2 and "No such option" not in log and "Missing" not in log, line


def test_ls_tells_every_recipe(command: Command):
    code, told, _ = command("ls")
    heads = [line for line in told.splitlines() if not line.startswith(" ")]
    assert code == 0 and [line.split()[0] for line in heads] == list(recipes.names())
    assert all("reported on" in line for line in heads)


def test_ls_tells_what_every_recipe_runs_with_in_words_that_compress_knows(command: Command):
    _, told, _ = command("ls")
    lines = [line.strip() for line in told.splitlines() if line.strip().startswith("by default: ")]
    assert len(lines) == len(recipes.names()) and lines[0] == "by default: --target 25%params --epochs 5 --lr 0.001"
    for line in lines:
        code, _, log = command("compress", "digits", "--out", "x", "--device", "nowhere", *line.split()[2:])
        assert code == 2 and "device must be" in log, line


def test_ls_tells_the_result_of_every_recipe_or_that_there_is_none(command: Command):
    _, told, _ = command("ls")
    for name in recipes.names():
        below = told.split(f"\n{name} ", 1)[-1] if not told.startswith(f"{name} ") else told
        result = re.split(r"\n(?=\S)", below, maxsplit=1)[0].splitlines()[2:]
        measured = recipes.get(name).measured
        expected = [f"measured: {measured.line()}", f"by: {measured.command}"] if measured else ["not measured"]
        assert [line.strip() for line in result] == expected


def test_env_tells_versions_and_machine(command: Command):
    code, told, _ = command("env")
    assert code == 0 and f"- torch: {torch.__version__}" in told and "- processor: " in told
    assert told.startswith("### Environment\n\n- ") and "| extra | |" in told


# What is refused


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["compres", "sst2"], "Did you mean 'compress'"),
        (["compress", "sst2", "--taget", "5M"], "--target"),
        (["evaluate", "m", "--recipes", "sst2"], "--recipe"),
        (["compress", "digitz", "--out", "OUT"], "Did you mean 'digits'"),
        (["plan", "sst2", "--out", "OUT", "--rule", "mpp"], "Did you mean 'mp'"),
        (["plan", "sst2", "--out", "OUT", "--max-loss", "0"], "max_loss must be greater than 0. Got 0.0"),
        (
            ["plan", "sst2", "--out", "OUT", "--max-loss", "1", "--target", "5M"],
            "--max-loss must come without --target",
        ),
        (["compress", "digits", "--out", "OUT", "--max-loss", "1", "--policy", "paper"], "with guarded widths"),
        (
            ["plan", "sst2", "--out", "OUT", "--rule", "energy", "--tau", "0.9"],
            "--tau must come with a rule that has it: mp",
        ),
        (["plan", "sst2", "--out", "OUT", "--keep", "layer.0.ffn"], "--keep must be SITE=WIDTH"),
        (["plan", "sst2"], "Pass --out FOLDER, such as runs/sst2"),
        (["plan", "DATA"], "has no plan.json and no spectra.npz"),
        (["compress", "sst2", "--out", "OUT", "--plan", "nowhere.json"], "nowhere.json"),
        (
            ["plan", "sst2", "--out", "OUT", "--model", "TEACHER", "--data", "DATA", "--exclude", "layer.0.fnn"],
            "Did you mean layer.0.ffn?",
        ),
        (["plan", "sst2", "--out", "OUT", "--target", "25%parms"], "Did you mean 'params'"),
        (["plan", "sst2", "--out", "OUT", "--tau", "2"], "tau must be within (0, 1). Got 2.0"),
        (["compress", "sst2", "--out", "OUT", "--epochs", "-1"], "epochs must be at least 0. Got -1.0"),
        (["compress", "sst2", "--out", "OUT", "--lr", "0"], "lr must be greater than 0"),
        (["compress", "sst2", "--out", "OUT", "--alpha", "2"], "alpha must be within [0, 1]. Got 2.0"),
        (["compress", "sst2", "--out", "OUT", "--seed", "-1"], "seed must be at least 0"),
        (["compress", "sst2", "--out", "OUT", "--device", "cuda:99"], "device must be there"),
        (["compress", "sst2", "--out", "OUT", "--epochs", "many"], "Invalid value for '--epochs'"),
        (["compress", "sst2", "--out", "OUT"], "\nrmtkd train sst2 --model PATH_OR_HUB_NAME --out sst2-teacher"),
        (["plan", "cifar10", "--out", "OUT"], "\nrmtkd train cifar10 --model PATH_OR_HUB_NAME"),
        (["compress", "sst2", "--out", "OUT", "--teacher-model", "t", "--teacher", "original"], "without --teacher."),
        (["compress", "nothing", "--out", "OUT"], "What each is: rmtkd ls"),
        (["compress", "digits", "--out", "OUT", "--target", "25"], "A share is written 25%params"),
        (["export", "TEACHER", "--out", "OUT", "--data", "DATA"], "Add --recipe NAME: rmtkd ls"),
        (["export", "TEACHER", "--out", "OUT", "--label", "l", "--max-length", "9"], "--label, --max-length must come"),
        (["check", "TEACHER", "--columns", "text"], "--columns must come with --recipe"),
        (["compress", "qqp", "--out", "OUT", "--model", "TEACHER", "--data", "DATA"], "Beside it: sst2_"),
        (["compress", "sst2", "--out", "OUT", "--model", "./nowhere"], "There is no folder './nowhere'"),
        (["compress", "sst2", "--out", "OUT", "--model", "TEACHER", "--data", "/nowhere"], "There is no such file"),
        (["plan", "sst2", "--out", "OUT", "--model", "TEACHER", "--data", "/nowhere"], "There is no such file"),
        (["plan", "sst2", "--out", "OUT", "--model", "TEACHER", "--data", "DATA", "--target", "1%params"], "at least"),
        (["compress", "sst2", "--out", "OUT", "--model", "START", "--data", "DATA"], "better than chance"),
        (["train", "sst2", "--out", "OUT"], "Pass --model"),
        (["train", "sst2", "--out", "OUT", "--model", "START", "--data", "/nowhere"], "There is no such file"),
        (["evaluate", "./nowhere", "--recipe", "sst2"], "There is no folder"),
        (["compress", "sst2", "--out", "OUT", "--columns", "text"], "Got --columns for sst2"),
        (["plan", "qqp", "--out", "OUT", "--label", "label"], "Got --label for qqp"),
        (["train", "text", "--out", "OUT", "--label", "label"], "--data rows.csv --columns TEXT --label LABEL"),
        (["compress", "text", "--out", "OUT", "--model", "TEACHER"], "must have rows. Got none"),
        (["evaluate", "TEACHER", "--recipe", "digits"], "head of the 10 classes"),
        (["evaluate", "TEACHER", "--recipe", "sst2", "--file", "/nowhere.parquet"], "There is no such file"),
    ],
)
def test_bad_input_is_one_message_and_leaves_nothing_behind(
    sentiment: Sentiment, command: Command, tmp_path: Path, words: list[str], message: str
):
    places = {
        "OUT": tmp_path / "out",
        "TEACHER": sentiment.teacher,
        "START": sentiment.start,
        "DATA": sentiment.data,
    }
    code, told, log = command(*(places.get(word, word) for word in words))
    assert code == 2
    assert told == ""
    assert message in log
    assert "Traceback" not in log
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["train", "plan", "compress"])
def test_an_out_that_holds_something_is_refused_before_anything_is_read(command: Command, tmp_path: Path, name: str):
    out = tmp_path / "out"
    (out / "model").mkdir(parents=True)
    (out / "config.json").write_text("{}")
    (out / "model" / "weights").write_text("mine")
    before = contents(out)
    code, _, log = command(name, "sst2", "--model", "./nowhere", "--data", "/nowhere", "--out", out)
    assert code == 2 and "--out must be" in log and "nowhere" not in log
    assert contents(out) == before


def test_an_altered_model_folder_is_one_message(command: Command, tmp_path: Path, sentiment: Sentiment):
    artifact.save(tiny_bert(labels=2), tmp_path / "model")
    (tmp_path / "model" / "README.md").write_text("another")
    code, _, log = command("evaluate", tmp_path / "model", "--recipe", "sst2", "--data", sentiment.data)
    assert code == 2 and "ArtifactError" in log and "checksum differs" in log


def test_a_missing_package_is_one_message(command: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setitem(sys.modules, "transformers", None)
    code, _, log = command("train", "digits", "--out", tmp_path / "out")
    assert code == 2 and "pip install 'rmtkd[text,vision,demo]'" in log
    assert list(tmp_path.iterdir()) == []


def test_a_fault_of_ours_is_not_hidden(monkeypatch: pytest.MonkeyPatch):
    def fail() -> None:
        raise ModuleNotFoundError("No module named 'rmtkd.gone'", name="rmtkd.gone")

    monkeypatch.setattr(sys, "argv", ["rmtkd", "ls"])
    monkeypatch.setattr(recipes, "names", fail)
    with pytest.raises(ModuleNotFoundError):
        cli.main()


CHOICES = {
    "--granularity layers": "Did you mean 'layer'",
    "--policy papper": "Did you mean 'paper'",
    "--metric outputs": "Did you mean 'output'",
    "--teacher orginal": "Did you mean 'original'",
    "--precision fp16": "precision must be one of auto, fp32, bf16",
}
SCRIPT = """
import sys
from rmtkd.cli import main
out, *choices = sys.argv[1:]
for choice in choices:
    sys.argv = ["rmtkd", "compress", "sst2", "--out", out, *choice.split()]
    try:
        main()
    except SystemExit as left:
        print(left.code, file=sys.stderr)
"""


def test_choices_are_refused_with_the_nearest(tmp_path: Path):
    """In a process of its own: in this one beartype speaks before us."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, tmp_path / "out", *CHOICES], capture_output=True, text=True, check=True
    )
    assert done.stdout == ""
    answers = done.stderr.split("error:")[1:]
    assert len(answers) == len(CHOICES)
    for answer, message in zip(answers, CHOICES.values(), strict=True):
        assert message in answer and answer.endswith("\n2\n")
    assert list(tmp_path.iterdir()) == []


def test_check_gives_a_verdict_for_every_site(sentiment: Sentiment, command: Command):
    code, told, _ = command("check", sentiment.teacher)
    assert code == 0 and "layer.0.query_key" in told and "all 9 ok" in told
    code, told, _ = command("check", sentiment.teacher, "--recipe", "sst2", "--data", sentiment.data, "--json")
    assert code == 0
    verdicts = json.loads(told)
    assert [verdict["ok"] for verdict in verdicts] == [True] * 9
    assert all(verdict["full_width_error"] < 1e-10 for verdict in verdicts)


def test_check_tells_a_fault_by_its_exit_code(command: Command, tmp_path: Path):
    tiny_bert(chunk_size_feed_forward=4).save_pretrained(tmp_path / "chunks")
    code, told, _ = command("check", tmp_path / "chunks", "--json")
    assert code == 1
    faults = {verdict["site"]: verdict["why"] for verdict in json.loads(told) if not verdict["ok"]}
    assert set(faults) == {"layer.0.ffn", "layer.1.ffn"}
    assert "chunk_size_feed_forward must be 0" in faults["layer.0.ffn"]
    code, told, _ = command("check", tmp_path / "chunks")
    assert code == 1 and "2 of 9 failed" in told
    code, _, log = command("check", tmp_path / "nothing")
    assert code == 2 and "There is no folder" in log
    tiny_bert(labels=1).save_pretrained(tmp_path / "regression")
    code, _, log = command("check", tmp_path / "regression")
    assert code == 2 and "UnsupportedModelError" in log and "regression" in log
    code, _, log = command("check", tmp_path / "chunks", "--data", tmp_path)
    assert code == 2 and "--recipe" in log


def test_check_takes_networks_of_images_too(command: Command, tmp_path: Path):
    network: Any = recipes.get("digits_cnn").start(None, 0, None).model
    network.save_pretrained(tmp_path / "images")
    code, told, _ = command("check", tmp_path / "images")
    assert code == 0 and "layer2.0.conv1" in told and "all 6 ok" in told


def test_a_folder_that_holds_a_run_is_refused_without_a_word_about_its_plan(command: Command, tmp_path: Path):
    RunFolder.create(tmp_path / "run", {"options": {}, "command": {}}).release()
    (tmp_path / "run" / "plan.json").write_text("{}")
    code, _, log = command("compress", "digits", "--out", tmp_path / "run")
    assert code == 2 and "--out must be" in log and "is not applied" not in log


def test_ctrl_c_prints_how_to_go_on_and_resume_ends_the_run(sentiment: Sentiment, command: Command, tmp_path: Path):
    """In a process of its own, as from a terminal."""
    out = tmp_path / "run"
    words = ("compress", "sst2", "--model", sentiment.teacher, "--data", sentiment.data, "--out", out, *QUICK)
    options = ("--epochs", 4, "--granularity", "layer", "--precision", "fp32")
    process = subprocess.Popen(
        [sys.executable, "-c", "from rmtkd.cli import main; main()", *map(str, (*words, *options))],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None and process.stdout is not None
    log = ""
    while not re.search(r"step \d+/\d+", log):
        line = process.stderr.readline()
        assert line, log
        log += line
    process.send_signal(signal.SIGINT)
    told, rest = process.communicate(timeout=120)
    assert process.returncode == 130, log + rest
    assert f"continue with:  rmtkd resume {out}" in rest
    assert "interrupted after step" in told
    assert not (out / "summary.json").exists()
    so_far = rmtkd.load(out / "model-so-far")
    assert (out / "model-so-far" / "tokenizer.json").is_file()
    assert sum(p.numel() for p in so_far.parameters()) < sum(p.numel() for p in tiny_bert().parameters()) * 100

    code, told, log = command("resume", out, "--json")
    assert code == 0 and "going on after" in log
    assert json.loads(told) == json.loads((out / "summary.json").read_text())
    assert not (out / "model-so-far").exists() and not (out / "last").exists()
    code, told, log = command("resume", out)
    assert code == 0 and "this run is finished" in log and "parameters" in told


def test_a_second_cut_learns_from_the_model_before_the_first(sentiment: Sentiment, command: Command, tmp_path: Path):
    words = ("compress", "sst2", "--data", sentiment.data, "--multiple-of", 2, "--target", "80%params")
    code, *_ = command(*words, "--model", sentiment.teacher, "--out", tmp_path / "first", "--epochs", 0)
    assert code == 0
    again = (
        "--model",
        tmp_path / "first" / "model",
        "--teacher-model",
        sentiment.teacher,
        "--out",
        tmp_path / "second",
    )
    code, told, _ = command(*words, *again, "--epochs", 0.5)
    assert code == 0 and "teacher of " in told
    code, told, log = command("resume", tmp_path / "second")
    assert code == 0 and "this run is finished" in log and "teacher of " in told


def test_a_teacher_of_other_inputs_is_refused(sentiment: Sentiment):
    source = load_classifier(str(sentiment.teacher), labels=None)
    words = copy.deepcopy(source.tokenizer)
    words.add_tokens(["another"])
    with pytest.raises(DataError, match="must have the tokenizer of its student"):
        check_same_inputs(source, replace(source, tokenizer=words))
    with pytest.raises(DataError, match="must have the normalisation of images of its student"):
        check_same_inputs(source, replace(source, preprocessor={"image_mean": [0.5]}))
    check_same_inputs(source, load_classifier(str(sentiment.teacher), labels=None))


def test_resume_names_what_is_wrong(command: Command, tmp_path: Path):
    code, _, log = command("resume", tmp_path / "nowhere")
    assert code == 2 and "must hold config.json" in log and "rmtkd compress" in log
    RunFolder.create(tmp_path / "python", {"options": {}, "command": {}}).release()
    code, _, log = command("resume", tmp_path / "python")
    assert code == 2 and "begun from Python" in log


def test_rows_without_labels_are_compressed_by_the_teacher_alone(
    sentiment: Sentiment, command: Command, tmp_path: Path
):
    texts = pq.read_table(next(sentiment.data.glob("sst2_train*"))).column("text").to_pylist()
    csv.write_csv(pa.table({"text": texts}), tmp_path / "rows.csv")
    out = tmp_path / "run"
    words = ("compress", "text", "--model", sentiment.teacher, "--data", tmp_path / "rows.csv", "--out", out, *QUICK)
    code, told, _ = command(*words, "--epochs", 0.5)
    assert code == 0
    assert "agreement with the teacher, report rows" in told
    assert json.loads((out / "summary.json").read_text())["measured_against"]["report"] == "teacher"
    assert rmtkd.load(out / "model") is not None


def test_a_plan_tells_what_the_run_will_take(sentiment: Sentiment, command: Command, tmp_path: Path):
    words = ("plan", "sst2", "--model", sentiment.teacher, "--data", sentiment.data, "--out", tmp_path / "plan", *QUICK)
    code, _, log = command(*words, "--epochs", 3)
    assert code == 0
    assert re.search(r"`rmtkd compress` will take about \d+ s \(.* steps of .* GB of memory and .* GB of disk", log)


def test_a_plan_from_a_folder_that_is_not_there_says_so(command: Command, tmp_path: Path):
    code, _, log = command("plan", tmp_path / "typo", "--target", "20%params")
    assert code == 2 and "There is no folder" in log


def test_benchmarks_are_listed_and_run_with_words_of_their_own(command: Command) -> None:
    code, told, _ = command("bench")
    assert code == 0 and "vision" in told and "plan-cost" in told and "records" not in told
    done = subprocess.run([sys.executable, "-m", "rmtkd", "bench", "vision", "table"], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("| network")
    failed = subprocess.run([sys.executable, "-m", "rmtkd", "bench", "vision", "dance"], capture_output=True, text=True)
    assert failed.returncode == 2 and "invalid choice" in failed.stderr


SLOW = """
import sys, time
sys.stdout.reconfigure(line_buffering=True)
try:
    print("begun")
    time.sleep(60)
except KeyboardInterrupt:
    time.sleep(1)  # the step that is under way
    print("saved")
"""


def test_a_benchmark_ends_its_step_after_ctrl_c(tmp_path: Path) -> None:
    (tmp_path / "src" / "rmtkd").mkdir(parents=True)
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "slow.py").write_text(f"# __main__{SLOW}")
    words = [sys.executable, "-m", "rmtkd", "bench", "slow"]
    with subprocess.Popen(words, cwd=tmp_path, stdout=subprocess.PIPE, text=True, start_new_session=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "begun\n"
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does
        assert process.stdout.read() == "saved\n"


def test_a_benchmark_that_is_not_there_is_refused(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    code, _, error = command("bench", "visions")
    assert code == 2 and "vision" in error
    monkeypatch.setattr(cli.benchmarks, "__file__", "/nowhere/site-packages/rmtkd/cli/benchmarks.py")
    monkeypatch.chdir("/")
    code, _, error = command("bench")
    assert code == 2 and "must be run from a clone" in error
