"""Corpora prepared by Ray Data: the bytes of the local engine, its errors, and its way of going on.

Ray takes tens of seconds to start on a small machine, so what needs it is ``long``.
"""

import functools
import importlib.util
import json
import os
import signal
import subprocess
import sys

import pytest

from gaze_jax.corpora import on_ray, prepare
from gaze_jax.corpora.reading import open_corpus
from gaze_jax.errors import UserError
from tests.corpora.test_prepare import bad_corpus, files
from tests.corpora.test_readers import COUNT, as_lines


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def corpus(tmp_path):
    return open_corpus(as_lines(tmp_path / "corpus")[0])


def test_without_the_package_its_extra_is_named(corpus, tmp_path, monkeypatch):
    """What is written so far can be gone on with, without Ray."""
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match=r"--engine=ray needs Ray Data: pip install 'gaze-jax\[ray\]'\."):
        prepare.prepare(corpus, str(tmp_path / "out"), shards=2, engine="ray")
    assert prepare.prepare(corpus, str(tmp_path / "out"), shards=2).records == COUNT


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"engine": "spark"}, "engine='spark' must be one of local, ray"),
        ({"ray_address": "auto"}, "ray_address='auto' is of a Ray cluster; give engine=ray with it"),
    ],
)
def test_options_are_checked_first(corpus, tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        prepare.prepare(corpus, str(tmp_path / "out"), shards=2, **options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("nonsense", "is no address of a Ray cluster; give HOST:PORT of its head, or 'auto'"),
        ("ray://localhost:10001", "is no address of a Ray cluster"),
        ("127.0.0.1:9", r"No Ray cluster answers at '127.0.0.1:9' \(.*refused\)"),
        ("127.0.0.1:99999", "No Ray cluster answers at"),
    ],
)
def test_an_address_at_which_nothing_answers_is_refused_at_once(address, message):
    with pytest.raises(UserError, match=message):
        on_ray._check_address(address)


def attempt(write, folder, number=1):
    return on_ray._attempt(write, str(folder), os.getcwd(), {"item": number})


def test_a_shard_whose_process_dies_again_and_again_is_given_up(tmp_path):
    """Ray itself would begin it again for ever."""
    begun = []

    def die(number):
        begun.append(number)
        raise SystemExit  # no error that is reported

    for _ in range(3):
        with pytest.raises(SystemExit):
            attempt(die, tmp_path)
    assert attempt(die, tmp_path) == {"number": 1, "error": on_ray.DIED} and begun == [1, 1, 1]
    assert attempt(lambda number: None, tmp_path, 2) == {"number": 2, "error": ""}
    on_ray.forget(tmp_path)
    assert attempt(lambda number: None, tmp_path) == {"number": 1, "error": ""}


def test_a_folder_that_a_machine_does_not_reach_is_said(tmp_path):
    found = attempt(lambda number: None, tmp_path / "absent" / ".shards")
    assert f"{tmp_path / 'absent'} is not there on " in found["error"]
    assert "write to a folder that every machine of the cluster reaches" in found["error"]


def test_what_a_process_that_died_has_left_is_removed(corpus, tmp_path):
    """Also by the run that goes on."""
    prepare.prepare(corpus, str(tmp_path / "whole"), shards=2)

    def stop(records):
        (tmp_path / "out" / "corpus-00001-of-00002.0123.part").write_bytes(b"half")
        (tmp_path / "out" / ".shards" / "1.tries").write_bytes(b"...")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare.prepare(corpus, str(tmp_path / "out"), shards=2, advance=stop)
    prepare.prepare(corpus, str(tmp_path / "out"), shards=2)
    assert files(tmp_path / "out") == files(tmp_path / "whole")


def command(corpus, out, *flags):
    line = [sys.executable, "-m", "gaze_jax", "data", "prepare", str(corpus.path), f"--out={out}", *flags]
    return subprocess.run(line, capture_output=True, text=True)


def test_the_command_refuses_an_address_without_the_engine(corpus, tmp_path):
    found = command(corpus, tmp_path / "x", "--ray_address=auto")
    assert found.returncode == 2 and len(found.stderr.splitlines()) == 1
    assert found.stderr.endswith("--ray_address needs --engine=ray; give both, or neither.\n")


def die_of(number, folder):
    if number == 1:
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.fixture(scope="module")
def started():
    """A Ray that the program has started itself."""
    import ray

    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.mark.long
@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs the ray extra")
@pytest.mark.usefixtures("started")
# Ray's own: it warns of its options when it sets their defaults.
@pytest.mark.filterwarnings(r"ignore:.*deprecated:DeprecationWarning:ray\.data\.context")
class TestOnRay:
    """One Ray for all."""

    def test_it_writes_the_bytes_of_the_local_engine(self, corpus, tmp_path):
        advanced = []
        for name, options in (("1", {}), ("2", {"workers": 2}), ("ray", {"engine": "ray", "workers": 2})):
            prepare.prepare(corpus, str(tmp_path / name), shards=5, **options, advance=advanced.append)
        assert files(tmp_path / "1") == files(tmp_path / "2") == files(tmp_path / "ray")
        assert sum(advanced) == 3 * COUNT and advanced[-6] == 0 and min(advanced[-5:]) == 1

    def test_it_goes_on_where_a_local_run_stopped(self, corpus, tmp_path):
        """And a local run where it stopped."""
        prepare.prepare(corpus, str(tmp_path / "whole"), shards=4)
        for number, (first, second) in enumerate((("local", "ray"), ("ray", "local"))):
            out, advanced = tmp_path / str(number), []

            def stop(records, advanced=advanced):
                advanced.append(records)
                if len(advanced) == 3:
                    raise KeyboardInterrupt

            with pytest.raises(KeyboardInterrupt):
                prepare.prepare(corpus, str(out), shards=4, engine=first, advance=stop)
            kept = {path.name: path.stat().st_mtime_ns for path in out.glob("*.array_record")}
            assert len(kept) >= 2
            advanced.clear()
            prepare.prepare(corpus, str(out), shards=4, engine=second, advance=advanced.append)
            assert advanced[0] >= 2 and sum(advanced) == COUNT
            assert files(out) == files(tmp_path / "whole")
            assert {name: (out / name).stat().st_mtime_ns for name in kept} == kept

    def test_bad_records_end_the_run_or_are_left_out_by_name(self, tmp_path):
        corpus = open_corpus(bad_corpus(tmp_path / "corpus"))
        with pytest.raises(UserError, match=r"^all.jsonl line [234][^\n]*$"):
            prepare.prepare(corpus, str(tmp_path / "error"), shards=2, engine="ray")
        found = prepare.prepare(corpus, str(tmp_path / "ray"), shards=2, engine="ray", bad="skip")
        assert found == prepare.prepare(corpus, str(tmp_path / "local"), shards=2, bad="skip")
        assert found.records == 2 and len(found.skipped) == 3
        assert files(tmp_path / "ray") == files(tmp_path / "local")

    def test_a_process_that_is_killed_is_one_sentence(self, tmp_path):
        write = functools.partial(die_of, folder=str(tmp_path))
        with pytest.raises(UserError, match="A process that prepared records died") as error:
            list(on_ray.written(write, [0, 1, 2], str(tmp_path), workers=2, address=None))
        assert "\n" not in str(error.value) and (tmp_path / "1.tries").stat().st_size == 4


@pytest.mark.long
@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs the ray extra")
def test_the_command_starts_ray_and_says_nothing_of_it(corpus, tmp_path):
    out = tmp_path / "out"
    done = command(corpus, out, "--shards=2", "--engine=ray")
    assert (done.returncode, done.stdout) == (0, f"{COUNT} records in 2 shards: {out}\n")
    assert done.stderr == "" and len(json.loads((out / "corpus.json").read_text())["shards"]) == 2
