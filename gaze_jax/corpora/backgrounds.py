"""Backgrounds for synthetic scenes: seeded textures, and crops of two bundled photographs."""

import functools

import numpy as np
import PIL.Image

from gaze_jax.corpora import bundled

TEXTURES = 16
KINDS = ("texture", "photo")
PHOTO_CREDIT = "Photographs: danielbuechele and vultilion, Flickr, CC BY 2.0; cropped and darkened."
_SCALES = (1.0, 0.7, 0.5, 0.35)  # sizes of the stored photographs, relative to the original


def _noise(rng: np.random.Generator, side: int, cells: int) -> np.ndarray:
    """Smooth value noise around 0, float32 [side, side], with ``cells`` bumps per side."""
    coarse = PIL.Image.fromarray(rng.standard_normal((cells, cells)).astype(np.float32))
    return np.asarray(coarse.resize((side, side), PIL.Image.Resampling.BICUBIC))


def _texture(rng: np.random.Generator, side: int) -> np.ndarray:
    """One coloured texture, uint8 [side, side, 3]: noise in octaves, stripes and a gradient."""
    # Bumps of 64, 32, ... 2 pixels; random weights make a texture smooth or grainy.
    octaves = [max(2, side // size) for size in (64, 32, 16, 8, 4, 2)]
    weights = rng.dirichlet(np.full(len(octaves), 0.7)) ** 0.5
    field = sum(w * _noise(rng, side, cells) for w, cells in zip(weights, octaves, strict=True))
    y, x = np.mgrid[:side, :side].astype(np.float32)
    angle, wavelength, warp = (
        rng.uniform(0, np.pi),
        np.exp(rng.uniform(np.log(4), np.log(60))),
        rng.uniform(0, 2),
    )
    stripes = np.sin(2 * np.pi * (x * np.cos(angle) + y * np.sin(angle)) / wavelength + warp * field)
    slope = rng.uniform(0, 2 * np.pi)
    gradient = (x * np.cos(slope) + y * np.sin(slope)) * (2 / side)
    amounts = rng.uniform(0, 1, 3) * (1.0, 0.7, 0.7)
    level = amounts[0] * field + amounts[1] * stripes + amounts[2] * gradient
    # Each colour channel depends on the level in its own way and has its own slow drift.
    drift = np.stack([_noise(rng, side, max(2, side // 48)) for _ in range(3)], axis=-1)
    color = level[..., None] * rng.uniform(0.3, 1, 3) + 0.5 * drift
    color *= rng.uniform(20, 50) / color.std()
    return np.clip(color + rng.uniform(60, 195, 3), 0, 255).astype(np.uint8)


@functools.lru_cache(maxsize=4)
def texture_pool(seed: int, side: int) -> tuple[np.ndarray, ...]:
    """Textures to cut scenes of ``side`` pixels from, uint8 [larger, larger, 3] each."""
    larger = max(256, side + 128)
    seeds = np.random.SeedSequence([seed, side]).spawn(TEXTURES)
    return tuple(_texture(np.random.Generator(np.random.PCG64(s)), larger) for s in seeds)


@functools.lru_cache(maxsize=4)
def photo_pool(side: int) -> tuple[np.ndarray, ...]:
    """scikit-learn's two photographs (CC-BY) at several sizes, uint8 [height, width, 3] each.

    Sizes too small for a scene of ``side`` pixels are left out; if all are, the photographs are enlarged.
    """
    pool = []
    for pixels in map(bundled.photo, bundled.PHOTOS):
        shortest = min(pixels.shape[:2])
        scales = [s for s in _SCALES if int(shortest * s) >= side] or [1.2 * side / shortest]
        for scale in scales:
            size = (int(pixels.shape[1] * scale), int(pixels.shape[0] * scale))
            pool.append(np.asarray(PIL.Image.fromarray(pixels).resize(size, PIL.Image.Resampling.LANCZOS)))
    return tuple(pool)


def cut(rng: np.random.Generator, kind: str, seed: int, height: int, width: int) -> np.ndarray:
    """A random crop, flipped at random, float32 [height, width, 3] in 0..255.

    Args:
      rng: source of the crop's randomness.
      kind: "texture" or "photo".
      seed: seed of the texture pool; the photographs are fixed.
      height, width: size in pixels.
    """
    side = max(height, width)
    pool = texture_pool(seed, side) if kind == "texture" else photo_pool(side)
    pixels = pool[rng.integers(len(pool))]
    y = rng.integers(pixels.shape[0] - height + 1)
    x = rng.integers(pixels.shape[1] - width + 1)
    crop = pixels[y : y + height, x : x + width]
    mirror, upside_down, turn = rng.random(3) < 0.5
    if mirror:
        crop = crop[:, ::-1]
    if kind == "texture" and upside_down:
        crop = crop[::-1]
    if kind == "texture" and turn and height == width:
        crop = crop.swapaxes(0, 1)
    return crop.astype(np.float32)
