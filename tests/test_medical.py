"""DICOM and NIfTI: `medisyn.data.medical` and folders of such files."""

import sys

import numpy as np
import pytest

from medisyn.data import medical
from medisyn.data.loading import load_images
from medisyn.data.medical import read_dicom, read_nifti, slice_count

pydicom = pytest.importorskip("pydicom")
nibabel = pytest.importorskip("nibabel")


def write_dicom(path, values, **tags):
    """A file with these pixel values: (rows, columns), (frames, rows, columns) or (rows, columns, 3)."""
    from pydicom.dataset import FileDataset, FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian, SecondaryCaptureImageStorage, generate_uid

    values = np.asarray(values)
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = SecondaryCaptureImageStorage
    meta.MediaStorageSOPInstanceUID = generate_uid()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset = FileDataset(str(path), {}, file_meta=meta, preamble=b"\0" * 128)
    dataset.SOPClassUID, dataset.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
    color = values.ndim == 3 and values.shape[-1] == 3
    dataset.SamplesPerPixel = 3 if color else 1
    dataset.PhotometricInterpretation = "RGB" if color else "MONOCHROME2"
    if color:
        dataset.PlanarConfiguration = 0
    if values.ndim == 3 and not color:
        dataset.NumberOfFrames = len(values)
    dataset.Rows, dataset.Columns = values.shape[-3:-1] if color else values.shape[-2:]
    bits = 8 * values.dtype.itemsize
    dataset.BitsAllocated = dataset.BitsStored = bits
    dataset.HighBit, dataset.PixelRepresentation = bits - 1, int(values.dtype.kind == "i")
    dataset.PixelData = values.tobytes()
    for name, value in tags.items():
        setattr(dataset, name, value)
    dataset.save_as(path, enforce_file_format=True)
    return path


def levels(image):
    return np.asarray(image)[0].tolist()


HOUNSFIELD = np.array([[-1000, -160, 40, 240, 3000, 0]], np.int16)


def test_ct_window_of_the_file_and_of_the_caller(tmp_path):
    stored = HOUNSFIELD + 1024
    tags = {"RescaleSlope": 1, "RescaleIntercept": -1024, "WindowCenter": 40, "WindowWidth": 400}
    path = write_dicom(tmp_path / "ct.dcm", stored.astype(np.int16), **tags)
    shown = levels(read_dicom(path))
    assert shown[0] == 0 and shown[4] == 255 and shown[2] == pytest.approx(128, abs=1)
    narrow = levels(read_dicom(path, window=(0, 80)))
    assert narrow[:2] == [0, 0] and narrow[3] == 255 and narrow[5] == 128
    # a part of the picture is shown in the same grey as in the whole
    part = write_dicom(tmp_path / "part.dcm", stored[:, 1:3].astype(np.int16), **tags)
    assert levels(read_dicom(part)) == shown[1:3]


def test_first_of_several_windows(tmp_path):
    values = np.array([[0, 50, 100]], np.uint16)
    path = write_dicom(tmp_path / "a.dcm", values, WindowCenter=[50, 1000], WindowWidth=[101, 1])
    assert levels(read_dicom(path)) == pytest.approx([0, 128, 255], abs=2)


def test_without_window_the_range_is_stretched_and_padding_left_out(tmp_path):
    values = np.array([[-2000, 0, 100, 200]], np.int16)
    assert levels(read_dicom(write_dicom(tmp_path / "a.dcm", values[:, 1:]))) == [0, 128, 255]
    assert levels(read_dicom(write_dicom(tmp_path / "b.dcm", values, PixelPaddingValue=-2000))) == [0, 0, 128, 255]


def test_monochrome1_is_inverted(tmp_path):
    values = np.array([[0, 100, 255]], np.uint8)
    path = write_dicom(tmp_path / "a.dcm", values, PhotometricInterpretation="MONOCHROME1")
    assert levels(read_dicom(path)) == [255, 155, 0]


def test_voi_lut(tmp_path):
    item = pydicom.Dataset()
    item.LUTDescriptor, item.LUTData = [4, 0, 8], [255, 200, 100, 0]
    item["LUTDescriptor"].VR = item["LUTData"].VR = "US"
    path = write_dicom(tmp_path / "a.dcm", np.array([[0, 1, 2, 3]], np.uint8), VOILUTSequence=[item])
    assert levels(read_dicom(path)) == [255, 200, 100, 0]
    item.LUTDescriptor, item.LUTData = [1024, 0, 8], [i // 4 for i in range(1024)]
    path = write_dicom(tmp_path / "b.dcm", np.array([[0, 400, 1023, 5000]], np.uint16), VOILUTSequence=[item])
    assert levels(read_dicom(path)) == [0, 100, 255, 255]


def test_color_and_frames(tmp_path):
    color = np.random.default_rng(0).integers(0, 256, (3, 4, 3), dtype=np.uint8)
    image = read_dicom(write_dicom(tmp_path / "color.dcm", color))
    assert image.mode == "RGB" and (np.asarray(image) == color).all()
    frames = write_dicom(tmp_path / "cine.dcm", np.stack([np.eye(4), np.zeros((4, 4))]).astype(np.uint8))
    assert slice_count(frames) == 2
    assert levels(read_dicom(frames, 0)) == [255, 0, 0, 0] and levels(read_dicom(frames, 1)) == [0] * 4
    with pytest.raises(ValueError, match="0 to 1"):
        read_dicom(frames, 2)


@pytest.mark.parametrize(
    "tags",
    [
        {"PatientName": "Doe^Jane"},
        {"PatientID": "123"},
        {"PatientBirthDate": "19700101"},
        {"BurnedInAnnotation": "YES"},
        {"PatientID": "a", "PatientIdentityRemoved": "NO"},
        {"BurnedInAnnotation": "YES", "PatientIdentityRemoved": "YES"},
    ],
)
def test_identifiers_are_refused_unless_allowed(tmp_path, tags):
    path = write_dicom(tmp_path / "a.dcm", np.array([[0, 255]], np.uint8), **tags)
    with pytest.raises(ValueError, match="allow_identifiers") as error:
        read_dicom(path)
    assert next(iter(tags)) in str(error.value) and "Jane" not in str(error.value)
    assert levels(read_dicom(path, allow_identifiers=True)) == [0, 255]
    with pytest.raises(ValueError, match="identifies its patient"):
        load_images(tmp_path, caption_column=None)


def test_no_dicom(tmp_path):
    (tmp_path / "a.dcm").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="not a DICOM file"):
        read_dicom(tmp_path / "a.dcm")
    with pytest.raises(FileNotFoundError):
        read_dicom(tmp_path / "b.dcm")


def test_dicom_folder_with_frames_and_patients(tmp_path):
    known = {"PatientIdentityRemoved": "YES", "Modality": "OP", "ImageLaterality": "L"}
    write_dicom(tmp_path / "a.dcm", np.arange(8, dtype=np.uint8).reshape(2, 2, 2), PatientID="p1", **known)
    write_dicom(tmp_path / "without_suffix", np.array([[0, 255]], np.uint8), PatientID="p2", **known)
    (tmp_path / "damaged.dcm").write_bytes(b"nothing")
    images = load_images(tmp_path, caption_column=None, group_column="patient", on_error="skip")
    assert len(images) == 4
    assert [images.image(i) is None for i in range(4)] == [False, False, True, False]
    patients = images.column("patient")
    assert patients[0] == patients[1] != patients[3] and "p1" not in patients
    assert images.column("laterality")[0] == "left" and not images.may_flip()[0]
    assert images.image(3).mode == "RGB" and images.image(3).size == (2, 1)


def write_volume(path, values, affine=None):
    nibabel.save(nibabel.Nifti1Image(values, np.eye(4) if affine is None else affine), path)
    return path


def test_nifti_slices_in_radiological_display(tmp_path):
    volume = np.zeros((4, 6, 5), np.float32)
    volume[3, 5, 2] = 100  # the patient's right, front
    path = write_volume(tmp_path / "a.nii.gz", volume)
    assert [slice_count(path, axis) for axis in range(3)] == [4, 6, 5]
    axial = np.asarray(read_nifti(path, 2, window=(50, 100)))
    assert axial.shape == (6, 4) and axial[0, 0] == 255 and axial.sum() == 255  # top left
    assert np.asarray(read_nifti(path, 0, window=(50, 100))).max() == 0
    sagittal = np.asarray(read_nifti(path, 3, axis=0, window=(50, 100)))
    assert sagittal.shape == (5, 6) and sagittal[2, 0] == 255


def test_nifti_orientation_and_spacing_of_the_header(tmp_path):
    volume = np.random.default_rng(0).random((4, 6, 5)).astype(np.float32)
    plain = write_volume(tmp_path / "a.nii", volume)
    turned = write_volume(tmp_path / "b.nii", volume[::-1].copy(), np.diag([-1.0, 1, 1, 1]))
    assert np.array_equal(np.asarray(read_nifti(plain, 1)), np.asarray(read_nifti(turned, 1)))
    thick = write_volume(tmp_path / "c.nii", volume, np.diag([1.0, 1, 3, 1]))
    assert read_nifti(thick, 0, axis=1).size == (4, 15)


def test_nifti_percentiles_are_of_the_whole_volume(tmp_path):
    volume = np.zeros((10, 10, 2), np.float32)
    volume[..., 1] = 100
    path = write_volume(tmp_path / "a.nii", volume)
    assert np.asarray(read_nifti(path, 0)).max() == 0 and np.asarray(read_nifti(path, 1)).min() == 255


@pytest.mark.parametrize(("index", "axis", "message"), [(9, 2, "0 to 4"), (-1, 2, "0 to 4"), (0, 3, "axial")])
def test_nifti_without_such_a_slice(tmp_path, index, axis, message):
    path = write_volume(tmp_path / "a.nii", np.zeros((4, 6, 5), np.float32))
    with pytest.raises(ValueError, match=message):
        read_nifti(path, index, axis)


def test_nifti_folder(tmp_path):
    volume = np.random.default_rng(0).random((4, 6, 5)).astype(np.float32)
    (tmp_path / "sub-01").mkdir()
    write_volume(
        tmp_path / "sub-01" / "t1.nii.gz", volume, np.array([[0, 0, 1.0, 0], [1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 1]])
    )
    (tmp_path / "damaged.nii.gz").write_bytes(b"nothing")
    images = load_images(tmp_path, caption_column=None, on_error="skip")
    assert images.image(0) is None and "damaged" in images.skipped[0]
    assert len(images) == 1 + slice_count(tmp_path / "sub-01" / "t1.nii.gz") == 7
    assert images.column("patient")[1] == "sub-01" and images.image(6).mode == "RGB"
    with pytest.raises(ValueError, match=r"t1.nii.gz#0 to #5"):
        medical.read_slice(str(tmp_path / "sub-01" / "t1.nii.gz"))


def test_missing_extra_is_named(tmp_path, monkeypatch):
    path = write_dicom(tmp_path / "a.dcm", np.array([[0, 255]], np.uint8))
    monkeypatch.setitem(sys.modules, "pydicom", None)
    with pytest.raises(ImportError, match=r"medisyn\[medical\]"):
        read_dicom(path)
    with pytest.raises(ImportError, match=r"medisyn\[medical\]"):
        load_images(tmp_path, caption_column=None)
