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
from transformers import BertForSequenceClassification

import rmtkd
from conftest import assert_untouched, make_tokenizer, random_rows, snapshot, tiny_bert
from rmtkd import artifact, batches
from rmtkd.artifact.folder import CODE, OWN_FILES, WEIGHTS
from rmtkd.artifact.manifest import FIELDS, FORMAT, MANIFEST, sealed, vouch
from rmtkd.artifact.self_test import SELF_TEST
from rmtkd.cutting import cut_in_order
from rmtkd.errors import ArtifactError, OptionError, UnsupportedModelError
from rmtkd.recipes.rows import TokenRows
from rmtkd.sites import find_sites

FILES = [*sorted(OWN_FILES - {CODE[1]}), "tokenizer.json", "tokenizer_config.json"]
HALF = {"embeddings.word": 16, "ffn": 24, "head": 8, "heads": 1}


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
    assert [file.name for file in files] == sorted(FILES)
    assert len({file.stat().st_mode for file in files}) == 1
    assert [path.name for path in original.parent.iterdir()] == ["small"]


def test_every_file_but_the_manifest_has_its_size_and_checksum(original: Path):
    files = json.loads((original / MANIFEST).read_text())["files"]
    assert files == {
        path.name: {"bytes": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
        for path in original.iterdir()
        if path.name != MANIFEST
    }


def test_no_file_holds_a_pickle(original: Path):
    for file in original.iterdir():
        content = file.read_bytes()
        assert not content.startswith((b"\x80", b"PK")), file
        with pytest.raises(Exception):  # noqa: B017 - whatever the disassembler says of bytes that are no pickle
            list(pickletools.genops(content))
        if file.suffix != ".safetensors":
            content.decode()
            continue
        size = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + size])
        tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
        # The tensors fill the file to its last byte: there is no room for anything else.
        assert 8 + size + max(entry["data_offsets"][1] for entry in tensors.values()) == len(content)


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
    expected = torch.randint(0, 50, (2, 8), generator=torch.Generator().manual_seed(0))
    assert torch.equal(load_file(original / SELF_TEST)["inputs.input_ids"], expected)


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

    monkeypatch.setattr("rmtkd.artifact.folder.versions", interrupt)  # when all is written but the manifest
    with pytest.raises(KeyboardInterrupt):
        artifact.save(small, tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", sorted(OWN_FILES))
def test_an_extra_file_cannot_replace_one_of_ours(tmp_path: Path, small: torch.nn.Module, name: str):
    (tmp_path / name).write_text("{}")
    with pytest.raises(ArtifactError, match="has a name of ours"):
        artifact.save(small, tmp_path / "model", extra_files=[tmp_path / name])
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_extra_files_of_one_name_are_refused(tmp_path: Path, small: torch.nn.Module):
    files = [tmp_path / folder / "words.txt" for folder in ("one", "two")]
    for file in files:
        file.parent.mkdir()
        file.write_text("a")
    with pytest.raises(ArtifactError, match="Got two named words"):
        artifact.save(small, tmp_path / "model", extra_files=files)


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
    widths = {site.name: -(-site.width // 2) for site in sites}
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


def test_a_maker_may_change_the_card_add_files_and_remove_them(folder: Path):
    (folder / "README.md").write_text("# My model, under my licence")
    (folder / "LICENSE").write_text("mine")
    (folder / "tokenizer_config.json").unlink()
    assert rmtkd_unlisted(folder) is None
    rmtkd.seal(folder, ["README.md", "LICENSE", "tokenizer_config.json"])
    assert rmtkd_unlisted(folder) == ()
    (folder / "notes.txt").write_text("more")
    assert rmtkd_unlisted(folder) == ("notes.txt",)


def rmtkd_unlisted(folder: Path) -> tuple[str, ...] | None:
    """What nobody vouches for, or None where the folder is refused."""
    try:
        return rmtkd.inspect(folder).unlisted
    except ArtifactError:
        return None


@pytest.mark.parametrize(
    "name", [*sorted(OWN_FILES - {"README.md"}), "gone", "../small/README.md", "", ".", "/etc/hostname"]
)
def test_nobody_vouches_anew_for_what_the_model_is_made_of_or_what_is_elsewhere(folder: Path, name: str):
    before = (folder / MANIFEST).read_bytes()
    with pytest.raises(ArtifactError):
        rmtkd.seal(folder, [name])
    assert (folder / MANIFEST).read_bytes() == before


def test_sealing_one_file_does_not_hide_that_another_was_altered(folder: Path):
    (folder / "README.md").write_text("mine")
    (folder / "config.json").write_text("{}")
    with pytest.raises(ArtifactError, match=r"config\.json must be as it was written"):
        rmtkd.seal(folder, ["README.md"])


# What is refused


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


def test_a_folder_that_is_not_one_is_refused_and_told_what_it_is(folder: Path, tmp_path: Path):
    (tmp_path / "run").mkdir()
    shutil.copytree(folder, tmp_path / "run" / "model")
    (tmp_path / "theirs").mkdir()
    shutil.copy(folder / "config.json", tmp_path / "theirs")
    for name, hint in (
        ("run", "is a run. Its model is"),
        ("theirs", "AutoModelForSequenceClassification"),
        ("no", "no folder"),
    ):
        with pytest.raises(ArtifactError, match=hint):
            rmtkd.load(tmp_path / name)
    for path in (tmp_path, tmp_path / "gone", Path(__file__)):
        with pytest.raises(ArtifactError, match=r"must hold rmtkd\.json"):
            rmtkd.load(path)


def reseal(folder: Path, change: Callable[[dict[str, Any]], object] = lambda manifest: None) -> None:
    """Change the manifest and make all checksums right again, as somebody would who means it."""
    manifest = json.loads((folder / MANIFEST).read_text())
    del manifest["checksum"]
    manifest["files"] = {name: vouch(folder / name) for name in manifest["files"]}
    change(manifest)
    (folder / MANIFEST).write_text(sealed(manifest))


def test_resealing_alone_changes_nothing(folder: Path):
    reseal(folder)
    rmtkd.load(folder)


NOTHING = {"bytes": 0, "sha256": hashlib.sha256(b"").hexdigest()}
WORD = "bert.embeddings.word_embeddings.weight"
QUERY = "bert.encoder.layer.0.attention.self.query.weight"
SELF = "bert.encoder.layer.0.attention.self"


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda m: m["shapes"].update({QUERY: [16, 32]}), id="changed shape"),
        pytest.param(lambda m: m["shapes"].update({WORD: [10**15, 16]}), id="huge shape"),
        pytest.param(lambda m: m["shapes"].update({WORD: [10**15, 10**15]}), id="shape beyond 64 bits"),
        pytest.param(lambda m: m["shapes"].update({WORD: [-1, 16]}), id="negative shape"),
        pytest.param(lambda m: m["shapes"].update({WORD: "50"}), id="shape of text"),
        pytest.param(lambda m: m["shapes"].update({"bert.nothing": [1]}), id="parameter too many"),
        pytest.param(lambda m: m["shapes"].pop(QUERY), id="parameter missing"),
        pytest.param(lambda m: m.update(format=FORMAT + 1), id="unknown format"),
        pytest.param(lambda m: m.update(format="1"), id="format of text"),
        pytest.param(lambda m: m.update(format=True), id="format true"),
        pytest.param(lambda m: m.update(model_class="os.system"), id="unknown class"),
        pytest.param(lambda m: m.update(model_class="BertModel"), id="class without a head"),
        pytest.param(lambda m: m.update(model_class=["BertForSequenceClassification"]), id="class in a list"),
        pytest.param(lambda m: m["files"].update({"../x": NOTHING}), id="file above"),
        pytest.param(lambda m: m["files"].update({"/etc/passwd": NOTHING}), id="file elsewhere"),
        pytest.param(lambda m: m["files"].update({"..": NOTHING}), id="folder above"),
        pytest.param(lambda m: m["files"].update({"": NOTHING}), id="file without a name"),
        pytest.param(lambda m: m["files"].update({"a\0b": NOTHING}), id="file name with a zero byte"),
        pytest.param(lambda m: m["files"].update({"x" * 300: NOTHING}), id="file name that is too long"),
        pytest.param(lambda m: m["files"].pop(WEIGHTS), id="weights without a checksum"),
        pytest.param(lambda m: m["files"].clear(), id="no checksums"),
        pytest.param(lambda m: m["files"][WEIGHTS].pop("bytes"), id="no size"),
        pytest.param(lambda m: m["files"].update({WEIGHTS: m["files"][WEIGHTS]["sha256"]}), id="checksum alone"),
        pytest.param(lambda m: m.update(library="own"), id="another library"),
        pytest.param(lambda m: m.update(library="os"), id="unknown library"),
        pytest.param(lambda m: m.update(model_class="BertForSequenceClassification"), id="stock class"),
        pytest.param(lambda m: m.update(model_class="RmtkdRobertaForSequenceClassification"), id="another family"),
        pytest.param(lambda m: m["self_test"].update(own_forward=True), id="a forward of its own"),
        pytest.param(lambda m: m["self_test"].update(named_inputs=False), id="inputs without names"),
        pytest.param(lambda m: m["self_test"].clear(), id="nothing on the self-test"),
        *(pytest.param(lambda m, key=key: m.pop(key), id=f"no {key}") for key in FIELDS if key != "checksum"),
    ],
)
def test_a_manifest_changed_on_purpose_is_refused(folder: Path, change: Callable[[dict[str, Any]], object]):
    reseal(folder, change)
    with pytest.raises(ArtifactError):
        rmtkd.load(folder)


def own(entry: str, change: Callable[[Any], object]) -> Callable[[dict[str, Any]], object]:
    """A change of one of our entries in config.json."""
    return lambda config: change(config[entry])


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda c: c.update(hidden_size=10**15), id="huge width"),
        pytest.param(lambda c: c.update(vocab_size=10**15), id="huge vocabulary"),
        pytest.param(lambda c: c.update(num_hidden_layers=10**9), id="layers without end"),
        pytest.param(lambda c: c.update(num_hidden_layers=1), id="layer missing"),
        pytest.param(lambda c: c.update(hidden_act="os.system"), id="unknown activation"),
        pytest.param(lambda c: c.update(hidden_act="relu"), id="another activation"),
        pytest.param(lambda c: c.update(num_attention_heads="two"), id="heads of text"),
        pytest.param(lambda c: c.update(is_decoder=True), id="decoder"),
        pytest.param(lambda c: c.update(return_dict=False), id="outputs as a tuple"),
        pytest.param(lambda c: c.update(pad_token_id=99), id="padding outside the vocabulary"),
        pytest.param(lambda c: c.update(id2label=5), id="odd labels"),
        pytest.param(lambda c: c.pop("per_layer_config"), id="no widths"),
        pytest.param(lambda c: c.update(per_layer_config={"0": {"hidden_size": 16}}), id="another width"),
        pytest.param(lambda c: c.update(per_layer_config={"7": {"head_dim": 8}}), id="a layer that is not there"),
        pytest.param(lambda c: c.update(per_layer_config={"0": {"head_dim": 10**18}}), id="huge head"),
        pytest.param(lambda c: c.update(per_layer_config={"0": {"head_dim": -1}}), id="negative head"),
        pytest.param(lambda c: c.update(per_layer_config=5), id="widths that are none"),
        pytest.param(own("per_layer_config", lambda w: w["0"].pop("head_dim")), id="one width missing"),
        pytest.param(lambda c: c.update(word_embedding_size=10**15), id="huge table"),
        pytest.param(lambda c: c.pop("word_embedding_size"), id="embedding not factorised"),
        pytest.param(lambda c: c.update(head_dim=8), id="another head"),
        pytest.param(lambda c: c.pop("narrowed"), id="no table"),
        pytest.param(own("narrowed", lambda n: n["layers"].append("bert.pooler")), id="one more layer"),
        pytest.param(own("narrowed", lambda n: n["layers"].append("bert.nothing")), id="layer that is none"),
        pytest.param(own("narrowed", lambda n: n["head_dim"].update(groups=4)), id="other heads"),
        pytest.param(
            own("narrowed", lambda n: n["head_dim"]["attributes"].update({"attention.self.forward": "width"})),
            id="attribute that is no number",
        ),
        pytest.param(own("narrowed", lambda n: n["head_dim"]["attributes"].clear()), id="attributes missing"),
        pytest.param(
            own("narrowed", lambda n: n["head_dim"]["parameters"].update({"output.dense.bias": [0, 1]})),
            id="one more parameter",
        ),
        pytest.param(
            own("narrowed", lambda n: n.update(word_embedding_size="bert.embeddings.position_embeddings")),
            id="another embedding",
        ),
    ],
)
def test_a_configuration_changed_on_purpose_is_refused(folder: Path, change: Callable[[dict[str, Any]], object]):
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))
    reseal(folder)
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


def test_a_manifest_of_any_depth_is_refused(folder: Path):
    """Also one that can be read, but not written again."""
    text = (folder / MANIFEST).read_text()
    for depth in range(900, 1010):
        (folder / MANIFEST).write_text(f'{text.rstrip()[:-1]}, "more": {"[" * depth}{"]" * depth}}}')
        with pytest.raises(ArtifactError):
            rmtkd.load(folder)


def test_a_manifest_with_a_key_twice_is_refused(folder: Path):
    text = (folder / MANIFEST).read_text()
    (folder / MANIFEST).write_text(text.replace('{\n "format": 2,', '{\n "format": 2,\n "format": 2,', 1))
    with pytest.raises(ArtifactError, match="checksum differs"):
        rmtkd.load(folder)


@pytest.mark.parametrize("constant", [float("nan"), float("inf")])
def test_a_manifest_with_a_number_that_is_none_is_refused(folder: Path, constant: float):
    reseal(folder, lambda manifest: manifest["provenance"].update(loss=constant))
    with pytest.raises(ArtifactError, match="no JSON number"):
        rmtkd.load(folder)


Change = Callable[[dict[str, torch.Tensor]], object]


def rewrite(file: Path, change: Change) -> None:
    """Change tensors and make all checksums right again."""
    tensors = {name: value.clone() for name, value in load_file(file).items()}
    change(tensors)
    save_file(tensors, file)
    reseal(file.parent)


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
        pytest.param(lambda t: t.update({"bert.embeddings.position_ids": torch.zeros(1, 24).long()}), id="a buffer"),
    ],
)
def test_weights_changed_on_purpose_are_caught(folder: Path, change: Change):
    rewrite(folder / WEIGHTS, change)
    with pytest.raises(ArtifactError):
        rmtkd.load(folder)


IDS, MASK = "inputs.input_ids", "inputs.attention_mask"


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda t: t["logits"][0, 0].fill_(99), id="wrong answer"),
        pytest.param(lambda t: t["logits"][0, 0].fill_(float("nan")), id="no number"),
        pytest.param(lambda t: t.update(logits=t["logits"][:1]), id="answers missing"),
        pytest.param(lambda t: t.update(logits=torch.zeros(0, 3)), id="no answers"),
        pytest.param(lambda t: t.pop("logits"), id="no logits"),
        pytest.param(lambda t: t[IDS][0, 0].fill_(10**6), id="outside the words"),
        pytest.param(lambda t: t.update({IDS: t[IDS].double()}), id="words that are no numbers"),
        pytest.param(lambda t: t.pop(IDS), id="no input"),
        pytest.param(lambda t: t.update({IDS: t[IDS].repeat(1, 9), MASK: t[MASK].repeat(1, 9)}), id="too long"),
    ],
)
def test_a_self_test_changed_on_purpose_is_caught(folder: Path, change: Change):
    rewrite(folder / SELF_TEST, change)
    with pytest.raises(ArtifactError):
        rmtkd.load(folder)


def test_what_a_configuration_could_name_to_run_is_not_looked_at(folder: Path):
    """A kernel of the hub, a modelling file, a quantisation: loading goes on as if there were none."""
    before = logits(rmtkd.load(folder), random_rows())
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "attn_implementation": "somebody/kernel",
        "_attn_implementation": "somebody/kernel",
        "auto_map": {"AutoModelForSequenceClassification": "evil.Model"},
        "num_labels": 10**15,
        "quantization_config": {"quant_method": "evil"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / CODE[0]).write_text("raise SystemExit")
    (folder / "evil.py").write_text("raise SystemExit")
    reseal(folder)
    assert torch.equal(logits(rmtkd.load(folder), random_rows()), before)
    assert "read it before" in (rmtkd.inspect(folder).code or "")
