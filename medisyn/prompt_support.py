"""What a free prompt asks of a model that was trained on the vocabulary of `medisyn.prompts`, and cannot get.

- Modality and finding are found by the names of `medisyn.paraphrases`: whole words, in any case, and of names that
  overlap the first and longest. The last word of a finding is a name as well: "pneumonia", "nodule".
- A modality is one of the model's where it knows every word of the captions, so models with other captions are left
  alone. Single words that a model does not know are the pipeline's matter (`MediSynPipeline.unknown_words`).

    prompt_warning(medisyn.load_pipeline(), "brain MRI showing melanoma")  # "... not trained on 'melanoma' of ..."
"""

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING

from .paraphrases import FINDING_NAMES, MODALITY_NAMES
from .prompts import MODALITIES, caption

if TYPE_CHECKING:
    from .pipelines.medisyn_pipeline import MediSynPipeline


def prompt_warning(pipe: "MediSynPipeline", prompt: str) -> str | None:
    """One line on a prompt without a modality of the model, or with findings of other modalities alone; else None.

    Where no modality is named, a prompt of known words is taken as it is: "melanoma" says enough.
    """
    from .pipelines.medisyn_pipeline import words_of

    known = set(pipe.config.get("known_words") or ())
    own = {
        each.name: each
        for each in MODALITIES
        if known.issuperset(words_of(caption(each.name, finding) for finding in each.findings))
    }
    text = prompt.lower()
    modalities = own.keys() & {owner for name in _MODALITY.findall(text) for owner in _MODALITIES[name]}
    findings = {name: _FINDINGS[name] for name in _FINDING.findall(_MODALITY.sub(" ", text))}
    if own and not modalities and pipe.unknown_words(prompt):
        known_ones = ", ".join(each.display for each in own.values())
        return f"the prompt names none of the modalities that this model was trained on: {known_ones}"
    if not findings or not modalities or any(modalities & owners for owners in findings.values()):
        return None
    there = "; ".join(f"{own[name].display}: {', '.join(own[name].findings)}" for name in own if name in modalities)
    return f"this model was not trained on {' or '.join(map(repr, findings))} of this modality; it knows {there}"


def _owners(names: Iterable[tuple[str, str]]) -> dict[str, set[str]]:
    """(name, modality) to name -> its modalities."""
    owners: dict[str, set[str]] = {}
    for name, modality in names:
        owners.setdefault(name.lower(), set()).add(modality)
    return owners


def _pattern(names: Iterable[str]) -> re.Pattern[str]:
    longest_first = sorted(names, key=len, reverse=True)
    return re.compile(rf"(?<!\w)(?:{'|'.join(map(re.escape, longest_first))})(?!\w)")


_MODALITIES = _owners(
    (name, each.name) for each in MODALITIES for name in (each.name, each.display, *MODALITY_NAMES[each.name])
)
_FINDINGS = _owners(
    (name, each.name)
    for each in MODALITIES
    for finding, phrase in each.findings.items()
    for name in (finding, finding.split()[-1], phrase.split()[-1], *FINDING_NAMES[each.name][finding])
)
_MODALITY, _FINDING = _pattern(_MODALITIES), _pattern(_FINDINGS)
