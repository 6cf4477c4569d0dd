"""A conversation with a checkpoint: questions and media in turns, live video, streamed answers."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from gaze_jax.chat.conversation import Parts
from gaze_jax.chat.messages import Message
from gaze_jax.core.selection import Selection
from gaze_jax.data.placement import PlacedView
from gaze_jax.data.sample import Frames, Video
from gaze_jax.errors import UserError
from gaze_jax.infer.answer import (
    Answer,
    DecodeOptions,
    PendingAnswer,
    Question,
    StreamChunk,
    cap_budget,
    decode_answers,
)
from gaze_jax.infer.engine import Engine
from gaze_jax.infer.gaze_options import Budget, GazeOptions, check, join
from gaze_jax.infer.inputs import Film, Picture
from gaze_jax.infer.loaded import LoadedModel
from gaze_jax.infer.programs import free_slots_for
from gaze_jax.infer.prompt import ProcessedPrompt, split_at_video, user_turn


class ChatSession:
    """One conversation on one cache; earlier turns are never computed again.

    Call ``ask`` with a question and optional images and videos, then ``stream`` the answer, and repeat. To
    show a live video, call ``append_frames`` any number of times before a question.

    Earlier turns stay in the cache as they were processed, even where the template would now render them
    differently. (Qwen3's template drops the reasoning of earlier answers; LLaVA-OneVision tiles an image only
    if it is the only one.)

    Args:
      sampler: the model.
      system: system prompt; "" is an empty one, None is the model family's default.
      gaze: which regions queries may select.
      free_slots: text-stream slots to keep free after the first prompt; the cache grows when they are used.
    """

    def __init__(
        self,
        sampler: LoadedModel,
        *,
        system: str | None = None,
        gaze: GazeOptions | None = None,
        free_slots: int = 128,
    ) -> None:
        gaze = GazeOptions() if gaze is None else gaze
        self._sampler, self._gaze_options, self._free_slots = sampler, gaze, free_slots
        self._budget = gaze.budget(sampler.config.gaze.top_k)
        self._prompts = sampler.prompts
        self._messages = self._prompts.opening(system)
        self._engine: Engine | None = None
        self._parts: Parts = ()  # already prefilled
        self._images: list[np.ndarray] = []
        self._videos: list[Any] = []
        self._running: _Running | None = None
        self._question, self._waiting = "", False
        self._answer: PendingAnswer | None = None
        self.views = ()
        self._prompt: tuple[str | int, ...] = ()  # as in Trace, of all that was prefilled
        self._region_keys = np.zeros(0, np.int32)
        self._recorded: PendingAnswer | None = None  # the last answer that is part of it

    views: tuple[PlacedView, ...]
    """The regions of each view and frame, as a :class:`TokenTrace` numbers them."""

    @property
    def top_k(self) -> Budget | None:
        """Regions per query or, for each layer, per query; or a fraction; None means dense attention."""
        return cap_budget(self._budget, self.regions)

    @property
    def regions(self) -> int:
        """R, the number of regions in the conversation so far."""
        return 0 if self._engine is None else self._engine.regions

    def _selection(self, engine: Engine) -> Selection:
        budgets = None if self._budget is None else [self._budget]
        layers = self._sampler.config.decoder.depth
        return join(engine, [self._gaze_options], budgets, [self.views], layers)

    def _prefill(self, parts: Parts) -> None:
        """Prefill the next parts of the conversation; only their own tokens are computed."""
        sampler, engine = self._sampler, self._engine
        known = (*self._parts, *parts)
        prompt = self._prompts.process(
            known,
            self._images,
            self._videos,
            since=len(self._parts),
            order=0 if engine is None else int(engine.order[0]) + 1,
        )
        before = self.regions
        shown = tuple(
            dataclasses.replace(view, view=view.view + len(self.views), regions=view.regions + before)
            for view in prompt.views
        )
        going_on = any(isinstance(part, Video) and not part.ends for part in parts)
        check(
            self._gaze_options,
            (*self.views, *shown),
            sampler.config.decoder.depth,
            regions=prompt.regions if engine is None and not going_on else None,
        )
        sampler.check_memory([prompt.arrays], self._free_slots if engine is None else 0, engine)
        earlier, self.views = self.views, (*self.views, *shown)
        try:
            if engine is None:
                self._engine = Engine(
                    sampler.model,
                    sampler.params,
                    [prompt.arrays],
                    free_slots=free_slots_for(self._free_slots),
                    selection=self._selection,
                    mesh=sampler.mesh,
                )
            else:
                engine.prefill([prompt.arrays])
        except BaseException:
            self.views = earlier
            raise
        self._parts = known
        self._record(prompt, len(earlier))

    def _record(self, prompt: ProcessedPrompt, views: int) -> None:
        """Add the last answer and what was prefilled after ``views`` views to what the model has read."""
        answered = () if self._answer is None or self._answer is self._recorded else self._answer.read
        self._recorded = self._answer
        tokens = prompt.tokens(self._sampler.tokenizer)
        shifted = [token + views if isinstance(token, int) else token for token in tokens]
        self._prompt = (*self._prompt, *answered, *shifted)
        self._region_keys = np.concatenate([self._region_keys, prompt.region_keys])

    def _refuse_waiting(self) -> None:
        if self._waiting:
            raise UserError("The last question has no answer yet; stream its answer first.")

    def append_frames(self, frames: Frames, *, last: bool = False) -> None:
        """Prefill more frames of a live video.

        The first frames after a question start a new video. Regions over several frames
        (``gaze.video_region``) do not cross calls, so pass a multiple of that many frames.

        Args:
          frames: uint8 [height, width, 3] each.
          last: these are the video's last frames, so the tokens that follow a video are prefilled too.

        Raises:
          UserError: a frame cannot be read, the video has ended, or the last question has no answer yet.
        """
        self._refuse_waiting()
        if not len(frames):
            raise UserError("There are no frames; give at least one.")
        parts: Parts = ()
        running = self._running
        if running is None:
            number = len(self._videos)
            turn = user_turn("?", (), (number,))
            parts, _ = split_at_video(self._prompts.next_turn(self._messages, turn)[0])
            running = _Running(number, parts)
        elif running.ended:
            raise UserError("The video has ended; ask a question before starting another one.")
        shown = self._videos[running.number] if self._running else []
        start, earlier = len(shown), list(self._videos)
        # Frames are copied because a video decoder may reuse its buffer.
        self._videos[running.number :] = [shown + [np.array(frame) for frame in frames]]
        try:
            self._prefill((*parts, Video(running.number, start, start + len(frames), ends=last)))
        except BaseException:
            self._videos = earlier
            raise
        self._running = dataclasses.replace(running, ended=last)

    def ask(
        self,
        question: str,
        *,
        images: Sequence[Picture] | None = None,
        videos: Sequence[Film] | None = None,
    ) -> None:
        """Prefill a question and its media; only their own tokens are computed.

        Args:
          question: text, with one tag ``<image>`` or ``<video>`` per medium or with none (media come first).
            After :meth:`append_frames` the question is about the live video and ends it.
          images, videos: as in ``Sampler.generate``.

        Raises:
          UserError: media or the question cannot be read, tags and media differ in number, the cache is too
            small, ``top_k`` is out of range, or the last question has no answer yet.
        """
        self._refuse_waiting()
        pictures, films = self._sampler.read_images(images), self._sampler.read_videos(videos)
        if self._running is not None:
            if pictures or films:
                raise UserError(
                    "A question about a running video takes no other media; show them afterwards."
                )
            messages = self._close(question, self._running)
        else:
            counts = len(self._images), len(self._videos)
            images_at = range(counts[0], counts[0] + len(pictures))
            videos_at = range(counts[1], counts[1] + len(films))
            turn = user_turn(question, images_at, videos_at)
            parts, messages = self._prompts.next_turn(self._messages, turn)
            self._images += pictures
            self._videos += films
            try:
                self._prefill(parts)
            except BaseException:
                del self._images[counts[0] :], self._videos[counts[1] :]
                raise
        self._messages, self._running = messages, None
        self._question, self._waiting = question, True

    def _close(self, question: str, running: "_Running") -> tuple[Message, ...]:
        """Prefill the text after the live video; returns the turns so far."""
        turn = user_turn(question, (), (running.number,))
        parts, messages = self._prompts.next_turn(self._messages, turn)
        head, tail = split_at_video(parts)
        if head != running.head:
            raise UserError(
                f"{self._sampler.template.name} starts a turn differently once it knows the question, so no "
                "frames can be read before it; ask with the whole video."
            )
        frames = len(self._videos[running.number])
        end = () if running.ended else (Video(running.number, frames, frames),)
        self._prefill((*end, *tail))
        return messages

    def stream(
        self,
        max_tokens: int,
        *,
        temperature: float = 0.0,
        sample_top_k: int | None = None,
        top_p: float = 1.0,
        seed: int = 0,
        stop: Sequence[str] = (),
        return_trace: bool = False,
        chunked: bool = False,
    ) -> Iterator[StreamChunk]:
        """Answer the last question, one token at a time.

        Args:
          max_tokens, temperature, sample_top_k, top_p, seed, stop: see
            :class:`gaze_jax.infer.answer.DecodeOptions`.
          return_trace: also record where each token looked.
          chunked: compute several tokens per call; False yields each token as soon as it is computed. The
            tokens are the same.

        Yields:
          One :class:`StreamChunk` per token.

        Raises:
          UserError: a number is out of range, the cache is too small, or there is no open question.
        """
        if not self._waiting or self._engine is None:
            raise UserError("The last question was answered; ask another.")
        options = DecodeOptions(max_tokens, temperature, sample_top_k, top_p, stop, seed)
        self._sampler.check_memory([], max_tokens, self._engine)
        question = Question(
            self._question,
            self._images,
            self._videos,
            self.views,
            self.regions,
            self._budget,
            self._prompt,
            self._region_keys,
        )
        self._waiting, self._answer = False, PendingAnswer(self._sampler, question, options)
        chunks = decode_answers(
            self._sampler, self._engine, [self._answer], return_trace=return_trace, chunked=chunked
        )
        for _, chunk in chunks:
            yield chunk

    def answer(self) -> Answer:
        """The last answer.

        Raises:
          UserError: there is none, or its stream was not consumed to the end.
        """
        if self._answer is None:
            raise UserError("No question was answered yet; ask one and stream its answer.")
        return self._answer.result()


@dataclasses.dataclass(frozen=True)
class _Running:
    """A live video: its number, the parts before it in its turn, and whether its end was prefilled."""

    number: int
    head: Parts
    ended: bool = False
