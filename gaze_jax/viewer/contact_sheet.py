"""A contact sheet of one answer: a panel per token, with its selected regions clear and the rest veiled.

Axes: T generated tokens; h, w the token grid of the image, row-major from the top left; H, W image pixels.
"""

import bisect
import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypedDict

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

Box = tuple[float, float, float, float]
Colour = tuple[int, int, int]

# Colours of every picture drawn here.
PAPER: Colour = (250, 250, 247)
INK: Colour = (33, 35, 40)
MUTED: Colour = (120, 124, 132)
# Blue and vermilion, near the Okabe-Ito palette: distinct for all colour vision, on light and on dark.
SELECTED: Colour = (0, 133, 202)
TARGET: Colour = (230, 97, 0)

_MARGIN = 28
_GAP = 18
_LABEL = 34
_SWATCH = 14
_LEGEND_ROW = 22
_ENTRY_GAP = 22
_CREDIT_ROW = 20
# A question needs more width than one or two panels have.
_LEAST_WIDTH = 480
_LEAST_PANEL = 48

_LUMA = np.array([0.299, 0.587, 0.114], np.float32)
# Fractions of its colour and brightness that a veiled pixel keeps.
_VEIL_COLOUR = 0.15
_VEIL_LIGHT = 0.36


class SheetOptions(TypedDict, total=False):
    """Keywords of :func:`contact_sheet` that may be left out."""

    panel: int
    columns: int
    boxes: Sequence[Box | None] | None
    credit: str | None
    font: Path | None
    clearest: float | None


def contact_sheet(
    image: np.ndarray,
    tokens: Sequence[str],
    selected: np.ndarray,
    *,
    title: str,
    panel: int = 192,
    columns: int = 6,
    boxes: Sequence[Box | None] | None = None,
    credit: str | None = None,
    font: Path | None = None,
    clearest: float | None = None,
) -> Image.Image:
    """Draw which parts of the image each generated token attended to.

    Args:
        image: uint8 [H, W, 3], RGB. If its longer side fits a panel at least twice, it is enlarged by an
            integer factor without smoothing; otherwise it is resampled to the panel.
        tokens: T strings, printed under the panels; a space is shown as a raised dot, line ends and
            characters that the font lacks as Python escapes.
        selected: bool [T, h, w], or floating in [0, 1]: the fraction of heads that selected the token's
            region. Regions are as clear as this fraction, relative to ``clearest``. The grid spans the whole
            image.
        title: The question and the answer; the first line is printed larger. Long lines wrap.
        panel: Longest side of a panel's picture, in pixels.
        columns: Panels per row.
        boxes: T boxes (x0, y0, x1, y1) in image pixels, or None for a token without a target.
        credit: The image's credit line.
        font: A TrueType file for scripts that the built-in font lacks (it has little more than ASCII).
        clearest: The fraction of heads that is shown without a veil; None means the largest in ``selected``.
            So where heads differ much, not everything is dark; the legend names the number.

    Returns:
        An RGB picture; deterministic.

    Raises:
        ValueError: if shapes, types, lengths or values do not fit the description.
        OSError: if ``font`` cannot be read as a font.
    """
    image, selected, boxes = _validated(image, tokens, selected, panel, columns, boxes)
    fonts = Fonts.load(font)
    picture, factor = fitted(image, panel)
    width, height = picture.size

    across = min(columns, len(tokens))
    down = -(-len(tokens) // across)
    inner = max(across * (width + _GAP) - _GAP, _LEAST_WIDTH)
    heading = _heading(title, inner, fonts)
    most = 1.0 if selected.dtype == np.bool_ else float(selected.max() if clearest is None else clearest)
    legend = _legend(selected.dtype == np.bool_, most, any(box is not None for box in boxes), fonts)
    legend_rows = _legend_rows(legend, inner, fonts)
    credit_lines = wrapped(drawable(credit, fonts.small), inner, fonts.small) if credit else []

    panels_top = _MARGIN + sum(leading for _, _, _, leading in heading) + 12
    legend_top = panels_top + down * (height + _LABEL + _GAP) - _GAP + 14
    credit_top = legend_top + _LEGEND_ROW * len(legend_rows)
    bottom = credit_top + _CREDIT_ROW * len(credit_lines) + _MARGIN - 6
    sheet = Image.new("RGB", (inner + 2 * _MARGIN, bottom), PAPER)
    draw = ImageDraw.Draw(sheet)

    y = _MARGIN
    for text, face, colour, leading in heading:
        draw.text((_MARGIN, y + leading - 8), text, colour, face, anchor="ls")
        y += leading

    for index, (token, mask, box) in enumerate(zip(tokens, selected, boxes, strict=True)):
        row, column = divmod(index, across)
        at = (_MARGIN + column * (width + _GAP), panels_top + row * (height + _LABEL + _GAP))
        paste_panel(sheet, at, picture, mask, most)
        if box is not None:
            _draw_target(draw, at, box, factor)
        _draw_label(draw, (at[0], at[1] + height), width, token, float(mask.mean()), fonts)

    _draw_legend(draw, legend_top, legend_rows, fonts)
    for index, line in enumerate(credit_lines):
        draw.text((_MARGIN, credit_top + _CREDIT_ROW * index + 14), line, MUTED, fonts.small, anchor="ls")
    return sheet


def _validated(
    image: np.ndarray,
    tokens: Sequence[str],
    selected: np.ndarray,
    panel: int,
    columns: int,
    boxes: Sequence[Box | None] | None,
) -> tuple[np.ndarray, np.ndarray, Sequence[Box | None]]:
    """Return the arrays as NumPy arrays and the boxes as a sequence of T; ValueError if they are invalid."""
    image, selected = np.asarray(image), np.asarray(selected)
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
        raise ValueError(f"image must be uint8 [H, W, 3], got {image.dtype} {list(image.shape)}.")
    if not tokens:
        raise ValueError("tokens is empty: a contact sheet needs at least one generated token.")
    if selected.ndim != 3 or selected.shape[0] != len(tokens) or 0 in selected.shape:
        raise ValueError(
            f"selected must be [{len(tokens)}, h, w] for {len(tokens)} tokens, got {list(selected.shape)}."
        )
    if selected.dtype != np.bool_:
        if not np.issubdtype(selected.dtype, np.floating):
            raise ValueError(f"selected must be bool or floating (fractions of heads), got {selected.dtype}.")
        if not ((selected >= 0) & (selected <= 1)).all():
            raise ValueError("selected must lie in [0, 1]: it is the fraction of heads per region.")
    if panel < _LEAST_PANEL:
        raise ValueError(f"panel must be at least {_LEAST_PANEL} pixels, got {panel}.")
    if columns < 1:
        raise ValueError(f"columns must be at least 1, got {columns}.")
    boxes = [None] * len(tokens) if boxes is None else boxes
    if len(boxes) != len(tokens):
        raise ValueError(f"boxes must hold one entry per token, got {len(boxes)} for {len(tokens)} tokens.")
    height, width = image.shape[:2]
    for box in boxes:
        if box is not None and not (0 <= box[0] < box[2] <= width and 0 <= box[1] < box[3] <= height):
            raise ValueError(f"box {tuple(box)} is empty or leaves the image of {width} x {height} pixels.")
    return image, selected, boxes


def fitted(image: np.ndarray, panel: int) -> tuple[Image.Image, float]:
    """The picture of a panel, its longest side at most ``panel``, and its scale relative to the image."""
    source = Image.fromarray(image)
    longest = max(source.size)
    if 2 * longest <= panel:
        # An integer factor, so that every pixel of a tiny image becomes a square of the same size.
        whole = panel // longest
        return source.resize((source.width * whole, source.height * whole), Image.Resampling.NEAREST), float(
            whole
        )
    factor = panel / longest
    size = (max(1, round(source.width * factor)), max(1, round(source.height * factor)))
    return source.resize(size, Image.Resampling.LANCZOS), factor


def _enlarged(mask: np.ndarray, width: int, height: int) -> np.ndarray:
    """Enlarge [h, w] cells to [height, width] pixels; cell borders are rounded down to a pixel."""
    rows = np.arange(height) * mask.shape[0] // height
    columns = np.arange(width) * mask.shape[1] // width
    return mask[rows][:, columns]


def _veiled(pixels: np.ndarray, fraction: np.ndarray) -> np.ndarray:
    """Darken and grey pixels in proportion to ``1 - fraction``.

    Args:
        pixels: uint8 [H, W, 3].
        fraction: floating [H, W] in [0, 1]; 1 leaves a pixel unchanged.

    Returns:
        uint8 [H, W, 3].
    """
    colour = pixels.astype(np.float32)
    grey = (colour @ _LUMA)[..., None]
    veil = _VEIL_LIGHT * (_VEIL_COLOUR * colour + (1 - _VEIL_COLOUR) * grey)
    clear = fraction.astype(np.float32)[..., None]
    return np.rint(clear * colour + (1 - clear) * veil).astype(np.uint8)


def paste_panel(
    sheet: Image.Image, at: tuple[int, int], picture: Image.Image, mask: np.ndarray, clearest: float
) -> None:
    """Paste one veiled picture at ``at``, with outlines around what at least half of ``clearest`` selected.

    The outline lies outside the selected cells, in the veil or in the margin, and hides no selected pixel.
    """
    width, height = picture.size
    fraction = np.minimum(_enlarged(mask.astype(np.float32), width, height) / (clearest or 1), 1)
    sheet.paste(Image.fromarray(_veiled(np.asarray(picture), fraction)), at)

    line = 2
    most = Image.new("L", (width + 2 * line, height + 2 * line), 0)
    most.paste(Image.fromarray(np.where(fraction >= 0.5, np.uint8(255), np.uint8(0))), (line, line))
    outline = np.asarray(most.filter(ImageFilter.MaxFilter(2 * line + 1))) & ~np.asarray(most)
    sheet.paste(SELECTED, (at[0] - line, at[1] - line), Image.fromarray(outline))


def _draw_target(draw: ImageDraw.ImageDraw, at: tuple[int, int], box: Box, factor: float) -> None:
    """Outline a box, given in image pixels, on its outside, with a light rim visible on any picture."""
    x0, y0 = at[0] + round(box[0] * factor), at[1] + round(box[1] * factor)
    # A box that covers less than a pixel of the panel still gets a mark.
    x1, y1 = max(x0, at[0] + round(box[2] * factor) - 1), max(y0, at[1] + round(box[3] * factor) - 1)
    draw.rectangle((x0 - 4, y0 - 4, x1 + 4, y1 + 4), outline=PAPER, width=4)
    draw.rectangle((x0 - 3, y0 - 3, x1 + 3, y1 + 3), outline=TARGET, width=2)


@dataclasses.dataclass(frozen=True)
class Fonts:
    """One font in the sheet's four sizes."""

    heading: ImageFont.FreeTypeFont
    body: ImageFont.FreeTypeFont
    token: ImageFont.FreeTypeFont
    small: ImageFont.FreeTypeFont

    @classmethod
    def load(cls, path: Path | None) -> "Fonts":
        """The font in ``path``, or Pillow's built-in one."""

        def face(size: int) -> ImageFont.FreeTypeFont:
            loaded = ImageFont.truetype(path, size) if path else ImageFont.load_default(size)
            assert isinstance(loaded, ImageFont.FreeTypeFont)
            return loaded

        return cls(heading=face(22), body=face(16), token=face(16), small=face(12))


def drawable(text: str, font: ImageFont.FreeTypeFont) -> str:
    """Replace every character that the font has no glyph for with its Python escape."""
    # The last code point is unassigned, so every font draws its "missing" glyph for it.
    missing = bytes(font.getmask("\U0010ffff"))

    def shown(character: str) -> str:
        known = character.isprintable() and (character.isascii() or bytes(font.getmask(character)) != missing)
        return character if known else character.encode("unicode_escape").decode()

    return "".join(shown(character) for character in text)


def _token_text(token: str, font: ImageFont.FreeTypeFont, available: float) -> str:
    """The token with visible white space, cut with an ellipsis to fit ``available`` pixels."""
    text = drawable(token.replace(" ", "·"), font) if token else '""'
    if font.getlength(text) <= available:
        return text
    while text and font.getlength(text + "…") > available:
        text = text[:-1]
    return text + "…"


def _draw_label(
    draw: ImageDraw.ImageDraw, at: tuple[int, int], width: int, token: str, fraction: float, fonts: Fonts
) -> None:
    """Print the token under a panel, and on the right the fraction of the image it attended to."""
    baseline = at[1] + 22
    note = f"{100 * fraction:.0f} %"
    draw.text((at[0] + width, baseline), note, MUTED, fonts.small, anchor="rs")
    available = width - fonts.small.getlength(note) - 8
    draw.text((at[0], baseline), _token_text(token, fonts.token, available), INK, fonts.token, anchor="ls")


def wrapped(text: str, available: float, font: ImageFont.FreeTypeFont) -> list[str]:
    """Wrap text into lines of at most ``available`` pixels; a longer word is broken anywhere."""
    lines: list[str] = []
    for word in text.split():
        if lines and font.getlength(f"{lines[-1]} {word}") <= available:
            lines[-1] += f" {word}"
            continue
        while font.getlength(word) > available and len(word) > 1:
            cut = _fitting(word, available, font)
            lines.append(word[:cut])
            word = word[cut:]
        lines.append(word)
    return lines


def _fitting(word: str, available: float, font: ImageFont.FreeTypeFont) -> int:
    """Number of letters of a word that fit, at least one."""
    return 1 + bisect.bisect_right(range(2, len(word)), available, key=lambda end: font.getlength(word[:end]))


def _heading(
    title: str, available: float, fonts: Fonts
) -> list[tuple[str, ImageFont.FreeTypeFont, Colour, int]]:
    """The title's lines, each with its font, colour and height in pixels."""
    first, *rest = title.split("\n")
    lines = [
        (line, fonts.heading, INK, 30)
        for line in wrapped(drawable(first, fonts.heading), available, fonts.heading)
    ]
    for text in rest:
        lines += [
            (line, fonts.body, INK, 24) for line in wrapped(drawable(text, fonts.body), available, fonts.body)
        ]
    return lines


# A swatch's width in pixels, the function that draws it at (x, y), and its meaning.
_Entry = tuple[int, Callable[[ImageDraw.ImageDraw, int, int], None], str]


def _legend(boolean: bool, clearest: float, targets: bool, fonts: Fonts) -> list[_Entry]:
    """The legend of the marks in the panels: each with a swatch and its meaning."""
    sample = (214, 206, 178)
    last = _SWATCH - 1

    def outlined(draw: ImageDraw.ImageDraw, x: int, y: int) -> None:
        draw.rectangle((x, y, x + last, y + last), sample, SELECTED, 2)

    def veiled(draw: ImageDraw.ImageDraw, x: int, y: int) -> None:
        shares = np.zeros((1, _SWATCH)) if boolean else np.linspace(0, 1, 3 * _SWATCH)[None]
        colours = _veiled(np.full((*shares.shape, 3), sample, np.uint8), shares)[0]
        for offset, (red, green, blue) in enumerate(colours.tolist()):
            draw.line((x + offset, y, x + offset, y + last), (red, green, blue))

    def boxed(draw: ImageDraw.ImageDraw, x: int, y: int) -> None:
        draw.rectangle((x, y, x + last, y + last), None, TARGET, 2)

    def percent(draw: ImageDraw.ImageDraw, x: int, y: int) -> None:
        draw.text((x, y + last - 2), "%", MUTED, fonts.small, anchor="ls")

    if boolean:
        entries: list[_Entry] = [(_SWATCH, outlined, "attended to"), (_SWATCH, veiled, "not selected")]
    elif clearest == 1:
        entries = [
            (3 * _SWATCH, veiled, "selected by no head ... by all heads"),
            (_SWATCH, outlined, "by at least half of the heads"),
        ]
    else:
        most = f"{100 * clearest:.0f} %"
        entries = [
            (3 * _SWATCH, veiled, f"selected by no head ... by {most} of the heads, the most"),
            (_SWATCH, outlined, "by at least half as many"),
        ]
    if targets:
        entries.append((_SWATCH, boxed, "what the token names"))
    return [
        *entries,
        (_SWATCH, percent, "fraction of the image attended to" + ("" if boolean else ", mean of the heads")),
    ]


def _legend_rows(entries: list[_Entry], available: float, fonts: Fonts) -> list[list[_Entry]]:
    """Arrange the entries in rows."""
    rows: list[list[_Entry]] = [[]]
    used = 0.0
    for entry in entries:
        needed = entry[0] + 7 + fonts.small.getlength(entry[2])
        if rows[-1] and used + needed > available:
            rows.append([])
            used = 0.0
        rows[-1].append(entry)
        used += needed + _ENTRY_GAP
    return rows


def _draw_legend(draw: ImageDraw.ImageDraw, top: int, rows: list[list[_Entry]], fonts: Fonts) -> None:
    """Draw the rows from ``top`` downwards."""
    for index, row in enumerate(rows):
        x, y = _MARGIN, top + _LEGEND_ROW * index
        for across, swatch, text in row:
            swatch(draw, x, y)
            x += across + 7
            draw.text((x, y + _SWATCH - 3), text, MUTED, fonts.small, anchor="ls")
            x += round(fonts.small.getlength(text)) + _ENTRY_GAP
