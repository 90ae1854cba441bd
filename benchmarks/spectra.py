"""How many directions are signal? Every rule on noise of eight kinds, with ten planted directions.

    python benchmarks/spectra.py                     # 20 seeds, n/d = 10, 50, 200: the table of docs/results/spectra.md
    python benchmarks/spectra.py --quick --json      # 4 seeds; one JSON object on stdout, under 10 minutes on 2 cores

Vectors of d = 256 coordinates come in sequences of 32. Noise, then ten orthonormal directions, drawn at random, of
variance 8 … 1.3 (geometric) times the largest eigenvalue of the noise of the same draw:

    iso        white
    iso_weak   white, and the directions are 6 … 1.5 times √q, the least that can be seen
    hetero     independent coordinates of unequal variance, gamma(2)
    ar1        white, correlated 0.9 from vector to vector of a sequence, noise and signal alike
    plaw_diag  variances 1/(i + 10)
    plaw_rot   the same in a random basis
    act_like   as hetero, correlated 0.8, every vector scaled so that it has Student's law with 6 degrees of freedom
    massive    act_like with two coordinates of variance 100 times the edge, which count as signal

A rule gets what it may know: eigenvalues, variances, samples, the effective samples estimated from the covariances of
16 groups of sequences, and the cross-covariance with a second pass (same signal, noise drawn anew). Bias is the mean
error of the count, exact the share of draws without error.
"""

import argparse
import json
import sys
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np
from scipy.signal import lfilter

from records import cell
from rmtkd.environment import machine, versions
from rmtkd.errors import DataError
from rmtkd.spectra import RULES, Spectrum

WIDTH, SPIKES, LENGTH, GROUPS = 256, 10, 32, 16
NOISES = ("iso", "iso_weak", "hetero", "ar1", "plaw_diag", "plaw_rot", "act_like", "massive")
STRENGTHS = np.geomspace(8, 1.3, SPIKES)
SKIPPED = ("energy", "fixed")  # they ask for a share, and detect nothing

Draw = Callable[[int], np.ndarray]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="4 seeds, and no file")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--seeds", type=int, default=None, help="the first so many; 20, or 4 with --quick")
    parser.add_argument("--ratios", type=int, nargs="*", default=[10, 50, 200], help="n/d")
    parser.add_argument("--noises", nargs="*", default=list(NOISES), choices=NOISES)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/spectra"))
    args = parser.parse_args()
    seeds = args.seeds or (4 if args.quick else 20)
    cells = {}
    for noise in args.noises:
        for ratio in args.ratios:
            cells[noise, ratio] = counts(noise, ratio, seeds) if args.quick else recorded(args.out, noise, ratio, seeds)
    grid = {
        rule: {
            noise: summary([error for ratio in args.ratios for error in cells[noise, ratio][rule]])
            for noise in args.noises
        }
        for rule in RULES
        if rule not in SKIPPED
    }
    print(json.dumps(grid, indent=1) if args.json else table(grid, args.noises))
    if not args.json:
        made_with = f"{machine()}; {versions()}" if args.quick else f"machine and versions: {args.out}"
        print(f"\n{seeds} seeds, n/d {args.ratios}; {made_with}")


def recorded(out: Path, noise: str, ratio: int, seeds: int) -> dict[str, list[int]]:
    """What `counts` gives, from its record, or run and written; what is told on the way is not of the table."""
    path = out / f"{noise}_{ratio}.json"
    with redirect_stdout(sys.stderr):
        errors = cell(path, lambda: {"errors": counts(noise, ratio, seeds)})["errors"]
    known = min(map(len, errors.values()))
    if known < seeds:
        sys.exit(f"{path} must hold {seeds} seeds. It holds {known}. Name another folder by --out.")
    return {rule: found[:seeds] for rule, found in errors.items()}


def counts(noise: str, ratio: int, seeds: int) -> dict[str, list[int]]:
    """By rule, the error of the count at every seed."""
    errors: dict[str, list[int]] = {rule: [] for rule in RULES if rule not in SKIPPED}
    for seed in range(seeds):
        spectrum, truth = draw(noise, ratio * WIDTH, seed)
        for rule, found in errors.items():
            try:
                found.append(RULES[rule]()(spectrum).count(spectrum.eigenvalues.ravel()) - truth)
            except DataError as error:
                sys.exit(f"{rule}: {error}")
    return errors


def draw(noise: str, samples: int, seed: int) -> tuple[Spectrum, int]:
    """The spectrum of one draw, and how many directions are signal."""
    rng = np.random.default_rng([seed, samples, NOISES.index(noise)])
    correlation = {"ar1": 0.9, "act_like": 0.8, "massive": 0.8}.get(noise, 0.0)
    heavy = noise in ("act_like", "massive")
    scale = np.sqrt(4 / rng.chisquare(6, (samples, 1))) if heavy else np.ones((samples, 1))

    def vectors(width: int) -> np.ndarray:
        white = rng.standard_normal((samples // LENGTH, LENGTH, width))
        if correlation:
            white[:, 1:] *= np.sqrt(1 - correlation**2)
            white = np.asarray(lfilter([1.0], [1.0, -correlation], white, axis=1))
        return white.reshape(-1, width)

    color = coloring(noise, rng)
    first = scale * (vectors(WIDTH) @ color if color.ndim == 2 else vectors(WIDTH) * color)
    edge = float(np.linalg.eigvalsh(first.T @ first / samples)[-1])
    strengths = edge * STRENGTHS
    if noise == "iso_weak":
        strengths = np.sqrt(WIDTH / samples) * np.geomspace(6, 1.5, SPIKES)
    axes = np.linalg.qr(rng.standard_normal((WIDTH, SPIKES)))[0]
    signal = scale * ((vectors(SPIKES) * np.sqrt(strengths)) @ axes.T)
    truth = SPIKES
    if noise == "massive":
        loud = rng.choice(WIDTH, 2, replace=False)
        signal[:, loud] += scale * vectors(2) * np.sqrt(100 * edge)
        truth += 2
    second = scale * (vectors(WIDTH) @ color if color.ndim == 2 else vectors(WIDTH) * color)
    first += signal
    second += signal
    return spectrum_of(first, second), truth


def coloring(noise: str, rng: np.random.Generator) -> np.ndarray:
    """What white noise is multiplied by: standard deviations, or a matrix."""
    if noise in ("hetero", "act_like", "massive"):
        return np.sqrt(rng.gamma(2, 0.5, WIDTH))
    if noise.startswith("plaw"):
        deviations = 1 / np.sqrt(np.arange(WIDTH) + 10.0)
        if noise == "plaw_diag":
            return deviations
        return deviations[:, None] * np.linalg.qr(rng.standard_normal((WIDTH, WIDTH)))[0]
    return np.ones(WIDTH)


def spectrum_of(first: np.ndarray, second: np.ndarray) -> Spectrum:
    """What rmtkd would know of these vectors, and of a second pass."""
    samples = len(first)
    first, second = first - first.mean(axis=0), second - second.mean(axis=0)
    covariance, cross = first.T @ first / samples, first.T @ second / samples
    return Spectrum(
        eigenvalues=np.linalg.eigvalsh(covariance)[None, ::-1].copy(),
        samples=samples,
        variances=np.diag(covariance)[None].copy(),
        effective_samples=min(float(samples), effective_samples(first)),
        replicate=np.linalg.eigvalsh((cross + cross.T) / 2)[None],
    )


def effective_samples(vectors: np.ndarray) -> float:
    """Independent vectors that would scatter the covariances of groups of sequences as much as these do.

    In the lower three quarters of the eigenvectors of one half of the groups, where there is little signal, the
    covariances T of the other half are compared: for n independent Gaussian vectors E‖T − Σ‖² = (tr²Σ + tr Σ²)/n. The
    halves are swapped, and the two answers averaged harmonically.
    """
    groups = [
        np.concatenate(part).T @ np.concatenate(part) / (len(part) * LENGTH)
        for part in np.array_split(vectors.reshape(-1, LENGTH, vectors.shape[1]), GROUPS)
    ]
    inverse = []
    for basis, rest in ((groups[::2], groups[1::2]), (groups[1::2], groups[::2])):
        lower = np.linalg.eigh(np.mean(basis, axis=0))[1][:, : 3 * WIDTH // 4]
        parts = np.stack([lower.T @ part @ lower for part in rest])
        mean, m = parts.mean(axis=0), len(parts)
        scatter = float(((parts - mean) ** 2).sum()) / (m - 1)
        trace, square, size = float(np.trace(mean)), float((mean**2).sum()), len(vectors) / GROUPS
        inverse.append(scatter / (trace**2 + square - trace**2 / (m * size)))
    return GROUPS / float(np.mean(inverse))


def summary(errors: list[int]) -> dict[str, float]:
    return {"bias": float(np.mean(errors)), "exact": float(np.mean(np.equal(errors, 0)))}


def table(grid: Mapping[str, Mapping[str, Mapping[str, float]]], noises: list[str]) -> str:
    """A Markdown table, the rule that is exact most often first; iso_weak apart."""
    strong = [noise for noise in noises if noise != "iso_weak"]
    exact = {rule: float(np.mean([row[noise]["exact"] for noise in strong])) for rule, row in grid.items()}
    lines = [
        f"| rule | {' | '.join(noises)} | all but weak |",
        f"|---|{'---|' * (len(noises) + 1)}",
        *(
            f"| `{rule}` | "
            + " | ".join(f"{grid[rule][noise]['bias']:+.1f} / {grid[rule][noise]['exact']:.0%}" for noise in noises)
            + f" | {exact[rule]:.0%} |"
            for rule in sorted(grid, key=lambda rule: -exact[rule])
        ),
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
