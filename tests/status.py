"""The table of what was verified: architectures by kinds of sites, for the versions at hand.

    python tests/status.py        # checks everything, and writes the table of these versions into docs/status.md

Every cell is what `rmtkd.check` finds on a tiny network of the architecture: each site folded at full width, which must
change nothing, and cut to half, which must compute what the projected network computes.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

import rmtkd
from conftest import FAMILY_NAMES, tiny
from rmtkd.conformance import Verdict
from rmtkd.families import FAMILIES
from rmtkd.recipes.cifar import small_network
from rmtkd.recipes.digits import start_cnn

PAGE = Path(__file__).parents[1] / "docs" / "status.md"
KINDS = {
    "word": "embedding",
    "query_key": "query · key",
    "value": "value → output",
    "heads": "heads",
    "ffn": "feed-forward",
}
"""How sites of texts end, and what the table calls them."""
CHANNELS = "channels"
ALL_KINDS = (*KINDS.values(), CHANNELS)
ABSENT, WHOLE, NONE = "not in this version", "whole", ""
BEGIN, END = "<!-- status -->", "<!-- /status -->"


def resnet(layer: str) -> nn.Module:
    """A tiny ResNet of transformers."""
    torch.manual_seed(0)
    shape: dict[str, Any] = {"embedding_size": 16, "hidden_sizes": [16, 32], "depths": [2, 2], "num_labels": 3}
    config = transformers.ResNetConfig(**shape, layer_type=layer)
    return transformers.ResNetForImageClassification(config).eval()


def own() -> tuple[nn.Module, list[tuple[torch.Tensor]]]:
    """A network of a user's own: a depthwise filter, a residual sum, a flattened image; and rows for it."""
    torch.manual_seed(0)
    return Own().eval(), [(torch.randn(16, 3, 8, 8),) for _ in range(24)]


class Own(nn.Module):
    """It is followed through its graph, and described nowhere."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.inner, self.outer = nn.Conv2d(16, 32, 1), nn.Conv2d(32, 16, 1)
        self.head = nn.Linear(16 * 4 * 4, 3)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Class scores of images."""
        stream = self.stem(images)
        stream = stream + self.outer(torch.relu(self.inner(self.depthwise(stream))))
        return self.head(torch.nn.functional.avg_pool2d(stream, 2).flatten(1))


def texts(name: str) -> tuple[Verdict, ...]:
    """The verdicts on a family of texts."""
    return rmtkd.check(tiny(name))


def images(make: Callable[[], nn.Module]) -> tuple[Verdict, ...]:
    """The verdicts on a network of images that makes its own rows."""
    return rmtkd.check(make())


def own_images() -> tuple[Verdict, ...]:
    """The verdicts on a network that nobody described."""
    model, rows = own()
    return rmtkd.check(model, rows)


IMAGES: Mapping[str, Callable[[], tuple[Verdict, ...]]] = {
    "ResNet of transformers, basic blocks": partial(images, partial(resnet, "basic")),
    "ResNet of transformers, bottlenecks": partial(images, partial(resnet, "bottleneck")),
    "ResNet for CIFAR-10 (`cifar10`)": partial(images, partial(small_network, 20)),
    "ResNet of digits (`digits_cnn`)": partial(images, lambda: start_cnn(None, 0).model),
    "a network of your own, traced": own_images,
}


def architectures() -> list[str]:
    """The rows of the table, in its order."""
    return [*(family.model_class for family in FAMILIES), *IMAGES]


def checked() -> dict[str, dict[str, str]]:
    """What these versions give: cells by architecture, by kind of width."""
    found = {}
    for family in FAMILIES:
        there = family.name in FAMILY_NAMES
        verdicts = texts(family.name) if there else ()
        found[family.model_class] = {
            kind: cell([verdict for verdict in verdicts if verdict.site.endswith(f".{ending}")]) if there else ABSENT
            for ending, kind in KINDS.items()
        } | {CHANNELS: NONE}
    return found | {
        name: {**dict.fromkeys(KINDS.values(), NONE), CHANNELS: cell(try_all())} for name, try_all in IMAGES.items()
    }


def cell(verdicts: Sequence[Verdict]) -> str:
    """What the table says of these sites."""
    if not verdicts:
        return WHOLE
    right = sum(verdict.ok for verdict in verdicts)
    return f"✓ {right}" if right == len(verdicts) else f"{right} of {len(verdicts)}"


def versions() -> str:
    """The title of a table."""
    return f"transformers {transformers.__version__}, torch {torch.__version__.partition('+')[0]}"


Table = Mapping[str, Mapping[str, str]]


def read(page: str) -> dict[str, Table]:
    """The tables of a page, by their titles."""
    tables = {}
    for part in _between(page).split("\n## ")[1:]:
        title, _, rest = part.partition("\n")
        (_, *kinds), _, *body = [
            [word.strip() for word in line.strip("|").split("|")] for line in rest.split("\n") if line
        ]
        tables[title] = {name.strip("`"): dict(zip(kinds, cells, strict=True)) for name, *cells in body}
    return tables


def written(page: str, tables: Mapping[str, Table]) -> str:
    """The page with these tables in place of its own."""
    lines = [""]
    for title in sorted(tables, reverse=True):
        lines += ["", f"## {title}", "", f"| | {' | '.join(ALL_KINDS)} |", f"|{'---|' * (1 + len(ALL_KINDS))}"]
        for name in architectures():
            shown = f"`{name}`" if name.isidentifier() else name
            lines.append(f"| {shown} | {' | '.join(tables[title][name][kind] for kind in ALL_KINDS)} |")
    before, _, rest = page.partition(BEGIN)
    return f"{before}{BEGIN}" + "\n".join(lines[1:]) + f"\n\n{END}{rest.partition(END)[2]}"


def _between(page: str) -> str:
    return page.partition(BEGIN)[2].partition(END)[0]


if __name__ == "__main__":
    text = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(written(text, {**read(text), versions(): checked()}), encoding="utf-8")
    sys.stdout.write(f"{PAGE}: {versions()}\n")
