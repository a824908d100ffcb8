"""results.json and its tables."""

import json

from samclip_hf.evaluation import Results, create_model_index, read_results


def test_results_of_older_versions_are_read(tmp_path):
    entry = {"kind": "SamClip", "identity": "", "figures": {"top1": 0.7}, "num_samples": 5, "seconds": 1.0}
    task = {"protocol": {}, "models": {"mine": entry}}
    path = tmp_path / "results.json"
    path.write_text(json.dumps({"tasks": {"classification:imagenet": task}}))
    content = read_results(path)
    assert content["tasks"]["classification:imagenet"]["models"]["mine"]["metrics"] == {"top1": 0.7}
    assert "| 0.700 | 0.724 (table 1, 6, at 336 px) | -0.024 |" in Results(tmp_path, "command").markdown()
    assert create_model_index(content, "mine")[0].metric_value == 0.7
