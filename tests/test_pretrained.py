"""A compressed model is one of transformers': its class and configuration say its widths, and what transformers offers
works on it, with `rmtkd` and without."""

import copy
import json
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification, AutoTokenizer, pipeline

import rmtkd
from conftest import FAMILY_NAMES, assert_untouched, make_tokenizer, pair_batches, snapshot, tiny, tiny_bert
from rmtkd import artifact, modeling_rmtkd
from rmtkd.batches import logits
from rmtkd.cutting import cut_in_order
from rmtkd.modules import split_embedding
from rmtkd.pretrained import described, presented, save_tokenizer
from rmtkd.sites import find_family, find_sites


def run(model: nn.Module, batch: Any) -> torch.Tensor:
    with torch.no_grad():
        return logits(model.eval(), batch)


def cut(model: nn.Module, widths: dict[str, int]) -> nn.Module:
    """The model at these widths, of sites by their last name, and full where nothing is said."""
    sites = find_sites(model)
    kept = {site.name: widths.get(site.name, widths.get(site.shares.split(".")[-1], site.width)) for site in sites}
    narrowed = [site for site in sites if kept[site.name] < site.width]
    return cut_in_order(model, narrowed, kept, pair_batches(model))[0].eval()


def uneven(model: nn.Module) -> nn.Module:
    """Every width cut, and the last layer's more."""
    last = find_sites(model)[-1].name
    return cut(model, {"word": 8, "head": 8, "ffn": 24, last: 16})


def in_levels(model: nn.Module) -> nn.Module:
    """Every width cut, and tokens in three tables, the first of them whole."""
    path = find_family(model).word_embeddings
    counts = torch.arange(model.get_submodule(path).num_embeddings)  # type: ignore[call-overload]
    widths = {"embeddings.word.1": 8, "embeddings.word.2": 2, "head": 8, "ffn": 24}
    return cut(split_embedding(model, path, counts, (5, 20)), widths)


FFN_ALONE, WORDS_ALONE = {"ffn": 24}, {"word": 8}


# ---------------------------------------------------------------------------------------------- class and configuration


@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_a_presented_model_is_the_same_network_in_a_class_that_says_its_widths(name: str) -> None:
    model = uneven(tiny(name))
    before = snapshot(model)
    shown = presented(model)
    assert type(shown).__name__ == f"Rmtkd{find_family(model).model_class}"
    assert shown.config.model_type == f"rmtkd_{find_family(model).name}"  # type: ignore[union-attr]
    batch = pair_batches(model)[0]
    assert torch.equal(run(shown, batch), run(model, batch))
    assert find_sites(shown) == find_sites(model)
    assert_untouched(model, before)


@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_an_embedding_in_levels_is_said_saved_and_loaded(name: str, tmp_path: Path) -> None:
    model = in_levels(tiny(name))
    shown: Any = presented(model)
    size: Any = model.get_submodule(find_family(model).word_embeddings).num_embeddings
    assert shown.config.word_embedding_levels == [[5, None], [15, 8], [size - 20, 2]]
    batch = pair_batches(model)[0]
    assert torch.equal(run(shown, batch), run(model, batch))
    assert find_sites(shown) == find_sites(model)
    artifact.save(model, tmp_path / "model")
    loaded: Any = rmtkd.load(tmp_path / "model")
    assert torch.equal(run(loaded, batch), run(model, batch))
    loaded.save_pretrained(tmp_path / "again")
    again, report = AutoModelForSequenceClassification.from_pretrained(tmp_path / "again", output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert torch.equal(run(again, batch), run(model, batch))
    assert described(again)[1].to_dict() == described(loaded)[1].to_dict()


@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_widths_that_a_stock_configuration_can_say_are_said_by_it(name: str) -> None:
    model = cut(tiny(name), FFN_ALONE)
    shown: Any = presented(model)
    assert type(shown).__name__ == find_family(model).model_class
    assert type(shown).__module__.startswith("transformers.")
    assert getattr(shown.config, find_sites(model)[-1].setting or "?") == 24
    batch = pair_batches(model)[0]
    assert torch.equal(run(shown, batch), run(model, batch))


@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_an_uncut_model_stays_what_it_is(name: str) -> None:
    model = tiny(name)
    model_class, config = described(model)
    assert model_class is type(model)
    mine, theirs = config.to_dict(), model.config.to_dict()
    assert {key: mine[key] for key in theirs if key not in ("architectures",)} == {
        key: value for key, value in theirs.items() if key not in ("architectures",)
    }


def test_per_layer_widths_are_written_in_the_schema_of_transformers() -> None:
    _, config = described(uneven(tiny_bert()))
    assert config.to_dict()["per_layer_config"] == {
        "0": {"head_dim": 8, "intermediate_size": 24},
        "1": {"head_dim": 8, "intermediate_size": 16},
    }
    assert config.word_embedding_size == 8
    if hasattr(config, "is_heterogeneous"):  # transformers from 5.14 on reads it
        assert [layer.intermediate_size for layer in config.per_layer_config] == [24, 16]


@pytest.mark.skipif("eurobert" not in FAMILY_NAMES, reason="this transformers has no EuroBERT")
@pytest.mark.parametrize("widths", [FFN_ALONE, {"word": 8, "ffn": 24, "layer.1.ffn": 16}])
def test_a_head_width_of_the_stock_configuration_stays(widths: dict[str, int], tmp_path: Path) -> None:
    model = cut(tiny("eurobert", head_dim=8), widths)
    artifact.save(model, tmp_path / "model")
    loaded: Any = rmtkd.load(tmp_path / "model")
    assert loaded.config.head_dim == 8
    batch = pair_batches(model)[0]
    assert torch.equal(run(loaded, batch), run(model, batch))


def test_a_model_cut_twice_says_its_last_widths() -> None:
    once = presented(uneven(tiny_bert()))
    twice = presented(cut(once, {"word": 4, "head": 4, "ffn": 12}))
    config: Any = twice.config
    assert config.to_dict()["per_layer_config"]["1"] == {"head_dim": 4, "intermediate_size": 12}
    assert config.word_embedding_size == 4
    batch = pair_batches(once)[0]
    assert torch.equal(run(presented(twice), batch), run(twice, batch))


def test_there_is_one_class_of_each_name(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in vars(modeling_rmtkd) if name.startswith("RmtkdBert")]:
        monkeypatch.delitem(vars(modeling_rmtkd), name)
    model = modeling_rmtkd.RmtkdBertForSequenceClassification
    assert model.config_class is modeling_rmtkd.RmtkdBertConfig
    assert modeling_rmtkd.RmtkdBertForSequenceClassification is model


def test_a_narrowed_class_starts_at_random_from_its_configuration() -> None:
    shown: Any = presented(uneven(tiny_bert()))
    fresh = type(shown)(copy.deepcopy(shown.config))
    assert {name: p.shape for name, p in fresh.named_parameters()} == {n: p.shape for n, p in shown.named_parameters()}
    assert run(fresh, pair_batches(shown)[0]).isfinite().all()


# ---------------------------------------------------------------------------------------------- with rmtkd


@pytest.mark.parametrize("widths", [None, FFN_ALONE, WORDS_ALONE])
@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_the_auto_class_loads_a_folder_and_saves_it_again(name: str, widths: Any, tmp_path: Path) -> None:
    model = uneven(tiny(name)) if widths is None else cut(tiny(name), widths)
    artifact.save(model, tmp_path / "model")
    batch = pair_batches(model)[0]
    loaded, report = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model", output_loading_info=True)
    assert not any(report.values()), report
    assert torch.equal(run(loaded, batch), run(model, batch))
    loaded.save_pretrained(tmp_path / "again")
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "again")
    assert type(again) is type(loaded) is type(rmtkd.load(tmp_path / "model"))
    assert torch.equal(run(again, batch), run(model, batch))


@pytest.mark.parametrize("widths", [{"word": 8, "head": 8, "ffn": 24}, WORDS_ALONE, {"head": 8}, {"layer.0.ffn": 16}])
@pytest.mark.parametrize("name", ["bert", "distilbert", "albert"])
def test_a_stock_class_never_gives_half_a_model(name: str, widths: Any, tmp_path: Path) -> None:
    model = tiny(name)
    if name == "albert" and widths == {"layer.0.ffn": 16}:  # which has one layer, so that stock can say it
        widths = {"head": 8, **widths}
    artifact.save(cut(model, widths), tmp_path / "model")
    with pytest.raises((RuntimeError, ValueError)):
        type(model).from_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="Unrecognized configuration class"):
        AutoModel.from_pretrained(tmp_path / "model")  # no head: not what was compressed


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A compressed model with its tokenizer."""
    words = tmp_path_factory.mktemp("words")
    make_tokenizer().save_pretrained(words)
    path = tmp_path_factory.mktemp("models") / "small"
    artifact.save(uneven(tiny_bert()), path, extra_files=sorted(words.iterdir()))
    return path


def test_a_pipeline_classifies_text_with_it(folder: Path) -> None:
    classify = pipeline("text-classification", model=str(folder))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    scores = run(rmtkd.load(folder), tokenizer("good film", return_tensors="pt")).softmax(-1)
    (answer,) = classify("good film")
    assert answer["label"] == f"LABEL_{scores.argmax()}"
    assert answer["score"] == pytest.approx(float(scores.max()), abs=1e-6)


def test_a_tokenizer_read_by_the_general_class_makes_what_it_made(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    save_tokenizer(tokenizer, tmp_path)
    again = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
    assert "token_type_ids" in again("good", "film")
    assert "model_input_names" not in tokenizer.init_kwargs


def test_trainer_trains_it_further_and_its_checkpoint_loads(folder: Path, tmp_path: Path) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    before = snapshot(model)
    rows = [{"input_ids": [5, 6, 7, i % 40 + 5], "labels": i % 3} for i in range(32)]
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), max_steps=2, report_to=[], use_cpu=True, save_steps=2, disable_tqdm=True
    )
    transformers.Trainer(model=model, args=arguments, train_dataset=rows).train()  # type: ignore[arg-type]
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "checkpoint-2")
    assert_untouched(again, snapshot(model))
    assert any(not torch.equal(value, before[name]) for name, value in snapshot(again).items())
    smaller = cut(again, {"word": 4, "head": 4, "ffn": 8})  # and it is compressed again
    artifact.save(smaller, tmp_path / "smaller")
    batch = pair_batches(again)[0]
    assert torch.equal(run(rmtkd.load(tmp_path / "smaller"), batch), run(smaller, batch))


def test_what_compress_gives_back_can_be_saved_and_loaded_by_transformers(tmp_path: Path) -> None:
    model = tiny_bert()
    rows = [{**batch, "labels": run(model, batch).argmax(-1)} for batch in pair_batches(model)]
    small: Any = rmtkd.compress(model, train=rows, selection=rows[:2], target="60%params", epochs=0.2).model
    small.save_pretrained(tmp_path / "small")
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "small")
    assert torch.equal(run(again, rows[0]), run(small, rows[0]))


@pytest.mark.parametrize(
    "imports",
    [
        "import rmtkd; from transformers import AutoModelForSequenceClassification as A",
        "from transformers import AutoModelForSequenceClassification as A; import rmtkd",
        "import transformers, rmtkd; transformers.AutoConfig; A = transformers.AutoModelForSequenceClassification",
        "import rmtkd; from transformers.models.auto.modeling_auto import AutoModelForSequenceClassification as A",
        "import rmtkd; from transformers import BertForSequenceClassification, AutoModelForSequenceClassification as A",
    ],
)
def test_importing_rmtkd_registers_the_classes_in_any_order(folder: Path, imports: str) -> None:
    done = python(sys.executable, f"{imports}\nprint(type(A.from_pretrained({str(folder)!r})))")
    assert "RmtkdBertForSequenceClassification" in done.stdout, done.stderr


# ---------------------------------------------------------------------------------------------- without rmtkd


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of an environment with everything that this one has but rmtkd."""
    root = tmp_path_factory.mktemp("bare")
    venv.EnvBuilder(symlinks=True).create(root)
    site_packages = Path(sysconfig.get_path("purelib", vars={"base": str(root), "platbase": str(root)}))
    for path in [Path(entry) for entry in sys.path if entry.endswith("site-packages")]:
        seen = {package.name.split("-")[0] for package in site_packages.iterdir()}  # also name-version.dist-info
        for package in path.iterdir():
            if "rmtkd" not in package.name and package.suffix != ".pth" and package.name.split("-")[0] not in seen:
                (site_packages / package.name).symlink_to(package)
    return root / "bin" / "python"


def python(interpreter: Path | str, script: str, home: Path | None = None) -> subprocess.CompletedProcess[str]:
    environment = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    if home is not None:
        environment |= {"HF_HOME": str(home), "HOME": str(home)}
    return subprocess.run(
        [str(interpreter), "-c", script], capture_output=True, text=True, check=False, env=environment, timeout=120
    )


LOAD = """
import importlib.util, json, pickle, sys, torch
assert importlib.util.find_spec("rmtkd") is None
from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline
folder, again, options = sys.argv_here
model = AutoModelForSequenceClassification.from_pretrained(folder, **options).eval()
ids = torch.tensor([[5, 6, 7, 8, 9]])
answer = model(input_ids=ids).logits
model.save_pretrained(again)
same = AutoModelForSequenceClassification.from_pretrained(again, **options).eval()
torch.testing.assert_close(same(input_ids=ids).logits, answer)
pickle.dumps(model)
label = pipeline("text-classification", model=folder, **options)("good film")[0]["label"]
print(json.dumps([type(model).__name__, answer.tolist(), label]))
"""


def bare_load(bare: Path, folder: Path, tmp_path: Path, **options: Any) -> subprocess.CompletedProcess[str]:
    here = repr([str(folder), str(tmp_path / "again"), options])
    return python(bare, LOAD.replace("sys.argv_here", here), tmp_path)


def test_without_rmtkd_the_modelling_file_loads_the_same_model(bare: Path, folder: Path, tmp_path: Path) -> None:
    done = bare_load(bare, folder, tmp_path, trust_remote_code=True)
    assert done.returncode == 0, done.stderr
    name, answer, label = json.loads(done.stdout.splitlines()[-1])
    assert name == "RmtkdBertForSequenceClassification"
    model = rmtkd.load(folder)
    torch.testing.assert_close(torch.tensor(answer), run(model, {"input_ids": torch.tensor([[5, 6, 7, 8, 9]])}))
    assert label == pipeline("text-classification", model=str(folder))("good film")[0]["label"]


def test_without_rmtkd_uniform_widths_load_as_a_stock_model(bare: Path, tmp_path: Path) -> None:
    make_tokenizer().save_pretrained(tmp_path / "words")
    model = cut(tiny_bert(), FFN_ALONE)
    artifact.save(model, tmp_path / "model", extra_files=sorted((tmp_path / "words").iterdir()))
    assert not (tmp_path / "model" / "modeling_rmtkd.py").exists()
    done = bare_load(bare, tmp_path / "model", tmp_path)
    assert done.returncode == 0, done.stderr
    name, answer, _ = json.loads(done.stdout.splitlines()[-1])
    assert name == "BertForSequenceClassification"
    torch.testing.assert_close(torch.tensor(answer), run(model, {"input_ids": torch.tensor([[5, 6, 7, 8, 9]])}))


@pytest.mark.parametrize("trust", [False, None])
def test_without_rmtkd_and_without_trust_there_is_a_clear_error(
    bare: Path, folder: Path, tmp_path: Path, trust: bool | None
) -> None:
    done = bare_load(bare, folder, tmp_path, **({} if trust is None else {"trust_remote_code": trust}))
    assert done.returncode != 0
    assert "trust_remote_code=True" in done.stderr.splitlines()[-1], done.stderr


def test_without_rmtkd_and_without_the_modelling_file_there_is_a_clear_error(
    bare: Path, folder: Path, tmp_path: Path
) -> None:
    for file in folder.iterdir():
        if file.suffix != ".py":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    done = bare_load(bare, tmp_path, tmp_path, trust_remote_code=True)
    assert done.returncode != 0
    assert "modeling_rmtkd.py" in done.stderr, done.stderr
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "auto_map": {}}))
    done = bare_load(bare, tmp_path, tmp_path, trust_remote_code=True)
    assert done.returncode != 0
    assert "rmtkd_bert" in done.stderr.splitlines()[-1] or "rmtkd_bert" in done.stderr, done.stderr


def test_the_modelling_file_needs_torch_and_transformers_alone() -> None:
    source = Path(modeling_rmtkd.__file__).read_text()
    imports = [
        line.split()[1].split(".")[0] for line in source.splitlines() if line.strip().startswith(("import", "from"))
    ]
    assert set(imports) <= {"torch", "transformers", "collections", "contextlib", "typing", "warnings"}
    assert AutoConfig is transformers.AutoConfig
