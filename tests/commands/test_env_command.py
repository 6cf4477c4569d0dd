"""gaze-jax env: what is installed, and which implementations run here."""

import jax
import pytest

import gaze_jax
from gaze_jax.commands import env
from pallas_kernels.gaze_decode import api, native
from pallas_kernels.gaze_prefill import api as prefill
from tests.helpers import native_library


@pytest.mark.parametrize("built", [True, False])
def test_it_names_versions_devices_and_implementations(capsys, monkeypatch, built):
    """Without the library of "native", "xla" is the default, and the line says what to do."""
    if built:
        native_library.needed()
    else:
        monkeypatch.setattr(native.library, "missing", lambda: "its library was not built; install g++.")
    env.main(None)
    out = capsys.readouterr().out
    assert out.startswith(f"gaze_jax {gaze_jax.__version__}, Python 3.")
    assert f"\njax {jax.__version__}, " in out
    assert f"\n{jax.device_count()} device(s): cpu, " in out
    for op in (api, prefill):
        assert all(f"\n  {name}: " in out for name in op.IMPLEMENTATIONS)
    default = "native" if built else "xla"
    assert f"\n  {default}: runs here, the default\n" in out.partition("gaze_prefill:")[0]
    assert ("\n    instruction set " in out) == built
    assert ("\n  native: its library was not built; install g++.\n" in out) != built
    assert "\n  tpu: it is a kernel for tpu and JAX runs on cpu" in out
