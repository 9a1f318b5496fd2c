"""The prompts of the experiment on the utility of prompted images."""

import json
from pathlib import Path

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
