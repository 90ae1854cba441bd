"""What a result was made with: versions, processor, accelerator."""

import importlib.metadata
import os
import platform
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

import torch

from rmtkd.errors import OptionError, check_choice

Precision = Literal["fp32", "bf16"]
PRECISIONS = ("auto", "fp32", "bf16")
"""What may be asked for; `auto` is what the machine is likely to be faster with."""
CORE = ("rmtkd", "torch", "numpy", "scipy", "safetensors", "transformers", "datasets", "tokenizers")
PACKAGES = (*CORE, "onnx", "onnxscript", "onnxruntime", "openvino", "nncf", "executorch")


def versions() -> dict[str, str]:
    """Versions of Python, of `rmtkd` and of what it rests on, where installed."""
    found = {package: _version(package) for package in PACKAGES}
    return {"python": platform.python_version()} | {name: version for name, version in found.items() if version}


def extras() -> dict[str, tuple[str, ...]]:
    """Of every extra of this installation, the packages that are missing."""
    return {extra: tuple(name for name in names if not _version(name)) for extra, names in _required().items()}


def environment_report() -> str:
    """Versions, machine and extras, as Markdown for a bug report."""
    told = {"accelerator": "none that torch sees", "CUDA of torch": str(torch.version.cuda), **versions(), **machine()}
    lines = ["### Environment", "", *(f"- {name}: {value}" for name, value in told.items())]
    lines += ["", "| extra | |", "|---|---|"]
    for extra, missing in extras().items():
        how = f"missing: {', '.join(missing)} (`pip install 'rmtkd[{extra}]'`)" if missing else "present"
        lines.append(f"| {extra} | {how} |")
    return "\n".join(lines)


def machine() -> dict[str, str]:
    """The machine in words that carry no name of it: processor, cores, memory, accelerator."""
    facts = {
        "system": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "cores": str(os.cpu_count()),
        "threads": str(torch.get_num_threads()),
        "bf16 matrix instructions": str(has_bf16("cpu")),
    }
    if torch.cuda.is_available():
        facts["accelerator"] = torch.cuda.get_device_name()
    return facts


def check_device(name: str) -> str:
    """Return the name of a device if this machine has it.

    Raises:
        OptionError: if there is no such device.
    """
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError):
        raise OptionError(f"device must be cpu, cuda or cuda:NUMBER. Got {name!r}.") from None
    check_choice("device", device.type, ("cpu", "cuda"))
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise OptionError(
            f"device must be there. Got {name!r}, and torch sees {torch.cuda.device_count()} CUDA devices. Use cpu, or "
            "install torch with CUDA."
        )
    return name


def has_bf16(device: "torch.device | str") -> bool:
    """Whether the device multiplies bfloat16 matrices in hardware: then training under autocast is faster (1.3–3 times
    on the CPUs that were measured, the more the wider the model)."""
    if torch.device(device).type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def precision_on(device: "torch.device | str", asked: str = "auto") -> Precision:
    """What one of `PRECISIONS` is on a device: `auto` is bf16 where it has instructions for it."""
    return "bf16" if asked == "bf16" or (asked == "auto" and has_bf16(device)) else "fp32"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _required() -> dict[str, list[str]]:
    """Packages of every extra, as the installation says it; those of an extra that an extra names, too."""
    try:
        lines: Iterable[str] = importlib.metadata.requires("rmtkd") or ()
    except importlib.metadata.PackageNotFoundError:  # run from its source
        return {}
    found: dict[str, list[str]] = {}
    for line in lines:
        requirement, _, marker = line.partition(";")
        extra, name = re.search(r"""extra == ['"](.+?)['"]""", marker), re.match(r"[\w.-]+", requirement)
        if extra and name:
            inner = re.search(r"\[(.+)\]", requirement)
            names = [p for e in inner[1].split(",") for p in found.get(e, ())] if inner else [name[0]]
            found.setdefault(extra[1], []).extend(names)
    return found


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or "unknown"
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")
