"""Reading and writing checkpoints of text classifiers: transformers' folders, hub names, and our own folders."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from rmtkd import artifact
from rmtkd.errors import DataError, RmtkdError
from rmtkd.recipes.recipe import Source

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt")


def load_classifier(path: str) -> Source:
    """A trained classifier with its tokenizer, if it has one: our folder, transformers' folder, or a hub name."""
    if artifact.is_artifact(Path(path)):
        model = artifact.load(path)
    else:
        model = _from_pretrained(path)
    files = tuple(Path(path) / name for name in TOKENIZER_FILES if (Path(path) / name).is_file())
    return Source(model=model, tokenizer=load_tokenizer(path), files=files)


def start_classifier(path: str, labels: tuple[str, ...], seed: int) -> Source:
    """A checkpoint with a fresh classification head, to be fine-tuned."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _from_pretrained(
            path,
            num_labels=len(labels),
            id2label=dict(enumerate(labels)),
            label2id={n: i for i, n in enumerate(labels)},
        )
    return Source(model=model, tokenizer=load_tokenizer(path))


def load_tokenizer(path: str) -> Any:
    """The tokenizer stored with a model, or None where there is none."""
    import transformers

    if Path(path).is_dir() and not any((Path(path) / name).is_file() for name in TOKENIZER_FILES):
        return None
    if artifact.is_artifact(Path(path)):  # its config.json names no stock model, by design
        return transformers.PreTrainedTokenizerFast.from_pretrained(path)
    return transformers.AutoTokenizer.from_pretrained(path)


def _from_pretrained(path: str, **config: Any) -> nn.Module:
    import transformers

    transformers.utils.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    try:
        model = transformers.AutoModelForSequenceClassification.from_pretrained(path, dtype=torch.float32, **config)
    except RmtkdError:
        raise
    except (OSError, ValueError) as error:
        raise DataError(
            f"--model must be a model folder or a hub name. Reading {path!r} gave: {str(error).splitlines()[0]}"
        ) from None
    return model.eval()
