"""Transformers models whose layers differ in width, narrowed as their configuration says.

This file travels with every model that `rmtkd` has made narrower than a stock configuration can say, and is the same in
all of them. Beside it, `AutoModelForSequenceClassification.from_pretrained(FOLDER, trust_remote_code=True)` loads the
model with torch and transformers alone; where rmtkd is installed, `import rmtkd` does instead of the flag.

The `config.json` of such a model is a stock configuration with

- `model_type`: `rmtkd_` and the stock one, so that no stock class takes the folder for its own;
- `per_layer_config`: what differs from layer to layer, in transformers' schema: `num_attention_heads`, `head_dim`, and
  the width of the feed-forward block by its stock name. Layers that share their weights count once. A width of 0 leaves
  a part that always answers the same;
- `word_embedding_size`: columns of the embedding table, where it is narrower than the model;
- `word_embedding_levels`: rows and columns of each table, where tokens have one by how often they occur, first to last;
  tokens of a table without columns are zeros;
- `narrowed`: of an image classifier `shapes`, the shape of every tensor that is narrower than the stock one, and
  `low_rank`, the rank and side of every convolution that has become two (`LowRankPair`), by its path; else which
  parameters have these widths, by path within a layer: the dimension of the parameter, and how many times it holds the
  width in each of `groups` (attention heads; in a layer that has its own number of what `groups_from` names, as many);
  which attributes are to be set with them; and what `absent` heads leave, see `NoHeads`.

Stock entries of the same names as in `per_layer_config` are the widths of layers that it does not list.
"""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

PREFIX = "Rmtkd"
"""`RmtkdBertConfig` is the configuration of a narrowed `BertConfig`, and so on for every stock class."""


class FactorizedEmbedding(nn.Embedding):
    """An embedding as a narrow table, its `weight`, followed by a linear map to the model's width."""

    shifts = True
    """Whether the linear map has a bias."""

    def __init__(self, num_embeddings: int, embedding_dim: int, width: int, **options: Any):
        super().__init__(num_embeddings, embedding_dim, **options)
        place = {name: options[name] for name in ("device", "dtype") if name in options}
        with warnings.catch_warnings():  # a rank of 0 has nothing to initialise
            warnings.simplefilter("ignore", UserWarning)
            self.projection = nn.Linear(embedding_dim, width, bias=self.shifts, **place)

    @classmethod
    def like(cls, embedding: nn.Embedding, rank: int, **options: Any) -> "FactorizedEmbedding":
        """A table of this rank, without values of the other's, in place of an embedding."""
        width = embedding.embedding_dim
        made = cls(embedding.num_embeddings, rank, width, **_options_of(embedding) | options)
        return made.train(embedding.training)

    def forward(self, input: Tensor) -> Tensor:
        """Embed token ids of any shape, in one more dimension of the model's width."""
        return self.projection(super().forward(input))


class LowRankPair(nn.Sequential):
    """Two convolutions, without values of the other's, in place of one: `rank` channels lie between them.

    Args:
        convolution: of one group.
        rank: of the pair.
        side: where the 1 × 1 convolution is: `output`, after the one with all taps; `input`, before it.

    Reference:
        Zhang, Zou, He, Sun, "Accelerating Very Deep Convolutional Networks", arXiv 1505.06798, §3.1 (`output`).
    """

    def __init__(self, convolution: Any, rank: int, side: str):
        if side not in ("input", "output"):
            raise ValueError(f"the side of a pair must be input or output, not {side}")
        kind, has_bias = type(convolution), convolution.bias is not None
        taps = {name: getattr(convolution, name) for name in ("kernel_size", "stride", "padding", "dilation")}
        place = {"device": convolution.weight.device, "dtype": convolution.weight.dtype}
        modes = {"padding_mode": convolution.padding_mode, **place}
        before, after = convolution.in_channels, convolution.out_channels
        if side == "output":
            pair = kind(before, rank, **taps, bias=has_bias, **modes), kind(rank, after, 1, bias=has_bias, **place)
        else:
            pair = kind(before, rank, 1, bias=False, **place), kind(rank, after, **taps, bias=has_bias, **modes)
        super().__init__(*pair)
        self.side = side
        self.in_channels, self.out_channels, self.groups = before, after, 1
        self.train(convolution.training)

    def __getattr__(self, name: str) -> Any:
        """What a forward may ask of the convolution that was here: shape of its window, and type and place of a
        weight."""
        if name in ("kernel_size", "stride", "padding", "dilation", "padding_mode"):
            return getattr(self[0] if self.side == "output" else self[1], name)
        return self[1].weight if name == "weight" else super().__getattr__(name)

    @property
    def rank(self) -> int:
        """Channels between the two."""
        return self[0].out_channels  # type: ignore[return-value]


def low_rank_pairs(model: nn.Module) -> dict[str, list[Any]]:
    """Rank and side of every convolution that has become two, by its path."""
    pairs = {path: module for path, module in model.named_modules() if isinstance(module, LowRankPair)}
    return {path: [pair.rank, pair.side] for path, pair in pairs.items()}


def set_low_rank_pairs(model: nn.Module, pairs: Mapping[str, Sequence[Any]]) -> None:
    """Put pairs of this rank and side, without values, in place of the convolutions at these paths."""
    for path, (rank, side) in pairs.items():
        model.set_submodule(path, LowRankPair(model.get_submodule(path), rank, side))


class NoHeads(nn.Module):
    """What an attention does without heads, in a forward of its stock class's form: its context is empty, and only what
    the reader makes of nothing remains, which is its bias.

    Args:
        attention: of the stock class, whose modules are taken over.
        after: names in it of the modules that its context goes through, in order.
        norm: name of the norm that is then taken of the sum with its input; none by default.
    """

    def __init__(self, attention: nn.Module, after: Sequence[str] = (), norm: str | None = None):
        super().__init__()
        self.after, self.norm = tuple(after), norm
        for name in (*after, *([] if norm is None else [norm])):
            self.add_module(name, attention.get_submodule(name))
        self.train(attention.training)

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
        """The output of shape `batch × length × width`, and no attention weights."""
        output = hidden_states[..., :0]
        for name in self.after:
            output = self.get_submodule(name)(output)
        if self.norm is not None:
            output = self.get_submodule(self.norm)(hidden_states + output)
        return output, None


class EmbeddingLevel(nn.Embedding):
    """A table of some tokens. Rows that it does not have are zeros: other levels have them."""

    def forward(self, input: Tensor) -> Tensor:
        """Embed row numbers of any shape, below 0 and beyond the last row as well, in one more dimension."""
        is_here = (input >= 0) & (input < self.num_embeddings)
        return super().forward(input.clamp(0, self.num_embeddings - 1)) * is_here.unsqueeze(-1)


class FactorizedLevel(FactorizedEmbedding, EmbeddingLevel):
    """A narrow table of some tokens, followed by a linear map. A bias would be added to the tokens of other levels."""

    shifts = False


class EmbeddingLevels(nn.Module):
    """An embedding as several tables, each with the tokens of one level and of a width of its own.

    Args:
        embedding: the whole table; its values are not taken over.
        sizes: for each level how many tokens it has, and its rank; None where its table is whole.

    Attributes:
        rows: for each token its row in the tables, laid one below the other. Data, not trained.

    Reference:
        Baevski, Auli, "Adaptive Input Representations for Neural Language Modeling", arXiv 1809.10853.
    """

    rows: Tensor

    def __init__(self, embedding: nn.Embedding, sizes: Sequence[Sequence[Any]]):
        super().__init__()
        self.num_embeddings, self.embedding_dim = embedding.num_embeddings, embedding.embedding_dim
        self.padding_idx = embedding.padding_idx
        weight = embedding.weight
        options = _options_of(embedding) | {"device": weight.device, "dtype": weight.dtype}
        pads = options.pop("padding_idx") is not None
        self.levels = nn.ModuleList()
        for i, (count, rank) in enumerate(sizes):
            # The padding token, if there is one, has the first row of the last level.
            own = {**options, "padding_idx": 0} if pads and i == len(sizes) - 1 else options
            level: nn.Embedding = EmbeddingLevel(count, self.embedding_dim, **own)
            self.levels.append(level if rank is None else FactorizedLevel.like(level, rank, **own))
        rows = torch.arange(self.num_embeddings, dtype=torch.int32, device=weight.device)
        self.register_buffer("rows", rows)
        self.train(embedding.training)

    def forward(self, input: Tensor) -> Tensor:
        """Embed token ids of any shape, in one more dimension of the model's width."""
        rows = self.rows[input]
        parts: list[Tensor] = []
        for level in self.levels:
            parts.append(level(rows))
            rows = rows - level.num_embeddings  # type: ignore[operator]
        return sum(parts[1:], start=parts[0])


def _options_of(embedding: nn.Embedding) -> dict[str, Any]:
    names = ("padding_idx", "max_norm", "norm_type", "scale_grad_by_freq", "sparse")
    return {name: getattr(embedding, name) for name in names}


def per_layer_widths(config: Any) -> dict[int, dict[str, int]]:
    """`per_layer_config` by layer, as it is written: transformers before 5.14 do not know it."""
    return {int(index): widths for index, widths in (config.to_dict().get("per_layer_config") or {}).items()}


def narrow(model: nn.Module, config: Any) -> None:
    """Give the parameters of a stock model, in place, the widths that its configuration says; values are kept as far as
    they fit."""
    narrowed = config.narrowed
    set_low_rank_pairs(model, narrowed.get("low_rank", {}))
    for name, shape in narrowed.get("shapes", {}).items():
        _reshape(model, name, shape)
    if "shapes" in narrowed:
        return
    if (rank := getattr(config, "word_embedding_size", None)) is not None:
        path = narrowed["word_embedding_size"]
        old: Any = model.get_submodule(path)
        place = {"device": old.weight.device, "dtype": old.weight.dtype}
        model.set_submodule(path, FactorizedEmbedding.like(old, rank, **place))
    if (sizes := getattr(config, "word_embedding_levels", None)) is not None:
        path = narrowed["word_embedding_levels"]
        whole: Any = model.get_submodule(path)
        model.set_submodule(path, EmbeddingLevels(whole, sizes))
        parent: Any = model.get_submodule(path.rpartition(".")[0])
        if not list(parent.buffers(recurse=False)):
            parent._is_hf_initialized = True  # some stock classes initialise the table from here, which is none now
    widths = per_layer_widths(config)
    for index, path in enumerate(narrowed["layers"]):
        layer = model.get_submodule(path)
        own = widths.get(index, {})
        for key, width in own.items():
            site = narrowed[key]
            groups = own[site["groups_from"]] if site.get("groups_from") in own else site["groups"]
            for name, (dim, copies) in site["parameters"].items():
                _shorten(layer, name, dim, copies * groups * width)
            for name, quantity in site["attributes"].items():
                value = width**-0.5 if quantity == "scaling" else width * (groups if quantity == "total" else 1)
                owner, _, attribute = name.rpartition(".")
                setattr(layer.get_submodule(owner), attribute, value)
            if width == 0 and (absent := site.get("absent")):
                stock = layer.get_submodule(absent["module"])
                layer.set_submodule(absent["module"], NoHeads(stock, absent["after"], absent["norm"]))


def _reshape(model: nn.Module, name: str, shape: Sequence[int]) -> None:
    """Keep the first entries of every dimension of a parameter or buffer, and tell its module the new sizes."""
    path, _, leaf = name.rpartition(".")
    module: Any = model.get_submodule(path)
    old = getattr(module, leaf)
    new = old.detach()[tuple(slice(size) for size in shape)].clone()
    if list(new.shape) != list(shape):
        raise ValueError(f"{name} of {list(old.shape)} cannot be narrowed to {list(shape)}")
    is_parameter = isinstance(old, nn.Parameter)
    setattr(module, leaf, nn.Parameter(new, requires_grad=old.requires_grad) if is_parameter else new)
    if leaf == "weight" and isinstance(module, nn.Linear):
        module.out_features, module.in_features = new.shape
    elif leaf == "weight" and isinstance(module, nn.Conv2d):
        module.out_channels, module.in_channels = new.shape[0], new.shape[1] * module.groups
    elif leaf == "weight" and isinstance(module, nn.BatchNorm2d):
        module.num_features = len(new)


def _shorten(layer: nn.Module, name: str, dim: int, size: int) -> None:
    """Keep the first entries of one dimension of a parameter, and tell a linear map its new sizes."""
    path, _, leaf = name.rpartition(".")
    module: Any = layer.get_submodule(path)
    old = getattr(module, leaf)
    setattr(module, leaf, nn.Parameter(old.detach().narrow(dim, 0, size).clone(), requires_grad=old.requires_grad))
    if leaf == "weight" and isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape


@contextmanager
def _one_width_for_all(config: Any) -> Iterator[None]:
    """What stock layers are built from: the configuration without what differs from layer to layer."""
    widths = config.to_dict().get("per_layer_config")
    config.per_layer_config = None
    try:
        yield
    finally:
        config.per_layer_config = widths


def _config_class(stock: Any, name: str) -> Any:
    made: Any = type(name, (stock,), {"model_type": f"rmtkd_{stock.model_type}", "__module__": __name__})
    made.register_for_auto_class()
    return made


def _model_class(stock: Any, name: str) -> Any:
    def __init__(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        with _one_width_for_all(config):
            stock.__init__(self, config, *args, **kwargs)
        narrow(self, config)

    config_class = __getattr__(PREFIX + stock.config_class.__name__)
    made: Any = type(name, (stock,), {"config_class": config_class, "__init__": __init__, "__module__": __name__})
    task = "ImageClassification" if name.endswith("ForImageClassification") else "SequenceClassification"
    made.register_for_auto_class(f"AutoModelFor{task}")
    return made


def __getattr__(name: str) -> Any:
    """The narrowed class of any stock one, made when it is first asked for."""
    if name in globals():  # made before: there is one class of each name
        return globals()[name]
    if not name.startswith(PREFIX):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import transformers

    stock = getattr(transformers, name.removeprefix(PREFIX))
    made = _config_class(stock, name) if name.endswith("Config") else _model_class(stock, name)
    globals()[name] = made
    return made
