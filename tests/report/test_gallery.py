import base64
import dataclasses
import io

import numpy as np
import pytest
from PIL import Image

from medrl.report.gallery import choose_items, embed_image
from medrl.report.tables import read_evaluation


@pytest.fixture(scope="module")
def evaluations(finished_run):
    return [read_evaluation(finished_run / "eval" / name) for name in ("before", "after")]


def decode(uri: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(uri.removeprefix("data:image/jpeg;base64,"))))


def test_the_choice_is_the_same_every_time_and_in_any_order_of_the_records(evaluations):
    shuffled = [dataclasses.replace(item, records=item.records[::-1]) for item in evaluations]
    ids = [item.record.id for item in choose_items(evaluations)]
    assert ids == [item.record.id for item in choose_items(shuffled)]
    assert len(ids) == len(set(ids)) == 24 + 4 + 4


def test_each_kind_is_what_it_says_and_every_kind_is_shown(evaluations):
    items = choose_items(evaluations)
    for item in items:
        before, after = (answered.record.correct for answered in item.answered)
        assert item.kind == {(0, 1): "fixed", (1, 0): "broken", (0, 0): "still_wrong", (1, 1): "right"}[before, after]
    assert {item.kind for item in items} == {"fixed", "broken", "still_wrong", "right"}


def test_the_shortest_and_the_longest_reasoning_are_shown_wherever_they_stand(evaluations):
    last = evaluations[-1]
    lengths = {record.id: place for place, record in enumerate(last.records)}

    def reasoned(record):
        return f"<think>{'w' * (10 + lengths[record.id])}</think><answer>A</answer>"

    records = [dataclasses.replace(record, completion=reasoned(record)) for record in last.records]
    items = choose_items([evaluations[0], dataclasses.replace(last, records=records)])
    shown = {item.record.id for item in items}
    by_length = [record.id for record in records]
    assert {*by_length[:4], *by_length[-4:]} <= shown
    for heading, ids in (("Shortest reasoning", by_length), ("Longest reasoning", by_length[::-1])):
        kinds = {item.record.id for item in items if item.heading not in ("Shortest reasoning", "Longest reasoning")}
        expected = [id for id in ids if id not in kinds][:4]
        assert [item.record.id for item in items if item.heading == heading] == expected
    assert [item.reasoning_characters for item in items] == [10 + lengths[item.record.id] for item in items]


def test_every_domain_is_shown_however_rare(evaluations):
    def rare(evaluation):
        records = [
            dataclasses.replace(record, modality="Fundus" if place < 3 else "CT", question_type=f"type {place // 80}")
            for place, record in enumerate(evaluation.records)
        ]
        return dataclasses.replace(evaluation, records=records)

    items = choose_items([rare(evaluation) for evaluation in evaluations])
    assert sum(item.record.modality == "Fundus" for item in items) >= 2
    assert {item.record.question_type for item in items} == {"type 0", "type 1"}


def test_base_sft_and_rl_stand_side_by_side(evaluations):
    three = [evaluations[0], dataclasses.replace(evaluations[0], name="sft"), evaluations[1]]
    for item in choose_items(three):
        assert [answered.evaluation for answered in item.answered] == ["before", "sft", "after"]
        assert {answered.record.id for answered in item.answered} == {item.record.id}


def test_one_evaluation_alone_shows_right_and_wrong(evaluations):
    items = choose_items(evaluations[:1])
    assert {item.heading for item in items} == {"Wrong", "Right", "Shortest reasoning", "Longest reasoning"}
    assert all(len(item.answered) == 1 for item in items)


def test_the_pieces_of_a_completion_are_the_completion(evaluations):
    for item in choose_items(evaluations):
        for answered in item.answered:
            assert "".join(piece for _, piece in answered.pieces) == answered.record.completion
    tags = [piece for is_tag, piece in answered.pieces if is_tag]
    assert tags in (["<think>", "</think>", "<answer>", "</answer>"], [])


def test_an_image_is_shrunk_and_encoded_anew_without_its_metadata(tmp_path):
    image = Image.new("RGB", (800, 400), (10, 200, 30))
    exif = image.getexif()
    exif[0x010E] = "DOE^JANE"
    image.save(tmp_path / "a.jpg", exif=exif)
    picture = embed_image(tmp_path, "a.jpg")
    assert (picture.width, picture.height) == (256, 128)
    assert decode(picture.uri).size == (256, 128)
    assert not decode(picture.uri).getexif()


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.float32])
def test_deep_gray_images_are_stretched_over_their_range(tmp_path, dtype):
    pixels = np.linspace(1000, 3000, 64 * 64).reshape(64, 64).astype(dtype)
    Image.fromarray(pixels).save(tmp_path / "deep.tiff")
    shown = np.asarray(decode(embed_image(tmp_path, "deep.tiff").uri))
    assert shown.min() < 10 and shown.max() > 245


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK"])
def test_any_mode_can_be_shown(tmp_path, mode):
    Image.new(mode, (20, 10)).save(tmp_path / "a.tiff" if mode == "CMYK" else tmp_path / "a.png")
    assert embed_image(tmp_path, "a.tiff" if mode == "CMYK" else "a.png").uri


def test_pictures_that_a_store_links_to_are_shown_and_their_neighbors_are_not(tmp_path):
    (tmp_path / "pictures").mkdir()
    (tmp_path / "store").mkdir()
    Image.new("L", (8, 8)).save(tmp_path / "pictures/a.png")
    Image.new("L", (8, 8)).save(tmp_path / "secret.png")
    (tmp_path / "store/images").symlink_to(tmp_path / "pictures")
    assert embed_image(tmp_path / "store", "images/a.png").uri
    assert "outside" in embed_image(tmp_path / "store", "images/../secret.png").problem


def test_what_cannot_be_shown_says_why(tmp_path):
    store = tmp_path / "store"
    store.mkdir()
    Image.new("L", (8, 8)).save(tmp_path / "secret.png")
    (store / "link.png").symlink_to(tmp_path / "secret.png")
    (store / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n then nothing")
    (store / "page.svg").write_text("<svg onload='alert(1)'/>")
    assert "no longer" in embed_image(store, "gone.png").problem
    assert "outside" in embed_image(store, "../secret.png").problem
    assert "outside" in embed_image(store, str(tmp_path / "secret.png")).problem
    assert "outside" in embed_image(store, "link.png").problem
    assert "cannot be shown" in embed_image(store, "broken.png").problem
    assert "cannot be shown" in embed_image(store, "page.svg").problem
    assert "does not say" in embed_image(None, "a.png").problem
