"""convert.py and eval.py --compare as a user has them: processes, exit statuses, files."""

import json

import numpy as np
import PIL.Image
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from tests.helpers.checkpoints import CAMBRIAN, QWEN, SIGLIP, checkpoint
from tests.helpers.commands import call, finish, refusals, start

pytestmark = pytest.mark.xdist_group("commands")

GROUPS = 4  # regions of 3x3 tokens


def byte_tokenizer() -> tokenizers.Tokenizer:
    """A token per byte and those of a chat, as Qwen's tokenizer has them."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = tokenizers.Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    return made


@pytest.fixture(scope="module")
def joined(tmp_path_factory):
    where = tmp_path_factory.mktemp("commands")
    llm = checkpoint(where / "llm", QWEN | {"vocab_size": 264})
    byte_tokenizer().save(str(llm / "tokenizer.json"))
    tower = checkpoint(where / "tower", SIGLIP)
    out, err = finish(
        start(
            "convert.py", f"--llm={llm}", f"--vision={tower}", "--gaze_region=2,2", f"--to={where / 'gaze'}"
        )
    )
    return where, out, err


def test_what_is_new_is_said_and_progress_is_shown(joined):
    _, out, err = joined
    assert "new, initialised: projector/linear_1/kernel" in out and "stored but not used" in out
    assert "converting" in err and "Traceback" not in err and "WARNING" not in err


def test_the_way_back(joined):
    where, _, _ = joined
    out, _ = call("convert.py", f"--from={where / 'gaze'}", f"--to={where / 'back'}", "--format=hf")
    assert "written for transformers" in out
    for part, original in (("decoder", "llm"), ("vision", "tower")):
        for path in (where / original).iterdir():
            assert path.read_bytes() == (where / "back" / part / path.name).read_bytes()


def without_tower(tensors):
    """The names of a Cambrian-S whose tower was not trained, and a head that answers do not need."""
    head = {"model.nfp_head.0.bias": np.ones(16, np.float32)}
    return head | {name: values for name, values in tensors.items() if "vision_tower" not in name}


def test_a_whole_model_and_its_tower(joined, tmp_path):
    """convert.py --from --vision, and the sentences where --vision is missing or too much."""
    where, _, _ = joined
    source = checkpoint(tmp_path / "cambrian", CAMBRIAN, without_tower)
    both = (f"--from={source}", f"--vision={where / 'tower'}")
    out, _ = call("convert.py", *both, f"--to={tmp_path / 'gaze'}")
    assert "model: cambrian_qwen" in out and "vision: siglip_vision_model" in out
    assert "1 tensors not converted: nfp_head" in out
    to = f"--to={tmp_path / 'new'}"
    cases = {
        ("convert.py", both[0], to): "does not describe its image tower 'tiny/siglip'",
        ("convert.py", both[1], to): "Give either --from, or both --llm and --vision",
        ("convert.py", *both, to, "--format=hf"): "--vision has no effect with",
    }
    for message, line in zip(cases.values(), refusals(cases), strict=True):
        assert message in line


def test_gaze_is_compared_with_dense(joined, tmp_path):
    where, _, _ = joined
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    PIL.Image.fromarray(pixels).save(tmp_path / "noise.png")
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(json.dumps({"image": "noise.png", "question": "What is it?"}) + "\n")
    out, _ = call(
        "eval.py",
        f"--checkpoint={where / 'gaze'}",
        "--compare=dense",
        f"--prompts={prompts}",
        f"--out={tmp_path / 'out'}",
        f"--gaze_top_ks=1,{GROUPS}",
        "--gaze_select_per=kv_head",
        "--gaze_descriptors=mean",
        "--max_tokens=3",
    )
    report = json.loads((tmp_path / "out" / "compare.json").read_text())
    assert "top-1 agreement" in out and report["command"].startswith("python eval.py --checkpoint=")
    assert "--gaze_top_ks=1,4" in report["command"]
    rows = [(row["descriptor"] or row["strategy"], row["select_per"], row["top_k"]) for row in report["rows"]]
    assert rows == [(way, "kv_head", k) for way in ("mean", "oracle", "random") for k in (1, GROUPS)]
    dense = [row for row in report["rows"] if row["top_k"] == GROUPS]
    assert all(row["kl"] < 1e-5 and row["top1"] == 1 for row in dense)
    picture = PIL.Image.open(tmp_path / "out" / "compare.png")
    assert picture.size[0] > 800 and len(np.unique(np.asarray(picture))) > 50


def test_mistakes_are_one_sentence_and_status_2(joined, tmp_path):
    where, _, _ = joined
    to = f"--to={tmp_path / 'new'}"
    new = (f"--llm={where / 'llm'}", f"--vision={where / 'tower'}", to)
    cases = {
        ("convert.py", "--from=a"): "Give --to, a new directory to write",
        ("convert.py", *new, "--gaze_region=2"): "--gaze_region=2 must be two numbers of tokens",
        ("convert.py", to): "Give either --from, or both --llm and --vision",
        ("convert.py", f"--from={where / 'llm'}", to, "--gaze_top_k=3"): "--gaze_top_k is for a new model",
        ("convert.py", f"--from={where / 'llm'}", to, "--feature_layer=-1"): "is of an image tower",
        ("convert.py", f"--from={where / 'llm'}", to, "--format=hf"): "neither a converted checkpoint",
        (
            "convert.py",
            "--from=nobody/no-such-model@main",
            to,
        ): "is no directory here, and cannot be downloaded",
        ("convert.py", "--llm=a", "--vision=b", to, "--format=hf"): "--format=hf writes a model that exists",
        (
            "convert.py",
            f"--llm={where / 'llm'}",
            f"--vision={where / 'tower'}",
            to,
            "--gaze_top_k=0",
        ): "gaze.top_k=0 must be at least 1",
        ("convert.py", f"--from={where / 'gaze'}", to): "is already converted",
        ("eval.py", f"--checkpoint={where / 'gaze'}"): "--checkpoint has no effect without --compare",
        ("eval.py", "--compare=dense"): "name it with --checkpoint",
        ("eval.py", "--compare=dense", f"--checkpoint={where / 'tower'}"): "is an image tower alone",
        ("eval.py", "--compare=dense", f"--checkpoint={where / 'llm'}"): "is a language model alone",
    }
    for message, line in zip(cases.values(), refusals(cases), strict=True):
        assert message in line
    assert not (tmp_path / "new").exists()
