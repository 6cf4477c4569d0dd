"""generate and eval in several processes: what one process answers, said once; mistakes are everybody's."""

import json
import os
import signal
import time

import jax
import numpy as np
import pytest
from PIL import Image

from gaze_jax.errors import AGAIN
from gaze_jax.infer import trace_file
from tests.helpers.commands import call, start, without_gloo
from tests.helpers.experiments import save_untrained, tiny_experiment
from tests.parallel.test_distributed import free_port

pytestmark = [pytest.mark.standard_promotion, pytest.mark.xdist_group("several")]


def launch(command, *flags, devices=4, heartbeat=60):
    """Two processes of a command, which have four devices together."""
    settings = [f"--coordinator=localhost:{free_port()}", "--num_processes=2"]
    settings += [f"--heartbeat_seconds={heartbeat}"]
    environment = {"JAX_NUM_CPU_DEVICES": str(devices // 2)}
    environment["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_backend_optimization_level=0"
    return [
        start("-m", "gaze_jax", command, *flags, *settings, f"--process_id={number}", **environment)
        for number in range(2)
    ]


def both(command, *flags, status=0, devices=4):
    """What two processes of a command print."""
    processes = launch(command, *flags, devices=devices)
    found = [process.communicate(timeout=300) for process in processes]
    assert [process.returncode for process in processes] == [status] * 2, found
    return [("".join(f"{line}\n" for line in without_gloo(out)), err) for out, err in found]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run")
    with jax.numpy_dtype_promotion("standard"):
        save_untrained(tiny_experiment(**{"model.decoder.num_kv_heads": 2}), workdir)
    return workdir


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    """Three questions about three images; the image of a fourth is not there."""
    folder = tmp_path_factory.mktemp("questions")
    lines = [{"question": "Where is the only 7?", "images": ["none.png"], "id": "lost"}]
    for number, image in enumerate(
        np.random.default_rng(1).integers(256, size=(3, 20, 20, 3), dtype=np.uint8)
    ):
        Image.fromarray(image).save(folder / f"{number}.png")
        lines.append(
            {"question": f"Where is the only {number}?", "images": [f"{number}.png"], "max_tokens": 5}
        )
    (folder / "questions.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return folder / "questions.jsonl"


def of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.long  # two processes that compile a prefill and a loop each
@pytest.mark.parametrize("sizes", [["--tensor=2"], ["--fsdp=2", "--context=2"]], ids=["tensor", "context"])
def test_a_file_of_questions_is_answered_once(sizes, run, questions, tmp_path):
    flags = [f"--checkpoint={run}", f"--questions={questions}", "--batch_size=2", "--compilation_cache="]
    alone, together = tmp_path / "alone", tmp_path / "together"
    call("generate.py", *flags, f"--answers={alone}.jsonl", f"--traces={alone}", status=3)
    ask = ["--all_devices", *sizes, f"--answers={together}.jsonl", f"--traces={together}"]
    first, other = both("generate", *flags, *ask, status=3)
    assert "none.png" in first[1] and other == ("", "")
    assert of(tmp_path / "together.jsonl") == of(tmp_path / "alone.jsonl")
    assert {file.name for file in together.iterdir()} == {file.name for file in alone.iterdir()}
    for file in alone.glob("*.gaze"):
        mine, theirs = trace_file.load(together / file.name), trace_file.load(file)
        assert mine.tokens == theirs.tokens
        np.testing.assert_array_equal(mine.mask(), theirs.mask())


@pytest.mark.long
def test_a_conversation_is_printed_once_and_its_page_written_once(run, questions, tmp_path):
    ask = [f"--checkpoint={run}", f"--image={questions.parent / '0.png'}", "--max_tokens=4"]
    ask += ["--question=Where is the only 7?", "--question=Where is the only 8?", "--compilation_cache="]
    alone, _ = call("generate.py", *ask)
    first, other = both("generate", *ask, "--all_devices", "--context=4", f"--out={tmp_path / 'a.gaze'}")
    assert first[0] == alone and other == ("", "")
    assert trace_file.load(tmp_path / "a.gaze").question == "Where is the only 8?"


@pytest.mark.long
@pytest.mark.parametrize("victim", [0, 1])
def test_sigterm_to_one_ends_all_and_resume_asks_the_rest(victim, run, questions, tmp_path):
    """Answers that are written stay; the others end with the status that asks for a start."""
    flags = [f"--checkpoint={run}", f"--questions={questions}", "--batch_size=1", "--compilation_cache="]
    flags += [f"--answers={tmp_path}/a.jsonl", "--all_devices", "--tensor=2"]
    processes = launch("generate", *flags, heartbeat=10)
    while not (tmp_path / "a.jsonl").exists():
        assert processes[victim].poll() is None, processes[victim].communicate()
        time.sleep(0.02)
    processes[victim].terminate()
    found = [process.communicate(timeout=120) for process in processes]
    assert processes[victim].returncode == -signal.SIGTERM, found
    assert processes[1 - victim].returncode in (AGAIN, -signal.SIGABRT), found
    both("generate", *flags, "--resume", status=3)
    assert {answer["id"] for answer in of(tmp_path / "a.jsonl")} == {"lost", "2", "3", "4"}


@pytest.mark.long
def test_a_run_is_evaluated_as_on_one_device(run):
    call("eval.py", f"--workdir={run}", "--samples=3")
    alone = json.loads((run / "eval.json").read_text())
    for name in ("eval.json", "gaze.png", "scene.png"):
        (run / name).unlink()
    first, other = both("eval", f"--workdir={run}", "--samples=3", "--all_devices", "--fsdp=2", "--tensor=2")
    assert "random routing" in first[0] and other == ("", "")
    assert json.loads((run / "eval.json").read_text()) == alone
    assert (run / "gaze.png").exists() and (run / "scene.png").exists()


def test_a_mistake_is_everybodys(run, tmp_path):
    """Before anything is loaded; each process says it in one sentence."""
    for command, sentence, flags in [
        ("generate", "give --all_devices", [f"--checkpoint={run}", "--question=Why?"]),
        ("eval", "start one process", ["--compare=dense", f"--checkpoint={run}"]),
    ]:
        for out, err in both(command, *flags, status=2, devices=2):
            assert not out and sentence in err and len(err.strip().splitlines()) == 1
