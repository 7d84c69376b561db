"""A copy has the same pixels and none of the words."""

import struct
import zlib

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from medrl.data.clean import copy_picture, must_be_redrawn
from medrl.data.images import open_image
from medrl.errors import ImageError

SECRET = "Doe^Jane 1970-01-02"


def picture() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 40, 3), dtype=np.uint8))


def exif(orientation: int) -> Image.Exif:
    tags = Image.Exif()
    tags[0x0112], tags[0x010E], tags[0x013B] = orientation, SECRET, SECRET
    tags.get_ifd(0x8825)[1] = SECRET
    return tags


def save(path, format, orientation=1, **options):
    text = PngImagePlugin.PngInfo()
    text.add_text("PatientName", SECRET)
    text.add_itxt("Comment", SECRET, zip=False)
    extra = {
        "PNG": {"pnginfo": text},
        "JPEG": {"comment": SECRET.encode(), "icc_profile": SECRET.encode(), "quality": 90},
        "WEBP": {"xmp": SECRET.encode(), "icc_profile": SECRET.encode(), "lossless": True},
        "TIFF": {"tiffinfo": {270: SECRET, 315: SECRET, 274: orientation}},
    }[format]
    picture().save(path, format=format, exif=exif(orientation), **extra, **options)
    with path.open("ab") as file:
        file.write(SECRET.encode())
    assert SECRET.encode() in path.read_bytes()
    return path


@pytest.mark.parametrize("orientation", [1, 6])
@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "TIFF"])
def test_text_goes_and_pixels_and_orientation_stay(tmp_path, format, orientation):
    source, target = save(tmp_path / "a", format, orientation), tmp_path / "b"
    copy_picture(source, target)
    assert SECRET.encode() not in target.read_bytes() and b"Jane" not in target.read_bytes()
    assert open_image(target).size == ((40, 24) if orientation == 1 else (24, 40))
    assert np.array_equal(np.asarray(open_image(target)), np.asarray(open_image(source)))


def test_a_progressive_jpeg_with_restarts_and_comments_between_scans_keeps_its_pixels(tmp_path):
    source = save(tmp_path / "a.jpg", "JPEG", progressive=True, restart_marker_blocks=2)
    data = source.read_bytes()
    second_scan = data.index(b"\xff\xda", data.index(b"\xff\xda") + 2)
    comment = b"\xff\xfe" + (len(SECRET) + 2).to_bytes(2, "big") + SECRET.encode()
    source.write_bytes(data[:second_scan] + comment + data[second_scan:])
    copy_picture(source, tmp_path / "b.jpg")
    assert b"Jane" not in (tmp_path / "b.jpg").read_bytes()
    assert np.array_equal(np.asarray(open_image(tmp_path / "b.jpg")), np.asarray(open_image(source)))


def test_a_file_without_words_is_copied_bit_for_bit(tmp_path):
    for format in ("PNG", "WEBP"):
        picture().save(tmp_path / "a", format=format)
        copy_picture(tmp_path / "a", tmp_path / "b")
        assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes(), format
        assert not must_be_redrawn(tmp_path / "a")


@pytest.mark.parametrize("form", ["TIFF", "BigTIFF", "TIFF without tags of text", "BMP"])
def test_what_has_no_stripper_is_drawn_anew(tmp_path, form):
    source = tmp_path / "a"
    tags = {} if form.endswith("text") else {"tiffinfo": {270: SECRET}, "big_tiff": form == "BigTIFF"}
    picture().save(source, format=form.split()[0].removeprefix("Big"), **({} if form == "BMP" else tags))
    with source.open("ab") as file:
        file.write(SECRET.encode())
    assert must_be_redrawn(source)
    copy_picture(source, tmp_path / "b")
    assert b"Jane" not in (tmp_path / "b").read_bytes()
    assert np.array_equal(np.asarray(open_image(tmp_path / "b")), np.asarray(picture()))


def test_a_big_tiff_of_either_byte_order_reaches_no_store_with_its_words(tmp_path):
    picture().save(tmp_path / "a.tif", big_tiff=True, tiffinfo={270: SECRET})
    assert (tmp_path / "a.tif").read_bytes()[:4] == b"II+\0"
    (tmp_path / "b.tif").write_bytes(b"MM\0+" + SECRET.encode())  # cannot be drawn: refused, and not handed on
    assert must_be_redrawn(tmp_path / "b.tif")
    with pytest.raises(ImageError):
        copy_picture(tmp_path / "b.tif", tmp_path / "copy")


def test_thumbnails_and_segments_of_no_known_use_stay_behind(tmp_path):
    picture().save(tmp_path / "a.jpg", quality=90)
    data = (tmp_path / "a.jpg").read_bytes()
    assert data[2:4] == b"\xff\xe0" and data[18:20] == b"\0\0"  # JFIF, no thumbnail yet
    thumbnail = (SECRET * 3).encode()[:48]  # 4 x 4 pixels
    reserved = b"\xff\xf7" + (len(SECRET) + 2).to_bytes(2, "big") + SECRET.encode()
    jfif = data[2:4] + (16 + 48).to_bytes(2, "big") + data[6:18] + b"\4\4" + thumbnail
    (tmp_path / "a.jpg").write_bytes(data[:2] + jfif + reserved + data[20:])
    copy_picture(tmp_path / "a.jpg", tmp_path / "b.jpg")
    assert b"Jane" not in (tmp_path / "b.jpg").read_bytes()
    assert (tmp_path / "b.jpg").read_bytes() == data


def test_a_color_profile_and_a_private_chunk_stay_behind(tmp_path):
    info = PngImagePlugin.PngInfo()
    info.add(b"paTt", SECRET.encode(), after_idat=True)
    picture().save(tmp_path / "a.png", icc_profile=SECRET.encode(), pnginfo=info)
    picture().save(tmp_path / "plain.png")
    assert b"iCCP" in (tmp_path / "a.png").read_bytes() and b"Jane" in (tmp_path / "a.png").read_bytes()
    copy_picture(tmp_path / "a.png", tmp_path / "b.png")
    assert (tmp_path / "b.png").read_bytes() == (tmp_path / "plain.png").read_bytes()


def test_words_behind_the_values_of_a_chunk_that_is_kept_stay_behind_too(tmp_path):
    picture().save(tmp_path / "a.png")
    data, body = (tmp_path / "a.png").read_bytes(), b"pHYs" + bytes(9) + SECRET.encode()
    chunk = struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))
    (tmp_path / "a.png").write_bytes(data[:33] + chunk + data[33:])  # behind the header
    assert np.array_equal(np.asarray(open_image(tmp_path / "a.png")), np.asarray(picture()))  # readers do not mind
    copy_picture(tmp_path / "a.png", tmp_path / "b.png")
    assert b"Jane" not in (tmp_path / "b.png").read_bytes()
    assert np.array_equal(np.asarray(open_image(tmp_path / "b.png")), np.asarray(picture()))


def test_alpha_survives_in_webp_and_png(tmp_path):
    layer = Image.new("RGBA", (8, 8), (200, 100, 50, 128))
    for format in ("PNG", "WEBP"):
        layer.save(tmp_path / "a", format=format, exif=exif(1))
        copy_picture(tmp_path / "a", tmp_path / "b")
        with Image.open(tmp_path / "b") as copy:
            assert copy.convert("RGBA").getpixel((0, 0))[3] == 128


def test_a_file_that_breaks_its_formats_rules_is_drawn_anew_without_its_words(tmp_path):
    source = save(tmp_path / "a.png", "PNG")
    raw = source.read_bytes()
    source.write_bytes(raw[: raw.index(b"IEND") - 4])
    copy_picture(source, tmp_path / "b.png")
    assert b"Jane" not in (tmp_path / "b.png").read_bytes()
    assert np.array_equal(np.asarray(open_image(tmp_path / "b.png")), np.asarray(picture()))
