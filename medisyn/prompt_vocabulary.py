r"""What a model that was trained on captions of `medisyn.prompts` records about them, so that it understands prompts.

- `MediSynPipeline` reads it (`prompt_vocabulary` in `model_index.json`): it warns of what was never together in a
  caption ("breast MRI"), lists what it has instead, and reads everyday spellings ("60M", "xrays") as its own words.
- Only what the captions have is recorded. A model with other captions as well records no modalities of its own.
- `spellings` are `[pattern, replacement]` of `re.sub`, for whole words in any case. Plurals and British spellings of
  known words need none.

    >>> [entry["name"] for entry in prompt_vocabulary(["brain MRI slice showing a glioma"])["modalities"]]
    ['Brain MRI']
"""

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from .paraphrases import FINDING_NAMES, known_phrases
from .prompts import LATERALITIES, MODALITIES, SEXES, SKIN_SITES, parse_caption

if TYPE_CHECKING:
    from .pipelines.medisyn_pipeline import MediSynPipeline

# Any of them in a prompt names the modality.
TERMS: Mapping[str, tuple[str, ...]] = {
    "chest X-ray": ("X-ray", "CXR", "radiograph"),
    "CT": ("CT",),
    "MRI": ("MRI", "MR"),
    "ultrasound": ("ultrasound", "sonogram", "sonography"),
    "endoscopy": ("colonoscopy", "endoscopy", "endoscopic"),
    "dermoscopy": ("dermoscopy", "dermatoscopy", "dermoscopic"),
    "fundus photography": ("fundus", "CFP"),
    "histopathology": ("H&E", "histopathology", "histology"),
    "blood smear microscopy": ("smear", "blood film", "blood cell microscopy"),
}
# Parts of the body that its captions and their other wordings name; the first is the one to show.
ANATOMY: Mapping[str, tuple[str, ...]] = {
    "chest X-ray": ("chest", "lung", "lungs"),
    "CT": ("chest", "lung", "lungs"),
    "MRI": ("brain", "head"),
    "ultrasound": ("breast",),
    "endoscopy": ("colon",),
    "dermoscopy": ("skin", *SKIN_SITES),
    "fundus photography": ("retina", "retinal", "eye"),
    "histopathology": ("lung",),
    "blood smear microscopy": ("blood", "peripheral"),
}
# What else they state, which does not tell what kind of image it is.
DETAILS: Mapping[str, tuple[str, ...]] = {
    "chest X-ray": ("child", "pediatric"),
    "dermoscopy": tuple(SEXES.values()),
    "fundus photography": (*LATERALITIES, "OS", "OD"),
}

_YEARS = r"[ -]*(?:y\.?/?o?\.?|yrs?|years?)(?:[ -]?old)?"
SPELLINGS: tuple[tuple[str, str], ...] = (
    (r"(\w+)['’]s", r"\1"),
    (r"x[ -]?rays?", "X-ray"),
    (r"mris", "MRI"),
    (r"(photo|radio)graphy", r"\1graph"),
    (r"h ?(?:&|\+|and|n) ?e", "H&E"),
    (r"covid[ -]?19", "COVID-19"),
    *(
        (pattern, rf"\1-year-old {person}")
        for sex, person in (("m(?:ale)?", "man"), ("f(?:emale)?", "woman"))
        for pattern in (
            rf"(\d{{1,3}}){_YEARS}[ ,/-]*{sex}",
            rf"(?<!-)(\d{{2}})[ /]?{sex}",
            rf"{sex}[ ,/-]*(\d{{1,3}}){_YEARS}",
            rf"{sex}[ /]?(\d{{2}})(?![ -]*year)",
        )
    ),
    (r"(\d{1,3})[ -]*y\.?/?o?\.?", r"\1-year-old"),
    (r"yrs?", "year"),
    (r"male", "man"),
    (r"female", "woman"),
    (r"(wo)?men", r"\1man"),
    (r"children|kids?", "child"),
)


def prompt_vocabulary(captions: Iterable[str | None]) -> dict[str, Any] | None:
    """What to record for a model of these captions; None where any of them is not one of `medisyn.prompts.caption`.

    Returns:
        `{"spellings": [[pattern, replacement]], "modalities": [{"name", "terms", "anatomy", "details", "findings":
        [[finding, other wordings, ...]]}]}`, in the order of `MODALITIES`.
    """
    described = [parse_caption(caption) for caption in sorted({caption for caption in captions if caption})]
    if not described or None in described:
        return None
    stated = {(one.modality, one.finding) for one in described}
    modalities: list[dict[str, Any]] = []
    for entry in MODALITIES:
        findings = [
            list(dict.fromkeys([finding, *(name for name in names if not name.startswith(("a ", "an ")))]))
            for finding, names in FINDING_NAMES[entry.name].items()
            if (entry.name, finding) in stated
        ]
        if findings:
            lists = {"terms": TERMS, "anatomy": ANATOMY, "details": DETAILS}
            listed = {name: list(names.get(entry.name, ())) for name, names in lists.items()}
            shown = [place for place in listed["anatomy"][:1] if place not in entry.display.lower()]
            name = " ".join([entry.display, *(f"({place})" for place in shown)])
            modalities.append({"name": name, **listed, "findings": findings})
    return {"spellings": [list(spelling) for spelling in SPELLINGS], "modalities": modalities}


def record_vocabulary(pipe: "MediSynPipeline", captions: Iterable[str | None], paraphrased: bool = False) -> None:
    """Write into a pipeline's configuration what its text encoder was taught: `known_words`, `prompt_vocabulary`.

    Args:
        pipe: Trained, perhaps from a base whose words, modalities and findings it keeps.
        captions: Of the training images.
        paraphrased: Whether training said them in other words as well (`medisyn.paraphrases`).
    """
    from .pipelines.medisyn_pipeline import words_of

    captions = list(captions)
    taught = words_of([*captions, *(known_phrases() if paraphrased else [])])
    pipe.register_to_config(known_words=sorted({*(pipe.config.get("known_words") or []), *taught}))
    vocabulary, earlier = prompt_vocabulary(captions), pipe.config.get("prompt_vocabulary")
    if vocabulary is not None and earlier:
        modalities: dict[str, dict[str, Any]] = {}
        for one in [*earlier["modalities"], *vocabulary["modalities"]]:
            findings = modalities.setdefault(one["name"], {**one, "findings": []})["findings"]
            findings += [list(names) for names in one["findings"] if list(names) not in findings]
        vocabulary["modalities"] = list(modalities.values())
    elif earlier:  # words that it was taught are not respelled, so its spellings hold beside other captions
        vocabulary = {"spellings": earlier["spellings"], "modalities": []}
    if vocabulary is not None:
        pipe.register_to_config(prompt_vocabulary=vocabulary)
