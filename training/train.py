"""
Trains one stage: `accelerate launch training/train.py RECIPE [--argument value ...]`.

The command itself is `samclip train`, in `src/samclip_cli/train.py`.
"""

from samclip_cli.train import main

if __name__ == "__main__":
    main()
