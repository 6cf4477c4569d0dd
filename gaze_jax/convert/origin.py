"""Where a run starts from, and what it keeps of that checkpoint besides the parameters.

::

    WORKDIR/origin/
      manifest.json   that of a conversion (convert.manifest), without parameters
      decoder/ ...    configs, tokenizer, processor files and unused tensors of each part

With it a run is asked in its own chat template, continues if the checkpoint is gone, and converts back into
the layout that its family has.
"""

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn

from jax.sharding import Mesh
from jaxtyping import PyTree

from gaze_jax.chat.template import template_of
from gaze_jax.convert import checkpoint, manifest
from gaze_jax.convert.checkpoint import Config, new_directory, text_part
from gaze_jax.convert.hub import resolve
from gaze_jax.convert.load import place
from gaze_jax.convert.manifest import Manifest, Source
from gaze_jax.convert.run import ORIGIN, plan_directory, read_origin
from gaze_jax.convert.source import copy_beside
from gaze_jax.convert.tokenizer_files import read_tokenizer
from gaze_jax.corpora.config import CorpusConfig
from gaze_jax.corpora.conversations import Conversations
from gaze_jax.corpora.records import Corpus
from gaze_jax.corpora.stand_in import stand_in
from gaze_jax.data.tokenizer import Tokenizer
from gaze_jax.errors import UserError
from gaze_jax.families import check_views
from gaze_jax.models.config import VisionConfig
from gaze_jax.train.checkpoint import FOLDER, has_checkpoint, load_for_inference, read_run
from gaze_jax.train.config import parse, read_data
from gaze_jax.train.corpus import conversations_of, open_records
from gaze_jax.train.start import Start
from gaze_jax.writing import file_crc


def open_start(init_from: str, workdir: Path | None = None) -> Start:
    """Open the checkpoint that a run starts from; no parameter is read yet.

    A run that has a checkpoint of its own needs only what it kept.

    Args:
      init_from: a converted checkpoint, a Hugging Face directory or a Hub id, or the folder of a run.
      workdir: the folder of the run that starts; None: of no run.

    Raises:
      UserError: it is none of these, is damaged, or is no multimodal model with a tokenizer.
    """
    if workdir is not None and has_checkpoint(workdir) and (kept := read_origin(workdir)) is not None:
        return _of_itself(init_from, workdir, kept)
    path = resolve(init_from)
    if (path / manifest.FILE).exists():
        return _of_converted(init_from, path)
    if (path / FOLDER).is_dir():
        return _of_run(init_from, path)
    return _of_directory(init_from, path)


def open_corpus_of(config: Mapping[str, Any]) -> tuple[CorpusConfig, Corpus, Conversations]:
    """The corpus of a config, and how its records become samples, without a run.

    Without ``init_from`` there is no tokenizer, so lengths are those of a stand-in (``corpora.stand_in``).

    Raises:
      UserError: the config is not of a corpus, or the corpus or the checkpoint cannot be opened.
    """
    named = config.get("init_from")
    start = open_start(named) if named else None
    data = read_data(config)
    if not isinstance(data, CorpusConfig):
        raise UserError("The config is of digit scenes, which are made, not read; give one with data.path.")
    if start is None:
        return data, open_records(data), stand_in(data)
    experiment = parse(config, start.config)
    return data, open_records(data), conversations_of(experiment, start)


def _of_itself(init_from: str, workdir: Path, kept: Manifest) -> Start:
    def load(mesh: Mesh) -> NoReturn:
        raise UserError(
            f"{workdir} has lost its newest checkpoint; move the folder away to start from {init_from}."
        )

    return _start(init_from, kept.model, _text_files(workdir / ORIGIN, kept.sources), load, lambda out: None)


def _of_converted(init_from: str, path: Path) -> Start:
    found = manifest.read(path)
    others = sorted(set(found.files) - manifest.leaf_files(found))  # leaves are checked as they are read
    manifest.refuse_damage(path, manifest.damaged_files(path, found, others))

    def load(mesh: Mesh) -> PyTree:
        return checkpoint.load(path, mesh).params

    def keep(out: Path) -> None:
        _keep(out, found.model, found.sources, path)

    return _start(init_from, found.model, _text_files(path, found.sources), load, keep)


def _of_run(init_from: str, path: Path) -> Start:
    """A run to start from, which may itself have started from a checkpoint."""
    experiment, tokenizer = read_run(path)
    kept = read_origin(path)

    def load(mesh: Mesh) -> PyTree:
        return load_for_inference(path, mesh).params

    if kept is None:  # a run on digit scenes has no chat template
        return Start(init_from, experiment.model, tokenizer, None, load, lambda out: None)
    sources = kept.sources

    def keep(out: Path) -> None:
        _keep(out, experiment.model, sources, path / ORIGIN)

    return _start(init_from, experiment.model, _text_files(path / ORIGIN, sources), load, keep)


def _of_directory(init_from: str, path: Path) -> Start:
    """A Hugging Face directory as it is."""
    plan = plan_directory(path)
    sources = {part: opened.source for part, opened in plan.opened.items()}

    def load(mesh: Mesh) -> PyTree:
        return place(plan, mesh).params

    def keep(out: Path) -> None:
        with new_directory(_free(out)) as partial:
            for part, opened in plan.opened.items():
                copy_beside(opened, partial / part, plan.dtype)
            _describe(partial, plan.config, sources)

    part = text_part(plan.opened)
    return _start(init_from, plan.config, None if part is None else plan.opened[part].directory, load, keep)


def _start(
    init_from: str,
    config: Config,
    files: Path | None,
    load: Callable[[Mesh], PyTree],
    keep: Callable[[Path], None],
) -> Start:
    if isinstance(config, VisionConfig) or config.vision is None or files is None:
        kind = "an image tower" if isinstance(config, VisionConfig) else "a language model"
        raise UserError(f"init_from={init_from} is {kind} alone; give a multimodal checkpoint.")
    check_views(config.views)
    found = read_tokenizer(files, config)
    if found is None:
        raise UserError(f"init_from={init_from} has no tokenizer.json, so it cannot read text; add the file.")
    try:
        tokenizer = Tokenizer(found)
    except ValueError as error:
        raise UserError(f"{files / 'tokenizer.json'}: {error}") from error
    return Start(init_from, config, tokenizer, template_of(files), load, keep)


def _text_files(folder: Path, sources: Mapping[str, Source]) -> Path | None:
    part = text_part(sources)
    return None if part is None else folder / part


def _free(workdir: Path) -> Path:
    """The folder for what a run keeps, without what an attempt before its first checkpoint left."""
    shutil.rmtree(workdir / ORIGIN, ignore_errors=True)
    return workdir / ORIGIN


def _keep(workdir: Path, config: Config, sources: Mapping[str, Source], folder: Path) -> None:
    """Copy the files of all parts, and describe them."""
    with new_directory(_free(workdir)) as partial:
        for part in sources:
            shutil.copytree(folder / part, partial / part)
        _describe(partial, config, sources)


def _describe(folder: Path, config: Config, sources: Mapping[str, Source]) -> None:
    files = {
        path.relative_to(folder).as_posix(): file_crc(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    manifest.write(folder, Manifest(config, {}, sources, (), files))
