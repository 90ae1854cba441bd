"""A narrowed model as one of transformers: a class and a configuration that say its widths, so that `from_pretrained`,
`save_pretrained`, `pipeline` and `Trainer` work on it. A stock class where a stock configuration can say them."""

import copy
import importlib
import importlib.abc
import importlib.util
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from rmtkd import modeling_rmtkd
from rmtkd.errors import UnsupportedModelError
from rmtkd.families import FAMILIES, IMAGE_FAMILIES, EncoderFamily, ImageFamily
from rmtkd.modeling_rmtkd import PREFIX, EmbeddingLevel, EmbeddingLevels, FactorizedEmbedding, low_rank_pairs
from rmtkd.sites import Axis, Site, find_family, find_image_family, find_sites, layer_paths
from rmtkd.storage import tensors_of
from rmtkd.surgery import fill

HEADS = "num_attention_heads"
HEAD = "head_dim"
WORDS = "word_embedding_size"
LEVELS = "word_embedding_levels"
OURS = ("per_layer_config", WORDS, LEVELS, HEAD, "narrowed")
"""Entries that a narrowed configuration has beyond the stock one."""


def presented(model: nn.Module) -> nn.Module:
    """The same network, in evaluation mode, as an instance of a class that transformers can save and load.

    Args:
        model: of a supported family, of any widths. Its parameters are shared, not copied.

    Raises:
        UnsupportedModelError: if the family is not known.
    """
    model_class, config = described(model)
    with without_values():
        same = model_class(config)
    fill(same, {name: value.detach() for name, value in tensors_of(model).items()})
    return same.eval()


def check_presentable(model: nn.Module) -> None:
    """Raise `UnsupportedModelError` if the configuration of a model of a supported family does not say its shapes: it
    could not be saved as one of transformers."""
    model_class, config = described(model)
    said, found = shapes_of(on_meta(model_class, config)), shapes_of(model)
    differs = next((name for name in {**found, **said} if found.get(name) != said.get(name)), None)
    if differs is not None:
        raise UnsupportedModelError(
            f"the configuration of a {type(model).__name__} must say its shapes. {differs} is {found.get(differs)} "
            f"here, and {said.get(differs)} by model.config. Set config.num_labels where the head is of the same kind; "
            "else pass sites=rmtkd.find_sites(model), and it is saved as a module of your own."
        )


def described(model: nn.Module) -> tuple[Any, Any]:
    """The class that a model of a supported family can be saved as, and its configuration.

    The stock class, where a stock configuration can say all widths; else the narrowed one (`modeling_rmtkd`).

    Raises:
        UnsupportedModelError: if the family is not known.
    """
    import transformers

    if find_image_family(model) is not None:
        return _described_image(model)
    family, sites = find_family(model), find_sites(model)
    stock = getattr(transformers, family.model_class)
    config = _stock_values(model, stock)
    common = stock.config_class.from_dict(config | _common_widths(sites))
    if shapes_of(on_meta(stock, common)) == shapes_of(model):
        return stock, _as_in(model, common)
    full = find_sites(on_meta(stock, stock.config_class.from_dict(config)))
    narrowed = getattr(modeling_rmtkd, PREFIX + family.model_class)
    return narrowed, _as_in(model, narrowed.config_class.from_dict(config | _own_entries(model, full)))


def _described_image(model: nn.Module) -> tuple[Any, Any]:
    """The class and configuration of an image classifier: of one that says its widths itself, its own; else the stock
    ones, or the narrowed ones with the shape of every tensor that is not the stock one's."""
    family = find_image_family(model)
    assert family is not None
    module = importlib.import_module(family.module)
    stock = getattr(module, family.model_class)
    if hasattr(module, "config_of"):
        return stock, module.config_of(model)
    config = _stock_values(model, stock)
    plain = stock.config_class.from_dict(config)
    full, found = ({name: list(t.shape) for name, t in tensors_of(m).items()} for m in (on_meta(stock, plain), model))
    if full == found:
        return stock, plain
    narrowed = getattr(modeling_rmtkd, PREFIX + family.model_class)
    shapes = {name: shape for name, shape in found.items() if shape != full.get(name)}
    own = {"shapes": shapes, "low_rank": low_rank_pairs(model)}
    return narrowed, narrowed.config_class.from_dict(config | {"narrowed": own})


def class_named(name: str) -> Any:
    """The class of transformers' form that a model folder names: a stock one, one of ours, or a narrowed one."""
    if name.startswith(PREFIX):
        return getattr(modeling_rmtkd, name)
    homes = {family.model_class: family.module for family in IMAGE_FAMILIES}
    return getattr(importlib.import_module(homes.get(name, "transformers")), name)


@contextmanager
def without_values() -> Iterator[None]:
    """Modules that are built here have parameters without memory, and buffers with their values."""

    def empty(module: nn.Module, name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
        if parameter is None or parameter.is_meta:
            return None  # as it is
        return nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)

    handle = register_module_parameter_registration_hook(empty)  # type: ignore[arg-type]
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def quietly() -> Iterator[None]:
    """Transformers without progress bars and remarks of its own: what is going on is told by us."""
    from transformers.utils import logging

    bars, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def save_tokenizer(tokenizer: Any, folder: str | Path, names: Sequence[str] | None = None) -> None:
    """Write a tokenizer with the names of what it makes: some versions of transformers read it with a general class,
    where the model type is not theirs, and that one makes no token types unless told.

    Args:
        tokenizer: left as it was.
        folder: where to.
        names: the inputs that it is to make, such as `input_ids`; its own by default.
    """
    own = copy.deepcopy(tokenizer)
    own.model_input_names = list(names or tokenizer.model_input_names)
    own.init_kwargs["model_input_names"] = own.model_input_names  # or they are not written
    own.save_pretrained(folder)


def _stock_values(model: nn.Module, stock: Any) -> dict[str, Any]:
    """The entries of the model's configuration that a stock one has."""
    config: Any = model.config
    ours = {*OURS, "auto_map"} - stock.config_class().to_dict().keys()  # some families have a `head_dim` of their own
    # Where the model lay on this machine is nobody's business.
    left_out = {*ours, "model_type", "architectures", "_name_or_path"}
    return {name: value for name, value in config.to_dict().items() if name not in left_out}


def _common_widths(sites: Sequence[Site]) -> dict[str, int]:
    """Settings of a stock configuration for which all layers have the same width."""
    widths: dict[str, set[int]] = {}
    for site in sites:
        if site.setting is not None:
            widths.setdefault(site.setting, set()).add(site.width)
    return {setting: found.pop() for setting, found in widths.items() if len(found) == 1}


def _own_entries(model: nn.Module, full: Sequence[Site]) -> dict[str, Any]:
    """What a configuration says beyond the stock one: which layers are narrower, and which of their parameters.

    Args:
        model: the narrowed model.
        full: the sites of the stock one. Those of which nothing was kept are no sites of the narrowed one.
    """
    layers = layer_paths(model)
    narrowed: dict[str, Any] = {"layers": layers}
    own: dict[str, Any] = {"narrowed": narrowed}
    widths: dict[str, dict[str, int]] = {}
    sites = find_sites(model)
    kept = {site.name: site.width for site in sites}
    some_heads_went = any(site.kind == "heads" and kept.get(site.name, 0) < site.width for site in full)

    def axes_of(site: Site) -> list[Axis]:
        return [axis for stream in site.streams for axis in (*stream.writers, *stream.readers)]

    def layer_of(site: Site) -> str | None:
        return next((path for path in layers if axes_of(site)[0].parameter.startswith(f"{path}.")), None)

    for path, module in model.named_modules():
        if isinstance(module, EmbeddingLevels):  # of which some may be gone
            narrowed[LEVELS] = path
            own[LEVELS] = [[level.num_embeddings, _rank(level)] for level in module.levels]
    # An embedding may have been divided, of a layer some sites may be gone.
    for site in (*(s for s in sites if layer_of(s) is None), *(s for s in full if layer_of(s) is not None)):
        if site.kind == "heads" and not some_heads_went:
            continue
        axes, layer = axes_of(site), layer_of(site)
        if layer is None:
            path = axes[0].parameter.rpartition(".")[0]
            embedding: Any = model.get_submodule(path)
            if not isinstance(embedding, EmbeddingLevel):
                narrowed[WORDS] = path
                if (rank := _rank(embedding)) is not None:
                    own[WORDS] = rank
            continue
        key = HEADS if site.kind == "heads" else site.setting or HEAD
        if key == HEAD:
            own[HEAD] = site.width
        has_gone = site.groups_of is not None and kept.get(site.groups_of, 0) == 0
        if not has_gone and (width := kept.get(site.name, 0)) != site.width:
            widths.setdefault(str(layers.index(layer)), {})[key] = width
        table = narrowed.setdefault(key, {"groups": site.groups * site.each, "parameters": {}, "attributes": {}})
        within = len(layer) + 1
        table["parameters"] |= {axis.parameter[within:]: [axis.dim, axis.copies] for axis in axes}
        table["attributes"] |= {f"{a.module}.{a.name}"[within:]: a.quantity for a in site.attributes}
        if some_heads_went and key in (HEADS, HEAD):
            table["groups_from"] = HEAD if key == HEADS else HEADS
        if site.kind == "heads" and site.absent:
            absent = site.absent
            table["absent"] = {"module": absent.module[within:], "after": list(absent.after), "norm": absent.norm}
    return own | {"per_layer_config": widths}


def _rank(embedding: Any) -> int | None:
    """The width between the two factors of an embedding; None for one that is whole."""
    return embedding.embedding_dim if isinstance(embedding, FactorizedEmbedding) else None


def _as_in(model: nn.Module, config: Any) -> Any:
    """The configuration, with the attention that the model runs with: it is chosen anew wherever a model is loaded."""
    config._attn_implementation = model.config._attn_implementation  # type: ignore[union-attr]
    return config


def on_meta(model_class: Any, config: Any) -> nn.Module:
    """The shape of a model of this class and configuration: neither parameters nor buffers take memory."""
    with torch.device("meta"):
        return model_class(config)


def shapes_of(model: nn.Module) -> dict[str, list[int]]:
    """The shape of every parameter by name."""
    return {name: list(parameter.shape) for name, parameter in model.named_parameters()}


# ---------------------------------------------------------------------- transformers' Auto classes

REGISTRY = "transformers.models.auto.configuration_auto"


def register() -> None:
    """Make the narrowed classes known to transformers' Auto classes: now, or when it is imported.

    `import rmtkd` does not import transformers for this: a model of one's own needs none of it.
    """
    if REGISTRY in sys.modules:
        _register(sys.modules[REGISTRY])
    else:
        sys.meta_path.insert(0, _AfterImport(REGISTRY, _register))


def _register(registry: Any) -> None:
    for family in (*FAMILIES, *IMAGE_FAMILIES):
        home = _home(family)
        name = f"rmtkd_{family.name}" if home == modeling_rmtkd.__name__ else family.name
        registry.CONFIG_MAPPING.register(name, _Later(family.config_class, home), exist_ok=True)


def _home(family: EncoderFamily | ImageFamily) -> str:
    """The module that has the class of any widths: where the narrowed classes are made, or a family's own."""
    own = family.module if isinstance(family, ImageFamily) else "transformers"
    return modeling_rmtkd.__name__ if own == "transformers" else own


class _Later:
    """Stands for a narrowed configuration class until transformers, then whole, asks something of it."""

    def __init__(self, stock: str, home: str):
        self.__name__ = PREFIX + stock if home == modeling_rmtkd.__name__ else stock
        self.__module__ = home

    def __getattr__(self, name: str) -> Any:
        _register_classes()
        return getattr(getattr(importlib.import_module(self.__module__), self.__name__), name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.__getattr__("__call__")(*args, **kwargs)


def _register_classes() -> None:
    import transformers
    from transformers import AutoConfig, AutoModelForImageClassification, AutoModelForSequenceClassification

    for family in (*FAMILIES, *IMAGE_FAMILIES):
        is_stock = hasattr(transformers, family.model_class)
        if not is_stock and family in FAMILIES:
            continue  # younger than this version
        auto = AutoModelForSequenceClassification if family in FAMILIES else AutoModelForImageClassification
        model = class_named(PREFIX * is_stock + family.model_class)
        AutoConfig.register(model.config_class.model_type, model.config_class, exist_ok=True)
        auto.register(model.config_class, model, exist_ok=True)


class _AfterImport(importlib.abc.MetaPathFinder):
    """Acts once, after a module was imported by somebody else."""

    def __init__(self, module: str, act: Callable[[Any], None]):
        self.module, self.act = module, act

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if fullname != self.module:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def execute_and_act(module: Any) -> None:
            execute(module)
            self.act(module)

        spec.loader.exec_module = execute_and_act  # type: ignore[method-assign]
        return spec
