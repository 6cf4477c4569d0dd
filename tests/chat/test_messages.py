"""Messages, and records of LLaVA's form as messages."""

import pytest

from gaze_jax.chat.messages import Message, from_llava
from gaze_jax.data.sample import Image, Video
from gaze_jax.errors import UserError


def test_a_message_joins_its_texts_and_keeps_the_order_of_its_media():
    """However it is given."""
    message = Message("user", ("a", "", "b", Image(1), Video(0), "c"))
    assert message.items == ("ab", Image(1), Video(0), "c")
    assert message.text == "abc"
    assert Message("user", "ab") == Message("user", ("a", "b"))
    assert Message("user", "").items == ()


@pytest.mark.parametrize(("tag", "kind"), [("<image>", "Image"), ("<video>", "Video")])
@pytest.mark.parametrize("role", ["system", "user", "assistant"])
def test_a_tag_in_text_is_refused(role, tag, kind):
    """Since it could not be told from what shows an image, also when it comes in two pieces."""
    for content in (f"What does {tag} mean?", (tag[:3], tag[3:])):
        with pytest.raises(UserError, match=rf"role '{role}' contains {tag}, .* give {kind}\(index\)"):
            Message(role, content)


def test_an_answer_shows_nothing():
    """A model answers in text."""
    with pytest.raises(UserError, match="An answer shows video 2"):
        Message("assistant", ("Selection: ", Video(2)))


def record(*turns, **media):
    names = ("human", "gpt") * len(turns)
    turns = [{"from": name, "value": value} for name, value in zip(names, turns, strict=False)]
    return {"id": "7", "conversations": turns, **media}


I, V = Image, Video
READ = {
    "text alone": (record("What?", "A."), [("What?",)]),
    "an image in front": (record("<image>\nWhat?", "A.", image="a.jpg"), [(I(0), "What?")]),
    "an image at the end": (record("What?\n<image>", "A.", image="a.jpg"), [("What?\n", I(0))]),
    "an image and nothing else": (record("<image>", "A.", image=["a.jpg"]), [(I(0),)]),
    "in a later turn": (record("Hi", "A.", "<image>What?", "B.", image="a.jpg"), [("Hi",), (I(0), "What?")]),
    "two images": (
        record("<image>\n<image>\nWhat?", "A.", image=["a", "b"]),
        [(I(0), I(1), "What?")],
    ),
    "two images in the text": (
        record("Left <image>,\nright\n<image>\n.", "A.", image=["a", "b"]),
        [("Left ", I(0), ",\nright\n", I(1), "\n.")],
    ),
    "no tag": (record("What?", "A.", "And?", "B.", image="a.jpg"), [(I(0), "What?"), ("And?",)]),
    "no tags for several": (record("What?", "A.", image=["a"], video="b"), [(I(0), V(0), "What?")]),
    "a video": (record("<video>\nWhat?", "A.", video="a.mp4"), [(V(0), "What?")]),
    "a video as Cambrian-S tags it": (record("<image>\nWhat?", "A.", video="a.mp4"), [(V(0), "What?")]),
    "two videos tagged in both ways": (
        record("<image><video>What?", "A.", video=["a", "b"]),
        [(V(0), V(1), "What?")],
    ),
    "both": (record("<video> <image> <image>", "A.", image=["a", "b"], video="c"), [(V(0), I(0), I(1))]),
}


@pytest.mark.parametrize(("given", "expected"), READ.values(), ids=READ)
def test_a_record_is_read_with_its_media_where_the_tags_are(given, expected):
    """The turns of the user; answers stay as they are."""
    conversation = from_llava(given, name="record 7")
    assert [m.items for m in conversation.messages if m.role == "user"] == expected
    assert [m.text for m in conversation.messages if m.role == "assistant"] == ["A.", "B."][: len(expected)]
    for key in ("image", "video"):
        files = given.get(key, [])
        assert getattr(conversation, key + "s") == tuple([files] if isinstance(files, str) else files)


@pytest.mark.parametrize("nothing", [None, "", "None", "none", "nan", float("nan"), []])
def test_what_data_sets_write_for_no_file_is_no_file(nothing):
    """Text alone, which may have no tag."""
    conversation = from_llava(record("What?", "A.", image=nothing, video=nothing), name="record 7")
    assert conversation.images == conversation.videos == ()
    with pytest.raises(
        UserError, match="record 7 has 1 <image> and 0 <video> tags but 0 images and 0 videos"
    ):
        from_llava(record("<image>\nWhat?", "A.", image=nothing), name="record 7")


@pytest.mark.parametrize(
    ("text", "media"),
    [
        ("<image><image>", {"image": "a"}),
        ("<image>", {"image": ["a", "b"]}),
        ("<video>", {"image": "a"}),
        ("<video><video>", {"video": "a"}),
        ("<image>", {"image": "a", "video": "b"}),
        ("<image><image>", {"image": "a", "video": "b"}),
        ("<video><video>", {"image": "a", "video": "b"}),
        ("What is the <image> tag of HTML?", {}),
    ],
)
def test_tags_and_media_must_agree_in_number(text, media):
    """In both directions, for each kind where there are both; a tag in a question counts like any other."""
    with pytest.raises(UserError, match=r"^record 7 has \d <image> and \d <video> tags but \d images and \d"):
        from_llava(record(text, "A.", **media), name="record 7")


def test_roles_are_read_in_both_spellings_and_the_system_prompt_goes_first():
    """A record's own system prompt stays."""
    turns = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "A."}]
    conversation = from_llava({"conversations": turns}, name="r", system="Be kind.")
    assert [(m.role, m.text) for m in conversation.messages] == [
        ("system", "Be kind."),
        ("user", "What?"),
        ("assistant", "A."),
    ]
    own = [{"from": "system", "value": "Be brief."}, *turns]
    conversation = from_llava({"conversations": own}, name="r", system="Be kind.")
    assert [m.text for m in conversation.messages] == ["Be brief.", "What?", "A."]


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({}, "has no list of turns"),
        ({"conversations": []}, "has no list of turns"),
        ({"conversations": ["What?"]}, "has a turn 0 that is not understood"),
        (record("What?", None), "has a turn 1 that is not understood"),
        ({"conversations": [{"from": "tool", "value": "1"}]}, "has a turn 0 that is not understood"),
        ({"conversations": [{"from": "gpt", "value": "1"}]}, "does not begin with a turn of the user"),
        ({"conversations": [{"from": "system", "value": "1"}]}, "does not begin with a turn of the user"),
        (record("What?", "<image>", image="a"), "has a tag in an answer"),
        (record("What?", "A.", image=3), "has image=3; give the name of a file"),
        (record("What?", "A.", video=["a", ""]), r"has video=\['a', ''\]; give the name of a file"),
    ],
)
def test_a_malformed_record_is_refused_by_name(given, reason):
    """One sentence that names the record and the field."""
    with pytest.raises(UserError, match=f"^record 7 of a.json {reason}"):
        from_llava(given, name="record 7 of a.json")
