"""The rows of a task never change roles; what cannot be used as rows or as a model is refused by name."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import BertConfig, BertForSequenceClassification, BertForTokenClassification, BertModel, BertTokenizer

from conftest import Sentiment, make_tokenizer, random_rows, tiny, tiny_bert
from rmtkd import artifact, recipes
from rmtkd.errors import ArtifactError, DataError, OptionError, UnsupportedModelError
from rmtkd.recipes import TokenRows, digits
from rmtkd.recipes.checkpoints import load_classifier, load_tokenizer, start_classifier
from rmtkd.recipes.recipe import Rows, Source

TWO = ("negative", "positive")
NO_MODEL = Source(model=torch.nn.Identity())


def source(tokenizer: Any = None) -> Source:
    """A tiny model with a tokenizer of a few words."""
    return Source(model=tiny_bert(labels=2), tokenizer=tokenizer or make_tokenizer())


# The list of recipes


def test_every_recipe_has_its_own_name():
    assert [recipes.get(name).name for name in recipes.names()] == list(recipes.names())


def test_an_unknown_recipe_is_refused_with_the_nearest():
    with pytest.raises(OptionError, match="Did you mean 'sst2'"):
        recipes.get("sst")


# Rows of tokens


def texts(rows: TokenRows) -> list[tuple[int, ...]]:
    """All rows of one pass as token ids without padding."""
    return [
        tuple(ids[mask.bool()].tolist())
        for batch in rows
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    ]


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("count", [0, 1, 16, 61])
def test_every_row_comes_exactly_once_a_pass_with_its_label(count: int, shuffle: bool):
    rows = random_rows(count, shuffle=shuffle)
    expected = sorted((tuple(ids), int(label)) for ids, label in zip(rows.ids, rows.labels, strict=True))
    labels = [int(label) for batch in rows for label in batch["labels"]]
    assert sorted(zip(texts(rows), labels, strict=True)) == expected
    assert len(rows) == len(list(rows)) == -(-count // 16)


def test_padding_is_masked_and_only_padding():
    rows = TokenRows([[5, 6, 7], [8], [9, 9]], [0, 1, 2], pad_id=99)
    (batch,) = rows
    assert batch["input_ids"].tolist() == [[8, 99, 99], [9, 9, 99], [5, 6, 7]]
    assert batch["attention_mask"].tolist() == [[1, 0, 0], [1, 1, 0], [1, 1, 1]]
    assert batch["labels"].tolist() == [1, 2, 0]


def test_batches_are_as_long_as_a_multiple_of_eight_tokens_or_as_the_longest_row():
    def shapes(*lengths: int) -> list[int]:
        rows = TokenRows([[5] * length for length in lengths], None, batch_size=1)
        return [batch["input_ids"].shape[1] for batch in rows]

    assert shapes(3, 8, 9, 20) == [8, 8, 16, 20]
    assert shapes(5, 5) == [5, 5]


@pytest.mark.parametrize("shuffle", [False, True])
def test_a_row_keeps_its_number_whatever_the_order(shuffle: bool):
    rows = random_rows(61, shuffle=shuffle)
    for epoch in range(2):
        rows.set_epoch(epoch)
        for batch in rows:
            for number, ids, mask in zip(
                *(batch[key] for key in ("row_ids", "input_ids", "attention_mask")), strict=True
            ):
                assert ids[mask.bool()].tolist() == list(rows.ids[int(number)])
        assert batch["row_ids"].dtype == torch.int64


def test_rows_without_labels_have_no_key_for_them():
    (batch,) = TokenRows([[5, 6, 7], [8]], None, types=[[0, 1, 1], [1]])
    assert set(batch) == {"input_ids", "attention_mask", "token_type_ids", "row_ids"}
    assert batch["token_type_ids"].tolist() == [[1, 0, 0], [0, 1, 1]]


def test_the_order_is_new_in_each_epoch_and_the_same_for_a_seed():
    def order(seed: int, epoch: int) -> list[tuple[int, ...]]:
        rows = random_rows(64, shuffle=True)
        rows.seed = seed
        rows.set_epoch(epoch)
        return texts(rows)

    assert order(0, 0) == order(0, 0)
    assert order(0, 0) != order(0, 1)
    assert order(0, 0) != order(1, 0)
    assert sorted(order(0, 0)) == sorted(order(1, 1))


def test_held_out_rows_keep_one_order():
    rows = random_rows(64)
    first = texts(rows)
    rows.set_epoch(3)
    assert texts(rows) == first


# Digits


def scans(rows: TokenRows) -> set[tuple[int, ...]]:
    return {tuple(map(int, ids)) for ids in rows.ids}


@pytest.fixture(scope="module")
def digit_rows() -> Rows:
    return recipes.get("digits").rows(None, NO_MODEL, 0)


def test_digits_have_the_promised_rows(digit_rows: Rows):
    assert [len(part.ids) for part in (digit_rows.train, digit_rows.selection, digit_rows.report)] == [5985, 150, 450]


def test_digits_held_out_are_never_among_training_scans(digit_rows: Rows):
    from sklearn.datasets import load_digits

    data: Any = load_digits()
    images = data.images
    order = np.random.default_rng(0).permutation(len(images))
    held, trained = images[order[:600]], images[order[600:]]
    assert np.array_equal(digit_rows.report.ids, digits.tokens(held[:450]))
    assert np.array_equal(digit_rows.selection.ids, digits.tokens(held[450:]))
    copies = np.concatenate([digits.tokens(digits.shifted(trained, *shift)) for shift in digits.SHIFTS])
    assert np.array_equal(digit_rows.train.ids, copies)
    originals = {image.tobytes() for image in trained}
    assert not any(image.tobytes() in originals for image in held)


def test_digits_held_out_are_the_same_for_every_seed(digit_rows: Rows):
    other = recipes.get("digits").rows(None, NO_MODEL, 7)
    assert scans(other.selection) == scans(digit_rows.selection)
    assert scans(other.report) == scans(digit_rows.report)
    assert texts(other.train) != texts(digit_rows.train)


@pytest.mark.parametrize("shift", [(0, 1), (0, -1), (1, 0), (-1, 0)])
def test_a_shifted_scan_is_the_scan_moved_with_zeros_coming_in(shift: tuple[int, int]):
    scan = np.arange(1, 65).reshape(1, 8, 8)
    padded = np.pad(scan[0], 1)
    down, right = shift
    assert np.array_equal(digits.shifted(scan, down, right)[0], padded[1 - down : 9 - down, 1 - right : 9 - right])


def test_a_scan_becomes_its_patches_in_four_levels():
    scan = np.zeros((1, 8, 8))
    scan[0, 0, 0], scan[0, 7, 7] = 16, 16
    ids = digits.tokens(scan)[0]
    assert ids.tolist() == [digits.START, 3, *[0] * 14, 3 * 4**3]


def test_digits_of_a_file_are_read_as_their_scans(tmp_path: Path):
    from sklearn.datasets import load_digits

    data: Any = load_digits()
    pixels = [row.tolist() for row in data.data[:7]]
    pq.write_table(pa.table({"pixels": pixels, "label": data.target[:7].tolist()}), tmp_path / "rows.parquet")
    rows = recipes.get("digits").file_rows(tmp_path / "rows.parquet", NO_MODEL)
    assert np.array_equal(rows.ids, digits.tokens(data.images[:7]))
    assert rows.labels.tolist() == data.target[:7].tolist()


NO_SCANS = [[0.0] * 63, [0.0] * 63 + [17.0], [0.0] * 63 + [None], [float("nan")] * 64, ["3"] * 64, [[3]] * 64]


@pytest.mark.parametrize("scan", NO_SCANS)
def test_digits_that_are_no_scans_are_refused(tmp_path: Path, scan: list[Any]):
    pq.write_table(pa.table({"pixels": [scan], "label": [1]}), tmp_path / "rows.parquet")
    with pytest.raises(DataError, match="64 grey levels"):
        recipes.get("digits").file_rows(tmp_path / "rows.parquet", NO_MODEL)


def test_the_digits_teacher_starts_from_its_seed_and_leaves_the_random_numbers_alone():
    before = torch.get_rng_state()
    first, second, other = (recipes.get("digits").start(None, seed, None).model for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    name = "bert.encoder.layer.0.output.dense.weight"
    assert torch.equal(first.get_parameter(name), second.get_parameter(name))
    assert not torch.equal(first.get_parameter(name), other.get_parameter(name))
    with pytest.raises(DataError, match="starts from nothing"):
        recipes.get("digits").start("bert-base-uncased", 0, None)


# Checkpoints


def test_a_trained_classifier_loads_with_its_tokenizer(sentiment: Sentiment):
    source = load_classifier(str(sentiment.teacher), labels=TWO)
    assert not source.model.training
    assert source.tokenizer("a good film")["input_ids"] == make_tokenizer()("a good film")["input_ids"]
    assert source.tokenizer.model_max_length == 40


def test_our_folder_loads_with_its_tokenizer_whatever_its_kind(tmp_path: Path):
    """Also a tokenizer of the old form, a list of words and nothing else."""
    model = tiny_bert(labels=2)
    model.save_pretrained(tmp_path / "old")
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "bad", "film", "##s"]
    (tmp_path / "old" / "vocab.txt").write_text("\n".join(vocabulary))
    old = load_classifier(str(tmp_path / "old"), labels=TWO)
    assert isinstance(old.tokenizer, BertTokenizer)
    old.tokenizer.save_pretrained(tmp_path / "words")
    artifact.save(model, tmp_path / "ours", extra_files=sorted((tmp_path / "words").iterdir()))
    ours = load_classifier(str(tmp_path / "ours"), labels=TWO)
    assert ours.tokenizer("Good films")["input_ids"] == old.tokenizer("Good films")["input_ids"] == [2, 5, 7, 8, 3]
    assert str(tmp_path).encode() not in b"".join(path.read_bytes() for path in (tmp_path / "ours").iterdir())


def test_words_and_merges_alone_are_a_tokenizer(tmp_path: Path):
    """As byte-pair tokenizers were written once."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    marks = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=marks, initial_alphabet=alphabet)
    made.train_from_iterator(["good film bad plot"] * 5, trainer)
    model = tiny("roberta", vocab_size=made.get_vocab_size())
    model.save_pretrained(tmp_path)
    made.model.save(str(tmp_path))
    assert not any(tmp_path.glob("tokenizer*"))
    ids = load_tokenizer(str(tmp_path), model)("good film")["input_ids"]
    assert ids == [0, *made.encode("good film").ids, 2]


@pytest.mark.parametrize(("family", "name"), [("albert", "spiece.model"), ("xlm-roberta", "sentencepiece.bpe.model")])
def test_a_tokenizer_of_sentence_pieces_is_never_passed_over(tmp_path: Path, family: str, name: str):
    model = tiny(family)
    model.save_pretrained(tmp_path)
    assert load_tokenizer(str(tmp_path), model) is None
    (tmp_path / name).write_bytes(b"no pieces")
    with pytest.raises(DataError, match="must hold a tokenizer"):
        load_tokenizer(str(tmp_path), model)


def save(model: Any, path: Path) -> None:
    model.save_pretrained(path)
    make_tokenizer().save_pretrained(path)


TINY: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 48,
}


def write_pickle(path: Path) -> None:
    tiny_bert(labels=2).config.save_pretrained(path)
    (path / "pytorch_model.bin").write_bytes(b"\x80\x04cos\nsystem\n(S'touch " + bytes(path / "executed") + b"'\ntR.")


def break_weights(path: Path) -> None:
    save(tiny_bert(labels=2), path)
    (path / "model.safetensors").write_bytes(b"no weights")


def break_config(path: Path) -> None:
    save(tiny_bert(labels=2), path)
    (path / "config.json").write_text("{")


def want_remote_code(path: Path) -> None:
    save(tiny_bert(labels=2), path)
    config = {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Config", "AutoModel": "evil.Model"}}
    (path / "config.json").write_text(json.dumps(config))
    (path / "evil.py").write_text("raise SystemExit")


def break_tokenizer(path: Path) -> None:
    save(tiny_bert(labels=2), path)
    (path / "tokenizer.json").write_text("{")


def small_vocabulary(path: Path) -> None:
    save(tiny_bert(labels=2, vocab_size=10), path)


def inside_a_run(path: Path) -> None:
    artifact.save(tiny_bert(labels=2), path / "model")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "There is no folder"),
        (Path.touch, "There is no folder"),
        (Path.mkdir, "must be a model folder or a hub name"),
        (inside_a_run, "Did you mean '.*/model'"),
        (break_config, "must be a model folder or a hub name"),
        (break_weights, "must be a model folder or a hub name"),
        (write_pickle, "must be a model folder or a hub name"),
        (want_remote_code, "must be a model folder or a hub name"),
        (break_tokenizer, "must hold a tokenizer"),
        (small_vocabulary, "the tokenizer .* must be the model's, of at most 10 tokens"),
        (lambda path: save(BertModel(BertConfig(**TINY)), path), "lacks .* such as classifier"),
        (lambda path: save(BertForTokenClassification(BertConfig(**TINY)), path), "lacks .* such as bert.pooler"),
        (lambda path: save(tiny_bert(labels=1), path), "head of the 2 classes negative, positive. .* has 1"),
        (lambda path: save(tiny_bert(labels=3), path), "head of the 2 classes negative, positive. .* has 3"),
    ],
)
def test_what_is_no_trained_classifier_is_refused(tmp_path: Path, make: Callable[[Path], object], message: str):
    make(tmp_path / "model")
    with pytest.raises(DataError, match=message):
        load_classifier(str(tmp_path / "model"), labels=TWO)
    assert not list(tmp_path.rglob("executed"))


def test_an_altered_folder_of_ours_is_refused(tmp_path: Path):
    artifact.save(tiny_bert(labels=2), tmp_path / "ours")
    (tmp_path / "ours" / "README.md").write_text("another")
    with pytest.raises(ArtifactError):
        load_classifier(str(tmp_path / "ours"), labels=TWO)


def test_a_start_has_a_fresh_head_of_the_labels_by_its_seed(tmp_path: Path):
    save(BertModel(BertConfig(**TINY)), tmp_path / "base")
    before = torch.get_rng_state()
    first, second, other = (start_classifier(str(tmp_path / "base"), TWO, seed).model for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    assert isinstance(first, BertForSequenceClassification)
    assert first.config.id2label == {0: "negative", 1: "positive"}
    head = "classifier.weight"
    assert torch.equal(first.get_parameter(head), second.get_parameter(head))
    assert not torch.equal(first.get_parameter(head), other.get_parameter(head))


def test_a_start_that_could_not_be_narrowed_later_is_refused_at_once(tmp_path: Path):
    from transformers import ConvBertConfig, ConvBertModel

    save(
        ConvBertModel(ConvBertConfig(vocab_size=50, hidden_size=32, num_hidden_layers=1, num_attention_heads=4)),
        tmp_path / "c",
    )
    with pytest.raises(UnsupportedModelError, match="ConvBertForSequenceClassification"):
        start_classifier(str(tmp_path / "c"), TWO, 0)
