"""Versions and machine are told without names of people or places; a device that is not there is refused."""

import getpass
import importlib.metadata
import socket
from pathlib import Path

import pytest
import torch

from rmtkd.environment import check_device, environment_report, extras, machine, versions
from rmtkd.errors import OptionError


def test_versions_name_what_a_result_rests_on():
    found = versions()
    assert found["torch"] == torch.__version__
    assert {"python", "rmtkd", "torch", "numpy", "transformers"} <= set(found)


def test_machine_carries_no_name_of_it():
    facts = machine()
    assert {"system", "processor", "cores", "threads"} <= set(facts)
    told = " ".join(facts.values())
    assert socket.gethostname() not in told
    assert str(Path.home()) not in told
    assert getpass.getuser() not in told.split()


def test_a_device_that_is_there_is_returned():
    assert check_device("cpu") == "cpu"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gpu", "device must be cpu"),
        ("", "device must be cpu"),
        ("cuda:99", "CUDA devices"),
        ("meta", "device must be one"),
    ],
)
def test_a_device_that_is_not_there_is_refused(name: str, message: str):
    with pytest.raises(OptionError, match=message):
        check_device(name)


def test_extras_are_those_of_the_installation_and_tell_what_is_missing(monkeypatch: pytest.MonkeyPatch):
    lines = [
        "torch<3,>=2.6",
        "nothing-like-it>=1; extra == 'onnx'",
        'torch>=2; extra == "onnx"',
        "rmtkd[onnx]; extra == 'benchmarks'",
        "numpy; extra == 'benchmarks'",
        "numpy; extra == 'plots'",
    ]
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: lines)
    assert extras() == {"onnx": ("nothing-like-it",), "benchmarks": ("nothing-like-it",), "plots": ()}
    told = environment_report()
    assert "| onnx | missing: nothing-like-it (`pip install 'rmtkd[onnx]'`) |" in told
    assert "| plots | present |" in told


def test_a_report_of_the_environment_names_what_bug_reports_need():
    told = environment_report().splitlines()
    named = {line[2:].partition(":")[0] for line in told if line.startswith("- ")}
    assert named >= {"python", "rmtkd", "torch", "system", "processor", "cores", "threads", "bf16 matrix instructions"}
    assert "accelerator" in named
    assert not any(socket.gethostname() in line for line in told)
