"""The folder of a model of its own: the maker's class builds it, the folder says its widths, and it verifies itself."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import rmtkd
from conftest import assert_untouched, snapshot
from rmtkd import artifact, batches
from rmtkd.artifact.folder import WEIGHTS
from rmtkd.artifact.manifest import MANIFEST
from rmtkd.artifact.self_test import SELF_TEST
from rmtkd.batches import Calls
from rmtkd.cutting import cut_in_order
from rmtkd.errors import ArtifactError
from rmtkd.sites import Absent, Site, attention_sites, embedding_site, feed_forward_site
from test_artifact import reseal


class Reader(nn.Module):
    """Of words: an embedding, one attention, one feed-forward block, a norm with running statistics, and a mask that no
    state dict holds."""

    def __init__(self, width: int = 32, heads: int = 2):
        super().__init__()
        self.heads, self.head_width = heads, width // heads
        self.words = nn.Embedding(40, width)
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, 64), nn.Linear(64, width)
        self.norm, self.out = nn.BatchNorm1d(width), nn.Linear(width, 3)
        self.register_buffer("causal", torch.ones(16, 16).tril().bool(), persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.words(ids)
        q, k, v = (
            part(x).view(*ids.shape, self.heads, self.head_width).transpose(1, 2) for part in (self.q, self.k, self.v)
        )
        length = ids.shape[1]
        mask = self.get_buffer("causal")[:length, :length]
        x = x + self.o(nn.functional.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(-2))
        x = (x + self.down(torch.relu(self.up(x)))).mean(1)
        return self.out(self.norm(x))


def sites_of(model: nn.Module) -> tuple[Site, ...]:
    return (
        embedding_site(model, "words"),
        *attention_sites(
            model, "attention", query="q", key="k", value="v", output="o", heads=2, attributes={".head_width": "width"}
        ),
        feed_forward_site(model, "inner", writers=["up"], reader="down"),
    )


def ids(count: int, seed: int) -> Tensor:
    return torch.randint(0, 40, (count, 9), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def small() -> nn.Module:
    torch.manual_seed(0)
    model = Reader()
    model(ids(64, 1))  # running statistics of its own
    model.eval()
    sites = sites_of(model)
    widths = {"embeddings.word": 12, "attention.query_key": 4, "attention.value": 4, "inner": 20}
    return cut_in_order(model, sites, widths, [(ids(64, i),) for i in range(4)])[0].eval()


@pytest.fixture
def folder(small: nn.Module, tmp_path: Path) -> Path:
    artifact.save(small, tmp_path / "model", sites=sites_of(small), example=(ids(8, 3), torch.zeros(8).long()))
    return tmp_path / "model"


def test_its_class_builds_it_without_memory_and_it_is_the_same_to_the_bit(small: nn.Module, folder: Path):
    built = []

    def build() -> nn.Module:
        built.append(Reader())
        assert all(parameter.is_meta for parameter in built[0].parameters())
        return built[0]

    loaded = rmtkd.load(folder, build)
    assert len(built) == 1
    assert_untouched(loaded, snapshot(small))
    assert torch.equal(loaded(ids(5, 9)), small(ids(5, 9)))
    assert [(site.name, site.width) for site in sites_of(loaded)] == [(s.name, s.width) for s in sites_of(small)]
    assert not Reader().words.weight.is_meta  # building elsewhere is as ever


def test_a_class_that_takes_weights_from_elsewhere_while_it_is_built_comes_back(small: nn.Module, folder: Path):
    class Copying(Reader):
        def __init__(self) -> None:
            super().__init__()
            self.up.weight.data = torch.from_numpy(np.ones((64, 32), dtype=np.float32))
            assert self.words.weight.std().item() > 0

    assert_untouched(rmtkd.load(folder, Copying), snapshot(small))


def test_a_folder_holds_no_row_of_the_example(folder: Path):
    stored = load_file(folder / SELF_TEST)
    assert set(stored) == {"inputs.0", "logits"}
    mine = ids(8, 3)
    assert stored["inputs.0"].shape == (2, 9)
    assert not any(torch.equal(row, other) for row in stored["inputs.0"] for other in mine)
    assert stored["inputs.0"].min() >= mine.min() and stored["inputs.0"].max() <= mine.max()


def test_it_is_inspected_with_its_class_and_without(small: nn.Module, folder: Path):
    alone, built = rmtkd.inspect(folder), rmtkd.inspect(folder, Reader)
    assert alone.parameters == built.parameters == sum(p.numel() for p in small.parameters())
    assert alone.model_class == f"{Reader.__module__}.Reader"
    assert alone.self_test is None and "rmtkd.inspect(FOLDER, build)" in "\n".join(alone.lines())
    assert built.self_test == 0.0


def test_without_its_class_it_is_refused_by_name(folder: Path):
    with pytest.raises(ArtifactError, match=r"holds a .*\.Reader, .* Got no build"):
        rmtkd.load(folder)


class Wider(Reader):
    def __init__(self) -> None:
        super().__init__(width=64)


class Other(Reader):
    """The same parameters, another computation."""

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids.flip(1))


class Unbuildable(Reader):
    def __init__(self) -> None:
        super().__init__()
        raise TypeError("I want arguments")


@pytest.mark.parametrize("build", [Wider, Other, Unbuildable, lambda: nn.Linear(3, 3), lambda: None])
def test_another_class_is_refused(folder: Path, build: Callable[[], Any]):
    with pytest.raises(ArtifactError):
        rmtkd.load(folder, build)


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda m: m["narrowed"]["attributes"][0].__setitem__(2, 8), id="wrong width"),
        pytest.param(lambda m: m["narrowed"]["attributes"][0].__setitem__(2, "4"), id="width of text"),
        pytest.param(lambda m: m["narrowed"]["attributes"].append(["", "forward", 5]), id="no number"),
        pytest.param(lambda m: m["narrowed"]["attributes"].append(["", "__class__", 5]), id="class"),
        pytest.param(lambda m: m["narrowed"]["attributes"].clear(), id="attribute missing"),
        pytest.param(lambda m: m["narrowed"]["factorized"].append("nothing"), id="factorised nothing"),
        pytest.param(lambda m: m["narrowed"]["factorized"].clear(), id="embedding not factorised"),
        pytest.param(lambda m: m["narrowed"].clear(), id="nothing narrowed"),
        pytest.param(lambda m: m["shapes"].update({"up.weight": [10**12, 32]}), id="huge shape"),
        pytest.param(lambda m: m["shapes"].pop("up.weight"), id="shape missing"),
        pytest.param(lambda m: m.update(library="transformers"), id="another library"),
    ],
)
def test_a_manifest_changed_on_purpose_is_refused(folder: Path, change: Callable[[dict[str, Any]], object]):
    reseal(folder, change)
    with pytest.raises(ArtifactError):
        rmtkd.load(folder, Reader)


def test_a_forward_of_its_own_must_come_again(small: nn.Module, tmp_path: Path):
    def backwards(model: nn.Module, rows: Any) -> Tensor:
        return model(rows["words"].flip(1))

    (example,) = Calls([{"words": ids(8, 3), "labels": torch.zeros(8).long()}], backwards)
    artifact.save(small, tmp_path / "model", sites=sites_of(small), example=example)
    loaded = rmtkd.load(tmp_path / "model", Reader, forward=backwards)
    assert_untouched(loaded, snapshot(small))
    for forward in (None, lambda model, rows: model(rows["words"])):
        with pytest.raises(ArtifactError):
            rmtkd.load(tmp_path / "model", Reader, forward=forward)


def test_a_model_that_does_not_run_on_random_rows_is_saved_without_a_self_test(small: nn.Module, tmp_path: Path):
    def picky(model: nn.Module, rows: Any) -> Tensor:
        raise ValueError("not these rows")

    (example,) = Calls([{"words": ids(8, 3)}], picky)
    artifact.save(small, tmp_path / "model", sites=sites_of(small), example=example)
    assert not (tmp_path / "model" / SELF_TEST).exists()
    assert_untouched(rmtkd.load(tmp_path / "model", Reader), snapshot(small))
    told = "\n".join(rmtkd.inspect(tmp_path / "model", Reader).lines())
    assert "self-test: not run: the model did not run on random rows: not these rows" in told


@pytest.mark.parametrize("name", [WEIGHTS, SELF_TEST, MANIFEST, "README.md"])
def test_an_altered_file_is_refused(folder: Path, name: str):
    content = (folder / name).read_bytes()
    for changed in (content + b" ", content[:-1], b""):
        if changed == content:  # the card is empty
            continue
        (folder / name).write_bytes(changed)
        for open_it in (lambda: rmtkd.load(folder, Reader), lambda: rmtkd.inspect(folder)):
            with pytest.raises(ArtifactError):
                open_it()


def test_a_compressed_model_of_ones_own_comes_back_by_its_folder(tmp_path: Path):
    torch.manual_seed(1)
    teacher = Reader().eval()
    rows = [(x := ids(64, i), teacher(x).argmax(-1)) for i in range(6)]
    small = rmtkd.compress(
        teacher,
        train=rows[:4],
        selection=rows[4:],
        sites=sites_of(teacher),
        target="60%params",
        multiple_of=1,
        epochs=1.0,
        calibration_share=1.0,
        out=tmp_path / "run",
    )
    loaded = rmtkd.load(tmp_path / "run" / "model", Reader)
    assert torch.equal(batches.logits(loaded, rows[5]), batches.logits(small.model, rows[5]))
    assert json.loads((tmp_path / "run" / "model" / MANIFEST).read_text())["provenance"]["seed"] == 0
    small.save(tmp_path / "elsewhere")
    assert_untouched(rmtkd.load(tmp_path / "elsewhere", Reader), snapshot(small.model))


class Attention(nn.Module):
    """That knows its number of heads, and returns a pair as stock ones do."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(32, 32) for _ in range(4))
        self.heads = 2

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        q, k, v = (part(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (self.q, self.k, self.v))
        weights = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1)
        return self.o((weights @ v).transpose(1, 2).flatten(2)), None


class Attentive(nn.Module):
    """Two attentions beside a residual stream."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.first, self.second, self.out = nn.Embedding(40, 32), Attention(), Attention(), nn.Linear(32, 3)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.words(ids)
        x = x + self.first(x)[0]
        return self.out((x + self.second(x)[0]).mean(1))


def test_a_model_of_which_an_attention_has_no_heads_left_comes_back(tmp_path: Path):
    torch.manual_seed(0)
    model = Attentive().eval()
    sites = [
        site
        for name in ("first", "second")
        for site in attention_sites(
            model,
            name,
            query=f"{name}.q",
            key=f"{name}.k",
            value=f"{name}.v",
            output=f"{name}.o",
            heads=2,
            attributes={f"{name}.heads": "groups"},
            absent=Absent(module=name, after=("o",)),
        )
    ]
    widths = {"first.heads": 0, "second.heads": 1}
    fewer = [site for site in sites if site.name in widths]
    small, _ = cut_in_order(model, fewer, widths, [(ids(64, i),) for i in range(4)])
    artifact.save(small, tmp_path / "model", sites=sites, example=(ids(8, 3), torch.zeros(8).long()))
    loaded = rmtkd.load(tmp_path / "model", Attentive)
    assert torch.equal(loaded(ids(5, 9)), small(ids(5, 9)))
    assert_untouched(loaded, snapshot(small))
    assert loaded.get_submodule("second").heads == 1 and not hasattr(loaded.get_submodule("first"), "heads")
