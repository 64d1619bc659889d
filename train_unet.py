"""Train a diffusion UNet: accelerate launch train_unet.py --config configs/train/digits.yaml [--section.field value]

    load the configuration    finetune/config.py, config_io.py     every mistake at once, before torch is imported
    open and check the data   finetune/data.py, batching.py
    build the models          finetune/space.py, conditioning.py, models.py
    train                     finetune/trainer.py, objective/      resumes by itself: run the same command again
    sample and export         finetune/sample.py, export.py
    push to the Hub           finetune/hub.py                      if hub.push is set

finetune/run.py puts these together; `--help` lists every setting.
"""

import sys

from finetune.cli import guarded, train

if __name__ == "__main__":
    sys.exit(guarded(train, sys.argv[1:], last=True))
