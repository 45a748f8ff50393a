"""The parts of small pictures: images under their names, keys to grey and colour, pages of them.

Needs Pillow. What is drawn is the caller's.
"""

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

WINDOW_PERCENTILES = (1.0, 99.0)
GAP, MARGIN, TITLE, TEXT = 14, 12, 17, 14  # pixels: between panels, around, font sizes
PAPER, INK, SOFT = (255, 255, 255), (27, 33, 40), (91, 102, 114)

RGB = NDArray[np.uint8]  # (H, W, 3)


def grey_window(values: NDArray[np.floating]) -> tuple[float, float]:
    """Black and white: the 1 and 99 percentile of what is finite."""
    finite = values[np.isfinite(values)]
    if not finite.size:
        return 0.0, 1.0
    low, high = (float(v) for v in np.percentile(finite, WINDOW_PERCENTILES))
    return (low, high) if high > low else (low - 0.5, low + 0.5)


def titled(name: str, image: RGB) -> Image.Image:
    """The image under its name, which is cut where it is longer than the image is wide."""
    font, width, height = font_of(TITLE), image.shape[1], image.shape[0]
    text = name
    while text and font.getlength(text) > width:
        text = f"{text.removesuffix('..')[:-1]}.." if len(text) > 3 else ""
    bar = TITLE + 10
    tile = Image.new("RGB", (width, bar + height), PAPER)
    ImageDraw.Draw(tile).text((0, bar / 2 - 1), text, INK, font, anchor="lm")
    tile.paste(Image.fromarray(image), (0, bar))
    return tile


def colour_key(colours: NDArray[np.uint8], low: float, high: float) -> Image.Image:
    """A bar of colours (N, 3) between the values at its ends."""
    bar = Image.fromarray(np.broadcast_to(colours, (TEXT, *colours.shape)).copy())
    ends = [_label(f"{value:.3g}") for value in (low, high)]
    return beside([ends[0], _framed(bar.resize((128, TEXT))), ends[1]])


def swatch(colour: NDArray[np.uint8], text: str) -> Image.Image:
    """A small field of one colour (3,) and what it stands for."""
    box = Image.fromarray(np.broadcast_to(colour, (TEXT, TEXT, 3)).copy())
    return beside([_framed(box), _label(text)])


def rows_of(tiles: list[Image.Image], *, per_row: int) -> list[Image.Image]:
    """Tiles from left to right, `per_row` of them in each row."""
    return [
        beside(tiles[first : first + per_row], gap=GAP, top=True)
        for first in range(0, len(tiles), per_row)
    ]


def page_of(rows: list[Image.Image], keys: list[Image.Image]) -> RGB:
    """Rows below each other with the keys at the bottom and a margin around."""
    parts = [*rows, beside(keys, gap=2 * GAP)]
    size = (
        max(part.width for part in parts) + 2 * MARGIN,
        sum(part.height + GAP for part in parts) - GAP + 2 * MARGIN,
    )
    canvas, y = Image.new("RGB", size, PAPER), MARGIN
    for part in parts:
        canvas.paste(part, (MARGIN, y))
        y += part.height + GAP
    return np.asarray(canvas)


def beside(images: list[Image.Image], *, gap: int = 7, top: bool = False) -> Image.Image:
    """Images from left to right, at equal middle or at equal `top`."""
    height = max(image.height for image in images)
    width = sum(image.width + gap for image in images) - gap
    canvas, x = Image.new("RGB", (width, height), PAPER), 0
    for image in images:
        canvas.paste(image, (x, 0 if top else (height - image.height) // 2))
        x += image.width + gap
    return canvas


def font_of(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Pillow's own font: the same on every machine."""
    return ImageFont.load_default(size)


def _framed(image: Image.Image) -> Image.Image:
    ImageDraw.Draw(image).rectangle((0, 0, image.width - 1, image.height - 1), outline=SOFT)
    return image


def _label(text: str) -> Image.Image:
    font = font_of(TEXT)
    image = Image.new("RGB", (max(1, round(font.getlength(text))), TEXT + 6), PAPER)
    ImageDraw.Draw(image).text((0, (TEXT + 6) / 2), text, SOFT, font, anchor="lm")
    return image
