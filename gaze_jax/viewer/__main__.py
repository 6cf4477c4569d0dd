"""View gaze traces: an HTML page for each, and on request a PNG contact sheet and an MP4 clip.

python -m gaze_jax.viewer street.gaze --out=looked
    writes looked/street.html, a single file that needs no network

python -m gaze_jax.viewer answers/*.gaze --out=looked --png --mp4 --layer=12
    writes a page, a sheet and a clip of each, and looked/index.html, which lists them
"""

from collections.abc import Sequence
from pathlib import Path

from absl import flags
from PIL import ImageFont

from gaze_jax import cli
from gaze_jax.errors import UserError
from gaze_jax.infer.trace import Trace
from gaze_jax.infer.trace_file import load
from gaze_jax.viewer.answer_sheet import sheet
from gaze_jax.viewer.html import Entry, index_page, viewer_page
from gaze_jax.viewer.video import check_seconds, need_av, write_clip

_OUT = flags.DEFINE_string("out", None, "Folder to write to; created if it does not exist.")
_PNG = flags.DEFINE_bool("png", False, "Write a contact sheet of each trace too.")
_MP4 = flags.DEFINE_bool("mp4", False, "Write a clip of each trace too; needs the video extra.")
_LAYER = flags.DEFINE_integer(
    "layer", None, "Layer to show; on pages it can be changed. Default: all layers."
)
_VIEWS = flags.DEFINE_integer("views", 8, "Most views and frames in a sheet or clip: the most selected.")
_SECONDS = flags.DEFINE_float("seconds", 1.0, "Seconds per token in a clip.")
_FONT = flags.DEFINE_string("font", None, "TrueType font for sheets and clips, needed for text beyond ASCII.")

_INDEX = "index"


def _names(traces: Sequence[str]) -> list[str]:
    """Names of the output files of each trace, without suffix."""
    if not traces:
        raise UserError("There is no trace to show; give one or more trace files.")
    names = [Path(trace).name.removesuffix(".npz").removesuffix(".gaze") for trace in traces]
    for number, name in enumerate(names):
        try:
            name.encode()
        except UnicodeEncodeError as error:
            raise UserError(f"The file name {name!r} is not valid UTF-8; rename the file.") from error
        if name in names[:number]:
            first = traces[names.index(name)]
            raise UserError(f"{first} and {traces[number]} would both write {name}.html; rename one.")
        if name == _INDEX and len(names) > 1:
            raise UserError(f"{traces[number]} would write {_INDEX}.html, which lists the others; rename it.")
    return names


def _check_flags() -> None:
    """Refuse flags that have no effect or would fail only after some files are written."""
    if not _MP4.value:
        cli.refuse_flags((_SECONDS,), "has no effect without --mp4")
    if not _MP4.value and not _PNG.value:
        cli.refuse_flags((_VIEWS, _FONT), "has no effect without --png or --mp4")
    if _MP4.value:
        check_seconds(_SECONDS.value)
        need_av()
    if _VIEWS.value < 1:
        raise UserError(f"--views={_VIEWS.value} must be at least 1.")
    if _FONT.value is not None:
        try:
            ImageFont.truetype(_FONT.value)
        except OSError as error:
            raise UserError(f"--font={_FONT.value} is not a readable TrueType file.") from error


def _show(trace: Trace, stem: Path, font: Path | None) -> None:
    """Write the requested files of one trace."""
    page, picture, clip = (stem.with_name(stem.name + suffix) for suffix in (".html", ".png", ".mp4"))
    cli.write_text(page, viewer_page(trace, layer=_LAYER.value))
    print(page)
    if _PNG.value:
        drawn = sheet(trace, layer=_LAYER.value, views=_VIEWS.value, font=font)
        with cli.writing(picture):
            drawn.save(picture)
        print(picture)
    if _MP4.value:
        write_clip(trace, clip, layer=_LAYER.value, views=_VIEWS.value, seconds=_SECONDS.value, font=font)
        print(clip)


def main(traces: Sequence[str]) -> None:
    """Write the requested files; on an error, still write an index of the finished pages."""
    names = _names(traces)
    _check_flags()
    if _OUT.value is None:
        raise UserError("Give --out, the folder to write to.")
    folder = cli.make_folder("out", _OUT.value)
    font = None if _FONT.value is None else Path(_FONT.value)
    entries = []
    try:
        for path, name in zip(traces, names):
            trace = load(path)
            try:
                _show(trace, folder / name, font)
            except UserError as error:
                raise UserError(f"{path}: {error}") from error
            if len(names) > 1:
                entries.append(Entry.of(trace, f"{name}.html"))
    finally:
        if entries:
            index = folder / f"{_INDEX}.html"
            cli.write_text(index, index_page(entries))
            print(index)


if __name__ == "__main__":
    cli.run(main, arguments=True)
