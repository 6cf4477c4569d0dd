"""Evaluate a model.

python eval.py --workdir=runs/digits [--samples=1024]
    the newest checkpoint of a run: accuracy, visual entries and routing, against dense attention

python eval.py --checkpoint=ckpt/model --compare=dense [--prompts=prompts.jsonl]
    any checkpoint, without training: how far Gaze moves its dense answers, over top_k, share and descriptor
"""

import dataclasses
import json
import shlex
import sys
from pathlib import Path

from absl import flags

from gaze_jax import cli
from gaze_jax.core.regions import DESCRIPTORS
from gaze_jax.errors import UserError
from gaze_jax.evaluate import compare
from gaze_jax.evaluate.prompts import default_prompts, read_prompts
from gaze_jax.evaluate.run import run
from gaze_jax.infer.sampler import Sampler
from pallas_kernels.spec import SELECT_PER

_WORKDIR = flags.DEFINE_string("workdir", None, "The workdir of a run of train.py.")
_SAMPLES = flags.DEFINE_integer("samples", None, "Questions of each family; default: the config's.")
_COMPARE = flags.DEFINE_enum("compare", None, ["dense"], "Compare Gaze with this way to attend.")
_CHECKPOINT = flags.DEFINE_string("checkpoint", None, "A converted checkpoint, or a Hugging Face directory.")
_CHECK = flags.DEFINE_bool("check", True, "Compare the checkpoint's files with their checksums first.")
_PROMPTS = flags.DEFINE_string("prompts", None, "JSONL of image and question; default: two bundled photos.")
_TOP_KS = flags.DEFINE_list("top_ks", None, "Regions per query; default: powers of two, and all.")
_SELECT_PER = flags.DEFINE_list(
    "shares", list(SELECT_PER), "Who selects: each query head, or each kv head's group."
)
_DESCRIPTORS = flags.DEFINE_list("descriptors", list(DESCRIPTORS), "How a region is described.")
_MAX_TOKENS = flags.DEFINE_integer("max_tokens", 32, "Most tokens of a dense answer.")
_OUT = flags.DEFINE_string("out", "compare", "Folder for compare.json and compare.png.")

_OF_RUNS = (_WORKDIR, _SAMPLES)
_OF_COMPARISONS = (_CHECKPOINT, _CHECK, _PROMPTS, _TOP_KS, _SELECT_PER, _DESCRIPTORS, _MAX_TOKENS, _OUT)


def _top_ks() -> tuple[int, ...] | None:
    if _TOP_KS.value is None:
        return None
    try:
        return tuple(int(top_k) for top_k in _TOP_KS.value)
    except ValueError as error:
        raise UserError(f"--top_ks={','.join(_TOP_KS.value)} must be numbers, such as 1,2,4.") from error


def _compare() -> None:
    """Compare, print the table, write JSON and plot."""
    compare.require_matplotlib()
    if _CHECKPOINT.value is None:
        raise UserError("--compare needs a model: name it with --checkpoint.")
    prompts = default_prompts() if _PROMPTS.value is None else read_prompts(_PROMPTS.value)
    sampler = Sampler.load(_CHECKPOINT.value, check=_CHECK.value is True)
    report = compare.compare(
        dataclasses.replace(sampler, resize=True),
        prompts,
        top_ks=_top_ks(),
        select_per=_SELECT_PER.value or (),
        descriptors=_DESCRIPTORS.value or (),
        max_tokens=_MAX_TOKENS.value or 0,
    )
    report["command"] = shlex.join(["python", *sys.argv])
    print(compare.table(report), flush=True)
    out = Path(_OUT.value or "")
    out.mkdir(parents=True, exist_ok=True)
    (out / "compare.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    compare.plot(report, out / "compare.png")
    print(f"{out / 'compare.json'} and {out / 'compare.png'} hold the same.", flush=True)


def main() -> None:
    """Print the table and write JSON and the picture."""
    if _COMPARE.value is not None:
        cli.refuse_flags(_OF_RUNS, "is of a run's evaluation, not of --compare")
        _compare()
        return
    cli.refuse_flags(_OF_COMPARISONS, "has no effect without --compare=dense")
    if _WORKDIR.value is None:
        raise UserError("Name a run with --workdir, or a model with --checkpoint and --compare=dense.")
    if _SAMPLES.value is not None and _SAMPLES.value < 2:
        raise UserError(
            f"--samples={_SAMPLES.value} must be at least 2: one half chooses the layer to report."
        )
    run(_WORKDIR.value, _SAMPLES.value)


if __name__ == "__main__":
    cli.run(main)
