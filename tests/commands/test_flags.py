"""Flags and help of every command, in this process: nothing of a command is global."""

import subprocess
import sys

import pytest
from absl import flags as absl_flags

from gaze_jax.commands import cli, convert, data, env, eval, flags, generate, topology, train, view
from gaze_jax.core.layout import NEWLINES
from gaze_jax.core.regions import DESCRIPTORS
from gaze_jax.models.config import PARAM_DTYPES
from pallas_kernels.spec import SELECT_PER
from tests.helpers.commands import ROOT, finish, start

COMMANDS = {
    "train": train,
    "eval": eval,
    "generate": generate,
    "convert": convert,
    "view": view,
    "data": data,
    "topology": topology,
    "env": env,
}


def parse(command, *argv):
    return cli.parse(command.define_flags, command.__doc__, ["command", *argv])


def names(command):
    """A command's own flags."""
    defined = flags.Flags(command.__doc__, ["command"])
    command.define_flags(defined)
    return set(defined.values) - {"help", "h"}


def ended(command, capsys, *argv):
    """Status, stdout and stderr of parsing that ends the program."""
    with pytest.raises(SystemExit) as end:
        parse(command, *argv)
    return end.value.code, *capsys.readouterr()


@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
def test_help_shows_the_own_flags_and_no_others(command, capsys):
    status, out, err = ended(command, capsys, "--help")
    assert status == 0 and not err
    assert out.startswith(command.__doc__.strip())
    listed = [line.strip().removeprefix("--").removeprefix("[no]").split("=")[0] for line in out.splitlines()]
    options = [name for line, name in zip(out.splitlines(), listed) if line.startswith("  --")]
    assert sorted(options) == sorted(names(command))
    assert "verbosity" not in out and "helpfull" not in out
    assert ended(command, capsys, "-h") == (0, out, "")
    assert ended(command, capsys, "--nothing_of_this_name", "-h") == (0, out, "")


def test_help_has_headings_texts_and_defaults(capsys):
    _, out, _ = ended(generate, capsys, "--help")
    for lines in (
        "\nHow tokens are sampled:\n  --max_tokens=N\n      Most tokens to generate for a question; default:",
        "\n  --gaze_select_per=head|kv_head\n      Select per query head, or per kv head's group.\n",
        "\n  --seed=N\n      Seed of the sampling; default: 0.\n",
        "\n  --[no]offload\n      Keep",
    ):
        assert lines in out


@pytest.mark.parametrize(
    "command", ["train.py", "eval.py", "generate.py", "convert.py", "-m gaze_jax.viewer"]
)
def test_a_shim_starts_and_helps_without_jax(command):
    """As a process, with what is imported; -m of the module is the same."""
    out, err = finish(start("-X", "importtime", *command.split(), "--help"))
    module = COMMANDS[{"-m gaze_jax.viewer": "view"}.get(command, command.removesuffix(".py"))]
    assert out.startswith(module.__doc__.strip())
    imported = {line.split("|")[-1].strip() for line in err.splitlines()}
    assert module.__name__ in imported and not imported & {"jax", "numpy", "orbax", "grain"}


def test_a_module_is_a_command_too():
    done = subprocess.run(
        [sys.executable, "-m", "gaze_jax.commands.generate", "--top_k=3"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.startswith("python -m gaze_jax.commands.generate: --top_k is now --gaze_top_k ")


OLD = {
    "generate": {
        "top_k": ("gaze_top_k", "sample_top_k"),
        "keep": ("gaze_keep",),
        "dense": ("gaze_dense",),
        "dense_layers": ("gaze_full_layers",),
        "full_layers": ("gaze_full_layers",),
        "share": ("gaze_select_per", "kv_head"),
        "select_per": ("gaze_select_per",),
        "region": ("gaze_region",),
        "video_region": ("gaze_video_region",),
        "newlines": ("gaze_newlines", "text or region"),
        "visual_dtype": ("gaze_visual_dtype",),
        "units": ("views",),
    },
    "eval": {
        "top_ks": ("gaze_top_ks",),
        "shares": ("gaze_select_per", "kv_head"),
        "descriptors": ("gaze_descriptors",),
    },
    "convert": {
        "top_k": ("gaze_top_k",),
        "region": ("gaze_region",),
        "context_tokens": ("gaze_context_tokens",),
    },
    "view": {"units": ("views",)},
}


@pytest.mark.parametrize(
    ("command", "old", "new"), [(c, old, new) for c in OLD for old, new in OLD[c].items()]
)
@pytest.mark.parametrize("given", ["--{}=1", "--{} 1", "-{}=1", "--no{}"])
def test_a_former_flag_is_refused_and_the_new_one_named(command, old, new, given, capsys):
    """Before whatever else is wrong, however it is written."""
    status, out, err = ended(COMMANDS[command], capsys, *given.format(old).split())
    assert status == 2 and not out
    assert len(err.splitlines()) == 1 and f"--{old} is now --{new[0]}" in err
    for word in new[1:]:
        assert word in err


def test_every_former_name_is_tried_and_none_is_a_flag():
    """The table holds no name that a command has."""
    assert {old for olds in OLD.values() for old in olds} == set(flags.RENAMED)
    assert not set(flags.RENAMED) & set().union(*map(names, COMMANDS.values()))


@pytest.mark.parametrize("name", ["gaze_top", "gaze_k", "sample_top", "temp", "topk"])
def test_the_beginning_of_a_name_is_no_flag(name, capsys):
    status, _, err = ended(generate, capsys, f"--{name}=1")
    assert status == 2 and f"Unknown command line flag '{name}'" in err and len(err.splitlines()) == 1


@pytest.mark.filterwarnings("ignore:the load_module")  # by which ml_collections reads a config file
@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("model.gaze.share=kv_head", "--config.model.gaze.share is now --config.model.gaze.select_per"),
        ("model.gaze.topk=1", "'topk' does not exist, did you mean 'top_k'"),
    ],
)
def test_a_former_field_of_a_config_is_refused(override, sentence, capsys):
    status, _, err = ended(train, capsys, "--config=tests/helpers/tiny_config.py", f"--config.{override}")
    assert status == 2 and sentence in err and len(err.splitlines()) == 1


@pytest.mark.parametrize(
    ("command", "flag", "sentence"),
    [
        (eval, "--gaze_top_ks=1,x", "must be whole numbers with commas between them, such as 1,2,4"),
        (eval, "--gaze_top_ks=-1", "must be whole numbers"),
        (
            generate,
            "--gaze_top_k=8,x",
            "must be whole numbers with commas between them, such as 8 or 8,8,4,4",
        ),
        (generate, "--gaze_top_k=", "must be whole numbers with commas between them, such as 8 or 8,8,4,4"),
        (eval, "--gaze_select_per=group", "must be some of head, kv_head, with commas between them"),
        (eval, "--gaze_descriptors=", "must be some of mean, minmax"),
        (generate, "--gaze_region=3,", "must be whole numbers with commas between them, such as 7,7"),
        (generate, "--gaze_select_per=group", "should be one of <head|kv_head>"),
        (generate, "--gaze_newlines=dense", "should be one of <text|region>"),
        (generate, "--sample_top_k=x", "invalid literal for int"),
    ],
)
def test_a_value_that_cannot_be_is_refused(command, flag, sentence, capsys):
    status, _, err = ended(command, capsys, flag)
    assert status == 2 and len(err.splitlines()) == 1
    assert f"flag {flag}" in err and sentence in err


def test_lists_are_tuples():
    values, rest = parse(eval, "--gaze_top_ks=1, 2", "word", "--gaze_select_per=kv_head")
    assert (values.gaze_top_ks, values.gaze_select_per, rest) == ((1, 2), ("kv_head",), ["word"])
    assert values.gaze_descriptors == ("mean", "minmax")
    assert parse(convert)[0].gaze_region == (6, 6)


def test_commands_share_names_and_a_process():
    """Each parse is its own; absl's global flags get none of them."""
    assert parse(generate, "--gaze_top_k=8,8, 4")[0].gaze_top_k == (8, 8, 4)
    values, _ = parse(generate, "--out=a.html", "--gaze_top_k=3")
    again, _ = parse(generate, "--out=b.html")
    assert (values.out, values.gaze_top_k, again.out, again.gaze_top_k) == (["a.html"], 3, ["b.html"], None)
    assert parse(view, "--out=c")[0].out == "c"
    assert "gaze_top_k" not in absl_flags.FLAGS


def test_flags_of_absl_are_taken():
    """Those of logging, which are not listed."""
    verbosity = absl_flags.FLAGS["verbosity"]
    before = verbosity.value, verbosity.present
    try:
        parse(eval, "--verbosity=-1")
        assert absl_flags.FLAGS.verbosity == -1
    finally:
        verbosity.value, verbosity.present = before


def test_words_that_flags_offer_are_those_of_the_library():
    """They are written down again so that help needs no import of it."""
    assert generate.SELECT_PER == eval.SELECT_PER == SELECT_PER
    assert generate.NEWLINES == NEWLINES and eval.DESCRIPTORS == DESCRIPTORS
    assert tuple(PARAM_DTYPES) == convert.DTYPES
