"""The claims of the Fisher metric: it is the information that it says, it predicts the divergence of small errors, and
cuts in it disturb the answers less."""

import pytest
import torch
from torch import nn

from conftest import assert_untouched, random_rows, snapshot, tiny_bert
from rmtkd import batches as batching
from rmtkd.activations import collect
from rmtkd.cutting import cut_in_order
from rmtkd.errors import UnsupportedModelError
from rmtkd.fisher import DAMPING, output_metrics, reader_outputs
from rmtkd.measurement import evaluation
from rmtkd.memory import Pieces
from rmtkd.sites import feed_forward_site, find_sites


class Classifier(nn.Module):
    """One block between an input and the scores."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.act, self.down, self.head = nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 5), nn.Linear(5, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.down(self.act(self.up(x))))


def exact(model: Classifier, x: torch.Tensor) -> torch.Tensor:
    """E Wᵀ (diag p - p pᵀ) W of the scores `W h + b`."""
    p = model(x).softmax(-1).double()
    information = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    weight = model.head.weight.double()
    return (weight.T @ information @ weight).mean(0)


def damped(metric: torch.Tensor) -> torch.Tensor:
    return metric + DAMPING * metric.diagonal().mean() * torch.eye(len(metric), dtype=metric.dtype)


@torch.no_grad()
def test_the_metric_is_the_fisher_information_of_the_output() -> None:
    torch.manual_seed(0)
    model, x = Classifier(), torch.randn(40_000, 6)
    site = feed_forward_site(model, "block", writers=["up"], reader="down")
    root = output_metrics(model, [site], [(part,) for part in x.split(1000)])["down"]
    found = root @ root / len(x)
    expected = damped(exact(model, x))
    assert torch.linalg.matrix_norm(found - expected) < 0.03 * torch.linalg.matrix_norm(expected)
    assert torch.equal(root, root.T) or torch.allclose(root, root.T)


@torch.no_grad()
def test_half_its_quadratic_form_is_the_divergence_of_a_small_error() -> None:
    torch.manual_seed(1)
    model, x = Classifier(), torch.randn(40_000, 6)
    site = feed_forward_site(model, "block", writers=["up"], reader="down")
    root = output_metrics(model, [site], [(part,) for part in x.split(1000)])["down"]
    summed = root @ root
    damping = DAMPING / (1 + DAMPING) * summed.diagonal().mean()
    metric = (summed - damping * torch.eye(5, dtype=summed.dtype)) / len(x)
    error = 0.02 * torch.randn(5, dtype=torch.float64)
    hidden = model.down(model.act(model.up(x))).double()
    head = model.head.double()
    before, after = head(hidden).log_softmax(-1), head(hidden + error).log_softmax(-1)
    divergence = float((before.exp() * (before - after)).sum(-1).mean())
    assert divergence == pytest.approx(float(error @ exact(model.float(), x) @ error) / 2, rel=0.02)
    assert divergence == pytest.approx(float(error @ metric @ error) / 2, rel=0.05)


def test_padding_and_unread_tokens_do_not_count() -> None:
    model = tiny_bert()
    (batch,) = list(random_rows(12, batch_size=12))
    longer = {
        name: value if name in ("labels", "row_ids") else nn.functional.pad(value, (0, 3))
        for name, value in batch.items()
    }
    sites = find_sites(model)
    one, other = output_metrics(model, sites, [batch]), output_metrics(model, sites, [longer])
    assert set(one) == set(reader_outputs(sites))
    for path, root in one.items():
        assert torch.allclose(root, other[path], rtol=1e-3, atol=1e-4 * float(root.abs().max())), path


def test_the_model_is_left_as_it_was() -> None:
    model = tiny_bert()
    model.classifier.weight.requires_grad_(False)
    before, flags = snapshot(model), [p.requires_grad for p in model.parameters()]
    output_metrics(model, find_sites(model), random_rows(8))
    assert_untouched(model, before)
    assert [p.requires_grad for p in model.parameters()] == flags
    assert all(p.grad is None for p in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


def test_cuts_in_the_metric_disturb_the_answers_less() -> None:
    """The claim for which it is there, over several random networks."""
    better = 0
    for seed in range(5):
        model, rows = tiny_bert(seed=seed), random_rows(200, seed=seed)
        sites = [site for site in find_sites(model) if site.name in ("embeddings.word", "layer.0.ffn", "layer.1.ffn")]
        widths = {site.name: site.width // 4 for site in sites}

        def divergence(metrics: dict[str, torch.Tensor], model=model, rows=rows, sites=sites, widths=widths) -> float:
            student = cut_in_order(model, sites, widths, rows, metrics=metrics)[0]
            total = 0.0
            with evaluation(model), evaluation(student):
                for batch in rows:
                    a, b = (batching.logits(net, batch).log_softmax(-1) for net in (model, student))
                    total += float((a.exp() * (a - b)).sum())
            return total

        better += divergence(output_metrics(model, sites, rows)) < divergence({})
    assert better >= 4


def test_sites_of_one_model_are_seen_with_one_pass() -> None:
    model, rows = tiny_bert(), random_rows(16)
    calls = []
    model.register_forward_pre_hook(lambda *_: calls.append(1))
    output_metrics(model, find_sites(model), rows)
    assert len(calls) == sum(1 for _ in rows)
    assert collect(model, find_sites(model), random_rows(64))


def test_every_row_counts_once_when_memory_ran_out_half_way() -> None:
    """In the backward pass, when gradients of later outputs have been seen."""
    model = tiny_bert().double()
    model.eval()
    sites, rows = find_sites(model), random_rows(48)
    expected = output_metrics(model, sites, rows, seed=3)
    passes = 0

    class Tight(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, state: torch.Tensor) -> torch.Tensor:
            return state.clone()

        @staticmethod
        def backward(ctx: object, *gradients: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
            nonlocal passes
            passes += 1
            if passes == 2:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return gradients[0]

    def squeeze(_: nn.Module, __: object, output: torch.Tensor) -> torch.Tensor:
        return Tight.apply(output)

    handle = model.get_submodule("bert.encoder.layer.1.intermediate.dense").register_forward_hook(squeeze)
    pieces = Pieces()
    found = output_metrics(model, sites, rows, seed=3, pieces=pieces)
    handle.remove()
    assert pieces.count == 2 and passes > 4
    for path, root in expected.items():
        torch.testing.assert_close(found[path], root, rtol=1e-6, atol=1e-6 * float(root.abs().max()))


def test_a_forward_without_gradients_is_refused_by_the_name_of_the_other_metric() -> None:
    class Frozen(Classifier):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with torch.no_grad():
                x = self.down(self.act(self.up(x)))
            return self.head(x)

    model = Frozen()
    site = feed_forward_site(model, "ffn", writers=["up"], reader="down")
    with pytest.raises(UnsupportedModelError, match="Take metric='output'"):
        output_metrics(model, [site], [(torch.randn(8, 6),)])


def test_products_alone_have_no_metric() -> None:
    model = tiny_bert()
    products = [site for site in find_sites(model) if site.kind == "bilinear"]
    assert output_metrics(model, products, list(random_rows(16))) == {}
