"""Fine-tuning on real pictures and films, at the size of a small language model.

It took 15 minutes 31 seconds on two cores of an Intel Xeon at 2.5 GHz, with a compilation beside it
(2026-11-28), and 7 GiB of memory. Rows are given, since those that the plan chooses for this corpus, of
11,000 tokens, need much more.
"""

import contextlib
import json
import resource

import numpy as np
import pytest

from gaze_jax.convert import origin
from gaze_jax.corpora import tars
from gaze_jax.corpora.config import CorpusConfig
from gaze_jax.train.config import Experiment
from gaze_jax.train.corpus import CorpusBatches, open_training_corpus
from tests.helpers import finetune
from tests.helpers.finetune import process

pytestmark = [pytest.mark.long, pytest.mark.xdist_group("commands")]

SETTINGS = {"max_frames": 3}
COMMON = ("--config.model.gaze.region=(4,4)", "--config.data.max_frames=3")
ROW = {"text": 256, "regions": 34, "images": 3}
STEPS = 20


@pytest.fixture(scope="module")
def where(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("real")
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        patch.setenv("JAX_COMPILATION_CACHE_DIR", str(folder / "programs"))
        tars._index.cache_clear()
        yield folder


@pytest.fixture(scope="module")
def media():
    found = finetune.stamps()
    if not found:
        pytest.skip("needs Debian's tuxpaint-stamps-default")
    return found + finetune.films()


@pytest.fixture(scope="module")
def containers(where, media):
    """Name -> path and media of the same corpus in every container, and of what is prepared of each."""
    made = finetune.Containers(where, media)
    found = {}
    for name in ("lines", "media_tar", "webdataset", "parquet"):
        path, beside = found[name] = getattr(made, name)()
        prepared = where / f"{name}_prepared"
        given = [f"--media={one}" for one in beside]
        out, _ = process("-m", "gaze_jax", "data", "prepare", path, *given, f"--out={prepared}", "--shards=2")
        assert out == f"{len(media)} records in 2 shards: {prepared}\n"
        found[prepared.name] = str(prepared), ()
    return found


@pytest.fixture(scope="module")
def checkpoint(where):
    """A model with new parameters, converted."""
    source = finetune.write_llava(where / "source")
    process("convert.py", f"--from={source}", f"--to={where / 'gaze'}")
    return where / "gaze"


def flags(checkpoint, containers):
    path, _ = containers["lines_prepared"]
    return (f"--config.init_from={checkpoint}", f"--config.data.path={path}", *COMMON)


@pytest.fixture(scope="module")
def run(where, checkpoint, containers):
    """The folder of a run, and its losses."""
    workdir = where / "run"
    train = ("--config.batch_size=2", f"--config.steps={STEPS}", "--config.log_every=1")
    train += ("--config.optimizer.learning_rate=1e-3", "--config.checkpoint_every=10")
    train += ("--config.num_workers=1", "--config.model.remat=False", f"--workdir={workdir}")
    train += tuple(f"--config.data.row.{name}={size}" for name, size in ROW.items())
    out, _ = process("train.py", "--config=finetune", *flags(checkpoint, containers), *train)
    assert f"step {STEPS}/{STEPS}" in out
    print(out)
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return workdir, [row["loss"] for row in rows]


@pytest.fixture(scope="module")
def exported(where, run):
    out, _ = process("convert.py", f"--from={run[0]}", f"--to={where / 'export'}", "--format=hf", "--verify")
    print(out)
    assert "logits" in out and "written for transformers" in out
    return where / "export"


def test_every_container_gives_the_same_first_batches(containers, checkpoint, media):
    """The records as they are, and prepared."""
    start = origin.open_start(str(checkpoint))
    expected = None
    for name, (path, beside) in containers.items():
        config = CorpusConfig(path=path, media=beside, **SETTINGS)
        experiment = Experiment(start.config, config, init_from="x", batch_size=2, steps=9)
        training = open_training_corpus(experiment, start)
        assert len(training.corpus) == len(media)
        with contextlib.closing(CorpusBatches(training, first=0, num_workers=0)) as batches:
            found = [next(batches) for _ in range(4)]
        expected = expected or found
        for mine, other in zip(found, expected, strict=True):
            assert mine.keys() == other.keys()
            for field, values in mine.items():
                np.testing.assert_array_equal(values, other[field], err_msg=f"{field} of {name}")
    assert any(batch["images"].any() for batch in expected)


def test_the_corpus_is_checked_and_shown(where, checkpoint, containers, media):
    gaze = ("-m", "gaze_jax", "data")
    out, _ = process(*gaze, "check", "finetune", *flags(checkpoint, containers), "--workers=2")
    assert out.startswith(f"{len(media)} of {len(media)} records can be trained on.\n")
    page = where / "shown.html"
    shown = ("show", "finetune", *flags(checkpoint, containers), "--index=17", f"--out={page}")
    out, _ = process(*gaze, *shown)
    assert media[17][1] in out and page.stat().st_size > 1000


def test_films_are_trained_on(checkpoint, containers, media):
    if media[-1][0].suffix == ".png":
        pytest.skip("needs Debian's forensics-samples-files")
    shown = ("show", "finetune", *flags(checkpoint, containers), f"--index={len(media) - 1}")
    out, _ = process("-m", "gaze_jax", "data", *shown)
    assert "video 1" in out and media[-1][1] in out


def test_the_loss_falls(run):
    _, losses = run
    assert len(losses) == STEPS
    assert np.mean(losses[-3:]) < 0.7 * np.mean(losses[:3]), losses


def test_transformers_takes_the_export(exported, checkpoint):
    """Its logits are compared by ``convert --verify``."""
    transformers = finetune.hf.transformers
    kind = transformers.LlavaOnevisionForConditionalGeneration
    _, info = kind.from_pretrained(exported, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(exported)
    asked = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is this?"}]}]
    assert "What is this?" in tokenizer.apply_chat_template(asked, tokenize=False)
    source = checkpoint.parent / "source"
    for name in ("config.json", "preprocessor_config.json", "tokenizer.json", "chat_template.jinja"):
        assert (exported / name).read_bytes() == (source / name).read_bytes(), name


def test_the_run_and_its_export_answer_alike(run, exported, media):
    # Drawn, since after so few steps the likeliest tokens are white space.
    ask = (f"--image={media[17][0]}", "--question=What is this?", "--max_tokens=12", "--temperature=1")
    of_run, of_export = (
        process("generate.py", f"--checkpoint={path}", *ask)[0] for path in (run[0], exported)
    )
    assert of_run.strip() and of_run == of_export
    print(f"{resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20:.1f} GiB")
