"""DICOM and NIfTI slices, against arithmetic by hand and pydicom's and nibabel's own functions."""

import gzip
from pathlib import Path

import numpy as np
import pytest

from medrl.data.gray import WINDOWS_HU, View, chosen_slices, window_gray
from medrl.data.images import open_image, open_slices
from medrl.errors import ImageError, SettingsError

pydicom = pytest.importorskip("pydicom")
nibabel = pytest.importorskip("nibabel")

from pydicom.dataset import Dataset, FileMetaDataset  # noqa: E402
from pydicom.sequence import Sequence  # noqa: E402
from pydicom.uid import ExplicitVRLittleEndian, JPEG2000Lossless, RLELossless, generate_uid  # noqa: E402


def dicom(path: Path, values: np.ndarray, bits: int | None = None, syntax=ExplicitVRLittleEndian, **tags) -> Path:
    """A CT file of ``values``: (rows, columns), (frames, rows, columns) or (rows, columns, 3)."""
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID = "1.2.840.10008.5.1.4.1.1.2"
    dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID = generate_uid()
    color = values.ndim == 3 and values.shape[2] == 3
    frames = values.shape[0] if values.ndim == 3 and not color else 1
    dataset.Rows, dataset.Columns = values.shape[:2] if color or values.ndim == 2 else values.shape[1:]
    dataset.SamplesPerPixel = 3 if color else 1
    dataset.PhotometricInterpretation = "RGB" if color else "MONOCHROME2"
    if color:
        dataset.PlanarConfiguration = 0
    dataset.BitsAllocated = values.dtype.itemsize * 8
    dataset.BitsStored = bits or dataset.BitsAllocated
    dataset.HighBit = dataset.BitsStored - 1
    dataset.PixelRepresentation = int(values.dtype.kind == "i")
    if frames > 1:
        dataset.NumberOfFrames = frames
    dataset.Modality = "CT"
    dataset.PixelData = values.tobytes()
    for name, value in tags.items():
        setattr(dataset, name, value)
    if syntax != ExplicitVRLittleEndian:
        dataset.compress(syntax)
    dataset.save_as(path, enforce_file_format=True)
    return path


def gray(path: Path, **view) -> list:
    return np.asarray(open_image(path, View(**view)))[..., 0].tolist()


def test_the_modality_lut_comes_before_the_window(tmp_path):
    stored = np.array([[0, 1000], [1040, 4095]], np.uint16)
    path = dicom(tmp_path / "a.dcm", stored, RescaleIntercept="-1024", RescaleSlope="1", WindowCenter=["16", "0"],
                 WindowWidth=["81", "9"])  # fmt: skip
    # Hounsfield units -1024, -24, 16, 3071 in a window of 16 +- 40: C.11.2.1.2 with c - 0.5 = 15.5 and w - 1 = 80
    assert gray(path) == [[0, round(255 * ((-24 - 15.5) / 80 + 0.5))], [round(255 * (0.5 / 80 + 0.5)), 255]]


@pytest.mark.parametrize("form", ["LINEAR", "LINEAR_EXACT", "SIGMOID"])
def test_windows_agree_with_pydicom(form):
    from pydicom.pixels import apply_windowing

    values = np.linspace(-1200, 1200, 600).reshape(20, 30)
    dataset = Dataset()
    dataset.PhotometricInterpretation, dataset.BitsStored, dataset.PixelRepresentation = "MONOCHROME2", 8, 0
    dataset.WindowCenter, dataset.WindowWidth, dataset.VOILUTFunction = 40, 400, form
    assert np.abs(window_gray(values, 40, 400, form) - apply_windowing(values, dataset)).max() <= 0.5


@pytest.mark.parametrize("name", sorted(WINDOWS_HU))
def test_a_named_window_shows_its_center_as_middle_gray_and_cuts_at_its_width(tmp_path, name):
    center, width = WINDOWS_HU[name]
    units = np.array([[center - width, center, center + width]], np.int16)
    [[low, middle, high]] = gray(dicom(tmp_path / "a.dcm", units, WindowCenter=0, WindowWidth=5), window=name)
    assert (low, high) == (0, 255) and 127 <= middle <= 132


def test_three_windows_become_red_green_and_blue(tmp_path):
    path = dicom(tmp_path / "a.dcm", np.array([[-600, 50]], np.int16))
    [lung, soft] = np.asarray(open_image(path, View(window="lung,mediastinum,bone")))[0].tolist()
    assert lung == [round(255 * (0.5 / 1599 + 0.5)), 0, 0]
    assert soft[0] > 220 and soft[1] in (127, 128) and soft[2] == round(255 * ((50 - 499.5) / 1999 + 0.5))


def test_a_named_window_is_refused_where_values_are_no_hounsfield_units(tmp_path):
    path = dicom(tmp_path / "a.dcm", np.zeros((2, 2), np.uint16), Modality="MR")
    with pytest.raises(ImageError, match="not CT"):
        open_image(path, View(window="lung"))


def test_monochrome1_is_turned(tmp_path):
    path = dicom(tmp_path / "a.dcm", np.array([[0, 100, 200]], np.uint8), PhotometricInterpretation="MONOCHROME1")
    assert gray(path) == [[255, 127, 0]]


def test_a_voi_lut_sequence_goes_before_the_window(tmp_path):
    table = Dataset()
    table.LUTDescriptor = [4, 0, 8]
    table.add_new("LUTData", "US", [9, 200, 30, 255])
    values = np.array([[0, 1, 2, 3]], np.uint8)
    tags = {"VOILUTSequence": Sequence([table]), "WindowCenter": 1, "WindowWidth": 2}
    assert gray(dicom(tmp_path / "a.dcm", values, **tags)) == [[9, 200, 30, 255]]


def test_a_frame_is_chosen_by_its_number_and_the_middle_one_by_default(tmp_path):
    frames = np.stack([np.array([[0, shade]], np.uint8) for shade in (50, 100, 150, 200, 250)])
    path = dicom(tmp_path / "a.dcm", frames, WindowCenter=128, WindowWidth=256)
    assert gray(path)[0][1] == pytest.approx(150, abs=1)
    shades = [np.asarray(picture)[0, 1, 0] for picture in open_slices(path, View(slices="index:4,0"))]
    assert shades == pytest.approx([250, 50], abs=1)
    assert len(open_slices(path, View(slices="uniform:3"))) == 3
    with pytest.raises(SettingsError, match="there are 5, so the last one is 4"):
        open_slices(path, View(slices="index:5"))


def test_an_enhanced_files_frame_has_its_own_rescale_and_window(tmp_path):
    def group(intercept: int) -> Dataset:
        rescale, window, item = Dataset(), Dataset(), Dataset()
        rescale.RescaleIntercept, rescale.RescaleSlope, rescale.RescaleType = intercept, 1, "HU"
        window.WindowCenter, window.WindowWidth = 0.5, 256
        item.PixelValueTransformationSequence, item.FrameVOILUTSequence = Sequence([rescale]), Sequence([window])
        return item

    frames = np.full((2, 1, 1), 10, np.int16)
    path = dicom(tmp_path / "a.dcm", frames, PerFrameFunctionalGroupsSequence=Sequence([group(0), group(50)]))
    first, second = open_slices(path, View(slices="index:0,1"))
    assert np.asarray(second)[0, 0, 0] - np.asarray(first)[0, 0, 0] == 50


def test_bits_above_those_stored_are_dropped_with_and_without_a_sign(tmp_path):
    overlay = np.array([[5, 9 | 0x8000]], np.uint16)
    assert gray(dicom(tmp_path / "a.dcm", overlay, bits=12, WindowCenter=7.5, WindowWidth=5)) == [[0, 255]]
    signed = np.array([[-5 & 0x0FFF, 5]], np.int16)  # 12 bits of two's complement, the upper four empty
    assert gray(dicom(tmp_path / "b.dcm", signed, bits=12)) == [[0, 255]]


@pytest.mark.parametrize("syntax", [RLELossless, JPEG2000Lossless])
def test_rle_and_jpeg_2000_give_the_pixels_that_went_in(tmp_path, syntax):
    pytest.importorskip("openjpeg")
    values = np.random.default_rng(0).integers(0, 4000, (2, 64, 80), dtype=np.uint16)
    plain, packed = dicom(tmp_path / "a.dcm", values), dicom(tmp_path / "b.dcm", values, syntax=syntax)
    assert gray(packed, slices="index:1") == gray(plain, slices="index:1")


def test_color_and_palette_files_are_shown_in_color(tmp_path):
    color = np.array([[[250, 10, 20], [0, 200, 3]]], np.uint8)
    assert np.asarray(open_image(dicom(tmp_path / "a.dcm", color))).tolist() == color.tolist()
    palette = pydicom.examples.get_path("palette_color")
    assert len(set(np.asarray(open_image(palette)).reshape(-1, 3).std(axis=1).round().tolist())) > 3


@pytest.mark.parametrize(
    ("tags", "words"),
    [
        ({"Rows": 60000, "Columns": 60000}, "too large: 60000 x 60000"),
        ({"NumberOfFrames": 1_000_000_000}, "1000000000 frames"),
        ({"Rows": 0}, "0 rows"),
        ({"SamplesPerPixel": 7}, "7 samples"),
        ({"Rows": 64}, "asks for 1024 bytes of pixels, it holds 64"),
    ],
)
def test_sizes_are_checked_before_pixels_are_touched(tmp_path, tags, words):
    path = dicom(tmp_path / "a.dcm", np.zeros((4, 8), np.uint16), **tags)
    with pytest.raises(ImageError, match=words):
        open_image(path)


def test_what_cannot_be_read_is_an_image_error_without_the_headers_text(tmp_path):
    path = dicom(tmp_path / "a.dcm", np.zeros((4, 8), np.uint16), PatientName="Doe^Jane")
    raw = path.read_bytes()
    (tmp_path / "cut.dcm").write_bytes(raw[:400])
    (tmp_path / "text.dcm").write_text("Doe Jane")
    nested = inner = Dataset()
    for _ in range(300):
        inner.RequestAttributesSequence = Sequence([Dataset()])
        inner = inner.RequestAttributesSequence[0]
    dicom(tmp_path / "nested.dcm", np.zeros((4, 8), np.uint16))
    for name in ("cut.dcm", "text.dcm", "gone.dcm"):
        with pytest.raises(ImageError) as caught:
            open_image(tmp_path / name)
        assert "Doe" not in str(caught.value) and caught.value.fix
    assert nested.RequestAttributesSequence


def test_three_hundred_nested_sequences_are_an_image_error_or_a_picture(tmp_path):
    raw = dicom(tmp_path / "a.dcm", np.zeros((4, 8), np.uint16)).read_bytes()
    sequence = bytes.fromhex("4000750253510000ffffffff") + bytes.fromhex("feff00e0ffffffff")  # of undefined length
    place = raw.index(bytes.fromhex("28000200"))
    (tmp_path / "deep.dcm").write_bytes(raw[:place] + sequence * 300 + raw[place:])
    with pytest.raises(ImageError):
        open_image(tmp_path / "deep.dcm")


def nifti(path: Path, values: np.ndarray, affine: np.ndarray | None = None) -> Path:
    nibabel.save(nibabel.Nifti1Image(values, np.eye(4) if affine is None else affine), path)
    return path


def labeled(shape=(5, 6, 7)) -> np.ndarray:
    """Values that name their canonical place: 100 x + 10 y + z."""
    x, y, z = np.indices(shape)
    return (100 * x + 10 * y + z).astype(np.int16)


VIEWS = {"axial": (0, 1), "coronal": (0, 2), "sagittal": (1, 2)}


@pytest.mark.parametrize("plane", VIEWS)
@pytest.mark.parametrize("codes", ["RAS", "LPS", "SAR", "IPL", "ARS"])
def test_any_orientation_gives_the_same_canonical_slice(tmp_path, plane, codes):
    values = labeled()
    canonical = nibabel.Nifti1Image(values, np.eye(4))
    ornt = nibabel.orientations.axcodes2ornt(codes)
    turned = canonical.as_reoriented(nibabel.orientations.ornt_transform(nibabel.io_orientation(np.eye(4)), ornt))
    assert "".join(nibabel.aff2axcodes(turned.affine)) == codes
    nibabel.save(turned, tmp_path / "a.nii.gz")
    axis = ({0, 1, 2} - set(VIEWS[plane])).pop()
    wanted = np.take(values, 2, axis).T[::-1, ::-1].astype(float)
    shown = np.asarray(open_image(tmp_path / "a.nii.gz", View(plane=plane, slices="index:2")))[..., 0]
    assert shown.tolist() == np.rint((wanted - wanted.min()) / np.ptp(wanted) * 255).tolist()


def test_the_patients_right_is_at_the_left_and_the_front_at_the_top(tmp_path):
    values = np.zeros((4, 4, 4), np.int16)
    values[3, 3, 2] = 100  # right, anterior
    shown = gray(nifti(tmp_path / "a.nii", values))
    assert shown[0] == [255, 0, 0, 0]


def test_thick_slices_get_square_pixels_and_a_4d_file_shows_its_first_volume(tmp_path):
    thick = nifti(tmp_path / "a.nii", labeled((8, 8, 4)), np.diag([1.0, 1, 5, 1]))
    assert open_image(thick, View(plane="coronal")).size == (8, 20)
    four = np.stack([labeled(), labeled() * 0], axis=-1)
    assert gray(nifti(tmp_path / "b.nii", four)) == gray(nifti(tmp_path / "c.nii", labeled()))


def test_windows_apply_to_nifti_and_nan_counts_as_the_smallest(tmp_path):
    values = np.full((1, 3, 1), 0.0, np.float32)
    values[0, :, 0] = [np.nan, -600, 400]
    path = nifti(tmp_path / "a.nii", values)
    assert [row[0] for row in gray(path)] == [255, 0, 0]
    assert [row[0] for row in gray(path, window="lung")] == [255, 128, 128]


def test_a_volume_that_claims_more_than_its_file_holds_is_refused_unread(tmp_path):
    raw = bytearray(nifti(tmp_path / "a.nii", labeled()).read_bytes())
    raw[42:48] = np.array([1000, 1000, 1000], "<i2").tobytes()
    (tmp_path / "b.nii").write_bytes(raw)
    (tmp_path / "c.nii.gz").write_bytes(gzip.compress(bytes(raw)))
    for name in ("b.nii", "c.nii.gz"):
        with pytest.raises(ImageError, match="more than its"):
            open_image(tmp_path / name)
    (tmp_path / "d.nii.gz").write_bytes(b"no gzip")
    with pytest.raises(ImageError, match="cannot be read as NIfTI"):
        open_image(tmp_path / "d.nii.gz")


def test_slices_are_named_three_ways_and_other_words_are_refused():
    assert chosen_slices("middle", 9) == [4] and chosen_slices("uniform:3", 9) == [1, 4, 7]
    assert chosen_slices("index:0,8", 9) == [0, 8] and chosen_slices("uniform:4", 2) == [0, 0, 1, 1]
    for words in ("", "first", "uniform:0", "uniform:x", "index:", "index:1,", "index:-1", "uniform:²"):
        with pytest.raises(SettingsError, match="means nothing"):
            chosen_slices(words, 9)
    with pytest.raises(SettingsError, match="give file, one of lung"):
        View(window="liver")
    with pytest.raises(SettingsError, match="unknown"):
        View(window="lung,bone")
