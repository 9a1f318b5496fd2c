"""Model cards: a template, sections that a person wrote, and numbers that a program measured.

- What is measured comes from `report.json` of `medisyn evaluate` or the "metrics" of `adapter.json`; nobody types it,
  and a card without any says that nothing is known.
- The licence is that of the strictest source (`medisyn.licenses`). A card without numbers, or with a licence looser
  than its sources, is refused unless forced, and a forced card says so on top.
- A hand-written file has `## Section` headings. What stands before the first one is the summary; sections that the
  template has are put in front of the computed part, others are added as they are. `## Samples` says how `samples.png`
  was made; its pictures (PNG, named relative to the file) are published along with it.

    card = make_card(facts, sections=read_sections(Path("model_cards/knee-osteoarthritis.md")))
"""

import math
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path, PurePosixPath
from typing import Any

from .licenses import License, Source, license_for, looser_than_sources

MARK = "written by medisyn publish"
TEMPLATE = "card_template.md"
SUMMARY = ""  # key of what stands before the first heading
MERGED = ("samples", "use", "training data and licences", "evaluation", "limitations")  # what the template has
ALIASES = {"training data": "training data and licences", "licence": "training data and licences"}
TAGS = ("medical", "medical-imaging", "synthetic", "medisyn", "not-for-diagnosis")


@dataclass(frozen=True)
class CardFacts:
    """What a program knows about a model or an adapter.

    Attributes:
        repo_id: owner/name on the Hub.
        kind: "model" or "adapter".
        description: One sentence: what it is, for which base, at which resolution.
        conditions: Kinds of condition that it takes.
        snippet: Python code that draws an image with medisyn.
        stock_snippet: The same with stock diffusers, where that is possible.
        facts: Further lines: hashes, words, labels, captions.
        components: Component -> class name; of an adapter, empty.
        datasets: `{"name", "license", "images"}` of the training data.
        base: The model that it started from or belongs to, with its licence; None: from scratch.
        base_model: The same, where it is a name on the Hub.
        metrics: `{"name", "subset", "value", "real", "images", "extractor"}` of each measured number.
        notes: What a reader of the numbers must know.
        hashes: Number of training images whose hash is published.
        tags: Beside those of all cards.
        image: File name of a picture that it drew.
        image_note: How that was drawn.
    """

    repo_id: str
    kind: str
    description: str
    conditions: Sequence[str]
    snippet: str
    stock_snippet: str = ""
    facts: Sequence[str] = ()
    components: Mapping[str, str] = field(default_factory=dict)
    datasets: Sequence[Mapping[str, Any]] = ()
    base: Source | None = None
    base_model: str | None = None
    metrics: Sequence[Mapping[str, Any]] = ()
    notes: Sequence[str] = ()
    hashes: int = 0
    tags: Sequence[str] = ()
    image: str | None = None
    image_note: str = ""

    @property
    def sources(self) -> list[Source]:
        """Everything whose licence binds this one."""
        data = [Source(each.get("name") or "unnamed data", each.get("license")) for each in self.datasets]
        return data + ([self.base] if self.base is not None else [])


def settle_license(facts: CardFacts, stated: License | None = None) -> License:
    """The licence that somebody stated, else the loosest that the sources allow."""
    return stated or license_for(facts.sources)


def objections(facts: CardFacts, license: License) -> list[str]:
    """Why this card should not be published, one sentence each; empty: nothing speaks against it."""
    found = []
    if not facts.metrics:
        found.append("it has no measured numbers")
    sources = facts.sources or [Source("its training data", None)]
    looser = looser_than_sources(license, sources)
    if looser:
        more = f" and {len(looser) - 1} more" if len(looser) > 1 else ""
        found.append(f"the licence {license.title} is looser than its sources: {looser[0]}{more}")
    return found


def make_card(
    facts: CardFacts,
    license: License | None = None,
    sections: Mapping[str, str] | None = None,
    force: bool = False,
) -> str:
    """The card as Markdown with its YAML header.

    Args:
        facts: About the model.
        license: Stated by somebody; by default that of the strictest source.
        sections: What `read_sections` returns.
        force: Write the card although something speaks against it; it then says what.

    Raises:
        ValueError: It has no measured numbers, or its licence is looser than its sources; or somebody wrote about an
            evaluation that was not made, or about samples that are not there.
    """
    from huggingface_hub import ModelCard

    settled = settle_license(facts, license)
    against = objections(facts, settled)
    if against and not force:
        raise ValueError(f"the card of {facts.repo_id} is refused: {'; '.join(against)}. Mend it, or force it")
    hand, extra = _merged(sections or {})
    if hand["evaluation"] and not facts.metrics:
        raise ValueError("the hand-written card has a section Evaluation, but nothing was measured: leave it out")
    if hand["samples"] and facts.image is None:
        raise ValueError("the hand-written card has a section Samples, but there is no samples.png: leave it out")
    reason = f"The strictest source: {license_for(facts.sources).because}"
    card = ModelCard.from_template(
        metadata(facts, settled),
        template_str=(resources.files("medisyn") / TEMPLATE).read_text(encoding="utf-8"),
        mark=MARK,
        name=facts.repo_id.rpartition("/")[2],
        warnings=[f"This card was forced although {reason}." for reason in against],
        summary=(sections or {}).get(SUMMARY, ""),
        description=facts.description,
        image=facts.image,
        image_note=hand["samples"].strip() or facts.image_note,
        snippet=facts.snippet,
        stock_snippet=facts.stock_snippet,
        facts=facts.facts,
        components=facts.components,
        hand=hand,
        extra=extra,
        sources=_source_rows(facts),
        license=settled,
        license_reason=reason,
        hashes=f"{facts.hashes:,}" if facts.hashes else "",
        metrics=[_metric_row(metric) for metric in facts.metrics],
        notes=facts.notes,
    )
    return re.sub(r"\n{3,}", "\n\n", str(card)).rstrip() + "\n"


def license_note(facts: CardFacts, license: License) -> str:
    """The text of the LICENSE file: the licence, why it is that one, and those of the sources."""
    known = None if license.name else f"https://huggingface.co/docs/hub/repositories-licenses lists {license.id}."
    terms = ", ".join(license.terms) or "none"
    lines = [f"Licence of these weights: {license.title}", f"Terms: {terms}", ""]
    if license.name == "research-only":
        lines += [
            "These weights may be used for research only. No other right is granted, since none was received.",
            "",
        ]
    lines += [known, ""] if known else []
    lines += ["Made from:", *(f"- {each.name}: {each.license or 'not stated'}" for each in facts.sources)]
    return "\n".join([*lines, "", "Images of this model are synthetic and not for diagnosis."]) + "\n"


def metadata(facts: CardFacts, license: License) -> Any:
    """The YAML header as `huggingface_hub.ModelCardData`."""
    from huggingface_hub import EvalResult, ModelCardData

    is_adapter = facts.kind == "adapter"
    task = "text-to-image" if "text" in facts.conditions else "unconditional-image-generation"
    results = [
        EvalResult(
            task_type=task,
            dataset_type="real-images",
            dataset_name=f"real images: {metric['subset']}",
            dataset_config=re.sub(r"[^a-z0-9]+", "-", str(metric["subset"]).lower()).strip("-") or "all",
            metric_type=_identifier(metric["name"]),
            metric_name=str(metric["name"]),
            metric_value=metric["value"],
        )
        for metric in facts.metrics
    ]
    return ModelCardData(
        license=license.id,
        license_name=license.name,
        license_link="LICENSE" if license.name else None,
        library_name="diffusers",
        pipeline_tag=task,
        base_model=facts.base_model,
        base_model_relation=("adapter" if is_adapter else "finetune") if facts.base_model else None,
        tags=[*TAGS, *facts.tags, *(f"condition-{kind}" for kind in facts.conditions)],
        model_name=facts.repo_id.rpartition("/")[2],
        eval_results=results or None,
    )


def read_sections(file: Path) -> dict[str, str]:
    """The sections of a hand-written card by heading; `SUMMARY` is what stands before the first one.

    Raises:
        OSError: The file cannot be read.
        ValueError: It is not UTF-8, or has two sections of one name.
    """
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ValueError(f"{file} is not text in UTF-8") from None
    text = re.sub(r"\A---\n.*?\n---\n", "", text, flags=re.DOTALL)  # a header, which is computed
    parts = re.split(r"^## +(.+?) *$", text, flags=re.MULTILINE)
    summary = re.sub(r"\A\s*# .*$", "", parts[0], flags=re.MULTILINE).strip()
    sections = {SUMMARY: summary} if summary else {}
    for heading, body in zip(parts[1::2], parts[2::2], strict=True):
        if heading in sections:
            raise ValueError(f"{file} has two sections {heading!r}")
        sections[heading] = body.strip()
    return sections


def own_headings(text: str) -> list[str]:
    """The headings of a finished card that the template has not: of sections that somebody wrote."""
    template = (resources.files("medisyn") / TEMPLATE).read_text(encoding="utf-8")
    found, computed = (re.findall(r"^## +(.+?) *$", each, re.MULTILINE) for each in (text, template))
    return [heading for heading in found if heading not in computed]


def pictures_of(text: str) -> list[str]:
    """The pictures that a hand-written card shows, but those of the web, as paths relative to the card's file.

    Raises:
        ValueError: One is no PNG, or lies outside of the card's folder.
    """
    names = re.findall(r"!\[[^\]]*\]\(\s*<?([^)>\s]+)", text)
    found = list(dict.fromkeys(name for name in names if not re.match(r"[a-z]+:", name)))
    for name in found:
        path = PurePosixPath(name)
        if path.suffix != ".png" or path.is_absolute() or ".." in path.parts or "\\" in name:
            raise ValueError(f"the hand-written card shows {name!r}; valid are .png files in its folder or below")
    return found


def _merged(sections: Mapping[str, str]) -> tuple[dict[str, str], list[tuple[str, str]]]:
    """Texts for the template's own sections, and the other sections."""
    hand, extra = dict.fromkeys(MERGED, ""), []
    for heading, text in sections.items():
        key = ALIASES.get(heading.lower(), heading.lower())
        if key in hand:
            hand[key] += text + "\n\n"
        elif heading != SUMMARY:
            extra.append((heading, text))
    return hand, extra


def _source_rows(facts: CardFacts) -> list[dict[str, str]]:
    rows = [
        {
            "name": _cell(each.get("name") or "unnamed"),
            "license": _cell(each.get("license") or "not stated"),
            "images": f"{each['images']:,}" if each.get("images") is not None else "",
        }
        for each in facts.datasets
    ]
    if facts.base is not None:
        license = _cell(facts.base.license or "not stated")
        rows.append({"name": f"base model: {_cell(facts.base.name)}", "license": license, "images": ""})
    return rows


def _metric_row(metric: Mapping[str, Any]) -> dict[str, str]:
    return {key: show_number(value) if key in ("value", "real") else _cell(value) for key, value in metric.items()}


def show_number(value: Any) -> str:
    """Three decimals below ten, one above; text as it is."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return _cell(value)
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.3f}"


def _cell(value: Any) -> str:
    return " ".join(str(value if value is not None else "").split()).replace("|", "\\|")


def _identifier(name: Any) -> str:
    """A metric's name as the card's YAML wants it: `frechet_distance`."""
    plain = unicodedata.normalize("NFKD", str(name)).encode("ascii", "ignore").decode().lower()
    return re.sub(r"[^a-z0-9]+", "_", plain).strip("_")
