"""A window is for CT: in a folder of everything it is applied to CT alone, and what it did not touch is counted."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from medrl.cli import app
from medrl.data import store

pydicom = pytest.importorskip("pydicom")

from pydicom.dataset import Dataset, FileMetaDataset  # noqa: E402
from pydicom.uid import ExplicitVRLittleEndian, generate_uid  # noqa: E402


def scan(path: Path, modality: str) -> None:
    """Half -1000, half 0 of something; its own window shows -1000 as black and 0 as white."""
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.SOPClassUID = dataset.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.2"
    dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID = generate_uid()
    dataset.Modality = modality
    dataset.Rows = dataset.Columns = 8
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit, dataset.PixelRepresentation = 16, 16, 15, 1
    dataset.WindowCenter, dataset.WindowWidth = -500, 1001
    dataset.PixelData = np.repeat(np.array([-1000, 0], np.int16), 32).tobytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    dataset.save_as(path, enforce_file_format=True)


@pytest.fixture
def mixed(tmp_path) -> Path:
    folder = tmp_path / "mixed"
    scan(folder / "air/ct.dcm", "CT")
    scan(folder / "fluid/mr.dcm", "MR")
    Image.new("L", (8, 8), 90).save(folder / "fluid/photo.png")
    return folder


def imported(folder: Path, *words: object) -> tuple[dict, list]:
    arguments = ["import", *words, "--out", folder / "store", "--json"]
    result = CliRunner().invoke(app, [str(word) for word in arguments])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout), store.load(folder / "store")


NOTE = "--window bone is for CT; drawn without it: 1 MR, 1 not DICOM"


def darkest_and_brightest(path: Path) -> list[int]:
    return sorted({int(value) for value in np.asarray(Image.open(path).convert("L")).ravel()})


def test_a_folder_of_everything_is_windowed_where_it_is_ct(tmp_path, mixed):
    printed, rows = imported(tmp_path, "folder", mixed, "--window", "bone")
    assert printed["bad"] == [] and printed["notes"] == [NOTE]
    # bone is 500 +- 1000: -1000 is black, and 0 is a quarter of the way up
    assert [darkest_and_brightest(row.images[0]) for row in rows] == [[0, 64], [0, 255], [90]]


def test_a_table_of_everything_is_windowed_where_it_is_ct(tmp_path, mixed):
    rows = [
        {"image": name, "question": "?", "answer": "yes"} for name in ("air/ct.dcm", "fluid/mr.dcm", "fluid/photo.png")
    ]
    (tmp_path / "t.json").write_text(json.dumps(rows))
    printed, _ = imported(tmp_path, "table", tmp_path / "t.json", "--images", mixed, "--window", "bone")
    assert printed["rows"] == 3 and printed["notes"] == [NOTE]


def test_a_ward_of_ct_and_mri_takes_one_import(tmp_path, mixed):
    printed, _ = imported(tmp_path, "dicom", mixed, "--window", "bone", "--salt", tmp_path / "salt")
    assert printed["bad"] == [] and "--window bone is for CT; drawn without it: 1 MR" in printed["notes"]


def test_where_every_picture_is_ct_or_no_window_was_asked_for_nothing_is_said(tmp_path, mixed):
    printed, _ = imported(tmp_path, "folder", mixed)
    assert printed["notes"] == []
