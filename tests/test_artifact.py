"""A model folder gives back the same model to the bit, or an `ArtifactError`; nothing is unpickled or run."""

import copy
import hashlib
import json
import pickletools
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForSequenceClassification, BertForSequenceClassification

import rmtkd
from conftest import assert_untouched, make_tokenizer, random_rows, snapshot, tiny_bert
from rmtkd import artifact, batches
from rmtkd.artifact import MANIFEST, WEIGHTS
from rmtkd.cutting import cut_in_order
from rmtkd.errors import ArtifactError, OptionError, UnsupportedModelError
from rmtkd.recipes.rows import TokenRows
from rmtkd.sites import find_sites

HALF = {"embeddings.word": 16, "ffn": 24, "head": 8}


def narrowed(model: torch.nn.Module) -> torch.nn.Module:
    """The model with its word embeddings factorised and every other width halved."""
    sites = find_sites(model)
    widths = {
        site.name: HALF[site.shares.split(".")[-1] if site.block != "embeddings" else site.name] for site in sites
    }
    return cut_in_order(model, sites, widths, list(random_rows(200)))[0]


@pytest.fixture(scope="module")
def small() -> torch.nn.Module:
    return narrowed(tiny_bert())


@pytest.fixture(scope="module")
def original(small: torch.nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved model folder with a tokenizer; tests change copies of it."""
    written = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer().save_pretrained(written)
    folder = tmp_path_factory.mktemp("models") / "small"
    artifact.save(small, folder, card="# A card – ±", provenance={"seed": 1}, extra_files=sorted(written.iterdir()))
    return folder


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    return shutil.copytree(original, tmp_path / "copy")


def logits(model: torch.nn.Module, rows: TokenRows) -> torch.Tensor:
    with torch.no_grad():
        return torch.cat([batches.logits(model, batch) for batch in rows])


# What is written


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("cut", [False, True])
def test_a_loaded_model_gives_bitwise_equal_logits(tmp_path: Path, rows: TokenRows, dtype: torch.dtype, cut: bool):
    model: torch.nn.Module = narrowed(tiny_bert()) if cut else tiny_bert()
    torch.nn.Module.to(model, dtype)
    before = snapshot(model)
    artifact.save(model, tmp_path / "model")
    assert_untouched(model, before)
    loaded = rmtkd.load(tmp_path / "model")
    assert not loaded.training
    assert torch.equal(logits(loaded, rows), logits(model, rows))
    assert_untouched(loaded, before)


def test_the_folder_holds_exactly_these_files_readable_alike(original: Path):
    files = sorted(original.iterdir())
    names = ["README.md", "config.json", "model.safetensors", "rmtkd.json", "tokenizer.json", "tokenizer_config.json"]
    assert [file.name for file in files] == names
    assert len({file.stat().st_mode for file in files}) == 1
    assert [path.name for path in original.parent.iterdir()] == ["small"]


def test_every_file_but_the_manifest_has_its_checksum(original: Path):
    files = json.loads((original / MANIFEST).read_text())["files"]
    assert files == {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in original.iterdir() if path.name != MANIFEST
    }


def test_no_file_holds_a_pickle(original: Path):
    for file in original.iterdir():
        content = file.read_bytes()
        assert not content.startswith((b"\x80", b"PK")), file
        with pytest.raises(Exception):  # noqa: B017 - whatever the disassembler says of bytes that are no pickle
            list(pickletools.genops(content))
        if file.name != WEIGHTS:
            content.decode()
    size = int.from_bytes((original / WEIGHTS).read_bytes()[:8], "little")
    header = json.loads((original / WEIGHTS).read_bytes()[8 : 8 + size])
    tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
    # The tensors fill the file to its last byte: there is no room for anything else.
    assert 8 + size + max(entry["data_offsets"][1] for entry in tensors.values()) == (original / WEIGHTS).stat().st_size


def test_the_folder_tells_nothing_of_the_machine_or_the_rows(tmp_path: Path):
    tiny_bert().save_pretrained(tmp_path / "secret-place")
    model = BertForSequenceClassification.from_pretrained(tmp_path / "secret-place")
    make_tokenizer().save_pretrained(tmp_path / "words")
    artifact.save(model, tmp_path / "model", extra_files=sorted((tmp_path / "words").iterdir()))
    for file in (tmp_path / "model").iterdir():
        content = file.read_bytes()
        for told in (str(tmp_path), "secret-place", str(Path.home())):
            assert told.encode() not in content, (file, told)


def test_the_self_test_is_synthetic(original: Path):
    test = json.loads((original / MANIFEST).read_text())["self_test"]
    expected = torch.randint(0, 50, (2, 8), generator=torch.Generator().manual_seed(0))
    assert test["input_ids"] == expected.tolist()


def test_a_stock_loader_refuses_the_folder(original: Path):
    for stock in (AutoModel, AutoModelForSequenceClassification):
        with pytest.raises(ValueError, match="rmtkd_bert"):
            stock.from_pretrained(original)


def test_a_folder_that_exists_is_refused_and_untouched(tmp_path: Path, small: torch.nn.Module):
    (tmp_path / "model").mkdir()
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    for name in ("model", "file", "link"):
        with pytest.raises(ArtifactError, match="a model folder must be new"):
            artifact.save(small, tmp_path / name)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "link", "model"]
    assert list((tmp_path / "model").iterdir()) == []
    assert (tmp_path / "file").read_text() == "mine"


def test_an_interrupted_save_leaves_no_folder(tmp_path: Path, small: torch.nn.Module, monkeypatch: pytest.MonkeyPatch):
    def interrupt(*_: object):
        raise KeyboardInterrupt

    monkeypatch.setattr(artifact, "_make_self_test", interrupt)  # the last thing before the manifest
    with pytest.raises(KeyboardInterrupt):
        artifact.save(small, tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", [MANIFEST, WEIGHTS, "config.json", "README.md"])
def test_an_extra_file_cannot_replace_one_of_ours(tmp_path: Path, small: torch.nn.Module, name: str):
    (tmp_path / name).write_text("{}")
    with pytest.raises(ArtifactError, match="has a name of ours"):
        artifact.save(small, tmp_path / "model", extra_files=[tmp_path / name])
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_what_could_not_be_loaded_again_is_not_saved(tmp_path: Path, small: torch.nn.Module):
    broken = copy.deepcopy(small)
    with torch.no_grad():
        next(broken.parameters()).fill_(float("nan"))
    with pytest.raises(ArtifactError, match="finite outputs"):
        artifact.save(broken, tmp_path / "model")
    for odd in (float("nan"), object()):
        with pytest.raises(ArtifactError, match="provenance must be JSON"):
            artifact.save(small, tmp_path / "model", provenance={"loss": odd})
    with pytest.raises(UnsupportedModelError):
        artifact.save(torch.nn.Linear(2, 2), tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_a_loaded_model_can_be_cut_and_saved_again(tmp_path: Path, folder: Path, rows: TokenRows):
    loaded = rmtkd.load(folder)
    sites = find_sites(loaded)
    widths = {site.name: site.width // 2 for site in sites}
    smaller, _ = cut_in_order(loaded, sites, widths, list(random_rows(200)))
    artifact.save(smaller, tmp_path / "again")
    again = rmtkd.load(tmp_path / "again")
    assert {site.name: site.width for site in find_sites(again)} == widths
    assert torch.equal(logits(again, rows), logits(smaller, rows))


def test_loading_leaves_the_random_numbers_alone(folder: Path):
    before = torch.get_rng_state()
    rmtkd.load(folder)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_folder_of_links_loads_as_in_the_hubs_cache(folder: Path, tmp_path: Path, rows: TokenRows):
    (tmp_path / "links").mkdir()
    for file in folder.iterdir():
        (tmp_path / "links" / file.name).symlink_to(file)
    assert torch.equal(logits(rmtkd.load(tmp_path / "links"), rows), logits(rmtkd.load(folder), rows))


def test_a_device_that_is_not_there_is_refused(folder: Path):
    with pytest.raises(OptionError, match="device must be"):
        rmtkd.load(folder, device="cuda:99")


# What is refused

FILES = ["README.md", "config.json", WEIGHTS, MANIFEST, "tokenizer.json", "tokenizer_config.json"]


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def make_link_elsewhere(path: Path) -> None:
    path.unlink()
    path.symlink_to("/etc/hostname")


def make_dangling_link(path: Path) -> None:
    path.unlink()
    path.symlink_to("/nowhere")


def make_endless_link(path: Path) -> None:
    path.unlink()
    path.symlink_to("/dev/zero")


def make_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize(
    "change",
    [truncate, empty, Path.unlink, make_link_elsewhere, make_dangling_link, make_endless_link, make_folder],
)
@pytest.mark.parametrize("name", FILES)
def test_a_folder_with_one_file_changed_is_refused(folder: Path, name: str, change: Callable[[Path], None]):
    change(folder / name)
    with pytest.raises(ArtifactError):
        rmtkd.load(folder)


@pytest.mark.parametrize("name", FILES)
def test_a_folder_with_one_byte_flipped_is_refused(folder: Path, name: str):
    content = bytearray((folder / name).read_bytes())
    generator = torch.Generator().manual_seed(0)
    # White space and the last byte among them: in the manifest, too, every byte counts.
    places = [
        0,
        len(content) - 1,
        content.find(b" "),
        *torch.randint(len(content), (12,), generator=generator).tolist(),
    ]
    for place in places:
        for flip in (1, 0x29):  # 0x29 turns a space into a tab
            changed = bytearray(content)
            changed[place] ^= flip
            (folder / name).write_bytes(changed)
            with pytest.raises(ArtifactError):
                rmtkd.load(folder)


def test_a_folder_that_is_not_one_is_refused(tmp_path: Path):
    for path in (tmp_path, tmp_path / "gone", Path(__file__)):
        with pytest.raises(ArtifactError, match=r"must hold rmtkd\.json"):
            rmtkd.load(path)


def reseal(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the manifest and make all checksums right again, as somebody would who means it."""
    manifest = json.loads((folder / MANIFEST).read_text())
    del manifest["checksum"]
    change(manifest)
    (folder / MANIFEST).write_text(artifact._sealed(manifest))


def test_resealing_alone_changes_nothing(folder: Path):
    reseal(folder, lambda manifest: None)
    rmtkd.load(folder)


WORD = "bert.embeddings.word_embeddings.table.weight"
QUERY = "bert.encoder.layer.0.attention.self.query.weight"
SELF = "bert.encoder.layer.0.attention.self"


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda m: m["shapes"].update({QUERY: [8, 32]}), id="changed shape"),
        pytest.param(lambda m: m["shapes"].update({WORD: [10**15, 16]}), id="huge shape"),
        pytest.param(lambda m: m["shapes"].update({WORD: [10**15, 10**15]}), id="shape beyond 64 bits"),
        pytest.param(lambda m: m["shapes"].update({WORD: [-1, 16]}), id="negative shape"),
        pytest.param(lambda m: m["shapes"].update({WORD: "50"}), id="shape of text"),
        pytest.param(lambda m: m["shapes"].update({"bert.nothing": [1]}), id="parameter too many"),
        pytest.param(lambda m: m["shapes"].pop(QUERY), id="parameter missing"),
        pytest.param(lambda m: m["config"].update(hidden_size=10**15), id="huge width"),
        pytest.param(lambda m: m["config"].update(vocab_size=10**15), id="huge vocabulary"),
        pytest.param(lambda m: m["config"].update(num_hidden_layers=10**9), id="layers without end"),
        pytest.param(lambda m: m["config"].update(num_hidden_layers=1), id="layer missing"),
        pytest.param(lambda m: m["config"].update(hidden_act="os.system"), id="unknown activation"),
        pytest.param(lambda m: m["config"].update(hidden_act="relu"), id="another activation"),
        pytest.param(lambda m: m["config"].update(num_attention_heads="two"), id="heads of text"),
        pytest.param(lambda m: m["config"].update(is_decoder=True), id="decoder"),
        pytest.param(lambda m: m["config"].update(return_dict=False), id="outputs as a tuple"),
        pytest.param(lambda m: m["config"].update(pad_token_id=99), id="padding outside the vocabulary"),
        pytest.param(lambda m: m["config"].update(id2label=5), id="odd labels"),
        pytest.param(lambda m: m.update(format=2), id="unknown format"),
        pytest.param(lambda m: m.update(format="1"), id="format of text"),
        pytest.param(lambda m: m.update(format=True), id="format true"),
        pytest.param(lambda m: m.update(model_class="os.system"), id="unknown class"),
        pytest.param(lambda m: m.update(model_class="BertModel"), id="class without a head"),
        pytest.param(lambda m: m.update(model_class=["BertForSequenceClassification"]), id="class in a list"),
        pytest.param(lambda m: m["files"].update({"../x": "0" * 64}), id="file above"),
        pytest.param(lambda m: m["files"].update({"/etc/passwd": "0" * 64}), id="file elsewhere"),
        pytest.param(lambda m: m["files"].update({"..": "0" * 64}), id="folder above"),
        pytest.param(lambda m: m["files"].update({"": "0" * 64}), id="file without a name"),
        pytest.param(lambda m: m["files"].update({"a\0b": "0" * 64}), id="file name with a zero byte"),
        pytest.param(lambda m: m["files"].pop(WEIGHTS), id="weights without a checksum"),
        pytest.param(lambda m: m["files"].clear(), id="no checksums"),
        pytest.param(lambda m: m["attributes"][0].__setitem__(2, 9), id="wrong attribute"),
        pytest.param(lambda m: m["attributes"].pop(), id="attribute missing"),
        pytest.param(lambda m: m["attributes"].append([SELF, "forward", 5]), id="attribute that is no number"),
        pytest.param(lambda m: m["attributes"].append([SELF, "num_attention_heads", 4]), id="another number"),
        pytest.param(lambda m: m["attributes"].append(["", "__class__", 5]), id="class of the model"),
        pytest.param(lambda m: m["attributes"].append([SELF]), id="short attribute"),
        pytest.param(lambda m: m["factorized"].clear(), id="embedding not factorised"),
        pytest.param(lambda m: m["factorized"].append("bert.embeddings.position_embeddings"), id="one more factorised"),
        pytest.param(lambda m: m["factorized"].append("bert.nothing"), id="factorised nothing"),
        pytest.param(lambda m: m["self_test"]["logits"][0].__setitem__(0, 99.0), id="wrong self-test"),
        pytest.param(lambda m: m["self_test"].update(logits=[]), id="empty self-test"),
        pytest.param(lambda m: m["self_test"].update(logits=[[0.0]]), id="self-test of another shape"),
        pytest.param(lambda m: m["self_test"]["input_ids"][0].__setitem__(0, 10**6), id="self-test outside the words"),
        pytest.param(lambda m: m["self_test"].pop("input_ids"), id="self-test without input"),
        *(pytest.param(lambda m, key=key: m.pop(key), id=f"no {key}") for key in artifact.FIELDS if key != "checksum"),
    ],
)
def test_a_manifest_changed_on_purpose_is_refused(folder: Path, change: Callable[[dict[str, Any]], object]):
    reseal(folder, change)
    with pytest.raises(ArtifactError):
        rmtkd.load(folder)


@pytest.mark.parametrize(
    "text",
    ["", "5", "[]", "{}", "null", "[" * 10_000, '{"format": 1}', "\xff", '{"format": 1, "format": 1}'],
)
def test_a_manifest_of_another_form_is_refused(folder: Path, text: str):
    (folder / MANIFEST).write_bytes(text.encode("latin-1"))
    with pytest.raises(ArtifactError):
        rmtkd.load(folder)


def test_a_manifest_with_a_key_twice_is_refused(folder: Path):
    text = (folder / MANIFEST).read_text()
    (folder / MANIFEST).write_text(text.replace('{\n "format": 1,', '{\n "format": 1,\n "format": 1,', 1))
    with pytest.raises(ArtifactError, match="checksum differs"):
        rmtkd.load(folder)


@pytest.mark.parametrize("constant", [float("nan"), float("inf")])
def test_a_manifest_with_a_number_that_is_none_is_refused(folder: Path, constant: float):
    reseal(folder, lambda manifest: manifest["provenance"].update(loss=constant))
    with pytest.raises(ArtifactError, match="no JSON number"):
        rmtkd.load(folder)


def write_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Change the weights and make all checksums right again."""
    tensors = {name: value.clone() for name, value in load_file(folder / WEIGHTS).items()}
    change(tensors)
    save_file(tensors, folder / WEIGHTS)
    checksum = hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest()
    reseal(folder, lambda manifest: manifest["files"].update({WEIGHTS: checksum}))


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda t: t[QUERY].mul_(1.5), id="one matrix scaled"),
        pytest.param(lambda t: t["classifier.bias"].add_(0.1), id="one bias moved"),
        pytest.param(lambda t: t[QUERY].fill_(float("nan")), id="not a number"),
        pytest.param(lambda t: t.update({QUERY: t[QUERY].int()}), id="whole numbers"),
        pytest.param(lambda t: t.update({QUERY: t[QUERY].T.contiguous()}), id="transposed"),
        pytest.param(lambda t: t.update({QUERY: t[QUERY].flatten()}), id="flattened"),
        pytest.param(lambda t: t.update({"more": torch.zeros(1)}), id="tensor too many"),
        pytest.param(lambda t: t.pop(QUERY), id="tensor missing"),
        pytest.param(lambda t: t["bert.embeddings.position_ids"].add_(3), id="another buffer"),
    ],
)
def test_weights_changed_on_purpose_are_caught(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]):
    write_weights(folder, change)
    with pytest.raises(ArtifactError):
        rmtkd.load(folder)


def test_what_a_configuration_could_name_to_run_is_not_looked_at(folder: Path):
    """A kernel of the hub, a modelling file, a number of labels to unfold: loading goes on as if there were none."""
    before = logits(rmtkd.load(folder), random_rows())

    def change(manifest: dict[str, Any]) -> None:
        manifest["config"] |= {
            "attn_implementation": "somebody/kernel",
            "_attn_implementation": "somebody/kernel",
            "auto_map": {"AutoModel": "evil.py--Model"},
            "num_labels": 10**15,
            "quantization_config": {"quant_method": "evil"},
        }

    (folder / "evil.py").write_text("raise SystemExit")
    reseal(folder, change)
    assert torch.equal(logits(rmtkd.load(folder), random_rows()), before)
