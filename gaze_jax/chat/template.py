"""Chat templates: jinja2 programs that come with a checkpoint, run in a sandbox.

A template is untrusted code. It sees only strings, numbers, lists and dictionaries, in jinja2's immutable
sandbox, which blocks access to Python's internals but does not stop long loops. It also has the additions of
transformers: ``raise_exception``, ``strftime_now``, a ``tojson`` that does not escape HTML, ``{% break %}``
and ``{% continue %}``, and ``{% generation %}`` around training targets.
"""

import dataclasses
import datetime
import functools
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.runtime
import jinja2.sandbox
import jinja2.utils
from absl import logging

from gaze_jax.errors import UserError

SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
"""Special tokens whose text is available to templates by name."""

_MARKS = "_generation_marks"


class _Refusal(jinja2.TemplateError):
    """The template refused the conversation."""


class _Generation(jinja2.ext.Extension):
    """``{% generation %}``: puts the caller's pair of marks, if any, around its body."""

    tags = {"generation"}  # noqa: RUF012  jinja2 declares it without ClassVar

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        call = self.call_method("_marked", [jinja2.nodes.ContextReference()])
        return jinja2.nodes.CallBlock(call, [], [], body).set_lineno(line)

    def _marked(self, context: jinja2.runtime.Context, caller: Callable[[], str]) -> str:
        opening, closing = context.get(_MARKS) or ("", "")
        return f"{opening}{caller()}{closing}"


class _Namespace(jinja2.utils.Namespace):
    """A ``namespace`` that refuses attributes named like Python's internals."""

    def __init__(self, /, *args: Mapping[str, object], **kwargs: object) -> None:
        super().__init__()
        for name, value in dict(*args, **kwargs).items():
            self[name] = value

    def __setitem__(self, name: str, value: object) -> None:
        if name.startswith("_"):
            raise jinja2.sandbox.SecurityError(f"it sets the attribute {name!r} of a namespace")
        super().__setitem__(name, value)


def _raise_exception(message: str) -> NoReturn:
    raise _Refusal(message)


def _strftime_now(form: str) -> str:
    return datetime.datetime.now().strftime(form)


def _tojson(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


@functools.lru_cache(maxsize=16)
def _compile(source: str) -> jinja2.Template:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals |= {
        "raise_exception": _raise_exception,
        "strftime_now": _strftime_now,
        "namespace": _Namespace,
    }
    return environment.from_string(source)


_JSON_SCALARS = frozenset((str, int, float, bool, type(None)))


def _plain(value: object) -> Any:
    """A copy of ``value`` in JSON types only; a sandbox cannot vet the methods of other objects."""
    if type(value) in _JSON_SCALARS:
        return value
    if isinstance(value, dict | Mapping):  # most are dictionaries, which are recognised sooner
        return {_plain(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    raise ValueError(f"A chat template is given a {type(value).__name__}; give values of JSON types.")


def _phrase(error: Exception) -> str:
    """An error as a phrase for use in a sentence."""
    return " ".join(str(error).split()).rstrip(".")


def _read(path: Path) -> str | None:
    """Text of a file; None if there is none."""
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not readable UTF-8 text ({error}); download it again.") from error


def _read_object(path: Path) -> dict[str, object]:
    """A JSON object; empty if there is no such file."""
    text = _read(path)
    try:
        value = {} if text is None else json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON ({error}); download it again.") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} must hold a JSON object, not {type(value).__name__}.")
    return value


def _default(value: object, path: Path) -> str | None:
    """The template under "chat_template": a string, or the one named "default" of a list."""
    if isinstance(value, list):
        named = {entry.get("name"): entry.get("template") for entry in value if isinstance(entry, dict)}
        if "default" not in named:
            raise UserError(f"{path} has chat templates, but none is named 'default'; name one 'default'.")
        value = named["default"]
    if value is not None and not isinstance(value, str):
        raise UserError(f"{path} has a chat_template that is not text but {type(value).__name__}.")
    return value


def _special(directory: Path) -> dict[str, str]:
    """Text of the special tokens named in a tokenizer's files."""
    config = _read_object(directory / "tokenizer_config.json")
    if "added_tokens_decoder" not in config:  # an older tokenizer, with its tokens in a separate file
        config |= _read_object(directory / "special_tokens_map.json")
    found = {}
    for name in SPECIAL:
        token = config.get(name)
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str):
            found[name] = token
    return found


@dataclasses.dataclass(frozen=True)
class ChatTemplate:
    """A jinja2 program that renders a conversation in the form a checkpoint was trained on.

    Attributes:
      source: the program.
      special: text of special tokens, as the variables ``bos_token``, ``eos_token`` and so on.
      name: where the template comes from, for error messages.
    """

    source: str = dataclasses.field(repr=False)
    special: Mapping[str, str] = dataclasses.field(default_factory=dict, hash=False)
    name: str = "The chat template"

    @classmethod
    def find(cls, directory: str | os.PathLike[str]) -> "ChatTemplate | None":
        """The template of a checkpoint's directory, or None.

        The first that exists, in the order of transformers 5.23 (processor, then tokenizer):
        processor_config.json's "chat_template", chat_template.json, chat_template.jinja,
        tokenizer_config.json's "chat_template" (in a list, the one named "default").

        Raises:
          UserError: a file cannot be read.
        """
        directory = Path(directory)
        special = _special(directory)
        for name in (
            "processor_config.json",
            "chat_template.json",
            "chat_template.jinja",
            "tokenizer_config.json",
        ):
            path = directory / name
            if path.suffix == ".jinja":
                source = _read(path)
            else:
                source = _default(_read_object(path).get("chat_template"), path)
            if source is not None:
                return cls(source, special, str(path))
        return None

    @classmethod
    def load(cls, directory: str | os.PathLike[str]) -> "ChatTemplate":
        """:meth:`find`, but a missing template is an error.

        Raises:
          UserError: there is none, or a file cannot be read.
        """
        found = cls.find(directory)
        if found is None:
            raise UserError(
                f"{directory} has no chat template: no chat_template.jinja, no chat_template.json, none in "
                "tokenizer_config.json; use the files of the instruction-tuned checkpoint."
            )
        return found

    def render(
        self,
        messages: Sequence[Mapping[str, object]],
        *,
        add_generation_prompt: bool,
        generation_marks: tuple[str, str] | None = None,
        **variables: object,
    ) -> str:
        """Write a conversation.

        Args:
          messages: dictionaries with "role", "content" and any other keys that the template reads; a key
            whose value is None counts as missing.
          add_generation_prompt: end with the header of the assistant's next turn.
          generation_marks: text to put before and after each ``{% generation %}`` block.
          **variables: variables of the template, such as ``enable_thinking`` or ``tools``.

        Raises:
          UserError: the template is malformed, fails, refuses the conversation, or does something that the
            sandbox forbids.
        """
        turns = [{key: item for key, item in turn.items() if item is not None} for turn in messages]
        given = {"tools": None, "documents": None, **self.special, **variables}
        values = _plain({**given, "messages": turns, "add_generation_prompt": add_generation_prompt})
        try:
            return _compile(self.source).render(values | {_MARKS: generation_marks})
        except jinja2.TemplateSyntaxError as error:
            reason = f"is not a template that jinja2 reads ({error.message}, line {error.lineno})"
        except jinja2.sandbox.SecurityError as error:
            reason = f"does what the sandbox forbids ({_phrase(error)})"
        except _Refusal as error:
            reason = f"refuses the conversation ({_phrase(error)})"
        except Exception as error:  # untrusted code may raise anything
            reason = f"fails on this conversation ({type(error).__name__}: {_phrase(error)})"
        raise UserError(f"{self.name} {reason}; use another template or other turns.")


CHATML = ChatTemplate(
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    {},
    "ChatML, since the checkpoint has no chat template",
)
"""The template of a checkpoint without one: Qwen's turns."""


def template_of(files: Path) -> ChatTemplate:
    """The chat template of a checkpoint's directory; :data:`CHATML`, with a warning, if it has none.

    Raises:
      UserError: its chat template cannot be read.
    """
    found = ChatTemplate.find(files)
    if found is None:
        logging.warning("%s has no chat template, so ChatML is used.", files)
        return CHATML
    return found
