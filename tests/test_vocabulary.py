"""The claims of `rmtkd.vocabulary`: on texts of kept tokens nothing changes, others fall apart into what is left."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import nn
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from typer.testing import CliRunner

import rmtkd
from conftest import Sentiment, assert_untouched, make_tokenizer, snapshot, tiny
from rmtkd import recipes
from rmtkd.cli import app
from rmtkd.errors import UnsupportedModelError
from rmtkd.measurement import count_parameters
from rmtkd.result import VOCABULARY, _facts
from rmtkd.vocabulary import Trimming, trim

WORDS = "bert.embeddings.word_embeddings"
TEXTS = ["the film is good", "a very good plot", "the music is never quite good", "films and plots"]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
SEEN, UNSEEN = TEXTS[:2], TEXTS[2:]


def made(kind: str) -> PreTrainedTokenizerFast:
    """A tokenizer of this kind, trained on all texts."""
    alphabet = sorted(set("".join(TEXTS)) - {" "})
    if kind == "WordPiece":
        backend = Tokenizer(models.WordPiece(unk_token="[UNK]"))
        backend.pre_tokenizer = pre_tokenizers.Whitespace()
        trainer: Any = trainers.WordPieceTrainer(special_tokens=SPECIAL, vocab_size=120, initial_alphabet=alphabet)
    elif kind == "BPE":
        backend = Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel()
        backend.decoder = decoders.ByteLevel()
        bytes_of = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(special_tokens=SPECIAL, vocab_size=330, initial_alphabet=bytes_of)
    else:
        words = sorted({f"▁{word}" for text in TEXTS for word in text.split()})
        pieces = [
            *((name, 0.0) for name in SPECIAL),
            *((c, -9.0) for c in ["▁", *alphabet]),
            *((w, -2.0) for w in words),
        ]
        backend = Tokenizer(models.Unigram(pieces, unk_id=1))
        backend.pre_tokenizer = pre_tokenizers.Metaspace()
        backend.add_special_tokens(SPECIAL)
        trainer = None
    if trainer is not None:
        backend.train_from_iterator(TEXTS * 5, trainer)
    marks = [("[CLS]", 2), ("[SEP]", 3)]
    backend.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=marks)
    names = {f"{name[1:-1].lower()}_token": name for name in SPECIAL}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **names)


def trimmed(kind: str) -> tuple[Any, Any, Any, Any, Trimming]:
    """Model and tokenizer before and after, trimmed to the seen texts."""
    tokenizer = made(kind)
    model = tiny("bert", vocab_size=len(tokenizer), pad_token_id=0)
    counts = torch.zeros(len(tokenizer), dtype=torch.int64)
    for text in SEEN:
        counts += torch.tensor(tokenizer(text)["input_ids"]).bincount(minlength=len(tokenizer))
    return model, tokenizer, *trim(model, tokenizer, WORDS, counts)


@pytest.mark.parametrize("kind", ["WordPiece", "BPE", "Unigram"])
def test_texts_of_kept_tokens_have_the_same_tokens_and_answers(kind: str) -> None:
    model, tokenizer, small, rewritten, trimming = trimmed(kind)
    before = snapshot(model)
    for text in SEEN:
        old, new = (torch.tensor([own(text)["input_ids"]]) for own in (tokenizer, rewritten))
        assert tokenizer.convert_ids_to_tokens(old[0]) == rewritten.convert_ids_to_tokens(new[0])
        assert torch.equal(small(new).logits, model(old).logits)
    assert len(rewritten) == len(trimming.kept) == small.config.vocab_size < trimming.before == len(tokenizer)
    assert rewritten.pad_token_id == small.config.pad_token_id == 0
    assert trimming.changed([tokenizer(text)["input_ids"] for text in SEEN]) == 0
    assert_untouched(model, before)


@pytest.mark.parametrize("kind", ["WordPiece", "BPE", "Unigram"])
def test_unseen_words_fall_apart_into_known_pieces(kind: str) -> None:
    _, tokenizer, _, rewritten, trimming = trimmed(kind)
    assert trimming.changed([tokenizer(text)["input_ids"] for text in UNSEEN]) > 0
    for text in UNSEEN:
        pieces = rewritten.tokenize(text)
        assert "[UNK]" not in pieces and len(pieces) > len(tokenizer.tokenize(text))
        spelled = "".join(piece.removeprefix("##") for piece in pieces).strip("Ġ▁").replace("Ġ", "▁").replace("▁", "")
        assert spelled == text.replace(" ", "")


@pytest.mark.parametrize("kind", ["WordPiece", "BPE", "Unigram"])
def test_a_rewritten_tokenizer_is_saved_and_read_again(kind: str, tmp_path: Any) -> None:
    _, _, _, rewritten, _ = trimmed(kind)
    rewritten.save_pretrained(tmp_path)
    again = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    assert [again(text)["input_ids"] for text in TEXTS] == [rewritten(text)["input_ids"] for text in TEXTS]


def test_a_tokenizer_of_another_kind_is_refused_by_name() -> None:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a")))
    with pytest.raises(UnsupportedModelError, match=r"of WordPiece, BPE, Unigram to be trimmed\. Got WordLevel"):
        trim(tiny("bert"), tokenizer, WORDS, torch.ones(50, dtype=torch.int64))


def test_a_table_that_was_cut_is_refused() -> None:
    model = tiny("bert")
    model.set_submodule(WORDS, nn.Identity())
    with pytest.raises(UnsupportedModelError, match="trimmed before its table is cut"):
        trim(model, made("BPE"), WORDS, torch.ones(50, dtype=torch.int64))


def test_a_run_with_a_trimmed_vocabulary_says_what_was_trimmed_and_travels_with_its_tokenizer(
    sentiment: Sentiment, tmp_path: Path
) -> None:
    teacher, out = tmp_path / "teacher", tmp_path / "run"
    shutil.copytree(sentiment.teacher, teacher)
    known = make_tokenizer().get_vocab()
    letters = [c for c in "fox" if c not in known] + ["##f", "##o", "##x", "foxes", "##oxes"]
    backend = Tokenizer(
        models.WordPiece({**known, **{c: len(known) + i for i, c in enumerate(letters)}}, unk_token="[UNK]")
    )
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    marks = [("[CLS]", known["[CLS]"]), ("[SEP]", known["[SEP]"])]
    backend.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=marks)
    names = make_tokenizer().special_tokens_map
    PreTrainedTokenizerFast(tokenizer_object=backend, **names).save_pretrained(teacher)
    options = ["--data", str(sentiment.data), "--epochs", "0", "--target", "80%params", "--trim-vocabulary"]
    done = CliRunner().invoke(app, ["compress", "sst2", "--model", str(teacher), "--out", str(out), *options])
    assert done.exit_code == 0, done.output
    facts = json.loads((out / "model" / "vocabulary.json").read_text())
    assert facts["tokens"] == len(facts["kept"]) < facts["tokens_before"] == 50
    assert facts["selection_rows_tokenised_differently"] == 0
    assert facts["teacher_selection_accuracy_before"] == facts["teacher_selection_accuracy_trimmed"]
    card = (out / "model" / "README.md").read_text(encoding="utf-8")
    told = f"it was trimmed. Vocabulary: {facts['tokens']} of 50 tokens stay"
    assert f"## Vocabulary\n\nThe tokenizer is not that of the model before: {told}" in card
    assert "0 of " in card and "`vocabulary.json`" in card
    model: Any = rmtkd.load(out / "model")
    tokenizer = AutoTokenizer.from_pretrained(out / "model")
    assert len(tokenizer) == model.config.vocab_size == facts["tokens"]
    assert tokenizer.tokenize("good foxof") == ["good", "f", "##o", "##x", "##o", "##f"]
    record = json.loads((out / "summary.json").read_text())
    assert record["baseline"]["parameters"] == count_parameters(recipes.get("sst2").load(str(teacher)).model) - (
        32 * (50 - facts["tokens"])
    )


@pytest.mark.parametrize("text", ['["a"]', "{}", "no JSON"])
def test_a_file_of_the_user_s_own_of_that_name_says_nothing_of_trimming(tmp_path: Path, text: str) -> None:
    (tmp_path / VOCABULARY).write_text(text)
    assert _facts(tmp_path / VOCABULARY) is None
