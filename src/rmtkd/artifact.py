"""The model folder: safetensors, JSON, a card. No pickle; it says all its shapes, and verifies itself when loaded.

`rmtkd.json` holds: `format`, the model class, its stock configuration, every parameter's shape, factorised embeddings,
attributes by which modules know their widths, label names, versions, where the model comes from, the SHA-256 of every
other file, and a self-test: a synthetic batch and the outputs that the model must give for it.
"""

import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from rmtkd.checkpoint import write_atomically
from rmtkd.environment import versions
from rmtkd.errors import ArtifactError
from rmtkd.families import FAMILIES
from rmtkd.measurement import evaluation
from rmtkd.modules import FactorizedEmbedding
from rmtkd.sites import find_sites
from rmtkd.surgery import factorize_embedding, resize

FORMAT = 1
MANIFEST = "rmtkd.json"
WEIGHTS = "model.safetensors"
SELF_TEST_TOLERANCE = 1e-3
"""Largest difference of self-test outputs, relative to the largest output: other processors round differently."""


def is_artifact(folder: Path) -> bool:
    """Whether the folder is a model folder of `rmtkd`."""
    return (folder / MANIFEST).is_file()


def save(
    model: nn.Module,
    folder: Path,
    *,
    card: str = "",
    provenance: Mapping[str, Any] | None = None,
    extra_files: Iterable[Path] = (),
) -> None:
    """Write a model folder under a temporary name, then rename it.

    Args:
        model: a model of a supported family, of any widths.
        folder: where to; must not exist.
        card: the text of README.md.
        provenance: JSON values on where the model comes from.
        extra_files: files to copy into the folder, such as a tokenizer's.

    Raises:
        ArtifactError: if the folder exists.
    """
    if folder.exists():
        raise ArtifactError(f"a model folder must be new. {folder} exists. Choose another name or remove it.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        _write(model, partial, card, dict(provenance or {}), extra_files)
        partial.chmod(0o755)
        partial.rename(folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def load(folder: str | Path, *, device: torch.device | str = "cpu") -> nn.Module:
    """Load a model folder, verify it, and return the model in evaluation mode. Nothing is executed or unpickled.

    Raises:
        ArtifactError: naming what is missing, altered or of another format.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    _verify_checksums(folder, manifest)
    model = _build(manifest)
    try:
        tensors = load_file(folder / WEIGHTS)
    except (SafetensorError, OSError) as error:
        raise ArtifactError(f"{WEIGHTS} must be a safetensors file. Reading it gave: {error}.") from None
    _assign(model, tensors)
    model.eval()
    _self_test(model, manifest["self_test"])
    return model.to(device)


def read_manifest(folder: Path) -> dict[str, Any]:
    """The contents of `rmtkd.json`.

    Raises:
        ArtifactError: if it is missing, not JSON, lacks a key, or has another format.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise ArtifactError(f"a model folder must hold {MANIFEST}. {folder} does not. Is the path right?")
    try:
        manifest = json.loads(path.read_text())
    except (ValueError, OSError) as error:
        raise ArtifactError(f"{path} must be JSON. Reading it gave: {error}. Fetch the folder again.") from None
    needed = ("format", "model_class", "config", "shapes", "factorized", "attributes", "files", "self_test")
    missing = [key for key in needed if not isinstance(manifest, dict) or key not in manifest]
    if missing:
        raise ArtifactError(f"{path} must hold {', '.join(needed)}. It lacks {', '.join(missing)}. Fetch it again.")
    if manifest["format"] != FORMAT:
        raise ArtifactError(
            f"the folder's format must be {FORMAT}. Got {manifest['format']!r}. Use the rmtkd that wrote it."
        )
    return manifest


def _write(model: nn.Module, folder: Path, card: str, provenance: dict[str, Any], extra_files: Iterable[Path]) -> None:
    tensors = {name: value.detach().cpu().contiguous() for name, value in _all_tensors(model).items()}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    config = model.config.to_dict()
    # A stock loader must refuse this folder, rather than load half a model with fresh weights for the rest.
    write_json(folder / "config.json", {**config, "model_type": f"rmtkd_{config['model_type']}"})
    (folder / "README.md").write_text(card)
    for file in extra_files:
        shutil.copyfile(file, folder / file.name)
    files = {path.name: _sha256(path) for path in sorted(folder.iterdir())}
    write_json(
        folder / MANIFEST,
        {
            "format": FORMAT,
            "model_class": type(model).__name__,
            "config": config,
            "shapes": {name: list(parameter.shape) for name, parameter in model.named_parameters()},
            "factorized": [name for name, module in model.named_modules() if isinstance(module, FactorizedEmbedding)],
            "attributes": [
                [attribute.module, attribute.name, attribute.value(site.width, site.groups)]
                for site in find_sites(model)
                for attribute in site.attributes
            ],
            "labels": {str(key): value for key, value in config.get("id2label", {}).items()},
            "versions": versions(),
            "provenance": provenance,
            "files": files,
            "self_test": _make_self_test(model),
        },
    )


def write_json(path: Path, value: Any) -> None:
    """Write JSON, whole or not at all."""
    write_atomically(path, (json.dumps(value, indent=1) + "\n").encode())


def _all_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters, once each, and buffers, also those that a state dict leaves out: the loader builds on the meta device
    and cannot compute them."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def _build(manifest: Mapping[str, Any]) -> nn.Module:
    """The model's shape on the meta device. Only classes in the families' tables are ever built."""
    import transformers

    known = {family.model_class for family in FAMILIES}
    if manifest["model_class"] not in known:
        raise ArtifactError(
            f"model_class must be one of {', '.join(sorted(known))}. Got {manifest['model_class']!r}. "
            "Use the rmtkd that wrote the folder."
        )
    model_class = getattr(transformers, manifest["model_class"])
    try:
        config = model_class.config_class.from_dict(manifest["config"])
        with torch.device("meta"):
            model = model_class(config)
        for path in manifest["factorized"]:
            factorize_embedding(model, path)
        resize(model, manifest["shapes"])
        for module, name, value in manifest["attributes"]:
            setattr(model.get_submodule(module), name, value)
    except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ArtifactError(
            f"{MANIFEST} must describe a {manifest['model_class']}. Building it gave: {error!r}. Fetch it again."
        ) from None
    return model


def _assign(model: nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
    expected = _all_tensors(model)
    if set(expected) != set(tensors):
        odd = sorted(set(expected) ^ set(tensors))
        raise ArtifactError(f"{WEIGHTS} must hold exactly the model's tensors. They differ in {', '.join(odd[:5])}.")
    for name, value in tensors.items():
        if value.shape != expected[name].shape:
            raise ArtifactError(
                f"{name} must have shape {list(expected[name].shape)}. Got {list(value.shape)}. Fetch the folder again."
            )
        path, _, leaf = name.rpartition(".")
        module = model.get_submodule(path)
        if leaf in module._parameters:
            setattr(module, leaf, nn.Parameter(value))
        else:
            module._buffers[leaf] = value


def _make_self_test(model: nn.Module) -> dict[str, Any]:
    """A tiny synthetic batch – never a user's row – and what the model answers."""
    generator = torch.Generator().manual_seed(0)
    length = min(8, model.config.max_position_embeddings)
    ids = torch.randint(0, model.config.vocab_size, (2, length), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, length // 2 :] = 0
    return {
        "input_ids": ids.tolist(),
        "attention_mask": mask.tolist(),
        "logits": _self_test_logits(model, ids, mask).tolist(),
    }


def _self_test_logits(model: nn.Module, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    device = next(model.parameters()).device
    with evaluation(model):
        return model(input_ids=ids.to(device), attention_mask=mask.to(device)).logits.float().cpu()


def _self_test(model: nn.Module, test: Mapping[str, Any]) -> None:
    expected = torch.tensor(test["logits"])
    got = _self_test_logits(model, torch.tensor(test["input_ids"]), torch.tensor(test["attention_mask"]))
    error = float((got - expected).abs().max() / expected.abs().max())
    if not error <= SELF_TEST_TOLERANCE:
        raise ArtifactError(
            f"the loaded model must give the outputs stored with it, to {SELF_TEST_TOLERANCE:g}. They differ by "
            f"{error:.1e}. The folder was altered, or this version of transformers computes something else."
        )


def _verify_checksums(folder: Path, manifest: Mapping[str, Any]) -> None:
    for name, expected in manifest["files"].items():
        path = folder / name
        if Path(name).name != name or not path.is_file():
            raise ArtifactError(f"the folder must hold {name!r}. It does not. Fetch the folder again.")
        if _sha256(path) != expected:
            raise ArtifactError(f"{path} must be as it was written. Its checksum differs. Fetch the folder again.")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
