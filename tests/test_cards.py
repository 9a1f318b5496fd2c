"""Licences by rules, and cards: what they name, refuse, and never claim.

python -m pytest tests/test_cards.py
"""

import dataclasses

import pytest
from huggingface_hub import ModelCard

from medisyn.card_metrics import metrics_of_report
from medisyn.cards import (
    SUMMARY,
    CardFacts,
    make_card,
    objections,
    own_headings,
    pictures_of,
    read_sections,
    settle_license,
)
from medisyn.licenses import VALID, Source, license_for, looser_than_sources, stated_license

METRIC = {"name": "precision", "subset": "all", "value": 0.25, "real": 0.875, "images": 600, "extractor": "inception"}
FACTS = CardFacts(
    repo_id="owner/chest",
    kind="model",
    description="A small model.",
    conditions=["text", "labels"],
    snippet="import medisyn",
    facts=["Model hash: `0123456789ab`"],
    components={"unet": "UNet2DConditionModel"},
    datasets=[
        {"name": "kermany_cxr", "license": "CC BY 4.0", "images": 2162},
        {"name": "ham10000", "license": "CC BY-NC 4.0", "images": 1899},
    ],
    metrics=[METRIC],
    hashes=4061,
)
REPORT = {
    "subject": {"model_hash": "0123456789ab"},
    "extractor": {"spec": "timm:lite0@/home/somebody/lite0.pth"},
    "agreement": {
        "modality": {
            "chance": 0.1,
            "synthetic": {
                "images": 600,
                "accuracy": 0.8,
                "balanced_accuracy": 0.7,
                "ordinal": {"all": {"images": 590, "quadratic_weighted_kappa": 0.6}},
            },
            "real": {"images": 90, "accuracy": 1.0, "balanced_accuracy": 0.9},
        },
        "finding": {"omitted": "no column"},
    },
    "fidelity": {"overall": {"omitted": "too few images"}},
    "nearest_training_image": {"omitted": "no training images were given"},
    "notes": ["A note."],
}


def sources(*licenses):
    return [Source(f"data {number}", license) for number, license in enumerate(licenses)]


class TestLicenses:
    @pytest.mark.parametrize(
        ("licenses", "expected"),
        [
            (["CC BY 4.0"], "cc-by-4.0"),
            (["CC0", "MIT"], "cc0-1.0"),
            (["CC BY 4.0", "CC0"], "cc-by-4.0"),
            (["CC BY 4.0", "CC BY-NC 4.0"], "cc-by-nc-4.0"),
            (["CC BY-SA 4.0", "CC BY-NC 4.0"], "cc-by-nc-sa-4.0"),  # the terms of both hold
            (["cc-by-nc-nd-4.0", "Apache-2.0"], "cc-by-nc-nd-4.0"),
            (["CC BY 4.0", "research and education only"], "research-only"),
            (["CC BY 4.0", None], "research-only"),
            (["CC BY 4.0", "not stated (Kaggle page: MIT, unverified)"], "research-only"),
            (["CC0 (Kaggle page, unverified)"], "research-only"),
            (["a licence of our own"], "research-only"),
            (["creativeml-openrail-m"], "creativeml-openrail-m"),
            (["All rights reserved by the hospital"], "research-only"),  # no "by" of a Creative Commons licence
            (["given by its authors"], "research-only"),
            (["non-commercial+use-restrictions+attribution"], "non-commercial+use-restrictions+attribution"),
            ([], "research-only"),
        ],
    )
    def test_the_strictest_source_decides(self, licenses, expected):
        license = license_for(sources(*licenses))
        assert license.title == expected
        assert (license.id == "other") == (license.name is not None)
        assert not looser_than_sources(license, sources(*licenses)) and license.because

    def test_what_the_hub_has_no_name_for_gets_one_of_its_own(self):
        license = license_for(sources("creativeml-openrail-m", "CC BY-NC 4.0"))
        assert (license.id, license.name) == ("other", "non-commercial+use-restrictions+attribution")

    @pytest.mark.parametrize(
        ("stated", "source", "is_looser"),
        [
            ("cc-by-4.0", "CC BY-NC 4.0", True),
            ("mit", "CC BY 4.0", True),
            ("cc-by-nc-4.0", "research only", True),
            ("cc-by-nc-4.0", "CC BY 4.0", False),
            ("research-only", "CC BY-NC-SA 4.0", False),
            ("cc-by-nc-nd-4.0", "CC BY-NC-SA 4.0", False),
            ("apache-2.0", "MIT", False),
        ],
    )
    def test_looser_than_a_source(self, stated, source, is_looser):
        assert bool(looser_than_sources(stated_license(stated), sources(source))) == is_looser

    def test_a_stated_licence_keeps_its_name(self):
        for name in VALID:
            assert stated_license(name).title == name
        assert stated_license("cc-by-sa-3.0").id == "cc-by-sa-3.0"
        assert stated_license("research only (sources of unknown licence)").name == "research-only"
        for unknown in ("", "beerware"):
            with pytest.raises(ValueError, match="valid are: research-only, .*cc-by-4.0.*mit"):
                stated_license(unknown)


class TestCard:
    def test_it_names_sources_numbers_and_limits(self):
        text = make_card(FACTS)
        card = ModelCard(text)
        assert (card.data.license, card.data.library_name) == ("cc-by-nc-4.0", "diffusers")
        assert card.data.pipeline_tag == "text-to-image" and "not-for-diagnosis" in card.data.tags
        (result,) = card.data.eval_results
        assert (result.metric_type, result.metric_value) == ("precision", 0.25)
        for part in ("| kermany_cxr | CC BY 4.0 | 2,162 |", "| precision | all | 0.250 | 0.875 | 600 | inception |"):
            assert part in text
        assert "ham10000 (CC BY-NC 4.0): commercial use is forbidden" in text
        assert "not for diagnosis" in text and "Not for diagnosis" in text and "4,061 training images" in text
        assert "forced" not in text

    def test_an_adapter_names_its_base(self):
        facts = dataclasses.replace(
            FACTS,
            kind="adapter",
            base=Source("owner/base", "creativeml-openrail-m"),
            base_model="owner/base",
            tags=["lora", "peft"],
        )
        text = make_card(facts)
        data = ModelCard(text).data.to_dict()
        assert (data["base_model"], data["base_model_relation"]) == ("owner/base", "adapter")
        assert {"lora", "peft"} <= set(data["tags"])
        assert (data["license"], data["license_link"]) == ("other", "LICENSE")
        assert "use-restrictions" in data["license_name"]
        assert "| base model: owner/base | creativeml-openrail-m |" in text

    def test_without_numbers_it_is_refused_unless_forced(self):
        facts = dataclasses.replace(FACTS, metrics=[])
        with pytest.raises(ValueError, match="owner/chest is refused: it has no measured numbers"):
            make_card(facts)
        text = make_card(facts, force=True)
        assert "forced although it has no measured numbers" in text
        assert "has not been evaluated" in text and "| measure |" not in text
        assert ModelCard(text).data.eval_results is None
        with pytest.raises(ValueError, match="section Evaluation, but nothing was measured"):
            make_card(facts, sections={"Evaluation": "It is excellent."}, force=True)

    def test_a_looser_licence_is_refused_unless_forced(self):
        with pytest.raises(ValueError, match=r"cc-by-4.0 is looser than its sources: ham10000 \(CC BY-NC 4.0\)"):
            make_card(FACTS, stated_license("cc-by-4.0"))
        text = make_card(FACTS, stated_license("cc-by-4.0"), force=True)
        assert "The strictest source: ham10000" in text
        assert "forced although the licence cc-by-4.0 is looser than its sources: ham10000" in text
        assert ModelCard(text).data.license == "cc-by-4.0"

    def test_unrecorded_data_are_for_research_only(self):
        facts = dataclasses.replace(FACTS, datasets=[])
        assert settle_license(facts).name == "research-only"
        assert "training data were not recorded" in make_card(facts)
        assert objections(facts, stated_license("mit"))

    def test_hand_written_sections_are_merged(self, tmp_path):
        file = tmp_path / "card.md"
        file.write_text(
            "---\nlicense: mit\n---\n# A title\n\nDraws chests.\n\n## Limitations\n\n* It draws no ribs.\n\n"
            "## How it was made\n\nIn an afternoon.\n"
        )
        sections = read_sections(file)
        assert sections == {
            SUMMARY: "Draws chests.",
            "Limitations": "* It draws no ribs.",
            "How it was made": "In an afternoon.",
        }
        text = make_card(FACTS, sections=sections)
        assert text.count("## Limitations") == 1 and text.index("no ribs") < text.index("Not for diagnosis")
        assert "## How it was made\n\nIn an afternoon." in text and "Draws chests." in text
        assert ModelCard(text).data.license == "cc-by-nc-4.0"  # a licence in the file's header is not a decision
        file.write_text("## A\n\n## A\n")
        with pytest.raises(ValueError, match="two sections 'A'"):
            read_sections(file)

    def test_a_hand_written_note_on_the_samples(self):
        facts = dataclasses.replace(FACTS, image="samples.png", image_note="Computed.")
        assert "samples.png)\n\nComputed.\n" in make_card(facts)
        text = make_card(facts, sections={"Samples": "By `make demo`."})
        assert "samples.png)\n\nBy `make demo`.\n" in text and "Computed" not in text and "## Samples" not in text
        with pytest.raises(ValueError, match="section Samples, but there is no samples.png"):
            make_card(FACTS, sections={"Samples": "By `make demo`."})

    def test_pictures_and_headings_of_a_hand_written_card(self):
        text = "![a](images/a.png)\n![b](<b.png> 'title') ![c](https://a.org/c.jpg) ![a](images/a.png) [d](d.pdf)"
        assert pictures_of(text) == ["images/a.png", "b.png"]
        for name in ("../a.png", "/home/a.png", "a.jpg"):
            with pytest.raises(ValueError, match="valid are .png files in its folder"):
                pictures_of(f"![a]({name})")
        sections = {"How it was made": "At night.", "Limitations": "Many."}
        assert own_headings(make_card(FACTS, sections=sections)) == ["How it was made"]

    def test_a_name_cannot_break_a_table(self):
        facts = dataclasses.replace(FACTS, datasets=[{"name": "a|b\nc", "license": "CC0", "images": None}])
        assert "| a\\|b c | CC0 |  |" in make_card(facts)


class TestReport:
    def test_measured_numbers_come_with_those_of_real_images(self):
        first, second, kappa = metrics_of_report(REPORT)
        assert first == {
            "name": "agreement with the requested modality, accuracy",
            "subset": "all",
            "value": 0.8,
            "real": 1.0,
            "images": 600,
            "extractor": "timm:lite0",
        }
        assert (second["value"], second["real"]) == (0.7, 0.9)
        assert (kappa["name"], kappa["value"], kappa["real"]) == ("modality, quadratic-weighted kappa", 0.6, None)

    def test_copies_show_in_the_nearest_one_percent(self):
        distances = {name: {"percentile_1": 0.01, "median": 0.2} for name in ("synthetic", "real")}
        *_, nearest, median = metrics_of_report(REPORT | {"nearest_training_image": {"images": 90} | distances})
        assert nearest["name"] == "cosine distance to the nearest training image, 1st percentile"
        assert (nearest["value"], nearest["real"], median["value"]) == (0.01, 0.01, 0.2)

    def test_something_else_is_refused(self):
        with pytest.raises(ValueError, match="not a report of medisyn evaluate"):
            metrics_of_report({"accuracy": 1.0})
