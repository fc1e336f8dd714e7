"""A Lightning Trainer that goes on after it was interrupted, to the same weights bit for bit.

    gpubroker run --gpu 4090 --hours 1 --max-usd 2 --folder examples --setup "pip install lightning"
        --store s3://bucket/loop --artifact out -- python lightning_loop.py --steps 20000

Take `SaveInTime` as it is into a training of your own: it saves one file, step-500.ckpt, when gpubroker says
that it is time (the interval, or a notice that the node will go). Lightning keeps weights, optimizer and
schedule, but neither random states nor where in the data it was: the callback keeps the first, and `Batches`
shows how the data go on from any step.
"""

import argparse
import os
import time
from pathlib import Path

import lightning
import torch

from gpubroker import checkpoint

FOLDER = Path(os.environ.get("GPUBROKER_CHECKPOINT_DIR", "checkpoints"))
BATCH, KEPT = 32, 2


class SaveInTime(lightning.Callback):
    """Saves when it is time, whole or not at all, and puts the random states back."""

    def __init__(self):
        checkpoint.should_save()  # from here on the agent's signal is heard
        self.random = None

    def on_save_checkpoint(self, trainer, module, saved):
        """With everything that the next step draws."""
        saved["random"] = checkpoint.random_states()

    def on_load_checkpoint(self, trainer, module, saved):
        """Kept until training begins: Lightning draws random numbers in between."""
        self.random = saved["random"]

    def on_train_batch_start(self, trainer, module, batch, index):
        """The first after a start from a checkpoint."""
        if self.random is not None:
            checkpoint.set_random_states(self.random)
            self.random = None

    def on_train_batch_end(self, trainer, module, outputs, batch, index):
        """After each step of the optimizer."""
        if not checkpoint.should_save():
            return
        began_s = time.monotonic()
        made = FOLDER / f"step-{trainer.global_step}.ckpt"
        writing = FOLDER / f".{made.name}"
        trainer.save_checkpoint(writing)
        Path(f"{made}.complete").touch()  # so that the agent need not wait for it to rest
        writing.rename(made)
        checkpoint.saved(time.monotonic() - began_s)
        for path in saves()[:-KEPT]:
            Path(f"{path}.complete").unlink(missing_ok=True)
            path.unlink()


def saves():
    """The oldest first."""
    return sorted(FOLDER.glob("step-*.ckpt"), key=lambda path: int(path.stem.partition("-")[2]))


class Batches(torch.utils.data.IterableDataset):
    """Rows of each step from `first` on, by the number of the step alone: in another order in every epoch."""

    def __init__(self, count, first, steps):
        self.count, self.first, self.steps = count, first, steps

    def __len__(self):
        return self.steps

    def __iter__(self):
        each = self.count // BATCH
        for step in range(self.first, self.steps):
            epoch, at = divmod(step, each)
            order = torch.randperm(self.count, generator=torch.Generator().manual_seed(epoch))
            yield order[at * BATCH : (at + 1) * BATCH]


class Spirals(lightning.LightningModule):
    """Two spirals of points, told apart."""

    def __init__(self, steps):
        super().__init__()
        self.steps = steps
        made = torch.Generator().manual_seed(0)
        self.which = torch.randint(0, 2, (2000,), generator=made)
        turn = torch.rand(2000, generator=made) * 6
        angle = turn + self.which * torch.pi
        self.points = torch.stack([turn * angle.cos(), turn * angle.sin()], dim=1) / 6
        self.model = torch.nn.Sequential(
            torch.nn.Linear(2, 64), torch.nn.ReLU(), torch.nn.Dropout(0.1), torch.nn.Linear(64, 2)
        )

    def training_step(self, rows, index):
        """The loss of a batch."""
        points, which = self.points[rows.cpu()].to(self.device), self.which[rows.cpu()].to(self.device)
        return torch.nn.functional.cross_entropy(self.model(points), which)

    def configure_optimizers(self):
        """With a schedule over all steps."""
        optimizer = torch.optim.AdamW(self.parameters(), lr=3e-3)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def train_dataloader(self):
        """From the step that was restored."""
        batches = Batches(len(self.points), self.trainer.global_step, self.steps)
        return torch.utils.data.DataLoader(batches, batch_size=None)


def main():
    """Train, save when it is time, write out/model.pt."""
    asked = argparse.ArgumentParser(description=__doc__)
    asked.add_argument("--steps", type=int, default=20_000)
    steps = asked.parse_args().steps
    FOLDER.mkdir(parents=True, exist_ok=True)
    lightning.seed_everything(1)
    module = Spirals(steps)
    trainer = lightning.Trainer(
        max_steps=steps,
        callbacks=[SaveInTime()],
        enable_checkpointing=False,  # by its own rules
        logger=False,
        enable_progress_bar=False,
        devices=1,
    )
    start = os.environ.get("GPUBROKER_RESUME_FROM") or next(reversed(saves()), None)
    if start:
        print(f"going on from {start}", flush=True)
    trainer.fit(module, ckpt_path=start, weights_only=False)
    os.makedirs("out", exist_ok=True)
    torch.save(module.model.state_dict(), "out/model.pt")


if __name__ == "__main__":
    main()
