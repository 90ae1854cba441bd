"""The model folder: written whole or not at all, loaded after every file is verified. Nothing is run or unpickled."""

import json
import math
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from rmtkd.artifact import self_test
from rmtkd.artifact.files import WEIGHTS, read_json, read_shapes, told
from rmtkd.artifact.manifest import FORMAT, MANIFEST, read_manifest, sealed, verify_files, vouch
from rmtkd.artifact.self_test import SELF_TEST
from rmtkd.batches import Batch, Forward
from rmtkd.environment import check_device, versions
from rmtkd.errors import ArtifactError
from rmtkd.families import FAMILIES, IMAGE_FAMILIES, EncoderFamily, ImageFamily
from rmtkd.modeling_rmtkd import PREFIX, EmbeddingLevels, FactorizedEmbedding, NoHeads, low_rank_pairs
from rmtkd.modules import set_levels
from rmtkd.pretrained import OURS, class_named, described, on_meta, presented, quietly, shapes_of, without_values
from rmtkd.sites import Site, trace_sites
from rmtkd.storage import apart, state_of
from rmtkd.surgery import factorize, fill, resize, set_attribute
from rmtkd.writing import check_new, new_folder, write_atomically

CONFIG = "config.json"
CARD = "README.md"
CODE = ("modeling_rmtkd.py", "modeling_cifar_resnet.py")
"""Files of ours that a model needs where rmtkd is not installed; it has one at most."""
OWN_FILES = frozenset({MANIFEST, WEIGHTS, CONFIG, CARD, *CODE, SELF_TEST})
MOST_LAYERS = 1000
"""Layers that share their weights may be many, but no more than this."""

MOST_CHANNELS = 100_000

REMEDY = "Fetch the folder again."

Build = Callable[[], nn.Module]
"""A model of one's own as it was before it was cut: its class, or a function that calls it. Values do not matter."""


def save(
    model: nn.Module,
    folder: str | Path,
    *,
    card: str = "",
    provenance: Mapping[str, Any] | None = None,
    extra_files: Iterable[Path] = (),
    sites: Sequence[Site] | None = None,
    example: Batch | None = None,
) -> None:
    """Write a model folder under a temporary name, then rename it.

    Args:
        model: a model of a supported family, of any widths; or any module, with its sites and an example.
        folder: where to; must not exist.
        card: the text of README.md.
        provenance: JSON values on where the model comes from.
        extra_files: files to copy into the folder, such as a tokenizer's.
        sites: of a model of one's own: the widths that may have been narrowed.
        example: of a model of one's own: a batch, after whose shape and range the self-test is made. It is not stored.

    Raises:
        ArtifactError: if the folder exists, an extra file is missing or has a name of ours, provenance is not JSON, or
            the model's outputs are not finite.
        UnsupportedModelError: if the model's family is not known, and no sites are given.
    """
    extra_files = check_extra_files(extra_files)
    folder = check_new(Path(folder), "a model folder", ArtifactError)
    try:
        origin = json.loads(json.dumps(dict(provenance or {}), allow_nan=False))
    except (TypeError, ValueError) as error:
        raise ArtifactError(f"provenance must be JSON values. Writing it gave: {error}. Leave them out.") from None
    if sites is None:
        model = presented(model)
    with new_folder(folder) as partial:
        facts = _write_pretrained(model, partial) if sites is None else _write_own(model, partial, sites, example)
        write_atomically(partial / CARD, card.encode())
        for file in extra_files:
            shutil.copyfile(file, partial / file.name)
        manifest = {
            "format": FORMAT,
            **facts,
            "shapes": shapes_of(model),
            "versions": versions(),
            "provenance": origin,
            "files": {path.name: vouch(path) for path in sorted(partial.iterdir())},
        }
        # Read back what JSON makes of it: its keys are texts.
        write_atomically(partial / MANIFEST, sealed(json.loads(json.dumps(manifest))).encode())
        _check_readable(partial)


def check_extra_files(files: Iterable[str | Path]) -> tuple[Path, ...]:
    """Return the files if they can travel with a model.

    Raises:
        ArtifactError: if there is no such file, or it has a name of ours or of another one.
    """
    found = tuple(map(Path, files))
    if len({file.name for file in found}) < len(found):
        twice = next(file.name for i, file in enumerate(found) if file.name in {other.name for other in found[:i]})
        raise ArtifactError(f"extra files must have names of their own. Got two named {twice}. Leave one out.")
    for file in found:
        if not file.is_file() or file.name in OWN_FILES:
            fault = "has a name of ours" if file.is_file() else "is none"
            raise ArtifactError(
                f"an extra file must be a file of another name than ours. {file} {fault}. Leave it out."
            )
    return found


def seal(folder: str | Path, names: Iterable[str]) -> None:
    """Vouch for files of a model folder that its maker has changed, added or removed, such as the model card.

    Args:
        folder: what `save` wrote.
        names: of files that lie in it, or did.

    Raises:
        ArtifactError: if a name is none of a file that may change, or anything else has been altered. Then nothing is.
    """
    folder, names = Path(folder), set(names)
    manifest = read_manifest(folder)
    for name in names:
        if name in OWN_FILES - {CARD}:
            raise ArtifactError(
                f"what the model is made of must stay as it was written. Got {name}. Save the model anew: rmtkd.save."
            )
        if Path(name).name != name or not ((folder / name).is_file() or name in manifest["files"]):
            raise ArtifactError(f"files must lie in {folder}. There is no {told(name)}. Name one, without a path.")
    files = {name: facts for name, facts in manifest["files"].items() if name not in names}
    verify_files(folder, {"files": files}, ())
    files |= {name: vouch(folder / name) for name in names if (folder / name).is_file()}
    del manifest["checksum"]
    write_atomically(folder / MANIFEST, sealed({**manifest, "files": dict(sorted(files.items()))}).encode())


def load(
    folder: str | Path,
    build: Build | None = None,
    *,
    forward: Forward | None = None,
    device: torch.device | str = "cpu",
) -> nn.Module:
    """Load a model folder, verify it, and return the model in evaluation mode.

    Nothing of the folder is executed or unpickled: models of transformers are built from its own classes, others by
    `build`.

    Args:
        folder: what `save` wrote.
        build: of a model of one's own: its class, or a function that calls it, giving it as it was before the cut.
            Parameters that are made within take no memory.
        forward: the one that the model was compressed with, if it had one of its own.
        device: where the model goes.

    Raises:
        ArtifactError: naming what is missing, altered or of another format.
        OptionError: if there is no such device.
    """
    check_device(str(device))
    return verified(Path(folder), build, forward)[0].to(device)


def verified(folder: Path, build: Build | None, forward: Forward | None) -> tuple[nn.Module, float | None]:
    """The model in a folder, and by how much its self-test differs from the stored answers, relatively; None where its
    maker's model could not be run on synthetic rows."""
    manifest = read_manifest(folder)
    is_own = manifest["library"] == "own"
    is_tested = not (is_own and self_test.NOT_RUN in manifest["self_test"])
    verify_files(folder, manifest, (WEIGHTS, *[SELF_TEST] * is_tested, *[CONFIG] * (not is_own)))
    if is_own and build is None:
        raise ArtifactError(
            f"{folder} holds a {manifest['model_class']}, a class of its maker's. Got no build. From Python, pass the "
            f"class, or a function that makes the model as it was before the cut: rmtkd.load({str(folder)!r}, build)."
        )
    if not is_own and build is not None:
        raise ArtifactError(
            f"build is for models of one's own. {folder} holds a {manifest['model_class']} of transformers. Leave it "
            "out."
        )
    remedy = f"Pass the class as it was before the cut, with its arguments, or {REMEDY.lower()}" if is_own else REMEDY
    try:
        # Nothing is read or allocated before all sizes agree: those of the manifest, the model and the weights.
        stored = read_shapes(folder / WEIGHTS)
        model = _pretrained(folder, manifest, stored) if build is None else _own(build, manifest, stored)
        check_shapes(manifest["shapes"], shapes_of(model), remedy)
        check_shapes(_stored_shapes(model), stored, remedy)
        _assign(model, load_file(folder / WEIGHTS))
        model.eval()
        if not is_tested:
            return model, None
        return model, self_test.verify(model, folder, manifest["self_test"], forward, is_own=is_own)
    except (ArtifactError, ImportError):
        raise
    except Exception as error:  # whatever safetensors, torch or transformers make of altered values
        raise ArtifactError(
            f"{folder} must hold a {manifest['model_class']} as it was written. Building it gave: {told(error)}. "
            f"{remedy}"
        ) from error


def ways_to_load(model_class: str, *, is_own: bool, own_forward: bool = False) -> Iterator[str]:
    """What reads a folder with a model of this class, in Python."""
    if is_own:
        forward = ", forward=forward" * own_forward
        yield f"`rmtkd.load(FOLDER, build{forward})`, where `build` gives a {model_class} as it was before the cut" + (
            " and `forward` is the one that it was compressed with" * own_forward
        )
        return
    yield "`rmtkd.load(FOLDER)`"
    task = "ImageClassification" if model_class.endswith("ForImageClassification") else "SequenceClassification"
    auto = f"`AutoModelFor{task}.from_pretrained(FOLDER)`"
    if model_class.startswith((PREFIX, "CifarResNet")):
        yield f"{auto} after `import rmtkd`"
        yield "where rmtkd is not installed, the same with `trust_remote_code=True`, as `AutoTokenizer` and `pipeline`"
    else:
        yield f"{auto}, a stock model: nothing of ours is needed"


def load_weights(folder: Path) -> dict[str, Tensor]:
    """The weights in a model folder.

    Raises:
        ArtifactError: if they cannot be read.
    """
    read_shapes(folder / WEIGHTS)
    return load_file(folder / WEIGHTS)


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """What is stored of a model: parameters, and the buffers that belong to its state, by name, once each."""
    return apart(state_of(model))


# ---------------------------------------------------------------------- writing


def _write_pretrained(model: Any, folder: Path) -> dict[str, Any]:
    """Weights, configuration and code, as transformers saves them; and what the manifest says of them."""
    with quietly():
        model.save_pretrained(folder)
    return {
        "library": "transformers",
        "model_class": type(model).__name__,
        "narrowed": {},  # config.json says it
        "labels": {str(key): value for key, value in model.config.id2label.items()},
        "self_test": self_test.write(model, folder, self_test.random_inputs(model)),
    }


def _write_own(model: nn.Module, folder: Path, sites: Sequence[Site], example: Batch | None) -> dict[str, Any]:
    if example is None:
        raise ArtifactError("a model of one's own needs an example of its batches, for the self-test. Got none.")
    save_file(weights_of(model), folder / WEIGHTS, metadata={"format": "pt"})
    if any(site.is_rank for site in sites):  # an earlier run may have narrowed what these know nothing of
        sites = [*sites, *trace_sites(model, example).sites]
    gone = {path: module for path, module in model.named_modules() if isinstance(module, NoHeads)}
    attributes = {(a.module, a.name) for site in sites for a in site.attributes if not _lies_in(a.module, gone)}
    written = {axis.parameter for site in sites for stream in site.streams for axis in stream.writers}
    return {
        "library": "own",
        "model_class": f"{type(model).__module__}.{type(model).__qualname__}",
        "narrowed": {
            "levels": {
                name: [level.num_embeddings for level in module.levels]  # type: ignore[misc]
                for name, module in model.named_modules()
                if isinstance(module, EmbeddingLevels)
            },
            "low_rank": {path: side for path, (_, side) in low_rank_pairs(model).items()},
            "factorized": [name for name, module in model.named_modules() if isinstance(module, FactorizedEmbedding)],
            "absent": {path: {"after": list(module.after), "norm": module.norm} for path, module in gone.items()},
            "buffers": sorted(written & {name for name, _ in model.named_buffers()}),
            "attributes": [[path, name, getattr(model.get_submodule(path), name)] for path, name in sorted(attributes)],
        },
        "labels": {},
        "self_test": self_test.write_if_it_runs(model, folder, example),
    }


def _lies_in(path: str, modules: Iterable[str]) -> bool:
    """Whether a path is one of these modules' or leads into one of them."""
    return any(path == module or path.startswith(f"{module}.") for module in modules)


def _check_readable(folder: Path) -> None:
    """Raise `ArtifactError` where texts are so large that `load` would refuse them."""
    read_manifest(folder)
    read_shapes(folder / WEIGHTS)
    if (folder / CONFIG).exists():
        read_json(folder / CONFIG)


# ---------------------------------------------------------------------- building


def _pretrained(folder: Path, manifest: Mapping[str, Any], stored: Mapping[str, list[int]]) -> nn.Module:
    """A model of transformers, its parameters without values. Only classes in the families' tables are ever built."""
    families = (*FAMILIES, *IMAGE_FAMILIES)
    known = {prefix + family.model_class: family for family in families for prefix in ("", PREFIX)}
    name = manifest["model_class"]
    if manifest["library"] != "transformers" or name not in known:
        raise ArtifactError(
            f"model_class must be one of {', '.join(sorted(known))}, of transformers. Got {told(name)} of "
            f"{told(manifest['library'])}. Use the rmtkd that wrote the folder."
        )
    model_class, family = class_named(name), known[name]
    # Only what a stock configuration has, and ours: others name kernels to fetch and run, or sizes to unfold.
    stock = class_named(name.removeprefix(PREFIX)).config_class
    allowed = {*stock().to_dict(), *OURS}
    values = {key: value for key, value in read_json(folder / CONFIG).items() if key in allowed}
    if isinstance(family, ImageFamily):
        _check_blocks({**stock().to_dict(), **values}, stored)
    else:
        _check_layers(family, stock.attribute_map, {**stock().to_dict(), **values}, stored)
    config = model_class.config_class.from_dict(values)
    model = on_meta(model_class, config)
    check_shapes(_stored_shapes(model), stored)
    _check_computed(model, stored)
    found_class, found_config = described(model)
    said, found = config.to_dict(), found_config.to_dict()
    if found_class is not model_class or any(found.get(key) != said.get(key) for key in OURS):
        raise ArtifactError(
            f"{CONFIG} must say which widths were narrowed, as a {name} has them. It says something else. Fetch the "
            "folder again."
        )
    with without_values():
        return model_class(config)


def _own(build: Build, manifest: Mapping[str, Any], stored: Mapping[str, list[int]]) -> nn.Module:
    """A model of one's own, its parameters without values where it can be built so."""
    narrowed = manifest["narrowed"]
    try:
        with without_values():
            model = build()
    except Exception:  # a class may compute with its weights while it is built, or take them from elsewhere
        model = build()
    with without_values():
        for path, counts in narrowed.get("levels", {}).items():
            set_levels(model, path, counts)
        for path in narrowed["factorized"]:
            factorize(model, path)
        for path, side in narrowed.get("low_rank", {}).items():
            factorize(model, path, side)
        for path, absent in narrowed.get("absent", {}).items():
            model.set_submodule(path, NoHeads(model.get_submodule(path), absent["after"], absent["norm"]))
    resize(model, {name: stored[name] for name in (*manifest["shapes"], *narrowed.get("buffers", ()))})
    for path, name, value in narrowed["attributes"]:
        if type(getattr(model.get_submodule(path), name)) not in (int, float) or type(value) not in (int, float):
            raise ArtifactError(
                f"an attribute of a width must be a number. {path}.{name} is not. Fetch the folder again."
            )
        set_attribute(model, path, name, value)
    return model


def _check_layers(
    family: EncoderFamily, names: Mapping[str, str], config: Mapping[str, Any], stored: Mapping[str, Any]
) -> None:
    """Raise `ArtifactError` unless there are weights for as many layers as the configuration has built."""
    layer = re.compile(re.escape(family.layers).replace(r"\*", r"\d+") + r"\.")
    there = len({match.group() for match in map(layer.match, stored) if match})
    said = [config.get(names.get(key, key), 1) for key in ("num_hidden_layers", "num_hidden_groups", "inner_group_num")]
    whole = all(type(number) is int and 0 < number <= MOST_LAYERS for number in said)
    if not whole or there != (said[1] * said[2] if family.repeats_layers else said[0]):
        raise ArtifactError(
            f"{CONFIG} and {WEIGHTS} must agree on layers, of at most {MOST_LAYERS}. They hold {told(said[0])} and "
            f"{there}. Fetch the folder again."
        )


def _check_blocks(config: Mapping[str, Any], stored: Mapping[str, Any]) -> None:
    """Raise `ArtifactError` where a configuration asks for more blocks of an image classifier than there are weights,
    or for wider ones."""
    said = [config.get(name) for name in ("depths", "hidden_sizes", "inner_sizes", "embedding_size", "num_channels")]
    numbers = [number for value in said for number in _flat(value)]
    blocks = sum(_flat(config.get("depths"))) + len(_flat(config.get("inner_sizes")))
    if not all(type(number) is int and 0 < number <= MOST_CHANNELS for number in numbers) or blocks > len(stored):
        raise ArtifactError(
            f"{CONFIG} must ask for as many blocks as {WEIGHTS} holds, of at most {MOST_CHANNELS:,} channels. It asks "
            f"for {blocks}. Fetch the folder again."
        )


def _flat(value: object) -> list[Any]:
    """A number, or the numbers of lists of lists, in one list."""
    if isinstance(value, list):
        return [number for part in value for number in _flat(part)]
    return [] if value is None else [value]


def _check_computed(model: nn.Module, stored: Mapping[str, list[int]]) -> None:
    """Raise `ArtifactError` where a configuration asks for larger buffers than all weights together: those that are not
    stored are computed, such as the frequencies of rotary positions."""
    computed = sum(value.numel() for name, value in model.named_buffers() if name not in stored)
    if computed > sum(map(math.prod, stored.values())):
        raise ArtifactError(
            f"{CONFIG} must ask for smaller buffers than {WEIGHTS} holds. It asks for {computed:,} numbers. Fetch the "
            "folder again."
        )


def check_shapes(expected: Mapping[str, Any], found: Mapping[str, Any], remedy: str = REMEDY) -> None:
    """Raise `ArtifactError` unless both hold the same tensors of the same shapes."""
    odd = sorted({*expected} ^ {*found}) or sorted(name for name in expected if expected[name] != found[name])
    if odd:
        name = odd[0]
        raise ArtifactError(
            f"{MANIFEST}, {CONFIG} and {WEIGHTS} must agree on shapes. They differ in {len(odd)}, such as "
            f"{told(name)}: {told(expected.get(name))} and {told(found.get(name))}. {remedy}"
        )


def _stored_shapes(model: nn.Module) -> dict[str, list[int]]:
    return {name: list(value.shape) for name, value in state_of(model).items()}


def _assign(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    fill(model, tensors)
    for name, buffer in model.named_buffers():
        if name not in tensors and buffer.is_floating_point():  # of a model that had been cast as a whole
            fill(model, {name: buffer.to(next(model.parameters()).dtype)})
