"""Pixels come out as the rules say, and whatever cannot be decoded is one typed error."""

import contextlib
import io
import pickle
import struct
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from medrl.data.images import MAX_PIXELS, check_image, open_image, pixel_digest, stored_size
from medrl.errors import ImageError, MissingExtraError

CORNERS = np.array([[[250, 0, 0], [0, 250, 0]], [[0, 0, 250], [250, 250, 250]]], dtype=np.uint8)


def save(path: Path, image: Image.Image, **options) -> Path:
    image.save(path, **options)
    return path


def pixels(path: Path) -> list:
    return np.asarray(open_image(path)).tolist()


@pytest.mark.parametrize("suffix", ["png", "tif", "webp", "bmp"])
def test_lossless_formats_give_the_pixels_that_were_saved(tmp_path, suffix):
    options = {"lossless": True} if suffix == "webp" else {}
    path = save(tmp_path / f"a.{suffix}", Image.fromarray(CORNERS), **options)
    image = open_image(path)
    assert image.mode == "RGB" and pixels(path) == CORNERS.tolist()


def test_jpeg_is_read_and_the_suffix_does_not_matter(tmp_path):
    path = save(tmp_path / "a.png", Image.new("RGB", (9, 5), (100, 100, 100)), format="JPEG")
    assert open_image(path).size == (9, 5)


@pytest.mark.parametrize("suffix", ["png", "tif", "jpg"])
def test_exif_orientation_turns_the_picture(tmp_path, suffix):
    exif = Image.Exif()
    exif[0x0112] = 6  # stored on its side: the viewer turns it a quarter clockwise
    image = Image.new("RGB", (40, 20), (0, 0, 0))
    image.paste((255, 255, 255), (0, 0, 20, 20))
    upright = np.asarray(open_image(save(tmp_path / f"a.{suffix}", image, exif=exif)))
    assert upright.shape == (40, 20, 3)
    assert upright[5].min() > 200 and upright[35].max() < 50


def test_alpha_and_transparent_palettes_lie_over_black(tmp_path):
    half = Image.new("RGBA", (1, 1), (200, 100, 50, 128))
    assert pixels(save(tmp_path / "a.png", half)) == [[[100, 50, 25]]]
    clear = Image.new("LA", (1, 1), (255, 0))
    assert pixels(save(tmp_path / "b.png", clear)) == [[[0, 0, 0]]]
    palette = Image.new("P", (2, 1))
    palette.putpalette([255, 255, 255, 9, 8, 7])
    palette.putpixel((1, 0), 1)
    assert pixels(save(tmp_path / "c.png", palette, transparency=0)) == [[[0, 0, 0], [9, 8, 7]]]


@pytest.mark.parametrize(
    ("dtype", "suffix"), [(np.uint16, "png"), (np.uint16, "tif"), (np.float32, "tif"), (np.int32, "tif")]
)
def test_deep_grey_runs_from_its_own_minimum_to_its_own_maximum(tmp_path, dtype, suffix):
    values = np.array([[1000, 1100], [1500, 2000]], dtype=dtype)
    path = save(tmp_path / f"a.{suffix}", Image.fromarray(values))
    # 0, 0.1, 0.5, 1 of 255; 25.5 and 127.5 go to the even neighbor
    assert np.asarray(open_image(path))[..., 0].tolist() == [[0, 26], [128, 255]]


def test_a_constant_deep_grey_picture_is_black_and_one_with_nan_is_refused(tmp_path):
    assert pixels(save(tmp_path / "a.png", Image.fromarray(np.full((1, 1), 700, np.uint16)))) == [[[0, 0, 0]]]
    with pytest.raises(ImageError, match="not finite"):
        open_image(save(tmp_path / "a.tif", Image.fromarray(np.array([[np.nan, 1]], np.float32))))


def test_white_is_zero_is_turned(tmp_path):
    values = Image.fromarray(np.array([[0, 65535]], np.uint16))
    path = save(tmp_path / "a.tif", values, tiffinfo={262: 0})
    raw = path.read_bytes()
    assert Image.open(path).tag_v2[262] == 0, raw[:4]
    assert pixels(path) == [[[255] * 3, [0] * 3]]


def png_claiming(width: int, height: int) -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("side", [8001, 9600, 13000, 60000])
def test_a_picture_over_the_limit_is_refused_from_its_header(tmp_path, side):
    assert side * side > MAX_PIXELS
    (tmp_path / "bomb.png").write_bytes(png_claiming(side, side))
    with pytest.raises(ImageError, match="too large"):
        open_image(tmp_path / "bomb.png")


@pytest.mark.filterwarnings("error::PIL.Image.DecompressionBombWarning")
def test_a_bomb_warning_raised_as_an_error_is_an_image_error(tmp_path):
    (tmp_path / "bomb.png").write_bytes(png_claiming(9600, 9600))
    with pytest.raises(ImageError, match="too large"):
        open_image(tmp_path / "bomb.png")


@pytest.mark.parametrize(("name", "package"), [("a.dcm", "pydicom"), ("a.nii", "nibabel"), ("a.nii.gz", "nibabel")])
def test_a_scan_whose_library_is_missing_names_the_extra_that_reads_it(tmp_path, monkeypatch, name, package):
    (tmp_path / name).write_bytes(b"x")
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingExtraError, match=rf"'{package}'.*pip install 'medrl\[(dicom|nifti)\]'"):
        open_image(tmp_path / name)


def test_an_image_error_says_path_reason_and_fix_and_survives_a_process_border(tmp_path):
    with pytest.raises(ImageError) as caught:
        open_image(tmp_path / "gone.png")
    error = pickle.loads(pickle.dumps(caught.value))  # noqa: S301
    assert (error.path, error.reason) == (tmp_path / "gone.png", "the file does not exist") and error.fix
    assert str(error) == str(caught.value)


def test_the_cheap_check_finds_what_decoding_finds(tmp_path):
    image = Image.effect_noise((64, 64), 90)
    for format in ("PNG", "JPEG", "TIFF", "WEBP", "BMP"):
        whole = save(tmp_path / f"a.{format}", image.convert("RGB"), format=format)
        check_image(whole)
        raw = whole.read_bytes()
        damaged = {"cut": raw[: len(raw) * 2 // 3], "garbage": b"\0" * 500 + raw, "empty": b""}
        if format == "PNG":
            damaged["flipped"] = raw[:-60] + bytes([raw[-60] ^ 255]) + raw[-59:]
        for name, content in damaged.items():
            (tmp_path / name).write_bytes(content)
            with pytest.raises(ImageError, match=name):
                check_image(tmp_path / name)


def test_a_large_deep_grey_picture_is_stretched_strip_by_strip_as_in_one_piece(tmp_path):
    values = np.random.default_rng(0).integers(0, 65536, (2100, 1000), dtype=np.uint16)
    path = save(tmp_path / "a.png", Image.fromarray(values))
    low, high = float(values.min()), float(values.max())
    expected = np.rint((values - low) / (high - low) * 255)
    assert np.abs(np.asarray(open_image(path))[..., 0] - expected).max() <= 1


@pytest.mark.parametrize("look", [open_image, check_image, stored_size])
def test_a_strip_that_no_image_processor_takes_is_named_before_a_model_sees_it(tmp_path, look):
    look(save(tmp_path / "long.png", Image.new("L", (200, 1))))
    with pytest.raises(ImageError, match=r"longer\.png: it is 1 x 201 pixels.*200 times.*pad"):
        look(save(tmp_path / "longer.png", Image.new("L", (1, 201))))


def test_missing_folder_text_gif_and_many_frames_are_image_errors_that_name_the_file(tmp_path):
    (tmp_path / "text.png").write_text("hello")
    (tmp_path / "folder.png").mkdir()
    save(tmp_path / "a.gif", Image.new("L", (2, 2)))
    frames = [Image.new("L", (2, 2), shade) for shade in (1, 2)]
    save(tmp_path / "stack.tif", frames[0], save_all=True, append_images=frames[1:])
    for name, words in {
        "gone.png": "does not exist",
        "text.png": "none of PNG",
        "folder.png": "cannot be decoded",
        "a.gif": "none of PNG",
        "stack.tif": "2 frames",
    }.items():
        with pytest.raises(ImageError, match=rf"{name}.*{words}"):
            open_image(tmp_path / name)


def encoded(format: str) -> bytes:
    buffer = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    Image.fromarray(noise).save(buffer, format=format)
    return buffer.getvalue()


WHOLE = {format: encoded(format) for format in ("PNG", "JPEG", "TIFF", "WEBP", "BMP")}


@pytest.mark.filterwarnings("ignore::UserWarning")
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_damaged_file_gives_a_picture_or_an_image_error_and_nothing_else(tmp_path, data):
    raw = bytearray(WHOLE[data.draw(st.sampled_from(sorted(WHOLE)))])
    for place in data.draw(st.lists(st.integers(0, len(raw) - 1), max_size=6)):
        raw[place] = data.draw(st.integers(0, 255))
    (tmp_path / "a").write_bytes(raw[: data.draw(st.integers(0, len(raw)))])
    with contextlib.suppress(ImageError):
        assert open_image(tmp_path / "a").mode == "RGB"


@pytest.mark.parametrize("format", sorted(WHOLE))
def test_a_file_cut_in_half_is_refused(tmp_path, format):
    (tmp_path / "a").write_bytes(WHOLE[format][: len(WHOLE[format]) // 2])
    with pytest.raises(ImageError):
        open_image(tmp_path / "a")


def test_the_pixel_digest_sees_pixels_and_shape_and_not_the_file(tmp_path):
    image = Image.fromarray(CORNERS)
    digest = pixel_digest(save(tmp_path / "a.png", image))
    assert digest == pixel_digest(save(tmp_path / "b.bmp", image))
    assert digest != pixel_digest(save(tmp_path / "c.png", image.transpose(Image.Transpose.ROTATE_90)))
    flat, tall = Image.new("RGB", (4, 1)), Image.new("RGB", (1, 4))
    assert pixel_digest(save(tmp_path / "d.png", flat)) != pixel_digest(save(tmp_path / "e.png", tall))
