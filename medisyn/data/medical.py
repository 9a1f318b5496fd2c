"""DICOM and NIfTI files as images; needs the extra: `pip install medisyn[medical]`.

- A DICOM image comes as a viewer shows it: rescale slope, VOI LUT or window, MONOCHROME1 inverted, palettes and colour
  spaces resolved. Of several windows the first is used.
- A DICOM file that still names its patient, or states burned-in text, is refused: generative models can repeat what
  they were trained on. `allow_identifiers=True` is for files that never leave a protected machine.
- A NIfTI volume is turned to a canonical orientation first; its slices share one window, are shown the radiological
  way (patient's right on the left, or front on the left; top up) and have square pixels.
- In a loaded folder, `scan.nii.gz#12` is slice 12 and `cine.dcm#3` is frame 3, both from 0.

    image = read_dicom("mammogram.dcm")
    slices = [read_nifti("brain.nii.gz", index, axis=2) for index in range(slice_count("brain.nii.gz"))]
"""

import hashlib
import re
from collections.abc import Sequence
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

if TYPE_CHECKING:
    import pydicom

_NUMBERED = re.compile(r"(.*)#(\d+)")
_IDENTIFIERS = ("PatientName", "PatientID", "OtherPatientIDs", "PatientBirthDate", "PatientAddress")


def is_medical(path: str | Path) -> bool:
    """Whether a file, or a numbered slice of one, is read by this module: DICOM (by suffix or content) or NIfTI."""
    path = _split_number(str(path))[0]
    if path.lower().endswith((".dcm", ".dicom", ".nii", ".nii.gz")):
        return True
    if Path(path).suffix or not Path(path).is_file():
        return False
    with open(path, "rb") as file:  # DICOM files often have no suffix, but always this mark
        return file.read(132)[128:] == b"DICM"


def read_slice(path: str) -> Image.Image:
    """The image that a path such as `scan.nii.gz#12` or `image.dcm` names, 8-bit RGB.

    Raises:
        ValueError: the file holds several images and the path numbers none.
    """
    path, number = _split_number(path)
    if number is None and (count := slice_count(path)) > 1:
        raise ValueError(f"{path} holds {count} images; name one as {Path(path).name}#0 to #{count - 1}")
    read = read_nifti if _is_nifti(path) else read_dicom
    return read(path, number or 0).convert("RGB")


def list_slices(paths: Sequence[str | Path]) -> list[dict[str, Any]]:
    """One row for every frame or slice of the files: `image` (its numbered path), `patient`, `modality`, `laterality`.

    `patient` is for splitting by patient: a hash of the DICOM patient id (else of the study), or of a NIfTI file the
    BIDS subject in its path (else the file). A file that cannot be read has one row, whose image then reports why.

    Raises:
        ImportError: pydicom or nibabel is missing.
        ValueError: a DICOM file carries identifiers.
    """
    return [row for path in paths for row in (_list_nifti(str(path)) if _is_nifti(path) else _list_dicom(str(path)))]


def slice_count(path: str | Path, axis: int = 2) -> int:
    """Frames of a DICOM file, or slices of a NIfTI volume along an axis of the canonical orientation."""
    if _is_nifti(path):
        return _load_volume(str(path))[0].shape[axis]
    return int(_import("pydicom").dcmread(path, stop_before_pixels=True).get("NumberOfFrames") or 1)


def read_dicom(
    path: str | Path, frame: int = 0, *, window: tuple[float, float] | None = None, allow_identifiers: bool = False
) -> Image.Image:
    """One image of a DICOM file, 8 bit, mode L or RGB.

    Args:
        path: the file.
        frame: from 0, of a multi-frame file.
        window: (centre, width) in the units after rescaling (Hounsfield for CT) in place of the file's own. Without
            any window or VOI LUT, the image is stretched from minimum to maximum, padding left out.
        allow_identifiers: read files that name their patient or state burned-in annotations.

    Raises:
        FileNotFoundError: there is no such file.
        ImportError: pydicom is missing, or a plugin for the file's compression.
        ValueError: not DICOM, no such frame, or identifiers.
    """
    dataset = _open_dicom(path)
    if not allow_identifiers:
        _refuse_identifiers(dataset, path)
    frames = int(dataset.get("NumberOfFrames") or 1)
    if not 0 <= frame < frames:
        raise ValueError(f"{path} has no frame {frame}; valid: 0 to {frames - 1}")
    pixels = _import("pydicom.pixels")
    try:
        values = pixels.pixel_array(dataset, index=frame)  # colour comes as RGB
    except (AttributeError, RuntimeError, NotImplementedError) as error:
        raise ValueError(f"{path}: pixels cannot be decoded: {' '.join(str(error).split())}") from None
    if dataset.PhotometricInterpretation == "PALETTE COLOR":
        values = pixels.apply_color_lut(values, dataset)
    if values.ndim == 3:
        depth = 16 if values.dtype.itemsize > 1 else 8
        return Image.fromarray((values >> (depth - 8)).astype(np.uint8))
    shown = _shown_values(values, dataset, window, pixels)
    return Image.fromarray(255 - shown if dataset.PhotometricInterpretation == "MONOCHROME1" else shown)


def _shown_values(values: np.ndarray, dataset: "pydicom.Dataset", window: Any, pixels: ModuleType) -> np.ndarray:
    padding = dataset.get("PixelPaddingValue")
    content = values if padding is None or (values == padding).all() else values[values != padding]
    content = pixels.apply_modality_lut(content, dataset)
    values = pixels.apply_modality_lut(values, dataset)
    if window is None and dataset.get("VOILUTSequence"):
        values, high = _through_table(values, dataset.VOILUTSequence[0])
        low = 0.0
    elif window is None and "WindowCenter" in dataset:
        # What the lowest and the highest value are shown as: the ends of the grey scale, whatever this image holds.
        ends = pixels.apply_voi_lut(np.array([-(2.0**30), 2.0**30]), dataset)
        values = pixels.apply_voi_lut(values.astype(np.float64), dataset)
        low, high = float(ends.min()), float(ends.max())
    elif window is not None:
        centre, width = window
        low, high = centre - width / 2, centre + width / 2
    else:
        low, high = float(content.min()), float(content.max())
    return _to_uint8(values, low, high)


def _through_table(values: np.ndarray, item: "pydicom.Dataset") -> tuple[np.ndarray, float]:
    """Values through a VOI LUT (PS3.3 C.11.2), and its white; pydicom's own look-up wraps indices in 8-bit tables."""
    table = np.frombuffer(item.LUTData, "<u2") if isinstance(item.LUTData, bytes) else np.asarray(item.LUTData)
    _, first, depth = item.LUTDescriptor
    index = np.clip(np.rint(values).astype(np.int64) - first, 0, len(table) - 1)
    return table[index], 2.0**depth - 1


def read_nifti(
    path: str | Path,
    index: int,
    axis: int = 2,
    *,
    window: tuple[float, float] | None = None,
    percentiles: tuple[float, float] = (0.5, 99.5),
) -> Image.Image:
    """One slice of a NIfTI volume, mode L (of a series, from its first volume).

    Args:
        path: `.nii` or `.nii.gz`.
        index: of the slice, from 0.
        axis: of the canonical orientation: 0 sagittal, 1 coronal, 2 axial.
        window: (centre, width) in the units of the volume in place of `percentiles`.
        percentiles: of the whole volume, shown as black and as white.

    Raises:
        FileNotFoundError: there is no such file.
        ImportError: nibabel is missing.
        ValueError: not NIfTI, no such axis or slice.
    """
    volume, spacing = _load_volume(str(path))
    if axis not in (0, 1, 2):
        raise ValueError(f"axis {axis} is none of 0 (sagittal), 1 (coronal), 2 (axial)")
    if not 0 <= index < volume.shape[axis]:
        raise ValueError(f"{path} has no slice {index} along axis {axis}; valid: 0 to {volume.shape[axis] - 1}")
    if window is None:
        low, high = _volume_range(str(path), percentiles)
    else:
        low, high = window[0] - window[1] / 2, window[0] + window[1] / 2
    # (x, y), (x, z) or (y, z), growing to right, front and top -> rows from the top, columns from the right or front.
    values = np.rot90(np.take(volume, index, axis=axis))[:, ::-1]
    image = Image.fromarray(_to_uint8(values, low, high))
    across, down = (spacing[other] for other in range(3) if other != axis)
    finest = min(across, down)
    size = (max(1, round(image.width * across / finest)), max(1, round(image.height * down / finest)))
    return image if size == image.size else image.resize(size, Image.Resampling.BICUBIC)


def _open_dicom(path: str | Path) -> "pydicom.FileDataset":
    pydicom = _import("pydicom")
    try:
        return pydicom.dcmread(path)
    except pydicom.errors.InvalidDicomError:
        raise ValueError(f"{path} is not a DICOM file") from None


def _refuse_identifiers(dataset: "pydicom.Dataset", path: str | Path) -> None:
    found = [name for name in _IDENTIFIERS if str(dataset.get(name) or "").strip()]
    if str(dataset.get("PatientIdentityRemoved", "")).upper() == "YES":  # then the id is a pseudonym
        found = []
    if str(dataset.get("BurnedInAnnotation", "")).upper() == "YES":
        found.append("BurnedInAnnotation")
    if found:
        raise ValueError(
            f"{path} identifies its patient ({', '.join(found)}): de-identify it and set PatientIdentityRemoved to "
            "YES, or read it with allow_identifiers=True"
        )


def _list_dicom(path: str) -> list[dict[str, Any]]:
    pydicom = _import("pydicom")
    try:
        dataset = pydicom.dcmread(path, stop_before_pixels=True)
    except (OSError, pydicom.errors.InvalidDicomError, ValueError, EOFError):
        return [{"image": path, "patient": None, "modality": None, "laterality": None}]
    _refuse_identifiers(dataset, path)
    patient = str(dataset.get("PatientID") or dataset.get("StudyInstanceUID") or path)
    side = dataset.get("ImageLaterality") or dataset.get("Laterality")
    row = {
        "patient": hashlib.sha256(patient.encode()).hexdigest()[:16],
        "modality": str(dataset.get("Modality") or "") or None,
        "laterality": {"L": "left", "R": "right"}.get(str(side)),
    }
    return [{"image": f"{path}#{frame}", **row} for frame in range(int(dataset.get("NumberOfFrames") or 1))]


def _list_nifti(path: str) -> list[dict[str, Any]]:
    subject = re.search(r"sub-[A-Za-z0-9]+", path)
    row = {"patient": subject.group() if subject else path, "modality": None, "laterality": None}
    nibabel = _import("nibabel")
    try:
        image = nibabel.load(path)
        # Only the header is read: the canonical orientation moves axis 2 here from where it is stored.
        stored_axis = list(nibabel.orientations.io_orientation(image.affine)[:, 0]).index(2)
        count = image.shape[stored_axis]
    except (OSError, ValueError, IndexError, EOFError, nibabel.filebasedimages.ImageFileError):
        return [{"image": path, **row}]
    return [{"image": f"{path}#{index}", **row} for index in range(count)]


@lru_cache(maxsize=2)  # a compressed volume is decompressed whole for any slice
def _load_volume(path: str) -> tuple[np.ndarray, tuple[float, ...]]:
    nibabel = _import("nibabel")
    if not Path(path).is_file():
        raise FileNotFoundError(f"no file {path}")
    try:
        image = nibabel.as_closest_canonical(nibabel.load(path))
        volume = np.asarray(image.dataobj, dtype=np.float32)
    except (nibabel.filebasedimages.ImageFileError, OSError, ValueError, EOFError) as error:
        raise ValueError(f"{path} cannot be read as NIfTI: {' '.join(str(error).split())}") from None
    if volume.ndim < 3:
        raise ValueError(f"{path} has {volume.ndim} dimensions; a volume has 3")
    return np.nan_to_num(volume.reshape(*volume.shape[:3], -1)[..., 0]), image.header.get_zooms()[:3]


@lru_cache(maxsize=64)
def _volume_range(path: str, percentiles: tuple[float, float]) -> tuple[float, float]:
    low, high = np.percentile(_load_volume(path)[0], percentiles)
    return float(low), float(high)


def _to_uint8(values: np.ndarray, low: float, high: float) -> np.ndarray:
    scaled = (values.astype(np.float64) - low) * 255.0 / max(high - low, 1e-12)
    return np.clip(np.rint(scaled), 0, 255).astype(np.uint8)


def _is_nifti(path: str | Path) -> bool:
    return str(path).lower().endswith((".nii", ".nii.gz"))


def _split_number(path: str) -> tuple[str, int | None]:
    found = _NUMBERED.fullmatch(path)
    return (found[1], int(found[2])) if found else (path, None)


def _import(name: str) -> ModuleType:
    try:
        return import_module(name)
    except ImportError:
        raise ImportError(f"reading DICOM and NIfTI needs {name}: pip install medisyn[medical]") from None
