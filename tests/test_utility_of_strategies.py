"""The prompts of the experiment on the utility of prompted images."""

import json
from pathlib import Path

from datasets import Dataset, Image

from medisyn.generation.requests import read_prompts
from tests.evaluation import write_images


def test_prompts_come_in_the_proportions_of_the_classes(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "scripts"))
    from utility_of_strategies import write_prompts

    folder = tmp_path / "images"
    write_images(folder, 6, 0, (("CT", "normal"), ("CT", "nodule")))
    lines = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    lines = [line | {"dataset": "other" if index < 3 else "ours"} for index, line in enumerate(lines)]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    write_prompts(str(folder), "ours", 18, tmp_path / "out" / "prompts.jsonl")
    requests = read_prompts(tmp_path / "out" / "prompts.jsonl")
    assert len(requests) == 18
    assert all(request.prompt == f"CT {request.columns['finding']}" for request in requests)
    for part in (requests[:9], requests[9:]):  # every row once before any comes twice
        assert [request.columns["finding"] for request in part].count("normal") == 3
    assert {request.columns["dataset"] for request in requests} == {"ours"}
    write_prompts(str(folder), "ours", 5, tmp_path / "few.jsonl")
    assert read_prompts(tmp_path / "few.jsonl") == requests[:5]


def test_a_larger_pool_goes_on_from_a_smaller_one(monkeypatch, tmp_path):
    """`--images` of a second run counts, its prompts begin with those of the first; a pool that is larger stays."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "scripts"))
    import utility_of_strategies

    folder = Path(write_images(tmp_path / "images", 3, 0))
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    rows = [{"image": str(folder / row.pop("file_name")), "dataset": "ours"} | row for row in rows]
    Dataset.from_list(rows).cast_column("image", Image()).to_parquet(tmp_path / "train-0.parquet")
    commands = []
    monkeypatch.setattr(utility_of_strategies, "run_command", commands.append)
    prompts = tmp_path / "out" / "ours" / "prompts.jsonl"
    found = []
    for images in ("4", "7", "5"):
        given = ["--corpus", str(tmp_path), "--datasets", "ours", "--out", str(tmp_path / "out"), "--pool-only"]
        monkeypatch.setattr("sys.argv", ["utility_of_strategies.py", *given, "--images", images])
        utility_of_strategies.main()
        found.append(read_prompts(prompts))
    assert [len(each) for each in found] == [4, 7, 7] and found[1][:4] == found[0] and found[2] == found[1]
    assert len(commands) == 3 and commands[0][0] == "generate"
