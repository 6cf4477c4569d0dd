"""Small multimodal checkpoints in every layout that is read, and what they are converted to."""

import functools
import tempfile
from pathlib import Path

from gaze_jax.convert import run
from gaze_jax.models.config import VisionConfig
from tests.helpers import hf

TOWER = VisionConfig(24, 4, 48, depth=2, num_heads=4, mlp_dim=80)

keep: list[tempfile.TemporaryDirectory] = []


@functools.cache
def tower(tied: bool = False) -> Path:
    """The whole tower of the models that the other two layouts are made of."""
    keep.append(where := tempfile.TemporaryDirectory())
    name = "llava_onevision_penultimate" + ("_tied" if tied else "")
    return hf.save_tower(name, Path(where.name) / "tower")


def hub_layout(directory, **options):
    return hf.rename(hf.save("llava_onevision_tied", directory, **options), hf.hub_name)


def memory_layout(directory, **options):
    return hf.rename(hf.save("llava_onevision", directory, **options), hf.memory_name)


def wrapped_cambrian(directory, **options):
    return hf.rename(
        hf.save_cambrian(directory, **options), lambda name: name.replace("model.", "model._orig_module.", 1)
    )


LAYOUTS = {  # how it is written, and whether a second directory has the tower
    "transformers 5": (functools.partial(hf.save, "llava_onevision"), False),
    "transformers 5, tied": (functools.partial(hf.save, "llava_onevision_tied"), False),
    "transformers 5, a layer early": (functools.partial(hf.save, "llava_onevision_penultimate"), False),
    "transformers 5, odd grid": (functools.partial(hf.save, "llava_onevision_odd"), False),
    "transformers 4": (hub_layout, False),
    "in memory": (memory_layout, False),
    "LLaVA-NeXT": (hf.save_llava_next, True),
    "LLaVA-NeXT, tied": (functools.partial(hf.save_llava_next, tied=True), True),
    "Cambrian-S": (hf.save_cambrian, True),
    "Cambrian-S, tied, no tower": (functools.partial(hf.save_cambrian, tied=True, tower=False), True),
    "Cambrian-S, no tower": (functools.partial(hf.save_cambrian, tower=False), True),
    "Cambrian-S, wrapped": (wrapped_cambrian, True),
}


def original(layout: str):
    """The model of transformers that a layout holds."""
    if layout.startswith("transformers 5, odd"):
        return hf.model("llava_onevision_odd")
    name = "llava_onevision"
    if "early" in layout or not layout.startswith(("transformers", "in memory")):
        name += "_penultimate"
    return hf.model(name + ("_tied" if "tied" in layout or layout == "transformers 4" else ""))


@functools.cache
def converted(layout: str) -> tuple[Path, Path]:
    """The source of a layout and what it was converted to."""
    keep.append(where := tempfile.TemporaryDirectory())
    source, target = Path(where.name) / "source", Path(where.name) / "gaze"
    write, elsewhere = LAYOUTS[layout]
    write(source)
    (source / "tokenizer.json").write_text('{"kept": "as it is"}')
    (source / "tokenizer_config.json").write_text('{"chat_template": "{{ messages }}"}')
    (source / "chat_template.jinja").write_text("{{ messages }}")
    run.write_plan(run.plan_directory(source, vision=tower("tied" in layout) if elsewhere else None), target)
    return source, target


def same_files(first, second):
    names = {path.name for path in first.iterdir()}
    assert names <= {path.name for path in second.iterdir()}
    for name in names:
        assert (first / name).read_bytes() == (second / name).read_bytes(), name
    return names
