"""The record of what a model was trained on: read, written and merged in one place."""

import json

import pytest

from medisyn.training_record import (
    TRAINING_RECORD,
    merge_training_records,
    read_training_record,
    write_training_record,
)

FIRST = {"hashes": ["b" * 16, "a" * 16], "datasets": [{"name": "busi", "license": "CC0", "images": 2}]}


def test_what_is_written_is_read(tmp_path):
    assert read_training_record(tmp_path) is None
    write_training_record(tmp_path / "new", FIRST | {"license": "cc-by-nc-4.0"})
    assert read_training_record(tmp_path / "new") == FIRST | {"license": "cc-by-nc-4.0"}
    assert [file.name for file in (tmp_path / "new").iterdir()] == [TRAINING_RECORD] == ["training_images.json"]
    # Only the hashes are needed, and what others added is kept.
    (tmp_path / TRAINING_RECORD).write_text('{"hashes": [], "config": ""}')
    assert read_training_record(str(tmp_path)) == {"hashes": [], "datasets": [], "config": ""}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b"[" * 100_000,
        b"[]",
        b"null",
        b'{"nothing": 1}',
        b'{"hashes": "abc"}',
        b'{"hashes": [1]}',
        b'{"hashes": [], "datasets": {"name": "busi"}}',
        b'{"hashes": [], "datasets": ["busi"]}',
        b'{"hashes": [], "datasets": [{"name": 1}]}',
        b'{"hashes": [], "datasets": [{"name": "busi", "images": "many"}]}',
        b'{"hashes": [], "license": 4}',
    ],
)
def test_a_damaged_record_is_named_in_one_line(tmp_path, content):
    (tmp_path / TRAINING_RECORD).write_bytes(content)
    with pytest.raises(ValueError, match="training_images.json is not a record of training images") as caught:
        read_training_record(tmp_path)
    assert "\n" not in str(caught.value) and type(caught.value) is ValueError


def test_a_bad_record_is_not_written_and_leaves_the_old_one(tmp_path):
    write_training_record(tmp_path, FIRST)
    with pytest.raises(ValueError, match="not a record of training images"):
        write_training_record(tmp_path, {"datasets": []})
    with pytest.raises(TypeError):
        write_training_record(tmp_path, FIRST | {"config": object()})
    assert json.loads((tmp_path / TRAINING_RECORD).read_text()) == FIRST
    assert len(list(tmp_path.iterdir())) == 1


def test_merging_keeps_each_hash_and_data_set_once():
    busi = {"name": "busi", "license": "CC0", "images": 5}
    other = {"name": "busi", "license": "MIT", "images": 1}
    merged = merge_training_records(FIRST, {"hashes": ["a" * 16, "c" * 16], "datasets": [other, busi]})
    assert merged == {"hashes": ["a" * 16, "b" * 16, "c" * 16], "datasets": [busi, other]}
    assert merge_training_records() == {"hashes": [], "datasets": []}
    assert FIRST["datasets"][0]["images"] == 2


def test_a_merged_record_has_a_licence_only_if_all_agree():
    nc, mit = FIRST | {"license": "cc-by-nc-4.0"}, FIRST | {"license": "mit"}
    assert merge_training_records(nc, nc)["license"] == "cc-by-nc-4.0"
    assert "license" not in merge_training_records(nc, mit)
    assert "license" not in merge_training_records(nc, FIRST)
