"""Images that were spoiled and texts that were mistyped: always in the same way from the same seed.

Images: the corruptions of CIFAR-10-C with their published strengths, after Hendrycks, Dietterich, arXiv 1903.12261, and
the code that made the published images (github.com/hendrycks/robustness, `make_cifar_c.py`). Ours differ:

* random numbers are numpy's new generator's, so that no image is the published one;
* motion blur is summed here along a line (the one-sided Gaussian of ImageMagick, whole pixels), not by ImageMagick;
* brightness scales the three channels by `(V + c) / V`, which is what the detour through HSV does;
* JPEG is whatever Pillow writes; glass, zoom, snow, frost and elastic are left out.

Texts: a letter is hit with some probability; it is swapped with the next, left out, replaced by a neighbour on a
QWERTY keyboard, or doubled.
"""

import io
import zlib
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from scipy import ndimage

SEVERITIES = (1, 3, 5)
Noise = Callable[[np.ndarray, int, np.random.Generator], np.ndarray]
"""Changes images, `rows × side × side × channels` within 0..1; told a severity from 1 to 5."""


def corrupted(images: np.ndarray, kind: str, severity: int, seed: int) -> np.ndarray:
    """Images of 0..255 with a corruption of this kind and severity."""
    rng = np.random.default_rng((seed, severity, zlib.crc32(kind.encode())))
    values = 255 * CORRUPTIONS[kind](images / 255, severity, rng)
    return np.clip(values + 1e-6, 0, 255).astype(np.uint8)  # the published code drops fractions, too


def mixture(images: np.ndarray, severity: int, seed: int) -> np.ndarray:
    """Every image with one of the corruptions, in turns."""
    made = np.empty_like(images)
    for i, kind in enumerate(CORRUPTIONS):
        made[i :: len(CORRUPTIONS)] = corrupted(images[i :: len(CORRUPTIONS)], kind, severity, seed)
    return made


def gaussian_noise(x: np.ndarray, severity: int, rng: np.random.Generator) -> np.ndarray:
    return x + rng.normal(scale=(0.04, 0.06, 0.08, 0.09, 0.10)[severity - 1], size=x.shape)


def shot_noise(x: np.ndarray, severity: int, rng: np.random.Generator) -> np.ndarray:
    photons = (500, 250, 100, 75, 50)[severity - 1]
    return rng.poisson(x * photons) / photons


def impulse_noise(x: np.ndarray, severity: int, rng: np.random.Generator) -> np.ndarray:
    hit = rng.random(x.shape) < (0.01, 0.02, 0.03, 0.05, 0.07)[severity - 1]
    return np.where(hit, rng.integers(0, 2, x.shape), x)


def gaussian_blur(x: np.ndarray, severity: int, rng: np.random.Generator) -> np.ndarray:
    width = (0.4, 0.6, 0.7, 0.8, 1.0)[severity - 1]
    return ndimage.gaussian_filter(x, (0, width, width, 0), mode="nearest", truncate=4.0)


def defocus_blur(x: np.ndarray, severity: int, rng: np.random.Generator) -> np.ndarray:
    """A disk, itself blurred over 3 × 3 pixels."""
    radius, soft = ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1.0, 0.2), (1.5, 0.1))[severity - 1]
    places = np.arange(-3, 4)
    disk = (places[:, None] ** 2 + places**2 <= radius**2).astype(float)
    edge = np.exp(-1 / (2 * soft**2))
    kernel = np.array([edge, 1, edge]) / (1 + 2 * edge)
    for axis in (0, 1):
        disk = ndimage.correlate1d(disk, kernel, axis)
    return ndimage.correlate(x, (disk / disk.sum())[None, :, :, None], mode="mirror")


def motion_blur(x: np.ndarray, severity: int, rng: np.random.Generator) -> np.ndarray:
    """Each image along a line of its own, within 45 degrees of the horizontal."""
    radius, width = ((6, 1.0), (6, 1.5), (6, 2.0), (8, 2.0), (9, 2.5))[severity - 1]
    steps = np.arange(2 * radius + 1)
    weights = np.exp(-(steps**2) / (2 * width**2))
    angles = np.deg2rad(rng.uniform(-45, 45, len(x)))
    rows, places, last = np.arange(len(x))[:, None, None], np.arange(x.shape[1]), x.shape[1] - 1
    made = np.zeros_like(x)
    for step, weight in zip(steps, weights / weights.sum(), strict=True):
        down, right = (np.rint(step * part)[:, None].astype(int) for part in (np.sin(angles), np.cos(angles)))
        y, z = np.clip(places + down, 0, last), np.clip(places + right, 0, last)
        made += weight * x[rows, y[:, :, None], z[:, None, :]]
    return made


def brightness(x: np.ndarray, severity: int, rng: np.random.Generator) -> np.ndarray:
    more, value = (0.05, 0.1, 0.15, 0.2, 0.3)[severity - 1], x.max(-1, keepdims=True)
    brighter = np.minimum(value + more, 1)
    return np.where(value > 0, x * brighter / np.maximum(value, 1e-12), brighter)


def contrast(x: np.ndarray, severity: int, rng: np.random.Generator) -> np.ndarray:
    mean = x.mean((1, 2), keepdims=True)
    return mean + (x - mean) * (0.75, 0.5, 0.4, 0.3, 0.15)[severity - 1]


def fog(x: np.ndarray, severity: int, rng: np.random.Generator) -> np.ndarray:
    """A cloud laid over each image, which stays as bright as it was."""
    thick, decay = ((0.2, 3.0), (0.5, 3.0), (0.75, 2.5), (1.0, 2.0), (1.5, 1.75))[severity - 1]
    most = x.max((1, 2, 3), keepdims=True)
    return (x + thick * plasma(len(x), x.shape[1], decay, rng)[..., None]) * most / (most + thick)


def plasma(count: int, side: int, decay: float, rng: np.random.Generator) -> np.ndarray:
    """Clouds within 0..1 by the diamond-square algorithm; the side is a power of two."""
    maps, step, wibble = np.zeros((count, side, side)), side, 100.0

    def around(total: np.ndarray) -> np.ndarray:
        return total / 4 + wibble * rng.uniform(-wibble, wibble, total.shape)

    while step >= 2:
        half = step // 2
        corners = maps[:, ::step, ::step]
        across = corners + np.roll(corners, -1, 1)
        maps[:, half::step, half::step] = around(across + np.roll(across, -1, 2))
        centres = maps[:, half::step, half::step]
        beside = centres + np.roll(centres, 1, 1) + corners + np.roll(corners, -1, 2)
        maps[:, ::step, half::step] = around(beside)
        below = centres + np.roll(centres, 1, 2) + corners + np.roll(corners, -1, 1)
        maps[:, half::step, ::step] = around(below)
        step, wibble = half, wibble / decay
    maps -= maps.min((1, 2), keepdims=True)
    return maps / maps.max((1, 2), keepdims=True)


def pixelate(x: np.ndarray, severity: int, rng: np.random.Generator) -> np.ndarray:
    from PIL.Image import Image, Resampling

    share = (0.95, 0.9, 0.85, 0.75, 0.65)[severity - 1]

    def coarse(image: Image) -> Image:
        small = image.resize([max(1, int(share * size)) for size in image.size], Resampling.BOX)
        return small.resize(image.size, Resampling.BOX)

    return _each(x, coarse)


def jpeg(x: np.ndarray, severity: int, rng: np.random.Generator) -> np.ndarray:
    from PIL import Image

    def stored(image: Image.Image) -> Image.Image:
        file = io.BytesIO()
        image.save(file, "JPEG", quality=(80, 65, 58, 50, 40)[severity - 1])
        return Image.open(file)

    return _each(x, stored)


def _each(x: np.ndarray, change: Callable[..., object]) -> np.ndarray:
    """Pillow's image of every row, changed; one channel or three."""
    from PIL import Image

    whole = np.rint(255 * x).astype(np.uint8)
    made = [np.asarray(change(Image.fromarray(image.squeeze()))) for image in whole]
    return np.stack(made).reshape(x.shape) / 255


CORRUPTIONS: Mapping[str, Noise] = {
    "gaussian noise": gaussian_noise,
    "shot noise": shot_noise,
    "impulse noise": impulse_noise,
    "gaussian blur": gaussian_blur,
    "defocus blur": defocus_blur,
    "motion blur": motion_blur,
    "brightness": brightness,
    "contrast": contrast,
    "fog": fog,
    "pixelate": pixelate,
    "jpeg": jpeg,
}

KEYS = ("qwertyuiop", "asdfghjkl", "zxcvbnm")
NEIGHBOURS: Mapping[str, str] = {
    key: "".join(
        other
        for j, line in enumerate(KEYS)
        for at, other in enumerate(line)
        if abs(i - j) <= 1 and other != key and abs(at + j / 2 - place - i / 2) <= 1
    )
    for i, row in enumerate(KEYS)
    for place, key in enumerate(row)
}
"""The keys that touch a key."""
TYPOS = ("swap", "drop", "neighbour", "double")


def mistyped(texts: Sequence[str], rate: float, seed: int, kinds: Sequence[str] = TYPOS) -> list[str]:
    """The texts with this share of their letters hit, each by one of the kinds."""
    rng = np.random.default_rng((seed, round(1e6 * rate), zlib.crc32(" ".join(kinds).encode())))
    return [_mistyped(text, rate, rng, kinds) for text in texts]


def _mistyped(text: str, rate: float, rng: np.random.Generator, kinds: Sequence[str]) -> str:
    made, i = [], 0
    while i < len(text):
        letter, following = text[i], text[i + 1 : i + 2]
        i += 1
        if not letter.isalpha() or rng.random() >= rate:
            made.append(letter)
            continue
        kind = kinds[int(rng.integers(len(kinds)))]
        if kind == "swap":
            made += [following, letter]
            i += 1
        elif kind == "double":
            made += [letter, letter]
        elif kind == "neighbour":
            near = NEIGHBOURS.get(letter.lower(), letter)
            made.append(near[int(rng.integers(len(near)))])
    return "".join(made)
