from collections import Counter
from importlib.util import find_spec

import numpy as np
import pytest

from medrl.data import demo_images
from medrl.data.demo import QUESTIONS, ask, build_demo, build_examples, describe, licenses
from medrl.data.demo_images import PICTURES, SOURCES, VOLUMES, Picture, View
from medrl.data.images import open_image
from medrl.data.store import load
from medrl.errors import MissingExtraError
from medrl.evaluation.blind import best_blind, blind_baselines
from medrl.types import LETTERS

PACKAGES = ("nilearn", "skimage", "pydicom", "nibabel")
pytestmark = pytest.mark.skipif(
    not all(find_spec(package) for package in PACKAGES), reason="the embedded data set needs the extra 'demo'"
)

VOLUME_SOURCES = [source for source in SOURCES if isinstance(source, demo_images.Volume)]
volumes = pytest.mark.parametrize("volume", VOLUME_SOURCES, ids=lambda v: v.name)
pictures = pytest.mark.parametrize("picture", PICTURES, ids=lambda p: p.name)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """(train, test) examples of 180 and 140 images."""
    folder = tmp_path_factory.mktemp("demo")
    return build_examples("train", 180, 0, folder), build_examples("test", 140, 0, folder)


# ---------------------------------------------------------------- train and test never touch


@volumes
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_train_and_test_slices_are_four_millimeters_apart(volume, axis):
    train, test = volume.slices("train", axis), volume.slices("test", axis)
    assert len(train) and len(test)
    apart = np.abs(train[:, None] - test[None]) * volume.mm
    assert apart.min() >= 4
    if volume.mirrored and axis == 0:
        # Left and right look alike: a slice also keeps its distance from the mirror image of each other slice.
        mirrored = volume.load().shape[0] - 1 - test
        assert (np.abs(train[:, None] - mirrored[None]) * volume.mm).min() >= 4


@volumes
def test_slices_of_both_sides_come_from_all_over_a_volume(volume):
    for axis in range(3):
        assert len(volume.slices("train", axis)) >= 10
        assert len(volume.slices("test", axis)) >= 2


def test_the_three_brain_volumes_are_one_brain_and_are_cut_alike():
    assert len({volume.load().shape for volume in VOLUMES}) == 1
    for axis in range(3):
        train = {i for volume in VOLUMES for i in volume.slices("train", axis).tolist()}
        test = {i for volume in VOLUMES for i in volume.slices("test", axis).tolist()}
        assert min(abs(a - b) for a in train for b in test) >= 4


@pictures
def test_the_train_and_test_boxes_of_a_picture_are_apart(picture):
    for box in (picture.train, picture.test):
        assert 0 <= box[0] < box[2] <= 1 and 0 <= box[1] < box[3] <= 1
    (l1, t1, r1, b1), (l2, t2, r2, b2) = picture.train, picture.test
    height, width = picture.load().shape[-3:-1] if picture.load().ndim >= 3 else picture.load().shape
    gap_px = max((l2 - r1) * width, (l1 - r2) * width, (t2 - b1) * height, (t1 - b2) * height)
    assert gap_px >= 2


def test_a_crop_never_leaves_the_box_of_its_side():
    inside_train = np.zeros((100, 120), dtype=np.float32)
    inside_train[10:90, 12:54] = 1.0
    picture = Picture(
        name="box", package="", license="", load=lambda: inside_train, facts={"modality": "none"},
        train=(0.1, 0.1, 0.45, 0.9), test=(0.5, 0.1, 0.9, 0.9), crop=(0.3, 1.0), any_way_up=True,
    )  # fmt: skip
    rng = np.random.default_rng(0)
    for _ in range(50):
        assert np.asarray(picture.render("train", rng).image).min() >= 0.74 * 255
        assert np.asarray(picture.render("test", rng).image).max() <= 0.09 * 255


def test_no_picture_of_the_training_side_comes_back_in_the_test(built):
    train, test = built
    seen = {example.images[0].read_bytes() for example in train}
    assert not seen & {example.images[0].read_bytes() for example in test}
    assert len(seen) > 175  # and crops and slices hardly repeat


# ---------------------------------------------------------------- what is asked


def test_there_are_five_modalities_and_four_question_types_on_both_sides(built):
    for side in built:
        assert {example.modality for example in side} == set(QUESTIONS["modality"].answers)
        assert {example.question_type for example in side} == {q.question_type for q in QUESTIONS.values()}
    assert len(QUESTIONS["modality"].answers) == 5
    assert len({question.question_type for question in QUESTIONS.values()}) == 4


def test_every_question_offers_two_to_four_different_options_and_the_truth(built):
    for example in (example for side in built for example in side):
        assert 2 <= len(example.options) <= 4 and len(set(example.options)) == len(example.options)
        question = QUESTIONS[example.id.rpartition("-")[2]]
        assert example.question in question.wordings and set(example.options) <= set(question.answers)
        if question.fact == "modality":
            assert example.target_text == example.modality
        source = next(source for source in SOURCES if source.name == example.source)
        if question.fact != "plane":
            assert example.target_text == source.facts[question.fact]


def test_every_answer_has_a_source_and_every_kind_is_asked_for(built):
    given = {(e.id.rpartition("-")[2], e.target_text) for side in built for e in side}
    assert given == {(name, answer) for name, question in QUESTIONS.items() for answer in question.answers}


@pytest.mark.parametrize("name", QUESTIONS)
def test_the_place_of_the_right_answer_says_nothing(name):
    question, rng = QUESTIONS[name], np.random.default_rng(0)
    places: dict[int, Counter[int]] = {n: Counter() for n in (2, 3, 4)}
    for i in range(3000):
        answer = question.answers[i % len(question.answers)]
        text, options, target = ask(question, {question.fact: answer}, rng)
        assert text in question.wordings
        assert options[LETTERS.index(target)] == answer
        places[len(options)][LETTERS.index(target)] += 1
    for n, counts in places.items():
        total = counts.total()
        if total:
            # Five standard deviations of a fair draw.
            assert max(abs(counts[i] / total - 1 / n) for i in range(n)) < 5 * (0.25 / total) ** 0.5


def test_right_answers_are_balanced(built):
    for name, question in QUESTIONS.items():
        counts = Counter(e.target_text for side in built for e in side if e.id.endswith(f"-{name}"))
        fair = counts.total() / len(question.answers)
        assert max(abs(counts[answer] - fair) for answer in question.answers) < 4 * fair**0.5, name


def test_nobody_does_well_without_looking(built):
    best = best_blind(blind_baselines(*built))
    assert best.accuracy.value is not None and best.accuracy.value < 0.5


def test_a_tissue_map_is_not_asked_for_its_modality_or_anatomy(built):
    asked = {e.source: set() for e in built[0]}
    for example in built[0]:
        asked[example.source].add(example.id.rpartition("-")[2])
    for volume in VOLUMES[1:]:
        assert asked[volume.name] == {"plane", "kind"}


# ---------------------------------------------------------------- bytes, licences, stores


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(tmp_path):
    def content(name: str, seed: int):
        examples = build_examples("test", 12, seed, tmp_path / name)
        return [(e.id, e.question, e.options, e.target, e.images[0].read_bytes()) for e in examples]

    first = content("a", 5)
    assert content("b", 5) == first
    other = content("c", 6)
    assert not {row[-1] for row in first} & {row[-1] for row in other}


def test_images_are_upright_squares_that_show_something(built):
    for example in built[1][:60]:
        image = open_image(example.images[0])
        assert image.size == (demo_images.STORED_PX, demo_images.STORED_PX)
        assert np.asarray(image).std() > 5, example.id


def test_every_source_names_its_package_and_license(tmp_path):
    rows = licenses()
    assert len(rows) == len(SOURCES) == len({name for name, _, _ in rows})
    assert all(name and package and len(license) > 2 for name, package, license in rows)
    infos = build_demo(tmp_path / "demo", seed=1, train_images=5, test_images=4)
    for split, n_images in (("train", 5), ("test", 4)):
        examples = load(tmp_path / "demo" / split)
        assert len({example.images for example in examples}) == n_images
        assert infos[split].extra["sources"] == [list(row) for row in rows]
        assert {example.source for example in examples} <= {name for name, _, _ in rows}


def test_a_description_names_what_is_known_in_one_order():
    facts = {"kind": "gray-matter map", "plane": "axial", "anatomy": "brain", "modality": "MRI"}
    described = describe(facts)
    places = [described.index(facts[fact]) for fact in ("modality", "anatomy", "plane", "kind")]
    assert places == sorted(places) and "\n" not in described
    assert "brain" not in describe({"modality": "MRI", "plane": "axial"})
    for source in SOURCES:
        view = source.render("test", np.random.default_rng(0))
        assert isinstance(view, View)
        assert all(fact in describe(view.facts) for fact in view.facts.values())


def test_a_missing_package_is_named_with_the_extra_that_brings_it(monkeypatch):
    monkeypatch.setattr(demo_images, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"scikit-image.*medrl\[demo\]"):
        demo_images._skimage("cell.png")
