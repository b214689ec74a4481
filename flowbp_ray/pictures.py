"""Pictures as arrays, and contact sheets: rows of captioned pictures on one PNG, for people who would rather look than read."""

import io
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

INK, FAINT, GOOD, BAD, PAPER = "#1c1c1c", "#6a6a6a", "#146c2e", "#b3261e", "#ffffff"
TEXT, LINE, PAD = 11, 15, 8  # pixels


def to_uint8(images: Tensor) -> np.ndarray:
    """Pictures ``(B, 3, H, W)`` in 0…1 as uint8 ``(B, H, W, 3)``."""
    return (images.detach().cpu().permute(0, 2, 3, 1).numpy() * 255).round().astype(np.uint8)


def file_of(picture: np.ndarray, kind: str = "png") -> bytes:
    """A uint8 picture ``(H, W, 3)`` as a file: png, which loses nothing, jpeg or webp."""
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, kind.upper(), quality=95)
    return buffer.getvalue()


@dataclass(frozen=True)
class Cell:
    """A uint8 picture ``(H, W, 3)``, a caption under it and, if given, a verdict in green or red."""

    picture: np.ndarray
    caption: str
    verdict: str = ""
    good: bool = True


@dataclass(frozen=True)
class Row:
    """A heading and its cells."""

    heading: str
    cells: Sequence[Cell] = field(default_factory=tuple)


def sheet(title: str, rows: Sequence[Row], side: int = 128) -> Image.Image:
    """All rows on one picture; every cell's picture is ``side`` pixels wide, its caption wraps over three lines."""
    if not rows or not any(r.cells for r in rows):
        raise ValueError("a contact sheet needs at least one row with one picture")
    font, bold = ImageFont.load_default(TEXT), ImageFont.load_default(TEXT + 3)
    columns = max(len(r.cells) for r in rows)
    cell_height = side + 4 * LINE + PAD
    width = columns * (side + PAD) + PAD
    height = 3 * LINE + sum(2 * LINE + cell_height for _ in rows)
    page = Image.new("RGB", (width, height), PAPER)
    pen = ImageDraw.Draw(page)
    pen.text((PAD, PAD), title, fill=INK, font=ImageFont.load_default(TEXT + 6))
    top = 3 * LINE
    for row in rows:
        pen.text((PAD, top), row.heading, fill=INK, font=bold)
        for column, cell in enumerate(row.cells):
            x, y = PAD + column * (side + PAD), top + int(1.5 * LINE)
            page.paste(Image.fromarray(cell.picture).resize((side, side), Image.Resampling.BICUBIC), (x, y))
            pen.rectangle((x, y, x + side, y + side), outline="#d0d0d0")
            lines = wrap(cell.caption, font, side)[:3]
            for i, line in enumerate(lines):
                pen.text((x, y + side + 3 + i * LINE), line, fill=FAINT, font=font)
            if cell.verdict:
                colour = GOOD if cell.good else BAD
                pen.text((x, y + side + 3 + len(lines) * LINE), cell.verdict, fill=colour, font=font)
        top += 2 * LINE + cell_height
    return page


def wrap(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> list[str]:
    """Break text into lines no wider than ``width`` pixels, at spaces."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) > width and lines[-1]:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines
