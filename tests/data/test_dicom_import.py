"""Nothing that identifies a patient passes the gate: 40 tags, nested and private, file names, burned-in text."""

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
from PIL import Image
from typer.testing import CliRunner

from medrl.cli import app
from medrl.data import store
from medrl.data.pseudonyms import Salt
from medrl.errors import DataError
from medrl.types import Example

pydicom = pytest.importorskip("pydicom")

from pydicom.dataset import Dataset, FileMetaDataset  # noqa: E402
from pydicom.sequence import Sequence  # noqa: E402
from pydicom.uid import ExplicitVRLittleEndian, generate_uid  # noqa: E402

TEXT_TAGS = (
    "PatientName", "PatientID", "IssuerOfPatientID", "OtherPatientIDs", "OtherPatientNames", "PatientBirthName",
    "PatientMotherBirthName", "PatientAddress", "PatientTelephoneNumbers", "PatientComments", "EthnicGroup",
    "Occupation", "AdditionalPatientHistory",
    "MilitaryRank", "BranchOfService", "MedicalRecordLocator", "PatientReligiousPreference",
    "AccessionNumber", "StudyID", "StudyDescription", "SeriesDescription", "ProtocolName", "InstitutionName",
    "InstitutionAddress", "InstitutionalDepartmentName", "ReferringPhysicianName", "PerformingPhysicianName",
    "OperatorsName", "NameOfPhysiciansReadingStudy", "RequestingPhysician", "StationName", "DeviceSerialNumber",
    "ImageComments", "DerivationDescription", "RequestedProcedureDescription", "BodyPartExamined",
)  # fmt: skip
SECRETS = {name: f"ZQXWV{number:02}SECRET" for number, name in enumerate(TEXT_TAGS)}
DATES = {"PatientBirthDate": "19310203", "StudyDate": "20190417", "AcquisitionDate": "20190418", "StudyTime": "091733"}


def write(path: Path, modality="CT", sop_class="1.2.840.10008.5.1.4.1.1.2", secrets=True, **tags) -> list[str]:
    """A small image with everything that could identify; the values that must not be seen again."""
    path.parent.mkdir(parents=True, exist_ok=True)
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID = sop_class
    for name in ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID", "FrameOfReferenceUID"):
        setattr(dataset, name, tags.pop(name, None) or generate_uid())
    dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
    dataset.Modality = modality
    dataset.Rows, dataset.Columns, dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 16, 16, 1, "MONOCHROME2"
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit, dataset.PixelRepresentation = 16, 16, 15, 0
    seed = int.from_bytes(path.name.encode()[-4:], "big")
    dataset.PixelData = np.random.default_rng(seed).integers(0, 900, (16, 16), dtype=np.uint16).tobytes()
    dataset.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
    if secrets:
        for name, value in {**SECRETS, **DATES}.items():
            setattr(dataset, name, value)
        nested = Dataset()
        nested.PatientName, nested.ReferencedSOPInstanceUID = "ZQXWVNESTED^SECRET", generate_uid()
        deeper = Dataset()
        deeper.PersonName = "ZQXWVDEEPER^SECRET"
        nested.PersonIdentificationCodeSequence = Sequence([deeper])
        dataset.RequestAttributesSequence = Sequence([nested])
        dataset.private_block(0x0099, "ZQXWVPRIVATE SECRET", create=True).add_new(1, "LO", "ZQXWVPRIVATEVALUE SECRET")
    for name, value in tags.items():
        setattr(dataset, name, value)
    dataset.save_as(path, enforce_file_format=True)
    uids = [str(dataset[name].value) for name in ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID")]
    return ["ZQXWV", "SECRET", *DATES.values(), *uids] if secrets else []


def run(*arguments: object, salt: Path):
    return CliRunner().invoke(app, ["import", "dicom", *map(str, arguments), "--salt", str(salt)])


def everything_written(folder: Path) -> str:
    """All bytes of all files under ``folder``, their names, and what is inside the Parquet and the pictures."""
    seen = []
    for path in sorted(folder.rglob("*")):
        seen.append(str(path.relative_to(folder)))
        if path.is_file():
            seen.append(path.read_bytes().decode("latin-1"))
        if path.suffix == ".parquet":
            seen.append(str(pyarrow.parquet.read_table(path).to_pylist()))
        if path.suffix == ".png":
            with Image.open(path) as image:
                assert not image.info
    return "\n".join(seen).upper()


def test_of_forty_identifying_tags_not_one_value_is_in_any_file_or_on_the_terminal(tmp_path):
    assert len(SECRETS) + len(DATES) >= 40
    source = tmp_path / "in"
    seeded = [
        *write(source / "ZQXWVNAME SECRET" / "ZQXWVFILE.dcm"),
        *write(source / "ZQXWVNAME SECRET" / "b", BodyPartExamined="CHEST"),
        *write(source / "mr.dcm", modality="MR"),
    ]
    broken = source / "ZQXWVBROKEN.dcm"
    write(broken)
    broken.write_bytes(broken.read_bytes()[:-100])
    result = run(source, "--out", tmp_path / "out" / "s", "--max-bad", 1, salt=tmp_path / "salt")
    assert result.exit_code == 0, result.output
    printed = run(source, "--out", tmp_path / "out" / "j", "--max-bad", 1, "--json", salt=tmp_path / "salt").stdout
    assert json.loads(printed)["rows"] == 7 and len(json.loads(printed)["bad"]) == 1
    written = everything_written(tmp_path / "out") + (tmp_path / "salt").read_text()
    for value in seeded:
        assert value.upper() not in written
        assert value.upper() not in (result.output + printed).upper()


def test_a_refused_import_says_nothing_of_the_patient_and_leaves_nothing(tmp_path):
    write(tmp_path / "in" / "ZQXWVFILE.dcm", modality="US")
    result = run(tmp_path / "in", "--out", tmp_path / "out" / "s", salt=tmp_path / "salt")
    assert result.exit_code == 1 and "--i-have-deidentified" in result.output
    assert "ZQXWV" not in result.output.replace(str(tmp_path), "") and not (tmp_path / "out" / "s").exists()
    assert not list(tmp_path.rglob("*.png"))


ULTRASOUND, CAPTURE, ANGIO = (f"1.2.840.10008.5.1.4.1.1.{n}" for n in ("6.1", "7", "12.1"))


@pytest.mark.parametrize(
    ("tags", "default", "declared_clean"),
    [
        ({}, True, True),
        ({"BurnedInAnnotation": "NO"}, True, True),
        ({"BurnedInAnnotation": "YES"}, False, False),
        ({"modality": "US"}, False, True),
        ({"modality": "US", "BurnedInAnnotation": "NO"}, True, True),
        ({"sop_class": ULTRASOUND}, False, True),
        ({"sop_class": CAPTURE}, False, True),
        ({"sop_class": CAPTURE + ".4"}, False, True),
        ({"sop_class": ANGIO}, False, True),
        ({"modality": "XA", "BurnedInAnnotation": ""}, False, True),
        ({"ImageType": ["DERIVED", "SECONDARY", "SCREEN SAVE"]}, False, True),
        ({"ConversionType": "WSD", "modality": "OT"}, False, True),
        ({"modality": "US", "BurnedInAnnotation": "YES"}, False, False),
    ],
)
def test_pixels_pass_only_when_no_name_can_be_in_them(tmp_path, tags, default, declared_clean):
    write(tmp_path / "in" / "a.dcm", secrets=False, **tags)
    for clean, passes in ((False, default), (True, declared_clean)):
        flags = ["--i-have-deidentified"] if clean else []
        result = run(tmp_path / "in", "--out", tmp_path / f"s{clean}", *flags, salt=tmp_path / "salt")
        assert (result.exit_code == 0) is passes, result.output


def test_the_header_answers_modality_body_part_and_plane(tmp_path):
    write(tmp_path / "in/a.dcm", secrets=False, modality="MR", BodyPartExamined="KNEE", PatientID="7",
          ImageOrientationPatient=[0, 1, 0, 0, 0, -1])  # fmt: skip
    assert run(tmp_path / "in", "--out", tmp_path / "s", salt=tmp_path / "salt").exit_code == 0
    rows = {row.question_type: row for row in store.load(tmp_path / "s")}
    assert {kind: row.target_text for kind, row in rows.items()} == {
        "Modality Recognition": "MRI", "Anatomy Identification": "Knee", "Plane Recognition": "Sagittal",
    }  # fmt: skip
    assert len({row.images for row in rows.values()}) == 1 and all(len(row.images) == 1 for row in rows.values())


def test_patients_are_the_same_key_under_one_salt_and_another_under_the_next(tmp_path):
    for number, patient in enumerate(("P1", "P1", "P2")):
        write(tmp_path / f"in/{number}.dcm", secrets=False, PatientID=patient)

    def patients(salt: str) -> list[str]:
        out = tmp_path / f"store-{salt}"
        assert run(tmp_path / "in", "--out", out, salt=tmp_path / salt).exit_code == 0
        return [row.patient or "" for row in store.load(out) if row.question_type == "Modality Recognition"]

    first, second = patients("one"), patients("two")
    assert first[0] == first[1] != first[2] and set(first).isdisjoint(second)
    assert (tmp_path / "one").stat().st_mode & 0o077 == 0


def test_a_series_is_one_question_round_with_its_slices_in_order_of_position(tmp_path):
    series = generate_uid()
    for number, position in enumerate((30, 10, 20, 40)):
        write(tmp_path / f"in/{number}.dcm", secrets=False, SeriesInstanceUID=series, InstanceNumber=99 - number,
              ImagePositionPatient=[0, 0, position], PixelData=np.full((16, 16), position, np.uint16).tobytes(),
              WindowCenter=128, WindowWidth=256)  # fmt: skip
    out = tmp_path / "s"
    assert (
        run(tmp_path / "in", "--out", out, "--per", "series", "--slices", "uniform:2", salt=tmp_path / "t").exit_code
        == 0
    )
    rows = store.load(out)
    assert len(rows) == 2  # modality and plane
    shades = [np.asarray(Image.open(path))[0, 0, 0] for path in rows[0].images]
    assert shades == [20, 40]


def test_reports_and_other_files_are_counted_and_left_alone(tmp_path):
    write(tmp_path / "in/a.dcm", secrets=False)
    (tmp_path / "in/notes.txt").write_text("x")
    report = pydicom.dcmread(tmp_path / "in/a.dcm")
    del report.PixelData
    report.Modality = "SR"
    report.save_as(tmp_path / "in/sr.dcm")
    result = run(tmp_path / "in", "--out", tmp_path / "s", "--json", salt=tmp_path / "salt")
    notes = json.loads(result.stdout)["notes"]
    assert notes[0] == "1 files are not DICOM and were left alone" and notes[1].startswith(
        "1 DICOM files hold no image"
    )


def test_a_file_that_lies_there_twice_is_read_once_and_noted(tmp_path):
    write(tmp_path / "in/a.dcm", secrets=False)
    (tmp_path / "in/copy").mkdir()
    (tmp_path / "in/copy/a.dcm").write_bytes((tmp_path / "in/a.dcm").read_bytes())
    again = pydicom.dcmread(tmp_path / "in/a.dcm")
    again.PixelData = bytes(len(again.PixelData))
    again.save_as(tmp_path / "in/z-other-pixels.dcm")
    write(tmp_path / "in/b.dcm", secrets=False)
    result = run(tmp_path / "in", "--out", tmp_path / "s", "--json", salt=tmp_path / "salt")
    assert result.exit_code == 0, result.output
    printed = json.loads(result.stdout)
    assert printed["bad"] == [] and printed["images"] == 2
    assert "2 files are second copies of an image" in printed["notes"][0]
    assert "1 of them with other bytes than the first" in printed["notes"][0]


def test_files_without_an_instance_uid_are_told_apart_by_their_bytes(tmp_path):
    for number, name in enumerate(("a.dcm", "b.dcm")):
        write(tmp_path / "in" / name, secrets=False)
        nameless = pydicom.dcmread(tmp_path / "in" / name)
        nameless.PixelData = bytes([number]) * len(nameless.PixelData)
        del nameless.SOPInstanceUID
        nameless.save_as(tmp_path / "in" / name)
    (tmp_path / "in/c.dcm").write_bytes((tmp_path / "in/b.dcm").read_bytes())
    result = run(tmp_path / "in", "--out", tmp_path / "s", "--json", salt=tmp_path / "salt")
    assert result.exit_code == 0, result.output
    printed = json.loads(result.stdout)
    assert printed["images"] == 2 and "1 file is a second copy of an image" in printed["notes"][0]


def test_an_image_whose_pixels_are_missing_is_a_bad_row_and_no_report(tmp_path):
    write(tmp_path / "in/a.dcm", secrets=False)
    torn = pydicom.dcmread(tmp_path / "in/a.dcm")
    del torn.PixelData
    torn.save_as(tmp_path / "in/torn.dcm")
    result = run(tmp_path / "in", "--out", tmp_path / "s", "--json", salt=tmp_path / "salt")
    assert result.exit_code == 1
    [bad] = json.loads(result.stdout)["bad"]
    assert "no pixels follow" in json.dumps(bad)


def test_a_table_may_name_dicom_files_and_the_gate_still_holds(tmp_path):
    write(tmp_path / "in/ZQXWVFILE.dcm")
    write(tmp_path / "in/us.dcm", modality="US")
    rows = (
        "image,question,options,answer,patient\nZQXWVFILE.dcm,Is it CT?,yes|no,yes,ZQXWV7\nus.dcm,What?,a|b,a,ZQXWV7\n"
    )
    (tmp_path / "t.csv").write_text(rows)
    flags = ["--images", tmp_path / "in", "--salt", tmp_path / "salt", "--max-bad", 1]
    arguments = ["import", "table", tmp_path / "t.csv", "--out", tmp_path / "out/s", "--name", "mine", *flags]
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0 and "t.csv, row 1" in result.output, result.output
    [row] = store.load(tmp_path / "out/s")
    assert row.patient and "ZQXWV" not in everything_written(tmp_path / "out")


def test_a_salt_that_is_none_is_refused(tmp_path):
    for content in ("", "not hex", "00" * 8):
        (tmp_path / "salt").write_text(content)
        with pytest.raises(DataError, match=r"64 hex digits"):
            Salt.open(tmp_path / "salt")


def test_a_store_made_from_python_neither_links_to_a_scan_nor_is_called_after_it(tmp_path):
    secrets = write(tmp_path / "raw" / "ZQXWV^JANE" / "ZQXWV-scan.dcm")
    Image.new("L", (8, 8)).save(tmp_path / "raw" / "b.png")
    images = (tmp_path / "raw" / "ZQXWV^JANE" / "ZQXWV-scan.dcm", tmp_path / "raw" / "b.png")
    row = Example(id="1", source="s", images=images, question="?", options=("CT", "MRI"), target="A")
    with pytest.raises(DataError, match=r"image 0 is a DICOM file.*copy=True") as refused:
        store.write_store(tmp_path / "linked", [row], source="s", license="l", copy=False)
    assert "ZQXWV" not in str(refused.value) and not (tmp_path / "linked").exists()
    store.write_store(tmp_path / "copied", [row], source="s", license="l")
    written = everything_written(tmp_path / "copied")
    assert [secret for secret in secrets if secret in written] == []
    (kept,) = store.load(tmp_path / "copied")
    assert kept.images[0].name.startswith("scan-") and Image.open(kept.images[0]).size == (16, 16)
