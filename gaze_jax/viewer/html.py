"""The HTML viewer: one self-contained page for a trace, and an index of many.

A page fetches nothing: its Content-Security-Policy allows only its own script and style, by their hashes,
and ``data:`` images. Untrusted data enters the page as JSON in an element that is not executed, and the
script inserts it as text.
"""

import base64
import dataclasses
import hashlib
import io
import json
import urllib.parse
import zlib
from collections.abc import Sequence
from pathlib import Path

import jinja2
import markupsafe
import numpy as np
import PIL.Image

from gaze_jax.errors import UserError
from gaze_jax.infer.trace import Trace, check_layer, most_concentrated
from gaze_jax.viewer.answer_sheet import titles_of

_ASSETS = Path(__file__).parent / "assets"
_MOST_DENSE = 32_000_000
"""Maximum number of dense attention values in a page, one byte each; beyond it, heads are averaged."""
_THUMBNAIL = 192
_SCRIPTS = ("measure.js", "draw.js", "text.js", "layout.js", "files.js", "viewer.js", "controls.js")
_TYPES = {"float32": "f4", "int32": "i4", "int16": "i2", "uint8": "u1"}


def viewer_page(trace: Trace, *, layer: int | None = None) -> str:
    """Render the HTML page of a trace.

    Fractions of attention are rounded to 1/510 of the query's largest, scores to 1/65534 of the layer's
    largest. Dense attention is stored per head up to 32 million numbers, T * L * H * R; beyond that, as the
    mean over the heads. The page states all of this.

    Args:
      trace: the trace to show.
      layer: the layer shown first; None is the one of :func:`most_concentrated`, and the page says so.

    Raises:
      UserError: there is no such layer, or the trace is too long for a page.
    """
    check_layer(trace, layer)
    arrays, per_head = _arrays(trace)
    blob, layout = _packed(arrays)
    layer, opened = (layer, "") if layer is not None else _opening(trace)
    numbers = {view.view: index for index, view in enumerate(trace.views)}
    data = {
        **{name: getattr(trace, name) for name in ("question", "answer", "tokens", "model")},
        "selectPer": trace.select_per,
        "topK": trace.top_k,
        "layer": layer,
        "opened": opened,
        "prompt": [numbers[token] if isinstance(token, int) else token for token in trace.prompt],
        "layers": trace.layers,
        "heads": trace.heads,
        "denseHeads": trace.heads if per_head else 1,
        "selectors": trace.selected.shape[2],
        "slots": trace.selected.shape[3],
        "regions": trace.regions,
        "views": _views(trace),
        "pictures": [_data_url(picture.jpeg) for picture in trace.pictures],
        "layout": layout,
        "arrays": base64.b64encode(blob).decode(),
    }
    return _page("viewer.html", "viewer.css", _SCRIPTS, data=_json(data))


def _opening(trace: Trace) -> tuple[int, str]:
    """The layer that a page shows first, and why."""
    if trace.layers == 1:
        return 0, ""
    layer = most_concentrated(trace)
    what = "attention is" if trace.top_k is None else "heads’ choices are"
    return layer, f"Layer {layer} is shown first: its {what} the most concentrated of {trace.layers} layers."


@dataclasses.dataclass(frozen=True)
class Entry:
    """An entry of an index page; made by :meth:`of`.

    Attributes:
      file: name of the trace's page, in the folder of the index.
      question, answer, model: plain text.
      visual: fraction of the visual keys that a query attended to, mean over tokens, layers and heads.
      thumbnail: a small JPEG.
    """

    file: str
    question: str
    answer: str
    model: str
    visual: float
    thumbnail: bytes

    @classmethod
    def of(cls, trace: Trace, file: str) -> "Entry":
        """Make the entry of a trace whose page is ``file``."""
        keys = trace.entries[..., 0].mean(axis=1)
        visual = float((keys / np.maximum(trace.visual_tokens, 1)).mean())
        image = PIL.Image.fromarray(trace.pictures[0].pixels())
        image.thumbnail((_THUMBNAIL, _THUMBNAIL))
        small = io.BytesIO()
        image.save(small, "JPEG", quality=80)
        return cls(file, trace.question, trace.answer, trace.model, visual, small.getvalue())


def index_page(entries: Sequence[Entry]) -> str:
    """Render a page that lists viewer pages in its folder; it needs no script."""
    lines = [
        # A quoted name cannot be read as a URL scheme or a path to another folder.
        {"href": urllib.parse.quote(entry.file, safe=""), "image": _data_url(entry.thumbnail)}
        | dataclasses.asdict(entry)
        for entry in entries
    ]
    return _page("index.html", "index.css", [], entries=lines)


def _page(template: str, style: str, scripts: Sequence[str], **values: object) -> str:
    """Fill a template, with style and scripts inline and a policy that allows only these."""
    css = (_ASSETS / style).read_text(encoding="utf-8")
    js = "\n".join((_ASSETS / script).read_text(encoding="utf-8") for script in scripts)
    policy = ["default-src 'none'", f"style-src '{_sha256(css)}'", "img-src data:"]
    if scripts:
        policy.append(f"script-src '{_sha256(js)}'")
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_ASSETS), autoescape=True, undefined=jinja2.StrictUndefined
    )
    return environment.get_template(template).render(
        policy="; ".join([*policy, "base-uri 'none'", "form-action 'none'"]),
        style=markupsafe.Markup(css),
        script=markupsafe.Markup(js),
        **values,
    )


def _sha256(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def _json(data: object) -> markupsafe.Markup:
    """JSON that is safe in a script element: it cannot end the element or open a comment."""
    return markupsafe.Markup(json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c"))


def _data_url(jpeg: bytes) -> str:
    return f"data:image/jpeg;base64,{base64.b64encode(jpeg).decode()}"


def _views(trace: Trace) -> list[dict[str, object]]:
    """What the page needs to know of each view; corners as fractions of the picture's width and height."""
    keys = [picture.key for picture in trace.pictures]
    views = []
    for view, title in zip(trace.views, titles_of(trace), strict=True):
        number = keys.index((view.video, view.index, view.frame))
        height, width = trace.pictures[number].size
        x0, y0, x1, y1 = map(float, view.corners)
        numbers = {other.index for other in trace.views if other.video == view.video}
        views.append(
            {
                "title": title,
                "short": _short(title, alone=len(numbers) == 1),
                "medium": title.split(", ")[0],
                "picture": number,
                "corners": [x0 / width, y0 / height, x1 / width, y1 / height],
                "grid": view.regions.shape,
            }
        )
    return views


def _short(title: str, *, alone: bool) -> str:
    """A short title: the view or time, preceded by the image or video unless it is ``alone``."""
    parts = title.split(", ")
    text = parts[-1] if alone or len(parts) == 1 else f"{parts[0]}, {parts[-1]}"
    return text[0].upper() + text[1:]


def _arrays(trace: Trace) -> tuple[dict[str, np.ndarray], bool]:
    """The arrays of a page, and whether dense attention is stored per head."""
    dense, per_head = trace.dense, trace.dense.size <= _MOST_DENSE
    if not per_head:
        dense = dense.mean(axis=2, keepdims=True)
    if dense.size > _MOST_DENSE:
        raise UserError(
            f"The trace has tokens x layers x regions = {dense.size}, but a page holds at most "
            f"{_MOST_DENSE}; trace fewer tokens."
        )
    ids = np.int16 if trace.regions <= np.iinfo(np.int16).max else np.int32
    dense_bytes, dense_largest = _quantised(dense)
    attention_bytes, attention_largest = _quantised(trace.attention)
    most = np.abs(trace.scores).max(axis=(0, 2, 3), initial=0)
    scale = np.where(most > 0, most, 1).astype(np.float32)
    scores = np.rint(trace.scores / scale[:, None, None] * np.iinfo(np.int16).max).astype(np.int16)
    return {
        "entries": trace.entries,
        "visual": trace.visual_tokens,
        "denseLargest": dense_largest,
        "attentionLargest": attention_largest,
        "scoreLargest": scale,
        "selected": trace.selected.astype(ids),
        "grids": np.concatenate([view.regions.ravel() for view in trace.views]).astype(ids),
        "scores": scores,
        "dense": dense_bytes,
        "attention": attention_bytes,
        **({} if trace.probabilities is None else {"probabilities": trace.probabilities}),
        **({} if trace.region_keys is None else {"regionKeys": trace.region_keys}),
    }, per_head


def _quantised(shares: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Quantise fractions [..., N] to uint8, 255 for a row's largest, which is returned as float32 [...]."""
    largest = shares.max(axis=-1, initial=0)
    scale = np.where(largest > 0, largest, 1).astype(np.float32)
    return np.rint(shares / scale[..., None] * 255).astype(np.uint8), scale


def _packed(arrays: dict[str, np.ndarray]) -> tuple[bytes, dict[str, tuple[str, int, int]]]:
    """The arrays concatenated and deflated, and {name: (type, offset, count)}; wide types come first."""
    layout, pieces, offset = {}, [], 0
    for name, array in sorted(arrays.items(), key=lambda item: -item[1].itemsize):
        layout[name] = (_TYPES[array.dtype.name], offset, array.size)
        pieces.append(np.ascontiguousarray(array, array.dtype.newbyteorder("<")).tobytes())
        offset += array.nbytes
    return zlib.compress(b"".join(pieces), 9), layout
