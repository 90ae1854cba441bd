"""A recipe's model and rows with a trimmed vocabulary: the tokenizer is rewritten first, then texts are tokenised."""

from pathlib import Path
from typing import Any

from rmtkd.errors import DataError
from rmtkd.levels import count_tokens
from rmtkd.measurement import accuracy
from rmtkd.recipes.recipe import Recipe, Rows, Source
from rmtkd.sites import find_family
from rmtkd.vocabulary import trim


def trimmed(
    task: Recipe, source: Source, rows: Rows, data: Path | None, seed: int
) -> tuple[Source, Rows, dict[str, Any]]:
    """Model, tokenizer and rows without the tokens that no training row holds; and what that does to held-out rows.

    Args:
        task: the recipe.
        source: the untouched model with its tokenizer.
        rows: its rows.
        data: where they are from.
        seed: of the order of the training rows.

    Returns:
        The trimmed model and tokenizer, the same texts as their rows, and the facts as JSON values. Report rows are not
        read.

    Raises:
        DataError: if the recipe has no tokenizer.
        UnsupportedModelError: see `vocabulary.trim`.
    """
    if source.tokenizer is None:
        raise DataError("--trim-vocabulary is for texts. The model has no tokenizer. Leave it out.")
    path = find_family(source.model).word_embeddings
    model, tokenizer, trimming = trim(
        source.model, source.tokenizer, path, count_tokens(source.model, path, rows.train)
    )
    own = Source(model=model, tokenizer=tokenizer)
    again = task.rows(data, own, seed)
    held = len(rows.selection.ids)
    facts: dict[str, Any] = {
        "tokens_before": trimming.before,
        "tokens": len(trimming.kept),
        "kept_though_unseen": trimming.unseen_kept,
        "selection_rows": held,
        "selection_rows_tokenised_differently": trimming.changed(rows.selection.ids),
    }
    if rows.selection.labels is not None:
        for name, of, its in (("before", source.model, rows), ("trimmed", model, again)):
            facts[f"teacher_selection_accuracy_{name}"] = accuracy(of, its.selection).value
    facts["kept"] = list(trimming.kept)
    return own, again, facts
