"""The model folder: safetensors, JSON, a card. No pickle; it says all its shapes, and verifies itself when loaded.

`rmtkd.json` holds: `format`, the model class, its stock configuration, every parameter's shape, factorised embeddings,
attributes by which modules know their widths, label names, versions, where the model comes from, the SHA-256 of every
other file, a self-test (a synthetic batch and the outputs that the model must give for it), and its own SHA-256.
"""

import hashlib
import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from rmtkd.checkpoint import new_folder, write_atomically, write_json
from rmtkd.environment import check_device, versions
from rmtkd.errors import ArtifactError
from rmtkd.families import FAMILIES
from rmtkd.measurement import evaluation
from rmtkd.modules import FactorizedEmbedding
from rmtkd.sites import find_family, find_sites
from rmtkd.surgery import factorize_embedding, fill, resize, tensors_of

FORMAT = 1
MANIFEST = "rmtkd.json"
WEIGHTS = "model.safetensors"
OWN_FILES = frozenset({MANIFEST, WEIGHTS, "config.json", "README.md"})
FIELDS: Mapping[str, type] = {
    "format": int,
    "model_class": str,
    "config": dict,
    "shapes": dict,
    "factorized": list,
    "attributes": list,
    "labels": dict,
    "versions": dict,
    "provenance": dict,
    "files": dict,
    "self_test": dict,
    "checksum": str,
}
"""What `rmtkd.json` holds."""
MOST_LAYERS = 200
"""As many layers are built before it is known whether there are weights for them all."""
SELF_TEST_TOLERANCE = 1e-3
"""Largest difference of self-test outputs, relative to the largest output: other processors round differently."""


def is_artifact(folder: Path) -> bool:
    """Whether the folder is a model folder of `rmtkd`."""
    return (folder / MANIFEST).is_file()


def save(
    model: nn.Module,
    folder: str | Path,
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
        ArtifactError: if the folder exists, an extra file is missing or has a name of ours, provenance is not JSON, or
            the model's outputs are not finite.
        UnsupportedModelError: if the model's family is not known.
    """
    folder, extra_files = Path(folder), check_extra_files(extra_files)
    if folder.exists() or folder.is_symlink():
        raise ArtifactError(f"a model folder must be new. {folder} exists. Choose another name or remove it.")
    try:
        origin = json.loads(json.dumps(dict(provenance or {}), allow_nan=False))
    except (TypeError, ValueError) as error:
        raise ArtifactError(f"provenance must be JSON values. Writing it gave: {error}. Leave them out.") from None
    with new_folder(folder) as partial:
        _write(model, partial, card, origin, extra_files)


def check_extra_files(files: Iterable[Path]) -> tuple[Path, ...]:
    """Return the files if they can travel with a model.

    Raises:
        ArtifactError: if there is no such file, or it has a name of ours.
    """
    files = tuple(files)
    for file in files:
        if not file.is_file() or file.name in OWN_FILES:
            fault = "has a name of ours" if file.is_file() else "is none"
            raise ArtifactError(
                f"an extra file must be a file of another name than ours. {file} {fault}. Leave it out."
            )
    return files


def load(folder: str | Path, *, device: torch.device | str = "cpu") -> nn.Module:
    """Load a model folder, verify it, and return the model in evaluation mode. Nothing is executed or unpickled.

    Raises:
        ArtifactError: naming what is missing, altered or of another format.
        OptionError: if there is no such device.
    """
    check_device(str(device))
    folder = Path(folder)
    manifest = read_manifest(folder)
    try:
        _verify_checksums(folder, manifest)
        tensors = load_file(folder / WEIGHTS)
        model = _build(manifest, tensors)
        _assign(model, tensors)
        model.eval()
        _self_test(model, manifest["self_test"])
    except (ArtifactError, ImportError):
        raise
    except Exception as error:  # whatever safetensors, torch or transformers make of altered values
        raise ArtifactError(
            f"{folder} must hold a {manifest['model_class']} as it was written. Building it gave: {error!r}. "
            "Fetch the folder again."
        ) from error
    return model.to(device)


def save_weights(model: nn.Module, folder: Path) -> None:
    """Write only the weights, of a model whose class no loader of ours can name."""
    with new_folder(folder) as partial:
        save_file(
            {name: value.detach().cpu().contiguous() for name, value in tensors_of(model).items()}, partial / WEIGHTS
        )


def load_weights(folder: Path) -> dict[str, torch.Tensor]:
    """The weights in a model folder.

    Raises:
        ArtifactError: if they cannot be read.
    """
    try:
        return load_file(folder / WEIGHTS)
    except Exception as error:  # whatever safetensors makes of missing or damaged bytes
        raise ArtifactError(f"{folder} must hold {WEIGHTS} as it was written. Reading it gave: {error!r}.") from error


def read_manifest(folder: Path) -> dict[str, Any]:
    """The contents of `rmtkd.json`.

    Raises:
        ArtifactError: if it is missing, not JSON, lacks a key, was altered, or has another format.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise ArtifactError(f"a model folder must hold {MANIFEST}. {folder} does not. Is the path right?")
    try:
        text = path.read_bytes().decode()
        manifest = json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, OSError, RecursionError) as error:
        raise ArtifactError(f"{path} must be JSON. Reading it gave: {error}. Fetch the folder again.") from None
    if isinstance(manifest, dict) and manifest.get("format", FORMAT) != FORMAT:
        raise ArtifactError(
            f"the folder's format must be {FORMAT}. Got {manifest['format']!r}. Use the rmtkd that wrote it."
        )
    wrong = [
        key for key, kind in FIELDS.items() if not isinstance(manifest, dict) or type(manifest.get(key)) is not kind
    ]
    if wrong:
        raise ArtifactError(
            f"{path} must hold {', '.join(FIELDS)}. Missing or odd: {', '.join(wrong)}. Fetch it again."
        )
    # Every byte counts: a repeated key or other white space is not what was written either.
    if text != _sealed({key: value for key, value in manifest.items() if key != "checksum"}):
        raise ArtifactError(f"{path} must be as it was written. Its checksum differs. Fetch the folder again.")
    return manifest


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")


def _sealed(manifest: Mapping[str, Any]) -> str:
    """The text of `rmtkd.json`, with the SHA-256 of all the rest as its last entry."""
    checksum = hashlib.sha256(json.dumps(manifest, indent=1).encode()).hexdigest()
    return json.dumps({**manifest, "checksum": checksum}, indent=1) + "\n"


def _write(model: nn.Module, folder: Path, card: str, provenance: dict[str, Any], extra_files: Iterable[Path]) -> None:
    sites = find_sites(model)
    _save_weights(model, folder)
    stock: Any = model.config
    # Where the model lay on this machine is nobody's business.
    config = {key: value for key, value in stock.to_dict().items() if key != "_name_or_path"}
    # A stock loader must refuse this folder, rather than load half a model with fresh weights for the rest.
    write_json(folder / "config.json", {**config, "model_type": f"rmtkd_{config['model_type']}"})
    write_atomically(folder / "README.md", card.encode())
    for file in extra_files:
        shutil.copyfile(file, folder / file.name)
    manifest = {
        "format": FORMAT,
        "model_class": type(model).__name__,
        "config": config,
        "shapes": {name: list(parameter.shape) for name, parameter in model.named_parameters()},
        "factorized": [name for name, module in model.named_modules() if isinstance(module, FactorizedEmbedding)],
        "attributes": [
            [attribute.module, attribute.name, attribute.value(site.width, site.groups)]
            for site in sites
            for attribute in site.attributes
        ],
        "labels": {str(key): value for key, value in config.get("id2label", {}).items()},
        "versions": versions(),
        "provenance": provenance,
        "files": {path.name: _sha256(path) for path in sorted(folder.iterdir())},
        "self_test": _make_self_test(model),
    }
    # Read back what JSON makes of it: its keys are texts.
    write_atomically(folder / MANIFEST, _sealed(json.loads(json.dumps(manifest))).encode())


def _save_weights(model: nn.Module, folder: Path) -> None:
    tensors = {name: value.detach().cpu().contiguous() for name, value in tensors_of(model).items()}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def _build(manifest: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> nn.Module:
    """The model's shape on the meta device. Only classes in the families' tables are ever built."""
    import transformers

    known = {family.model_class for family in FAMILIES}
    if manifest["model_class"] not in known:
        raise ArtifactError(
            f"model_class must be one of {', '.join(sorted(known))}. Got {manifest['model_class']!r}. "
            "Use the rmtkd that wrote the folder."
        )
    model_class = getattr(transformers, manifest["model_class"])
    # Only what a stock configuration has: others name kernels to fetch and run, or sizes to unfold.
    stock = model_class.config_class().to_dict()
    config = model_class.config_class.from_dict({k: v for k, v in manifest["config"].items() if k in stock})
    # Anything that would take time or memory before it fails must agree with the weights that are really there.
    shapes = {name: list(tensors[name].shape) for name in manifest["shapes"] if name in tensors}
    # (Layers that are called again and again may be more than the parameters, but not by much.)
    numbers = [getattr(config, name, 0) for name in ("num_hidden_layers", "num_hidden_groups", "inner_group_num")]
    if manifest["shapes"] != shapes or max(numbers) > max(len(shapes), MOST_LAYERS):
        raise ArtifactError(f"{MANIFEST} and {WEIGHTS} must agree on shapes. They do not. Fetch the folder again.")
    with torch.device("meta"):
        model = model_class(config)
        for path in manifest["factorized"]:
            factorize_embedding(model, path)
        stock_shapes = {name: list(parameter.shape) for name, parameter in model.named_parameters()}
        resize(model, shapes)
    _set_attributes(model, {(module, name): value for module, name, value in manifest["attributes"]})
    _check_widths(model, stock_shapes)
    return model


def _check_widths(model: nn.Module, stock_shapes: Mapping[str, list[int]]) -> None:
    """Raise `ArtifactError` if the model differs from the stock one in any other size than the width of a site."""
    streams = [stream for site in find_sites(model) for stream in site.streams]
    narrowed = {(axis.parameter, axis.dim) for stream in streams for axis in (*stream.writers, *stream.readers)}
    for name, parameter in model.named_parameters():
        for dim, (size, stock) in enumerate(zip(parameter.shape, stock_shapes[name], strict=True)):
            if size != stock and (name, dim) not in narrowed:
                raise ArtifactError(
                    f"dimension {dim} of {name} must be {stock}, as the configuration says. Got {size}. "
                    "Fetch the folder again."
                )


def _set_attributes(model: nn.Module, values: Mapping[tuple[str, str], Any]) -> None:
    """Set the numbers by which modules know their widths; they must be those that the weights' shapes say."""
    for (path, name), value in values.items():
        module = model.get_submodule(path)
        if type(getattr(module, name)) not in (int, float):
            raise ArtifactError(
                f"an attribute of a width must be a number. {path}.{name} is not. Fetch the folder again."
            )
        setattr(module, name, value)
    expected = {
        (attribute.module, attribute.name): attribute.value(site.width, site.groups)
        for site in find_sites(model)
        for attribute in site.attributes
    }
    if expected != values:
        raise ArtifactError(
            f"attributes in {MANIFEST} must fit the weights' widths. They do not. Fetch the folder again."
        )


def _assign(model: nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
    expected = tensors_of(model)
    if set(expected) != set(tensors):
        odd = sorted(set(expected) ^ set(tensors))
        raise ArtifactError(f"{WEIGHTS} must hold exactly the model's tensors. They differ in {', '.join(odd[:5])}.")
    for name, value in tensors.items():
        if value.shape != expected[name].shape:
            raise ArtifactError(
                f"{name} must have shape {list(expected[name].shape)}. Got {list(value.shape)}. Fetch the folder again."
            )
    fill(model, tensors)


def _make_self_test(model: nn.Module) -> dict[str, Any]:
    """A tiny synthetic batch – never a user's row – and what the model answers."""
    config: Any = model.config
    length = min(8, find_family(model).longest_input(config))
    ids = torch.randint(0, config.vocab_size, (2, length), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, length // 2 :] = 0
    logits = _self_test_logits(model, ids, mask)
    if not logits.isfinite().all():
        raise ArtifactError(f"a saved model must give finite outputs. Got {logits.tolist()}. Look at its training.")
    return {"input_ids": ids.tolist(), "attention_mask": mask.tolist(), "logits": logits.tolist()}


def _self_test_logits(model: nn.Module, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    device = next(model.parameters()).device
    with evaluation(model):
        return model(input_ids=ids.to(device), attention_mask=mask.to(device)).logits.float().cpu()


def _self_test(model: nn.Module, test: Mapping[str, Any]) -> None:
    expected = torch.tensor(test["logits"])
    got = _self_test_logits(model, torch.tensor(test["input_ids"]), torch.tensor(test["attention_mask"]))
    same_shape = got.shape == expected.shape
    error = float((got - expected).abs().max() / expected.abs().max().clamp_min(1e-12)) if same_shape else float("inf")
    if not error <= SELF_TEST_TOLERANCE:
        raise ArtifactError(
            f"the loaded model must give the outputs stored with it, to {SELF_TEST_TOLERANCE:g}. They differ by "
            f"{error:.1e}. The folder was altered, or this version of transformers computes something else."
        )


def _verify_checksums(folder: Path, manifest: Mapping[str, Any]) -> None:
    for name, expected in {WEIGHTS: None, **manifest["files"]}.items():
        path = folder / name
        if Path(name).name != name or not path.is_file():
            raise ArtifactError(f"the folder must hold {name!r}. It does not. Fetch the folder again.")
        if _sha256(path) != expected:
            raise ArtifactError(f"{path} must be as it was written. Its checksum differs. Fetch the folder again.")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
