"""No picture and no patient on both sides."""

import itertools
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from phantoms import LEAKS, phantom
from PIL import Image

from medrl.data import splits, store
from medrl.data.images import pixel_digest
from medrl.data.split_store import split_store
from medrl.data.splits import slug, split_examples, take_subset
from medrl.errors import DataError, SettingsError
from medrl.types import Example


@pytest.fixture(scope="module")
def gallery(tmp_path_factory) -> list[Path]:
    """40 files, 20 pictures: file i + 20 shows what file i shows, in another format."""
    root = tmp_path_factory.mktemp("gallery")
    paths = [root / f"{i}.{'png' if i < 20 else 'bmp'}" for i in range(40)]
    for i, path in enumerate(paths):
        Image.new("RGB", (2, 2), (i % 20, 0, 0)).save(path)
    return paths


def row(number: int | str, *images: Path, modality="CT", kind="Disease", patient=None) -> Example:
    return Example(
        id=str(number), source="d", images=images, question="?", options=("a", "b"), target="A",
        modality=modality, question_type=kind, patient=patient,
    )  # fmt: skip


def sides(split):
    train = [example for one, _ in split.values() for example in one]
    test = [example for _, one in split.values() for example in one]
    return train, test


def pictures(examples):
    return {pixel_digest(path) for example in examples for path in example.images}


ROWS = st.lists(
    st.tuples(st.lists(st.integers(0, 39), min_size=1, max_size=2), st.sampled_from(["CT", "MRI"])),
    min_size=1,
    max_size=25,
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(ROWS, st.integers(0, 9), st.sampled_from([0.1, 0.2, 0.5, 0.9]))
def test_no_picture_is_on_both_sides_and_no_example_is_lost(gallery, rows, seed, fraction):
    examples = [row(i, *(gallery[j] for j in images), modality=m) for i, (images, m) in enumerate(rows)]
    try:
        split = split_examples(examples, test_fraction=fraction, seed=seed, by="modality")
    except DataError as error:
        assert "gets no" in str(error)
        return
    train, test = sides(split)
    assert sorted(int(example.id) for example in train + test) == list(range(len(rows)))
    assert not pictures(train) & pictures(test)


def test_two_images_of_one_example_join_all_that_show_either(gallery):
    a, b, c, d = gallery[:4]
    examples = [row(0, a), row(1, a, b), row(2, b, c), row(3, gallery[22]), row(4, d)]
    for seed in range(10):
        train, test = sides(split_examples(examples, test_fraction=0.5, seed=seed))
        assert {frozenset(e.id for e in train), frozenset(e.id for e in test)} == {frozenset("0123"), frozenset("4")}


def test_a_domain_of_two_groups_has_both_sides_even_at_a_tiny_fraction(gallery):
    examples = [
        row(0, gallery[0]),
        row(1, gallery[1]),
        row(2, gallery[2], modality="MRI"),
        row(3, gallery[3], modality="MRI"),
    ]
    for fraction, seed in itertools.product((0.01, 0.99), range(5)):
        split = split_examples(examples, test_fraction=fraction, seed=seed, by="modality")
        assert all(len(train) == len(test) == 1 for train, test in split.values())


def test_a_domain_of_one_group_stays_on_one_side(gallery):
    split = split_examples([row(0, gallery[0]), row(1, gallery[20])], test_fraction=0.2, seed=0)
    assert [len(side) for side in split["all"]] == [2, 0]


def test_each_domain_gets_about_its_share():
    examples = [row(i, modality="CT" if i < 400 else "MRI") for i in range(500)]
    split = split_examples(examples, test_fraction=0.2, seed=1, keep_together="none", by="modality")
    assert abs(len(split["CT"][1]) - 80) <= 1 and abs(len(split["MRI"][1]) - 20) <= 1


def test_a_picture_asked_about_in_two_domains_is_on_one_side_in_both(gallery):
    examples = [
        row(2 * i + j, gallery[i], kind=kind) for i in range(20) for j, kind in enumerate(["Disease", "Anatomy"])
    ]
    split = split_examples(examples, test_fraction=0.3, seed=4, by="question_type")
    train, test = sides(split)
    assert set(split) == {"Disease", "Anatomy"} and not pictures(train) & pictures(test)
    assert [len(side) for side in split["Disease"]] == [len(side) for side in split["Anatomy"]] == [14, 6]


def test_the_division_depends_on_the_seed_and_not_on_the_order_of_the_examples():
    examples = [row(i) for i in range(30)]

    def tested(rows, seed):
        return {e.id for e in split_examples(rows, test_fraction=0.3, seed=seed, keep_together="none")["all"][1]}

    assert tested(examples, 0) == tested(examples[::-1], 0)
    assert tested(examples, 0) != tested(examples, 1)


def test_patients_stay_together_and_the_same_key_of_another_source_is_another_patient(gallery):
    examples = [row(i, gallery[i], patient=f"p{i // 4}") for i in range(20)]
    for seed in range(5):
        train, test = sides(split_examples(examples, test_fraction=0.4, seed=seed, keep_together="patient"))
        assert len(test) == 8 and not {e.patient for e in train} & {e.patient for e in test}
    two = [row(0, gallery[0], patient="p"), replace(row(1, gallery[1], patient="p"), source="e")]
    assert [len(side) for side in split_examples(two, test_fraction=0.5, seed=0, keep_together="patient")["all"]] == [
        1,
        1,
    ]


def test_a_near_duplicate_counts_as_the_same_picture(tmp_path):
    pictures = [phantom(0), phantom(1), phantom(2), LEAKS["cropped"](phantom(0)), LEAKS["mirrored"](phantom(1))]
    for i, picture in enumerate(pictures):
        picture.save(tmp_path / f"{i}.png")
    examples = [row(i, tmp_path / f"{i}.png") for i in range(5)]
    for seed in range(6):
        train, test = sides(split_examples(examples, test_fraction=0.4, seed=seed))
        for together in ({"0", "3"}, {"1", "4"}):
            assert together <= {e.id for e in train} or together <= {e.id for e in test}


def test_a_source_stays_together(gallery):
    examples = [replace(row(i, gallery[i]), source=f"d{i % 4}") for i in range(20)]
    train, test = sides(split_examples(examples, test_fraction=0.25, seed=2, keep_together="source"))
    assert len(test) == 5 and not {e.source for e in train} & {e.source for e in test}


GROUPS = st.lists(
    st.tuples(
        st.integers(1, 6), st.sampled_from(["CT", "MRI"]), st.lists(st.sampled_from("XYZ"), min_size=6, max_size=6)
    ),
    min_size=1,
    max_size=30,
)


@settings(max_examples=150, deadline=None)
@given(GROUPS, st.integers(0, 2**31), st.sampled_from([0.05, 0.2, 0.5, 0.8]))
def test_no_group_is_torn_and_every_domain_is_within_one_group_of_its_share(groups, seed, fraction):
    examples = [
        row(100 * g + i, modality=modality, kind=kinds[i], patient=str(g))
        for g, (size, modality, kinds) in enumerate(groups)
        for i in range(size)
    ]
    split = split_examples(examples, test_fraction=fraction, seed=seed, keep_together="patient", by="modality")
    for modality, (train, test) in split.items():
        assert not {e.patient for e in train} & {e.patient for e in test}
        sizes = [size for size, name, _ in groups if name == modality]
        assert abs(len(test) - fraction * sum(sizes)) <= max(sizes)
        assert len(sizes) == 1 or (train and test)


def test_each_modality_and_question_type_gets_its_share_to_within_one_example():
    rows = [("CT", "X", 103), ("CT", "Y", 37), ("MRI", "X", 11), ("MRI", "Z", 249)]
    examples = [row(f"{m}{k}{i}", modality=m, kind=k) for m, k, n in rows for i in range(n)]
    for seed in range(5):
        _, test = split_examples(examples, test_fraction=0.2, seed=seed, keep_together="none")["all"]
        assert len(test) == 80
        for modality, kind, n in rows:
            assert abs(sum((e.modality, e.question_type) == (modality, kind) for e in test) - n / 5) <= 1


def test_the_same_seed_gives_the_same_split_on_any_machine():
    examples = [row(i, modality="CT" if i % 3 else "MRI") for i in range(20)]
    _, test = split_examples(examples, test_fraction=0.25, seed=7, keep_together="none")["all"]
    assert [e.id for e in test] == ["7", "13", "15", "18", "19"]


@settings(deadline=None)
@given(st.integers(1, 60), st.integers(1, 60), st.integers(0, 99))
def test_a_smaller_subset_lies_inside_a_larger_one_and_is_stratified(one, other, seed):
    examples = [row(i, modality="CT" if i % 4 else "MRI") for i in range(60)]
    small, large = (take_subset(examples, size, seed) for size in sorted((one, other)))
    assert len(small) == min(one, other) and {e.id for e in small} <= {e.id for e in large}
    assert abs(sum(e.modality == "MRI" for e in large) - len(large) / 4) <= 1


def test_sizes_are_kept_per_domain_and_too_much_is_an_error():
    examples = [row(i, modality="CT" if i % 2 else "MRI") for i in range(40)]
    split = split_examples(
        examples, test_fraction=0.2, seed=0, keep_together="none", by="modality", train_size=6, test_size=2
    )
    assert {domain: (len(train), len(test)) for domain, (train, test) in split.items()} == {"CT": (6, 2), "MRI": (6, 2)}
    with pytest.raises(DataError, match="has 16 train examples, but --train-size is 17"):
        split_examples(examples, test_fraction=0.2, seed=0, keep_together="none", by="modality", train_size=17)


def medvlm_r1(examples, **changes):
    chosen = {**asdict(splits.PROTOCOLS["medvlm-r1"]), "seed": 0, "keep_together": "none", **changes}
    return split_examples(examples, **chosen)


def test_medvlm_r1_s_protocol_trains_on_600_of_mri_and_tests_on_300_of_each_of_three():
    modalities = ["MRI"] * 1600 + ["CT"] * 1600 + ["X-Ray"] * 1600 + ["OCT"] * 50
    examples = [row(i, modality=m, kind="XY"[i % 2]) for i, m in enumerate(modalities)]
    split = medvlm_r1(examples)
    counts = {domain: (len(train), len(test)) for domain, (train, test) in split.items()}
    assert counts == {"MRI": (600, 300), "CT": (0, 300), "X-Ray": (0, 300)}
    few = medvlm_r1(examples, train_size=300)
    assert {e.id for e in few["MRI"][0]} < {e.id for e in split["MRI"][0]} and few["CT"] == split["CT"]
    assert not {e.id for e in split["MRI"][0]} & {e.id for e in split["MRI"][1]}
    assert splits.PROTOCOLS["medvlm-r1"].keep_together == "image"


def test_a_protocol_over_domains_that_are_missing_names_those_there_are():
    with pytest.raises(DataError, match="no examples of X-Ray; there are CT, MRI"):
        medvlm_r1([row(1, modality="MRI"), row(2, modality="CT")])


@pytest.mark.parametrize(
    ("domain", "name"),
    [("CT", "ct"), ("X-Ray", "x-ray"), ("Anatomy Identification", "anatomy-identification"), ("Fundus", "fundus"),
     ("Other Biological Attributes", "other-biological-attributes"), ("../../etc", "etc"), ("", "unnamed"),
     ("Röntgen_Bild (alt)", "röntgen-bild-alt")],
)  # fmt: skip
def test_a_domain_is_named_by_a_short_slug(domain, name):
    assert slug(domain) == name


def test_an_unknown_patient_is_an_error_and_not_a_guess(gallery):
    examples = [row(0, gallery[0], patient="p"), row(1, gallery[1])]
    with pytest.raises(DataError, match=r"1 of 2 examples have no patient, e.g. '1'.*--keep-together image"):
        split_examples(examples, test_fraction=0.5, seed=0, keep_together="patient")


def test_domains_too_entangled_to_divide_are_an_error(monkeypatch):
    # three parts, three domains, each domain in two of the parts: an odd cycle has no two-coloring
    a, b, c = (Path(name) for name in "abc")
    kinds = {a: "XZ", b: "XY", c: "YZ"}
    examples = [row(i, image, kind=kind) for i, (image, kind) in enumerate((p, k) for p in kinds for k in kinds[p])]
    monkeypatch.setitem(splits.KEYS, "image", lambda rows, quiet: [list(row.images) for row in rows])
    with pytest.raises(DataError, match=r"domain '[XYZ]' gets no (test|train) set"):
        split_examples(examples, test_fraction=0.5, seed=0, by="question_type")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"test_fraction": 0}, "between 0 and 1"),
        ({"keep_together": "lesion"}, "image, patient, source, none"),
        ({"by": "color"}, "by is 'color'"),
    ],
)
def test_impossible_arguments_are_refused(change, words):
    with pytest.raises(SettingsError, match=words):
        split_examples([row(0)], **{"test_fraction": 0.2, "seed": 0, **change})
    with pytest.raises(DataError, match="no examples"):
        split_examples([], test_fraction=0.2, seed=0)


@pytest.mark.parametrize("copied", [True, False])
def test_a_divided_store_links_to_its_images_where_the_store_did_and_does_not_need_it_then(tmp_path, copied):
    (tmp_path / "images/a b").mkdir(parents=True)
    rows = []
    for number in range(10):
        path = tmp_path / f"images/a b/{number}.png"
        phantom(number).save(path)
        rows.append(replace(row(number), images=(path,)))
    store.write_store(tmp_path / "whole", rows, source="s", license="l", copy=copied)
    split_store(tmp_path / "whole", tmp_path / "out", keep_together="none", test_fraction=0.3, seed=0)
    shutil.rmtree(tmp_path / "whole")
    for side in ("train", "test"):
        folder = tmp_path / "out/all" / side
        assert (folder / "images").is_symlink() != copied
        assert store.verify(folder).rows == len(store.load(folder))
    assert len(list((tmp_path / "images/a b").iterdir())) == 10
