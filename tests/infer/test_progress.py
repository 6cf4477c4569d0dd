"""A progress bar on a real terminal, beside other messages."""

import contextlib
import os
import pty
import re
import subprocess
import sys

SCRIPT = """
import sys, time
from gaze_jax.infer.progress import progress_bar

with progress_bar("questions", 3) as advance:
    for number in range(3):
        print(f"Question {number}: it has no answer, [bold] or not.", file=sys.stderr)
        print("compiling (once per size) ...", file=sys.stderr, flush=True)
        time.sleep(0.3)
        print(f"compiled in {number} s", file=sys.stderr, flush=True)
        print(f"answer {number}", flush=True)
        advance(1)
print("done")
"""


def run(*, err, out):
    """Run the script; whatever of ``err`` and ``out`` is true is the terminal, the other a pipe.

    Returns what the terminal and the pipe got.
    """
    ours, theirs = pty.openpty()
    streams = {"stderr": theirs if err else subprocess.PIPE, "stdout": theirs if out else subprocess.PIPE}
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "90", "LINES": "24"}
    process = subprocess.Popen([sys.executable, "-c", SCRIPT], env=environment, text=True, **streams)
    os.close(theirs)
    seen = b""
    with contextlib.suppress(OSError):  # Linux: the other end is closed
        while piece := os.read(ours, 4096):
            seen += piece
    os.close(ours)
    rest = process.communicate(timeout=60)
    assert process.returncode == 0
    return seen.decode(), "".join(text or "" for text in rest)


def screen(text):
    """The lines that a terminal shows after this text, scrolled ones included."""
    lines, at, column = [""], 0, 0
    for part in re.findall(r"\x1b\[[?\d;]*[A-Za-z]|[\r\n]|[^\r\n\x1b]+", text):
        if part == "\n":
            at += 1
            lines += [""] * (at == len(lines))
        elif part == "\r":
            column = 0
        elif part.startswith("\x1b"):
            number, kind = int(re.sub(r"\D", "", part) or 1), part[-1]
            if kind == "A":
                at -= number
            elif kind == "K":
                assert part == "\x1b[2K"
                lines[at] = ""
            else:
                assert kind in "mhl", part
        else:
            lines[at] = lines[at][:column].ljust(column) + part + lines[at][column + len(part) :]
            column += len(part)
    return [line.rstrip() for line in lines if line.strip()]


MESSAGES = [
    text
    for n in range(3)
    for text in (
        f"Question {n}: it has no answer, [bold] or not.",
        "compiling (once per size) ...",
        f"compiled in {n} s",
    )
]
ANSWERS = [f"answer {n}" for n in range(3)]


def test_messages_are_whole_lines_above_the_bar():
    """And what goes to a pipe gets there, in its order."""
    seen, piped = run(err=True, out=False)
    assert piped == "\n".join([*ANSWERS, "done", ""])
    *lines, bar = screen(seen)
    assert lines == MESSAGES
    assert "3/3 questions" in bar and "left" in bar
    assert seen.rstrip().endswith("\x1b[?25h"), "the cursor is there again"


def test_answers_in_the_same_terminal_are_lines_too():
    seen, _ = run(err=True, out=True)
    lines = screen(seen)
    assert [line for line in lines if "questions" not in line or "Question" in line] == [
        text for n in range(3) for text in (*MESSAGES[3 * n : 3 * n + 3], ANSWERS[n])
    ] + ["done"]


def test_without_a_terminal_there_is_no_bar():
    """Only what was printed."""
    seen, piped = run(err=False, out=True)
    assert piped == "\n".join([*MESSAGES, ""])
    assert screen(seen) == [*ANSWERS, "done"] and "\x1b" not in seen
