"""The sampler: load a checkpoint, generate an answer or start a chat."""

import dataclasses
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypedDict, Unpack

from jax.sharding import Mesh

from gaze_jax.infer.answer import Answer, DecodeOptions, StreamChunk
from gaze_jax.infer.chat_session import ChatSession
from gaze_jax.infer.compile_cache import keep_programs, report_compiles
from gaze_jax.infer.gaze_options import GazeOptions
from gaze_jax.infer.inputs import Film, Picture, as_video
from gaze_jax.infer.loaded import LoadedModel, check_gaze_fields


class _ChatOptions(TypedDict, total=False):
    system: str | None
    gaze: GazeOptions | None
    free_slots: int


@dataclasses.dataclass(frozen=True, eq=False)
class Sampler(LoadedModel):
    """A checkpoint in memory that answers questions; create one with :func:`gaze_jax.load`.

    Its attributes are those of :class:`gaze_jax.infer.loaded.LoadedModel`.
    """

    def chat(self, **options: Unpack[_ChatOptions]) -> ChatSession:
        """Start a conversation; takes the options of :class:`gaze_jax.infer.chat_session.ChatSession`."""
        return ChatSession(self, **options)

    def generate(
        self,
        prompt: str,
        *,
        images: Sequence[Picture] | None = None,
        video: Film | None = None,
        videos: Sequence[Film] | None = None,
        system: str | None = None,
        gaze: GazeOptions | None = None,
        max_tokens: int = 64,
        temperature: float = 0.0,
        sample_top_k: int | None = None,
        top_p: float = 1.0,
        stop: Sequence[str] | None = None,
        seed: int = 0,
        return_trace: bool = False,
        on_text: Callable[[str], object] | None = None,
    ) -> Answer:
        """Answer one question.

        Args:
          prompt: the question, with one tag ``<image>`` or ``<video>`` per medium or with none (media come
            first).
          images: a list; each a path, the bytes of a file, a file opened for reading bytes, an image of
            Pillow, or uint8 [height, width, 3].
          video: a file in one of these forms or the path of a folder of frames, sampled by the model family's
            convention; or the frames themselves, uint8 [height, width, 3] each or images of Pillow.
          videos: a list of videos; ``video`` comes before them.
          system: system prompt; None takes the model family's default.
          gaze: which regions queries may select; None takes the model's configuration.
          max_tokens: maximum number of tokens in the answer.
          temperature: sampling temperature; 0 is greedy.
          sample_top_k: draw from the k most likely tokens; None or 0 means all. (``GazeOptions.top_k`` is the
            number of regions.)
          top_p: then draw from the most likely tokens whose probabilities add up to this.
          stop: strings that end the answer.
          seed: seed of the sampling.
          return_trace: record where each token looked; costs as much as dense attention.
          on_text: called with each piece of text as soon as it is decoded; does not change the answer.

        Raises:
          UserError: media or the prompt cannot be read, a number is out of range, or memory is too small.
        """
        # Checks the numbers before anything is computed.
        stop = () if stop is None else stop
        DecodeOptions(max_tokens, temperature, sample_top_k, top_p, stop, seed)
        chat = self.chat(system=system, gaze=gaze, free_slots=max_tokens)
        first = [] if video is None else [as_video(video, self.family.frames, "video")]
        films = [*first, *self.read_videos(videos)]
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
    """Load a checkpoint: converted, a Hugging Face directory as it is, or a run of train.py.

    Compiled programs are kept in ``~/.cache/gaze_jax``, unless JAX is configured with another folder.

    Args:
      directory: the checkpoint's directory, or an id on the Hugging Face Hub: "organisation/name@revision".
      mesh: devices for the parameters and the batches (``parallel.mesh.make_mesh``); None means one device.
      check: verify the checksums of a converted checkpoint.
      **gaze: fields of ``GazeConfig`` to set, such as ``select_per="kv_head"`` or ``visual_dtype="int8"``.

    Raises:
      UserError: it is damaged, has no image tower, lacks its tokenizer, or a field is out of range.
    """
    check_gaze_fields(gaze)  # before minutes of loading
    keep_programs()
    report_compiles()
    return Sampler.load(directory, mesh=mesh, check=check).with_gaze(**gaze)


def collect_answer(
    chat: ChatSession, steps: Iterator[StreamChunk], on_text: Callable[[str], object] | None = None
) -> Answer:
    """Consume an answer's stream, calling ``on_text`` with each piece of text; returns the answer."""
    for step in steps:
        if on_text is not None and step.text:
            on_text(step.text)
    return chat.answer()
