"""A trimmed vocabulary: tokens that the training rows do not hold leave the embedding table and the tokenizer.

What such a token spelled is spelled by smaller pieces that stay: every single character or byte that the tokenizer
knows, its special tokens, and whatever its pieces are merged from. A character that the tokenizer never knew is unknown
to it as before. So texts of other rows may have more tokens than they had, and other answers: `Trimming.changed` counts
them.
"""

import copy
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from rmtkd.errors import UnsupportedModelError


@dataclass(frozen=True, kw_only=True)
class Trimming:
    """What was trimmed.

    Attributes:
        kept: old ids of the tokens that stay, ascending: the new id is the place.
        before: how many tokens there were.
        unseen_kept: how many of those that stay are in no training row: special tokens, characters, and what tokens
            are merged from.
    """

    kept: tuple[int, ...]
    before: int
    unseen_kept: int

    def changed(self, rows: Iterable[Sequence[int]]) -> int:
        """How many of these rows, of old token ids, are spelled by other tokens from now on."""
        kept = set(self.kept)
        return sum(not kept.issuperset(row) for row in rows)


def trim(
    model: nn.Module, tokenizer: Any, path: str, counts: Int[Tensor, " vocabulary"]
) -> tuple[nn.Module, Any, Trimming]:
    """Drop tokens that never occur. On rows of kept tokens alone the model computes the same, to the bit.

    Args:
        model: with a plain embedding at `path`; left as it was.
        tokenizer: of transformers, with a fast backend of WordPiece, BPE or Unigram; left as it was.
        path: of the embedding.
        counts: how often each token occurs in the training rows.

    Returns:
        A copy of the model with fewer rows in its table, the tokenizer with ids to match, and what was trimmed.

    Raises:
        UnsupportedModelError: naming the tokenizer or the table that cannot be rewritten.
    """
    embedding = model.get_submodule(path)
    if type(embedding) is not nn.Embedding:
        raise UnsupportedModelError(
            f"a vocabulary is trimmed before its table is cut: {path} must be nn.Embedding. Got {embedding}. Trim the "
            "untouched model; nothing was changed."
        )
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise UnsupportedModelError(
            f"a tokenizer must have a fast backend to be trimmed. Got {type(tokenizer).__name__}. Leave the vocabulary "
            "whole; nothing was changed."
        )
    spec = json.loads(backend.to_str())
    seen = set(counts.nonzero()[:, 0].tolist())
    kept = sorted({i for i in _kept(spec, tokenizer, seen) if i < embedding.num_embeddings})
    ids = {old: new for new, old in enumerate(kept)}
    trimmed = copy.deepcopy(model)
    _take_rows(trimmed, path, kept, ids)
    pad = embedding.padding_idx
    if pad is not None and ids.get(pad) != pad:
        raise UnsupportedModelError(
            f"the padding token must keep its id {pad}, from which some models count positions. It would be "
            f"{ids.get(pad)}. Leave the vocabulary whole; nothing was changed."
        )
    trimming = Trimming(kept=tuple(kept), before=embedding.num_embeddings, unseen_kept=len(set(kept) - seen))
    return trimmed, _rebuilt(tokenizer, _renumbered(spec, ids)), trimming


def _kept(spec: Mapping[str, Any], tokenizer: Any, seen: Iterable[int]) -> set[int]:
    """Ids of the tokens that stay."""
    model = spec["model"]
    kind = model["type"]
    if kind not in _KINDS:
        raise UnsupportedModelError(
            f"a tokenizer must be of {', '.join(_KINDS)} to be trimmed. Got {kind}. Leave the vocabulary whole; "
            "nothing was changed."
        )
    ids = _ids(model)
    special = {token["id"] for token in spec["added_tokens"]} | set(tokenizer.all_special_ids)
    special |= {ids[token] for token in (model.get("unk_token"),) if token in ids}
    if isinstance(model.get("unk_id"), int):
        special.add(model["unk_id"])
    return special | _KINDS[kind](model, ids, set(seen))


def _word_pieces(model: Mapping[str, Any], ids: Mapping[str, int], seen: set[int]) -> set[int]:
    """A word is spelled by the longest pieces there are: single characters, at its start and within, spell any."""
    prefix = model["continuing_subword_prefix"]
    return seen | {i for token, i in ids.items() if len(token.removeprefix(prefix)) == 1}


def _pairs(model: Mapping[str, Any], ids: Mapping[str, int], seen: set[int]) -> set[int]:
    """A token is reached by merges of smaller ones, all of which must stay; single characters or bytes do anyway."""
    made_from: dict[str, list[tuple[str, str]]] = {}
    for first, second in _merges(model):
        made_from.setdefault(_merged(model, first, second), []).append((first, second))
    names = {i: token for token, i in ids.items()}
    kept = {i for token, i in ids.items() if token not in made_from}  # the alphabet, bytes and special tokens
    todo = [names[i] for i in seen if i in names]
    while todo:
        token = todo.pop()
        if ids[token] in kept:
            continue
        kept.add(ids[token])
        todo += [part for pair in made_from[token] for part in pair if part in ids]
    return kept | seen


def _unigrams(model: Mapping[str, Any], ids: Mapping[str, int], seen: set[int]) -> set[int]:
    """The likeliest pieces are chosen: single characters, and bytes as `<0x0A>`, spell any text that they could."""
    return seen | {i for token, i in ids.items() if len(token) == 1 or (token.startswith("<0x") and len(token) == 6)}


_KINDS: dict[str, Callable[[Mapping[str, Any], Mapping[str, int], set[int]], set[int]]] = {
    "WordPiece": _word_pieces,
    "BPE": _pairs,
    "Unigram": _unigrams,
}


def _ids(model: Mapping[str, Any]) -> dict[str, int]:
    vocabulary = model["vocab"]
    return vocabulary if isinstance(vocabulary, dict) else {piece: i for i, (piece, _) in enumerate(vocabulary)}


def _merges(model: Mapping[str, Any]) -> list[tuple[str, str]]:
    pairs = (pair.split(" ", 1) if isinstance(pair, str) else pair for pair in model["merges"])
    return [(first, second) for first, second in pairs]


def _merged(model: Mapping[str, Any], first: str, second: str) -> str:
    return first + second.removeprefix(model.get("continuing_subword_prefix") or "")


def _renumbered(spec: dict[str, Any], ids: Mapping[int, int]) -> dict[str, Any]:
    """The tokenizer's JSON with the kept tokens alone, by their new ids, and the merges that lead to them."""
    spec = copy.deepcopy(spec)
    model = spec["model"]
    names = {i: token for token, i in _ids(model).items()}
    if model["type"] == "Unigram":
        model["vocab"] = [model["vocab"][old] for old in ids if old in names]
        model["unk_id"] = None if model["unk_id"] is None else ids[model["unk_id"]]
    else:
        model["vocab"] = {names[old]: new for old, new in ids.items() if old in names}
    if model["type"] == "BPE":
        stays = model["vocab"]
        model["merges"] = [list(pair) for pair in _merges(model) if {*pair, _merged(model, *pair)} <= stays.keys()]
    spec["added_tokens"] = [{**token, "id": ids[token["id"]]} for token in spec["added_tokens"] if token["id"] in ids]
    _renumber_template(spec.get("post_processor"), ids)
    if isinstance(spec.get("padding"), dict):
        spec["padding"]["pad_id"] = ids[spec["padding"]["pad_id"]]
    return spec


def _renumber_template(processor: Any, ids: Mapping[int, int]) -> None:
    """Ids within a post-processor: `ids` of a template's special tokens; `[token, id]` as `sep` and `cls`."""
    if not isinstance(processor, dict):
        return
    for part in processor.get("processors", ()):
        _renumber_template(part, ids)
    for token in (processor.get("special_tokens") or {}).values():
        token["ids"] = [ids[i] for i in token["ids"]]
    for name in ("sep", "cls"):
        if isinstance(processor.get(name), list):
            processor[name] = [processor[name][0], ids[processor[name][1]]]


def _rebuilt(tokenizer: Any, spec: Mapping[str, Any]) -> Any:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    options = {name: getattr(tokenizer, name) for name in ("model_input_names", "padding_side", "truncation_side")}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(spec)),
        model_max_length=tokenizer.model_max_length,
        **options,
        **tokenizer.special_tokens_map,
    )


def _take_rows(model: nn.Module, path: str, kept: Sequence[int], ids: Mapping[int, int]) -> None:
    """Keep these rows of the table, in place, and tell the configuration of their new numbers."""
    embedding: Any = model.get_submodule(path)
    rows = embedding.weight.detach()[torch.tensor(kept, device=embedding.weight.device)]
    embedding.weight = nn.Parameter(rows, requires_grad=embedding.weight.requires_grad)
    embedding.num_embeddings = len(kept)
    config: Any = getattr(model, "config", None)
    if config is not None:
        config.vocab_size = len(kept)
        for name in ("pad_token_id", "bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id", "mask_token_id"):
            old = getattr(config, name, None)
            if isinstance(old, int):
                setattr(config, name, ids.get(old))
