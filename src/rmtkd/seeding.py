# ruff: noqa: NPY002 - the global numbers are those that rows draw from
"""Random numbers of our own: a seed for a while, and a state that can be kept and gone back to.

They are those of PyTorch, and those that collections of rows may draw from beside them, when they augment images for
example: NumPy's global ones and Python's.
"""

import json
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor


@contextmanager
def seeded(seed: int | None, device: torch.device | str = "cpu") -> Iterator[None]:
    """Random numbers from this seed; afterwards the caller's go on as if nothing had been drawn.

    Args:
        seed: of all of them; None begins with the caller's.
        device: whose random numbers are drawn beside the CPU's.
    """
    device = torch.device(device)
    before = random_state(device)
    try:
        if seed is not None:
            torch.manual_seed(seed)
            random.seed(seed)
            np.random.seed(seed % 2**32)
        yield
    finally:
        set_random_state(before, device)


def random_state(device: torch.device) -> Tensor:
    """The state of the random numbers at this moment, as bytes: PyTorch's, then as JSON the others'."""
    states = [torch.get_rng_state()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    others = {"numpy": np.random.get_state(legacy=False), "python": random.getstate()}
    text = json.dumps(others, default=np.ndarray.tolist)
    return torch.cat([*states, torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)])


def set_random_state(state: Tensor, device: torch.device) -> None:
    """Go back to what `random_state` gave. States of earlier versions are PyTorch's alone."""
    end = len(torch.get_rng_state())
    torch.set_rng_state(state[:end])
    if device.type == "cuda":
        begin, end = end, end + len(torch.cuda.get_rng_state(device))
        torch.cuda.set_rng_state(state[begin:end], device)
    if len(state) > end:
        others = json.loads(state[end:].numpy().tobytes())
        np.random.set_state(others["numpy"])
        version, internal, gauss = others["python"]
        random.setstate((version, tuple(internal), gauss))
