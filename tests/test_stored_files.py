"""Files of version 1, in tests/fixtures/v1, load and give the answers of the program that wrote them."""

import copy
import dataclasses
import functools
import json
import shutil
import tarfile
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

import gaze_jax
from gaze_jax.convert import manifest, run
from gaze_jax.corpora.digits import DigitScenes
from gaze_jax.data.pipeline import compare_fingerprints
from gaze_jax.errors import UserError
from gaze_jax.evaluate.run import run as evaluate
from gaze_jax.infer import trace_file
from gaze_jax.infer.requests import Request, answer_all, record
from gaze_jax.stored import CHANGES, NEWEST, Renamed, check_version, renamed_setting, upgrade
from gaze_jax.train.config import parse
from gaze_jax.train.loop import train
from gaze_jax.train.pipeline import open_data
from tests.helpers.experiments import reused_programs

pytestmark = pytest.mark.xdist_group("stored")

V1 = Path(__file__).parent / "fixtures" / "v1"
EXPECTED = json.loads((V1 / "expected.json").read_text(encoding="utf-8"))
META = "checkpoints/2/meta/metadata"


def stored_trace(path):
    """Arrays of a trace, and its JSON."""
    with np.load(path, allow_pickle=False) as file:
        arrays = {name: file[name] for name in file.files}
    return arrays, json.loads(arrays["meta"].tobytes())


CONTENT = {
    "manifest": json.loads((V1 / "converted" / manifest.FILE).read_text()),
    "export": json.loads((V1 / "export" / "gaze.json").read_text()),
    "run": json.loads((V1 / "run" / META).read_text()),
    "trace": stored_trace(V1 / "answer.gaze")[1],
}
"""What a file of each kind says."""


def near(want, got, where="", tolerance=1e-3):
    """Equal, floats to a relative tolerance."""
    if isinstance(want, dict):
        assert want.keys() == got.keys(), where
        for key, value in want.items():
            near(value, got[key], f"{where}.{key}")
    elif isinstance(want, list):
        assert len(want) == len(got), where
        for value, other in zip(want, got, strict=True):
            near(value, other, where)
    elif isinstance(want, float) or isinstance(got, float):
        assert got == pytest.approx(want, rel=tolerance, abs=1e-5), where
    else:
        assert want == got, where


# -- The table ---------------------------------------------------------------------------------------------

ALL_CHANGES = [
    (kind, version, change)
    for kind, versions in CHANGES.items()
    for version, changes in versions.items()
    for change in changes
    if isinstance(change, Renamed)
]


def values_at(node, path):
    """Every value at a path of :class:`gaze_jax.stored.Renamed`."""
    if not path:
        return [node]
    name, *rest = path
    if name == "*":
        return [value for item in node for value in values_at(item, rest)]
    return values_at(node[name], rest) if name in node else []


def now(kind, path):
    """Where the value at an old path is now."""
    renamed = {change.old: change.new for where, _, change in ALL_CHANGES if where == kind}
    names = path.split(".")
    return [renamed.get(".".join(names[: i + 1]), name) for i, name in enumerate(names)]


@pytest.mark.parametrize(
    ("kind", "version", "change"),
    ALL_CHANGES,
    ids=[f"{kind} {change.old}" for kind, _, change in ALL_CHANGES],
)
def test_every_renamed_key_is_in_a_file_and_is_renamed(kind, version, change):
    """The old name is in the fixture; the value is under the new one, and nothing is under the old one."""
    content = CONTENT[kind]
    before = values_at(content, change.old.split("."))
    assert before, "the fixture has it"
    upgraded = upgrade(kind, content, version - 1)
    after = values_at(upgraded, now(kind, change.old))
    if change.old == "units":  # whose elements change too
        assert [len(views) for views in after] == [len(views) for views in before]
    else:
        assert after == [change.value(value) for value in before]
    if change.old.rpartition(".")[2] != change.new:
        assert not values_at(upgraded, change.old.split("."))


def test_the_values_that_the_files_hold():
    """What the table makes of each renamed value, by hand."""
    gaze = {"select_per": "kv_head", "visual_scope": "view", "newlines": "region"}
    for kind in ("manifest", "export"):
        assert upgrade(kind, CONTENT[kind], 1)["model"]["gaze"].items() >= gaze.items()
    meta = upgrade("run", CONTENT["run"], 1)
    assert meta["config"]["model"]["gaze"].items() >= (gaze | {"newlines": "text"}).items()
    assert meta["data"]["layout"]["newlines"] == "text" and meta["data"]["pipeline"]["bucket"]["text"] > 0
    trace = upgrade("trace", CONTENT["trace"], 1)
    assert trace["select_per"] == "kv_head" and [view["view"] for view in trace["views"]] == [0, 1]
    assert upgrade("trace", CONTENT["trace"] | {"share": "head"}, 1)["select_per"] == "head"


def test_what_is_upgraded_stays_as_it_was():
    for kind, content in CONTENT.items():
        before = copy.deepcopy(content)
        assert upgrade(kind, content, 1) != content
        assert content == before
        assert upgrade(kind, content, NEWEST[kind]) is content


@pytest.mark.parametrize("kind", ["manifest", "trace"])
def test_a_key_of_a_later_version_is_refused(kind):
    content = copy.deepcopy(CONTENT[kind])
    (content if kind == "trace" else content["model"]["gaze"])["select_per"] = "head"
    with pytest.raises(ValueError, match="'select_per' has no place in a file of that version"):
        upgrade(kind, content, 1)


def test_a_trace_of_before_version_3_has_no_prompt():
    for version in (1, 2):
        assert upgrade("trace", CONTENT["trace"] if version == 1 else {}, version)["prompt"] == []
        with pytest.raises(ValueError, match=f"'prompt' has no place in a file of version {version}"):
            upgrade("trace", {"prompt": []}, version)


def test_a_run_of_before_version_3_counts_no_processes():
    """The number of processes no longer decides the order of the data."""
    assert "process_count" in CONTENT["run"]["data"]
    assert "process_count" not in upgrade("run", CONTENT["run"], 1)["data"]
    assert upgrade("run", {"data": {"process_count": 4, "length": 9}}, 2)["data"] == {"length": 9}
    assert upgrade("run", {"data": {"process_count": 4}}, 3)["data"] == {"process_count": 4}


def test_a_run_of_before_version_4_left_no_step_out():
    assert upgrade("run", CONTENT["run"], 1)["skipped_in_a_row"] == 0
    assert upgrade("run", {"skipped_in_a_row": 2}, 4) == {"skipped_in_a_row": 2}
    with pytest.raises(ValueError, match="'skipped_in_a_row' has no place in a file of version 3"):
        upgrade("run", {"skipped_in_a_row": 2}, 3)


@pytest.mark.parametrize(("kind", "place"), [("manifest", ()), ("export", ()), ("run", ("config",))])
def test_the_default_of_earlier_files_is_the_default(kind, place):
    """ "xla" was what a file said whose writer chose nothing; other choices and later files stay."""

    def content(implementation):
        inner = {"model": {"gaze": {"decode_implementation": implementation}}}
        return {place[0]: inner} if place else inner

    before = NEWEST[kind] - 1
    assert upgrade(kind, content("xla"), before) == content("auto")
    assert upgrade(kind, content("tpu"), before) == content("tpu")
    assert upgrade(kind, content("xla"), NEWEST[kind]) == content("xla")


READ = {"manifest": "1, 2 and 3", "export": "1, 2 and 3", "run": "1, 2, 3, 4 and 5", "trace": "1, 2 and 3"}


@pytest.mark.parametrize("version", [None, 0, 6, True, 1.0, "1"])
def test_an_unknown_version_is_refused(version):
    names = {"manifest": "format_version", "export": "format_version", "run": "format", "trace": "version"}
    for kind, name in names.items():
        with pytest.raises(UserError) as error:
            check_version(kind, CONTENT[kind] | {name: version}, "It")
        assert f"It has format_version {version!r} but this gaze_jax reads {READ[kind]};" in str(error.value)
        assert check_version(kind, CONTENT[kind], "It") == 1


@pytest.mark.parametrize(
    "source", ["", "Scenes(seed=1)", "DigitScenes(seed=open())", "{}", "[" * 10_000, 3, None, "DigitScenes"]
)
def test_a_data_source_that_is_none_is_refused(source):
    with pytest.raises(ValueError, match="is not a data source of version 1"):
        upgrade("run", {"data": {"source": source}}, 1)


def test_a_setting_of_a_config_file_names_what_it_is_called_now():
    """Not accepted under the old name, and neither is an old value."""
    old = EXPECTED["run_unfinished"]["experiment"]
    with pytest.raises(
        UserError, match=r"model.gaze.share='group' was renamed; write model.gaze.select_per='kv_"
    ):
        parse(old)
    for name, value, better in (("visual_scope", "unit", "view"), ("newlines", "dense", "text")):
        gaze = {"region": (2, 2), "context_tokens": 1, "top_k": 1, name: value}
        with pytest.raises(UserError, match=f"model.gaze.{name}={value!r} was renamed.*{name}={better!r}"):
            parse(old | {"model": old["model"] | {"gaze": gaze}})
    assert renamed_setting("model.gaze.share", "head") == "model.gaze.select_per='head'"
    assert renamed_setting("model.gaze.visual_scope", "view") is None
    assert renamed_setting("model.gaze.newlines", ["dense"]) is None
    assert renamed_setting("model.share", "group") is None


# -- The files ---------------------------------------------------------------------------------------------


@functools.cache
def sampler(name):
    """A checkpoint of the fixtures, loaded once."""
    return gaze_jax.load(V1 / name)


@functools.cache
def pixels(name):
    return np.asarray(PIL.Image.open(V1 / name).convert("RGB"))


def _answer(one, want, **options):
    limit = want.get("max_tokens", 6)
    return one.generate(want["question"], images=[pixels(want["image"])], max_tokens=limit, **options)


@pytest.mark.parametrize("name", ["run", "converted", "export"])
def test_checkpoints_load_and_answer_as_before(name):
    """The settings, every token and every selected region."""
    want, one = EXPECTED[name], sampler(name)
    answer = _answer(one, want, return_trace=True)
    assert (list(answer.tokens), answer.text) == (want["tokens"], want["text"])
    assert (answer.finish_reason, answer.regions, answer.top_k) == ("length", want["regions"], want["top_k"])
    assert one.tokenizer.decode(want["ids"]) == want["text"]
    gaze = upgrade("manifest", {"model": {"gaze": want["gaze"]}}, 1)["model"]["gaze"]
    assert {field: getattr(one.config.gaze, field) for field in gaze} == gaze | {"region": (2, 2)}
    trace = want["trace"]
    assert answer.trace.select_per == gaze["select_per"]
    assert answer.trace.selected.tolist() == trace["selected"]
    mask = answer.trace.mask()
    assert list(mask.shape) == trace["mask_shape"]
    assert mask.sum(axis=(1, 2, 3)).tolist() == trace["mask_sum_per_token"]
    near(trace["entries"], answer.trace.entries.tolist())
    assert answer.trace.visual_tokens.tolist() == trace["visual_tokens"]


OTHERS = {
    "share=head": {"select_per": "head"},
    "visual_scope=all": {"visual_scope": "all"},
    "newlines=dense": {"newlines": "text"},
    "top_k=1": {"top_k": 1},
}


# One that runs shows that renamed values are used; test_the_values_that_the_files_hold has each.
@pytest.mark.parametrize(
    "setting", [s if s == "share=head" else pytest.param(s, marks=pytest.mark.long) for s in OTHERS]
)
def test_a_converted_checkpoint_answers_as_before_with_other_settings(setting):
    """Every setting that was renamed has its meaning; ``load(path, **gaze)`` sets the same fields."""
    want = EXPECTED["converted"]
    answer = _answer(sampler("converted").with_gaze(**OTHERS[setting]), want)
    assert answer.text == want["with_other_settings"][setting]["text"] != want["text"]


def test_dense_attention_of_a_converted_checkpoint_is_as_before():
    want = EXPECTED["converted"]
    answer = _answer(sampler("converted"), want, gaze=gaze_jax.GazeOptions(dense=True))
    assert answer.text == want["with_other_settings"]["Looking(dense=True)"]["text"]
    assert (answer.finish_reason, answer.stop_reason) == ("stop", "<|im_end|>")


def test_answers_to_questions_are_as_before():
    """Each question's options under their new names; a line's fields, too."""
    fields = {"dense_layers": "gaze_full_layers"} | {n: f"gaze_{n}" for n in ("top_k", "keep", "dense")}
    requests = []
    for number, line in enumerate((V1 / "questions.jsonl").read_text().splitlines(), start=1):
        question = {fields.get(name, name): value for name, value in json.loads(line).items()}
        question["images"] = [str(V1 / path) for path in question["images"]]
        requests.append(Request.parse(json.dumps({"id": str(number)} | question), "A question"))
    lines = [record(*pair) for pair in answer_all(sampler("converted"), requests)]
    reasons = {"plain": ("length", None), "steered": ("length", None), "dense": ("stop", "<|im_end|>")}
    wanted = []
    for line in EXPECTED["answers.jsonl"]:
        line = {"gaze_top_k" if name == "top_k" else name: value for name, value in line.items()}
        assert line.pop("finish") in ("length", "end", "stop")
        line["finish_reason"], line["stop_reason"] = reasons.get(line["id"], ("stop", "zu"))
        if isinstance(line["gaze_top_k"], float):
            line["gaze_keep"], line["gaze_top_k"] = line["gaze_top_k"], None
        wanted.append(line)
    assert lines == wanted


def test_a_trace_loads_and_is_written_as_version_3(tmp_path):
    want = EXPECTED["answer.gaze"]
    trace = trace_file.load(V1 / "answer.gaze")
    for field in ("question", "answer", "model", "top_k"):
        assert getattr(trace, field) == want[field]
    assert list(trace.tokens) == want["tokens"] and trace.select_per == "kv_head"
    assert trace.selected.tolist() == EXPECTED["converted"]["trace"]["selected"]
    for view, stored in zip(trace.views, want["units"], strict=True):
        found = dataclasses.asdict(view) | {"corners": list(view.corners), "regions": view.regions.tolist()}
        assert found == {"view" if name == "unit" else name: value for name, value in stored.items()}
    for field, shape in want["shapes"].items():
        assert list(getattr(trace, field).shape) == shape
        near(want["sums"][field], float(getattr(trace, field).astype(np.float64).sum()))
    trace_file.save(trace, tmp_path / "again.gaze")
    meta = stored_trace(tmp_path / "again.gaze")[1]
    assert (
        meta["version"] == 3 and meta["prompt"] == [] and meta["select_per"] == "kv_head" and "views" in meta
    )
    again = trace_file.load(tmp_path / "again.gaze")
    for field in dataclasses.fields(trace):
        one, other = getattr(trace, field.name), getattr(again, field.name)
        if field.name in ("views", "pictures"):  # their arrays have no truth value
            one, other = ([dataclasses.astuple(item) for item in items] for items in (one, other))
        np.testing.assert_equal(other, one)
    trace_file.save(again, tmp_path / "third.gaze")
    assert (tmp_path / "third.gaze").read_bytes() == (tmp_path / "again.gaze").read_bytes()


def test_a_converted_checkpoint_is_exported_to_the_same_bytes(tmp_path):
    """Every file of the model; gaze.json says the same in new names and comes back."""
    run.convert_back(V1 / "converted", tmp_path / "back")
    before = {path.name: path.read_bytes() for path in (V1 / "export").iterdir()}
    after = {path.name: path.read_bytes() for path in (tmp_path / "back").iterdir()}
    settings = json.loads(after.pop("gaze.json"))
    assert settings["model"].pop("remat_policy") == "nothing"  # a later field, with its default
    assert settings == upgrade("export", json.loads(before.pop("gaze.json")), 1) | {"format_version": 3}
    assert after == before
    run.save(run.plan_directory(tmp_path / "back"), tmp_path / "again")
    first, second = (manifest.read(path) for path in (V1 / "converted", tmp_path / "again"))
    assert json.loads((tmp_path / "again" / manifest.FILE).read_text())["format_version"] == 3
    assert (second.model, second.leaves, second.sources) == (first.model, first.leaves, first.sources)
    leaves = manifest.leaf_files(first)
    assert leaves and all(first.files[path] == second.files[path] for path in leaves)


def test_a_manifest_is_written_as_version_3(tmp_path):
    first = manifest.read(V1 / "converted")
    manifest.write(tmp_path, first)
    assert json.loads((tmp_path / manifest.FILE).read_text())["format_version"] == 3
    assert manifest.read(tmp_path) == first


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"share": "group"', '"share": "head"'),
        ('"visual_scope": "unit"', '"visual_scope": "view"'),
        ('"format_version": 1', '"format_version": 2'),
    ],
)
def test_a_manifest_of_version_1_with_a_wrong_seal_is_refused(tmp_path, old, new):
    """The seal is of what the file says, not of what is made of it."""
    text = (V1 / "converted" / manifest.FILE).read_text()
    edited = text.replace(old, new)
    assert edited != text
    (tmp_path / manifest.FILE).write_text(edited)
    with pytest.raises(UserError, match="is damaged or edited"):
        manifest.read(tmp_path)


def _with_json(path, **fields):
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_files_of_a_later_version_are_refused(tmp_path):
    """One sentence that names the file, of every kind."""
    message = "has format_version {} but this gaze_jax reads {}; use the version that wrote it.$"
    for name, path, field in (
        ("converted", manifest.FILE, "format_version"),
        ("export", "gaze.json", "format_version"),
        ("run", META, "format"),
    ):
        where = shutil.copytree(V1 / name, tmp_path / name)
        newest = NEWEST["run" if name == "run" else "manifest"]
        _with_json(where / path, **{field: newest + 1})
        known = READ["run" if name == "run" else "manifest"]
        with pytest.raises(UserError, match=message.format(newest + 1, known)):
            gaze_jax.load(where)
    arrays, meta = stored_trace(V1 / "answer.gaze")
    arrays["meta"] = np.frombuffer(json.dumps(meta | {"version": 4}).encode(), np.uint8)
    with (tmp_path / "answer.gaze").open("wb") as file:
        np.savez_compressed(file, **arrays)
    with pytest.raises(UserError, match=message.format(4, "1, 2 and 3")):
        trace_file.load(tmp_path / "answer.gaze")


def experiment():
    """The runs' config, under the new names."""
    old = {"config": EXPECTED["run_unfinished"]["experiment"]}
    return parse(upgrade("run", copy.deepcopy(old), 1)["config"])


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The finished and the unfinished run, each trained to its end."""
    where = tmp_path_factory.mktemp("runs")
    shutil.copytree(V1 / "run", where / "run")
    with tarfile.open(V1 / "run_unfinished.tar.xz") as archive:
        archive.extractall(where, filter="data")
    with reused_programs():
        assert train(experiment(), where / "run") and train(experiment(), where / "run_unfinished")
    return where


@pytest.mark.parametrize("name", ["run", "run_unfinished"])
def test_a_run_goes_on_and_ends_as_before(runs, name):
    """A finished run has nothing left to do; an unfinished one makes the step that the finished one made."""
    rows = [json.loads(line) for line in (runs / name / "metrics.jsonl").read_text().splitlines()]
    near(EXPECTED[name]["metrics.jsonl"], rows)
    if name == "run_unfinished":
        meta = json.loads((runs / name / META).read_text())
        assert meta["format_version"] == NEWEST["run"] and "format" not in meta
        assert meta["config"]["model"]["gaze"]["select_per"] == "kv_head"
        assert meta["data"] == upgrade("run", CONTENT["run"], 1)["data"]


@pytest.mark.parametrize("name", [pytest.param("run", marks=pytest.mark.long), "run_unfinished"])
def test_a_run_is_evaluated_as_before(runs, name):
    near(EXPECTED["run"]["eval.json"], evaluate(runs / name))


def test_other_data_is_refused_of_a_run_of_version_1():
    """What the fingerprint of version 1 says is compared, value by value."""
    saved = upgrade("run", CONTENT["run"], 1)["data"]
    same = open_data(experiment(), None, Path("/nowhere")).fingerprint
    compare_fingerprints(saved, same)
    source = DigitScenes(dataclasses.replace(experiment().data, jitter=0), 3, "train")
    with pytest.raises(UserError, match="data pipeline differs: source was"):
        compare_fingerprints(saved, same | {"source": source.fingerprint()})
