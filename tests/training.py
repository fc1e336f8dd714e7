"""A small training run, as a job: torch where the interpreter has it, else plain Python.

    python3 training.py STEPS WATCH [SECONDS]

WATCH is a folder outside the node: each attempt tells there, line by line, when it took which step and when it
saved, so that a test knows what the node had done when it was taken. The weights end in out/weights, exact.
"""

import json
import os
import random
import sys
import time

from gpubroker import checkpoint

try:
    import torch

    torch.nn  # noqa: B018  a node of the test cloud has a torch that is none, where there is no real one
except (ImportError, AttributeError):
    sys.modules.pop("torch", None)
    torch = None


class Plain:
    """A logistic regression by stochastic gradient descent with noise, in floats."""

    def __init__(self):
        random.seed(1)
        self.weights = [random.gauss(0, 1) for _ in range(8)]

    def step(self):
        row = [random.gauss(0, 1) for _ in self.weights]
        told = sum(w * x for w, x in zip(self.weights, row))
        error = 1 / (1 + 2.718281828 ** -max(-30.0, min(30.0, told))) - (row[0] > 0)
        kept = [w - 0.1 * error * x * (random.random() > 0.1) for w, x in zip(self.weights, row)]
        self.weights = kept

    def state(self):
        return {"weights": list(self.weights)}

    def load(self, state):
        self.weights = list(state["weights"])

    def exact(self):
        return json.dumps([w.hex() for w in self.weights])


class Torch:
    """A network with dropout under AdamW, on the GPU where there is one."""

    def __init__(self):
        torch.manual_seed(1)
        torch.set_num_threads(1)
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        layers = torch.nn.Linear(8, 32), torch.nn.ReLU(), torch.nn.Dropout(0.1), torch.nn.Linear(32, 2)
        self.model = torch.nn.Sequential(*layers).to(self.device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3)

    def step(self):
        rows = torch.randn(16, 8).to(self.device)
        loss = torch.nn.functional.cross_entropy(self.model(rows), (rows[:, 0] > 0).long())
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()

    def state(self):
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load(self, state):
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])

    def exact(self):
        return json.dumps([[x.hex() for x in w.flatten().tolist()] for w in self.model.state_dict().values()])


def main():
    """Train, save when it is time, tell of each step."""
    steps, watch, pause_s = int(sys.argv[1]), sys.argv[2], float(sys.argv[3])
    attempt = os.environ.get("GPUBROKER_ATTEMPT", "0")
    training = Plain() if torch is None else Torch()
    state = checkpoint.load_latest()
    if state is not None:
        training.load(state["training"])
    first = 0 if state is None else state["step"] + 1
    with open(f"{watch}/{attempt}", "a", buffering=1) as told:
        told.write(f"{time.time()} from {first} {os.environ.get('HOME')}\n")
        for step in range(first, steps):
            training.step()
            time.sleep(pause_s)
            if checkpoint.should_save():
                checkpoint.save({"training": training.state(), "step": step}, step)
                told.write(f"{time.time()} save {step}\n")
            told.write(f"{time.time()} step {step}\n")
    checkpoint.wait()
    os.makedirs("out", exist_ok=True)
    with open("out/weights", "w") as file:
        file.write(training.exact())


if __name__ == "__main__":
    main()
