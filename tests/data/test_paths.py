"""Sixty ways to lead a path out of its folder, and the odd but honest names that must still work."""

import os

import pytest

from medrl.data.paths import safe_path
from medrl.errors import DataError

UP = ["..", "../x.png", "a/../../x.png", "a/../b.png", "./../x.png", "a/b/../../../x", "../../etc/passwd", "a/..",
      ".. /x.png", "a/.. /x.png", "../", "..../x", " ../x.png", "a/... /x"]  # fmt: skip
ABSOLUTE = ["/etc/passwd", "//etc/passwd", "//server/share/x.png", "/", "/proc/self/environ", "~/x.png", "~root/x.png"]
SCHEMES = ["file:///etc/passwd", "file:/etc/passwd", "FILE:///etc/passwd", "https://a/b.png", "http:x", "ftp://a/b",
           "s3://bucket/x", "data:image/png;base64,AAAA", "smb://host/x", "javascript:alert(1)",
           "jar:file:x!/y"]  # fmt: skip
CONTROL = ["a\0b.png", "\0", "x.png\0.txt", "a\nb.png", "a\r.png", "a\x1b[2J.png", "a\x7f.png", "half \ud83d.png",
           "a\u202egnp.exe"]  # fmt: skip
ENCODED = ["%2e%2e/x.png", "%2e%2e%2fx.png", "..%2fx.png", "%252e%252e%252fx", "%2Fetc%2Fpasswd", "a/%2e%2e/%2e%2e/x",
           "%00.png", "..%5cx.png", "%c0%ae%c0%ae/x", "%66ile:///etc/passwd", "．．/x.png", "．．／x.png",
           "‥/x.png"]  # fmt: skip
WINDOWS = ["C:/x.png", "C:x.png", "c:\\x.png", "..\\x.png", "\\\\host\\share\\x", "\\\\?\\C:\\x", "a\\b.png", "\\x.png",
           "nul", "CON.png", "a/aux.txt", "COM1", "lpt9.dcm", "x.png::$DATA", "x.png:stream"]  # fmt: skip
EMPTY = ["", " ", "\t"]
HOSTILE = [*UP, *ABSOLUTE, *SCHEMES, *CONTROL, *ENCODED, *WINDOWS, *EMPTY]


def test_there_are_at_least_sixty_forms():
    assert len(set(HOSTILE)) >= 60


@pytest.mark.parametrize("path", HOSTILE, ids=ascii)
def test_a_hostile_path_is_refused_with_one_line(tmp_path, path):
    with pytest.raises(DataError, match=r"^the image path is empty$|^image path .*: give a plain path") as caught:
        safe_path(tmp_path, path)
    assert len(str(caught.value).splitlines()) == 1 and str(caught.value).isprintable()


@pytest.mark.parametrize(
    "path",
    ["a/b.png", "a & b (1) [x].tif", "NLM- Malaria Data/1.png", "..hidden.png", "a..b/c..d.png", "100%.png",
     "50%20.png", "Käse/Größe.png", "CT#3.png", "a=b;c.png", "consent/console.png", "a/./b.png", "医学/图.png",
     "nullification.png"],
)  # fmt: skip
def test_odd_but_honest_names_stay_as_they_are(tmp_path, path):
    assert safe_path(tmp_path, path) == tmp_path / path


def test_links_may_lead_around_inside_but_not_out(tmp_path):
    root = tmp_path / "root"
    (root / "real").mkdir(parents=True)
    (tmp_path / "secret.png").write_bytes(b"x")
    os.symlink(tmp_path, root / "out")
    os.symlink("../../secret.png", root / "real" / "file.png")
    os.symlink(root / "real", root / "alias")
    os.symlink("loop", root / "loop")
    assert safe_path(root, "alias/a.png") == root / "alias" / "a.png"
    for path in ("out/secret.png", "real/file.png", "alias/file.png", "out"):
        with pytest.raises(DataError, match=r"leads out of .* symbolic link"):
            safe_path(root, path)
    with pytest.raises(DataError, match=r"cannot be followed|leads out"):
        safe_path(root, "loop/x.png")


def test_a_name_longer_than_file_systems_take_is_refused(tmp_path):
    for path in ("a/" * 5000 + "a.png", "a" * 300 + ".png", "ä" * 200):
        with pytest.raises(DataError, match="longer than file systems take"):
            safe_path(tmp_path, path)
