"""Read image files: a few formats, a size limit that is checked before decoding, no network."""

import os

import numpy as np
import PIL.Image
import PIL.ImageOps

from gaze_jax.errors import UserError
from gaze_jax.media.probe import check_file, read_head, video_kind

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
MAX_PIXELS = 100_000_000
"""Maximum width x height to decode; a PNG file of 0.4 MB can have 400 megapixels."""


def check_pixels(name: str, kind: str, width: int, height: int) -> None:
    """Refuse a picture too large to decode; ``kind`` ("Image", "Video") starts the error message.

    Raises:
      UserError: the picture has more than :data:`MAX_PIXELS`.
    """
    if width * height > MAX_PIXELS:
        raise UserError(
            f"{kind} {name!r} has {width}x{height} pixels, more than the limit of {MAX_PIXELS}; "
            "make it smaller."
        )


def read_image(path: str | os.PathLike[str]) -> np.ndarray:
    """Decode an image file to upright uint8 [height, width, 3]; the first frame if it is animated.

    Raises:
      UserError: the path is a URL, or the file is missing, empty, a video, not in :data:`FORMATS`, larger
        than :data:`MAX_PIXELS` or damaged. One sentence that names the file.
    """
    name = os.fspath(path)
    check_file(name, "Image")
    try:
        with PIL.Image.open(name, formats=FORMATS) as image:
            check_pixels(name, "Image", *image.size)
            # Cameras store the picture unrotated, with its orientation in the metadata.
            upright = PIL.ImageOps.exif_transpose(image)
            if upright.mode.startswith("I"):  # 16 bits: convert() would clip instead of scale
                grey = np.clip(np.asarray(upright, np.int64) >> 8, 0, 255).astype(np.uint8)
                return np.repeat(grey[..., None], 3, axis=-1)
            return np.asarray(upright.convert("RGB"))
    except UserError:
        raise
    except (PIL.Image.DecompressionBombError, PIL.Image.DecompressionBombWarning) as error:
        raise UserError(
            f"Image {name!r} has more pixels than the limit of {MAX_PIXELS}; make it smaller."
        ) from error
    except PIL.UnidentifiedImageError as error:
        if video_kind(read_head(name)) is not None:
            raise UserError(f"Image {name!r} is a video; use --video.") from error
        raise UserError(f"Image {name!r} is none of {', '.join(FORMATS)}; convert it to one.") from error
    except (OSError, SyntaxError, ValueError) as error:
        raise UserError(f"Image {name!r} cannot be decoded ({error}); the file is damaged.") from error
