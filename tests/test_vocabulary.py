"""One vocabulary: names that were given up do not come back, in code, file names, flags or docs."""

import ast
import fnmatch
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("gaze_jax", "pallas_kernels", "configs", "benchmarks", "examples", "scripts", "tests")

# A word of a name (names are split at underscores and capitals) -> what to say in its place.
WORDS = {
    "door": "command",
    "doors": "commands",
    "law": "invariant",
    "laws": "invariants",
    "unit": "view",
    "units": "views",
    "tap": "pool index",
    "taps": "pool_indices",
    "pos": "positions",
    "share": "select_per",
    "room": "free_slots",
    "assistant": "sampler",
    "talk": "ChatSession, chat",
    "said": "generated",
    "say": "decode",
    "glance": "TokenTrace",
    "glances": "token_traces",
    "speech": "Detokenizer",
    "looking": "GazeOptions, gaze",
    "look": "Selection",
    "watch": "return_trace, append_frames",
    "watched": "traced",
    "grown": "grow_cache",
    "sight": "DecodeMasks",
    "still": "fixed",
    "moving": "updated",
    "touch": "init_forward",
    "apart": "unstacked",
}
# A whole name -> what to say in its place.
NAMES = {
    "slot": "write_index",
    "whole": "full_layers",
    "dense_layers": "full_layers",
    "run_door": "cli.run",
    "begin": "prefill_step",
    "say_steps": "decode_loop",
    "finish": "finish_reason",
    "visual_weights": "pool_weights",
    "process_with_units": "process_with_views",
    "Look": "Selection",
    "Choice": "Selection",
    "Turn": "DecodeState",
    "Step": "DecodePosition",
    "Session": "Engine",
    "Plan": "AttentionMetadata",
    "Sampling": "FrameSampling, SamplingParams",
    **{
        f"dense_{part}": f"text_{part}"
        for part in ("k", "v", "seen", "order", "segment", "unit", "lo", "hi", "pos")
    },
}
# (word, files, names): where a word has another meaning, and which.
ALLOWED = (
    ("look", "*", "*look_at*"),  # steering
    ("look", "*", "LookAt"),
    ("look", "*", "*LOOK_AT*"),
    ("whole", "tests/*", "*"),  # all of a file, a model, a picture
    ("whole", "benchmarks/*", "*"),
    ("whole", "pallas_kernels/*", "*"),
    ("whole", "gaze_jax/convert/*", "*"),
    ("whole", "gaze_jax/families/*", "*"),
    ("whole", "gaze_jax/viewer/*", "*"),
    ("whole", "gaze_jax/train/*", "*"),
    ("whole", "gaze_jax/chat/*", "*"),
    ("slot", "pallas_kernels/*", "*"),  # of a ring of buffers
    ("slot", "tests/kernels/*", "*"),
    ("Plan", "gaze_jax/convert/*", "*"),  # of a conversion
    ("Plan", "gaze_jax/commands/convert.py", "*"),
    ("Plan", "pallas_kernels/gaze_prefill/*", "*"),  # of a kernel's tiles
    ("unit", "pallas_kernels/gaze_prefill/*", "*"),  # rows that one register holds
    ("units", "pallas_kernels/gaze_prefill/*", "*"),
    ("pos", "*", "pos"),  # of a JSON error, of a packet in its file
    ("touch", "tests/*", "touch"),  # of pathlib
    ("finish", "tests/*", "finish"),  # waits for a process
    ("assistant", "gaze_jax/chat/*", "*"),  # the role in a conversation
    ("assistant", "tests/chat/*", "*"),
    ("door", "tests/helpers/shape_checks.py", "door"),  # a module of beartype
)
# Names of tests are sentences, in which these are plain English.
OF_SENTENCES = {
    "share",
    "shares",
    "room",
    "said",
    "say",
    "look",
    "still",
    "moving",
    "touch",
    "apart",
    "watch",
}


def files():
    for folder in FOLDERS:
        yield from sorted((ROOT / folder).rglob("*.py"))
    yield from sorted(ROOT.glob("*.py"))


def words_of(name):
    """Lower-case words: "visual_view" and "VisualView" are "visual" and "view"."""
    return [w.lower() for w in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z0-9]+", name)]


def names_in(tree):
    """Every name that a module defines or uses, flags and keyword arguments included."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            yield node.id
        elif isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.arg | ast.keyword) and node.arg:
            yield node.arg
        elif isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2].startswith("DEFINE_"):
            yield from (a.value for a in node.args[:1] if isinstance(a, ast.Constant))


def complaints(name, path):
    """What is wrong with a name in a file."""
    given_up = {word: WORDS[word] for word in words_of(name) if word in WORDS}
    if name in NAMES:
        given_up[name] = NAMES[name]
    for word, better in given_up.items():
        if name.startswith("test_") and word in OF_SENTENCES:
            continue
        if not any(
            word == w and fnmatch.fnmatch(path, files) and fnmatch.fnmatchcase(name, names)
            for w, files, names in ALLOWED
        ):
            yield f"{path}: {name!r} has {word!r}; say {better}"


PATHS = {str(path.relative_to(ROOT)): path for path in files() if path != Path(__file__)}


@pytest.mark.parametrize("path", PATHS)
def test_names(path):
    tree = ast.parse(PATHS[path].read_text(encoding="utf-8"))
    wrong = [found for name in sorted(set(names_in(tree))) for found in complaints(name, path)]
    wrong += [found for part in Path(path).with_suffix("").parts for found in complaints(part, path)]
    assert not wrong, "\n".join(wrong)


PROSE = {
    r"dense stream": "text stream",
    r"\bdoors?\b": "command",
    r"\b[Ll]aws? \d": "invariant",
    r"\bvisual_unit|visual_taps|dense_k\b|dense_order\b": "visual_view, pool_indices, text_k, text_order",
    r"--(top_k|keep|dense|dense_layers|shares?|units|top_ks)\b": "--gaze_top_k, --sample_top_k, ...",
}


@pytest.mark.parametrize(
    "path", sorted(str(p.relative_to(ROOT)) for p in (*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")))
)
def test_prose(path):
    if path == "CHANGELOG.md":
        return  # it tells what names were before
    text = (ROOT / path).read_text(encoding="utf-8")
    wrong = [f"{m.group(0)!r}; say {better}" for old, better in PROSE.items() for m in re.finditer(old, text)]
    assert not wrong, "\n".join(wrong)


def test_a_name_that_was_given_up_is_found():
    """The walk sees definitions, keywords, attributes and flags."""
    code = (
        "class Talk:\n    def f(self, dense_k, *, share=1):\n        return g(room=self.unit)\n"
        "DEFINE_bool('units', 1)"
    )
    wrong = [found for name in names_in(ast.parse(code)) for found in complaints(name, "x.py")]
    assert len(wrong) == 6
