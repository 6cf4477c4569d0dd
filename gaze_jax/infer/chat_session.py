"""A conversation with a checkpoint: media and questions in turns, running videos, text as it comes."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from gaze_jax.chat.conversation import conversation_parts
from gaze_jax.chat.messages import TAG, Message, from_llava
from gaze_jax.data.placement import PlacedView
from gaze_jax.data.processor import Processor, process_with_views
from gaze_jax.data.sample import Frames, Image, Sample, Text, Video
from gaze_jax.errors import UserError
from gaze_jax.infer.detokenizer import Detokenizer
from gaze_jax.infer.engine import Engine
from gaze_jax.infer.gaze_options import GazeOptions, check, counted, join, most
from gaze_jax.infer.programs import free_slots_for
from gaze_jax.infer.sampling import SamplingParams
from gaze_jax.infer.token_trace import TokenTrace, pictures_of, trace_of
from gaze_jax.infer.trace import Trace

if TYPE_CHECKING:
    from gaze_jax.infer.sampler import Film, Picture, Sampler

FAMILY = "chat"
_NAME = "The question"

Part = Image | Video | Text


def check_questions(questions: Sequence[str], images: int, videos: int) -> None:
    """Refuse what :class:`ChatSession` would refuse of its questions, before a checkpoint is loaded.

    Args:
      questions: in order. The first may hold a tag ``<image>`` or ``<video>`` for each of the media; without
        any, media come first.
      images, videos: how many there are.

    Raises:
      UserError: there is no question or one is empty, tags and media differ in number, or a later question
        has tags.
    """
    if not questions:
        raise UserError("There is no question; ask one.")
    user_turn(questions[0], range(images), range(videos))
    for question in questions[1:]:
        user_turn(question, (), ())


def user_turn(question: str, images: Sequence[int], videos: Sequence[int]) -> Message:
    """The turn that asks ``question`` and shows these images and videos of the conversation.

    Raises:
      UserError: the question is empty, or its tags and the media differ in number.
    """
    if not TAG.sub("", question).strip():
        raise UserError("The question is empty; ask something.")
    record: dict[str, Any] = {
        "conversations": [{"from": "human", "value": question}],
        "image": ["given"] * len(images),
        "video": ["given"] * len(videos),
    }
    (message,) = from_llava(record, name=_NAME, system=None).messages

    def numbered(item: Any) -> Any:
        if isinstance(item, Image):
            return Image(images[item.index])
        return Video(videos[item.index]) if isinstance(item, Video) else item

    return Message("user", tuple(numbered(item) for item in message.items))


def unused(texts: Sequence[str]) -> str:
    """A character that none of the texts has, from the range that Unicode leaves to private use."""
    taken = set[str]().union(*texts)
    return next(character for character in map(chr, range(0xE000, 0xF900)) if character not in taken)


@dataclasses.dataclass(frozen=True, eq=False)
class StreamChunk:
    """One step of an answer.

    Attributes:
      text: what can be shown now; empty while a character or a stop string is incomplete, and for the token
        that ends it all.
      token: the token as text.
      token_trace: where the query looked that emitted it, if the answer is traced.
    """

    text: str
    token: str
    token_trace: TokenTrace | None


class ChatSession:
    """One conversation on one cache: what was shown and said is never computed again.

    ``ask`` a question, with images and videos or without, then ``stream`` the answer, and so on. Frames of a
    video that is still going on are shown with ``append_frames``, any number of times before a question.

    What was read and said stays as it was, also where the template would show it otherwise by now (Qwen3's
    leaves the reasoning of earlier answers out, and LLaVA-OneVision cuts only an image that is alone into
    tiles).

    Args:
      sampler: who answers.
      system: system prompt, also an empty one; None takes that of the model's style.
      gaze: which regions its queries may select.
      free_slots: tokens that will follow what is shown first. The cache has room for them at least before
        it has to grow.
    """

    def __init__(
        self,
        sampler: "Sampler",
        *,
        system: str | None = None,
        gaze: GazeOptions | None = None,
        free_slots: int = 128,
    ) -> None:
        gaze = GazeOptions() if gaze is None else gaze
        self._sampler, self._gaze_options, self._free_slots = sampler, gaze, free_slots
        self._budget = gaze.budget(sampler.config.gaze.top_k)
        if system is None:
            system = sampler.system
        self._messages: tuple[Message, ...] = () if system is None else (Message("system", system),)
        self._processor = Processor(
            sampler.layout, sampler.tokenizer, (FAMILY,), sampler.family.views, resize=sampler.resize
        )
        self._engine: Engine | None = None
        self._parts: tuple[Part, ...] = ()  # that were read
        self._images: list[np.ndarray] = []
        self._videos: list[Any] = []
        self._running: _Running | None = None
        self._answers, self._waiting = 0, False
        self._question, self._about = "", _About("", (), 0)
        self.views, self.detokenizer, self.token_traces = (), None, []

    views: tuple[PlacedView, ...]
    """Where each view and frame is in the regions that a :class:`TokenTrace` speaks of."""

    detokenizer: Detokenizer | None
    """The last answer."""

    token_traces: list[TokenTrace]
    """Where its tokens looked, if it was traced."""

    @property
    def top_k(self) -> int | float | None:
        """Regions per query, or the fraction of those in sight; None is dense attention."""
        if isinstance(self._budget, int) and self.regions:
            return min(self._budget, self.regions)
        return self._budget

    @property
    def regions(self) -> int:
        """R of the conversation."""
        return 0 if self._engine is None else self._engine.regions

    def _budgets(self) -> list[int | float] | None:
        return None if self._budget is None else [self._budget]

    def _selection(self, engine: Engine) -> Any:
        layers = self._sampler.config.decoder.depth
        return join(engine, [self._gaze_options], self._budgets(), [self.views], layers)

    def _rendered(self, turn: Message) -> tuple[tuple[Part, ...], tuple[Message, ...]]:
        """What follows the last answer, up to the next one, and all turns up to there."""
        one = self._sampler
        mark = unused([turn.text, *(message.text for message in self._messages), one.template.source])
        answered = (Message("assistant", mark),) if self._answers else ()
        messages = (*self._messages, *answered, turn)
        parts = conversation_parts(
            one.template, messages, arrange=one.family.arrange, add_generation_prompt=True
        )
        if not answered:
            return parts, messages
        for number, part in reversed(list(enumerate(parts))):
            if isinstance(part, Text) and mark in part.text:
                tail = part.text.rpartition(mark)[2]
                return (*((Text(tail),) if tail else ()), *parts[number + 1 :]), messages
        raise UserError(
            f"{one.template.name} leaves the last answer out of what follows it, so the conversation cannot "
            "go on from where it is; begin anew."
        )

    def _read(self, parts: Sequence[Part]) -> None:
        """Read parts of the conversation; only their own tokens are computed."""
        one, engine = self._sampler, self._engine
        try:
            known = (*self._parts, *parts)
            sample = Sample(0, tuple(self._images), known, FAMILY, tuple(self._videos))
            arrays, views = process_with_views(
                self._processor,
                sample,
                since=len(self._parts),
                order=0 if engine is None else int(engine.order[0]) + 1,
            )
        except ValueError as error:
            raise UserError(str(error)) from error
        before = self.regions
        shown = tuple(
            dataclasses.replace(view, view=view.view + len(self.views), regions=view.regions + before)
            for view in views
        )
        going_on = any(isinstance(part, Video) and not part.ends for part in parts)
        if engine is None and self._gaze_options.top_k is not None and not going_on:
            regions = len(arrays["visual_src"])
            if 0 < regions < self._gaze_options.top_k:
                raise UserError(
                    f"top_k={self._gaze_options.top_k} must be between 1 and {regions}, the regions of what "
                    "is shown."
                )
        check(self._gaze_options, (*self.views, *shown), one.config.decoder.depth)
        self._check_memory(arrays, self._free_slots if engine is None else 0)
        earlier, self.views = self.views, (*self.views, *shown)
        try:
            if engine is None:
                self._engine = Engine(
                    one.model,
                    one.params,
                    [arrays],
                    free_slots=free_slots_for(self._free_slots),
                    selection=self._selection,
                    mesh=one.mesh,
                )
            else:
                engine.prefill([arrays])
        except BaseException:
            self.views = earlier
            raise
        self._parts = known

    def _check_memory(self, arrays: Mapping[str, np.ndarray], tokens: int) -> None:
        """Refuse what the cache would have no room for with these arrays and as many tokens in it."""
        engine = self._engine
        regions, slots = arrays["visual_src"].shape
        text = len(arrays["tokens"]) + tokens
        visual = int((arrays["visual_src"] >= 0).sum())
        fits = False
        if engine is not None:
            slots = max(slots, engine.slots) if regions else engine.slots
            wide = slots == engine.slots
            fits = wide and text <= engine.free_slots and engine.regions + regions <= engine.capacity
            regions += engine.regions
            text, visual = text + engine.text_length, visual + engine.visual_tokens
        self._sampler.check_memory(rows=1, regions=regions, slots=slots, text=text, visual=visual, there=fits)

    def _refuse_waiting(self) -> None:
        if self._waiting:
            raise UserError("The last question has no answer yet; let it be answered first.")

    def append_frames(self, frames: Frames, *, last: bool = False) -> None:
        """Read more frames of a running video.

        The first frames after a question begin a new video. Regions over several frames
        (``gaze.video_region``) are cut within the frames of one call: give whole slabs.

        Args:
          frames: uint8 [height, width, 3] each.
          last: nothing more of this video will come, so what follows a video is read too.

        Raises:
          UserError: a frame cannot be read, the video has ended, or the last question has no answer yet.
        """
        self._refuse_waiting()
        if not len(frames):
            raise UserError("There are no frames; give at least one.")
        parts: tuple[Part, ...] = ()
        running = self._running
        if running is None:
            number = len(self._videos)
            parts, _ = self._around(self._rendered(user_turn("?", (), (number,)))[0])
            running = _Running(number, parts)
        elif running.ended:
            raise UserError("The video has ended; ask a question before another one begins.")
        shown = self._videos[running.number] if self._running else []
        start, earlier = len(shown), list(self._videos)
        # A decoder may fill its buffer again.
        self._videos[running.number :] = [shown + [np.array(frame) for frame in frames]]
        try:
            self._read((*parts, Video(running.number, start, start + len(frames), ends=last)))
        except BaseException:
            self._videos = earlier
            raise
        self._running = dataclasses.replace(running, ended=last)

    def _around(self, parts: tuple[Part, ...]) -> tuple[tuple[Part, ...], tuple[Part, ...]]:
        """What a turn about a running video has before it, and what after it."""
        at = [isinstance(part, Video) for part in parts].index(True)
        return parts[:at], parts[at + 1 :]

    def ask(self, question: str, *, images: Sequence["Picture"] = (), videos: Sequence["Film"] = ()) -> None:
        """Read a question, and what it shows; only its own tokens are computed.

        Args:
          question: with a tag ``<image>`` or ``<video>`` for each of the media, or without any. After
            :meth:`append_frames` it is about the running video, which ends.
          images, videos: as in ``Sampler.generate``.

        Raises:
          UserError: media or the question cannot be read, tags and media differ in number, it is too much for
            the cache, ``top_k`` is out of range, or the last question has no answer yet.
        """
        self._refuse_waiting()
        if self._running is not None:
            if images or videos:
                raise UserError("A question about a running video shows nothing else; show it afterwards.")
            messages = self._close(question, self._running)
        else:
            pictures, films = self._sampler.read_images(images), self._sampler.read_videos(videos)
            counts = len(self._images), len(self._videos)
            images_at = range(counts[0], counts[0] + len(images))
            videos_at = range(counts[1], counts[1] + len(videos))
            parts, messages = self._rendered(user_turn(question, images_at, videos_at))
            self._images += pictures
            self._videos += films
            try:
                self._read(parts)
            except BaseException:
                del self._images[counts[0] :], self._videos[counts[1] :]
                raise
        self._messages, self._running = messages, None
        self._question, self._waiting = question, True

    def _close(self, question: str, running: "_Running") -> tuple[Message, ...]:
        """Read what follows the running video; returns the turns so far."""
        parts, messages = self._rendered(user_turn(question, (), (running.number,)))
        head, tail = self._around(parts)
        if head != running.head:
            raise UserError(
                f"{self._sampler.template.name} begins a turn otherwise once it knows the question, so no "
                "frames can be read before it; ask with the whole video."
            )
        frames = len(self._videos[running.number])
        end = () if running.ended else (Video(running.number, frames, frames),)
        self._read((*end, *tail))
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
        """Answer the last question, token by token.

        Args:
          max_tokens: most tokens to generate; the answer is cut there.
          temperature, top_p, seed: of :class:`gaze_jax.infer.sampling.SamplingParams`.
          sample_top_k: its ``top_k``; None is 0, all tokens.
          stop: strings that end the answer before them.
          return_trace: also say where each token looked.
          chunked: compute several tokens at once; False yields each as soon as it is there. The tokens are
            the same.

        Raises:
          UserError: a number is out of range, the cache has no room, or the question was answered.
        """
        if not self._waiting or self._engine is None:
            raise UserError("The last question was answered; ask another.")
        sampling = SamplingParams.of([temperature], [top_p], [seed], [sample_top_k])
        one, engine = self._sampler, self._engine
        detokenizer = Detokenizer(one.tokenizer, one.end_ids, stop, max_tokens)
        self._check_memory(_NOTHING, max_tokens)
        self._waiting, self._answers = False, self._answers + 1
        self.detokenizer, self.token_traces = detokenizer, []
        self._about = _About(self._question, self.views, self.regions)
        found = engine.decode(
            max_tokens,
            ends=one.end_ids,
            sampling=sampling,
            return_trace=return_trace and self.regions > 0,
            chunked=chunked and not stop,
            capacity=most(self._budgets(), engine.capacity),
            stopped=lambda: [detokenizer.finish_reason is not None],
        )
        for out in found:
            for step, token in enumerate(out["tokens"][:, 0]):
                if detokenizer.finish_reason is not None:
                    break
                new = detokenizer.add(int(token))
                token_trace = TokenTrace.of(out, step, 0, self.regions) if "attention" in out else None
                if token_trace is not None:
                    self.token_traces.append(token_trace)
                yield StreamChunk(new, detokenizer.pieces[-1], token_trace)

    def trace(self) -> Trace:
        """Where the tokens of the last answer looked, which must have been traced to its end.

        Raises:
          UserError: it was not, or nothing was shown.
        """
        if self.detokenizer is None or not self.token_traces or self.detokenizer.finish_reason is None:
            raise UserError("There is no traced answer about anything shown, so there is no trace of it.")
        one, about = self._sampler, self._about
        top_k = None if self._budget is None else counted(self._budget, about.regions)
        return trace_of(
            self.token_traces,
            question=about.question,
            answer=self.detokenizer.text,
            tokens=self.detokenizer.pieces,
            model=one.name,
            top_k=top_k,
            select_per=one.config.gaze.select_per,
            views=about.views,
            pictures=pictures_of(about.views, self._images, self._videos),
        )


@dataclasses.dataclass(frozen=True)
class _Running:
    """A video that is still going on: its number, what was read before it, and whether its end was read."""

    number: int
    head: tuple[Part, ...]
    ended: bool = False


@dataclasses.dataclass(frozen=True)
class _About:
    """What an answer is about: its question, and what had been shown by then."""

    question: str
    views: tuple[PlacedView, ...]
    regions: int


_NOTHING = {"visual_src": np.zeros((0, 0), np.int32), "tokens": np.zeros(0, np.int32)}
