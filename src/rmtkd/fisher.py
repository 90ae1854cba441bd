"""How much the network's answers care about each direction of an activation: the Fisher metric.

An error δ of an activation moves the predictive distribution by ½ δᵀ F δ nats of Kullback–Leibler divergence, to
second order, with the Fisher information F = E Σ_y p_y g_y g_yᵀ, g_y = ∂ log p_y / ∂ activation (Amari 1998). It is the
metric in which the error of a cut ought to be small: of an output `W h`, `‖F^½ W (I - T) C^½‖` instead of
`‖W (I - T) C^½‖`. Its spectrum falls steeply (on MiniLM the effective rank of F is 13 of 384), so that most
directions of most outputs hardly matter.

One backward pass a batch is enough. With signs ε_y = ±1 drawn for each row, the gradient of `Σ_y ε_y √p_y log p_y` (the
p_y under the root held fixed) has the second moment F: the cross terms between classes vanish in expectation.

References:
    S. Amari, "Natural gradient works efficiently in learning", Neural Computation 10 (1998) 251–276. The estimate by
    random signs is Hutchinson's, Comm. Stat. Sim. 19 (1990) 433–450.
"""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from functools import partial

import torch
from jaxtyping import Float, Float64
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from rmtkd import batches as batching
from rmtkd.activations import channel_dim
from rmtkd.bases import Basis
from rmtkd.batches import Batch
from rmtkd.errors import UnsupportedModelError
from rmtkd.measurement import evaluation
from rmtkd.memory import Pieces
from rmtkd.sites import Site, Stream

METRICS = ("fisher", "output")
"""In which the error of a cut may be measured: the Fisher metric of what the readers write, or the identity."""
DAMPING = 0.1
"""Share of its mean diagonal that is added to a metric: the gradients are those of the untouched network, and of some
rows."""

Metrics = Mapping[str, Float64[Tensor, "_ _"]]
"""By path of a module, a root R of the Fisher metric RᵀR of its output, summed over positions and damped."""


def output_metrics(
    model: nn.Module,
    sites: Sequence[Site],
    batches: Iterable[Batch],
    *,
    seed: int = 0,
    bf16: bool = False,
    pieces: Pieces | None = None,
) -> dict[str, Float64[Tensor, "_ _"]]:
    """Roots of the Fisher metrics of all outputs that the sites' readers write, summed over the real positions.

    Args:
        model: the model, run in evaluation mode; its parameters take no gradient and are left as they were.
        sites: sites of this model. Products have no reader.
        batches: calibration batches.
        seed: of the signs.
        bf16: whether passes run under bfloat16 autocast.
        pieces: in how many pieces a batch is run, should memory run out.

    Returns:
        By path of the module that writes the output, its metric's root, symmetric; damped (`DAMPING`).
    """
    device = next(model.parameters()).device
    signs = torch.Generator(device).manual_seed(seed)
    autocast = partial(torch.autocast, device.type, torch.bfloat16) if bf16 else nullcontext
    sums: dict[str, Tensor] = {}
    gradients: list[tuple[str, Tensor]] = []
    """Of one batch, as vectors, in the order in which they came."""
    mask: Tensor | None = None

    def see(path: str, only_used: bool, _: nn.Module, __: object, output: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            raise UnsupportedModelError(
                f"the metric of the loss needs gradients of what {path} puts out. The model's forward runs it under "
                "torch.no_grad. Take metric='output'; nothing was changed."
            )
        output = output if output.requires_grad else output.detach().requires_grad_().clone()
        used = output.detach().any(-1) if only_used else None  # of an embedding
        output.register_hook(partial(keep, path, used))
        return output

    def keep(path: str, used: Tensor | None, gradient: Tensor) -> None:
        gradient = gradient.detach().movedim(channel_dim(model.get_submodule(path)), -1)
        if used is not None:  # a table of some of the tokens gives the others nothing
            gradient = gradient * used[..., None]
        is_masked = mask is not None and gradient.shape[:-1] == mask.shape
        gradients.append((path, (gradient[mask] if is_masked else gradient.flatten(0, -2)).float()))

    def run(before: Tensor, parts: Sequence[Batch]) -> None:
        """See the gradients of one batch. A second attempt, in smaller parts, sees them from the start, with the same
        signs."""
        nonlocal mask
        gradients.clear()
        signs.set_state(before)
        for part in parts:
            part = batching.to(part, device)
            mask = batching.real_positions(part)
            with autocast():
                log_p = batching.logits(model, part).float().log_softmax(-1)
            weight = log_p.detach().div(2).exp()
            weight = weight * torch.randint(0, 2, weight.shape, generator=signs, device=device).mul(2).sub(1)
            if log_p.requires_grad:  # no reader was seen: products have none
                (weight * log_p).sum().backward()

    pieces = pieces or Pieces()
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    with ExitStack() as hooks, evaluation(model), torch.enable_grad():
        for path, only_used in reader_outputs(sites).items():
            hooks.callback(model.get_submodule(path).register_forward_hook(partial(see, path, only_used)).remove)
        for parameter, flag in flags:
            hooks.callback(parameter.requires_grad_, flag)
            parameter.requires_grad_(False)
        for batch in batches:
            pieces(batch, partial(run, signs.get_state()))
            while gradients:
                path, vectors = gradients.pop(0)
                moment = (vectors.mT @ vectors).double()
                sums[path] = moment if path not in sums else sums[path] + moment
    return {path: _root(moment.cpu()) for path, moment in sums.items()}


def reader_outputs(sites: Iterable[Site]) -> dict[str, bool]:
    """Paths of the modules whose outputs the sites' readers write; and whether one is an embedding's own output, of
    which positions that are all zero do not count."""
    return {
        path: site.factorizes is not None and stream.writers[0].parameter == f"{site.factorizes}.weight"
        for site in sites
        for stream in site.streams
        for path in _outputs(site, stream)
    }


def weighed(
    readers: Sequence[Float[Tensor, "groups _ width"]], site: Site, metrics: Metrics
) -> tuple[Float[Tensor, "groups _ width"], ...]:
    """The readers of a site's streams in the metric of what they write: `F^½ W`, for each of several readers by itself.
    All taps of a convolution write the same output.

    Args:
        readers: one a stream, from `activations.readers`.
        site: their site.
        metrics: from `output_metrics`. A stream of which one is missing is left as it is.
    """
    return tuple(
        _in_metrics(reader, _outputs(site, stream), metrics)
        for reader, stream in zip(readers, site.streams, strict=True)
    )


def after_cut(metrics: Metrics, site: Site, basis: Basis) -> Metrics:
    """These metrics once a site has been cut: of outputs that it is written with, what is left of them."""
    copies = {axis.parameter.rpartition(".")[0]: axis.copies for stream in site.streams for axis in stream.writers}
    return {
        path: metric @ torch.block_diag(*basis.reduce.repeat(copies[path], 1, 1)).mT if path in copies else metric
        for path, metric in metrics.items()
    }


def fit(metrics: Metrics, model: nn.Module) -> bool:
    """Whether these are metrics of all the outputs that the model has by now."""
    return all(
        metric.shape[1] == len(module.weight)
        for path, metric in metrics.items()
        if isinstance(module := model.get_submodule(path), (nn.Linear, _ConvNd))
    )


def _in_metrics(
    reader: Float[Tensor, "groups out width"], paths: Sequence[str], metrics: Metrics
) -> Float[Tensor, "groups _ width"]:
    if not all(path in metrics for path in paths):
        return reader
    found = [metrics[path] for path in paths]
    outputs = [metric.shape[1] for metric in found]
    taps = reader.shape[1] // sum(outputs)
    parts = reader.split([taps * size for size in outputs], dim=1)
    return torch.cat(
        [
            torch.einsum("uo,gotw->gutw", metric, part.unflatten(1, (-1, taps))).flatten(1, 2)
            for metric, part in zip(found, parts, strict=True)
        ],
        dim=1,
    )


def _outputs(site: Site, stream: Stream) -> list[str]:
    """Paths of the modules whose outputs a stream's readers write; of one that is to be factorised, itself."""
    if site.factorizes is not None:
        return [site.factorizes]
    return [axis.parameter.rpartition(".")[0] for axis in stream.readers]


def _root(moment: Float64[Tensor, "out out"]) -> Float64[Tensor, "out out"]:
    damping = DAMPING * moment.diagonal().mean().clamp_min(torch.finfo(moment.dtype).tiny)
    values, vectors = torch.linalg.eigh(moment + damping * torch.eye(len(moment), dtype=moment.dtype))
    return (vectors * values.clamp_min(0).sqrt()) @ vectors.mT
