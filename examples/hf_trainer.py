"""Hugging Face Trainer that goes on after it was interrupted, to the same weights bit for bit.

    gpubroker run --gpu 4090 --hours 1 --max-usd 2 --folder examples --store s3://bucket/trainer
        --setup "pip install transformers accelerate" --artifact out -- python hf_trainer.py --steps 2000

Take `SaveInTime` as it is into a training of your own: the Trainer saves when gpubroker says that it is time
(the interval, or a notice that the node will go), and what it has saved appears under its own name,
checkpoint-500, only when it is whole. The Trainer itself saves the optimizer, the schedule, the random states
and where in the data it was. Of several processes that train together one must answer `should_save` for all.
"""

import argparse
import os
import shutil
import time
from pathlib import Path

import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from gpubroker import checkpoint

FOLDER = Path(os.environ.get("GPUBROKER_CHECKPOINT_DIR", "checkpoints"))
# Where the Trainer writes: a name that begins with "." is not looked at by the agent.
WRITING = FOLDER / ".writing"
KEPT = 2


class SaveInTime(TrainerCallback):
    """Asks for a save when it is time, and shows to the agent what is whole."""

    def __init__(self):
        checkpoint.should_save()  # from here on the agent's signal is heard
        self.began_s = 0.0
        shutil.rmtree(WRITING, ignore_errors=True)  # of a save that was cut off

    def on_step_end(self, args, state, control, **_):
        """After each step of the optimizer."""
        if checkpoint.should_save():
            self.began_s = time.monotonic()
            control.should_save = True

    def on_save(self, args, state, control, **_):
        """The Trainer has written all of it."""
        made = WRITING / f"checkpoint-{state.global_step}"
        (made / ".complete").touch()  # so that the agent need not wait for it to rest
        shutil.rmtree(FOLDER / made.name, ignore_errors=True)
        made.rename(FOLDER / made.name)
        checkpoint.saved(time.monotonic() - self.began_s)
        older = sorted(FOLDER.glob("checkpoint-*"), key=lambda path: int(path.name.partition("-")[2]))
        for path in older[:-KEPT]:
            shutil.rmtree(path, ignore_errors=True)


class Sentences(torch.utils.data.Dataset):
    """500 sequences of 16 tokens, the same each time."""

    def __init__(self):
        self.tokens = torch.randint(0, 64, (500, 16), generator=torch.Generator().manual_seed(0))

    def __len__(self):
        return len(self.tokens)

    def __getitem__(self, at):
        return {"input_ids": self.tokens[at], "labels": self.tokens[at]}


def main():
    """Train, save when it is time, write out/model.pt."""
    asked = argparse.ArgumentParser(description=__doc__)
    asked.add_argument("--steps", type=int, default=2000)
    steps = asked.parse_args().steps
    FOLDER.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(1)
    size = {"n_layer": 2, "n_embd": 32, "n_head": 2, "vocab_size": 64, "n_positions": 16}
    model = GPT2LMHeadModel(GPT2Config(**size, bos_token_id=0, eos_token_id=0))
    arguments = TrainingArguments(
        output_dir=str(WRITING),
        max_steps=steps,
        per_device_train_batch_size=8,
        save_strategy="no",  # at no other times
        logging_steps=100,
        report_to=[],
        seed=1,
        use_cpu=not torch.cuda.is_available(),
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=Sentences(), callbacks=[SaveInTime()])
    start = os.environ.get("GPUBROKER_RESUME_FROM") or get_last_checkpoint(str(FOLDER))
    if start:
        print(f"going on from {start}", flush=True)
    trainer.train(resume_from_checkpoint=start or None)
    os.makedirs("out", exist_ok=True)
    torch.save(trainer.model.state_dict(), "out/model.pt")


if __name__ == "__main__":
    main()
