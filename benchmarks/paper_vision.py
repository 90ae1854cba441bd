"""The published evaluation on images: ResNet-50 on CIFAR-10, from a random start.

    rmtkd bench paper-vision --scale tiny                  # scans of digits as images; a minute, no download
    rmtkd bench paper-vision --scale cpu  --data DIR       # ResNet-50 at 32 × 32 with the stem of large images
    rmtkd bench paper-vision --scale full --device cuda
    rmtkd bench paper-vision --table                       # only the table

Training as published: AdamW at 1e-3, batch 128, weight decay 5e-4, flips and crops with 4 pixels of padding.

`published` cuts at the noise edges with the published distillation (α 0.7, temperature 1); `same-size` has the
published reduction for its target, by default options; `seventy` leaves 30 % of the parameters; `uncut` is the teacher
that learns on for as long as they recover, at the recipe's whole rate and without a cut.
"""

from functools import partial
from pathlib import Path

from paper import Entry, main
from paper_table import Reported
from rmtkd import recipes
from rmtkd.recipes.recipe import Source

REPORTED = Reported(
    published={
        ("resnet50", "cifar10"): {
            "parameters": "23.5 M",
            "reduction": "−47.7 %",
            "accuracy": "+0.7 %",
            "speed_up": "slight",
            "energy": "about −10 %",
        },
    },
    peers={
        "resnet50": {
            "AT": ("−42.2 %", "+0.4", None),
            "FitNet": ("−40.6 %", "+0.2", None),
            "CRD": ("−45.4 %", "+0.6", None),
        },
    },
    reasons={
        "teacher, parameters": "the same network",
        "published, reduction": "the edges choose; fit of the noise and centring differ (design.md), widths that a "
        "rectifier follows lose units, not directions",
        "same-size, reduction": "the published reduction is the target, which widths meet from below",
        "accuracy": "published against a baseline that is not given; here against a teacher that was trained for as "
        "long as is told below, which learning on alone changes, too (`uncut`, where it was run)",
        "speed_up": "no number is published; here on the machine below",
        "energy": "published from nvidia-smi, once a second, over inference; here from a counter of energy, rest "
        "subtracted",
        "peers, not run": "rmtkd bench vision teaches ResNet-20 and ResNet-56 so, from a random start",
    },
)


def start(task: str, model: str | None, data: Path | None, seed: int) -> Source:
    """A network of a recipe."""
    return recipes.get(task).start(model, seed, data)


def resnet50(epochs: int, recovery: float, passes: int) -> Entry:
    """The published network, trained for at most so long."""
    return Entry(
        name="resnet50",
        task="cifar10",
        start=partial(start, "cifar10", "resnet50"),
        epochs=epochs,
        recovery=recovery,
        passes=passes,
    )


SCALES = {
    "tiny": [
        Entry(
            name="digits",
            task="digits_cnn",
            start=partial(start, "digits_cnn", None),
            epochs=1,
            recovery=0.5,
            passes=20,
        )
    ],
    "cpu": [resnet50(epochs=8, recovery=3.0, passes=200)],
    "full": [resnet50(epochs=100, recovery=30.0, passes=1000)],
}
SETTINGS = {
    "published": lambda entry: {
        "policy": "paper",
        "metric": "output",
        "target": None,
        "gentle": 0.0,
        "blend": False,
        "recovery": {
            "optimizer": "adamw",
            "lr": 1e-3,
            "alpha": 0.7,
            "temperature": 1.0,
            "weight_decay": 5e-4,
        },
    },
    "same-size": lambda entry: {"target": "52.3%params"},
    "seventy": lambda entry: {"target": "30%params"},
    "uncut": None,
}

if __name__ == "__main__":
    main("paper-vision", __doc__, SCALES, SETTINGS, REPORTED)
