"""One question about one image, answered by a trained model."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from gaze_jax.core.layout import VisualLayout
from gaze_jax.core.streams import Streams
from gaze_jax.data.pipeline import prompt_length, stack
from gaze_jax.data.processor import Processor, pad_to, process
from gaze_jax.data.sample import Image, Sample, Text
from gaze_jax.data.tokenizer import Tokenizer
from gaze_jax.errors import UserError
from gaze_jax.infer.generate import Generator, Params
from gaze_jax.infer.session import check_sampling
from gaze_jax.models import MLLM, MLLMConfig

_FAMILY = "question"


@dataclasses.dataclass(frozen=True)
class Answer:
    """What the model said and where it looked.

    Attributes:
      text: without the end token.
      pieces: the generated tokens as text, the end token last if it came.
      selected: bool [T, L, Hs, R], the regions that the query emitting each piece attended to; None under
        dense attention.
      visual_entries: visual keys per query, layer and head, a mean over the answer.
    """

    text: str
    pieces: tuple[str, ...]
    selected: np.ndarray | None
    visual_entries: float


def ask(
    config: MLLMConfig,
    params: Params,
    tokenizer: Tokenizer,
    layout: VisualLayout,
    image: np.ndarray,
    question: str,
    *,
    top_k: int | None,
    max_tokens: int = 64,
    temperature: float = 0.0,
    seed: int = 0,
    resize: bool = False,
) -> Answer:
    """Answer a question by free-running cached decoding.

    Args:
      config, params, tokenizer, layout: of the model.
      image: uint8 [height, width, 3].
      question: as the model was trained to read it; a line end is added.
      top_k: regions per query; None is dense attention.
      max_tokens: most tokens to generate; the answer is cut there.
      temperature: 0 is greedy.
      seed: of the sampling.
      resize: squash an image of another size to the tower's.

    Raises:
      UserError: the image does not fit the tower, the question is empty or has a character without a token,
        or a number is out of range.
    """
    if top_k is not None and not 1 <= top_k <= layout.regions:
        raise UserError(f"top_k={top_k} must be between 1 and {layout.regions}, the regions of the image.")
    check_sampling(max_tokens, temperature, seed)
    if not question.strip():
        raise UserError("The question is empty; ask something.")
    sample = Sample(0, (image,), (Image(0), Text(question.strip() + "\n")), _FAMILY)
    try:
        arrays = process(Processor(layout, tokenizer, (_FAMILY,), resize), sample)
    except ValueError as error:
        raise UserError(str(error)) from error
    dense = prompt_length(len(arrays["tokens"]))
    batch = stack([pad_to(arrays, regions=layout.regions, dense=dense, images=1)])
    generator = Generator(MLLM(config), max_tokens, tokenizer.end_id)
    found = jax.device_get(
        generator(
            params,
            jnp.asarray(batch["images"]),
            Streams.from_batch({name: jnp.asarray(value) for name, value in batch.items()}),
            top_k=top_k,
            temperature=temperature,
            seed=seed,
        )
    )
    ids = [int(token) for token in found.tokens[:, 0] if token >= 0]
    said = ids[:-1] if ids[-1] == tokenizer.end_id else ids
    return Answer(
        text=tokenizer.decode(said),
        pieces=tuple(tokenizer.decode([token]) for token in ids),
        selected=None if found.selected is None else found.selected[: len(ids), :, 0],
        visual_entries=float(found.entries.visual[: len(ids), :, 0].mean()),
    )
