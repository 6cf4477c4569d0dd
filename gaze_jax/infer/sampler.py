"""Answers of a checkpoint in memory: one call for an answer, or a conversation."""

import dataclasses
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from jax.sharding import Mesh

from gaze_jax.infer.answer import Answer, DecodeOptions, StreamChunk
from gaze_jax.infer.chat_session import ChatSession
from gaze_jax.infer.gaze_options import GazeOptions
from gaze_jax.infer.loaded import Film, LoadedModel, Picture


@dataclasses.dataclass(frozen=True, eq=False)
class Sampler(LoadedModel):
    """A checkpoint in memory that answers; :func:`gaze_jax.load` makes one. Attributes are its base's."""

    def chat(self, **options: Any) -> ChatSession:
        """Begin a conversation; options of :class:`gaze_jax.infer.chat_session.ChatSession`."""
        return ChatSession(self, **options)

    def generate(
        self,
        prompt: str,
        *,
        images: Sequence[Picture] = (),
        video: Film | None = None,
        videos: Sequence[Film] = (),
        system: str | None = None,
        gaze: GazeOptions | None = None,
        max_tokens: int = 64,
        temperature: float = 0.0,
        sample_top_k: int | None = None,
        top_p: float = 1.0,
        stop: Sequence[str] = (),
        seed: int = 0,
        return_trace: bool = False,
        on_text: Callable[[str], Any] | None = None,
    ) -> Answer:
        """Answer one question.

        Args:
          prompt: with a tag ``<image>`` or ``<video>`` for each of the media, or without any: media first.
          images: files, or uint8 [height, width, 3] each.
          video: a file or a folder of frames, sampled as models of this family are shown them; or the
            frames to show, uint8 [height, width, 3] each.
          videos: several such.
          system: system prompt; None is the family's.
          gaze: which regions queries may select; None: as the model is configured.
          max_tokens: most tokens of the answer.
          temperature: 0 takes the likeliest token.
          sample_top_k: draw from the so many likeliest tokens; None or 0 is all. The regions to select are
            ``GazeOptions.top_k``.
          top_p: draw from the likeliest of those tokens that reach this probability together.
          stop: strings that end the answer.
          seed: of the drawing.
          return_trace: record where every token looked; costs as much as dense attention.
          on_text: called with every piece of text as soon as it is there. The answer is the same.

        Raises:
          UserError: media or the prompt cannot be read, a number is out of range, or it does not fit memory.
        """
        DecodeOptions(
            max_tokens, temperature, sample_top_k, top_p, stop, seed
        )  # refuses before anything is computed
        chat = self.chat(system=system, gaze=gaze, free_slots=max_tokens)
        films = [*(() if video is None else (video,)), *self.read_videos(videos)]
        chat.ask(prompt, images=images, videos=films)
        steps = chat.stream(
            max_tokens,
            temperature=temperature,
            sample_top_k=sample_top_k,
            top_p=top_p,
            stop=stop,
            seed=seed,
            return_trace=return_trace,
            chunked=on_text is None,
        )
        return collect_answer(chat, steps, on_text)


def load(
    directory: str | os.PathLike[str], *, mesh: Mesh | None = None, check: bool = True, **gaze: Any
) -> Sampler:
    """Load a checkpoint to ask: converted, a Hugging Face directory as it is, or a run of train.py.

    Args:
      directory: of the checkpoint.
      mesh: where parameters go and over which batches are split (``parallel.mesh.make_mesh``); None is one
        device.
      check: compare a converted checkpoint with its checksums.
      **gaze: fields of ``GazeConfig`` to change, such as ``select_per="kv_head"`` or ``visual_dtype="int8"``.

    Raises:
      UserError: it is damaged, has no image tower, lacks its tokenizer, or a field is out of range.
    """
    return Sampler.load(directory, mesh=mesh, check=check).with_gaze(**gaze)


def collect_answer(
    chat: ChatSession, steps: Iterator[StreamChunk], on_text: Callable[[str], Any] | None = None
) -> Answer:
    """Take an answer to its end."""
    for step in steps:
        if on_text is not None and step.text:
            on_text(step.text)
    return chat.answer()
