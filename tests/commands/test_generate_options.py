"""What generate.py refuses before it reads anything: every rule, and every option's own range."""

import dataclasses

import pytest

from gaze_jax.commands import cli, generate
from gaze_jax.commands.devices import define_processes
from gaze_jax.commands.generate_groups import DEFAULTS
from gaze_jax.commands.generate_options import CHECKPOINT_RULES, RULES, GenerateOptions
from gaze_jax.errors import UserError
from gaze_jax.infer.gaze_options import GazeOptions
from gaze_jax.infer.steer import LookAt

ASK = {"checkpoint": "nowhere", "question": ("What?",)}
PHOTO = ASK | {"image": ("a.png",)}
FILM = ASK | {"video": ("a.mp4",)}
MANY = {"checkpoint": "nowhere", "questions": "q.jsonl", "answers": "a.jsonl"}

# What is given so that a rule's situation is there, by the situation's name.
SITUATIONS = {
    "one_conversation": PHOTO,
    "file_of_questions": MANY,
    "no_video": PHOTO,
    "no_folder": FILM,
    "nothing_shown": ASK,
    "no_layer_shown": PHOTO | {"out": ("a.gaze",)},
    "nothing_drawn": PHOTO | {"out": ("a.html",)},
    "greedy": PHOTO,
    "dense": PHOTO | {"gaze_dense": True},
    "dense_drawn": PHOTO | {"gaze_dense": True},
    "no_traces": MANY,
    "no_box": PHOTO,
    "one_device": PHOTO,
    "sizes_images": PHOTO,
    "selects_nothing": PHOTO,
    "draws_nothing": PHOTO,
}

# What is given of an option, by its name; --out differs by what a rule is about.
VALUES = {
    "answers": "a.jsonl", "traces": "t", "resume": True, "batch_size": 8,
    "image": ("a.png",), "video": ("a.mp4",),
    "question": ("What?",), "out": ("a.png",), "fps": 1.0, "max_frames": 8, "folder_fps": 1.0, "views": 8,
    "look_at_layers": (1,), "look_at_bias": 1.0, "layer": 1, "sample_top_k": 5, "top_p": 1.0, "seed": 0,
    "gaze_select_per": "head", "gaze_region": (3, 3), "gaze_video_region": (1, 3, 3), "gaze_newlines": "text",
    "gaze_visual_dtype": "int8", "offload": True, "gaze_top_k": 1, "gaze_keep": 0.5, "gaze_dense": True,
    "gaze_full_layers": (0,), "look_at": ("0,0,1,1",), "resize": True, "fsdp": 1, "tensor": 1, "context": 1,
}  # fmt: skip


def each(rules):
    return [
        pytest.param(rule, name, id=f"{rule.when.__name__}-{name}") for rule in rules for name in rule.options
    ]


@pytest.mark.parametrize(("rule", "option"), each(RULES))
def test_an_option_without_effect_is_refused(rule, option, tmp_path, monkeypatch):
    """Every option of every rule, given as its default too; without it, nothing is refused."""
    monkeypatch.chdir(tmp_path)
    base = SITUATIONS[rule.when.__name__]
    GenerateOptions.of(base)
    with pytest.raises(UserError) as error:
        GenerateOptions.of(base | {option: VALUES[option]})
    assert str(error.value) == f"--{option} {rule.why}; {rule.mend}."


@pytest.mark.parametrize(("rule", "option"), each(CHECKPOINT_RULES))
def test_an_option_without_effect_on_a_checkpoint_is_refused(rule, option, tmp_path, monkeypatch):
    """And not on one that selects, or that has no way of its own with images."""
    monkeypatch.chdir(tmp_path)
    options = GenerateOptions.of(SITUATIONS[rule.when.__name__] | {option: VALUES[option]})
    with pytest.raises(UserError) as error:
        options.check_checkpoint(top_k=None, depth=3, resizes=True)
    assert str(error.value) == f"--{option} {rule.why}; {rule.mend}."
    options.check_checkpoint(top_k=1, depth=3, resizes=False)


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({}, "Give --checkpoint, a converted one"),
        ({"checkpoint": "nowhere"}, "There is no question; ask one."),
        (PHOTO | {"question": ("",)}, "The question is empty"),
        (PHOTO | {"question": ("<image><image> a",)}, "has 2 <image> and 0 <video> tags but 1 images"),
        ({"checkpoint": "nowhere", "questions": "q.jsonl"}, "Give --answers, the file to write"),
        (MANY | {"answers": "q.jsonl"}, "--answers is the file of --questions, which it would replace"),
        (MANY | {"answers": "."}, "--answers=. is a folder; give the name of a file"),
        (MANY | {"answers": "none/a.jsonl"}, "--answers=none/a.jsonl lies in a folder that does not exist"),
        (MANY | {"batch_size": 0}, "--batch_size=0 must be at least 1"),
        (PHOTO | {"out": ("none/a.png",)}, "--out=none/a.png lies in a folder that does not exist"),
        (PHOTO | {"out": ("a.html", "a.txt")}, "--out=a.txt must end in one of .html, .png, .mp4, .gaze"),
        (PHOTO | {"out": ("a.png",), "views": 0}, "--views=0 must be at least 1"),
        (FILM | {"fps": 0.0}, "--fps=0.0 must be a positive number"),
        (FILM | {"fps": float("nan")}, "--fps=nan must be a positive number"),
        (FILM | {"max_frames": 0}, "--max_frames=0 must be at least 1"),
        (PHOTO | {"gaze_top_k": 0}, "--gaze_top_k=0 must be at least 1; --gaze_dense attends to everything"),
        (PHOTO | {"gaze_keep": 2.0}, "--gaze_keep=2.0 must be above 0 and at most 1"),
        (PHOTO | {"gaze_keep": 0.5, "gaze_top_k": 1}, "--gaze_top_k and --gaze_keep are both budgets"),
        (PHOTO | {"gaze_dense": True, "gaze_top_k": 1}, "--gaze_top_k has no effect with --gaze_dense"),
        (
            PHOTO | {"gaze_dense": True, "gaze_full_layers": (0,)},
            "--gaze_full_layers has no effect with --gaze_dense",
        ),
        (PHOTO | {"gaze_dense": True, "look_at": ("0,0,1,1",)}, "--look_at has no effect with --gaze_dense"),
        (PHOTO | {"look_at": ("1,2,3",)}, "--look_at='1,2,3' must be x0,y0,x1,y1"),
        (PHOTO | {"look_at": ("0,0,1,1",), "look_at_bias": float("inf")}, "must be a finite number"),
        (PHOTO | {"gaze_region": (3,)}, "--gaze_region=3 must be sizes of at least 1, such as 7,7"),
        (PHOTO | {"gaze_region": (0, 3)}, "--gaze_region=0,3 must be sizes of at least 1"),
        (FILM | {"gaze_video_region": (3, 3)}, "--gaze_video_region=3,3 must be sizes of at least 1"),
        (PHOTO | {"temperature": -1.0}, "--temperature=-1.0 must be a finite number"),
        (PHOTO | {"temperature": 1.0, "top_p": 0.0}, "--top_p=0.0 must be above 0"),
        (PHOTO | {"temperature": 1.0, "seed": -1}, "--seed=-1 must be between 0"),
        (PHOTO | {"temperature": 1.0, "sample_top_k": -1}, "--sample_top_k=-1 must be at least 1"),
        (PHOTO | {"max_tokens": 0}, "--max_tokens=0 must be at least 1"),
        (PHOTO | {"stop": ("",)}, "A --stop string is empty"),
        (PHOTO | {"cache_tokens": 0}, "--cache_tokens=0 must be at least 1"),
        (PHOTO | {"all_devices": True, "fsdp": 0}, "--fsdp=0 must be at least 1"),
        (PHOTO | {"all_devices": True, "context": 0}, "--context=0 must be at least 1"),
        (PHOTO | {"context": 2}, "--context has no effect without --all_devices"),
    ],
)  # fmt: skip
def test_what_cannot_be_asked_is_refused_in_one_sentence(given, sentence, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as error:
        GenerateOptions.of(given)
    assert sentence in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("layer", [-1, 3])
def test_a_layer_that_the_model_has_not_is_refused(layer):
    options = GenerateOptions.of(PHOTO | {"out": ("a.html",), "layer": layer})
    with pytest.raises(UserError, match=rf"--layer={layer} must be between 0 and 2"):
        options.check_checkpoint(top_k=1, depth=3, resizes=True)


def test_a_budget_for_other_layers_than_the_model_has_is_refused():
    options = GenerateOptions.of(PHOTO | {"gaze_top_k": (3, 2)})
    with pytest.raises(
        UserError, match="--gaze_top_k=3,2 is for 2 layers but the model has 3; give a number"
    ):
        options.check_checkpoint(top_k=1, depth=3, resizes=True)
    options.check_checkpoint(top_k=1, depth=2, resizes=True)


def test_options_become_what_the_library_takes():
    given = PHOTO | {"gaze_keep": 0.5, "gaze_full_layers": (1,), "gaze_select_per": "kv_head"}
    given |= {"gaze_region": (3, 3), "offload": True, "temperature": 0.5, "stop": (".",)}
    options = GenerateOptions.of(given | {"look_at": ("0,0,5,5,2",), "look_at_layers": (0,)})
    boxes = (LookAt((0.0, 0.0, 5.0, 5.0), 2, (0,)),)
    assert options.selection.options == GazeOptions(keep=0.5, full_layers=(1,), look_at=boxes)
    assert options.selection.config == {
        "select_per": "kv_head",
        "region": (3, 3),
        "decode_implementation": "offload",
    }
    drawn = {"temperature": 0.5, "sample_top_k": None, "top_p": 1.0, "stop": (".",), "seed": 0}
    assert options.sampling.drawn == drawn


def test_every_flag_is_an_option_and_has_its_default():
    """And the flags' defaults are the options'."""
    values, _ = cli.parse(
        generate.define_flags, "", ["generate.py", "--checkpoint=nowhere", "--question=Why?"]
    )
    options = generate.options_of(values)
    groups = [getattr(options, field.name) for field in dataclasses.fields(options)]
    fields = {
        f.name for group in groups if dataclasses.is_dataclass(group) for f in dataclasses.fields(group)
    }
    plain, _ = cli.parse(lambda flags: None, "", ["generate.py"])
    several, _ = cli.parse(define_processes, "", ["generate.py"])
    assert set(values) - set(several) == fields | {"checkpoint"} and set(plain) < set(several) < set(values)
    assert dataclasses.replace(options, devices=type(options.devices)()) == GenerateOptions.of(
        ASK | {"question": ("Why?",)}
    )
    assert set(DEFAULTS) <= fields and all(values[name].value is None for name in DEFAULTS)
