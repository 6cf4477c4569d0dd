"""Small multimodal checkpoints as they are published: weights, tokenizer, chat template, end tokens."""

import json
from pathlib import Path

from gaze_jax.convert import run
from tests.helpers import hf
from tests.helpers.chat import TEMPLATES, tokenizer_json

FAMILIES = ("llava_onevision", "llava_next", "cambrian_s")


def write(family: str, directory: Path) -> Path:
    """A directory that generate.py takes; that of a family whose tower lies elsewhere is converted."""
    source = directory / "source"
    if family == "llava_onevision":
        hf.save("llava_onevision", source)
    elif family == "llava_next":
        hf.save_llava_next(source)
    else:
        hf.save_cambrian(source)
    (source / "tokenizer.json").write_text(tokenizer_json(vocab_size=hf.TEXT["vocab_size"]))
    (source / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_end|>"}))
    (source / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, 2]}))
    name = "llava_onevision" if family == "llava_onevision" else "qwen2_5"
    (source / "chat_template.jinja").write_text(TEMPLATES[name])
    if family == "llava_onevision":
        return source
    tower = hf.save_tower("llava_onevision_penultimate", directory / "tower")
    run.write_plan(run.plan_directory(source, vision=tower), directory / "gaze")
    return directory / "gaze"
