"""What a picture is known by, and that nothing is decoded twice."""

import imagehash
import numpy as np
import pytest
from phantoms import phantom
from PIL import Image, ImageOps

from medrl.data import fingerprints
from medrl.data.fingerprints import RECORD, describe_picture, equalize, fingerprint_images, perceptual_hashes
from medrl.data.images import pixel_digest
from medrl.errors import DataError, ImageError


@pytest.fixture
def files(tmp_path):
    paths = [tmp_path / f"{seed}.png" for seed in range(5)]
    for seed, path in enumerate(paths):
        phantom(seed, side=64).save(path)
    return paths


def record(image):
    return np.frombuffer(describe_picture(image), RECORD)[0]


def test_the_digest_is_that_of_the_decoded_pixels(files, tmp_path):
    Image.open(files[0]).save(tmp_path / "same.bmp")
    found = fingerprint_images([*files, tmp_path / "same.bmp"], cache=tmp_path / "cache")
    assert {path: item["digest"].tobytes().hex() for path, item in found.items()} == {p: pixel_digest(p) for p in found}
    assert found[files[0]]["digest"].tobytes() == found[tmp_path / "same.bmp"]["digest"].tobytes()


def test_hashes_are_imagehash_s_of_the_equalized_picture_in_every_turn():
    for seed in range(8):
        ranks = equalize(np.asarray(phantom(seed).convert("L").resize((64, 64))))
        small = Image.fromarray(ranks.reshape(32, 2, 32, 2).mean((1, 3)))  # mode F, 32 x 32: imagehash resizes no more
        turned = (small, ImageOps.mirror(small), ImageOps.flip(small), small.rotate(180))
        for own, image in zip(perceptual_hashes(ranks), turned, strict=True):
            theirs = np.packbits(_phash_bits(np.asarray(image))).view(np.uint64)[0]
            assert int(np.bitwise_count(own ^ theirs)) <= 2  # coefficients that rounding puts on the median


def _phash_bits(pixels):
    """imagehash.phash below its resize, which would round the values to 8 bits."""
    from scipy.fftpack import dct

    low = dct(dct(pixels, axis=0), axis=1)[:8, :8]
    return low > np.median(low)


def test_our_hash_of_gray_levels_is_close_to_imagehash_s():
    for seed in range(8):
        gray = phantom(seed).convert("L").resize((64, 64))
        ours = perceptual_hashes(np.asarray(gray).astype(np.float32))[0]
        theirs = np.packbits(imagehash.phash(gray).hash).view(np.uint64)[0]
        assert int(np.bitwise_count(ours ^ theirs)) <= 6  # another filter for the resize


def test_ranks_do_not_change_under_a_monotone_window():
    gray = np.asarray(phantom(1).convert("L")) // 3
    window = np.cumsum(1 + np.arange(86) % 5).astype(np.uint8)  # uneven, and no two levels become one
    assert np.array_equal(equalize(gray), equalize(window[gray]))


def test_a_picture_with_nothing_in_it_is_flat():
    assert record(Image.new("RGB", (64, 64), (90, 90, 90)))["flat"]
    assert not record(phantom(0))["flat"]


def test_nothing_is_decoded_twice_wherever_the_content_lies(files, tmp_path, monkeypatch):
    first = fingerprint_images(files, cache=tmp_path / "cache")
    copies = [tmp_path / f"copy-{path.name}" for path in files]
    for path, copy in zip(files, copies, strict=True):
        copy.write_bytes(path.read_bytes())

    def refuse(path):
        raise AssertionError(f"{path} was decoded again")

    monkeypatch.setattr(fingerprints, "open_image", refuse)
    again = fingerprint_images([*files, *copies], cache=tmp_path / "cache")
    assert all(again[path] == first[path] for path in files)
    assert [again[copy].tobytes() for copy in copies] == [first[path].tobytes() for path in files]


def test_a_file_that_changed_is_read_anew(files, tmp_path):
    before = fingerprint_images(files[:1], cache=tmp_path / "cache")[files[0]]["digest"].tobytes()
    phantom(99, side=80).save(files[0])
    after = fingerprint_images(files[:1], cache=tmp_path / "cache")[files[0]]["digest"].tobytes()
    assert before != after and after.hex() == pixel_digest(files[0])


def test_work_that_was_stopped_goes_on_where_it_was(files, tmp_path, monkeypatch):
    monkeypatch.setattr(fingerprints, "_BATCH", 2)
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no picture")
    with pytest.raises(ImageError, match=r"broken\.png"):
        fingerprint_images([*files[:4], broken], cache=tmp_path / "cache")
    decoded = []
    real = fingerprints.open_image
    monkeypatch.setattr(fingerprints, "open_image", lambda path: decoded.append(path) or real(path))
    fingerprint_images(files, cache=tmp_path / "cache")
    assert decoded == [files[4]]


def test_the_cache_holds_no_path(files, tmp_path):
    fingerprint_images(files, cache=tmp_path / "cache")
    kept = b"".join(path.read_bytes() for path in (tmp_path / "cache").iterdir())
    assert len(kept) > 5 * RECORD.itemsize and str(tmp_path).encode() not in kept and b"0.png" not in kept


def test_a_missing_file_and_an_unusable_cache_are_clear_errors(files, tmp_path):
    with pytest.raises(ImageError, match=r"gone\.png.*import the data again"):
        fingerprint_images([tmp_path / "gone.png"], cache=tmp_path / "cache")
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="MEDRL_CACHE"):
        fingerprint_images(files, cache=tmp_path / "file")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "pictures-1.sqlite").write_text("this is no database, and long enough to be seen as none" * 9)
    with pytest.raises(DataError, match="delete it"):
        fingerprint_images(files, cache=tmp_path / "bad")
