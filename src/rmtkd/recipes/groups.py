"""Which rows may have different roles: a text that was trained on is neither selected by nor reported on.

Rows that hang together, by a text they share or by a sentence they are part of, get one role. The role is drawn by a
hash of their texts: the same in every command and on every machine, whatever the seed. The order of the rows matters
only where a text comes with several kinds of blanks around it: then its last form is hashed.
"""

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from rmtkd.errors import DataError

Texts = tuple[str, ...]
"""The texts of one row, one for each column."""
Grouping = Callable[[Sequence[Texts]], list[tuple[str, ...]]]
"""For each row the keys of all groups that it belongs to; none where it must be trained on."""

PARTS = 20
"""A group falls into one of twenty parts by its hash; one of them is the selection rows."""
SELECTION = range(1)
SELECTION_OF_ONE, REPORT_OF_ONE = range(2), range(2, 6)
"""Parts of a file that has to serve all roles: a tenth is selected by, a fifth reported on."""
LARGEST = PARTS * 2
"""A group of more than one row in so many is trained on: as a held-out group it would be most of what is held out."""


@dataclass(frozen=True, kw_only=True)
class Assignment:
    """Indices of rows by role. `train` points into the first collection, the others each into their own."""

    train: list[int]
    selection: list[int]
    report: list[int]
    left_out: int
    """Rows without a role, because they share a text with rows that are reported on or selected by."""


def part_of(key: str) -> int:
    """The part that a group falls into."""
    return int(hashlib.sha256(key.encode()).hexdigest()[:8], 16) % PARTS


def by_shared_texts(rows: Sequence[Texts]) -> list[tuple[str, ...]]:
    """Rows that share a text, in whichever column, directly or through other rows, are one group.

    Its key is the first of its texts, as it stands in the rows. A row with a single text is in the group of that text.
    """
    if not rows:
        return []
    forms = {text.strip(): text for row in rows for text in row}
    texts = sorted(forms)
    index = {text: i for i, text in enumerate(texts)}
    ids = np.array([[index[text.strip()] for text in row] for row in rows])
    first = np.repeat(ids[:, :1], ids.shape[1], axis=1)
    links = coo_array((np.ones(ids.size), (first.ravel(), ids.ravel())), shape=(len(texts), len(texts)))
    count, component = connected_components(links, directed=False)
    keys = np.full(count, len(texts))
    np.minimum.at(keys, component, np.arange(len(texts)))
    groups = component[ids[:, 0]]
    sizes = np.bincount(groups, minlength=count)
    allowed = max(PARTS, len(rows) // LARGEST)
    return [(forms[texts[keys[group]]],) if sizes[group] <= allowed else () for group in groups]


def by_sentence(rows: Sequence[Texts]) -> list[tuple[str, ...]]:
    """A phrase belongs to every sentence that contains it, as a contiguous run of its words.

    A sentence is a text that no other row contains. Each row has a single text, of words separated by spaces.
    """
    phrases = {text.strip() for (text,) in rows}
    sentences: dict[str, list[str]] = {}
    for text in sorted(phrases, key=lambda text: (-len(text.split()), text)):
        if text in sentences:  # a longer text contains it
            continue
        sentences[text] = [text]
        words = text.split()
        for start in range(len(words)):
            for stop in range(start + 1, len(words) + 1):
                phrase = " ".join(words[start:stop])
                if phrase in phrases and phrase != text:
                    sentences.setdefault(phrase, []).append(text)
    return [tuple(sentences[text.strip()]) for (text,) in rows]


def assign(
    train: Sequence[Texts],
    selection: Sequence[Texts] | None,
    report: Sequence[Texts] | None,
    grouping: Grouping = by_shared_texts,
) -> Assignment:
    """The role of every row.

    Args:
        train: rows to train on; also the source of the roles that have no rows of their own.
        selection: rows that were made for selection, if there are any.
        report: rows that were made for the report, if there are any.
        grouping: which rows must have one role.

    Raises:
        DataError: if a role has no rows.
    """
    reported = _texts(report or ())
    selected = _texts(selection or ())
    parts = {"selection": SELECTION if report is not None else SELECTION_OF_ONE, "report": REPORT_OF_ONE}
    drawn = {name: parts[name] for name, given in (("selection", selection), ("report", report)) if given is None}
    found: dict[str, list[int]] = {"train": [], "selection": [], "report": []}
    left_out = 0
    for i, (row, keys) in enumerate(zip(train, grouping(train), strict=True)):
        if any(text.strip() in reported or text.strip() in selected for text in row):
            left_out += 1
            continue
        owners = {part_of(key) for key in keys}
        held = (name for name, share in drawn.items() if owners and owners <= set(share))
        found[next(held, "train")].append(i)
    if selection is not None:
        found["selection"] = [i for i, row in enumerate(selection) if not any(text.strip() in reported for text in row)]
        left_out += len(selection) - len(found["selection"])
    if report is not None:
        found["report"] = list(range(len(report)))
    for role, indices in found.items():
        if not indices:
            raise DataError(
                f"every role must have rows. Of {len(train)} training rows none is left for {role}: {left_out} share "
                "a text with rows that are held out, the others are in one group or too few. Pass more rows, or a "
                "file for each role."
            )
    return Assignment(**found, left_out=left_out)


def _texts(rows: Iterable[Texts]) -> set[str]:
    return {text.strip() for text in chain.from_iterable(rows)}
