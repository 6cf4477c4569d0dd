"""Fine-tuning from end to end: commands that share one interpreter's imports, checkpoints, and corpora.

The real corpora are read where their packages put them, and copied to temporary folders only: stamps of
Debian's tuxpaint-stamps-default, pictures with a caption each, and films of forensics-samples-files.
"""

import io
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from tests.helpers import hf
from tests.helpers.chat import TEMPLATES, tokenizer_json
from tests.helpers.commands import ENVIRONMENT, ROOT
from tests.helpers.corpora import captioned, turns, write_animation, write_lines, write_picture

STAMPS = Path("/usr/share/tuxpaint/stamps")
FILMS = Path("/usr/share/forensics-samples/original-files")

_SERVER = """
import json, os, signal, sys
import grain, orbax.checkpoint
import gaze_jax.commands.main, gaze_jax.convert.verify, gaze_jax.corpora.check, gaze_jax.corpora.show
import gaze_jax.evaluate.run, gaze_jax.infer.requests
from gaze_jax.errors import AGAIN
from gaze_jax.train import loop, metrics


def stop_after(step):
    # The signal of the row before: the loop has asked for signals of its own step by then.
    def stopping(path, row):
        append(path, row)
        if row["step"] == step - 1:
            os.kill(os.getpid(), signal.SIGTERM)
    metrics.append = stopping if step else append


append, compile_step, programs = metrics.append, loop.compile_step, {}


def compiled(experiment, mesh, batch, teacher):
    if teacher is not None:
        return compile_step(experiment, mesh, batch, teacher)
    key = experiment, mesh, tuple(sorted((name, leaf.shape) for name, leaf in batch.items()))
    if key not in programs:
        programs[key] = compile_step(experiment, mesh, batch)
    return programs[key]


def run(words, step, out, err):
    for number, path in enumerate((os.devnull, out, err)):
        os.dup2(os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600), number)
    sys.argv = ["gaze-jax", *words]
    stop_after(step)
    status = 0
    try:
        os.rename(*words[1:]) if words[0] == "rename" else gaze_jax.commands.main.run()
    except SystemExit as end:
        status = end.code or 0
        if step:  # the run asks to be started again, which the next command does
            status = 0 if status == AGAIN else 1
    except BaseException:
        status = 1
        sys.excepthook(*sys.exc_info())
    sys.stdout.flush()
    sys.stderr.flush()
    return status


loop.compile_step = compiled
for line in sys.stdin:
    child = os.fork()
    if child == 0:
        os._exit(next(filter(None, (run(*call) for call in json.loads(line))), 0))
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


def _text(path: str) -> str:
    return Path(path).read_text(errors="replace") if os.path.exists(path) else ""


class Commands:
    """``gaze-jax COMMAND ...`` on one CPU device; each is a fork of a process that has imported everything.

    All share a cache of compiled programs.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir()
        environment = {
            "JAX_COMPILATION_CACHE_DIR": str(folder / "programs"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "XDG_CACHE_HOME": str(folder / "cache"),
        }
        self._process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", _SERVER],
            cwd=ROOT,
            env=os.environ | ENVIRONMENT | environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __call__(self, *words: object, status: int = 0) -> tuple[str, str]:
        """What a command writes to stdout and stderr, after asserting its exit status."""
        (texts,) = self.together((words, 0), status=status)
        return texts

    def together(self, *calls: tuple[tuple[object, ...], int], status: int = 0) -> list[tuple[str, str]]:
        """As one process, so that training steps compile once: what each writes to stdout and stderr.

        Args:
          *calls: words, ``gaze-jax`` left out, or "rename" with two paths; and the step after which training
            is stopped by SIGTERM, or 0.
          status: the exit status of the first command that does not end with 0, the last one.
        """
        files = [[str(self._folder / f"{kind}{n}") for kind in ("out", "err")] for n in range(len(calls))]
        lines = [[[*map(str, words)], stop, *at] for (words, stop), at in zip(calls, files, strict=True)]
        assert self._process.stdin is not None and self._process.stdout is not None
        print(json.dumps(lines), file=self._process.stdin, flush=True)
        found = int(self._process.stdout.readline())
        texts = [tuple(_text(path) for path in at) for at in files]
        assert found == status, (calls, found, *texts)
        return texts

    def refusal(self, *words: object) -> str:
        """The one line of a command that is refused."""
        out, err = self(*words, status=2)
        assert not out and err.count("\n") == 1, (out, err)
        return err.strip()

    def close(self) -> None:
        """End the process."""
        self._process.communicate(timeout=60)


def process(*words: object, limit: int = 1200, **environment: str) -> tuple[str, str]:
    """What a command writes to stdout and stderr as a process of its own; programs are fast."""
    done = subprocess.run(
        [sys.executable, *map(str, words)],
        cwd=ROOT,
        # Programs of tests are compiled fast, and run slowly.
        env=os.environ | ENVIRONMENT | {"XLA_FLAGS": ""} | environment,
        capture_output=True,
        text=True,
        timeout=limit,
    )
    assert done.returncode == 0, (words, done.returncode, done.stdout, done.stderr)
    return done.stdout, done.stderr


def write_generated(folder: Path) -> str:
    """24 records of a picture each, and one of a film."""
    for number in range(24):
        write_picture(folder / f"{number}.png", 20 + number, 30, number)
    write_animation(folder / "film.gif")
    records = [captioned(f"{n}.png", f"n{n}", f"A cat of colour {n}.") for n in range(24)]
    film = {"id": "film", "video": "film.gif", "conversations": turns("<video>\nWhat is this?", "Noise.")}
    return write_lines(folder, [*records, film])


def write_llava(folder: Path) -> Path:
    """LLaVA-OneVision with new parameters: a decoder of SmolLM2-135M's sizes and a small tower."""
    torch, transformers = hf.torch, hf.transformers
    text = transformers.Qwen2Config(
        hidden_size=576,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        intermediate_size=1536,
        vocab_size=49_152,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
    )
    vision = {
        "hidden_size": 192,
        "intermediate_size": 768,
        "num_hidden_layers": 4,
        "num_attention_heads": 3,
        "patch_size": 14,
        "image_size": 224,
        "vision_use_head": False,
    }
    config = transformers.LlavaOnevisionConfig(
        text_config=text,
        vision_config=transformers.SiglipVisionConfig(**vision),
        image_token_index=49_000,
        video_token_index=49_001,
        image_grid_pinpoints=[[224, 224]],
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    transformers.LlavaOnevisionForConditionalGeneration(config).save_pretrained(folder)
    images = {"size": {"height": 224, "width": 224}, "image_grid_pinpoints": [[224, 224]]}
    images |= {"image_processor_type": "LlavaOnevisionImageProcessor", "do_pad": True, "resample": 3}
    images |= {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "rescale_factor": 1 / 255}
    (folder / "preprocessor_config.json").write_text(json.dumps(images))
    kind = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>"}
    (folder / "tokenizer.json").write_text(tokenizer_json())
    (folder / "tokenizer_config.json").write_text(json.dumps(kind))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 2}))
    (folder / "chat_template.jinja").write_text(TEMPLATES["llava_onevision"])
    return folder


def stamps() -> list[tuple[Path, str]]:
    """Every stamp of Tux Paint with a caption, and its English one."""
    found = [(path, path.with_suffix(".txt")) for path in sorted(STAMPS.rglob("*.png"))]
    return [(path, text.read_text(encoding="utf-8").splitlines()[0]) for path, text in found if text.exists()]


def films() -> list[tuple[Path, str]]:
    """Short films, and what they show."""
    named = {"movie1/VID_20191220_170832.mp4": "A film of a telephone.", "movie2/movie-hello.avi": "Hello."}
    named["movie2/movie-hello.mp4"] = "Hello again."
    return [(FILMS / name, text) for name, text in named.items() if (FILMS / name).exists()]


class Containers:
    """One corpus of captioned media in every container; each method gives its path and its media."""

    def __init__(self, folder: Path, media: list[tuple[Path, str]]) -> None:
        self.folder = folder
        self.records: list[tuple[dict[str, Any], str, str, bytes]] = []
        for number, (path, text) in enumerate(media):
            kind = "image" if path.suffix == ".png" else "video"
            asked = turns(f"<{kind}>\nWhat is this?", text)
            record = {"id": f"{number:04}", "conversations": asked}
            self.records.append((record, kind, f"{number:04}{path.suffix}", path.read_bytes()))

    def _lines(self, folder: Path) -> str:
        return write_lines(folder, [record | {kind: name} for record, kind, name, _ in self.records])

    def lines(self) -> tuple[str, tuple[str, ...]]:
        """JSON Lines beside a folder of media."""
        out = self._lines(self.folder / "lines")
        for _, _, name, data in self.records:
            (self.folder / "lines" / name).write_bytes(data)
        return out, ()

    def media_tar(self) -> tuple[str, tuple[str, ...]]:
        """JSON Lines, and a plain tar of media."""
        out = self._lines(self.folder / "media_tar")
        path = self.folder / "media_tar" / "media.tar"
        with tarfile.open(path, "w") as tar:
            for _, _, name, data in self.records:
                _add(tar, name, data)
        return out, (str(path),)

    def webdataset(self) -> tuple[str, tuple[str, ...]]:
        """Two tars of records and media."""
        (self.folder / "web").mkdir()
        half = len(self.records) // 2
        for name, part in (("0.tar", self.records[:half]), ("1.tar", self.records[half:])):
            with tarfile.open(self.folder / "web" / name, "w") as tar:
                for record, _, file, data in part:
                    _add(tar, f"{record['id']}.json", json.dumps(record).encode())
                    _add(tar, file, data)
        return str(self.folder / "web" / "*.tar"), ()

    def parquet(self) -> tuple[str, tuple[str, ...]]:
        """A parquet file with the bytes of the media."""
        path = self.folder / "all.parquet"
        columns: dict[str, list[Any]] = {"id": [], "conversations": [], "image": [], "video": []}
        for record, kind, name, data in self.records:
            for column in ("id", "conversations"):
                columns[column].append(record[column])
            for column in ("image", "video"):
                columns[column].append({"bytes": data, "path": name} if column == kind else None)
        cell = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
        arrays = {
            name: pyarrow.array(values, cell if name in ("image", "video") else None)
            for name, values in columns.items()
        }
        pyarrow.parquet.write_table(pyarrow.table(arrays), path, row_group_size=100)
        return str(path), ()


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))
