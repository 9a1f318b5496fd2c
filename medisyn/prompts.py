"""The vocabulary of prompts: modalities, anatomies, findings, and the one sentence that names each combination.

A text-conditioned model follows the sentences it was trained on far better than paraphrases of them, so the sentence
for a combination is written once, here, and used by training data, demonstrations, evaluation and the tokenizer alike.
The template of a caption is ``{image type}[ of the {place}][ showing|with {finding}][ of a {age}-year-old
{man|woman}]``, the shape of the prompts of MediSyn (arXiv 2405.09806, figure 1). No torch is imported here.

    >>> from medisyn.prompts import caption
    >>> caption("fundus photography", "glaucoma", laterality="left")
    'color fundus photograph of the left eye with glaucoma'
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple


@dataclass(frozen=True)
class Modality:
    """One kind of medical image and how its captions are written."""

    name: str  # as in the `modality` column of a dataset
    display: str  # for the label of a grid cell or a table row
    specialty: str
    anatomy: str
    template: str  # fields: {laterality} ("left " | "right " | ""), {finding}, {place}, {person}
    findings: Mapping[str, str]  # finding as in the `finding` column -> its phrase in the caption


class DemoPrompt(NamedTuple):
    """A prompt to show a model with, and the short name to print under its image."""

    name: str
    prompt: str


class Description(NamedTuple):
    """What a canonical caption states: the arguments of `caption`."""

    modality: str
    finding: str
    laterality: str | None = None
    localization: str | None = None
    age: int | None = None
    sex: str | None = None


def _same(*findings: str) -> dict[str, str]:
    return {finding: finding for finding in findings}


MODALITIES: tuple[Modality, ...] = (
    Modality(
        name="chest X-ray",
        display="Chest X-ray",
        specialty="radiology",
        anatomy="chest",
        template="frontal chest X-ray of a child {finding}",
        findings={
            "normal": "with clear lungs",
            "bacterial pneumonia": "showing bacterial pneumonia",
            "viral pneumonia": "showing viral pneumonia",
        },
    ),
    Modality(
        name="CT",
        display="Chest CT",
        specialty="radiology",
        anatomy="chest",
        template="axial chest CT slice {finding}",
        findings={
            "normal": "with normal lungs",
            "benign nodule": "showing a benign nodule",
            "malignant nodule": "showing a malignant nodule",
            "COVID-19 pneumonia": "showing COVID-19 pneumonia",
            "no COVID-19": "without COVID-19",
        },
    ),
    Modality(
        name="MRI",
        display="Brain MRI",
        specialty="neurology",
        anatomy="brain",
        template="brain MRI slice {finding}",
        findings={
            "no tumor": "with no tumor",
            "glioma": "showing a glioma",
            "meningioma": "showing a meningioma",
            "pituitary tumor": "showing a pituitary tumor",
        },
    ),
    Modality(
        name="ultrasound",
        display="Breast ultrasound",
        specialty="oncology",
        anatomy="breast",
        template="breast ultrasound image {finding}",
        findings={
            "normal": "with no lesion",
            "benign": "showing a benign lesion",
            "malignant": "showing a malignant lesion",
        },
    ),
    Modality(
        name="endoscopy",
        display="Colonoscopy",
        specialty="gastroenterology",
        anatomy="colon",
        template="colonoscopy image {finding}",
        findings={"polyp": "showing a polyp"},
    ),
    Modality(
        name="dermoscopy",
        display="Dermoscopy",
        specialty="dermatology",
        anatomy="skin",
        template="dermoscopy image of {finding}{place}{person}",
        findings=_same(
            "melanocytic nevus",
            "melanoma",
            "benign keratosis",
            "basal cell carcinoma",
            "actinic keratosis",
            "vascular lesion",
            "dermatofibroma",
        ),
    ),
    Modality(
        name="fundus photography",
        display="Fundus photograph",
        specialty="ophthalmology",
        anatomy="retina",
        template="color fundus photograph of the {laterality}eye with {finding}",
        findings={"normal": "no abnormality"} | _same("cataract", "diabetic retinopathy", "glaucoma"),
    ),
    Modality(
        name="histopathology",
        display="Histopathology",
        specialty="pathology",
        anatomy="lung",
        template="H&E histopathology patch of lung {finding}",
        findings=_same("benign tissue", "adenocarcinoma", "squamous cell carcinoma"),
    ),
    Modality(
        name="blood smear microscopy",
        display="Blood smear",
        specialty="hematology",
        anatomy="blood",
        template="blood smear microscopy image showing {finding}",
        findings={
            "eosinophil": "an eosinophil",
            "lymphocyte": "a lymphocyte",
            "monocyte": "a monocyte",
            "neutrophil": "a neutrophil",
        },
    ),
)

LATERALITIES: tuple[str, ...] = ("left", "right")
SEXES: Mapping[str, str] = {"male": "man", "female": "woman"}
SKIN_SITES: tuple[str, ...] = (
    "abdomen",
    "acral",
    "back",
    "chest",
    "ear",
    "face",
    "foot",
    "genital",
    "hand",
    "lower extremity",
    "neck",
    "scalp",
    "trunk",
    "upper extremity",
)

# One finding per modality for demonstrations, in the order of MODALITIES.
_DEMO_CAPTIONS: tuple[Mapping[str, Any], ...] = (
    {"finding": "bacterial pneumonia"},
    {"finding": "normal"},
    {"finding": "meningioma"},
    {"finding": "benign"},
    {"finding": "polyp"},
    {"finding": "melanocytic nevus", "localization": "back", "age": 45, "sex": "male"},
    {"finding": "normal", "laterality": "right"},
    {"finding": "adenocarcinoma"},
    {"finding": "neutrophil"},
)


def suggestion(value: str, valid: Iterable[str]) -> str:
    """`" Did you mean 'glioma'?"` for a misspelt value, or nothing when no valid one is near."""
    spellings = {name.lower(): name for name in valid}
    closest = difflib.get_close_matches(value.lower(), spellings, n=1)
    return f" Did you mean {spellings[closest[0]]!r}?" if closest else ""


def choose(kind: str, value: str | None, valid: Iterable[str]) -> str:
    """Returns `value` if it is one of `valid`; otherwise raises one line that lists them and guesses what was meant.

    Raises:
        ValueError: For a value outside `valid`.
    """
    names = [str(name) for name in valid]
    if value in names:
        return value
    raise ValueError(f"Unknown {kind} {value!r}.{suggestion(str(value), names)} Valid: {', '.join(names)}.")


def modality(name: str) -> Modality:
    """The modality called `name`.

    Raises:
        ValueError: For an unknown name; the message lists the valid ones.
    """
    choose("modality", name, (entry.name for entry in MODALITIES))
    return next(entry for entry in MODALITIES if entry.name == name)


def caption(
    modality_name: str,
    finding: str,
    *,
    laterality: str | None = None,
    localization: str | None = None,
    age: int | None = None,
    sex: str | None = None,
) -> str:
    """The canonical sentence for an image, e.g. `"brain MRI slice showing a glioma"`.

    What is unknown (None) is left out of the sentence. Age is in years and appears only together with the sex. A
    detail that the modality's sentence has no place for is an error, not silently lost.

    Args:
        modality_name: One of the names in `MODALITIES`.
        finding: One of that modality's findings.
        laterality: "left" or "right" (fundus photography).
        localization: One of `SKIN_SITES` (dermoscopy).
        age: Years, above 0 (dermoscopy).
        sex: "male" or "female" (dermoscopy).

    Raises:
        ValueError: For a value outside the vocabulary, or a detail that the modality does not take.
    """
    entry = modality(modality_name)
    phrase = entry.findings[choose(f"finding of {entry.name}", finding, entry.findings)]
    details = {"laterality": laterality, "place": localization, "person": sex if age is not None else None}
    for field, value in details.items():
        if value is not None and "{" + field + "}" not in entry.template:
            raise ValueError(f"A caption of {entry.name} does not say the {field}; got {value!r}.")
    if age is not None and age <= 0:
        raise ValueError(f"The age must be above 0 years, got {age!r}; leave it out when it is unknown.")
    return entry.template.format(
        finding=phrase,
        laterality="" if laterality is None else choose("laterality", laterality, LATERALITIES) + " ",
        place="" if localization is None else " on the " + choose("localization", localization, SKIN_SITES),
        person="" if details["person"] is None else f" of a {age}-year-old {SEXES[choose('sex', sex, SEXES)]}",
    )


def parse_caption(text: str) -> Description | None:
    """What a sentence of `caption` states; None for any other text.

    >>> parse_caption("dermoscopy image of melanoma on the back").localization
    'back'
    """
    for entry, pattern in _PATTERNS:
        match = pattern.fullmatch(text)
        if match is None:
            continue
        found = {name: value for name, value in match.groupdict().items() if value is not None}
        said = found.pop("finding")
        finding = next(name for name, phrase in entry.findings.items() if phrase == said)
        if "person" in found:
            person = found.pop("person")
            found["sex"] = next(sex for sex, noun in SEXES.items() if noun == person)
        age = found.pop("age", None)
        return Description(entry.name, finding, age=None if age is None else int(age), **found)
    return None


def _pattern(entry: Modality) -> re.Pattern[str]:
    """The sentences of a modality as one regular expression with a group for each field."""
    either = {
        "finding": f"(?P<finding>{'|'.join(map(re.escape, entry.findings.values()))})",
        "laterality": f"(?:(?P<laterality>{'|'.join(LATERALITIES)}) )?",
        "place": f"(?: on the (?P<localization>{'|'.join(SKIN_SITES)}))?",
        "person": f"(?: of a (?P<age>[0-9]+)-year-old (?P<person>{'|'.join(SEXES.values())}))?",
    }
    parts = re.split(r"[{](\w+)[}]", entry.template)
    return re.compile("".join(either[part] if place % 2 else re.escape(part) for place, part in enumerate(parts)))


_PATTERNS = tuple((entry, _pattern(entry)) for entry in MODALITIES)


def demo_prompts() -> list[DemoPrompt]:
    """One prompt for each modality, always in the same order: what `make demo` shows."""
    return [
        DemoPrompt(entry.display, caption(entry.name, **details))
        for entry, details in zip(MODALITIES, _DEMO_CAPTIONS, strict=True)
    ]


def all_captions() -> list[str]:
    """Every modality-finding sentence without optional details, in a fixed order (for evaluation grids)."""
    return [caption(entry.name, finding) for entry in MODALITIES for finding in entry.findings]


def vocabulary() -> list[str]:
    """Every phrase that captions are made of, without repetitions: what a tokenizer must know as whole words."""
    phrases = all_captions()
    for entry in MODALITIES:
        phrases += [entry.name, entry.display, entry.specialty, entry.anatomy, *entry.findings]
    phrases += [*LATERALITIES, *SEXES, *SEXES.values(), *SKIN_SITES, "year-old", "0 1 2 3 4 5 6 7 8 9"]
    return list(dict.fromkeys(phrases))
