"""Images and videos through whole converted models: the same pixels, the same tokens, the same logits."""

import dataclasses
import functools
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gaze_jax.convert.load import load, one_device, place
from gaze_jax.convert.run import plan_directory
from gaze_jax.core.selection import Selection
from gaze_jax.core.streams import Kind, Streams
from gaze_jax.corpora.phrases import build_tokenizer
from gaze_jax.data.padding import pad_to
from gaze_jax.data.pipeline import stack
from gaze_jax.data.processor import Processor, process
from gaze_jax.data.sample import Image, Sample, Text, Video
from gaze_jax.families import get_family
from gaze_jax.models import MLLM
from tests.helpers import hf
from tests.helpers.engines import logits, make_engine, row
from tests.helpers.views import cambrian_canvas, cambrian_grid, image_views, video_views

skimage_data = pytest.importorskip("skimage.data")
torch = pytest.importorskip("torch")
onevision = pytest.importorskip("transformers.models.llava_onevision.image_processing_pil_llava_onevision")

pytestmark = pytest.mark.xdist_group("parity")

PHOTO = skimage_data.astronaut()
SQUARE, WIDE, TALL, LARGE = PHOTO[:48, :48], PHOTO[100:150, 50:190], PHOTO[30:190, 60:115], PHOTO[:300, :280]
FRAMES = np.stack([PHOTO[20 * t : 20 * t + 60, 90:170] for t in range(5)])
ASK, MORE = Text("Which digit is in row 1, column 2?\n"), Text("And in row 2?\n")

SCENES = {  # images, videos, what is shown
    "text": ((), (), (ASK, MORE)),
    "square": ((SQUARE,), (), (ASK, Image(0), MORE)),
    "wide": ((WIDE,), (), (ASK, Image(0), MORE)),
    "tall": ((TALL,), (), (ASK, Image(0), MORE)),
    "large": ((LARGE,), (), (ASK, Image(0), MORE)),
    "two images": ((WIDE, SQUARE), (), (ASK, Image(0), Image(1), MORE)),
    "interleaved": ((TALL, WIDE), (), (ASK, Image(0), MORE, Image(1), ASK)),
    "video": ((), (FRAMES,), (ASK, Video(0), MORE)),
    "video and image": ((WIDE,), (FRAMES,), (ASK, Image(0), Text("Now a video.\n"), Video(0), MORE)),
}

IMAGE_ID, VIDEO_ID = 300, 301

keep: list[tempfile.TemporaryDirectory] = []


@functools.cache
def loaded(name: str):
    keep.append(where := tempfile.TemporaryDirectory())
    directory = Path(where.name) / name
    if name.startswith("cambrian"):
        extra = {"anyres_max_subimages": 6} if name == "cambrian" else {"image_aspect_ratio": "pad"}
        hf.save_cambrian(directory, si_token_len=25, miv_token_len=9, **extra)
        hf.save_tower("llava_onevision_penultimate", directory / "tower")
        return place(plan_directory(directory, vision=directory / "tower"), one_device())
    return load(hf.save(name, directory), one_device())


def scene(name: str) -> Sample:
    images, videos, parts = SCENES[name]
    return Sample(0, images, parts, "a", videos)


def arrays_of(config, sample: Sample, **fields):
    processor = Processor(
        dataclasses.replace(config.layout, **fields),
        build_tokenizer(),
        ("a",),
        get_family(config.views.style).views,
    )
    return process(processor, sample)


@functools.cache
def forward(config):
    return jax.jit(
        lambda params, images, streams, top_k: MLLM(config).apply(
            {"params": params}, images, streams, Selection(top_k)
        )[0]
    )


def ours(found, arrays, config=None, top_k=None) -> np.ndarray:
    """float32 [S, V]; padded to few shapes, so that few compile."""
    sizes = {"regions": 24, "text": 120, "images": 12, "slots": 42}
    batch = {name: jnp.asarray(a) for name, a in stack([pad_to(arrays, **sizes)]).items()}
    budget = None if top_k is None else jnp.int32(top_k)
    run = forward(config or found.config)
    return np.asarray(run(found.params, batch["images"], Streams.from_batch(batch), budget))[0]


def close(found, arrays, theirs: np.ndarray) -> None:
    """Logits of every text token and newline against those of the spliced sequence [N, V]."""
    got = ours(found, arrays)[: len(arrays["tokens"])]
    orders = [arrays["visual_order"][arrays["visual_src"] >= 0], arrays["text_order"]]
    assert sorted(np.concatenate(orders)) == list(range(len(theirs))), "as long as the original's sequence"
    np.testing.assert_allclose(got, theirs[arrays["text_order"]], atol=1e-4, rtol=0)
    assert np.abs(theirs).max() > 1  # or 1e-4 would mean little


def splice(arrays, sample: Sample) -> list[int]:
    """Token ids of the whole sequence, every visual token and newline as its placeholder."""
    text = arrays["kind"] == Kind.TEXT
    length = 1 + max(arrays["visual_order"].max(initial=-1), arrays["text_order"].max())
    ids = np.full(length, -1)
    ids[arrays["text_order"][text]] = arrays["tokens"][text]
    kinds = iter(
        [IMAGE_ID if isinstance(p, Image) else VIDEO_ID for p in sample.parts if not isinstance(p, Text)]
    )
    placeholder, inside = None, False
    for i, token in enumerate(ids):
        if token < 0 and not inside:
            placeholder = next(kinds)
        inside = token < 0
        ids[i] = placeholder if inside else token
    return ids.tolist()


def pixels(size: int, canvases: list[list[int]]) -> onevision.LlavaOnevisionImageProcessorPil:
    """transformers' processor with the settings of the published checkpoints."""
    half = [0.5, 0.5, 0.5]
    return onevision.LlavaOnevisionImageProcessorPil(
        size={"height": size, "width": size}, image_grid_pinpoints=canvases, image_mean=half, image_std=half
    )


def llava_logits(name: str, arrays, sample: Sample) -> np.ndarray:
    """transformers' logits [N, V] for the sample, its own processors preparing the pixels."""
    model = hf.model(name)
    size = model.config.vision_config.image_size
    inputs = {}
    if sample.images:
        found = pixels(size, model.config.image_grid_pinpoints)([list(sample.images)], return_tensors="pt")
        inputs |= {key: found[key] for key in ("pixel_values", "image_sizes", "batch_num_images")}
        inputs["batch_num_images"] = torch.as_tensor(inputs["batch_num_images"])
    if sample.videos:
        squash = pixels(size, [[size, size]])
        # The base view of an image is what the video processor makes of a frame.
        frames = [squash([[frame]], return_tensors="pt")["pixel_values"][0, 0] for frame in sample.videos[0]]
        inputs["pixel_values_videos"] = torch.stack(frames)[None]
    ids = torch.tensor([splice(arrays, sample)])
    with torch.no_grad():
        return model(ids, **inputs).logits[0].numpy()


@pytest.mark.parametrize(
    ("model", "name"),
    [
        *(("llava_onevision", name) for name in SCENES),
        *(("llava_onevision_max_1", name) for name in ("wide", "large")),
        *(("llava_onevision_odd", name) for name in ("square", "video")),
    ],
)
def test_llava_onevision(model, name):
    """Every scene by the published rule; with a limit that shrinks tile grids; on a grid of odd side."""
    found = loaded(model)
    arrays = arrays_of(found.config, scene(name))
    close(found, arrays, llava_logits(model, arrays, scene(name)))


def test_a_tile_grid_was_shrunk():
    """The scene that is there for it does it."""
    grids = [
        image_views(loaded(f"llava_onevision{rule}").config.layout, LARGE, alone=True)
        for rule in ("", "_max_1")
    ]
    assert grids[0].views[1].pool_indices.size > grids[1].views[1].pool_indices.size


def cambrian_embeddings(layout, sample: Sample) -> torch.Tensor:
    """[N, M] of the spliced sequence, from transformers' parts, written from what Cambrian-S's code does."""
    model = hf.model("llava_onevision_penultimate").model
    tokenizer = build_tokenizer()
    alone = sum(isinstance(part, Image) for part in sample.parts) == 1
    side, frame_side = layout.views.image_side, layout.views.frame_side

    def tokens(view) -> torch.Tensor:
        pixels = torch.from_numpy(view.images.astype(np.float32) / 127.5 - 1).permute(0, 3, 1, 2)
        hidden = model.vision_tower(pixels, output_hidden_states=True).hidden_states[-2]
        return model.multi_modal_projector(hidden)

    def grid(view, side, tiles, image) -> torch.Tensor:
        return cambrian_grid(tokens(view), side, tiles, image.shape[:2], model.image_newline)

    pieces = []
    for part in sample.parts:
        if isinstance(part, Text):
            ids = torch.tensor(tokenizer.encode(part.text)[0])
            pieces.append(model.language_model.embed_tokens(ids))
        elif isinstance(part, Video):
            video = sample.videos[part.index]
            for frame, view in zip(video, video_views(layout, video).views, strict=True):
                pieces.append(grid(view, frame_side, (1, 1), frame))
        else:
            image = sample.images[part.index]
            views = image_views(layout, image, alone=alone).views
            pieces.append(grid(views[0], side, (1, 1), image))
            if alone and layout.views.canvases:
                wide, tall = cambrian_canvas(image.shape[:2], layout.image_size, 6)
                tiles = tall // layout.image_size, wide // layout.image_size
                pieces.append(grid(views[1], side, tiles, image))
    return torch.cat(pieces)


@pytest.mark.parametrize(
    ("model", "name"),
    [*(("cambrian", name) for name in SCENES), *(("cambrian_pad", name) for name in ("square", "tall"))],
)
def test_cambrian_s(model, name):
    """Every scene, with tiles and without, tokens pooled from 6 to 5 a side and frames to 3."""
    found = loaded(model)
    arrays = arrays_of(found.config, scene(name))
    whole = hf.model("llava_onevision_penultimate")
    with torch.no_grad():
        x = cambrian_embeddings(found.config.layout, scene(name))
        hidden = whole.model.language_model(inputs_embeds=x[None]).last_hidden_state
        theirs = whole.lm_head(hidden)[0].numpy()
    close(found, arrays, theirs)


@pytest.mark.long  # tests/infer/test_engine.py, test_chat_session.py
@pytest.mark.parametrize(
    ("model", "name"),
    [("llava_onevision", "wide"), pytest.param("cambrian", "video", marks=pytest.mark.long)],
)
def test_several_turns_with_the_cache_equal_one_pass(model, name):
    """An answer and a second question after it, read with the cache: the logits of the whole in one pass."""
    found, sample = loaded(model), scene(name)
    rows = arrays_of(found.config, sample)
    engine = make_engine(rows, config=found.config, params=found.params, budgets=None, free_slots=60)
    turns = (Text("7<|im_end|>"), MORE, Text("3<|im_end|>"))
    for turn in turns:
        engine.prefill([row(turn, config=found.config, order=int(engine.order[0]) + 1)])
        sample = dataclasses.replace(sample, parts=(*sample.parts, turn))
        whole = arrays_of(found.config, sample)
        last = ours(found, whole)[len(whole["tokens"]) - 1]
        np.testing.assert_allclose(logits(engine)[0], last, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("model", "fields"),
    [
        pytest.param("llava_onevision", {}, marks=pytest.mark.long),
        ("llava_onevision", {"video_region": (3, 2, 2)}),
        pytest.param("cambrian", {"newlines": "region"}, marks=pytest.mark.long),
        pytest.param("cambrian", {"newlines": "region", "video_region": (3, 2, 2)}, marks=pytest.mark.long),
    ],
    ids=str,
)
def test_all_regions_equal_dense_attention(model, fields):
    """Invariant 1 on tiles, frames, routed newlines and slabs of frames: nothing is lost or seen twice."""
    found = loaded(model)
    config = dataclasses.replace(found.config, gaze=dataclasses.replace(found.config.gaze, **fields))
    arrays = arrays_of(config, scene("video and image"))
    dense, every = ours(found, arrays, config), ours(found, arrays, config, 24)
    rows = len(arrays["tokens"])
    # A region is routed to when it is complete; a text token sees all of what came before it.
    text = arrays["kind"] == Kind.TEXT
    np.testing.assert_allclose(every[:rows][text], dense[:rows][text], atol=1e-4, rtol=0)
    few = ours(found, arrays, config, 2)
    assert np.abs(few[:rows][text] - dense[:rows][text]).max() > 1e-2


@pytest.mark.parametrize(
    "fields", [{"newlines": "region"}, {"video_region": (3, 2, 2)}, {"video_region": (2, 1, 3)}]
)
def test_how_regions_are_cut_changes_nothing_under_dense_attention(fields):
    """Newlines among the visual tokens and slabs of frames are storage, not meaning."""
    found, sample = loaded("cambrian"), scene("video and image")
    plain, cut = (arrays_of(found.config, sample, **each) for each in ({}, fields))
    assert not np.array_equal(plain["visual_order"], cut["visual_order"])

    def text(arrays):
        return ours(found, arrays)[: len(arrays["tokens"])][arrays["kind"] == Kind.TEXT]

    np.testing.assert_allclose(text(cut), text(plain), atol=1e-4, rtol=0)
