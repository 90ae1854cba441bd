"""The claims of `rmtkd.batches`: what the model is called with, and which positions are real."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import BatchEncoding
from transformers.modeling_outputs import SequenceClassifierOutput

from rmtkd import batches as batching
from rmtkd.batches import Calls
from rmtkd.errors import DataError, UnsupportedModelError
from rmtkd.roles import fingerprint, fingerprint_of_all

IDS = torch.tensor([[5, 6, 0], [7, 0, 0]])
MASK = torch.tensor([[1, 1, 0], [1, 0, 0]])
MAPPING = {"input_ids": IDS, "attention_mask": MASK, "labels": torch.tensor([1, 0]), "row_ids": torch.tensor([7, 3])}
PAIR = (torch.arange(12.0).reshape(2, 6), torch.tensor([0, 2]))


class Recorder(nn.Module):
    """Remembers what it was called with."""

    def forward(self, *args: Tensor, **kwargs: Tensor) -> SequenceClassifierOutput:
        self.seen = args, kwargs
        return SequenceClassifierOutput(logits=torch.eye(2))


def test_a_mapping_is_passed_by_name_and_without_labels_and_row_numbers() -> None:
    model = Recorder()
    assert torch.equal(batching.logits(model, MAPPING), torch.eye(2))
    args, kwargs = model.seen
    assert args == ()
    assert set(kwargs) == {"input_ids", "attention_mask"}
    assert kwargs["input_ids"] is IDS


@pytest.mark.parametrize("pair", [PAIR, list(PAIR)])
def test_of_a_pair_the_first_is_passed(pair: batching.Batch) -> None:
    model = Recorder()
    batching.logits(model, pair)
    args, kwargs = model.seen
    assert args[0] is PAIR[0]
    assert len(args) == 1
    assert kwargs == {}
    assert torch.equal(batching.logits(nn.Identity(), pair), PAIR[0])


def test_labels_are_found_where_there_are_any() -> None:
    assert batching.labels(MAPPING) is MAPPING["labels"]
    assert batching.labels(PAIR) is PAIR[1]
    assert batching.labels({"input_ids": IDS}) is None


@pytest.mark.parametrize("dtype", [torch.long, torch.bool, torch.float32])
def test_real_positions_are_those_of_the_mask(dtype: torch.dtype) -> None:
    real = batching.real_positions({**MAPPING, "attention_mask": MASK.to(dtype)})
    assert real is not None
    assert real.dtype == torch.bool
    assert real.tolist() == [[True, True, False], [True, False, False]]


def test_without_a_mask_there_is_no_padding() -> None:
    assert batching.real_positions({"input_ids": IDS}) is None
    assert batching.real_positions(PAIR) is None


@pytest.mark.parametrize("mask", [torch.ones(2), torch.ones(2, 1, 3, 3)])
def test_a_mask_of_another_shape_is_refused(mask: Tensor) -> None:
    with pytest.raises(DataError, match=r"attention_mask must have shape \[rows, length\]"):
        batching.real_positions({"input_ids": IDS, "attention_mask": mask})


def test_rows_and_lengths_are_counted() -> None:
    assert [batching.rows(batch) for batch in (MAPPING, PAIR)] == [2, 2]
    assert [batching.length(batch) for batch in (MAPPING, {"labels": torch.zeros(2), "input_ids": IDS}, PAIR)] == [
        3,
        3,
        1,
    ]
    assert batching.length({"points": torch.zeros(5, 6)}) == 1  # one vector a row
    assert batching.length({"inputs_embeds": torch.zeros(5, 6, 8)}) == 6


def test_positions_of_token_ids_are_counted_also_where_they_come_by_place() -> None:
    labels = torch.zeros(4, dtype=torch.long)
    assert batching.length((torch.ones(4, 17, dtype=torch.int32), labels)) == 17
    assert batching.length([torch.ones(4, 17, dtype=torch.long)]) == 17
    (call,) = batching.Calls([(torch.ones(4, 17, dtype=torch.long), labels)], lambda model, rows: model(rows[0]))
    assert batching.length(call) == 17


@pytest.mark.parametrize(
    "rows",
    [
        torch.zeros(4, 6),  # vectors
        torch.zeros(4, 6, dtype=torch.bool),
        torch.zeros(4, dtype=torch.long),
        torch.zeros(4, 3, 8, 8),  # images
        torch.zeros(4, 3, 8, 8, dtype=torch.uint8),
        torch.zeros(4, 8, 8, dtype=torch.uint8),
    ],
)
def test_vectors_and_images_have_one_position(rows: Tensor) -> None:
    assert batching.length((rows, torch.zeros(4, dtype=torch.long))) == 1


def test_the_head_of_a_batch_is_its_first_rows() -> None:
    short = batching.head(MAPPING, 1)
    assert isinstance(short, dict)
    assert {name: value.tolist() for name, value in short.items()} == {
        "input_ids": [[5, 6, 0]],
        "attention_mask": [[1, 1, 0]],
        "labels": [1],
        "row_ids": [7],
    }
    pair = batching.head(PAIR, 1)
    assert isinstance(pair, tuple)
    assert [len(part) for part in pair] == [1, 1]
    assert batching.rows(batching.head(PAIR, 99)) == 2


def test_moving_a_batch_moves_every_tensor_of_it() -> None:
    for batch in (MAPPING, PAIR, BatchEncoding(MAPPING)):
        moved = batching.to(batch, "meta")
        assert not isinstance(moved, batching.Call)
        values = list(moved.values()) if isinstance(moved, Mapping) else moved
        assert [value.device.type for value in values] == ["meta"] * len(batch)
    assert IDS.device.type == "cpu"


def test_the_first_batch_is_found_or_its_absence_named() -> None:
    assert batching.first([PAIR, MAPPING], "selection") is PAIR
    with pytest.raises(DataError, match="selection must hold at least one batch"):
        batching.first([], "selection")


@pytest.mark.parametrize(
    "labels",
    [torch.zeros(2), torch.zeros(2, 1, dtype=torch.long), torch.zeros(3, dtype=torch.long)],
)
def test_labels_are_one_whole_number_for_each_row(labels: object) -> None:
    for batch in ({**MAPPING, "labels": labels}, (IDS, labels)):
        with pytest.raises(DataError, match="labels must be a tensor of one whole number for each of 2 rows"):
            batching.labels(batch)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="row_ids must be"):
        batching.row_ids({**MAPPING, "row_ids": labels})  # type: ignore[dict-item]


@pytest.mark.parametrize("dtype", [torch.int32, torch.int8, torch.bool])
def test_labels_of_any_whole_kind_become_int64(dtype: torch.dtype) -> None:
    found = batching.labels({**MAPPING, "labels": torch.tensor([0, 1]).to(dtype)})
    assert found is not None and found.dtype == torch.long and found.tolist() == [0, 1]


@pytest.mark.parametrize(
    ("batch", "told"),
    [
        (IDS, r"a mapping of tensors, or a pair.*Got a tensor of shape \[2, 3\]"),
        ({}, "Got dict of nothing"),
        ("ab", "Got str"),
        ({**MAPPING, "text": ["a", "b"]}, "tensors alone.*Got list at 'text'"),
        ({**MAPPING, "token_type_ids": None}, "Got NoneType at 'token_type_ids'"),
        ({"inputs": MAPPING}, "Got dict at 'inputs'"),
        ((IDS, 3), "Got int at 1"),
        ((IDS, torch.tensor(3)), r"Got a tensor of shape \[\] at 1"),
    ],
)
def test_what_is_no_batch_is_refused_with_the_reason(batch: Any, told: str) -> None:
    for look in (partial(batching.first, role="selection"), partial(fingerprint, role="selection"), fingerprint_of_all):
        with pytest.raises(DataError, match=told):
            look(iter([batch]))


def test_what_is_no_batch_is_refused_before_a_forward_sees_it() -> None:
    with pytest.raises(DataError, match="Got list at 'text'"):
        batching.first(Calls([{**MAPPING, "text": ["a", "b"]}], lambda model, rows: rows["text"]), "selection")  # type: ignore[list-item]


def test_labels_under_a_key_of_other_tools_are_refused_unless_the_model_takes_it() -> None:
    class Taking(nn.Module):
        def forward(self, input_ids: Tensor, label: Tensor) -> Tensor:
            return input_ids + label

    batch = {"input_ids": IDS, "label": IDS[:, 0]}
    with pytest.raises(DataError, match=r"must be under 'labels'\. Got 'label'"):
        batching.check_labels_named(Recorder(), batch)
    for model, fits in ((Taking(), batch), (Recorder(), {**batch, "labels": IDS[:, 0]}), (Recorder(), PAIR)):
        batching.check_labels_named(model, fits)


def test_a_longer_tuple_is_no_batch() -> None:
    with pytest.raises(DataError, match=r"must be \(x, labels\). Got 3 parts"):
        batching.labels((IDS, IDS, IDS))


@pytest.mark.parametrize("scores", [None, {"logits": IDS}, torch.zeros(2), torch.zeros(3, 4)])
def test_a_forward_must_return_class_scores(scores: object) -> None:
    (call,) = batching.Calls([MAPPING], lambda model, rows: scores)  # type: ignore[arg-type, return-value]
    with pytest.raises(DataError, match=r"forward must return class scores of shape \[2, classes\]"):
        batching.logits(torch.nn.Identity(), call)


def test_an_output_that_holds_no_scores_is_named():
    class Silent(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor]:
            return (x,)

    with pytest.raises(UnsupportedModelError, match=r"Silent returned tuple\. Pass a forward="):
        batching.logits(Silent(), PAIR)


def test_a_tensor_of_another_number_of_rows_is_refused_by_name() -> None:
    with pytest.raises(DataError, match=r"as many rows. Got a tensor of shape \[1, 3\] at 'position_ids', and 2 rows"):
        batching.check({**MAPPING, "position_ids": torch.arange(3)[None]})


@pytest.mark.parametrize("forward", [None, lambda model, rows: model(rows[0])])
def test_rows_that_are_used_up_after_once_are_refused_under_a_forward_too(forward: Any) -> None:
    with pytest.raises(DataError, match=r"report rows are gone through several times\. Got generator"):
        batching.check_again(train=[PAIR], report=batching.called((pair for pair in [PAIR]), forward))
