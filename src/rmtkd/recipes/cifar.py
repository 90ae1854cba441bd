"""CIFAR-10: 32 × 32 photographs of ten kinds of things."""

import hashlib
import importlib
import re
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from rmtkd.batches import Batch
from rmtkd.distillation import Recovery
from rmtkd.errors import DataError
from rmtkd.recipes.checkpoints import load_classifier
from rmtkd.recipes.groups import SELECTION, part_of
from rmtkd.recipes.images import BATCH, ImageRows, decode, preprocessor
from rmtkd.recipes.recipe import Recipe, Rows, Source
from rmtkd.recipes.results import MEASURED
from rmtkd.recipes.tables import class_indices, read_columns
from rmtkd.seeding import seeded

LABELS = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
SIDE = 32
NORMALISATION: dict[str, Any] = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
"""That of ImageNet: what the published small networks were trained with."""
HUB = "uoft-cs/cifar10"
FILES = {"train": "cifar10_train.parquet", "test": "cifar10_test.parquet"}
CALIBRATION = 0.05
"""2,432 images: the last stage of ResNet-50 has 2,048 channels, of which its head sees one vector an image. The small
networks need fewer, and would be planned and cut in six sevenths of the time with 1,920."""
SMALL = re.compile(r"resnet(20|32|44|56)")
NAMED = "resnet20, resnet32, resnet44, resnet56 (published weights, found in --data) or resnet50 (from nothing)"


def small_network(depth: int) -> nn.Module:
    """One of the published networks for CIFAR-10, of 6n + 2 layers, from a random start.

    Reference:
        He et al., arXiv 1512.03385, §4.2.
    """
    from rmtkd.modeling_cifar_resnet import CifarResNetConfig, CifarResNetForImageClassification

    blocks = (depth - 2) // 6
    config = CifarResNetConfig(inner_sizes=[[width] * blocks for width in (16, 32, 64)], **_labels())
    return CifarResNetForImageClassification(config).eval()


def resnet50() -> nn.Module:
    """The usual bottleneck network, with the stem of large images, from a random start: 23.5 million parameters."""
    from transformers import ResNetConfig, ResNetForImageClassification

    return ResNetForImageClassification(ResNetConfig(**_labels())).eval()


def published_weights(file: Path) -> nn.Module:
    """A network with the weights of a file of akamaster/pytorch_resnet_cifar10.

    Raises:
        DataError: if the file holds anything else.
    """
    found = SMALL.match(file.name)
    if found is None:
        raise DataError(f"a file of published weights must be named resnet20 to resnet56. Got {file.name}. Rename it.")
    model = small_network(int(found[1]))
    try:
        state = torch.load(file, weights_only=True, map_location="cpu")
        values = {name.removeprefix("module."): value for name, value in state.get("state_dict", state).items()}
        missing, strange = model.load_state_dict(values, strict=False)
    except Exception as error:  # whatever torch makes of other files
        raise DataError(f"{file} must hold weights of {found[0]}. Reading it gave: {error}. Fetch it again.") from None
    if strange or any(not name.endswith("shortcut.weight") for name in missing):  # option A has no weights there
        raise DataError(f"{file} must hold weights of {found[0]}. It lacks some, or holds others. Fetch it again.")
    return model


def load(path: str, data: Path | None = None) -> Source:
    """A trained network.

    Args:
        path: a model folder or hub name; one of `NAMED`; a file of published weights; or `package.module:function` of a
            function of the user's own that returns one.
        data: folder in which, or below which, the published weights are.

    Raises:
        DataError: if there is none.
    """
    if SMALL.fullmatch(path) and not Path(path).exists():
        files = sorted((data or Path()).rglob(f"{path}-*.th")) if data else []
        if not files:
            raise DataError(
                f"the published weights of {path} must be in a file {path}-*.th below --data. There is none. Fetch it "
                "from the releases of akamaster/pytorch_resnet_cifar10, or train one: rmtkd train cifar10 --model "
                f"{path} --out TEACHER"
            )
        return source_of(published_weights(files[0]))
    if path.endswith(".th"):
        return source_of(published_weights(Path(path)))
    if re.fullmatch(r"[\w.]+:\w+", path) and not Path(path).exists():
        return source_of(own_network(path))
    return source_of(load_classifier(path, labels=LABELS, task="ImageClassification").model)


def own_network(path: str) -> nn.Module:
    """What a function of the user's own returns.

    Raises:
        DataError: if there is none, or it returns anything but a module.
    """
    module, _, name = path.partition(":")
    try:
        made = getattr(importlib.import_module(module), name)()
    except Exception as error:  # whatever code of somebody else's raises
        raise DataError(
            f"--model must name a function that returns a network, as package.module:function. {path} gave: {error!r}. "
            "Put the folder that holds it on PYTHONPATH."
        ) from error
    if not isinstance(made, nn.Module):
        raise DataError(f"{path} must return a torch.nn.Module. It returned {type(made).__name__}.")
    return made.eval()


def start(path: str | None, seed: int, data: Path | None) -> Source:
    """A network from a random start.

    Raises:
        DataError: if there is none of this name.
    """
    with seeded(seed):
        if path == "resnet50":
            return source_of(resnet50())
        if path is not None and (found := SMALL.fullmatch(path)):
            return source_of(small_network(int(found[1])))
    raise DataError(f"--model must be one of {NAMED}. Got {path}. Others are trained elsewhere.")


def source_of(model: nn.Module) -> Source:
    """A network and how images are prepared for it."""
    return Source(model=model, preprocessor=preprocessor(SIDE, **NORMALISATION))


def load_rows(data: Path | None, source: Source, seed: int) -> Rows:
    """All rows by role. Which training images are held out for selection is drawn by a hash of each.

    Raises:
        DataError: if they cannot be read.
    """
    (train_files, train_labels), (test_files, test_labels) = (_read(data, part) for part in FILES)
    held = np.array([part_of(hashlib.sha256(_bytes(file)).hexdigest()) in SELECTION for file in train_files])
    train, test = decode(train_files, SIDE, "the training images"), decode(test_files, SIDE, "the test images")
    rows = partial(ImageRows, **NORMALISATION, named=is_of_transformers(source.model))
    return Rows(
        train=rows(train[~held], train_labels[~held], seed=seed, augments=True, batch_size=BATCH),
        selection=rows(train[held], train_labels[held]),
        report=rows(test, test_labels),
        note=f"{(~held).sum():,} training, {held.sum():,} selection and {len(test):,} report images; whoever trained "
        "a published network trained on the selection images, too",
    )


def file_rows(path: Path, source: Source) -> ImageRows:
    """The labelled rows of one file with columns `image` (bytes of PNG and the like) and `label`."""
    files, labels = read_columns(path, ["image"], "label", binary=True)
    indices = class_indices(labels, LABELS, f"column 'label' of {path}")
    return ImageRows(decode(files, SIDE, str(path)), indices, **NORMALISATION, named=is_of_transformers(source.model))


def example(model: nn.Module, rows: Rows) -> Batch:
    """The batch whose cost is measured."""
    pixels = torch.randn(32, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    return {"pixel_values": pixels} if is_of_transformers(model) else (pixels,)


def is_of_transformers(model: nn.Module) -> bool:
    """Whether a network is called with named images; one of the user's own is called with images alone."""
    return hasattr(model, "config")


def _read(data: Path | None, part: str) -> tuple[list[Any], np.ndarray]:
    """The images, still in their files, and the labels of one part."""
    if data is None:
        from datasets import load_dataset

        try:
            table: Any = load_dataset(HUB, split=part).with_format("arrow")[:]
        except Exception as error:  # whatever the hub's library makes of a missing network
            raise DataError(
                f"the rows of {HUB} must be fetched from the hub. That gave: {error}. Check the network, or pass "
                f"--data FOLDER with {' and '.join(FILES.values())}."
            ) from error
        return table["img"].to_pylist(), table["label"].to_numpy()
    files, labels = read_columns(data / FILES[part], ["image"], "label", binary=True)
    return files, np.asarray(class_indices(labels, LABELS, f"column 'label' of {data / FILES[part]}"))


def _bytes(file: Any) -> bytes:
    return file["bytes"] if isinstance(file, dict) else file


def _labels() -> dict[str, Any]:
    return {"id2label": dict(enumerate(LABELS)), "label2id": {name: i for i, name in enumerate(LABELS)}}


CIFAR10 = Recipe(
    name="cifar10",
    describe=f"CIFAR-10, what a photograph shows: 50,000 images; reported on the 10,000 test images; --model {NAMED}",
    labels=LABELS,
    start=start,
    load=load,
    rows=load_rows,
    file_rows=file_rows,
    example=example,
    training=Recovery(lr=1e-3, weight_decay=5e-4),
    epochs=20.0,
    measured=MEASURED["cifar10"],
    options={
        "target": "39%flops",
        "epochs": 5.0,
        "calibration_share": CALIBRATION,
        "recovery": Recovery(optimizer="sgd", lr=0.05, weight_decay=5e-4),
    },
)
