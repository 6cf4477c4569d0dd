"""Fine-tuning as a user does it: check the data, train, stop, continue, ask, and convert back."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

import gaze_jax
from gaze_jax.convert.load import load, one_device
from gaze_jax.core.selection import Selection
from gaze_jax.core.streams import text_streams
from gaze_jax.models import MLLM
from tests.helpers import hf, multimodal
from tests.helpers.checkpoints import QWEN, checkpoint
from tests.helpers.finetune import Commands, write_generated

pytestmark = pytest.mark.xdist_group("commands")

MODEL = ("--config.model.gaze.region=(2,2)", "--config.model.gaze.top_k=2")
TRAIN = (
    "--config.num_workers=0",
    "--config.checkpoint_every=2",
    "--config.log_every=1",
    "--config.batch_size=2",
    "--config.optimizer.learning_rate=1e-3",
    "--config.data.max_frames=4",
    "--config.data.row.text=64",
    "--config.data.row.regions=48",
    "--config.data.row.images=5",
    "--config.model.remat=False",
)
ASK = ("--question=What is this?", "--max_tokens=6", "--temperature=0")


@pytest.fixture(scope="module")
def where(tmp_path_factory):
    return tmp_path_factory.mktemp("finetune")


@pytest.fixture(scope="module")
def gaze(where):
    commands = Commands(where / "commands")
    yield commands
    commands.close()


@pytest.fixture(scope="module")
def corpus(where):
    return write_generated(where / "corpus")


@pytest.fixture(scope="module")
def source(where):
    """A checkpoint, which is not touched; a run starts from a copy."""
    return multimodal.write("llava_onevision", where / "llava")


def flags(source, corpus):
    return (f"--config.init_from={source}", f"--config.data.path={corpus}", *MODEL)


def metrics(run):
    return (run / "metrics.jsonl").read_bytes()


def losses(run):
    return [json.loads(line)["loss"] for line in metrics(run).splitlines()]


@pytest.fixture(scope="module")
def runs(where, gaze, source, corpus):
    """Two runs of the same four steps. One was stopped after two, and its checkpoint taken away."""
    copy, whole, stopped = shutil.copytree(source, where / "copy"), where / "whole", where / "stopped"
    command = ("train", "--config=finetune", *flags(copy, corpus), *TRAIN, "--config.steps=4")
    outs = gaze.together(
        ((*command, f"--workdir={whole}"), 0),
        ((*command, f"--workdir={stopped}"), 2),
        (("rename", copy, where / "gone"), 0),
        ((*command, f"--workdir={stopped}"), 0),
    )
    first, second, _, last = (out for out, _ in outs)
    assert f"from {copy}\n" in first and "25 of 25 records in" in first
    assert "Stopped by SIGTERM after step 2" in second and "step 3/4" not in second
    assert "from step 2\n" in last and f"from {copy}\n" not in last and "step 2/4" not in last
    return where / "whole", where / "stopped"


@pytest.fixture(scope="module")
def exported(where, gaze, runs):
    _, run = runs
    out, _ = gaze("convert", f"--from={run}", f"--to={where / 'export'}", "--format=hf")
    assert "written for transformers" in out
    return where / "export"


def test_a_corpus_is_checked_and_shown(gaze, source, corpus, tmp_path):
    out, _ = gaze("data", "check", "finetune", *flags(source, corpus))
    assert out.startswith("25 of 25 records can be trained on.\n")
    page = tmp_path / "3.html"
    out, _ = gaze("data", "show", "finetune", *flags(source, corpus), "--index=3", f"--out={page}")
    assert "(id 'n3')" in out and "3.png" in out and "« \nA cat of colour 3.<|im_end|>»" in out
    assert page.read_text().startswith("<!doctype html>")
    out, _ = gaze("data", "show", "finetune", *flags(source, corpus), "--index=24")
    assert "film.gif" in out


def test_a_stopped_run_continues_in_the_same_bits_without_its_checkpoint(runs):
    whole, stopped = runs
    first, *_, last = losses(whole)
    assert last < first
    assert metrics(stopped) == metrics(whole)


def test_an_export_has_the_files_of_its_source(exported, source):
    names = {path.name for path in source.iterdir()}
    assert {"chat_template.jinja", "tokenizer.json", "preprocessor_config.json"} < names
    assert {path.name for path in exported.iterdir()} == names | {"gaze.json"}
    for name in names - {"model.safetensors"}:
        assert (exported / name).read_bytes() == (source / name).read_bytes(), name
    weights = "model.safetensors"
    assert (exported / weights).read_bytes() != (source / weights).read_bytes(), "it was trained"


@pytest.mark.long  # tests/convert/test_runs.py has exports of a run, test_generate_command.py answers
def test_a_run_and_its_export_answer_alike(gaze, runs, exported, where):
    picture = f"--image={where / 'corpus' / '5.png'}"
    of_run, of_export = (
        gaze("generate", f"--checkpoint={path}", picture, *ASK)[0] for path in (runs[1], exported)
    )
    assert of_run.strip() and of_run == of_export


LORA = (
    "--config.lora.rank=4",
    "--config.lora.alpha=16.0",
    "--config.lora.modules=('q_proj','o_proj','up_proj')",
    "--config.average_decay=0.9",
    "--config.optimizer.part_rates.projector=0.5",
    "--config.optimizer.part_rates.newline=0.25",
    "--config.optimizer.part_rates.decoder=4.0",
)


@pytest.fixture(scope="module")
def adapted(gaze, where, source, corpus):
    """A run that trains adapters and was stopped, and its export."""
    run, export = where / "adapters", where / "adapted"
    command = ("train", "--config=finetune", *flags(source, corpus), *TRAIN, *LORA, "--config.steps=3")
    outs = gaze.together(
        ((*command, f"--workdir={run}"), 2),
        ((*command, f"--workdir={run}"), 0),
        (("convert", f"--from={run}", f"--to={export}", "--format=hf"), 0),
    )
    (first, _), (second, _), (last, _) = outs
    assert "Stopped by SIGTERM after step 2" in first and "from step 2\n" in second
    assert "written for transformers" in last
    return run, export


@pytest.mark.long  # tests/train/test_lora.py has a run that is resumed, and what is read of it
def test_adapters_are_exported_in_their_kernels(adapted, source):
    """Of a run with three learning rates and an average; transformers gives the same logits of a text."""
    run, export = adapted
    before, after = (load_file(folder / "model.safetensors") for folder in (source, export))
    moved = {name for name in before if not np.array_equal(before[name], after[name])}
    assert before.keys() == after.keys() and len(moved) == 3 * hf.TEXT["num_hidden_layers"] + 4 + 1
    for name in moved:
        modules = ("self_attn.q_proj.weight", "self_attn.o_proj.weight", "mlp.up_proj.weight")
        kernel = "language_model" in name and name.endswith(modules)
        assert kernel or "multi_modal_projector" in name or "image_newline" in name, name
    found, tokens = load(run, one_device()), np.arange(40).reshape(2, 20) * 7
    streams = text_streams(jnp.asarray(tokens), jnp.ones(tokens.shape, bool))
    ours = jax.jit(lambda p: MLLM(found.config).apply({"params": p}, None, streams, Selection())[0])
    theirs = []
    for folder in (export, source):
        model = hf.transformers.LlavaOnevisionForConditionalGeneration.from_pretrained(folder)
        with hf.torch.no_grad():
            theirs.append(model(hf.torch.tensor(tokens)).logits.numpy())
    np.testing.assert_allclose(ours(found.params), theirs[0], rtol=0, atol=1e-4)
    assert np.abs(theirs[0] - theirs[1]).max() > 0.01, "adapters change the answer"


@pytest.mark.long  # both sides run with images
def test_adapters_are_verified_stage_by_stage(gaze, adapted, tmp_path):
    out, _ = gaze("convert", f"--from={adapted[0]}", f"--to={tmp_path / 'hf'}", "--format=hf", "--verify")
    assert "logits" in out and "written for transformers" in out


@pytest.mark.long  # tests/train/test_distillation.py has one of a model of digits
def test_a_converted_checkpoint_is_taught_gaze(gaze, where, source, corpus):
    """From a Hugging Face directory: converted, distilled, stopped, continued, exported, asked."""
    converted, whole, stopped = where / "converted", where / "taught", where / "taught_stopped"
    gaze("convert", f"--from={source}", f"--to={converted}")
    taught = ("train", "--config=gazify", *flags(converted, corpus), *TRAIN, "--config.steps=4")
    (first, _), (_, _), (last, _) = gaze.together(
        ((*taught, f"--workdir={whole}"), 0),
        ((*taught, f"--workdir={stopped}"), 2),
        ((*taught, f"--workdir={stopped}"), 0),
    )
    assert f"from {converted}; new: context\n" in first and "from step 2\n" in last
    assert metrics(stopped) == metrics(whole)
    for step, row in enumerate(map(json.loads, metrics(whole).splitlines()), start=1):
        assert row["step"] == step and row["kl"] > 0 and row["region_kl"] > 0
    run, reference = load(whole, one_device()), load(converted, one_device())
    for part, same in {"vision": True, "decoder": False, "projector": False}.items():
        pairs = zip(jax.tree.leaves(run.params[part]), jax.tree.leaves(reference.params[part]), strict=True)
        assert all(np.array_equal(a, b) for a, b in pairs) == same, part
    export = where / "taught_export"
    gaze("convert", f"--from={whole}", f"--to={export}", "--format=hf")
    hf.transformers.LlavaOnevisionForConditionalGeneration.from_pretrained(export)
    picture = f"--image={where / 'corpus' / '5.png'}"
    answers = [gaze("generate", f"--checkpoint={path}", picture, *ASK)[0] for path in (stopped, export)]
    assert answers[0].strip() and answers[0] == answers[1]


@pytest.mark.long  # a minute of compiling
def test_new_context_tokens_are_said_and_exported(gaze, corpus, tmp_path):
    """Cambrian-S, whose tower lies elsewhere."""
    source = multimodal.write("cambrian_s", tmp_path / "cambrian")
    run, export = tmp_path / "run", tmp_path / "export"
    context = "--config.model.gaze.context_tokens=2"
    steps = ("--config.steps=2", f"--workdir={run}")
    out, _ = gaze("train", "--config=finetune", *flags(source, corpus), *TRAIN, context, *steps)
    assert f"from {source}; new: context\n" in out
    gaze("convert", f"--from={run}", f"--to={export}", "--format=hf")
    tensors = load_file(export / "gaze.safetensors")
    (name,) = (name for name in tensors if "context" in name)
    assert tensors[name].shape == (2, 64) and tensors[name].any()
    picture = corpus.replace("all.jsonl", "5.png")
    answer = gaze_jax.load(str(export)).generate("What is this?", images=[picture], max_tokens=6)
    out, _ = gaze("generate", f"--checkpoint={run}", f"--image={picture}", *ASK)
    assert out == answer.text + "\n"


def test_mistakes_are_one_sentence(gaze, runs, source, corpus, tmp_path):
    train = ("train", "--config=finetune", f"--workdir={tmp_path / 'new'}")
    init, path, *_ = flags(source, corpus)
    text = checkpoint(tmp_path / "text", QWEN)
    cases = {
        "so a checkpoint must have it: name one in init_from": (*train, path),
        "data.path is empty; name the corpus to train on": (*train, init, *MODEL),
        f"init_from={text} is a language model alone; give a multimodal checkpoint": (
            *train,
            f"--config.init_from={text}",
            path,
        ),
        "The run is on a corpus, which has no test scenes; ask it with": ("eval", f"--workdir={runs[0]}"),
    }
    for sentence, call in cases.items():
        assert sentence in gaze.refusal(*call)
    assert not (tmp_path / "new").exists()
