"""Other wordings of the canonical sentences, so that a model understands what people type and not one sentence only.

- `paraphrase` rewrites a caption of `medisyn.prompts`: abbreviations and everyday names of the modality ("CXR",
  "retina photo"), of the finding ("mole", "BCC"), other orders, the modality or the finding alone, details left out.
- Nothing is invented: a detail that the caption does not state never appears, and a finding stands alone only where
  one modality has it. What is no caption of the vocabulary comes back as it is.
- Training uses it on a share of the captions (`conditions: [{type: text, train_encoder: true, paraphrase: 0.5}]`).

No torch is imported here.

    >>> from random import Random
    >>> from medisyn.paraphrases import paraphrase
    >>> paraphrase("color fundus photograph of the left eye with glaucoma", Random(1))
    'glaucoma, fundus image, left eye'
"""

from __future__ import annotations

from collections.abc import Mapping
from random import Random

from medisyn.prompts import MODALITIES, Description, parse_caption

MODALITY_NAMES: Mapping[str, tuple[str, ...]] = {
    "chest X-ray": ("chest X-ray", "CXR", "chest radiograph", "chest X-ray of a child", "pediatric chest X-ray"),
    "CT": ("chest CT", "CT", "lung CT", "CT scan of the chest", "axial CT slice"),
    "MRI": ("brain MRI", "MRI", "MRI of the brain", "head MRI", "MR image of the brain"),
    "ultrasound": ("breast ultrasound", "ultrasound", "sonogram of the breast", "breast sonography"),
    "endoscopy": ("colonoscopy", "endoscopy", "endoscopic image of the colon", "colonoscopy frame"),
    "dermoscopy": ("dermoscopy", "dermatoscopy", "dermoscopic image", "skin lesion", "dermoscopic photo of the skin"),
    "fundus photography": ("fundus photo", "retina photo", "fundus image", "retinal photograph", "CFP", "fundus"),
    "histopathology": ("H&E", "H&E of lung", "lung histology", "lung histopathology", "H&E lung slide"),
    "blood smear microscopy": ("blood smear", "peripheral blood smear", "blood film", "blood cell microscopy"),
}

FINDING_NAMES: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "chest X-ray": {
        "normal": ("normal", "clear lungs", "no finding", "healthy lungs"),
        "bacterial pneumonia": ("bacterial pneumonia",),
        "viral pneumonia": ("viral pneumonia",),
    },
    "CT": {
        "normal": ("normal", "normal lungs", "healthy lungs"),
        "benign nodule": ("benign nodule", "benign lung nodule"),
        "malignant nodule": ("malignant nodule", "lung cancer", "malignant lung nodule"),
        "COVID-19 pneumonia": ("COVID-19 pneumonia", "COVID-19", "COVID"),
        "no COVID-19": ("no COVID-19", "COVID-19 negative"),
    },
    "MRI": {
        "no tumor": ("no tumor", "normal", "healthy brain"),
        "glioma": ("glioma",),
        "meningioma": ("meningioma",),
        "pituitary tumor": ("pituitary tumor", "pituitary adenoma"),
    },
    "ultrasound": {
        "normal": ("normal", "no lesion"),
        "benign": ("benign lesion", "benign", "benign breast lesion"),
        "malignant": ("malignant lesion", "malignant", "breast cancer"),
    },
    "endoscopy": {"polyp": ("polyp", "colon polyp", "colorectal polyp")},
    "dermoscopy": {
        "melanocytic nevus": ("melanocytic nevus", "nevus", "mole"),
        "melanoma": ("melanoma",),
        "benign keratosis": ("benign keratosis", "seborrheic keratosis"),
        "basal cell carcinoma": ("basal cell carcinoma", "BCC"),
        "actinic keratosis": ("actinic keratosis", "solar keratosis"),
        "vascular lesion": ("vascular lesion", "angioma"),
        "dermatofibroma": ("dermatofibroma",),
    },
    "fundus photography": {
        "normal": ("no abnormality", "normal", "healthy eye"),
        "cataract": ("cataract",),
        "diabetic retinopathy": ("diabetic retinopathy", "DR"),
        "glaucoma": ("glaucoma", "glaucomatous"),
    },
    "histopathology": {
        "benign tissue": ("benign tissue", "benign", "normal lung tissue"),
        "adenocarcinoma": ("adenocarcinoma", "lung adenocarcinoma", "LUAD"),
        "squamous cell carcinoma": ("squamous cell carcinoma", "lung squamous cell carcinoma", "LUSC"),
    },
    "blood smear microscopy": {
        "eosinophil": ("eosinophil", "an eosinophil"),
        "lymphocyte": ("lymphocyte", "a lymphocyte"),
        "monocyte": ("monocyte", "a monocyte"),
        "neutrophil": ("neutrophil", "a neutrophil"),
    },
}

_ORDERS = ("{modality}, {finding}", "{modality} {finding}", "{modality} with {finding}", "{finding}, {modality}")
_EYES = {"left": ("left eye", "OS", "of the left eye"), "right": ("right eye", "OD", "of the right eye")}

MODALITY_ALONE, FINDING_ALONE = 0.15, 0.1  # shares of the rewritten captions
DETAIL_KEPT = 0.75  # probability that a detail of the caption is said


def perhaps_paraphrase(caption: str | None, share: float, rng: Random) -> str | None:
    """Another wording of a caption for this share of the calls, else the caption; None stays None."""
    return paraphrase(caption, rng) if caption and rng.random() < share else caption


def paraphrase(text: str, rng: Random) -> str:
    """Another wording of a canonical caption; any other text as it is."""
    described = parse_caption(text)
    if described is None:
        return text
    finding = rng.choice(FINDING_NAMES[described.modality][described.finding])
    modality = rng.choice(MODALITY_NAMES[described.modality])
    share = rng.random()
    if share < MODALITY_ALONE:
        said = modality
    elif share < MODALITY_ALONE + FINDING_ALONE and _modalities_of(finding) == 1:
        said = finding
    else:
        said = rng.choice(_ORDERS).format(modality=modality, finding=finding)
    return ", ".join([said, *_details(described, rng)])


def known_phrases() -> list[str]:
    """Every phrase that paraphrases are made of, without repetitions."""
    phrases = [name for names in MODALITY_NAMES.values() for name in names]
    phrases += [name for findings in FINDING_NAMES.values() for names in findings.values() for name in names]
    phrases += [name for names in _EYES.values() for name in names]
    return list(dict.fromkeys([*phrases, "with", "on the", "year-old", "year old"]))


def _details(described: Description, rng: Random) -> list[str]:
    details = []
    if described.laterality is not None:
        details.append(rng.choice(_EYES[described.laterality]))
    if described.localization is not None:
        details.append(rng.choice(("{}", "on the {}")).format(described.localization))
    if described.age is not None:
        person = "man" if described.sex == "male" else "woman"
        details.append(
            rng.choice((f"{described.age} year old {person}", f"{described.age}-year-old {person}", person))
        )
    return [detail for detail in details if rng.random() < DETAIL_KEPT]


def _modalities_of(finding: str) -> int:
    """How many modalities call one of their findings so."""
    return sum(any(finding in names for names in FINDING_NAMES[entry.name].values()) for entry in MODALITIES)
