"""Reading and writing checkpoints of classifiers: transformers' folders, hub names, and our own folders."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rmtkd import artifact
from rmtkd.errors import DataError
from rmtkd.pretrained import quietly, save_tokenizer
from rmtkd.recipes.recipe import Source
from rmtkd.seeding import seeded
from rmtkd.sites import find_sites, longest_input

TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
    *("vocab.txt", "merges.txt", "spiece.model", "sentencepiece.bpe.model"),
)
"""A folder with any of these holds a tokenizer: what transformers writes beside a model now, or wrote alone before."""


def load_classifier(
    path: str, data: Path | None = None, *, labels: Sequence[str] | None, task: str = "SequenceClassification"
) -> Source:
    """A trained classifier with its tokenizer, if it has one: our folder, transformers' folder, or a hub name.

    Args:
        path: where it is.
        data: of a task, which has nothing to say here.
        labels: names of the classes that it must have, by index; None if they are its own.
        task: as transformers' Auto classes end.

    Raises:
        DataError: if there is none, its head is not trained, or it has another number of classes.
        ArtifactError: if our folder was altered.
    """
    if artifact.is_artifact(Path(path)):
        model = artifact.load(path)
    else:
        model, missing, _ = _from_pretrained(path, task=task)
        if missing:
            raise DataError(
                f"--model must be a trained classifier. {path!r} lacks {len(missing)} of its weights, such as "
                f"{missing[0]}. Train it first:\nrmtkd train RECIPE --model {path} --out TEACHER"
            )
    config: Any = model.config
    if labels is not None and config.num_labels != len(labels):
        raise DataError(
            f"--model must have a head of the {len(labels)} classes {', '.join(labels)}. {path!r} has "
            f"{config.num_labels}. Choose another model or recipe."
        )
    if config.num_labels < 2:
        raise DataError(
            f"--model must have a head of at least two classes. {path!r} has {config.num_labels}. Choose a classifier."
        )
    return Source(model=model, tokenizer=None if task.startswith("Image") else load_tokenizer(path, model))


def load_any_classifier(path: str) -> nn.Module:
    """A classifier with whatever classes it has, trained or not: our folder, transformers' folder, or a hub name.

    Raises:
        DataError: if there is none.
        ArtifactError: if our folder was altered.
    """
    return artifact.load(path) if artifact.is_artifact(Path(path)) else _from_pretrained(path, task=_task_of(path))[0]


def start_classifier(path: str, labels: Sequence[str], seed: int) -> Source:
    """A checkpoint of a family that can be narrowed, with a fresh classification head, to be fine-tuned.

    Raises:
        DataError: if there is no checkpoint, or its weights are not those of its configuration.
        UnsupportedModelError: if the trained model could not be narrowed.
    """
    with seeded(seed):
        model, _, mismatched = _from_pretrained(
            path,
            num_labels=len(labels),
            id2label=dict(enumerate(labels)),
            label2id={n: i for i, n in enumerate(labels)},
            ignore_mismatched_sizes=True,  # of a head for other classes, which is not wanted
        )
    base: Any = model
    if body := [name for name in mismatched if name.startswith(f"{base.base_model_prefix}.")]:
        raise DataError(
            f"--model must hold the weights of its configuration. In {path!r} {body[0]} has another shape. Fetch or "
            "save it again."
        )
    find_sites(model)
    return Source(model=model, tokenizer=load_tokenizer(path, model))


def load_tokenizer(path: str, model: nn.Module) -> Any:
    """The tokenizer stored with a model, or None where there is none.

    Raises:
        DataError: if it cannot be read or is not the model's.
    """
    import transformers

    if Path(path).is_dir() and not any((Path(path) / name).is_file() for name in TOKENIZER_FILES):
        return None
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # whatever transformers makes of altered files
        raise DataError(
            f"{path!r} must hold a tokenizer. Reading it gave: {_first_line(error)}. Save it anew."
        ) from error
    config: Any = model.config
    if len(tokenizer) > config.vocab_size:
        raise DataError(
            f"the tokenizer in {path!r} must be the model's, of at most {config.vocab_size} tokens. It has "
            f"{len(tokenizer)}. Save the right one beside the model."
        )
    longest = longest_input(model) or tokenizer.model_max_length
    tokenizer.model_max_length = min(tokenizer.model_max_length, longest)
    return tokenizer


def check_same_inputs(source: Source, teacher: Source) -> None:
    """Raise `DataError` unless rows that were prepared for one model mean the same to another."""
    words, theirs = (one.tokenizer and one.tokenizer.get_vocab() for one in (source, teacher))
    if words != theirs or source.preprocessor != teacher.preprocessor:
        what = "tokenizer" if words != theirs else "normalisation of images"
        raise DataError(f"a teacher model must have the {what} of its student. It has another. Choose another teacher.")


def save_classifier(source: Source, folder: Path) -> None:
    """Write a model as a transformers folder, with its tokenizer."""
    model: Any = source.model
    with quietly():
        model.save_pretrained(folder)
    save_companions(source, folder)


def save_companions(source: Source, folder: Path) -> None:
    """Write what must travel with a model: its tokenizer, or how images are prepared."""
    if source.tokenizer is not None:
        save_tokenizer(source.tokenizer, folder)
    if source.preprocessor is not None:
        (folder / "preprocessor_config.json").write_text(json.dumps(source.preprocessor, indent=1) + "\n")


def _from_pretrained(
    path: str, *, task: str = "SequenceClassification", **config: Any
) -> tuple[nn.Module, list[str], list[str]]:
    """A model and the names of its weights that the checkpoint does not hold, or not in this shape."""
    import transformers

    if artifact.is_artifact(Path(path) / "model"):
        raise DataError(f"--model must be a model folder. {path!r} is a run. Did you mean '{Path(path) / 'model'}'?")
    if path.startswith((".", "/", "~")) and not Path(path).is_dir():  # no name of the hub: do not ask there
        raise DataError(f"--model must be a model folder or a hub name. There is no folder {path!r}. Check the path.")
    try:
        with quietly():
            model, report = getattr(transformers, f"AutoModelFor{task}").from_pretrained(
                path, dtype=torch.float32, trust_remote_code=False, output_loading_info=True, **config
            )
    except Exception as error:  # whatever transformers, torch or safetensors make of what is there
        raise DataError(
            f"--model must be a model folder or a hub name. Reading {path!r} gave: {_first_line(error)}. "
            "Check the path; a network is needed for a hub name."
        ) from error
    return model.eval(), sorted(report["missing_keys"]), sorted(name for name, *_ in report["mismatched_keys"])


def _task_of(path: str) -> str:
    """What a checkpoint classifies, as transformers' Auto classes end: by the class that its configuration names."""
    import transformers

    try:
        with quietly():
            config: Any = transformers.AutoConfig.from_pretrained(path, trust_remote_code=False)
    except Exception:  # whoever loads it says what is wrong
        return "SequenceClassification"
    named = (config.architectures or ("",))[0]
    return "ImageClassification" if named.endswith("ImageClassification") else "SequenceClassification"


def _first_line(error: Exception) -> str:
    return (str(error).strip() or repr(error)).splitlines()[0].rstrip(".")
