"""Models and rows that several tests share: tiny, random, in float64 where a claim is exact."""

import importlib
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertForSequenceClassification, PreTrainedTokenizerFast

from rmtkd import recipes
from rmtkd.families import FAMILIES
from rmtkd.recipes.rows import TokenRows
from rmtkd.teaching import train_teacher

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(scope="session", autouse=True)
def ctrl_c_is_heard() -> None:
    """Also where the tests were started in the background of a shell, which lets its jobs ignore it."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Any]:
    """Imports a module of the benchmarks by name."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


def contents(folder: Path) -> dict[str, bytes]:
    """What is in every file of a folder, by its path."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def tiny_bert(*, seed: int = 0, labels: int = 3, layers: int = 2, **config: object) -> BertForSequenceClassification:
    """A BERT of width 32 with two heads of 16, random but far from its small initial values."""
    return tiny("bert", seed=seed, num_labels=labels, num_hidden_layers=layers, **config)


FAMILY_NAMES = [family.name for family in FAMILIES if hasattr(transformers, family.model_class)]
"""Families that this version of transformers has."""

_SMALL: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 24,
    "pad_token_id": 0,
    "num_labels": 3,
}
_OWN: dict[str, dict[str, Any]] = {
    "roberta": {"pad_token_id": 1, "type_vocab_size": 1, "max_position_embeddings": 26},
    "electra": {"embedding_size": 16},
    "distilbert": {"hidden_dim": 48},
    "albert": {"embedding_size": 16, "num_hidden_layers": 3},
    "modernbert": {"local_attention": 8, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2},
    "eurobert": {"num_key_value_heads": 1, "bos_token_id": 1, "eos_token_id": 2, "mask_token_id": 3},
}
"""Where a family differs: what is typical of it, at small size."""
_OWN |= {"xlm-roberta": _OWN["roberta"], "camembert": _OWN["roberta"]}


def tiny(name: str, *, seed: int = 0, **config: Any) -> Any:
    """A model of a family, of width 32 with two heads of 16, random but far from its small initial values."""
    model_class = getattr(transformers, next(family.model_class for family in FAMILIES if family.name == name))
    torch.manual_seed(seed)
    model = model_class(model_class.config_class(**{**_SMALL, **_OWN.get(name, {}), **config})).eval()
    for parameter_name, parameter in model.named_parameters():
        if "norm" not in parameter_name.lower():
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def pair_batches(model: Any, count: int = 20, *, seed: int = 0) -> list[dict[str, torch.Tensor]]:
    """Rows of two sequences in padded batches, with the second's token types where the model knows any."""
    config = model.config
    batches = []
    for batch in random_rows(count, seed=seed, batch_size=10):
        mask = batch["attention_mask"]
        ids = batch["input_ids"].clamp_min(2).masked_fill(mask == 0, config.pad_token_id)
        if getattr(config, "type_vocab_size", 0) > 1:
            second = torch.arange(ids.shape[1]) >= mask.sum(1, keepdim=True) // 2
            batch = {**batch, "token_type_ids": second.long() * mask}
        batches.append({**batch, "input_ids": ids})
    return batches


def random_rows(
    count: int = 64, *, seed: int = 0, labels: int = 3, batch_size: int = 16, shuffle: bool = False
) -> TokenRows:
    """Random token rows of unequal length, so that batches hold padding."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(4, 20, (count,), generator=generator)
    ids = [torch.randint(1, 50, (int(n),), generator=generator).tolist() for n in lengths]
    classes = torch.randint(0, labels, (count,), generator=generator).tolist()
    return TokenRows(ids, classes, batch_size=batch_size, seed=seed if shuffle else None)


@pytest.fixture
def model() -> BertForSequenceClassification:
    return tiny_bert()


@pytest.fixture
def rows() -> TokenRows:
    return random_rows()


@pytest.fixture
def data_folder() -> Path:
    """The folder of real data, named by RMTKD_DATA."""
    folder = os.environ.get("RMTKD_DATA")
    if not folder:
        pytest.skip("RMTKD_DATA does not name the folder of real data")
    return Path(folder)


def snapshot(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Copies of all parameters and buffers, to be held against the model later."""
    return {name: tensor.clone() for name, tensor in [*model.named_parameters(), *model.named_buffers()]}


def assert_untouched(model: torch.nn.Module, before: dict[str, torch.Tensor]) -> None:
    """Every parameter and buffer is there, under its name, with the bytes, dtype and shape that it had."""
    after = snapshot(model)
    assert list(after) == list(before)
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype, name
        assert torch.equal(tensor, after[name]), name


WORDS = ["a", "the", "of", "film", "plot", "actor", "scene", "very", "quite", "never", "story", "music", "end", "is"]


def write_sentiment_rows(path: Path, count: int, *, seed: int) -> Path:
    """A parquet file of random phrases with the columns of SST-2; the label is whether `good` or `bad` occurs."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    generator = torch.Generator().manual_seed(seed)
    texts, labels = [], []
    for _ in range(count):
        length, label = (int(torch.randint(*span, (), generator=generator)) for span in ((4, 14), (0, 2)))
        words = [WORDS[i] for i in torch.randint(0, len(WORDS), (length,), generator=generator)]
        words[int(torch.randint(0, length, (), generator=generator))] = ("bad", "good")[label]
        texts.append(" ".join(words))
        labels.append(label)
    pq.write_table(pa.table({"text": texts, "label": pa.array(labels, pa.int8())}), path)
    return path


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer that knows the words of `write_sentiment_rows`."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    vocabulary = {word: i for i, word in enumerate([*special, "good", "bad", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", vocabulary["[CLS]"]), ("[SEP]", vocabulary["[SEP]"])],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    )


@dataclass(frozen=True)
class Sentiment:
    """A little sentiment task on disk: `data` for `--data`, a random checkpoint to start from, a trained teacher."""

    data: Path
    start: Path
    teacher: Path


@pytest.fixture(scope="session")
def sentiment(tmp_path_factory: pytest.TempPathFactory) -> Sentiment:
    """The sst2 recipe on little phrases, with a teacher that is much better than chance: made once for all workers."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "sentiment"
    made = Sentiment(data=folder / "data", start=folder / "start", teacher=folder / "teacher")
    with alone_at(folder):
        if not made.teacher.exists():
            make_sentiment(made)
    return made


@contextmanager
def alone_at(folder: Path) -> Iterator[None]:
    """One process at a time; others wait."""
    folder.mkdir(exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        try:
            import fcntl
        except ImportError:  # a system without locks: one worker only
            yield
            return
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def make_sentiment(made: Sentiment) -> None:
    """Rows, checkpoint and teacher; the teacher is written last, and whole."""
    data, start, teacher = made.data, made.start, made.teacher
    data.mkdir()
    write_sentiment_rows(data / "sst2_train.parquet", 800, seed=1)
    write_sentiment_rows(data / "sst2_dev.parquet", 90, seed=2)
    model = tiny_bert(labels=2, max_position_embeddings=40)
    for name, parameter in model.named_parameters():
        if "LayerNorm" not in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(start)
    make_tokenizer().save_pretrained(start)
    train_teacher(recipes.get("sst2"), model=str(start), data=data, out=teacher, epochs=6.0, lr=3e-3, precision="fp32")
