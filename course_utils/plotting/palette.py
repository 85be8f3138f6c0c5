"""The picture at the head of the README: one image with 256, 16 and 4 grey levels.

The image is computed, so that it is the same everywhere, and quantized as any tensor is: each pixel
becomes the code of the nearest of evenly spaced levels. `python -m course_utils.plotting.palette`
writes `docs/figures/palette.png` anew.
"""

from pathlib import Path

import numpy as np
from PIL import Image

BITS = (8, 4, 2)
FIGURE = Path("docs") / "figures" / "palette.png"


def scene(height: int = 240, width: int = 300) -> np.ndarray:
    """A hazy evening, `[height, width]` in 0..1: smooth sky, a low sun, three ranges of hills."""
    y, x = np.mgrid[0:height, 0:width] / [[[height]], [[width]]]
    distance = np.hypot((x - 0.68) * width / height, y - 0.38)
    picture = 0.30 + 0.45 * y + 0.55 * np.exp(-((distance / 0.28) ** 2))
    picture[distance < 0.075] = 1.0
    for top, depth, phase in ((0.62, 0.05, 0.5), (0.74, 0.07, 2.1), (0.87, 0.05, 4.0)):
        ridge = top + depth * np.sin(5 * x + phase) * np.cos(11 * x + 2 * phase) / 1.5
        shade = 1.25 - 1.3 * top + 0.25 * (y - ridge)
        picture = np.where(y > ridge, shade, picture)
    return picture.clip(0, 1)


def quantize_picture(picture: np.ndarray, n_bits: int) -> tuple[np.ndarray, np.ndarray]:
    """(codes, reconstruction) of a picture in 0..1 with 2^n_bits evenly spaced levels."""
    levels = 2**n_bits - 1
    codes = np.rint(picture * levels).astype(np.uint8)
    return codes, codes / levels


def palette_picture() -> Image.Image:
    """The scene at 8, 4 and 2 bits a pixel, side by side."""
    panels = [quantize_picture(scene(), n_bits)[1] for n_bits in BITS]
    gap = np.ones((panels[0].shape[0], 8))
    strip = np.hstack([panels[0], gap, panels[1], gap, panels[2]])
    return Image.fromarray(np.rint(strip * 255).astype(np.uint8), mode="L")


if __name__ == "__main__":
    FIGURE.parent.mkdir(parents=True, exist_ok=True)
    palette_picture().save(FIGURE)
