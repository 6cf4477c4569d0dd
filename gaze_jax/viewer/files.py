"""Write where an answer looked to a file; the suffix says how."""

import html
import os
from pathlib import Path

from gaze_jax.errors import UserError
from gaze_jax.infer import answer
from gaze_jax.infer.trace import Trace
from gaze_jax.infer.trace_file import save
from gaze_jax.viewer.answer_sheet import sheet
from gaze_jax.viewer.html import viewer_page
from gaze_jax.viewer.video import write_clip
from gaze_jax.writing import replacing, write_text

SUFFIXES = (".html", ".png", ".mp4", ".gaze")
VIEWS = 8
"""Default maximum number of views and frames in a sheet or clip."""


def write_trace(
    trace: Trace, path: str | os.PathLike[str], *, layer: int | None = None, views: int = VIEWS
) -> None:
    """Write a trace as a viewer page (.html), a sheet (.png), a clip (.mp4) or the trace itself (.gaze).

    Args:
      trace: where an answer looked.
      path: the file.
      layer: the layer to show; None is all.
      views: maximum number of views and frames in a sheet or clip.

    Raises:
      UserError: the suffix is none of :data:`SUFFIXES`, the layer does not exist, the trace is dense and the
        picture would show a selection, or the file cannot be written.
    """
    path = Path(path)
    if path.suffix not in SUFFIXES:
        raise UserError(f"{str(path)!r} must end in one of {', '.join(SUFFIXES)}.")
    if path.suffix == ".gaze":
        save(trace, path)
    elif path.suffix == ".html":
        write_text(path, viewer_page(trace, layer=layer))
    elif path.suffix == ".png":
        picture = sheet(trace, layer=layer, views=views)
        with replacing(path) as part:
            picture.save(part, format="PNG")
    else:
        write_clip(trace, path, layer=layer, views=views)


def frame(trace: Trace) -> str:
    """HTML of a frame that shows a trace's viewer page, for notebooks."""
    page = html.escape(viewer_page(trace), quote=True)
    return (
        f'<iframe srcdoc="{page}" style="width:100%;height:720px;border:0" title="Where it looked"></iframe>'
    )


# An answer saves and shows itself, but its package is below this one and cannot import it.
answer.WRITERS |= {"file": write_trace, "notebook": frame}
