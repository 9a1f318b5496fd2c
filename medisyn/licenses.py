"""Licences as people write them, what they forbid, and the loosest one that a model of several sources may carry.

- A licence is read as a set of terms by `RULES`, each with its reason. What is not stated, not verified or not
  understood counts as research only: nobody gave more.
- A model carries the terms of all its sources together. `license_for` names them, as the Hub does where it has a name.
- This is a careful reading by rules, not legal advice.

    license_for([Source("ham10000", "CC BY-NC 4.0"), Source("busi", "CC0")]).id    # cc-by-nc-4.0
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass

RESEARCH, NON_COMMERCIAL, NO_DERIVATIVES = "research only", "non-commercial", "no derivatives"
SHARE_ALIKE, USE_RESTRICTED, ATTRIBUTION = "share-alike", "use restrictions", "attribution"
TERMS = (RESEARCH, NON_COMMERCIAL, NO_DERIVATIVES, SHARE_ALIKE, USE_RESTRICTED, ATTRIBUTION)  # the strictest first


@dataclass(frozen=True)
class Rule:
    """One reading: where `pattern` is found in a licence's text, `term` holds; None: nothing is forbidden."""

    pattern: str
    term: str | None
    reason: str


RULES = (
    Rule(r"not (stated|known|recorded)|unknown|unclear|unspecified|^\W*$", RESEARCH, "its licence is not stated"),
    Rule(r"unverified|presumably|probably", RESEARCH, "its licence is hearsay: nobody verified it"),
    Rule(r"research|educat|academic|stud(y|ies)\b", RESEARCH, "it was given for research and education"),
    Rule(r"rights reserved|permission|restricted|on request", RESEARCH, "it reserves rights that it does not name"),
    Rule(r"\bnc\b|non-?\s?commercial", NON_COMMERCIAL, "commercial use is forbidden"),
    Rule(r"\bnd\b|no-?\s?deriv", NO_DERIVATIVES, "sharing adaptations is forbidden"),
    Rule(r"\bby-?\s?(nc-?\s?)?sa\b|share-?\s?alike", SHARE_ALIKE, "adaptations must carry the same licence"),
    Rule(
        r"open-?rail|\bllama|\bgemma|use-?\s?restrict",
        USE_RESTRICTED,
        "certain uses are forbidden, also of what is made from it",
    ),
    # a "by" in a sentence ("given by its authors") is no licence
    Rule(r"(\bcc|commons)[\s-]*by\b|^\W*by\b|\bby-(nc|nd|sa)\b|attribution", ATTRIBUTION, "its authors must be named"),
    Rule(
        r"\bmit\b|apache|\bbsd\b|cc-?\s?0|public domain|unlicense|\bpddl\b|cdla-permissive", None, "any use is allowed"
    ),
)

# Terms to the Hub's identifier. What is not here has none: `other` with a name of its own.
HUB_IDS = {
    frozenset({ATTRIBUTION}): "cc-by-4.0",
    frozenset({ATTRIBUTION, SHARE_ALIKE}): "cc-by-sa-4.0",
    frozenset({ATTRIBUTION, NO_DERIVATIVES}): "cc-by-nd-4.0",
    frozenset({ATTRIBUTION, NON_COMMERCIAL}): "cc-by-nc-4.0",
    frozenset({ATTRIBUTION, NON_COMMERCIAL, SHARE_ALIKE}): "cc-by-nc-sa-4.0",
    frozenset({ATTRIBUTION, NON_COMMERCIAL, NO_DERIVATIVES}): "cc-by-nc-nd-4.0",
    frozenset({USE_RESTRICTED}): "creativeml-openrail-m",
}
PERMISSIVE_IDS = ("mit", "apache-2.0", "bsd-3-clause", "cc0-1.0")
VALID = ("research-only", *HUB_IDS.values(), *PERMISSIVE_IDS)


@dataclass(frozen=True)
class Source:
    """Something that a model was made of: a data set, or the model that it started from."""

    name: str
    license: str | None  # as its owner wrote it


@dataclass(frozen=True)
class License:
    """A model's licence.

    Attributes:
        id: The Hub's identifier, or "other".
        name: Of a licence that the Hub has no identifier for; else None.
        terms: What it forbids or asks for, the strictest first.
        because: The source that decided, and why, as a sentence; empty where somebody stated the licence.
    """

    id: str
    name: str | None
    terms: tuple[str, ...]
    because: str = ""

    @property
    def title(self) -> str:
        """The name that a reader sees."""
        return self.name or self.id


def terms_of(text: str | None) -> dict[str, str]:
    """The terms of a licence with their reasons; empty: none. What no rule understands is research only."""
    words = (text or "").lower().replace("_", "-")
    found = [rule for rule in RULES if re.search(rule.pattern, words)]
    if not found:
        return {RESEARCH: f"its licence {text!r} is not one that medisyn understands"}
    terms: dict[str, str] = {}
    for rule in found:
        if rule.term is not None:
            terms.setdefault(rule.term, rule.reason)
    return terms


def license_for(sources: Iterable[Source]) -> License:
    """The loosest licence that respects all sources; without any, research only."""
    sources = list(sources) or [Source("its training data", None)]
    needed: dict[str, str] = {}
    for source in sources:
        for term, reason in terms_of(source.license).items():
            needed.setdefault(term, f"{source.name} ({source.license or 'not stated'}): {reason}.")
    if not needed:
        named = next((one.id for source in sources if (one := _permissive(source.license))), "mit")
        return License(named, None, (), "All sources allow any use.")
    strictest = next(term for term in TERMS if term in needed)
    return _named(set(needed), needed[strictest])


def stated_license(text: str) -> License:
    """A licence that somebody states for a model: one of `VALID`, or a sentence that the rules understand.

    Raises:
        ValueError: It is none of them.
    """
    permissive = _permissive(text)
    terms = terms_of(text)
    if any("understands" in reason for reason in terms.values()) or not text.strip():
        raise ValueError(f"unknown licence {text!r}; valid are: {', '.join(VALID)}")
    if re.fullmatch(r"cc-by(-nc)?(-sa|-nd)?-\d\.\d", text.strip()):  # its version stays
        return License(text.strip(), None, tuple(term for term in TERMS if term in terms))
    return permissive or _named(set(terms), "")


def looser_than_sources(license: License, sources: Iterable[Source]) -> list[str]:
    """For each source with a term that `license` lacks: its name, its licence and the reason; empty: none."""
    held = set(license.terms)
    if RESEARCH in held:
        held = set(TERMS)
    elif NO_DERIVATIVES in held:
        held.add(SHARE_ALIKE)  # what may not be changed need not say how changes are shared
    return [
        f"{source.name} ({source.license or 'not stated'}): {reason}"
        for source in sources
        for term, reason in terms_of(source.license).items()
        if term not in held
    ]


def _named(terms: set[str], because: str) -> License:
    ordered = tuple(term for term in TERMS if term in terms)
    if RESEARCH in terms:
        return License("other", "research-only", ordered, because)
    if NO_DERIVATIVES in terms:
        terms = terms - {SHARE_ALIKE}
    identifier = HUB_IDS.get(frozenset(terms)) or HUB_IDS.get(frozenset(terms | {ATTRIBUTION}))
    if identifier is None:
        return License("other", "+".join(term.replace(" ", "-") for term in ordered), ordered, because)
    return License(identifier, None, ordered, because)


def _permissive(text: str | None) -> License | None:
    """A licence that forbids nothing, by its identifier."""
    if terms_of(text):
        return None
    words = text.lower()
    identifier = next((one for one in PERMISSIVE_IDS if one.split("-")[0] in words.replace("cc 0", "cc0")), "cc0-1.0")
    return License(identifier, None, ())
