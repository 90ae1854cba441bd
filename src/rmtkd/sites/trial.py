"""Whether a network runs with fewer channels, which the graph of one forward pass does not say: it may hold a number of
channels as a constant (`x.view(-1, 400)`), and in training another forward may run."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.func import functional_call

from rmtkd import batches as batching
from rmtkd.batches import Batch, Call
from rmtkd.measurement import evaluation
from rmtkd.seeding import seeded
from rmtkd.sites.graph import CALLED
from rmtkd.sites.site import Site


class Called(nn.Module):
    """A model as a batch with a `forward` of its own calls it."""

    def __init__(self, model: nn.Module, call: Call):
        super().__init__()
        self.add_module(CALLED, model)
        self.call = call.forward

    def forward(self, rows: Any) -> Tensor:
        """Class scores."""
        return self.call(self.get_submodule(CALLED), rows)


def as_called(model: nn.Module, batch: Batch) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
    """A module, and what to call it with: the model itself, or it as the batch's `forward` calls it."""
    if isinstance(batch, Call):
        return Called(model, batch), (batch.rows,), {}
    return model, *batching.inputs(batch)


def stuck(model: nn.Module, sites: Sequence[Site], batch: Batch) -> dict[str, str]:
    """The sites with half of whose width the network does not run on this batch, and why: one after the other, each
    beside those with which it does.

    Parameters, buffers, modes and random numbers are left as they were.
    """
    found: dict[str, str] = {}
    for is_training in (False, True):
        if _runs(model, sites, batch, is_training) is None or _runs(model, (), batch, is_training) is not None:
            continue
        fewer: list[Site] = []
        for site in sites:
            if site.name in found:
                continue
            failure = _runs(model, [*fewer, site], batch, is_training)
            if failure is None:
                fewer.append(site)
            else:
                found[site.name] = f"{'in training ' * is_training}the network does not run with fewer: {failure}"
    return found


def _runs(model: nn.Module, sites: Sequence[Site], batch: Batch, is_training: bool) -> str | None:
    """What goes wrong in one pass with half of these widths, if anything does."""
    called, args, kwargs = as_called(model, batch)
    prefix = "" if called is model else f"{CALLED}."
    values = {name: buffer.clone() for name, buffer in model.named_buffers()}
    tensors: dict[str, Tensor] = {**dict(model.named_parameters()), **values}
    device = next(model.parameters()).device
    try:
        for site in sites:
            for stream in site.streams:
                for axis in (*stream.writers, *stream.readers):
                    size = max(1, site.width // 2) * axis.copies * axis.positions
                    tensor = values.get(axis.parameter, tensors[axis.parameter])
                    values[axis.parameter] = tensor.narrow(axis.dim, 0, size)
        with seeded(None, device), evaluation(model), _halved(sites, model):
            model.train(is_training)
            functional_call(called, {f"{prefix}{name}": value for name, value in values.items()}, args, kwargs)
    except Exception as error:  # whatever a forward may raise
        return (str(error).strip().splitlines() or [type(error).__name__])[0]
    return None


@contextmanager
def _halved(sites: Sequence[Site], model: nn.Module) -> Iterator[None]:
    """With the attributes that half of these widths have, for a while."""
    found = [
        (model.get_submodule(attribute.module), attribute.name, attribute.value(max(1, site.width // 2), site.groups))
        for site in sites
        for attribute in site.attributes
    ]
    before = [(module, name, getattr(module, name)) for module, name, _ in found]
    try:
        for module, name, value in found:
            setattr(module, name, value)
        yield
    finally:
        for module, name, value in before:
            setattr(module, name, value)
