"""A file of questions: wrong lines are named and the others answered; nothing that is there is lost."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gaze_jax.commands import cli, generate_batch
from gaze_jax.commands.generate_options import GenerateOptions
from gaze_jax.errors import UserError
from gaze_jax.infer.answer import Answer
from tests.helpers.disks import full_after

CASES = Path(__file__).parents[1] / "fixtures" / "cases" / "jsonl"


@pytest.fixture
def asked(monkeypatch):
    """Stands for the model: repeats the question; what it was asked, and when it was loaded."""
    seen = []

    def answer_all(sampler, requests, *, batch_size, return_trace, failed, progress):
        generate_batch.answer_all.progress = progress
        for request in requests:
            if request.question == "Refused later":
                failed(request, "it has no answer.")
                continue
            if request.question == "Crash":
                raise UserError("A batch does not fit.")
            seen.append(request.id)
            try:
                yield request, Answer(f"{request.question}!", ("a",), "stop", None, 4, 2)
            except GeneratorExit:
                seen.append("closed")
                raise

    monkeypatch.setattr(generate_batch, "make_sampler", lambda options: seen.append("loaded"))
    monkeypatch.setattr(generate_batch, "answer_all", answer_all)
    return seen


def ask(questions, answers, **options):
    values = {"checkpoint": "ckpt", "questions": str(questions), "answers": str(answers), **options}
    return generate_batch.ask_many(GenerateOptions.of(values))


def lines(path):
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def write(path, *questions):
    path.write_text("".join(json.dumps(q) + "\n" for q in questions), encoding="utf-8")
    return path


def test_the_reported_file_is_answered_but_for_its_second_line(asked, tmp_path, capsys):
    """Its picture is cut; an older file of answers is replaced, as there is something to put there."""
    answers = write(tmp_path / "answers.jsonl", {"id": "old"})
    assert ask(CASES / "q3.jsonl", answers) == 1
    found = {line["id"]: line for line in lines(answers)}
    assert set(found) == {"1", "2", "3"} and asked == ["loaded", "1", "3"]
    assert found["1"]["answer"] == "What is this?!" and found["3"]["answer"] == "Third?!"
    assert "cut2.jpg" in found["2"]["error"] and "damaged" in found["2"]["error"]
    assert found["2"]["error"] in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [answers]


def test_lines_that_are_no_questions_are_named(asked, tmp_path, capsys):
    questions = tmp_path / "q.jsonl"
    questions.write_text(
        '{"question": "One?"}\nnot json\n{"question": 3}\n{"questoin": "x"}\n{"question": "Two?"}\n'
    )
    assert ask(questions, tmp_path / "a.jsonl") == 3
    found = {line["id"]: line for line in lines(tmp_path / "a.jsonl")}
    assert {name for name, line in found.items() if "error" in line} == {"2", "3", "4"}
    assert all(f"Line {n} of" in found[str(n)]["error"] for n in (2, 3, 4))
    assert capsys.readouterr().err.count("\n") == 3


def test_a_question_that_is_refused_later_does_not_stop_the_others(asked, tmp_path):
    write(tmp_path / "q.jsonl", {"question": "Refused later"}, {"question": "Two?"})
    assert ask(tmp_path / "q.jsonl", tmp_path / "a.jsonl") == 1
    assert [line.get("answer") for line in lines(tmp_path / "a.jsonl")] == [None, "Two?!"]


def test_nothing_is_touched_if_nothing_can_be_answered(asked, tmp_path):
    """Neither the old answers nor the checkpoint."""
    answers = write(tmp_path / "a.jsonl", {"id": "old"})
    write(tmp_path / "q.jsonl", {"question": "What?", "images": ["absent.png"]})
    with pytest.raises(UserError, match=r"'1': Image .*absent\.png' is not a file"):
        ask(tmp_path / "q.jsonl", answers)
    assert lines(answers) == [{"id": "old"}] and not asked


def test_several_lines_that_cannot_be_answered_are_one_sentence_and_a_number(asked, tmp_path):
    write(tmp_path / "q.jsonl", *({"question": "What?", "images": [f"{n}.png"]} for n in range(3)))
    with pytest.raises(
        UserError, match=r"0\.png' is not a file; .* None of the other 2 lines can be answered"
    ):
        ask(tmp_path / "q.jsonl", tmp_path / "a.jsonl")


def test_old_answers_stay_until_there_is_a_new_one(monkeypatch, tmp_path):
    def fails(options):
        raise UserError("ckpt is not a directory.")

    monkeypatch.setattr(generate_batch, "make_sampler", fails)
    answers = write(tmp_path / "a.jsonl", {"id": "old"})
    write(tmp_path / "q.jsonl", {"question": "What?"}, {"question": "Bad?", "images": ["absent.png"]})
    with pytest.raises(UserError, match="ckpt is not a directory"):
        ask(tmp_path / "q.jsonl", answers)
    assert lines(answers) == [{"id": "old"}]


def test_a_run_that_ends_early_is_resumed(asked, tmp_path, capsys):
    """A line that was cut when it was written, and one with an error, are asked again."""
    questions = write(tmp_path / "q.jsonl", *({"question": q} for q in ("One?", "Two?", "Crash", "Four?")))
    answers = tmp_path / "a.jsonl"
    with pytest.raises(UserError, match="does not fit"):
        ask(questions, answers)
    assert [line["id"] for line in lines(answers)] == ["1", "2"]
    with answers.open("a") as file:
        file.write('{"id": "3", "question": "Crash", "error": "x"}\n{"id": "4", "quest')
    with pytest.raises(UserError, match="does not fit"):  # again, before there is anything new
        ask(questions, answers, resume=True)
    assert answers.read_text().endswith('"quest')
    write(questions, *({"question": q} for q in ("One?", "Two?", "Three?", "Four?")))
    del asked[:]
    assert ask(questions, answers, resume=True) == 0
    assert asked == ["loaded", "3", "4"]
    assert [(line["id"], line["answer"]) for line in lines(answers)] == [
        ("1", "One?!"), ("2", "Two?!"), ("3", "Three?!"), ("4", "Four?!")
    ]  # fmt: skip
    del asked[:]
    assert ask(questions, answers, resume=True) == 0 and not asked  # nothing is left to do


@pytest.mark.parametrize(
    ("old", "match"),
    [
        ('{"id": "1", "question": "Other?", "answer": "x"}\n', "answers another question than '1' is now"),
        ("hello\n", "Line 1 of .* is no answer of an earlier run"),
        ("[1]\n", "Line 1 of .* is no answer of an earlier run"),
    ],
)
def test_resuming_with_another_file_is_refused(old, match, asked, tmp_path):
    write(tmp_path / "q.jsonl", {"question": "One?"})
    (tmp_path / "a.jsonl").write_text(old)
    with pytest.raises(UserError, match=match):
        ask(tmp_path / "q.jsonl", tmp_path / "a.jsonl", resume=True)
    assert (tmp_path / "a.jsonl").read_text() == old


def test_media_are_relative_to_the_file(asked, tmp_path, monkeypatch):
    (tmp_path / "set").mkdir()
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / "set" / "a.png")
    write(tmp_path / "set" / "q.jsonl", {"question": "What?", "images": ["a.png"]})
    monkeypatch.chdir(tmp_path)
    assert ask("set/q.jsonl", "a.jsonl") == 0
    shutil.copy(tmp_path / "set" / "q.jsonl", tmp_path / "q.jsonl")
    with pytest.raises(UserError, match="is not a file"):
        ask("q.jsonl", "b.jsonl")


def test_a_target_that_cannot_be_written_is_said_first(asked, tmp_path):
    write(tmp_path / "q.jsonl", {"question": "What?"})
    for target, match in ((tmp_path, "is a folder"), (tmp_path / "no" / "a.jsonl", "does not exist")):
        with pytest.raises(UserError, match=match):
            ask(tmp_path / "q.jsonl", target)
    assert not asked


def test_a_pipe_can_take_the_answers(asked, tmp_path):
    write(tmp_path / "q.jsonl", {"question": "What?"})
    assert ask(tmp_path / "q.jsonl", "/dev/null") == 0
    assert Path("/dev/null").is_char_device()


def test_the_status_says_whether_all_were_answered():
    with pytest.raises(SystemExit) as end:
        cli.exit_partly(2)
    assert end.value.code == cli.PARTLY == 3
    cli.exit_partly(0)


def test_resuming_begins_a_file_that_is_not_there(asked, tmp_path):
    write(tmp_path / "q.jsonl", {"question": "One?", "gaze_dense": True})
    assert ask(tmp_path / "q.jsonl", tmp_path / "a.jsonl", resume=True) == 0
    assert [line["answer"] for line in lines(tmp_path / "a.jsonl")] == ["One?!"]


def test_an_id_that_cannot_name_a_trace_is_refused(asked, tmp_path):
    write(tmp_path / "q.jsonl", {"question": "One?", "id": "a/b"})
    with pytest.raises(UserError, match="With --traces an id is a file's name"):
        ask(tmp_path / "q.jsonl", tmp_path / "a.jsonl", traces=str(tmp_path / "looked"))
    assert not asked


def test_a_full_disk_leaves_whole_lines(asked, tmp_path):
    """What has no room is not there in part, and --resume asks the rest."""
    write(tmp_path / "q.jsonl", *({"question": f"{number}?"} for number in range(9)))
    answers = tmp_path / "a.jsonl"
    with full_after(500), pytest.raises(UserError, match=r"a.jsonl' cannot be written \(File too large\)"):
        ask(tmp_path / "q.jsonl", answers)
    found = [line["answer"] for line in lines(answers)]
    assert 1 < len(found) < 9 and found == [f"{number}?!" for number in range(len(found))]
    assert answers.read_text().endswith("}\n")
    asked.clear()
    assert ask(tmp_path / "q.jsonl", answers, resume=True) == 0
    assert asked == ["loaded", *(str(number + 1) for number in range(len(found), 9))]
    assert len(lines(answers)) == 9


def test_an_older_file_stays_if_no_line_has_room(asked, tmp_path):
    """With and without --resume; nothing lies beside it."""
    questions = write(tmp_path / "q.jsonl", {"question": "1?"}, {"question": "2?"})
    answers = write(tmp_path / "a.jsonl", {"id": "1", "question": "1?", "answer": "old"})
    before = answers.read_text()
    for resume in (False, True):
        with full_after(60), pytest.raises(UserError, match=r"a\.jsonl' cannot be written"):
            ask(questions, answers, resume=resume)
        assert answers.read_text() == before and sorted(tmp_path.iterdir()) == [answers, questions]


def test_a_device_without_room_ends_it(asked, tmp_path):
    """The generator of answers is closed at once, and a progress bar with it."""
    questions = write(tmp_path / "q.jsonl", {"question": "1?"}, {"question": "2?"})
    with pytest.raises(UserError) as error:
        ask(questions, "/dev/full")
    assert asked == ["loaded", "1", "closed"]  # the traceback still holds it
    assert str(error.value) == "'/dev/full' cannot be written (No space left on device)."
    assert generate_batch.answer_all.progress is False, "it may be the terminal of the bar"
    assert ask(questions, tmp_path / "a.jsonl") == 0 and generate_batch.answer_all.progress is True
