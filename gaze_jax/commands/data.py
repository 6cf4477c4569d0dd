"""Check a corpus before training, show what a model gets of it, and prepare it for fast reading.

gaze-jax data check CONFIG --config.data.path=my.jsonl --config.init_from=ckpt/llava --out=report
    finds every record that cannot be trained on, and why; the exit status is 0 only if there is none
gaze-jax data show CONFIG --config.data.path=my.jsonl --config.init_from=ckpt/llava --index=17 --out=17.html
    one sample as the model gets it: its pictures with their regions, its text with what is learnt
gaze-jax data prepare llava_v1_5_mix665k.json --media=/data/llava --out=/data/mix665k
    reads LLaVA's JSON, JSON Lines, parquet, webdataset tars, or a folder of captioned media (docs/data.md);
    the same command again goes on where it stopped
gaze-jax data prepare "shards/*.tar" --out=/shared/web --engine=ray --ray_address=auto --workers=256
    does it on a Ray cluster; what is read may also be in a bucket, gs://bucket/train.jsonl
"""

import contextlib
import difflib
import os
import sys
import typing
from collections.abc import Sequence

from gaze_jax.commands import cli
from gaze_jax.commands.flags import Flags, Values
from gaze_jax.commands.train import config_of, define_config
from gaze_jax.errors import UserError

if typing.TYPE_CHECKING:
    from gaze_jax.corpora.config import CorpusConfig
    from gaze_jax.corpora.conversations import Conversations
    from gaze_jax.corpora.records import Corpus

_SHOWN = 20
"""Records that were left out and are printed; all are in the listing."""


def _verb(argv: Sequence[str]) -> str:
    """What is to be done: the first word that is no flag."""
    return next((word for word in argv[1:] if not word.startswith("-")), "")


def define_flags(flags: Flags) -> None:
    """The flags of what is to be done; of everything for the help of the command."""
    verb = _verb(flags.argv)
    if verb in ("check", "show", ""):
        _define_config(flags, verb)
    if verb not in ("check", "show"):
        _define_prepare(flags)
    elif verb == "check":
        flags.string("out", None, "Folder for the report: check.html, check.json, check.png.", "FOLDER")
        flags.integer("workers", 1, "Processes that read and decode.")
    else:
        flags.string("out", None, "Page with the pictures and the text of the sample.", "FILE")
        flags.integer("index", 0, "Number of the record, from 0.")


def _define_config(flags: Flags, verb: str) -> None:
    """``data check CONFIG`` as ``--config=CONFIG``, whose fields are flags as those of ``train``."""
    flags.group("What is trained on: check and show")
    words = list(flags.argv)
    after = words.index(verb) + 1 if verb else len(words)
    for number, word in enumerate(words[after:], start=after):
        if not word.startswith("-"):
            words[number] = f"--config={word}"
            break
    flags.argv = words
    define_config(flags)


def _define_prepare(flags: Flags) -> None:
    flags.group("What is read: prepare")
    flags.strings("media", "Folder, or plain tar, that the media of a JSON corpus are in.", "PATH")
    text = 'What is asked of a medium that has a caption; default: "Describe this picture."'
    flags.string("prompt", None, text)
    flags.group("What is written: prepare")
    flags.string("out", None, "New folder for the shards.", "FOLDER")
    flags.integer("shards", None, "Number of shards; default: one for every 10,000 records.")
    flags.integer("workers", 1, "Processes that read and write.")
    flags.choice("bad", "error", ("error", "skip"), "Whether a record that cannot be read ends the run.")
    flags.group("Where it is prepared")
    flags.choice("engine", "local", ("local", "ray"), "Processes of this machine, or Ray Data.")
    flags.string("ray_address", None, 'Ray cluster to join; "auto": that of this machine.', "HOST:PORT")


def main(values: Values, arguments: Sequence[str]) -> None:
    """Do what the first argument says."""
    verb, *rest = arguments or ("",)
    if verb not in _DO:
        close = difflib.get_close_matches(verb, _DO, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"give one of {', '.join(_DO)}."
        raise UserError(f"{verb!r} is nothing that can be done with data; {hint}")
    _DO[verb](values, rest)


def _corpus_of(values: Values, rest: Sequence[str]) -> "tuple[CorpusConfig, Corpus, Conversations]":
    """The corpus of a config, and how its records become samples."""
    if rest or not values["config"].present:
        raise UserError("Give one config, a file or the name of a shipped one, such as finetune.")
    from gaze_jax.convert.origin import open_corpus_of

    return open_corpus_of(config_of(values))


def _check(values: Values, rest: Sequence[str]) -> None:
    config, corpus, conversations = _corpus_of(values, rest)
    from gaze_jax.corpora.check import check_corpus, summary_lines
    from gaze_jax.corpora.check_page import require_matplotlib, write_report
    from gaze_jax.corpora.measure import forget
    from gaze_jax.infer.progress import progress_bar

    if values.out is not None:
        require_matplotlib()
        cli.make_folder("out", values.out)
    forget(corpus, conversations)  # a run measures again: the media may be others
    with progress_bar("records", len(corpus)) as advance:
        report = check_corpus(corpus, conversations, config, workers=values.workers, advance=advance)
    print("\n".join(summary_lines(report)))
    if values.out is not None:
        write_report(report, values.out)
        print(f"{values.out}/check.html")
    if not report.ok:
        sys.exit(cli.PARTLY)


def _show(values: Values, rest: Sequence[str]) -> None:
    _, corpus, conversations = _corpus_of(values, rest)
    from gaze_jax.corpora.show import sample_lines, show_sample
    from gaze_jax.corpora.shown import shown_sample

    if values.out is None:
        sample = shown_sample(corpus, conversations, values.index)
    else:
        cli.check_writable("out", values.out)
        sample = show_sample(corpus, conversations, values.index, values.out)
    print("\n".join(sample_lines(sample)))


def _prepare(values: Values, sources: Sequence[str]) -> None:
    if len(sources) != 1:
        raise UserError(
            f"Give one corpus to prepare, not {len(sources)}: a file, a folder or a pattern in quotes."
        )
    if values.out is None:
        raise UserError("Give --out, a new folder for the shards.")
    if values.ray_address is not None and values.engine != "ray":
        raise UserError("--ray_address needs --engine=ray; give both, or neither.")
    from gaze_jax.corpora.prepare import prepare
    from gaze_jax.corpora.reading import PROMPT, open_corpus
    from gaze_jax.infer.progress import progress_bar

    prompt = PROMPT if values.prompt is None else values.prompt
    corpus = open_corpus(sources[0], media=values.media, prompt=prompt)
    number = -(-len(corpus) // 10_000) if values.shards is None else values.shards
    with contextlib.ExitStack() as stack:
        advance = stack.enter_context(progress_bar("records", len(corpus)))
        if values.engine == "ray":  # it prints about processes that died, which one sentence says at the end
            stack.enter_context(contextlib.redirect_stdout(stack.enter_context(open(os.devnull, "w"))))
        found = prepare(
            corpus,
            values.out,
            shards=number,
            workers=values.workers,
            bad=values.bad,
            engine=values.engine,
            ray_address=values.ray_address,
            advance=advance,
        )
    for name, why in found.skipped[:_SHOWN]:
        print(f"left out: {name}: {why}", file=sys.stderr)
    if len(found.skipped) > _SHOWN:
        more = len(found.skipped) - _SHOWN
        print(f"left out: {more} more, which {values.out}/corpus.json lists", file=sys.stderr)
    shards = "1 shard" if found.shards == 1 else f"{found.shards} shards"
    print(f"{found.records} records in {shards}: {values.out}")
    cli.exit_partly(len(found.skipped))


_DO = {"check": _check, "show": _show, "prepare": _prepare}
"""What can be done with data."""


def run() -> None:
    """The command."""
    cli.run(main, define_flags, __doc__, arguments=True)


if __name__ == "__main__":
    run()
