import dataclasses
import json
import re

import numpy as np
import pytest

from gaze_jax.core.layout import VisualLayout
from gaze_jax.corpora.digits import DigitScenes, DigitsConfig
from gaze_jax.corpora.phrases import FAMILIES, build_tokenizer
from gaze_jax.data.padding import pad_to
from gaze_jax.data.pipeline import (
    Bucket,
    PipelineConfig,
    compare_fingerprints,
    fingerprint,
    training_iterator,
)
from gaze_jax.data.processor import Processor
from gaze_jax.data.tokenizer import Tokenizer
from gaze_jax.errors import UserError
from gaze_jax.families.square import SQUARE

# 18 scenes in batches of 4: batches straddle the end of an epoch.
SCENES = DigitsConfig(rows=2, cols=2, augment=False, train_scenes=18, reads_per_sample=2)
SOURCE = DigitScenes(SCENES, 0, "train")
PROCESSOR = Processor(VisualLayout(20, 5, (2, 2), 1), build_tokenizer(), FAMILIES, SQUARE.views)
CONFIG = PipelineConfig(batch_size=4, seed=0, bucket=Bucket(regions=4, text=40, images=1))


@pytest.fixture
def start():
    """``training_iterator`` whose workers and threads end with the test."""
    iterators = []

    def make(source=SOURCE, config=CONFIG, **options):
        iterators.append(training_iterator(source, PROCESSOR, config, **options))
        return iterators[-1]

    yield make
    for iterator in iterators:
        iterator.close()


def take(iterator, count):
    return [next(iterator) for _ in range(count)]


def equal(one, other):
    assert len(one) == len(other)
    for a, b in zip(one, other, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def numbers(batches):
    return np.concatenate([batch["sample_id"] for batch in batches]).tolist()


def test_a_row_is_its_processed_and_padded_sample(start):
    (batch,) = take(start(), 1)
    for b, number in enumerate(batch["sample_id"]):
        expected = pad_to(PROCESSOR(SOURCE[number]), regions=4, text=40, images=1)
        assert batch.keys() == expected.keys()
        for name, values in expected.items():
            np.testing.assert_array_equal(batch[name][b], values, err_msg=name)
            assert batch[name].dtype == values.dtype, name


def test_every_epoch_has_every_sample_once_in_another_order(start):
    seen = numbers(take(start(), 27))
    epochs = [seen[at : at + 18] for at in range(0, len(seen), 18)]
    assert len(epochs) == 6
    assert all(sorted(epoch) == list(range(18)) for epoch in epochs)
    assert len(set(map(tuple, [*epochs, range(18)]))) == 7


def test_the_order_follows_the_seed(start):
    one, same, other = (
        numbers(take(start(config=dataclasses.replace(CONFIG, seed=seed)), 4)) for seed in (3, 3, 4)
    )
    assert one == same
    assert one != other


@pytest.mark.parametrize("first", [0, 1, 5, 13])
def test_a_batch_is_its_number_whatever_was_read_before(start, first):
    equal(take(start(first=first), 6), take(start(), first + 6)[first:])


@pytest.mark.long  # tests/train/test_corpus.py has the same workers
def test_workers_change_nothing(start):
    """Two workers start at an odd batch, so that the first one is the second worker's."""
    equal(take(start(num_workers=2, first=5), 6), take(start(), 11)[5:])


@pytest.mark.parametrize("count", [2, 4])
def test_the_shares_of_all_processes_make_the_batches_of_one(start, count):
    """In the order of the processes, so that the global batch is the same array."""
    shares = [take(start(rows=(index, count)), 11) for index in range(count)]
    joined = [
        {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        for parts in zip(*shares, strict=True)
    ]
    equal(joined, take(start(), 11))


def test_a_share_resumes_on_another_number_of_processes(start):
    """Two processes, then four, then one: the batches of one."""
    parts = [take(start(rows=(index, 2)), 2) for index in range(2)]
    parts += [take(start(rows=(index, 4), first=2), 2) for index in range(4)]
    numbers_of = [*zip(*parts[:2]), *zip(*parts[2:])]
    seen = [[int(n) for part in batch for n in part["sample_id"]] for batch in numbers_of]
    seen += [[int(n) for n in batch["sample_id"]] for batch in take(start(first=4), 2)]
    assert seen == [[int(n) for n in batch["sample_id"]] for batch in take(start(), 6)]


@pytest.mark.parametrize("count", [3, 8])
def test_a_batch_that_the_processes_cannot_share_is_refused(count):
    with pytest.raises(ValueError, match=f"batch_size=4 must be a multiple of the {count} processes"):
        training_iterator(SOURCE, PROCESSOR, CONFIG, rows=(0, count))


def test_a_source_smaller_than_a_batch_is_refused(start):
    def scenes(count):
        return DigitScenes(dataclasses.replace(SCENES, train_scenes=count), 0, "train")

    with pytest.raises(ValueError, match="has 3 samples, fewer than batch_size=4"):
        training_iterator(scenes(3), PROCESSOR, CONFIG)
    assert sorted(numbers(take(start(scenes(4)), 1))) == [0, 1, 2, 3]


@pytest.mark.parametrize(("axis", "size"), [("regions", 3), ("text", 5), ("images", 0)])
def test_a_sample_that_does_not_fit_its_bucket_stops_the_run(start, axis, size):
    bucket = dataclasses.replace(CONFIG.bucket, **{axis: size})
    with pytest.raises(ValueError, match=f"raise {axis} to fit"):
        next(start(config=dataclasses.replace(CONFIG, bucket=bucket)))


def in_(thing, **change):
    return dataclasses.replace(thing, **change)


OTHER_TOKENIZER = Tokenizer(json.dumps(json.loads(build_tokenizer().json), indent=1))
# What is changed -> (arguments of fingerprint, the names that a message has to have).
CHANGES = {
    "data seed": ({"source": in_(SOURCE, seed=1)}, {"source"}),
    "split": ({"source": in_(SOURCE, split="test")}, {"source"}),
    "scenes": ({"source": in_(SOURCE, config=in_(SCENES, jitter=0))}, {"source"}),
    "length": ({"source": in_(SOURCE, config=in_(SCENES, train_scenes=19))}, {"source", "length"}),
    "image size": ({"processor": in_(PROCESSOR, layout=VisualLayout(21, 5, (2, 2), 1))}, {"layout"}),
    "patch size": ({"processor": in_(PROCESSOR, layout=VisualLayout(20, 4, (2, 2), 1))}, {"layout"}),
    "region": ({"processor": in_(PROCESSOR, layout=VisualLayout(20, 5, (1, 4), 1))}, {"layout"}),
    "context": ({"processor": in_(PROCESSOR, layout=VisualLayout(20, 5, (2, 2), 2))}, {"layout"}),
    "families": ({"processor": in_(PROCESSOR, families=FAMILIES[::-1])}, {"families"}),
    "resize": ({"processor": in_(PROCESSOR, resize=True)}, {"resize"}),
    "tokenizer": ({"processor": in_(PROCESSOR, tokenizer=OTHER_TOKENIZER)}, {"tokenizer"}),
    "batch size": ({"config": in_(CONFIG, batch_size=8)}, {"pipeline"}),
    "shuffle seed": ({"config": in_(CONFIG, seed=1)}, {"pipeline"}),
    "regions": ({"config": in_(CONFIG, bucket=in_(CONFIG.bucket, regions=5))}, {"pipeline"}),
    "text": ({"config": in_(CONFIG, bucket=in_(CONFIG.bucket, text=41))}, {"pipeline"}),
    "images": ({"config": in_(CONFIG, bucket=in_(CONFIG.bucket, images=2))}, {"pipeline"}),
}


def print_of(**change):
    return fingerprint(**{"source": SOURCE, "processor": PROCESSOR, "config": CONFIG, **change})


@pytest.mark.parametrize(("change", "names"), CHANGES.values(), ids=CHANGES)
def test_a_fingerprint_differs_in_what_changed_and_the_message_names_it(change, names):
    saved, now = json.loads(json.dumps(print_of())), print_of(**change)
    with pytest.raises(UserError) as error:
        compare_fingerprints(saved, now)
    message = str(error.value)
    assert {name for name in saved if re.search(rf"[:;] {name} was ", message)} == names
    assert all(f"{name} was {saved[name]!r} and is {now[name]!r}" in message for name in names)
    assert "\n" not in message and message.endswith(".")


def test_the_changes_above_touch_every_entry_of_a_fingerprint():
    assert set.union(*(names for _, names in CHANGES.values())) == print_of().keys()


def test_an_equal_pipeline_is_accepted_from_json():
    saved = json.loads(json.dumps(print_of()))
    now = print_of(source=DigitScenes(dataclasses.replace(SCENES), 0, "train"))
    compare_fingerprints(saved, now)
    assert saved == json.loads(json.dumps(now))


@pytest.mark.parametrize("name", sorted(print_of()))
def test_an_entry_that_one_side_lacks_is_a_difference(name):
    # `resize` is False and not None, which an absent entry would read as.
    whole = print_of()
    part = {key: value for key, value in whole.items() if key != name}
    for saved, now in ((whole, part), (part, whole)):
        with pytest.raises(UserError, match=f"{name} was .* and is "):
            compare_fingerprints(saved, now)
