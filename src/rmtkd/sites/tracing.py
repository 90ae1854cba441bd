"""The widths of a network that is built from convolutions, linear maps, norms by batch statistics, and what acts on
every channel by itself: found by following channels through its graph.

`torch.export` gives the graph of one forward pass. A convolution or linear map ends one width and begins another;
an addition or a product of two activations makes their widths one (a residual stream); everything channel by channel
passes a width on. Whatever else a width meets leaves it whole, and says so.
"""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.fx import Node
from torch.nn.modules.batchnorm import _NormBase

from rmtkd import batches as batching
from rmtkd.batches import Batch
from rmtkd.errors import UnsupportedModelError
from rmtkd.measurement import evaluation
from rmtkd.modeling_rmtkd import LowRankPair
from rmtkd.sites.channels import Channels, Reader, Width, unite, width_of
from rmtkd.sites.graph import (
    CALLED,
    CHANNEL_BY_CHANNEL,
    CONVOLUTIONS,
    JOINING,
    LOOKING,
    RESHAPING,
    count,
    numbers,
    operator_of,
    place_of,
    positions_of,
    rank_of,
    shape_of,
    weight_of,
)
from rmtkd.sites.site import RANK, Attribute, Axis, Site, Stream
from rmtkd.sites.trial import as_called, stuck

ENDS = ("it is the input of the network", "it is the output of the network")


@dataclass(frozen=True, kw_only=True)
class Traced:
    """What was found in a network.

    Attributes:
        sites: the widths that may be narrowed, shallow to deep.
        whole: the others but input and output, by what writes them, and why each stays whole.
        ranks: the convolutions that may become two of lower rank, shallow to deep: of each the width between the two.
    """

    sites: tuple[Site, ...]
    whole: Mapping[str, str]
    ranks: tuple[Site, ...] = ()


def trace_sites(model: nn.Module, example: Batch) -> Traced:
    """Follow the channels of a network through one forward pass.

    Args:
        model: any module that `torch.export` can follow, left as it was.
        example: a batch that it can be called with; two of its rows are used.

    Raises:
        UnsupportedModelError: if it cannot be followed, or no width is found that may be narrowed.
    """
    name = type(model).__name__
    few = batching.to(batching.head(example, 2), next(model.parameters()).device)
    called, args, kwargs = as_called(model, few)
    try:
        with evaluation(model), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.export.export(called, args, dict(kwargs))
    except Exception as error:  # whatever torch makes of a forward that it cannot follow
        told = str(error).strip().splitlines()
        raise UnsupportedModelError(
            f"a model without sites must have a forward that torch.export can follow. {name} gave: "
            f"{told[0] if told else type(error).__name__}. Describe its sites (docs/own-model.md); nothing was changed."
        ) from error
    tracer = _Tracer(model, program, "" if called is model else f"{CALLED}.")
    tracer.follow()
    every = tracer.sites()
    unable = stuck(model, every, few)
    sites = tuple(site for site in every if site.name not in unable)
    found = Traced(sites=sites, whole=tracer.whole() | unable, ranks=tracer.ranks(every))
    if not sites and not found.ranks:
        raise nothing_to_narrow(model, found.whole)
    return found


def nothing_to_narrow(model: nn.Module, whole: Mapping[str, str]) -> UnsupportedModelError:
    """The error that says why every width stays as it is."""
    reasons = "; ".join(f"{path}: {why}" for path, why in whole.items()) or "it has no convolution or linear map"
    return UnsupportedModelError(
        "a model must have a width between two convolutions or linear maps that may be narrowed. "
        f"{type(model).__name__} has none: {reasons}. Nothing was changed."
    )


class _Tracer:
    """One walk through a graph."""

    def __init__(self, model: nn.Module, program: Any, prefix: str = ""):
        self.model, self.nodes = model, list(program.graph.nodes)
        signature = program.graph_signature
        self.inputs = set(signature.user_inputs)
        tensors = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
        self.names: dict[str, str] = {name: path.removeprefix(prefix) for name, path in tensors.items()}
        self.frozen = frozen_norms(model)
        owners: dict[int, list[str]] = {}
        buffers = model.named_buffers(remove_duplicate=False)
        for name, tensor in (*model.named_parameters(remove_duplicate=False), *buffers):
            owners.setdefault(id(tensor), []).append(name)
        self.ties = {name: names for names in owners.values() for name in names if len(names) > 1}
        """Of each parameter and buffer with several names, all of them."""
        self.found: dict[Node, Channels] = {}
        self.widths: list[Width] = []
        self.sides: dict[tuple[str, str], Width] = {}
        """Of each parameter, the widths of its two sides: a module that is called twice has the same at each call."""
        self.convolutions: dict[str, list[Node]] = {}
        """By path, where each is called."""
        self.handled: set[tuple[Node, Node]] = set()
        """Parameters and buffers, each with what it was seen to be used for."""
        self.order = 0

    def follow(self) -> None:
        for order, node in enumerate(self.nodes):
            self.order = order
            if node.op == "placeholder" and node.name in self.inputs and shape_of(node) is not None:
                self._stay_whole(self._begin(node), ENDS[0])
            elif node.op == "call_function":
                self._call(node, operator_of(node))
            elif node.op == "output":
                for source in node.all_input_nodes:
                    self._end(source, ENDS[1])
        self._look_at_other_uses()

    def sites(self) -> tuple[Site, ...]:
        free = [w for w in self._roots() if w.whole is None and w.writing and w.readers and w.size > 1]
        sites = tuple(map(self._site, sorted(free, key=lambda width: width.order)))
        scopes = {site.scope for site in sites if site.scope}
        # A block that holds others is called around them, not after them.
        around = {scope for scope in scopes if any(other.startswith(f"{scope}.") for other in scopes)}
        return tuple(replace(site, scope=None) if site.scope in around else site for site in sites)

    def whole(self) -> dict[str, str]:
        return {
            width.writing[0]: width.whole
            for width in sorted(self._roots(), key=lambda width: width.order)
            if width.writing and width.whole and width.whole not in ENDS
        }

    def ranks(self, sites: Sequence[Site]) -> tuple[Site, ...]:
        """The width between the two convolutions that every single one may become. One that is half of such a pair
        already has a width of its own."""
        scopes = sorted({site.scope for site in sites if site.scope}, key=len)
        halves = {
            path
            for width in self._roots()
            if width.rotates and width.whole is None and len(width.writing) == len(width.readers) == 1
            for path in (*width.writing, *(reader.module for reader in width.readers))
        }
        made = []
        for path, nodes in self.convolutions.items():
            module: Any = self.model.get_submodule(path)
            owner = self.model.get_submodule(path.rpartition(".")[0])
            is_half = path in halves or isinstance(owner, LowRankPair)
            if len(nodes) > 1 or is_half or module.groups > 1 or module.transposed:
                continue
            scope = next((scope for scope in reversed(scopes) if path.startswith(f"{scope}.")), None)
            made.append(self._rank_of(nodes[0], path, module, scope))
        return tuple(made)

    def _rank_of(self, node: Node, path: str, module: Any, scope: str | None) -> Site:
        """A pair of rank r costs `r · (taps · in + out)` where the second is 1 × 1, and `r · (in + taps · out)` where
        the first is; each at the positions of what it writes."""
        before, after = (count((shape_of(end) or ())[2:]) for end in (node.args[0], node))
        taps = count(module.kernel_size)
        behind = after * (taps * module.in_channels + module.out_channels)
        ahead = before * module.in_channels + after * taps * module.out_channels
        is_ahead = ahead < behind
        plain = not any(numbers(module.padding)) or not is_ahead
        stream = Stream(
            module=path,
            side="input" if is_ahead else "output",
            writers=_parameters(f"{path}.0", has_bias=module.bias is not None and not is_ahead),
            readers=(Axis(parameter=f"{path}.1.weight", dim=1),),
            intercept=f"{path}.1.bias" if module.bias is not None and plain else None,
            norm=self._norm_after(node),
        )
        return Site(
            name=f"{path}{RANK}",
            kind="linear",
            block=scope or path,
            width=module.in_channels if is_ahead else module.out_channels,
            streams=(stream if stream.intercept is None else replace(stream, norm=None),),
            shares=f"{path}{RANK}",
            scope=scope,
            factorizes=path,
        )

    # ------------------------------------------------------------------ operators

    def _call(self, node: Node, operator: str) -> None:
        sources = [source for source in node.all_input_nodes if source in self.found]
        if not sources or operator in LOOKING:
            return
        if operator in CONVOLUTIONS or operator == "linear":
            self._map(node, is_linear=operator == "linear")
        elif operator == "batch_norm" or (operator == "prelu" and shape_of(node.args[1]) != (1,)):
            self._norm(node)
        elif (operator in CHANNEL_BY_CHANNEL and len(node.all_input_nodes) == 1) or operator == "prelu":
            if self.found[sources[0]].dim < rank_of(sources[0]) - positions_of(operator):
                self._pass_on(node, sources[0])
            else:
                self._give_up(node, f"{operator} at {place_of(node)} mixes channels")
        elif operator in JOINING and len(node.args) > 1:
            self._join(node)
        elif operator in RESHAPING:
            self._reshape(node, sources[0])
        elif self._moves_positions(node, operator, sources[0]):
            self._pass_on(node, sources[0])
        elif operator == "getitem" and operator_of(sources[0]) in CHANNEL_BY_CHANNEL and node.args[1:] == (0,):
            self._pass_on(node, sources[0])  # the largest, of a pooling that also says where they are
        elif operator == "getitem" and node.users:
            self._give_up(node, width_of(self.found[sources[0]].width).whole or "it is one of several outputs")
        elif operator != "getitem":
            self._give_up(node, f"{operator} at {place_of(node)} is not known to act channel by channel")

    def _map(self, node: Node, *, is_linear: bool) -> None:
        """A convolution or a linear map: reads one width, writes another."""
        source, weight, *rest = node.args
        name = self._name(weight)
        path = self._module_of(name, (nn.Linear,) if is_linear else (nn.Conv1d, nn.Conv2d, nn.Conv3d))
        if name is not None and path is not None and not self._is_called(node, path):
            self._give_up(node, self._tie_of(name) or f"{name} is used at {place_of(node)}, outside its module")
            return
        if name is None or path is None:
            self._give_up(node, f"the weight at {place_of(node)} is no plain parameter of a convolution or linear map")
            return
        channels = self.found[source]  # type: ignore[index]
        module: Any = self.model.get_submodule(path)
        if not is_linear:
            self.convolutions.setdefault(path, []).append(node)
        self.handled |= {(part, node) for part in (weight, *rest) if isinstance(part, Node)}
        groups = 1 if is_linear else module.groups
        bias = self._name(rest[0]) if rest else None
        written = [Axis(parameter=parameter, dim=0) for parameter in (name, bias) if parameter]
        is_over_channels = channels.dim == (rank_of(source) - 1 if is_linear else 1)  # type: ignore[arg-type]
        if groups > 1:
            if is_over_channels:
                self._grouped(node, channels, path, groups, written)
            else:
                self._give_up(node, f"{path} is a convolution in {groups} groups of another dimension")
            return
        read = self._side(name, "read", channels.width)
        if not is_over_channels:
            self._stay_whole(read, f"{path} reads another dimension than that of the channels")
        elif not is_linear and channels.positions > 1:
            self._stay_whole(read, f"{path} is a convolution over channels that lie flattened")
        else:
            norm = self._norm_after(node)
            plain = norm is None and bias is not None and (is_linear or not any(numbers(module.padding)))
            self._read(read, Reader(path, channels.positions, norm, bias if plain else None))
        made = self._begin(node, dim=len(shape_of(node) or ()) - 1 if is_linear else 1)
        width = self._side(name, "written", made)
        if path not in width.writing:
            width.writing.append(path)
            width.writers += written

    def _read(self, width: Width, reader: Reader) -> None:
        """Once for each module: at all of its calls it reads one width."""
        others = [other for other in width.readers if other.module == reader.module]
        if not others:
            width.readers.append(reader)
        elif others[0].positions != reader.positions:
            self._stay_whole(width, f"{reader.module} reads it at other numbers of positions")
        elif others[0] != reader:  # nothing takes up a constant that goes to several places
            width.readers[width.readers.index(others[0])] = Reader(reader.module, reader.positions)

    def _grouped(self, node: Node, channels: Channels, path: str, groups: int, written: Sequence[Axis]) -> None:
        width = channels.width
        if groups == width_of(width).size == shape_of(node)[1]:  # type: ignore[index]  # one filter a channel
            width = self._side(written[0].parameter, "written", width)
            width.rotates = False
            width.writers += [axis for axis in written if axis not in width.writers]
            width.attributes.append(Attribute(module=path, name="groups", quantity="width"))
            self.found[node] = Channels(width, 1, channels.positions)
        else:
            self._give_up(node, f"{path} is a convolution in {groups} groups")

    def _norm(self, node: Node) -> None:
        """Parameters and statistics with one entry a channel."""
        source = node.args[0]
        channels = self.found[source]  # type: ignore[index]
        names = [self._name(part) for part in node.args[1:5] if isinstance(part, Node)]
        owner = None if not names or names[0] is None else names[0].rpartition(".")[0]
        if owner is None or None in names or not isinstance(self.model.get_submodule(owner), (_NormBase, nn.PReLU)):
            self._give_up(node, f"the norm at {place_of(node)} is no plain one with its own parameters")
            return
        if channels.dim != 1:
            self._give_up(node, f"{owner} is over another dimension than that of the channels")
            return
        if operator_of(node) == "batch_norm" and len(names) < 3 and node.args[3] is None:
            self._give_up(node, f"{owner} takes its statistics from the batch that is run")
            return
        self.handled |= {(part, node) for part in node.args[1:5] if isinstance(part, Node)}
        axes = [Axis(parameter=name, dim=0, positions=channels.positions) for name in names if name is not None]
        width = self._side(axes[0].parameter, "written", channels.width)
        width.writers += [axis for axis in axes if axis not in width.writers]
        self._pass_on(node, source)  # type: ignore[arg-type]

    def _join(self, node: Node) -> None:
        first, second = node.args[0], node.args[1]
        parts = [part for part in (first, second) if isinstance(part, Node) and part in self.found]
        if len(parts) < 2:
            other = next((part for part in (first, second) if isinstance(part, Node) and part not in self.found), None)
            if other is None or count(shape_of(other)) == 1:
                self._pass_on(node, parts[0])
            else:
                self._give_up(node, f"{operator_of(node)} at {place_of(node)} has a factor or term for each channel")
            return
        a, b = (self.found[part] for part in parts)
        same = a.dim - rank_of(parts[0]) == b.dim - rank_of(parts[1]) and a.positions == b.positions
        if not same or width_of(a.width).size != width_of(b.width).size:
            self._give_up(node, f"{operator_of(node)} at {place_of(node)} joins other numbers of channels")
            return
        deeper = a if rank_of(parts[0]) >= rank_of(parts[1]) else b
        unite(a.width, b.width).rotates = False
        self.found[node] = deeper

    def _reshape(self, node: Node, source: Node) -> None:
        """Whether channels stay apart is seen by the shapes: with examples of unequal numbers nothing else fits."""
        channels, before, after = self.found[source], shape_of(source), shape_of(node)
        width_of(channels.width).rotates = False
        assert before is not None and after is not None
        if operator_of(node) == "mean":
            named = numbers(node.args[1]) if len(node.args) > 1 else range(len(before))
            dims = [dim % len(before) for dim in named]
            keeps = len(node.args) > 2 and bool(node.args[2])
            if channels.dim in dims:
                self._give_up(node, f"mean at {place_of(node)} is taken over channels")
                return
            shift = 0 if keeps else sum(1 for dim in dims if dim < channels.dim)
            self.found[node] = Channels(channels.width, channels.dim - shift, channels.positions)
        elif len(after) > channels.dim and after[: channels.dim + 1] == before[: channels.dim + 1]:
            self.found[node] = channels
        elif len(after) == channels.dim + 1 and after[: channels.dim] == before[: channels.dim]:
            positions = count(before[channels.dim + 1 :])
            self.found[node] = Channels(channels.width, channels.dim, channels.positions * positions)
        else:
            self._give_up(node, f"{operator_of(node)} at {place_of(node)} mixes channels with positions")

    def _moves_positions(self, node: Node, operator: str, source: Node) -> bool:
        """Whether positions alone are cut off or added."""
        dim = self.found[source].dim
        if operator == "slice":
            return bool(node.args[1] != dim)
        return operator in ("pad", "constant_pad_nd") and len(numbers(node.args[1])) // 2 < rank_of(source) - dim

    # ------------------------------------------------------------------ widths

    def _begin(self, node: Node, dim: int = 1) -> Width:
        shape = shape_of(node) or ()
        width = Width(size=shape[dim] if len(shape) > dim else 1, order=self.order)
        self.widths.append(width)
        self.found[node] = Channels(width, dim)
        return width

    def _pass_on(self, node: Node, source: Node) -> None:
        self.found[node] = self.found[source]
        width_of(self.found[node].width).rotates = False

    def _side(self, name: str, side: str, width: Width) -> Width:
        """The width of one side of a parameter."""
        return unite(self.sides.setdefault((name, side), width), width)

    def _stay_whole(self, width: Width, why: str) -> None:
        width = width_of(width)
        width.whole = width.whole or why

    def _look_at_other_uses(self) -> None:
        """A parameter that something else uses, too, cannot be cut."""
        touched = {name: node for node in self.nodes if (name := self._name(node)) and node.op == "placeholder"}
        for width in self._roots():
            names = [axis.parameter for axis in width.writers]
            names += [f"{reader.module}.{leaf}" for reader in width.readers for leaf in ("weight", "bias")]
            for name in names:
                if tie := self._tie_of(name):
                    self._stay_whole(width, tie)
                node = touched.get(name)
                for user in () if node is None else node.users:
                    if (node, user) not in self.handled and operator_of(user) not in LOOKING:
                        self._stay_whole(width, f"{name} is used at {place_of(user)}, too")

    def _tie_of(self, name: str) -> str | None:
        """Why a parameter or buffer with several names cannot be cut."""
        return f"{' and '.join(self.ties[name])} are the same" if name in self.ties else None

    def _is_called(self, node: Node, path: str) -> bool:
        """Whether a map is made by the module that has its weight, where a hook sees what goes in."""
        place = dict(self.model.named_modules(remove_duplicate=False)).get(place_of(node))
        return place is self.model.get_submodule(path)

    def _end(self, node: Node, why: str) -> None:
        if node in self.found:
            self._stay_whole(self.found[node].width, why)

    def _give_up(self, node: Node, why: str) -> None:
        """The widths that go in here, and what comes out, be it several, stay as they are."""
        for source in node.all_input_nodes:
            self._end(source, why)
        self._stay_whole(self._begin(node), why)

    def _roots(self) -> Iterator[Width]:
        return (width for width in self.widths if width.same_as is None)

    # ------------------------------------------------------------------ names

    def _name(self, part: object) -> str | None:
        """The name of a parameter or buffer that goes in as it is."""
        return self.names.get(part.name) if isinstance(part, Node) else None

    def _module_of(self, name: str | None, kinds: tuple[type[nn.Module], ...]) -> str | None:
        """The path of the module of one of these types that has this weight."""
        if name is None or not name.endswith("weight"):
            return None
        path = name.rpartition(".")[0]
        return path if type(self.model.get_submodule(path)) in kinds else None

    def _norm_after(self, node: Node) -> str | None:
        """The norm by batch statistics, to be gathered anew, that alone reads what a map writes. One of two maps cannot
        take up the constants of both."""
        users = list(node.users)
        statistics = users[0].args[3] if len(users) == 1 and operator_of(users[0]) == "batch_norm" else None
        if not isinstance(statistics, Node):
            return None
        name = self._name(statistics)
        path = None if name is None else name.rpartition(".")[0]
        is_shared = any(weight_of(call.args[0]) is not weight_of(node) for call in statistics.users)
        return None if path is None or is_shared or path in self.frozen else path

    def _site(self, width: Width) -> Site:
        name = width.writing[0]
        parts = [*width.writing, *(reader.module for reader in width.readers)]
        scope = _common_ancestor(parts)
        streams = tuple(
            Stream(
                module=reader.module,
                side="input",
                writers=tuple(width.writers) if i == 0 else (),
                readers=(Axis(parameter=f"{reader.module}.weight", dim=1, positions=reader.positions),),
                intercept=reader.intercept,
                norm=reader.norm,
                positions=reader.positions,
            )
            for i, reader in enumerate(width.readers)
        )
        return Site(
            name=name,
            kind="linear" if width.rotates and len(streams) == 1 else "pointwise",
            block=scope or name,
            width=width.size,
            streams=streams,
            shares=name,
            scope=scope,
            attributes=tuple(width.attributes),
        )


def frozen_norms(model: nn.Module) -> frozenset[str]:
    """Paths of the norms that keep their statistics on purpose: that `train`, by their class, by themselves or by a
    module around them, leaves in evaluation mode."""
    with evaluation(model):  # which gives every module its flag back
        model.train()
        named = model.named_modules(remove_duplicate=False)
        return frozenset(path for path, module in named if isinstance(module, _NormBase) and not module.training)


def _parameters(path: str, *, has_bias: bool) -> tuple[Axis, ...]:
    """The axes by which a convolution writes its output."""
    return tuple(Axis(parameter=f"{path}.{name}", dim=0) for name in ("weight", "bias")[: 1 + has_bias])


def _common_ancestor(paths: Sequence[str]) -> str | None:
    """The module that all of these lie in; None if it is the network itself."""
    common: list[str] = []
    for parts in zip(*(path.split(".")[:-1] for path in paths), strict=False):
        if len(set(parts)) > 1:
            break
        common.append(parts[0])
    return ".".join(common) or None
