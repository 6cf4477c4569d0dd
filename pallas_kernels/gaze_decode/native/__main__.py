"""Compile the library beside its sources: python -m pallas_kernels.gaze_decode.native."""

import subprocess
import sys

from pallas_kernels.gaze_decode.native import build


def main() -> None:
    """A failure ends in what the compiler said."""
    try:
        build.compile_library(build.LIBRARY)
    except (OSError, subprocess.CalledProcessError) as error:
        sys.exit(f"{getattr(error, 'stderr', None) or error}")
    print(build.LIBRARY)


if __name__ == "__main__":
    main()
