"""Chat templates: rendered and found as by transformers, kept in their sandbox."""

import itertools
import json
import pathlib

import numpy as np
import pytest

from gaze_jax.chat.template import ChatTemplate
from gaze_jax.data.tokenizer import END
from gaze_jax.errors import UserError
from tests.helpers.chat import (
    AGAIN,
    ANSWER,
    BLACK,
    CONVERSATIONS,
    QUESTION,
    TEMPLATES,
    as_dicts,
    hf,
    template,
    tokenizer_json,
    variables_of,
)

transformers = pytest.importorskip("transformers")


@pytest.mark.parametrize("prompted", [False, True])
@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_a_conversation_is_rendered_as_by_transformers(name, conversation, prompted):
    """Byte for byte, for every variable that a template takes."""
    for variables in variables_of(name):
        turns = as_dicts(CONVERSATIONS[conversation], name)
        expected = hf(name).apply_chat_template(
            turns, tokenize=False, add_generation_prompt=prompted, **variables
        )
        assert template(name).render(turns, add_generation_prompt=prompted, **variables) == expected


@pytest.mark.parametrize("name", ["qwen2_5", "qwen3"])
def test_tools_and_calls_are_rendered_as_by_transformers(name):
    """Tools, calls, their results, and keys that are None."""
    tools = [{"type": "function", "function": {"name": "look", "description": "<b> é", "parameters": {}}}]
    turns = [
        {"role": "user", "content": "Selection", "name": None},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"function": {"name": "look", "arguments": {"a": "é"}}}],
        },
        {"role": "tool", "content": "1"},
        {"role": "tool", "content": "2"},
        {"role": "assistant", "content": "done", "tool_calls": None},
    ]
    expected = hf(name).apply_chat_template(turns, tools=tools, tokenize=False)
    assert template(name).render(turns, add_generation_prompt=False, tools=tools) == expected
    assert "<b> é" in expected


def test_the_environment_of_templates_is_that_of_transformers():
    """Loop control, blocks' white space, filters, special tokens, ``generation`` without marks."""
    source = """
    {%- for m in messages %}
        {% if loop.index0 == 1 %}{% continue %}{% endif %}
        {% if loop.index0 == 3 %}{% break %}{% endif %}
        {% generation %}
  {{ bos_token }}|{{ pad_token }}|{{ m.role }}|{{ m | tojson }}|{{ {'b': '<&>'} | tojson(indent=1) }}
        {% endgeneration %}
    {% endfor %}{{ strftime_now('%Y') }}{{ dict(a=2)['a'] }}{{ tools is none }}{{ namespace(x=3).x }}
    {{ messages[0].name is defined }}
    """
    turns = as_dicts((QUESTION, ANSWER, AGAIN, BLACK, QUESTION), "qwen3")
    turns[0]["name"] = None
    backend = hf("qwen3")
    expected = backend.apply_chat_template(turns, chat_template=source, tokenize=False)
    made = ChatTemplate(source, backend.special_tokens_map)
    assert made.render(turns, add_generation_prompt=False) == expected
    assert expected.count("<&>") == 3 and "|<|endoftext|>|user|" in expected


MALICIOUS = {
    "reads Python's internals": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "reads globals": "{{ cycler.__init__.__globals__.os.popen('true').read() }}",
    "reads them by a filter": "{{ (messages | attr('__class__')).mro() }}",
    "changes the messages": "{{ messages.append(messages[0]) }}",
    "changes a message": "{{ messages[0].update({'content': 'other'}) }}",
    "names an internal": "{% set ns = namespace() %}{% set ns.__class__ = 1 %}",
    "names an internal at once": "{{ namespace(__class__=1) }}",
    "formats its way": "{{ '{0.__class__.__mro__}'.format(messages) }}",
}


@pytest.mark.parametrize("source", MALICIOUS.values(), ids=MALICIOUS)
def test_a_malicious_template_is_refused_in_a_sentence(source):
    """What the sandbox forbids is the user's to mend, and names the template."""
    with pytest.raises(
        UserError, match=r"^bad\.jinja does what the sandbox forbids \(.*\); use another"
    ) as error:
        ChatTemplate(source, name="bad.jinja").render(as_dicts((QUESTION,), ""), add_generation_prompt=False)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("{% if %}", r"is not a template that jinja2 reads \(Expected an expression.*line 1"),
        ("{% generation %}", "is not a template that jinja2 reads"),
        ("{{ raise_exception('No\n  roles!') }}", r"refuses the conversation \(No roles!\)"),
        ("{{ messages[7].content + 'a' }}", "fails on this conversation .UndefinedError"),
        ("{{ messages[0].content + 1 }}", "fails on this conversation .TypeError"),
        ("{% for i in range(10 ** 9) %}{% endfor %}", "fails on this conversation .OverflowError"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "fails on this conversation .RecursionError"),
    ],
)
def test_a_template_that_fails_is_refused_in_a_sentence(source, reason):
    """Whatever goes wrong in a program that is not ours."""
    with pytest.raises(UserError, match=rf"^The chat template {reason}") as error:
        ChatTemplate(source).render(as_dicts((QUESTION,), ""), add_generation_prompt=False)
    assert "\n" not in str(error.value)


def test_a_template_sees_json_values_only():
    """An object's methods are out of reach because the object is."""
    for value in (pathlib.Path("x"), np.float32(1), {1, 2}, [object()]):
        with pytest.raises(ValueError, match="give values of JSON types"):
            template("qwen3").render([], add_generation_prompt=False, thing=value)


def write(directory, **files):
    for name, content in files.items():
        path = directory / name.replace("__", ".")
        path.write_text(content if isinstance(content, str) else json.dumps(content))


SOURCES = {
    "processor_config__json": ({"chat_template": "of the processor"}, "of the processor"),
    "chat_template__json": ({"chat_template": "of the legacy file"}, "of the legacy file"),
    "chat_template__jinja": ("of the file", "of the file"),
    "tokenizer_config__json": ({"chat_template": "of the tokenizer"}, "of the tokenizer"),
}


@pytest.mark.parametrize(
    "files", [f for n in range(1, 5) for f in itertools.combinations(SOURCES, n)], ids="+".join
)
def test_the_template_is_found_where_transformers_finds_it(tmp_path, files):
    """A processor's files go first, in its order, then the tokenizer's."""
    write(tmp_path, tokenizer__json=tokenizer_json(), **{name: SOURCES[name][0] for name in files})
    expected = transformers.ProcessorMixin.get_processor_dict(tmp_path)[0].get("chat_template")
    if expected is None:
        expected = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path).chat_template
    assert ChatTemplate.load(tmp_path).source == expected == SOURCES[files[0]][1]


def test_of_named_templates_the_default_is_taken(tmp_path):
    """And without one, none."""
    named = [{"name": "tool_use", "template": "a"}, {"name": "default", "template": "b"}]
    write(tmp_path, tokenizer_config__json={"chat_template": named})
    assert ChatTemplate.load(tmp_path).source == "b"
    write(tmp_path, tokenizer_config__json={"chat_template": named[:1]})
    with pytest.raises(
        UserError, match=r"tokenizer_config\.json has chat templates, but none is named 'default'"
    ):
        ChatTemplate.load(tmp_path)


@pytest.mark.parametrize("older", [False, True])
def test_special_tokens_are_those_of_transformers(tmp_path, older):
    """As text or with their settings, in the tokenizer's config or in a file of their own."""
    config = {
        "eos_token": {"content": END, "lstrip": False, "__type": "AddedToken"},
        "pad_token": "<|endoftext|>",
        "bos_token": None,
        "add_bos_token": False,
        "chat_template": "{{ eos_token }}{{ pad_token }}{{ unk_token }}",
    }
    more = {"unk_token": {"content": "<image>", "lstrip": False}}
    if not older:
        config["added_tokens_decoder"] = {"2": {"content": END, "special": True}}
    write(
        tmp_path,
        tokenizer__json=tokenizer_json(),
        tokenizer_config__json=config,
        special_tokens_map__json=more,
    )
    loaded = ChatTemplate.load(tmp_path)
    expected = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
    assert loaded.special == expected.special_tokens_map
    assert loaded.render([], add_generation_prompt=False) == f"{END}<|endoftext|>{'<image>' * older}"
    assert loaded.name == str(tmp_path / "tokenizer_config.json")


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ({}, "has no chat template: no chat_template.jinja"),
        ({"tokenizer_config__json": {"eos_token": END}}, "has no chat template"),
        ({"tokenizer_config__json": "{"}, "tokenizer_config.json is not valid JSON"),
        ({"chat_template__json": "[]"}, "chat_template.json must hold a JSON object, not list"),
        (
            {"chat_template__json": {"chat_template": 3}},
            "chat_template.json has a chat_template that is not text",
        ),
    ],
)
def test_a_directory_without_a_template_is_refused(tmp_path, files, reason):
    """By what is missing or malformed."""
    write(tmp_path, **files)
    with pytest.raises(UserError, match=reason):
        ChatTemplate.load(tmp_path)
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    if not files:
        with pytest.raises(UserError, match=r"chat_template\.jinja is not readable UTF-8 text"):
            ChatTemplate.load(tmp_path)
