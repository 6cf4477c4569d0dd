"""Reading an image file: a few formats, a size limit that is checked before decoding, no network."""

import os
import re

import numpy as np
import PIL.Image
import PIL.ImageOps

from gaze_jax.errors import UserError

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
MAX_PIXELS = 100_000_000
"""Largest width x height that is decoded; a 400-megapixel PNG can be a file of 0.4 MB."""


def read_image(path: str | os.PathLike[str]) -> np.ndarray:
    """Decode an image file to upright uint8 [height, width, 3]; the first frame if it is animated.

    Raises:
      UserError: the path is a URL, or the file is missing, empty, not of :data:`FORMATS`, larger than
        :data:`MAX_PIXELS` or damaged. One sentence that names the file.
    """
    name = os.fspath(path)
    if re.match(r"^[a-zA-Z][a-zA-Z0-9+.-]+:", name):
        raise UserError(f"Image {name!r} looks like a URL; give the path of a local file.")
    if not os.path.isfile(name):
        raise UserError(f"Image {name!r} is not a file; check the path.")
    if os.path.getsize(name) == 0:
        raise UserError(f"Image {name!r} is empty (0 bytes); write or download it again.")
    try:
        with PIL.Image.open(name, formats=FORMATS) as image:
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise UserError(
                    f"Image {name!r} has {width}x{height} pixels, more than the limit of {MAX_PIXELS}; "
                    "make it smaller."
                )
            # Cameras store the picture as the sensor lay and note how to turn it.
            upright = PIL.ImageOps.exif_transpose(image)
            if upright.mode.startswith("I"):  # 16 bits: convert() would clip and not scale
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
        raise UserError(f"Image {name!r} is none of {', '.join(FORMATS)}; convert it to one.") from error
    except (OSError, SyntaxError, ValueError) as error:
        raise UserError(f"Image {name!r} cannot be decoded ({error}); the file is damaged.") from error
