"""The flags of a command: a separate set, headings for the help, and former names of flags."""

import dataclasses
import shutil
import sys
import textwrap
from collections.abc import Callable, Sequence

from absl import flags

Values = flags.FlagValues
"""Parsed flags: ``values.NAME`` is a value, ``values["NAME"].present`` how often it was given."""

RENAMED = {
    "top_k": ("gaze_top_k", "gaze_top_ks", "sample_top_k"),
    "top_ks": ("gaze_top_ks",),
    "keep": ("gaze_keep",),
    "dense": ("gaze_dense",),
    "dense_layers": ("gaze_full_layers",),
    "full_layers": ("gaze_full_layers",),
    "share": ("gaze_select_per",),
    "shares": ("gaze_select_per",),
    "select_per": ("gaze_select_per",),
    "region": ("gaze_region",),
    "video_region": ("gaze_video_region",),
    "newlines": ("gaze_newlines",),
    "descriptors": ("gaze_descriptors",),
    "visual_dtype": ("gaze_visual_dtype",),
    "context_tokens": ("gaze_context_tokens",),
    "units": ("views",),
}
"""Former name of a flag -> current names, of which a command may have several, one or none."""

_MEANING = {
    "gaze_top_k": "regions that a query selects",
    "sample_top_k": "tokens to draw from",
    "gaze_select_per": "head or kv_head",
    "gaze_newlines": "text or region",
}

RENAMED_FIELDS = {"share": "select_per"}
"""Former name of a config field -> its current name."""


class _Help(flags.BooleanFlag):
    """Prints the help and ends the program with status 0."""

    def __init__(self, text: Callable[[], str]) -> None:
        super().__init__("help", False, "Print this and exit.", short_name="h")
        self._text = text

    def parse(self, argument: str | bool) -> None:
        if self._parse(argument):
            print(self._text())
            sys.exit(0)


class _Integers(flags.ArgumentParser):
    """Parses whole numbers separated by commas to a tuple."""

    def __init__(self, example: str) -> None:
        self._example = example

    def parse(self, argument: str | tuple[int, ...]) -> tuple[int, ...]:
        if isinstance(argument, tuple):
            return argument
        words = [word.strip() for word in argument.split(",")] if argument else []
        if not all(word.isdecimal() for word in words):
            raise ValueError(f"must be whole numbers with commas between them, such as {self._example}.")
        return tuple(int(word) for word in words)


class _Counts(flags.ArgumentParser):
    """Parses a whole number to an int, and several that are separated by commas to a tuple."""

    def __init__(self, example: str) -> None:
        self._several = _Integers(example)

    def parse(self, argument: str | int | tuple[int, ...]) -> int | tuple[int, ...]:
        if isinstance(argument, int):
            return argument
        found = self._several.parse(argument or "none")
        return found[0] if len(found) == 1 else found


class _Choices(flags.ArgumentParser):
    """Parses words from a fixed list, separated by commas, to a tuple."""

    def __init__(self, choices: Sequence[str]) -> None:
        self._choices = tuple(choices)

    def parse(self, argument: str | Sequence[str]) -> tuple[str, ...]:
        words = tuple(word.strip() for word in argument.split(",")) if isinstance(argument, str) else argument
        if not words or not set(words) <= set(self._choices):
            raise ValueError(f"must be some of {', '.join(self._choices)}, with commas between them.")
        return tuple(words)


class _Joined(flags.ArgumentSerializer):
    """Writes a tuple, or one value, in the form a flag takes."""

    def serialize(self, value: Sequence[object] | int) -> str:
        return str(value) if isinstance(value, int) else ",".join(map(str, value))


@dataclasses.dataclass
class _Group:
    """Flags under one heading: name, form of a value, meaning."""

    heading: str
    flags: list[tuple[str, str, str]]


class Flags:
    """The flags of one command. They are not global, so commands in one process may share names.

    Args:
      doc: what the command does, with examples; the start of its help.
      argv: the command line, the program first.

    Attributes:
      values: the defined flags and, after parsing, their values.
      argv: the command line.
    """

    def __init__(self, doc: str, argv: Sequence[str]) -> None:
        self.values, self.argv, self._doc = flags.FlagValues(), list(argv), doc
        self.values.set_gnu_getopt(True)  # arguments that are not flags may be anywhere
        self._groups: list[_Group] = []
        flags.DEFINE_flag(_Help(self.help), self.values)

    def group(self, heading: str) -> None:
        """List the following flags under this heading."""
        self._groups.append(_Group(heading, []))

    def listed(self, name: str, meta: str, text: str) -> None:
        """List a flag of :attr:`values` in the help; ``meta`` is the form of a value."""
        self._groups[-1].flags.append((name, meta, text))

    def string(self, name: str, default: str | None, text: str, meta: str = "TEXT") -> None:
        """A text or a path."""
        flags.DEFINE_string(name, default, text, flag_values=self.values)
        self.listed(name, meta, text)

    def strings(self, name: str, text: str, meta: str = "TEXT") -> None:
        """A text that may be repeated; the value is a list."""
        flags.DEFINE_multi_string(name, [], text, flag_values=self.values)
        self.listed(name, meta, f"{text} May be given again.")

    def boolean(self, name: str, default: bool | None, text: str) -> None:
        """``--NAME`` or ``--noNAME``; None is neither."""
        flags.DEFINE_bool(name, default, text, flag_values=self.values)
        self.listed(name, "", text)

    def integer(self, name: str, default: int | None, text: str) -> None:
        """A whole number."""
        flags.DEFINE_integer(name, default, text, flag_values=self.values)
        self.listed(name, "N", text)

    def number(self, name: str, default: float | None, text: str) -> None:
        """A number."""
        flags.DEFINE_float(name, default, text, flag_values=self.values)
        self.listed(name, "X", text)

    def integers(self, name: str, default: tuple[int, ...] | None, text: str, example: str) -> None:
        """Whole numbers separated by commas; the value is a tuple."""
        self._parsed(_Integers(example), name, default, text)
        self.listed(name, example, text)

    def counts(self, name: str, text: str, example: str) -> None:
        """A whole number, or several separated by commas; the value is an int or a tuple."""
        self._parsed(_Counts(f"8 or {example}"), name, None, text)
        self.listed(name, "N[,N...]", text)

    def choice(self, name: str, default: str | None, choices: Sequence[str], text: str) -> None:
        """One word from a fixed list."""
        flags.DEFINE_enum(name, default, list(choices), text, flag_values=self.values)
        self.listed(name, "|".join(choices), text)

    def choices(self, name: str, choices: Sequence[str], text: str) -> None:
        """Words from a fixed list, all by default; the value is a tuple."""
        self._parsed(_Choices(choices), name, ",".join(choices), text)
        self.listed(name, ",".join(choices), text)

    def _parsed(
        self, parser: flags.ArgumentParser, name: str, default: str | tuple[int, ...] | None, text: str
    ) -> None:
        flags.DEFINE(parser, name, default, text, flag_values=self.values, serializer=_Joined())

    def parse(self) -> tuple[Values, list[str]]:
        """Parse the command line; returns the values and the arguments that are not flags.

        absl's flags for logging and debugging are accepted too, but are global to the process.

        Raises:
          flags.Error: a flag is unknown, was renamed, or has an invalid value.
        """
        known = flags.FLAGS.flags_by_module_dict()
        for flag in (*known.get("absl.app", ()), *known.get("absl.logging", ())):
            if flag.name not in self.values and not flag.name.startswith(("help", "only_check")):
                self.values[flag.name] = flag
        try:
            rest = self.values(self.argv)[1:]
        except flags.UnrecognizedFlagError as error:
            if sentence := self._renamed(error.flagname):
                raise flags.Error(sentence) from error
            raise
        flags.FLAGS.mark_as_parsed()  # libraries read theirs
        return self.values, rest

    def _renamed(self, name: str) -> str | None:
        """The error message for a former name of a flag; None if it is not one."""
        name = name if name in RENAMED else name.removeprefix("no")
        found = [new for new in RENAMED.get(name, ()) if new in self.values]
        if not found:
            return None
        several = len(found) > 1
        told = [f"--{new} ({_MEANING[new]})" if new in _MEANING else f"--{new}" for new in found]
        return f"--{name} is now {' or '.join(told)}; use {'the one that you mean' if several else 'that'}."

    def help(self) -> str:
        """What the command does and its flags, by group, with defaults."""
        width = min(shutil.get_terminal_size((100, 24)).columns, 110)
        lines = [self._doc.strip()]
        for group in self._groups:
            lines += ["", f"{group.heading}:"]
            for name, meta, text in group.flags:
                lines += [f"  --{name}={meta}" if meta else f"  --[no]{name}"]
                lines += textwrap.wrap(
                    self._with_default(name, text),
                    width,
                    initial_indent="      ",
                    subsequent_indent="      ",
                    break_on_hyphens=False,
                )
        return "\n".join([*lines, "", "  -h, --help", "      Print this and exit."])

    def _with_default(self, name: str, text: str) -> str:
        flag = self.values[name]
        if flag.default is None or flag.default is False or flag.default in ("", []):
            return text
        default = "on" if flag.boolean else flag.default
        if isinstance(default, tuple):
            default = ",".join(map(str, default))
        return f"{text.removesuffix('.')}; default: {default}."
