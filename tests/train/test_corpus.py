"""Batches of a corpus: the same whatever reads them, nothing lost, and what hangs or dies is named."""

import contextlib
import dataclasses
import json
import os
import shutil
import signal
import time

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest

from gaze_jax.chat.template import CHATML
from gaze_jax.core.budget import budget_from_keep
from gaze_jax.core.selection import Selection
from gaze_jax.core.streams import POOL_FIELDS, Streams
from gaze_jax.corpora.batches import LoadBatch
from gaze_jax.corpora.config import CorpusConfig, RowConfig, SourceConfig
from gaze_jax.corpora.prepare import prepare
from gaze_jax.corpora.reading import open_corpus
from gaze_jax.corpora.stand_in import byte_tokenizer
from gaze_jax.data import pipeline
from gaze_jax.data.pipeline import compare_fingerprints
from gaze_jax.data.tokenizer import Tokenizer
from gaze_jax.errors import UserError
from gaze_jax.models import MLLM
from gaze_jax.models.attention import make_metadata
from gaze_jax.models.config import GazeConfig
from gaze_jax.models.dummy import DUMMY
from gaze_jax.train.config import Experiment
from gaze_jax.train.corpus import CorpusBatches, open_training_corpus
from gaze_jax.train.start import Start
from gaze_jax.train.step import BATCH_FIELDS
from tests.helpers.corpora import captioned, turns, write_animation, write_lines, write_picture
from tests.helpers.model_configs import SMALL
from tests.helpers.models import parameters
from tests.helpers.views import tiny_onevision


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """40 records: 0 to 3 pictures each, some with a film of 4 frames, several turns."""
    out = tmp_path_factory.mktemp("corpus")
    records = []
    for number in range(40):
        images = [f"{number}_{i}.png" for i in range(number % 4)]
        for i, name in enumerate(images):
            write_picture(out / name, 10 + number, 12 + 5 * i, number)
        record = {"id": f"r{number}", "image": images}
        tags = "<image>" * len(images)
        if number % 10 == 5:
            write_animation(out / f"{number}.gif")
            record["video"], tags = f"{number}.gif", tags + "<video>"
        texts = [f"{tags} What is {number}?", "Noise. " * (1 + number % 3), "Why?", "So it is."]
        records.append(record | {"conversations": turns(*texts[: 2 + 2 * (number % 2)])})
    write_lines(out, records)
    return out


MODEL = dataclasses.replace(
    DUMMY,
    decoder=dataclasses.replace(DUMMY.decoder, vocab_size=300, depth=1),
    vision=SMALL,
    gaze=GazeConfig((2, 2), context_tokens=1, top_k=2),
    views=tiny_onevision(9).views,
)
START = Start("ckpt", MODEL, byte_tokenizer(), CHATML, lambda mesh: {}, lambda out: None)


def experiment(where, *, batch_size=4, seed=0, **data):
    config = CorpusConfig(**({"path": str(where)} | data))
    return Experiment(MODEL, config, init_from="ckpt", batch_size=batch_size, seed=seed, steps=9)


def opened(where, **fields):
    return open_training_corpus(experiment(where, **fields), START)


def taken(training, count, *, first=0, workers=0, log=None):
    with contextlib.closing(CorpusBatches(training, first=first, num_workers=workers, log=log)) as batches:
        return [next(batches) for _ in range(count)]


def equal(one, other):
    assert len(one) == len(other)
    for mine, theirs in zip(one, other, strict=True):
        assert mine.keys() == theirs.keys()
        for name, values in mine.items():
            np.testing.assert_array_equal(values, theirs[name], err_msg=name)
            assert values.dtype == theirs[name].dtype


def targets_of(batches):
    """The learnt tokens of every segment of every row, as a multiset."""
    found = []
    for batch in batches:
        for segments, targets in zip(batch["text_segment"], batch["targets"], strict=True):
            for segment in range(int(segments.max()) + 1):
                found.append(tuple(targets[(segments == segment) & (targets >= 0)].tolist()))
    return sorted(found)


def test_an_epoch_has_every_record_once_and_the_next_one_another_order(folder):
    training = opened(folder / "all.jsonl")
    epoch = training.order.epoch_batches
    batches = taken(training, 2 * epoch)
    conversations, corpus = training.conversations, training.corpus
    every = sorted(
        tuple(t[t >= 0].tolist())
        for t in (conversations.arrays(corpus[number], number)["targets"] for number in range(40))
    )
    assert targets_of(batches[:epoch]) == targets_of(batches[epoch:]) == every
    with pytest.raises(AssertionError):
        equal(batches[:epoch], batches[epoch:])
    assert all(batch["images"].dtype == np.uint8 for batch in batches)


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.long), 2])
def test_workers_and_the_first_batch_change_nothing(folder, workers, monkeypatch):
    """And workers hand over large arrays, here those of 1,000 bytes, in shared memory."""
    monkeypatch.setattr(pipeline, "SHARED_BYTES", 1000)
    mixed = {
        "path": "",
        "sources": (
            SourceConfig(str(folder / "all.jsonl"), weight=1.5),
            SourceConfig(str(folder / "all.jsonl"), weight=0.25),
        ),
    }
    training = opened("", **mixed)
    assert len(training.plan.samples) == 70
    expected = taken(training, 6)
    # From an odd batch on, so that the first one is the second worker's.
    before = set(os.listdir("/dev/shm"))
    with contextlib.closing(CorpusBatches(training, first=1, stop=6, num_workers=workers)) as batches:
        found = [next(batches) for _ in range(5)]
        with pytest.raises(StopIteration):
            next(batches)
    equal(found, expected[1:])
    for values in found[0].values():
        assert hasattr(values, "shm") == (workers > 0 and values.nbytes >= 1000)
    # What workers had made ahead would stay there until this process ends.
    shared = [values for batch in found for values in batch.values() if hasattr(values, "shm")]
    made = {name for name in set(os.listdir("/dev/shm")) - before if name.startswith("psm_")}
    assert made == {values.shm.name.lstrip("/") for values in shared}


@pytest.mark.parametrize("count", [2, 4])
def test_the_parts_of_all_processes_are_the_batch_of_one(folder, count):
    training = opened(folder / "all.jsonl", buckets=2, pack=False)

    def load(number, part):
        found = LoadBatch(
            training.corpus,
            training.conversations,
            training.order,
            training.measurement.lengths,
            part,
            str(folder),
            10**9,
        )
        return found.map(number).arrays

    for number in (0, 3, training.order.epoch_batches - 1, training.order.epoch_batches + 1):
        parts = [load(number, (index, count)) for index in range(count)]
        joined = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        equal([joined], [load(number, (0, 1))])


def test_what_a_run_would_go_on_with_is_told_from_what_it_began_with(folder, tmp_path):
    """By the names of what differs: other words of as many letters, another tokenizer, template or seed."""
    before = opened(folder).fingerprint()
    edited = shutil.copytree(folder, tmp_path / folder.name)
    lines = edited / "all.jsonl"
    lines.write_text(lines.read_text().replace("So it is.", "So it us."))
    other = Tokenizer(json.dumps(json.loads(START.tokenizer.json), indent=1))
    template = dataclasses.replace(CHATML, source=CHATML.source + " ")
    changes = {
        "corpus": opened(edited),
        "tokenizer": open_training_corpus(experiment(folder), dataclasses.replace(START, tokenizer=other)),
        "template": open_training_corpus(experiment(folder), dataclasses.replace(START, template=template)),
        "seed": opened(folder, seed=1),
    }
    compare_fingerprints(before, opened(folder).fingerprint())
    for name, training in changes.items():
        with pytest.raises(UserError, match=rf"data pipeline differs: (.*; )?{name} was "):
            compare_fingerprints(before, training.fingerprint())


def test_every_container_gives_the_same_batches(folder, tmp_path):
    """The same arrays, so the same losses."""
    path = folder / "all.jsonl"
    prepare(open_corpus(path), str(tmp_path / "prepared"), shards=3)
    listed = [json.loads(line) for line in path.read_text().splitlines()]
    (folder / "list.json").write_text(json.dumps(listed))
    expected = taken(opened(path), 4)
    equal(taken(opened(folder / "list.json"), 4), expected)
    equal(taken(opened(tmp_path / "prepared"), 4), expected)


def test_a_row_with_too_little_room_is_refused(folder):
    with pytest.raises(UserError, match="regions"):
        opened(folder / "all.jsonl", row=RowConfig(regions=3))


class TestLengths:
    def test_a_longer_sample_is_refused_left_out_or_cut(self, folder):
        path = folder / "all.jsonl"
        longest = int(opened(path).measurement.tokens.max())
        with pytest.raises(
            UserError, match=rf"more than data.max_tokens={longest - 1} tokens, the longest {longest}"
        ):
            opened(path, max_tokens=longest - 1)
        left = opened(path, max_tokens=longest - 1, too_long="skip")
        assert 0 < 40 - len(left.plan.samples) < 10
        assert {error.cause for error in left.measurement.failures.values()} == {"length"}

    def test_truncation_leaves_out_turns(self, tmp_path):
        write_picture(tmp_path / "a.png")
        record = captioned("a.png", "x")
        record["conversations"] += turns("And then, what else is there?", "Nothing.")
        path = write_lines(tmp_path, [record] * 5)
        whole = int(opened(path).measurement.tokens[0])
        cut = opened(path, max_tokens=whole - 1, too_long="truncate")
        assert (cut.measurement.tokens < whole).all() and (cut.measurement.numbers[:, -1] == 2).all()
        (batch,) = taken(cut, 1)
        assert b"Nothing" not in bytes(batch["tokens"].astype(np.uint8).tobytes())


def spoiled(folder, tmp_path, numbers):
    """A copy of the corpus, opened, whose pictures of some records are cut short afterwards."""
    out = shutil.copytree(folder, tmp_path / "copy")
    training = opened(out / "all.jsonl", batch_size=2, bad="skip", max_bad=0.2)
    for number in numbers:
        data = (out / f"{number}_0.png").read_bytes()
        (out / f"{number}_0.png").write_bytes(data[: len(data) // 2])
    return training


def test_a_bad_record_leaves_its_place_empty(folder, tmp_path):
    good = opened(folder / "all.jsonl", batch_size=2, bad="skip", max_bad=0.2)
    training = spoiled(folder, tmp_path, (6, 11))
    log = tmp_path / "skipped.jsonl"
    epoch = training.order.epoch_batches
    kept = taken(training, epoch, log=log)
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert sorted(line["record"] for line in lines) == [6, 11]
    assert {line["cause"] for line in lines} == {"medium"} and "6_0.png" in str(lines)
    every, some = targets_of(taken(good, epoch)), targets_of(kept)
    assert len(some) == len(every) - 2
    # A row without a bad record is what it was.
    same = 0
    for mine, theirs in zip(kept, taken(good, epoch), strict=True):
        same += sum(np.array_equal(a, b) for a, b in zip(mine["tokens"], theirs["tokens"], strict=True))
    assert same == 2 * epoch - len(
        {row for row in range(len(training.plan)) if {6, 11} & {*training.plan.row(row)}}
    )
    # Read again, in this run or the next, it is not listed again.
    taken(training, epoch, log=log)
    assert len(log.read_text().splitlines()) == 2
    log.unlink()
    taken(training, 2 * epoch, log=log)
    assert len(log.read_text().splitlines()) == 2


def test_a_bad_record_ends_the_run_by_name(folder, tmp_path):
    training = spoiled(folder, tmp_path, (6,))
    strict = dataclasses.replace(training, config=dataclasses.replace(training.config, bad="error"))
    with pytest.raises(UserError, match=r"all\.jsonl line 7: Image .*6_0\.png.* cannot be decoded"):
        taken(strict, training.order.epoch_batches)
    few = dataclasses.replace(training, config=dataclasses.replace(training.config, max_bad=0.0))
    with pytest.raises(UserError, match=r"1 of \d+ records cannot be used, more than data.max_bad=0"):
        taken(few, training.order.epoch_batches, log=tmp_path / "log")


def test_a_row_of_bad_records_is_empty(tmp_path):
    """Padding throughout: no token, no target."""
    write_picture(tmp_path / "a.png")
    training = opened(write_lines(tmp_path, [captioned("a.png", "x")]), bad="skip", max_bad=1.0)
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    empty(taken(training, 1))
    write_picture(tmp_path / "a.png")
    training.measurement.lengths[0, 0] += 1  # its pixels are good, but it has fewer tokens than planned
    empty(taken(training, 1))


def empty(batches):
    for batch in batches:
        assert (batch["text_segment"] == -1).all() and (batch["region_segment"] == -1).all()
        assert (batch["targets"] == -100).all() and not batch["images"].any()


def test_bad_records_at_the_start_are_counted(folder, tmp_path):
    records = [json.loads(line) for line in (folder / "all.jsonl").read_text().splitlines()]
    for record in records:
        record["image"] = [os.path.join(os.path.basename(str(folder)), name) for name in record["image"]]
        record.pop("video", None)
        record["conversations"][0]["value"] = "What?"
    records[3]["image"] = "gone.png"
    records[4]["conversations"] = []
    path = write_lines(tmp_path, records)
    media = {"media": (str(folder.parent),)}
    with pytest.raises(UserError, match=r"2 of 40 records cannot be trained on; .*The first: .*'gone.png'"):
        opened(path, **media)
    with pytest.raises(UserError, match=r"2 of 40 records cannot be used, more than data.max_bad=0.01"):
        opened(path, bad="skip", **media)
    left = opened(path, bad="skip", max_bad=0.05, **media)
    assert sorted({*range(40)} - {*left.plan.samples.tolist()}) == [3, 4]
    assert [error.cause for error in left.measurement.failures.values()] == ["missing", "record"]


def test_media_that_changed_since_they_were_measured_are_named(tmp_path):
    for number in range(4):
        write_picture(tmp_path / f"{number}.png", 40, 20, number)
    records = [captioned(f"{number}.png", f"n{number}") for number in range(4)]
    training = opened(write_lines(tmp_path, records))
    write_picture(tmp_path / "2.png", 20, 400)
    with pytest.raises(UserError, match=r"line 3 .*was measured with .* run gaze-jax data check"):
        taken(training, 1)


@dataclasses.dataclass(frozen=True)
class Fatal:
    """A corpus with a record that a worker never gets past."""

    corpus: object
    index: int
    dies: bool
    parent: int

    def __len__(self):
        return len(self.corpus)

    def __getitem__(self, index):
        if index == self.index and os.getpid() != self.parent:
            if self.dies:
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(600)
        return self.corpus[index]

    def fingerprint(self):
        return self.corpus.fingerprint()


@pytest.mark.parametrize(
    "dies", [pytest.param(False, marks=pytest.mark.long), True], ids=["hangs", "dies"]
)  # one that hangs earlier, by default, and one that hangs in data check
def test_a_worker_that_hangs_or_dies_ends_the_run_by_name(folder, dies):
    training = opened(folder / "all.jsonl", timeout=15.0)
    fatal = Fatal(training.corpus, int(training.plan.row(0)[0]), dies, os.getpid())
    training = dataclasses.replace(training, corpus=fatal)
    what = "A worker process died" if dies else "No batch for 15 seconds"
    name = f"line {fatal.index + 1}"
    with pytest.raises(UserError, match=rf"{what}.*while workers read .*{name}\b.*run the same command"):
        taken(training, training.order.epoch_batches, workers=1)


def test_a_worker_that_hangs_before_it_says_what_it_reads_is_ended_too(folder):
    """The limit is over before the worker has started; what closes it would wait for its record."""
    training = opened(folder / "all.jsonl", timeout=0.05)
    fatal = Fatal(training.corpus, int(training.plan.row(0)[0]), False, os.getpid())
    training = dataclasses.replace(training, corpus=fatal)
    with pytest.raises(UserError, match=r"No batch for 0.05 seconds \(data.timeout\)"):
        taken(training, training.order.epoch_batches, workers=1)


@pytest.mark.long
def test_a_worker_that_needs_too_much_memory_names_the_record(tmp_path):
    """192 MB of pixels, in a process that may allocate 100 MB."""
    write_picture(tmp_path / "a.png")
    PIL.Image.new("RGB", (8000, 8000)).save(tmp_path / "b.png")
    path = write_lines(tmp_path, [captioned("a.png", "x"), captioned("b.png", "y")])
    training = opened(path, worker_memory=0.1, batch_size=1)
    with pytest.raises(UserError, match=r"record 1 needs more than data.worker_memory=0.1 GB"):
        taken(training, training.order.epoch_batches, workers=1)


def losses_of(batches):
    """Loss of every sample, by its targets: the mean over its tokens with half of the regions selected."""
    params = parameters(MODEL)

    @jax.jit
    def nll(batch):
        streams = Streams.from_batch(batch)
        visible = make_metadata(streams, MODEL.gaze, batch["sample_id"]).routed.count
        selection = Selection(budget_from_keep(jnp.float32(0.5), visible))
        logits, _ = MLLM(MODEL).apply(params, batch["images"], streams, selection)
        at = jnp.maximum(streams.targets, 0)[..., None]
        return -jnp.take_along_axis(jax.nn.log_softmax(logits), at, axis=-1)[..., 0]

    found = []
    for batch in batches:
        values = np.asarray(nll({name: batch[name] for name in (*BATCH_FIELDS, *POOL_FIELDS)}))
        for row, segments, targets in zip(values, batch["text_segment"], batch["targets"], strict=True):
            for segment in range(int(segments.max()) + 1):
                learnt = (segments == segment) & (targets >= 0)
                found.append((tuple(targets[learnt].tolist()), float(row[learnt].mean())))
    return sorted(found)


def test_packing_changes_no_loss(folder):
    """Each sample has the loss that it has alone in its row."""
    packed, alone = opened(folder / "all.jsonl"), opened(folder / "all.jsonl", pack=False)
    assert len(packed.plan) < len(alone.plan) / 2
    together = losses_of(taken(packed, packed.order.epoch_batches))
    unpacked = losses_of(taken(alone, alone.order.epoch_batches))
    assert [targets for targets, _ in together] == [targets for targets, _ in unpacked] and len(
        unpacked
    ) == 40
    # Questions differ by their number alone, so samples with equal targets are compared as a set.
    np.testing.assert_allclose([loss for _, loss in together], [loss for _, loss in unpacked], rtol=2e-5)
