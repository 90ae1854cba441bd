"""The claims of image recipes: rows, published networks, and a compression by the command line, from run to folder."""

import io
import json
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import rmtkd
from rmtkd import batches as batching
from rmtkd import recipes
from rmtkd.calibration import share_of
from rmtkd.cli import app
from rmtkd.errors import ArtifactError, DataError
from rmtkd.measurement import accuracy, count_parameters
from rmtkd.modeling_cifar_resnet import CifarResNetConfig, CifarResNetForImageClassification
from rmtkd.recipes.cifar import LABELS, NORMALISATION, load, published_weights, resnet50, small_network
from rmtkd.recipes.groups import PARTS, SELECTION
from rmtkd.recipes.images import BATCH, SHIFT, ImageRows, decode

RANDOM = np.random.default_rng(0)


def png(image: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """CIFAR-10 in the small: images of ten colours."""
    folder = tmp_path_factory.mktemp("cifar")
    for name, rows in (("train", 300), ("test", 40)):
        labels = np.arange(rows) % 10
        colours = np.linspace(0, 255, 10)[labels][:, None, None, None] + RANDOM.normal(0, 20, (rows, 32, 32, 3))
        images = [png(image) for image in np.clip(colours, 0, 255).astype(np.uint8)]
        pq.write_table(pa.table({"image": images, "label": labels.astype(np.int8)}), folder / f"cifar10_{name}.parquet")
    return folder


def test_decoded_images_are_what_was_encoded() -> None:
    images = RANDOM.integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)
    assert np.array_equal(decode([png(image) for image in images], 32, "here"), images)


@pytest.mark.parametrize(
    ("file", "why"),
    [(b"no image", "Row 0 gave"), (png(np.zeros((8, 9, 3), np.uint8)), "must be 32 × 32. Row 0 is 9 × 8")],
)
def test_other_bytes_are_refused(file: bytes, why: str) -> None:
    with pytest.raises(DataError, match=why):
        decode([file], 32, "the training images")


def rows(**options: Any) -> Any:
    images = RANDOM.integers(0, 256, (10, 32, 32, 3), dtype=np.uint8)
    return ImageRows(images, np.arange(10), **NORMALISATION, batch_size=4, **options)


def test_rows_are_normalised_and_come_again_the_same() -> None:
    plain = rows()
    (first, *_), again = list(plain), list(plain)
    expected = (plain.images[0].transpose(2, 0, 1) / 255 - np.reshape(NORMALISATION["mean"], (3, 1, 1))) / np.reshape(
        NORMALISATION["std"], (3, 1, 1)
    )
    np.testing.assert_allclose(first["pixel_values"][0].numpy(), expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(first["pixel_values"], again[0]["pixel_values"])
    assert torch.cat([batch["row_ids"] for batch in again]).tolist() == list(range(10))


def test_training_rows_differ_from_pass_to_pass_and_not_from_run_to_run() -> None:
    augmented = rows(seed=0, augments=True)
    first = torch.cat([batch["pixel_values"] for batch in augmented])
    assert torch.equal(first, torch.cat([batch["pixel_values"] for batch in augmented]))
    augmented.set_epoch(1)
    assert not torch.equal(first, torch.cat([batch["pixel_values"] for batch in augmented]))
    assert "row_ids" not in next(iter(augmented))  # what is answered to a row is not what is answered to it later


def test_a_training_image_is_itself_mirrored_or_not_and_moved_by_few_pixels() -> None:
    whole = rows(seed=1, augments=True)
    plain: Any = ImageRows(whole.images, np.arange(10), **NORMALISATION, batch_size=10)
    originals = next(iter(plain))["pixel_values"]
    seen = set()
    for batch in whole:
        for image, label in zip(batch["pixel_values"], batch["labels"], strict=True):
            framed = torch.nn.functional.pad(originals[label], (SHIFT,) * 4)
            found = [
                (flipped, down, right)
                for flipped in (False, True)
                for down in range(2 * SHIFT + 1)
                for right in range(2 * SHIFT + 1)
                if torch.equal(
                    (torch.nn.functional.pad(originals[label].flip(-1), (SHIFT,) * 4) if flipped else framed)[
                        :, down : down + 32, right : right + 32
                    ],
                    image,
                )
            ]
            assert len(found) == 1
            seen.add(found[0][0])
    assert seen == {False, True}


def test_networks_have_the_published_sizes() -> None:
    """All but the shortcuts, which are filled up with zeros there: 2,560 parameters."""
    assert count_parameters(small_network(20)) - 2560 == 269_722
    assert count_parameters(small_network(56)) - 2560 == 853_018
    assert count_parameters(resnet50()) == 23_528_522


def test_a_shortcut_is_the_published_one() -> None:
    network: Any = small_network(20)
    shortcut = network.layer2[0].shortcut
    x = torch.randn(2, 16, 8, 8)
    filled = torch.nn.functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 8, 8))
    assert torch.equal(shortcut(x), filled)


@pytest.mark.parametrize("depth", [20, 56])
def test_published_weights_have_the_published_accuracy(depth: int, data_folder: Path) -> None:
    """On the first 500 test images: those of all 10,000 stand in docs/results/images.md."""
    source = load(f"resnet{depth}", data_folder)
    table = pq.read_table(data_folder / "cifar10_test.parquet").slice(0, 500)
    images = decode(table["image"].to_pylist(), 32, "the test images")
    found = accuracy(source.model, ImageRows(images, table["label"].to_numpy(), **NORMALISATION))
    assert found.value > 0.89


def test_strange_weights_are_refused_by_name(tmp_path: Path) -> None:
    torch.save({"state_dict": {"module.conv1.weight": torch.zeros(1)}}, tmp_path / "resnet20-x.th")
    with pytest.raises(DataError, match="must hold weights of resnet20"):
        published_weights(tmp_path / "resnet20-x.th")
    with pytest.raises(DataError, match="must be in a file resnet32-"):
        load("resnet32", tmp_path)
    with pytest.raises(DataError, match="no_such_module"):
        load("no_such_module:make", None)


@pytest.mark.parametrize("make", [partial(small_network, 56), resnet50])
def test_calibration_by_default_has_an_image_for_each_channel_of_every_network_that_is_named(make: Any) -> None:
    images = np.zeros((50_000 * (PARTS - len(SELECTION)) // PARTS, 1, 1, 3), np.uint8)
    rows = ImageRows(images, None, **NORMALISATION, batch_size=BATCH)
    seen = sum(batching.rows(batch) for batch in share_of(rows, recipes.get("cifar10").options["calibration_share"]))
    with torch.device("meta"):
        widest = max(module.out_channels for module in make().modules() if isinstance(module, torch.nn.Conv2d))
    assert seen > 1.1 * widest


def invoke(*words: object, code: int = 0) -> str:
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == code, result.output
    return result.stdout


def test_cifar_runs_from_the_command_line_to_a_folder(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a network of one's own by import path; every row has one role."""
    (tmp_path / "own_nets.py").write_text(
        "import torch\n"
        "def net():\n"
        "    body = [torch.nn.Conv2d(3, 8, 3, 2), torch.nn.ReLU(), torch.nn.Conv2d(8, 8, 3, 2), torch.nn.ReLU()]\n"
        "    head = [torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(8, 10)]\n"
        "    return torch.nn.Sequential(*body, *head)\n"
        "def make():\n"
        "    torch.manual_seed(0)\n"
        "    made = net()\n"
        "    colours = (torch.linspace(0, 1, 10)[:, None] - torch.tensor([.485, .456, .406])) / .226\n"
        "    for _ in range(300):\n"
        "        x = colours[:, :, None, None].expand(-1, -1, 32, 32) + .3 * torch.randn(10, 3, 32, 32)\n"
        "        loss = torch.nn.functional.cross_entropy(made(x), torch.arange(10))\n"
        "        loss.backward()\n"
        "        with torch.no_grad():\n"
        "            for p in made.parameters():\n"
        "                p -= .1 * p.grad; p.grad = None\n"
        "    return made\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    out = tmp_path / "run"
    words = ("--epochs", 0.5, "--target", "60%flops", "--calibration-share", 1.0, "--multiple-of", 1, "--json")
    record = json.loads(invoke("compress", "cifar10", "--model", "own_nets:make", "--data", data, "--out", out, *words))
    assert record["compressed"]["flops"] <= 0.6 * record["baseline"]["flops"]
    assert record["baseline"]["accuracy"]["n"] == 40
    assert (out / "model" / "preprocessor_config.json").is_file()
    import own_nets  # type: ignore[import-not-found]

    assert count_parameters(rmtkd.load(out / "model", own_nets.net)) == record["compressed"]["parameters"]


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of the demonstration's small network."""
    folder = tmp_path_factory.mktemp("cnn")
    invoke("compress", "digits_cnn", "--out", folder / "run", "--epochs", 1.0, "--control")
    return folder / "run"


def test_digits_lose_little_at_two_fifths_of_the_operations(digits: Path) -> None:
    record = json.loads((digits / "summary.json").read_text())
    assert record["compressed"]["flops"] <= 0.4 * record["baseline"]["flops"]
    assert record["baseline"]["accuracy"]["value"] > 0.97
    assert record["compressed"]["accuracy"]["value"] > record["baseline"]["accuracy"]["value"] - 0.04
    assert record["rounds"][0]["accuracy_cut"] > 0.6
    assert record["rounds"][0]["check_error"] < 1e-5


def test_the_folder_loads_without_our_name(digits: Path, tmp_path: Path) -> None:
    x = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.save((x, rmtkd.load(digits / "model")(x).logits), tmp_path / "seen.pt")
    code = (
        "import sys, torch\n"
        "sys.modules['rmtkd'] = None\n"
        "from transformers import AutoModelForImageClassification, AutoImageProcessor\n"
        f"model = AutoModelForImageClassification.from_pretrained({str(digits / 'model')!r}, trust_remote_code=True)\n"
        f"x, expected = torch.load({str(tmp_path / 'seen.pt')!r})\n"
        "with torch.no_grad(): torch.testing.assert_close(model(x).logits, expected)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={"HF_HOME": str(tmp_path), "PATH": ""})


def test_a_finished_run_is_given_back_and_a_model_is_evaluated(digits: Path) -> None:
    record = json.loads((digits / "summary.json").read_text())
    assert json.loads(invoke("resume", digits, "--json"))["compressed"] == record["compressed"]
    found = json.loads(invoke("evaluate", digits / "model", "--recipe", "digits_cnn", "--json"))
    assert found["accuracy"] == record["compressed"]["accuracy"]


def test_a_narrowed_model_is_narrowed_again(digits: Path) -> None:
    model = rmtkd.load(digits / "model")
    recipe = recipes.get("digits_cnn")
    calibration = list(recipe.rows(None, recipe.load(str(digits / "model")), 0).train)[:8]
    plan, _ = rmtkd.plan(model, calibration=calibration, target="60%flops", policy="paper", multiple_of=1)
    assert count_parameters(rmtkd.narrow(model, plan, calibration=calibration)) < count_parameters(model)


def test_a_configuration_that_asks_for_too_much_is_refused(tmp_path: Path) -> None:
    """Before anything is built of it."""
    config = CifarResNetConfig(hidden_sizes=[4, 8], inner_sizes=[[4], [8]], id2label=dict(enumerate(LABELS)))
    rmtkd.save(CifarResNetForImageClassification(config).eval(), tmp_path / "model")
    values = json.loads((tmp_path / "model" / "config.json").read_text())
    for change in ({"inner_sizes": [[4] * 10_000, [8]]}, {"hidden_sizes": [4, 10**9]}, {"inner_sizes": [[4], [-8]]}):
        (tmp_path / "model" / "config.json").write_text(json.dumps(values | change))
        reseal(tmp_path / "model")
        with pytest.raises(ArtifactError, match="must ask for as many blocks"):
            rmtkd.load(tmp_path / "model")


def reseal(folder: Path) -> None:
    from rmtkd.artifact.manifest import MANIFEST, sealed, vouch

    manifest = json.loads((folder / MANIFEST).read_text())
    manifest.pop("checksum")
    manifest["files"]["config.json"] = vouch(folder / "config.json")
    (folder / MANIFEST).write_text(sealed(manifest))


@pytest.mark.parametrize("narrows", [False, True])
def test_the_resnet_of_transformers_is_saved_at_any_widths(tmp_path: Path, narrows: bool) -> None:
    from transformers import AutoModelForImageClassification, ResNetConfig, ResNetForImageClassification

    torch.manual_seed(0)
    config = ResNetConfig(embedding_size=8, hidden_sizes=[16, 32], depths=[1, 2], id2label=dict(enumerate("abcd")))
    model = ResNetForImageClassification(config).eval()
    assert all(verdict.ok for verdict in rmtkd.check(model))
    batches = [{"pixel_values": torch.randn(16, 3, 32, 32)} for _ in range(4)]
    if narrows:
        plan, _ = rmtkd.plan(model, calibration=batches, target="60%params", policy="paper", multiple_of=1)
        model = rmtkd.narrow(model, plan, calibration=batches)
    rmtkd.save(model, tmp_path / "model")
    for again in (rmtkd.load(tmp_path / "model"), AutoModelForImageClassification.from_pretrained(tmp_path / "model")):
        assert type(again).__name__ == "Rmtkd" * narrows + "ResNetForImageClassification"
        with torch.no_grad():
            assert torch.equal(again(**batches[0]).logits, model(**batches[0]).logits)


@pytest.mark.parametrize("to", ["onnx", "torch-export"])
def test_a_narrowed_network_is_the_same_exported(digits: Path, tmp_path: Path, to: str) -> None:
    if to == "onnx":
        pytest.importorskip("onnxruntime")
    words = ("--recipe", "digits_cnn", "--out", tmp_path / "out", "--json")
    record = json.loads(invoke("export", digits / "model", "--to", to, *words))
    assert record["inputs"] == ["pixel_values"] and record["checked_on"] == "rows"
    assert all(check["difference"] < 1e-4 and not check["flipped"] for check in record["checks"].values())
    assert {rows for check in record["checks"].values() for rows, _ in check["shapes"]} >= {1, 7, 150}
    assert (tmp_path / "out" / "preprocessor_config.json").is_file()


def test_eight_bits_of_a_convolutional_network_are_refused(digits: Path, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    result = CliRunner().invoke(app, ["export", str(digits / "model"), "--int8", "--out", str(tmp_path / "out")])
    assert result.exit_code != 0 and list(tmp_path.iterdir()) == []
