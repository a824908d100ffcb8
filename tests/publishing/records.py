"""Provenance and evaluation results of an imaginary model."""

from pathlib import Path

RECIPES = Path(__file__).parents[2] / "src" / "samclip_hf" / "recipes"
STAGES = [
    {
        "stage": 2,
        "teachers": {"sam_teacher": "facebook/sam-vit-base", "clip_teacher": "openai/clip-vit-base-patch16"},
        "commits": {"sam_teacher": "abc"},
        "arguments": {
            **{"clip_data": ["photos/*.tar"], "clip_resolutions": [224, 448], "sam_data": ["sa1b"], "seed": 3},
            **{"sam_loss_weight": 10.0, "learning_rate": 4e-5},
        },
        **{"steps": 1000, "images_seen": 2048000, "seconds": 7200.0, "processes": 8, "device": "A100"},
    }
]
RESULTS = {
    "command": "training/evaluate.py --model runs/stage3",
    "environment": {"torch": "2.14.1"},
    "tasks": {
        "classification:imagenet@336": {
            "protocol": {"size": 336, "templates": 80},
            "models": {"stage3": {"weights": "0a1b2c3d", "metrics": {"top1": 0.7239}, "num_samples": 50000}},
        },
        "semantic:voc21": {
            "protocol": {"size": 448},
            "models": {
                "stage3": {
                    **{"weights": "0a1b2c3d", "settings": {"composition": "classes"}, "dtype": "bfloat16"},
                    **{"metrics": {"mean_iou": 0.6, "iou: cat": 0.9}, "num_samples": 1449},
                    **{"command": "training/evaluate.py --dtype bfloat16", "environment": {"torch": "2.12.0"}},
                }
            },
        },
    },
}
