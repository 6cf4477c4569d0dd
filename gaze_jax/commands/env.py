"""Say what is installed and what it runs on: versions, devices, and which attention implementations run here.

gaze-jax env
"""

import platform
from importlib import metadata

import gaze_jax
from gaze_jax.commands import cli
from gaze_jax.commands.flags import Flags, Values

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


def define_flags(flags: Flags) -> None:
    """It has none."""
    del flags


def main(values: Values) -> None:
    """Print it."""
    del values
    import jax

    from pallas_kernels import GazeSpec
    from pallas_kernels.gaze_decode import api as decode
    from pallas_kernels.gaze_prefill import api as prefill

    print(f"gaze_jax {gaze_jax.__version__}, Python {platform.python_version()}, {platform.platform()}")
    print(", ".join(f"{name} {metadata.version(name)}" for name in PACKAGES))
    kind = jax.devices()[0].device_kind
    print(f"{jax.device_count()} device(s): {jax.default_backend()}, {kind}")
    spec = GazeSpec(scale=1.0)
    for op, api, default in (
        ("gaze_decode", decode, decode.named(decode.AUTO)),
        ("gaze_prefill", prefill, "xla"),
    ):
        print(f"{op}:")
        for name in api.IMPLEMENTATIONS:
            reason = api.supports(name, spec)
            print(f"  {name}: {reason or 'runs here'}" + (", the default" if name == default else ""))
            if name == "native" and reason is None:
                print(f"    instruction set {decode.native.library.instruction_set()}")


def run() -> None:
    """The command."""
    cli.run(main, define_flags, __doc__)


if __name__ == "__main__":
    run()
