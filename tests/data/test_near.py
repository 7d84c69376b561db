"""Copies are found, strangers of the same kind are not accused."""

import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from phantoms import LEAKS, phantom
from PIL import Image

from medrl.data.fingerprints import RECORD, TURNS, describe_picture, equalize, fingerprint_images
from medrl.data.images import open_image
from medrl.data.near import agreements, clusters, find_near

N = 40
SHARED = Path(os.environ.get("MEDRL_OMNIMED_MINI", ""), "images")


def describe(images):
    return np.array([np.frombuffer(describe_picture(image), RECORD)[0] for image in images])


@pytest.fixture(scope="module")
def originals():
    return describe([phantom(seed) for seed in range(N)])


def test_strangers_with_one_outline_are_not_near(originals):
    assert find_near(originals) == []


@pytest.mark.parametrize("kind", [kind for kind in LEAKS if kind != "same"])
def test_what_became_of_a_picture_is_near_it_and_near_no_other(originals, kind):
    leaked = describe([LEAKS[kind](phantom(seed)) for seed in range(N)])
    pairs = find_near(originals, leaked)
    assert [(pair.a, pair.b) for pair in pairs] == [(seed, seed) for seed in range(N)]
    assert {TURNS[pair.turn] for pair in pairs} == {"mirrored" if kind == "mirrored" else "as it is"}


def test_the_verdict_on_two_pictures_depends_neither_on_their_order_nor_on_the_set_they_lie_in(originals):
    """Cut and veiled by so much that some pairs pass and some do not: there, which is laid over which tips it."""

    def close_case(seed: int) -> Image.Image:
        picture = phantom(seed)
        margin = round(picture.width * (0.06 + 0.004 * (seed % 10)))
        cut = picture.crop((margin, margin, picture.width - margin, picture.height - margin))
        return Image.blend(cut, phantom(seed + 500).resize(cut.size), 0.3)

    cropped = describe([close_case(seed) for seed in range(N)])
    both = np.concatenate([originals, cropped])
    between = {(pair.a, N + pair.b) for pair in find_near(originals, cropped)}
    assert 0 < len(between) < N
    assert {(pair.b, N + pair.a) for pair in find_near(cropped, originals)} == between
    order = np.random.default_rng(0).permutation(2 * N)
    within = {tuple(sorted((int(order[pair.a]), int(order[pair.b])))) for pair in find_near(both[order])}
    assert within == {(pair.a, pair.b) for pair in find_near(both)} == between


def test_turned_by_180_degrees_and_upside_down_are_told_apart(originals):
    turned = describe([phantom(0).rotate(180), phantom(1).transpose(Image.Transpose.FLIP_TOP_BOTTOM)])
    assert [(p.a, p.b, TURNS[p.turn]) for p in find_near(originals, turned)] == [
        (0, 0, "turned by 180 degrees"),
        (1, 1, "upside down"),
    ]


def test_flat_pictures_are_near_nothing():
    flat = describe([Image.new("RGB", (64, 64), (level, level, level)) for level in (0, 1, 90)])
    assert find_near(flat) == []


def test_a_picture_agrees_fully_with_itself_and_hardly_with_a_stranger(originals):
    ranks = np.stack([equalize(thumb) for thumb in originals["thumb"][:4]])
    assert (agreements(ranks, ranks) > 0.98).all()  # not quite 1: gray levels are put into bins
    assert (agreements(ranks, ranks[[1, 2, 3, 0]]) < 0.6).all()


@settings(deadline=None)
@given(st.integers(1, 12), st.lists(st.tuples(st.integers(0, 11), st.integers(0, 11)), max_size=20))
def test_clusters_are_the_connected_components(size, pairs):
    import scipy.sparse
    import scipy.sparse.csgraph

    pairs = [(a % size, b % size) for a, b in pairs]
    graph = scipy.sparse.coo_array((np.ones(len(pairs)), tuple(np.array(pairs).reshape(-1, 2).T)), (size, size))
    _, labels = scipy.sparse.csgraph.connected_components(graph, directed=False)
    ours = clusters(size, pairs)
    assert len(set(zip(ours, labels.tolist(), strict=True))) == len(set(ours)) == len(set(labels.tolist()))
    assert all(ours[member] <= member for member in range(size))


@pytest.mark.slow
@pytest.mark.skipif(not SHARED.is_dir(), reason="MEDRL_OMNIMED_MINI names no folder with images")
def test_planted_copies_of_real_pictures_are_found():
    files = sorted(path for path in SHARED.rglob("*") if path.is_file())
    records = np.array(list(fingerprint_images(files).values()))
    kinds = [kind for kind in LEAKS if kind != "same"]
    planted = [(place, kinds[n % len(kinds)]) for n, place in enumerate(range(0, len(files), len(files) // 100))]
    leaked = describe([LEAKS[kind](open_image(files[place])) for place, kind in planted])
    found = {(pair.b, pair.a) for pair in find_near(records, leaked)}
    hits = sum((n, place) in found for n, (place, _) in enumerate(planted))
    assert hits >= 0.95 * len(planted)
    assert len({member for pair in find_near(records) for member in (pair.a, pair.b)}) <= 0.05 * len(files)
