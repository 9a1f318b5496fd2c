"""Sources, column mapping, identity of rows, groups, hashes: `medisyn.data.loading` and `medisyn.data.sources`."""

import io
import json
import pickle
import tarfile

import datasets
import numpy as np
import pytest
from PIL import Image

from medisyn.config import DataConfig
from medisyn.data.loading import load_images, pixel_hash

FINDINGS = ("normal", "glaucoma", "cataract")


def picture(index: int, size: int = 12) -> Image.Image:
    pixels = np.random.default_rng(index).integers(0, 256, (size, size, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def encoded(image: Image.Image, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


def rows(count: int = 9) -> list[dict]:
    return [
        {
            "image": {"bytes": encoded(picture(i)), "path": f"{i}.png"},
            "caption": f"eye number {i}",
            "finding": FINDINGS[i % 3],
            "modality": "fundus photography",
            "group_id": f"patient {i // 2}",
            "extra": json.dumps({"laterality": "left"} if i % 2 else {}),
        }
        for i in range(count)
    ]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets-cache")


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "data").mkdir()
    return tmp_path / "data"


def write_parquet(path, table_rows):
    features = datasets.Features({name: datasets.Value("string") for name in table_rows[0]})
    features["image"] = datasets.Image()
    datasets.Dataset.from_list(table_rows, features=features).to_parquet(path)


@pytest.fixture
def parquet(folder):
    write_parquet(folder / "train-0.parquet", rows()[:5])
    write_parquet(folder / "train-1.parquet", rows()[5:])
    return str(folder / "train-*.parquet")


def test_parquet_glob_with_column_mapping(parquet):
    images = load_images(
        parquet, label_columns={"eye_side": "extra.laterality", "finding": "finding"}, group_column="group_id"
    )
    assert len(images) == 9
    item = images[7]
    assert item["index"] == 7 and item["caption"] == "eye number 7"
    assert item["labels"] == {"eye_side": "left", "finding": "glaucoma"}
    assert images[0]["labels"]["eye_side"] is None
    assert item["image"].tobytes() == picture(7).tobytes()
    assert images.column("extra.laterality")[:2] == [None, "left"]


def test_labels_by_the_rules_of_a_schema(parquet):
    images = load_images(parquet, label_schema="corpus_fundus")
    assert images.labels[0]["normal"] == 1 and images.labels[1]["gc"] == 1
    assert images.labels[1]["eye_side"] == "left"


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"caption_column": "text"}, "text"),
        ({"group_column": "patient"}, "patient"),
        ({"label_columns": {"a": "diagnosis"}}, "diagnosis"),
        ({"label_columns": {"a": "extra.side"}}, "side"),
        ({"label_columns": {"a": "finding.side"}}, "finding"),
        ({"image_column": "picture"}, "picture"),
        ({"filter": {"finding": ("drusen",)}}, "drusen"),
        ({"filter": {"colour": ("red",)}}, "colour"),
        ({"image_column": "missing", "caption_column": None}, "missing"),
    ],
)
def test_wrong_columns_are_named_with_the_valid_ones_in_one_line(parquet, options, named):
    with pytest.raises(ValueError, match=named) as error:
        load_images(parquet, **options)
    message = str(error.value)
    assert "\n" not in message
    assert any(valid in message for valid in ("finding", "laterality", "glaucoma", "JSON"))


@pytest.mark.parametrize("source", ["nothing/*.png", "no_such.parquet", "/no/such/folder", "./here", "not a name"])
def test_missing_sources(source):
    with pytest.raises(FileNotFoundError) as error:
        load_images(source)
    assert "\n" not in str(error.value)


def test_unknown_hub_name_is_one_line():
    with pytest.raises(FileNotFoundError, match="no-such-user/no-such-data") as error:
        load_images("no-such-user/no-such-data")
    assert "\n" not in str(error.value)


def test_empty_folder_and_folder_without_images(folder):
    with pytest.raises(ValueError, match="empty"):
        load_images(folder)
    (folder / "notes.md").write_text("nothing to see")
    with pytest.raises(ValueError, match="notes.md"):
        load_images(folder)


def test_damaged_table_is_a_value_error(folder):
    (folder / "train.parquet").write_bytes(b"PAR1 this is no table")
    with pytest.raises(ValueError, match="train.parquet") as error:
        load_images(str(folder / "train.parquet"))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.tar", b"no tar"),
        ("a.csv", b""),
        ("a.jsonl", b"{"),
        ("metadata.jsonl", b'{"file": 1}'),
        ("a.arrow", b"ARROW"),
    ],
)
def test_other_damaged_sources(folder, name, content):
    (folder / name).write_bytes(content)
    with pytest.raises(ValueError, match="cannot be loaded") as error:
        load_images(folder)
    assert "\n" not in str(error.value)


def test_empty_source():
    for source in ("", "  ", ()):
        with pytest.raises(ValueError, match="name"):
            load_images(source)


def test_at_most_so_many_images_the_same_ones_every_time(parquet):
    everything = load_images(parquet)
    some, fewer = load_images(parquet, max_images=3), load_images(parquet, max_images=2)
    assert list(load_images(parquet, max_images=3).rows) == list(some.rows)
    assert len(some) == 3 and len(fewer) == 2 and set(fewer.rows) < set(some.rows) < set(everything.rows)
    assert some.captions == [everything.captions[row] for row in some.rows]
    assert len(load_images(parquet, max_images=10**6)) == len(everything)


def test_filter_keeps_rows_and_their_numbers(parquet):
    images = load_images(parquet, filter={"finding": ("glaucoma", "cataract")})
    assert set(images.column("finding")) == {"glaucoma", "cataract"}
    assert images.rows.tolist() == [1, 2, 4, 5, 7, 8]


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_imagefolder_with_metadata(folder, kind):
    for i in range(3):
        picture(i).save(folder / f"{i}.png")
    if kind == "jsonl":
        lines = [json.dumps({"file_name": f"{i}.png", "caption": f"caption {i}", "grade": i}) for i in range(3)]
    else:
        lines = ["file_name,caption,grade"] + [f"{i}.png,caption {i},{i}" for i in range(3)]
    (folder / f"metadata.{kind}").write_text("\n".join(lines))
    images = load_images(folder, label_columns={"dr_grade": "grade"})
    item = images[images.captions.index("caption 2")]
    assert item["labels"] == {"dr_grade": 2}
    assert item["image"].tobytes() == picture(2).tobytes()


def test_words_in_file_names_make_no_splits(folder):
    odd = folder / "data [1]"
    odd.mkdir()
    for name in ("test_0", "val_1", "train_2"):
        picture(0).save(odd / f"{name}.png")
    (odd / "metadata.csv").write_text("file_name,caption\ntest_0.png,a\nval_1.png,b\ntrain_2.png,c\n")
    assert load_images(odd).captions == ["a", "b", "c"]
    with pytest.raises(ValueError, match="no split 'validation'"):
        load_images(odd, split="validation")


def test_folder_with_sidecar_captions_and_class_folders(folder):
    for i, name in enumerate(("normal", "pneumonia", "pneumonia")):
        (folder / "train" / name).mkdir(parents=True, exist_ok=True)
        picture(i).save(folder / "train" / name / f"{i}.png")
    (folder / "train" / "pneumonia" / "1.txt").write_text("a chest X-ray\n")
    images = load_images(folder, label_columns={"finding": "label"})
    assert images.captions == [None, "a chest X-ray", None]
    assert images.column("label") == ["normal", "pneumonia", "pneumonia"]
    with pytest.raises(ValueError, match="it has: train"):
        load_images(folder, split="validation")
    (folder / "train").rename(folder / "testing")
    with pytest.raises(ValueError, match="it has: testing"):  # never trained on by mistake
        load_images(folder)


def test_folder_without_captions_says_what_to_set(folder):
    picture(0).save(folder / "0.png")
    with pytest.raises(ValueError, match="caption_column to null"):
        load_images(folder)
    assert load_images(folder, caption_column=None)[0]["caption"] is None


def test_folder_of_parquet_splits(folder):
    write_parquet(folder / "train-0.parquet", rows()[:5])
    write_parquet(folder / "validation-0.parquet", rows()[5:])
    assert len(load_images(folder)) == 5
    assert len(load_images(folder, split="validation")) == 4
    with pytest.raises(ValueError, match="validation-0.parquet"):
        load_images(folder, split="test")
    (folder / "train-0.parquet").unlink()
    with pytest.raises(ValueError, match="it has: validation-0.parquet"):
        load_images(folder)


def test_csv_with_relative_paths(folder):
    (folder / "pictures").mkdir()
    picture(0).save(folder / "pictures" / "a.png")
    (folder / "table.csv").write_text("path,text\npictures/a.png,an eye\n")
    images = load_images(str(folder / "table.csv"), image_column="path", caption_column="text")
    assert images[0]["caption"] == "an eye" and images[0]["image"].size == (12, 12)


def test_webdataset(folder):
    with tarfile.open(folder / "shard-0.tar", "w") as tar:
        for i in range(3):
            members = (("png", encoded(picture(i))), ("txt", f"eye {i}".encode()), ("json", b'{"grade": %d}' % i))
            for suffix, content in members:
                entry = tarfile.TarInfo(f"{i:03}.{suffix}")
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))
    images = load_images(folder, label_columns={"grade": "json.grade"})
    assert images.captions == ["eye 0", "eye 1", "eye 2"]
    assert [row["grade"] for row in images.labels] == [0, 1, 2]
    assert images[1]["image"].tobytes() == picture(1).tobytes()


def test_folder_of_save_to_disk(folder):
    datasets.Dataset.from_list(rows()).cast_column("image", datasets.Image()).save_to_disk(folder / "saved")
    assert load_images(folder / "saved")[3]["caption"] == "eye number 3"


def test_several_sources_with_different_columns(parquet, tmp_path):
    (tmp_path / "more").mkdir()
    picture(100).save(tmp_path / "more" / "x.png")
    (tmp_path / "more" / "x.txt").write_text("one more")
    images = load_images((parquet, str(tmp_path / "more")))
    assert len(images) == 10 and images.captions[9] == "one more"
    assert images.column("finding")[9] is None
    assert images[9]["image"].tobytes() == picture(100).tobytes()


def damaged(folder) -> str:
    table = rows()
    table[2]["image"]["bytes"] = table[2]["image"]["bytes"][:150]
    table[5]["image"] = {"bytes": b"no image at all", "path": "5.png"}
    write_parquet(folder / "damaged.parquet", table)
    return str(folder / "damaged.parquet")


def test_damaged_image_is_fatal_with_row_and_path(folder):
    images = load_images(damaged(folder))
    for row in (2, 5):
        with pytest.raises(ValueError, match=rf"row {row} .*\({row}\.png\)") as error:
            images[row]
        assert "\n" not in str(error.value)
    assert images[3]["image"] is not None


def test_damaged_image_is_skipped_counted_and_shifts_nothing(folder):
    images = load_images(damaged(folder), on_error="skip")
    assert [i for i in range(9) if images[i]["image"] is None] == [2, 5]
    assert set(images.skipped) == {2, 5} and "2.png" in images.skipped[2]
    assert images[6]["index"] == 6 and images[6]["image"].tobytes() == picture(6).tobytes()
    readable = images.drop_unreadable()
    assert readable.rows.tolist() == [0, 1, 3, 4, 6, 7, 8]
    assert readable[2]["caption"] == "eye number 3" and readable[2]["image"].tobytes() == picture(3).tobytes()


def test_missing_image_file(folder):
    picture(0).save(folder / "0.png")
    (folder / "metadata.csv").write_text("file_name,caption\n0.png,here\nlost.png,gone\n")
    images = load_images(folder)
    assert images[0]["image"] is not None
    with pytest.raises(FileNotFoundError, match="lost.png"):
        images[1]


def test_split_by_group_is_disjoint_deterministic_and_stable(folder):
    table = rows(60)
    write_parquet(folder / "train.parquet", table)
    images = load_images(str(folder / "train.parquet"), group_column="group_id")
    rest, held_out = images.split_by_group(0.3, seed=1)
    assert len(rest) + len(held_out) == 60 and 0 < len(held_out) < 40
    groups = set(held_out.column("group_id"))
    assert not set(rest.column("group_id")) & groups
    assert set(images.split_by_group(0.3, seed=1)[1].rows) == set(held_out.rows)
    assert set(images.split_by_group(0.3, seed=2)[1].rows) != set(held_out.rows)
    half = images.select(range(0, 60, 2)).split_by_group(0.3, seed=1)[1]
    assert set(half.column("group_id")) == groups  # a side does not depend on the other rows
    with pytest.raises(ValueError, match="group_column"):
        load_images(str(folder / "train.parquet")).split_by_group(0.3)
    with pytest.raises(ValueError, match="fraction"):
        images.split_by_group(1.0)


def test_content_hash_is_of_pixels_not_of_files(folder):
    grey = picture(0).convert("L")
    grey.convert("RGB").save(folder / "a.png")
    grey.save(folder / "b.webp", lossless=True)
    grey.save(folder / "c.tif")
    picture(1).save(folder / "d.png")
    images = load_images(folder, caption_column=None)
    first, second, third, other = images.hashes()
    assert first == second == third == pixel_hash(grey.convert("RGB")) and len(first) == 16
    assert other != first and other == images.content_hash(3)


def test_flips_only_where_no_side_is_stated(folder):
    table = rows(4)
    table[0]["caption"] = "fundus photograph of the Left eye"
    table[2]["caption"] = "a bright leftover"
    write_parquet(folder / "train.parquet", table)
    assert load_images(str(folder / "train.parquet")).may_flip().tolist() == [False, False, True, False]


@pytest.mark.parametrize("column", ["laterality", "eye_side", "side", "extra.laterality", "view_side"])
def test_flips_only_where_no_side_is_coded(folder, column):
    sides = ["L", "OD", "os", "1", "r", None, "", "unknown", "nan"]
    parent, dot, key = column.partition(".")
    table = [
        row | {"extra": None, "caption": "fundus photograph", parent: json.dumps({key: side}) if dot else side}
        for row, side in zip(rows(len(sides)), sides, strict=True)
    ]
    if column == "view_side":  # not known for a column of sides: only as a label, and only values that name one
        sides[3] = None
        table[3][column] = "1"
    write_parquet(folder / "train.parquet", table)
    labels = {"view": column} if column == "view_side" else {}
    flips = load_images(str(folder / "train.parquet"), label_columns=labels).may_flip().tolist()
    assert flips == [side in (None, "", "unknown", "nan") for side in sides]


@pytest.mark.parametrize(
    ("caption", "flips"),
    [("OD fundus photograph", False), ("L breast, MLO view", False), ("an odd lesion, 5 mm, LR1", True)],
)
def test_captions_state_a_side_by_its_code(folder, caption, flips):
    write_parquet(folder / "train.parquet", [row | {"caption": caption, "extra": None} for row in rows(1)])
    assert load_images(str(folder / "train.parquet")).may_flip().tolist() == [flips]


def test_numbers_in_a_laterality_column_are_sides(folder):
    coded = zip(rows(3), [0, 1, None], strict=True)
    table = [row | {"laterality": side, "caption": "x-ray", "extra": None} for row, side in coded]
    write_parquet(folder / "train.parquet", table)
    assert load_images(str(folder / "train.parquet")).may_flip().tolist() == [False, False, True]


def test_sampling_weights_and_provenance(folder):
    table = [row | {"source": "a" if i else "b", "licence": "CC0"} for i, row in enumerate(rows(5))]
    write_parquet(folder / "train.parquet", table)
    images = load_images(
        str(folder / "train.parquet"),
        balance_columns=("source",),
        balance_power=1.0,
        dataset_column="source",
        license_column="licence",
    )
    assert images.sampling_weights() == pytest.approx([0.5, 0.125, 0.125, 0.125, 0.125])
    assert images.provenance() == [
        {"name": "a", "license": "CC0", "images": 4},
        {"name": "b", "license": "CC0", "images": 1},
    ]


def test_survives_pickling_and_threads(parquet):
    images = load_images(DataConfig(source=parquet))
    copy = pickle.loads(pickle.dumps(images))
    assert copy[8]["image"].tobytes() == images[8]["image"].tobytes()
    assert copy.hashes() == images.hashes()


def test_corpus(shared_folder):
    images = load_images(
        f"{shared_folder}/corpus/validation-*.parquet", label_columns={"eye_side": "extra.laterality"}
    )
    assert len(images) == 1502 and images[0]["image"].size == (128, 128)
