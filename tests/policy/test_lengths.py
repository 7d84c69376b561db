import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from medrl.errors import ImageError, PromptTooLongError
from medrl.policy.lengths import check_room, prompt_lengths
from medrl.types import Prompt

WORD = "modality "


def prompt(number: int, text: str, *images) -> Prompt:
    return Prompt(id=f"prompt-{number}", text=text, images=tuple(images), mode="think")


@pytest.fixture(scope="module")
def roomy(make_policy):
    """A policy whose processor keeps pictures of 28 to 112 pixels a side as they are."""
    policy = make_policy()
    policy.processor.image_processor.size = {"shortest_edge": 28 * 28, "longest_edge": 112 * 112}
    return policy


@given(
    sizes=st.lists(st.tuples(st.integers(9, 300), st.integers(9, 300)), max_size=3),
    text=st.text(st.characters(exclude_categories=["Cs"]), max_size=30),
)
@settings(max_examples=40, deadline=None)
def test_lengths_are_those_of_the_encoded_prompts(roomy, tmp_path_factory, sizes, text):
    folder = tmp_path_factory.mktemp("sizes")
    paths = [folder / f"{number}.png" for number in range(len(sizes))]
    for path, size in zip(paths, sizes, strict=True):
        Image.new("RGB", size).save(path)
    prompts = [prompt(0, text, *paths), prompt(1, WORD * 3)]
    assert prompt_lengths(roomy, prompts) == [len(encoded.token_ids) for encoded in roomy.encode(prompts)]


def test_a_picture_on_its_side_is_as_long(roomy, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned by a quarter
    Image.new("RGB", (112, 40)).save(tmp_path / "turned.jpg", exif=exif)
    prompts = [prompt(0, WORD, tmp_path / "turned.jpg")]
    assert prompt_lengths(roomy, prompts) == [len(roomy.encode(prompts)[0].token_ids)]


def test_one_prompt_that_does_not_fit_is_found_among_many_with_longer_texts(roomy, tmp_path):
    """Its image has many tokens, so neither its text nor its number of images gives it away."""
    Image.new("RGB", (28, 28)).save(tmp_path / "small.png")
    Image.new("RGB", (112, 112)).save(tmp_path / "large.png")
    prompts = [prompt(n, WORD * 10, tmp_path / "small.png") for n in range(30)]
    prompts.insert(17, prompt(99, WORD * 9, tmp_path / "large.png"))
    longest, second = sorted(prompt_lengths(roomy, prompts), reverse=True)[:2]
    room = roomy.family.context_tokens - longest
    assert longest > second
    check_room(roomy, prompts, room)
    with pytest.raises(
        PromptTooLongError, match=r"1 of 31 prompts are too long; prompt prompt-99: .* lower max_new_tokens"
    ):
        check_room(roomy, prompts, room + 1)


def test_no_picture_is_decoded_and_missing_ones_are_named(roomy, tmp_path, monkeypatch):
    Image.new("RGB", (60, 60)).save(tmp_path / "fine.png")
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    prompt_lengths(roomy, [prompt(0, WORD, tmp_path / "fine.png")])
    with pytest.raises(ImageError, match=r"gone\.png: the file does not exist"):
        prompt_lengths(roomy, [prompt(0, WORD, tmp_path / "gone.png")])


def test_nothing_to_look_at_is_fine(roomy):
    assert prompt_lengths(roomy, []) == []
    check_room(roomy, [], 10**9)
