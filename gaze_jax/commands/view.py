"""View gaze traces: write an HTML page for each and, on request, a PNG contact sheet and an MP4 clip.

gaze-jax view street.gaze --out=looked
    writes looked/street.html, a single file that needs no network

gaze-jax view answers/*.gaze --out=looked --png --mp4 --layer=12
    writes a page, a sheet and a clip of each, and looked/index.html, which lists them
"""

import typing
from collections.abc import Sequence
from pathlib import Path

from gaze_jax.commands import cli
from gaze_jax.commands.flags import Flags, Values
from gaze_jax.errors import UserError
from gaze_jax.writing import replacing, write_text

if typing.TYPE_CHECKING:
    from gaze_jax.infer.trace import Trace

_INDEX = "index"


def define_flags(flags: Flags) -> None:
    """What to write, and how."""
    flags.group("What to write")
    flags.string("out", None, "Folder to write to; created if it does not exist.", "FOLDER")
    flags.boolean("png", False, "Write a contact sheet of each trace too.")
    flags.boolean("mp4", False, "Write a clip of each trace too; needs the video extra.")
    flags.group("What they show")
    flags.integer("layer", None, "Layer to show; default: all, and for pages the most concentrated.")
    flags.integer("views", 8, "Most views and frames in a sheet or clip: the most selected.")
    flags.number("seconds", 1.0, "Seconds per token in a clip.")
    flags.string("font", None, "TrueType font for sheets and clips, needed for text beyond ASCII.", "FILE")


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


def _check(values: Values) -> None:
    """Refuse flags that have no effect or would fail only after some files are written."""
    from PIL import ImageFont

    from gaze_jax.viewer.video import check_seconds, need_av

    if not values.mp4:
        cli.refuse_flags(values, ("seconds",), "has no effect without --mp4")
    if not values.mp4 and not values.png:
        cli.refuse_flags(values, ("views", "font"), "has no effect without --png or --mp4")
    if values.mp4:
        check_seconds(values.seconds)
        need_av()
    if values.views < 1:
        raise UserError(f"--views={values.views} must be at least 1.")
    if values.font is not None:
        try:
            ImageFont.truetype(values.font)
        except OSError as error:
            raise UserError(f"--font={values.font} is not a readable TrueType file.") from error


def _show(trace: "Trace", stem: Path, values: Values) -> None:
    """Write the requested files of one trace."""
    from gaze_jax.viewer.answer_sheet import sheet
    from gaze_jax.viewer.html import viewer_page
    from gaze_jax.viewer.video import write_clip

    page, picture, clip = (stem.with_name(stem.name + suffix) for suffix in (".html", ".png", ".mp4"))
    layer, views = values.layer, values.views
    font = None if values.font is None else Path(values.font)
    write_text(page, viewer_page(trace, layer=layer))
    print(page)
    if values.png:
        drawn = sheet(trace, layer=layer, views=views, font=font)
        with replacing(picture) as part:
            drawn.save(part, format="PNG")
        print(picture)
    if values.mp4:
        write_clip(trace, clip, layer=layer, views=views, seconds=values.seconds, font=font)
        print(clip)


def main(values: Values, traces: Sequence[str]) -> None:
    """Write the requested files; on an error, still write an index of the finished pages."""
    names = _names(traces)
    if values.out is None:
        raise UserError("Give --out, the folder to write to.")
    _check(values)
    from gaze_jax.infer.trace_file import load
    from gaze_jax.viewer.html import Entry, index_page

    folder = cli.make_folder("out", values.out)
    entries = []
    try:
        for path, name in zip(traces, names):
            trace = load(path)
            try:
                _show(trace, folder / name, values)
            except UserError as error:
                raise UserError(f"{path}: {error}") from error
            if len(names) > 1:
                entries.append(Entry.of(trace, f"{name}.html"))
    finally:
        if entries:
            index = folder / f"{_INDEX}.html"
            write_text(index, index_page(entries))
            print(index)


def run() -> None:
    """The command."""
    cli.run(main, define_flags, __doc__, arguments=True)


if __name__ == "__main__":
    run()
