"""The labelled overview of a run: `grid.png`.

- Images of one prompt stand together under its caption; with one image per prompt, each cell has its caption.
- Small images are enlarged to a width at which the captions can be read; long captions wrap.
- A large run shows its first images and says how many there are.

    from medisyn.generation.grid import draw_grid
    draw_grid([("brain MRI slice showing a glioma", image)], total=1).save("grid.png")
"""

import math
from collections.abc import Sequence
from itertools import groupby

from PIL import Image, ImageDraw, ImageFont

CELL_WIDTH = 176  # pixels at least, so that about 24 characters fit on a line
FONT_SIZE = 14  # pixels
MARGIN = 8  # pixels
PER_ROW = 8  # images of one caption on a row
LARGEST = 96  # images that are shown
INK, PAPER, FAINT = (20, 20, 20), (255, 255, 255), (110, 110, 110)


def draw_grid(cells: Sequence[tuple[str, Image.Image]], total: int, footer: str = "") -> Image.Image:
    """Draw captioned images on one white sheet.

    Args:
        cells: (caption, image) in order; all images of one size. Neighbours with the same caption form a group.
        total: Number of images in the run, for the last line.
        footer: Text under the images, such as the name of the model.

    Returns:
        An RGB image.
    """
    font = ImageFont.load_default(FONT_SIZE)
    groups = [(caption, [image for _, image in group]) for caption, group in groupby(cells, key=lambda cell: cell[0])]
    width, height = cells[0][1].size
    scale = max(1, math.ceil(CELL_WIDTH / width)) if width < CELL_WIDTH / 1.2 else 1
    cell = (width * scale, height * scale)
    single = all(len(images) == 1 for _, images in groups)
    if single:
        columns = min(PER_ROW, math.ceil(math.sqrt(len(groups))))
        rows = [groups[start : start + columns] for start in range(0, len(groups), columns)]
        blocks = [([caption for caption, _ in row], [images[0] for _, images in row]) for row in rows]
    else:
        columns = min(PER_ROW, max(len(images) for _, images in groups))
        blocks = [
            ([caption] if start == 0 else [], images[start : start + columns])
            for caption, images in groups
            for start in range(0, len(images), columns)
        ]

    pitch = cell[0] + MARGIN
    sheet_width = max(columns, 2) * pitch + MARGIN
    caption_width = cell[0] if single else sheet_width - 2 * MARGIN
    texts = [[wrap(caption, caption_width, font) for caption in captions] for captions, _ in blocks]
    line = FONT_SIZE + 4
    tops = [MARGIN]
    for lines in texts:
        tops.append(tops[-1] + max((len(text) for text in lines), default=0) * line + cell[1] + MARGIN)
    shown = "" if total == len(cells) else f"{len(cells)} of {total} images. "
    closing = wrap(shown + footer, sheet_width - 2 * MARGIN, font)
    sheet = Image.new("RGB", (sheet_width, tops[-1] + len(closing) * line + MARGIN), PAPER)
    draw = ImageDraw.Draw(sheet)
    for (_, images), lines, top in zip(blocks, texts, tops, strict=False):
        bottom = top + max((len(text) for text in lines), default=0) * line
        for column, text in enumerate(lines):  # captions end just above their image
            start = bottom - len(text) * line
            draw.text((MARGIN + column * pitch, start), "\n".join(text), font=font, fill=INK, spacing=4)
        for column, image in enumerate(images):
            picture = image.convert("RGB").resize(cell, Image.Resampling.BICUBIC) if scale > 1 else image
            sheet.paste(picture, (MARGIN + column * pitch, bottom))
    draw.text((MARGIN, tops[-1]), "\n".join(closing), font=font, fill=FAINT, spacing=4)
    return sheet


def wrap(text: str, width: int, font: ImageFont.ImageFont | ImageFont.FreeTypeFont) -> list[str]:
    """Break text into lines that are at most `width` pixels wide; a longer word is cut into pieces."""
    lines: list[str] = []
    for word in text.split():
        while len(word) > 1 and font.getlength(word) > width:
            fitting = next(n for n in range(len(word) - 1, 0, -1) if n == 1 or font.getlength(word[:n]) <= width)
            lines.append(word[:fitting])
            word = word[fitting:]
        if lines and font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines
