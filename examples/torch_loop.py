"""A plain torch training loop that goes on after it was interrupted, to the same weights bit for bit.

    gpubroker run --gpu 4090 --hours 1 --max-usd 2 --folder examples --setup "pip install torch numpy"
        --store s3://bucket/loop --artifact out -- python torch_loop.py --steps 20000

What matters: all that the next step depends on is in the state (weights, optimizer, schedule, the position in
the data), and `should_save` decides when. Random states are saved along and set again by `load_latest`.
"""

import argparse
import os

import torch

from gpubroker import checkpoint

BATCH = 32


def data() -> tuple[torch.Tensor, torch.Tensor]:
    """Two spirals: (2000, 2) points and the spiral of each; the same each time, by a seed of their own."""
    made = torch.Generator().manual_seed(0)
    which = torch.randint(0, 2, (2000,), generator=made)
    turn = torch.rand(2000, generator=made) * 6
    angle = turn + which * torch.pi
    points = torch.stack([turn * angle.cos(), turn * angle.sin()], dim=1) / 6
    return points + 0.02 * torch.randn(2000, 2, generator=made), which


def main() -> None:
    """Train, save when it is time, write out/model.pt."""
    asked = argparse.ArgumentParser(description=__doc__)
    asked.add_argument("--steps", type=int, default=20_000)
    steps = asked.parse_args().steps
    device = "cuda" if torch.cuda.is_available() else "cpu"
    points, which = (part.to(device) for part in data())

    torch.manual_seed(1)
    model = torch.nn.Sequential(
        torch.nn.Linear(2, 64), torch.nn.ReLU(), torch.nn.Dropout(0.1), torch.nn.Linear(64, 2)
    ).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    order, first = torch.randperm(len(points)), 0

    state = checkpoint.load_latest()
    if state is not None:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        order, first = state["order"], state["step"] + 1
        print(f"going on at step {first}", flush=True)

    for step in range(first, steps):
        at = step * BATCH % len(points)
        if at < BATCH:  # once through the data: another order
            order = torch.randperm(len(points))
        rows = order[at : at + BATCH].to(device)
        loss = torch.nn.functional.cross_entropy(model(points[rows]), which[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if checkpoint.should_save():
            checkpoint.save(
                {
                    "model": model.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "schedule": schedule.state_dict(),
                    "order": order,
                    "step": step,
                },
                step,
            )
        if step % 500 == 0:
            print(f"step {step} loss {loss.item():.4f}", flush=True)
    checkpoint.wait()
    os.makedirs("out", exist_ok=True)
    torch.save(model.state_dict(), "out/model.pt")


if __name__ == "__main__":
    main()
