"""Versions and machine are told without names of people or places; a device that is not there is refused."""

import getpass
import socket
from pathlib import Path

import pytest
import torch

from rmtkd.environment import check_device, machine, versions
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
