"""Copies of pictures without what was written beside the pixels: EXIF, XMP, IPTC, comments, text, trailers.

Names, dates and places of patients travel there. JPEG, PNG and WebP keep their compressed pixels bit for bit: segments
and chunks are kept by allow-list, and of the EXIF only the orientation. Every other format (TIFF, BMP, DICOM, NIfTI) is
written anew as PNG, as ``open_image`` reads it.
"""

import io
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

from PIL import Image

from medrl.data.images import open_image
from medrl.data.scan_files import scan_kind

_PNG = b"\x89PNG\r\n\x1a\n"
_PNG_CHUNKS = {
    b"IHDR": 13, b"PLTE": 768, b"IDAT": 2**31, b"IEND": 0, b"tRNS": 256, b"gAMA": 4, b"cHRM": 32, b"sRGB": 1,
    b"sBIT": 4, b"bKGD": 6, b"pHYs": 9,
}  # fmt: skip
"""Chunks that say how to show the pixels -> most bytes of each; a longer one holds something else."""
_WEBP_CHUNKS = {b"VP8 ", b"VP8L", b"VP8X", b"ALPH"}
_WEBP_EXIF, _WEBP_ALPHA = 0x08, 0x10
_ORIENTATION = 0x0112
_EXIF_HEAD = b"Exif\0\0"
_SOI, _EOI, _SOS, _APP0, _ADOBE = 0xD8, 0xD9, 0xDA, 0xE0, 0xEE
_JPEG_BARE = {0x01, *range(0xD0, 0xD8)}
"""Markers without a body: TEM and the restart marks."""
_JPEG_CODING = {*range(0xC0, 0xD0), *range(0xDA, 0xE0)} - {0xC8}
"""Frames, scans and their tables. Others are for applications, comments or later use, and can hold anything."""
_JFIF_BYTES, _ADOBE_BYTES = 14, 12
"""Bodies of the two application segments that say how to read the pixels, without JFIF's thumbnail."""


class _OddFileError(ValueError):
    """The file is not built as its format says; it is written anew instead."""


def must_be_redrawn(path: Path) -> bool:
    """True for what a copy keeps only as a new PNG: everything but JPEG, PNG and WebP."""
    with path.open("rb") as file:
        return bool(scan_kind(path)) or _stripper(file.read(12)) is None


def copy_picture(source: Path, target: Path) -> None:
    """Copy ``source`` to ``target`` without metadata, see ``picture_bytes``."""
    target.write_bytes(picture_bytes(source))


def picture_bytes(path: Path) -> bytes:
    """The file at ``path`` without metadata.

    Raises:
        ImageError: it must be written anew and cannot be decoded, or is no picture.
        OSError: reading failed.
    """
    if must_be_redrawn(path):
        return _redrawn(path)
    data = path.read_bytes()
    strip = _stripper(data[:12])
    assert strip
    try:
        return strip(data, _orientation(path))
    except (_OddFileError, struct.error):
        return _redrawn(path)


def _stripper(head: bytes) -> Callable[[bytes, bytes], bytes] | None:
    """What takes the words out of a file that begins with ``head``; None where nothing does."""
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return _strip_webp
    return _strip_jpeg if head[:3] == b"\xff\xd8\xff" else _strip_png if head[:8] == _PNG else None


def _redrawn(path: Path) -> bytes:
    buffer = io.BytesIO()
    open_image(path).save(buffer, format="PNG")
    return buffer.getvalue()


def _orientation(path: Path) -> bytes:
    """The picture's orientation as EXIF of one entry; nothing when it is upright."""
    try:
        with Image.open(path, formats=("JPEG", "PNG", "WEBP")) as image:
            turned = image.getexif().get(_ORIENTATION, 1)
    except (OSError, ValueError, SyntaxError, TypeError, LookupError, struct.error) as error:
        raise _OddFileError(str(error)) from error
    if turned not in range(2, 9):
        return b""
    exif = Image.Exif()
    exif[_ORIENTATION] = turned
    return exif.tobytes().removeprefix(_EXIF_HEAD)


def _strip_jpeg(data: bytes, exif: bytes) -> bytes:
    out, place = bytearray(data[:2]), 2
    if exif:
        body = _EXIF_HEAD + exif
        out += b"\xff\xe1" + struct.pack(">H", len(body) + 2) + body
    while True:
        place = data.find(b"\xff", place)
        while 0 <= place < len(data) - 1 and data[place + 1] == 0xFF:
            place += 1
        if not 0 <= place < len(data) - 1:
            raise _OddFileError("no end mark")
        marker = data[place + 1]
        if marker == _EOI:
            return bytes(out + data[place : place + 2])
        if marker in _JPEG_BARE:
            place += 2
            continue
        length = 2 + struct.unpack_from(">H", data, place + 2)[0]
        segment = data[place : place + length]
        if marker in _JPEG_CODING:
            out += segment
        elif marker == _APP0 and segment[4:9] == b"JFIF\0" and length >= 4 + _JFIF_BYTES:
            out += segment[:2] + struct.pack(">H", 2 + _JFIF_BYTES) + segment[4:16] + b"\0\0"
        elif marker == _ADOBE and segment[4:9] == b"Adobe" and length >= 4 + _ADOBE_BYTES:
            out += segment[:2] + struct.pack(">H", 2 + _ADOBE_BYTES) + segment[4:16]
        place += length
        if marker == _SOS:
            end = _end_of_scan(data, place)
            out += data[place:end]
            place = end


def _end_of_scan(data: bytes, place: int) -> int:
    """Where the next marker stands that is neither a stuffed byte nor a restart mark."""
    while True:
        place = data.find(b"\xff", place)
        if not 0 <= place < len(data) - 1:
            raise _OddFileError("a scan without an end")
        if data[place + 1] == 0 or data[place + 1] in _JPEG_BARE:
            place += 2
        elif data[place + 1] == 0xFF:
            place += 1
        else:
            return place


def _strip_png(data: bytes, exif: bytes) -> bytes:
    out, place = bytearray(_PNG), len(_PNG)
    while True:
        length, kind = struct.unpack_from(">I4s", data, place)
        chunk = data[place : place + 12 + length]
        if len(chunk) < 12 + length:
            raise _OddFileError("a chunk is cut off")
        if length > _PNG_CHUNKS.get(kind, length):
            raise _OddFileError("a chunk is too long")
        if kind in _PNG_CHUNKS:
            out += chunk
        if kind == b"IHDR" and exif:
            out += struct.pack(">I4s", len(exif), b"eXIf") + exif + struct.pack(">I", zlib.crc32(b"eXIf" + exif))
        if kind == b"IEND":
            return bytes(out)
        place += 12 + length


def _strip_webp(data: bytes, exif: bytes) -> bytes:
    body, place = bytearray(), 12
    end = min(len(data), 8 + struct.unpack_from("<I", data, 4)[0])
    while place + 8 <= end:
        kind, length = struct.unpack_from("<4sI", data, place)
        padded = length + length % 2
        chunk = bytearray(data[place : place + 8 + padded])
        if len(chunk) < 8 + length:
            raise _OddFileError("a chunk is cut off")
        if kind == b"VP8X":
            chunk[8] = (chunk[8] & _WEBP_ALPHA) | (_WEBP_EXIF if exif else 0)
        if kind in _WEBP_CHUNKS:
            body += chunk
        place += 8 + padded
    if exif and not body.startswith(b"VP8X"):
        raise _OddFileError("an orientation without an extended header")
    if exif:
        body += struct.pack("<4sI", b"EXIF", len(exif)) + exif + b"\0" * (len(exif) % 2)
    return b"RIFF" + struct.pack("<I", len(body) + 4) + b"WEBP" + bytes(body)
