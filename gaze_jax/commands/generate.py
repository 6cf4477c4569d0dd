"""Ask a model about images and videos, and see where every token of the answer looked.

gaze-jax generate --checkpoint=ckpt/llava --image=street.jpg --question="What is this?" --out=answer.html
    any multimodal checkpoint: converted, an unchanged Hugging Face directory, or a run of train.py. --image,
    --video and --question may be repeated: further questions continue the conversation. So may --out: .html
    is the viewer, .png a sheet, .mp4 a clip, .gaze the trace itself (gaze-jax view)

gaze-jax generate --checkpoint=ckpt/llava --questions=questions.jsonl --answers=answers.jsonl --traces=looked
    many questions, one JSON object per line, answered in batches; gaze_jax/infer/requests.py lists the fields
"""

from gaze_jax.cache_folder import cache_folder
from gaze_jax.commands import cli
from gaze_jax.commands.devices import define_mesh, define_processes, start_processes
from gaze_jax.commands.flags import Flags, Values
from gaze_jax.commands.generate_groups import DEFAULTS
from gaze_jax.commands.generate_options import GenerateOptions
from gaze_jax.parallel import together

SELECT_PER = ("head", "kv_head")
NEWLINES = ("text", "region")


def define_flags(flags: Flags) -> None:
    """A flag for every field of :class:`GenerateOptions`."""
    flags.group("The model and what it is shown")
    flags.string(
        "checkpoint",
        None,
        "A converted checkpoint, a Hugging Face directory, or a run of train.py.",
        "FOLDER",
    )
    flags.strings("image", "An image file.", "FILE")
    flags.strings("video", "A video file, an animation, or a folder of frames.", "FILE")
    flags.strings("question", "What to ask; several are turns of one conversation.")
    flags.string("system", None, "System prompt; default: the one of the model's family.")
    flags.number("fps", None, "Frames of a video to show per second; default: the family's.")
    flags.integer("max_frames", None, "Most frames of a video to show; default: the family's.")
    flags.number("folder_fps", None, _text("Frames per second of a folder of frames", "folder_fps"))
    flags.boolean("resize", False, "Resize images to the square that a run's tower takes.")
    _define_gaze(flags)
    flags.group("How tokens are sampled")
    flags.integer("max_tokens", 64, "Most tokens to generate for a question.")
    flags.number("temperature", 0.0, "0 takes the most likely token; above 0 tokens are sampled.")
    flags.integer("sample_top_k", None, "Sample from the N most likely tokens; default: from all.")
    flags.number(
        "top_p",
        None,
        _text("Sample from the most likely of those tokens that together reach this probability", "top_p"),
    )
    flags.strings("stop", "End the answer before this string.")
    flags.integer("seed", None, _text("Seed of the sampling", "seed"))
    flags.group("Pictures of the last answer")
    flags.strings("out", "Where the answer looked: a file that ends in .html, .png, .mp4 or .gaze.", "FILE")
    flags.integer("layer", None, "Layer of the pictures; default: all, or the best one of a run's eval.json.")
    flags.integer(
        "views", None, _text("Most views and frames in a PNG or MP4: those looked at most", "views")
    )
    flags.group("Many questions")
    flags.string("questions", None, "JSON Lines file of many questions.", "FILE")
    flags.string("answers", None, "JSON Lines file to write their answers to.", "FILE")
    flags.string("traces", None, "Folder for a trace and a viewer page of each, and an index.", "FOLDER")
    flags.boolean("resume", False, "Keep the answers that the file has; answer the other questions.")
    flags.integer("batch_size", None, _text("Most questions of the file to answer at once", "batch_size"))
    flags.group("Devices and memory")
    define_mesh(flags)
    flags.integer("cache_tokens", None, "Most tokens in the cache; default: what fits.")
    flags.string(
        "compilation_cache",
        cache_folder(),
        "Folder that keeps compiled programs; empty for none.",
        "FOLDER",
    )
    define_processes(flags)


def _define_gaze(flags: Flags) -> None:
    """Flags for regions and their selection."""
    flags.group("Where it may look (gaze)")
    flags.counts(
        "gaze_top_k",
        "Regions per query, or one number for each layer; default: what the model is configured for.",
        "8,8,4,4",
    )
    flags.number("gaze_keep", None, "The same as a fraction of the visible regions.")
    flags.boolean("gaze_dense", False, "Attend to everything, whatever the model is configured for.")
    flags.integers("gaze_full_layers", None, "Layers that attend to everything.", "0,1")
    flags.choice("gaze_select_per", None, SELECT_PER, "Select per query head, or per kv head's group.")
    flags.integers("gaze_region", None, "Target size of an image's regions in tokens.", "7,7")
    flags.integers("gaze_video_region", None, "The same for a video, with frames first.", "2,4,8")
    flags.choice("gaze_newlines", None, NEWLINES, "Read all newlines, or route them with their regions.")
    flags.choice("gaze_visual_dtype", None, ["int8"], "Keep visual keys and values as int8.")
    flags.boolean(
        "offload", False, "Keep visual keys and values in the host's memory and fetch what is selected."
    )
    flags.strings(
        "look_at",
        "Box in pixels, optionally of one frame: select only regions there.",
        "X0,Y0,X1,Y1[,FRAME]",
    )
    flags.integers("look_at_layers", None, "Layers that --look_at applies to; default: all.", "12,13")
    flags.number(
        "look_at_bias", None, "Add this many logits to the boxes' regions, instead of excluding all others."
    )


def _text(text: str, name: str) -> str:
    """Help of a flag whose real default is None, so that the command knows whether it was given."""
    return f"{text}; default: {DEFAULTS[name]}."


def options_of(values: Values) -> GenerateOptions:
    """The options given by the flags, checked."""
    given = {name: values[name].value for name in values}
    return GenerateOptions.of({n: tuple(v) if isinstance(v, list) else v for n, v in given.items()})


def main(values: Values) -> None:
    """Answer one conversation or a file of questions; of several processes the first prints and writes."""
    start_processes(values, saves=False)
    with together.agreed():
        options = options_of(values)
    import jax

    from gaze_jax.commands import generate_answers, generate_batch
    from gaze_jax.infer.compile_cache import keep_programs

    if options.devices.compilation_cache:
        keep_programs(options.devices.compilation_cache)
    else:  # not even where gaze_jax.load would keep them
        jax.config.update("jax_enable_compilation_cache", False)
    if options.batch.questions is None:
        generate_answers.ask(options)
    else:
        cli.exit_partly(generate_batch.ask_many(options))


def run() -> None:
    """The command."""
    cli.run(main, define_flags, __doc__)


if __name__ == "__main__":
    run()
