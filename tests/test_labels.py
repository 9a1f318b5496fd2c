"""Label schemas: reading, encoding, decoding, converting and refusing."""

import doctest
import json

import pytest
import torch

from medisyn.conditions import LabelSchema, LabelsCondition, convert, get_schema, labels, list_schemas, row_rules

DISEASES = ["amd", "aon", "crp", "dm", "dme", "em", "gc", "htr", "pm", "rvo"]


@pytest.mark.parametrize("module", [labels, row_rules])
def test_documented_snippets(module):
    assert doctest.testmod(module).failed == 0


def test_the_shipped_schemas():
    assert list_schemas() == ("corpus_fundus", "odir8", "synfundus")
    synfundus = get_schema("synfundus")
    assert synfundus.width == 5 + 10 * 2 + 4 * 2 + 2
    assert [field.name for field in synfundus.fields if field.type == "binary"][:10] == DISEASES
    assert synfundus.field("dr_grade").type == "ordinal" and synfundus.field("eye_side").type == "categorical"
    assert get_schema("odir8").width == 16
    assert get_schema("corpus_fundus").width == 10


@pytest.mark.parametrize("name", list_schemas())
def test_a_schema_survives_json(name):
    schema = get_schema(name)
    assert LabelSchema.from_dict(json.loads(json.dumps(schema.to_dict()))) == schema
    plain = LabelSchema.from_dict(schema.to_dict(rules=False))
    assert (plain.name, plain.fields, plain.width) == (schema.name, schema.fields, schema.width)


@pytest.mark.parametrize(
    "given",
    [
        "glaucoma=1, dr_grade=3",
        "gc=yes,dr_grade=3",
        " DR_GRADE = 3 , Glaucoma = True",
        {"gc": True, "dr_grade": 3.0},
        {"gc": 1, "Diabetic retinopathy grade": "3", "amd": None, "pm": float("nan"), "em": "unknown"},
    ],
)
def test_one_labelling_in_many_spellings(given):
    schema = get_schema("synfundus")
    assert schema.canonical(given) == {"dr_grade": 3, "gc": 1}
    vector = schema.encode(given)
    assert vector[3] == 1.0 and sum(vector) == 2.0
    assert schema.decode(vector) == {"dr_grade": 3, "gc": 1}
    assert schema.decode(torch.tensor(vector)) == {"dr_grade": 3, "gc": 1}
    assert schema.format(given) == "dr_grade=3, gc=1"
    assert schema.format(given, display=True) == "Diabetic retinopathy grade=3, Glaucoma=1"
    assert schema.canonical(schema.format(given, display=True)) == schema.canonical(given)


def test_unknown_is_zero_and_no_is_not():
    schema = get_schema("odir8")
    assert schema.encode(None) == schema.encode({}) == schema.encode({"G": None}) == [0.0] * 16
    assert sum(schema.encode({"G": 0})) == 1.0
    assert schema.decode([0.0] * 16) == {}


@pytest.mark.parametrize("name", list_schemas())
def test_every_value_of_every_field_survives_the_vector(name):
    schema = get_schema(name)
    for field in schema.fields:
        for value in field.values:
            decoded = schema.decode(schema.encode({field.name: value}))
            assert list(decoded) == [field.name] and str(decoded[field.name]) == value


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ("glaucma=1", ["'glaucma'", "Did you mean 'Glaucoma'?", "dr_grade", "eye_side"]),
        ("gc=2", ["'2'", "0, 1, unknown"]),
        ("dr_grade=5", ["'5'", "0, 1, 2, 3, 4"]),
        ("eye_side=lef", ["'lef'", "right, left", "Did you mean 'left'?"]),
        ({"gc": 1, "glaucoma": 0}, ["gc", "twice"]),
        ({"dr_grade": 1.5}, ["1.5"]),
        ({"dr_grade": -1}, ["-1"]),
        ("glaucoma", ["'glaucoma'", "field=value"]),
    ],
)
def test_wrong_labels_are_refused_in_one_line(given, named):
    with pytest.raises(ValueError) as error:
        get_schema("synfundus").encode(given)
    assert all(part in str(error.value) for part in named), str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("vector", [[0.0] * 3, [1.0] * 16, [0.5] + [0.0] * 15, [-1.0, 1.0] + [0.0] * 14])
def test_a_vector_that_no_labels_give_is_not_decoded(vector):
    with pytest.raises(ValueError):
        get_schema("odir8").decode(vector)


def test_display_names_can_be_replaced():
    schema = get_schema("synfundus").with_display({"aon": "Optic atrophy"})
    assert schema.canonical("optic atrophy=1") == {"aon": 1}
    assert schema.width == get_schema("synfundus").width
    assert LabelSchema.from_dict(schema.to_dict()) == schema
    with pytest.raises(ValueError, match="atrophy"):
        schema.with_display({"atrophy": "x"})


def test_rows_of_synfundus_tables():
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame(
        {
            "file_name": ["0.png", "1.png", "2.png"],
            "dr_grade": [3, None, 0],
            "eye_side": [0, 1, None],
            "is_gc": pandas.array([1, None, 0], dtype="Int64"),
            "is_fundus": [True, False, True],
        }
    )
    schema = get_schema("synfundus")
    rows = [schema.from_row(row) for _, row in frame.iterrows()]
    assert rows == [
        {"dr_grade": 3, "gc": 1, "fundus": 1, "eye_side": "right"},
        {"fundus": 0, "eye_side": "left"},
        {"dr_grade": 0, "gc": 0, "fundus": 1},
    ]
    assert [schema.decode(schema.encode(row)) for row in rows] == rows


def test_rows_of_datasets_by_named_columns():
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_dict({"diagnosis": [2, None], "eye": ["left", ""], "other": ["a", "b"]})
    schema = get_schema("synfundus")
    columns = {"dr_grade": "diagnosis", "eye_side": "eye"}
    assert [schema.from_row(row, columns) for row in rows] == [{"dr_grade": 2, "eye_side": "left"}, {}]
    with pytest.raises(ValueError, match="diagnoses.*Did you mean 'diagnosis'.*other"):
        schema.from_row(rows[0], {"dr_grade": "diagnoses"})


@pytest.mark.parametrize(
    ("finding", "extra", "expected"),
    [
        ("glaucoma", '{"laterality": "left"}', {"normal": 0, "gc": 1, "eye_side": "left"}),
        ("glaucoma", {"laterality": "left"}, {"normal": 0, "gc": 1, "eye_side": "left"}),
        ("cataract", '{"laterality": null}', {"normal": 0, "cataract": 1}),
        ("diabetic retinopathy", "{}", {"normal": 0, "dr": 1}),
        ("normal", '{"laterality": "right"}', {"normal": 1, "cataract": 0, "dr": 0, "gc": 0, "eye_side": "right"}),
    ],
)
def test_rows_of_the_corpus(finding, extra, expected):
    schema = get_schema("corpus_fundus")
    row = {"image": None, "modality": "fundus photography", "finding": finding, "extra": extra}
    assert schema.from_row(row) == expected
    assert schema.from_row({**row, "modality": "CT"}) is None


@pytest.mark.parametrize(
    ("given", "source", "target", "expected"),
    [
        ("N=1", "odir8", "synfundus", {"dr_grade": 0, **dict.fromkeys(DISEASES, 0)}),
        ("N=0", "odir8", "synfundus", {}),
        ("D=0", "odir8", "synfundus", {"dr_grade": 0, "dme": 0}),
        ("D=1", "odir8", "synfundus", {}),
        ("C=1", "odir8", "synfundus", {}),
        ("O=1", "odir8", "synfundus", {}),
        ("O=0", "odir8", "synfundus", {"aon": 0, "crp": 0, "em": 0, "rvo": 0}),
        ("G=1,A=0,H=1,M=0", "odir8", "synfundus", {"amd": 0, "gc": 1, "htr": 1, "pm": 0}),
        ("dr_grade=2", "synfundus", "odir8", {"N": 0, "D": 1}),
        ("dr_grade=0", "synfundus", "odir8", {"D": 0}),
        ("dr_grade=0,dme=1", "synfundus", "odir8", {"N": 0, "D": 1}),
        ("rvo=1,amd=0", "synfundus", "odir8", {"N": 0, "A": 0, "O": 1}),
        ("eye_side=left,macular_readable=1", "synfundus", "odir8", {}),
        (
            "gc=1,eye_side=left,dr_grade=3",
            "synfundus",
            "corpus_fundus",
            {"normal": 0, "dr": 1, "gc": 1, "eye_side": "left"},
        ),
        ("dr=1", "corpus_fundus", "synfundus", {}),
        ("C=1,D=0", "odir8", "corpus_fundus", {"normal": 0, "cataract": 1, "dr": 0}),
        ("normal=1", "corpus_fundus", "odir8", {"N": 1, "D": 0, "G": 0, "C": 0, "A": 0, "H": 0, "M": 0, "O": 0}),
        (None, "synfundus", "odir8", {}),
    ],
)
def test_conversion_says_what_follows_and_nothing_else(given, source, target, expected):
    assert convert(given, source, target) == expected


@pytest.mark.parametrize(("source", "target"), [("odir8", "synfundus"), ("synfundus", "odir8")])
def test_converting_there_and_back_never_changes_a_known_label(source, target):
    schema = get_schema(source)
    for field in schema.fields:
        for value in field.values:
            there = convert({field.name: value}, source, target)
            back = convert(there, target, source)
            assert back.get(field.name, schema.value(field.name, value)) == schema.value(field.name, value)


def test_contradictions_and_missing_conversions_are_refused():
    with pytest.raises(ValueError, match="contradict"):
        convert("N=1, G=1", "odir8", "synfundus")
    with pytest.raises(ValueError, match="'synfundus'.*corpus_fundus"):
        convert({}, "synfundus", "synfundus")
    with pytest.raises(ValueError, match="'odir'.*Did you mean 'odir8'"):
        convert({}, "odir", "synfundus")


def test_a_schema_of_ones_own(tmp_path):
    file = tmp_path / "knee.json"
    fields = {
        "kl": {"type": "ordinal", "values": [0, 1, 2, 3, 4]},
        "pain": {"type": "categorical", "values": ["none", "some"]},
    }
    file.write_text(json.dumps({"name": "knee", "fields": fields}))
    schema = get_schema(str(file))
    assert schema.decode(schema.encode("kl=4, pain=none")) == {"kl": 4, "pain": "none"}
    assert schema.from_row({"kl": 2, "image": "x"}) == {"kl": 2}
    with pytest.raises(FileNotFoundError):
        get_schema(str(tmp_path / "missing.json"))


@pytest.mark.parametrize(
    ("data", "named"),
    [
        ([], "JSON object"),
        ({"name": "x"}, "field"),
        ({"name": "x", "fields": {"a": {"type": "number"}}}, "'number'"),
        ({"name": "x", "fields": {"a": {"type": "ordinal"}}}, "two or more"),
        ({"name": "x", "fields": {"a": {"type": "ordinal", "values": ["0", "unknown"]}}}, "unknown"),
        ({"name": "x", "fields": {"a": {"type": "binary", "values": [1, 2]}}}, "no values"),
        ({"name": "x", "fields": {"a": {"type": "binary", "label": "A"}}}, "label"),
        ({"name": "x", "fields": {"a": {"type": "binary"}}, "row": {}}, "row"),
        ({"name": "x", "fields": {"a": {"type": "binary"}}, "rows": {"columns": {"b": "c"}}}, "'b'"),
        ({"name": "x", "fields": {"a": {"type": "binary"}}, "rows": {"rules": [{"labels": {"a": 1}}]}}, "when"),
    ],
)
def test_an_ill_formed_schema_is_refused(tmp_path, data, named):
    (tmp_path / "x.json").write_text(json.dumps(data))
    with pytest.raises(ValueError, match=named):
        get_schema(str(tmp_path / "x.json"))


def test_the_condition_and_the_pipeline_make_the_same_vectors(tiny_pipeline):
    pipe = tiny_pipeline(kinds=("labels",))
    condition = LabelsCondition.from_pipeline(pipe)
    examples = [{"labels": {"gc": 1}}, {"labels": "dr_grade=2"}, {"labels": None}, {}]
    vectors = condition.encode(pipe, examples)
    assert vectors.tolist() == [condition.schema.encode(example.get("labels")) for example in examples]
    assert vectors.shape == (4, condition.vector_width())
    assert torch.equal(condition.null(pipe, 2), vectors[2:])
    assert condition.cacheable and condition.token_width() is None


def test_the_whole_corpus_can_be_labelled(shared_folder):
    pandas = pytest.importorskip("pandas")
    from pathlib import Path

    schema = get_schema("corpus_fundus")
    for file in sorted(Path(shared_folder, "corpus").glob("*.parquet")):
        for row in pandas.read_parquet(file, columns=["modality", "finding", "extra"]).to_dict("records"):
            found = schema.from_row(row)
            assert (found is not None) == (row["modality"] == "fundus photography")
            assert found is None or found["normal"] == (row["finding"] == "normal")
