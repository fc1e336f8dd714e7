"""The job of `gpubroker demo`: it runs on a node, and in the demo itself without interruption, to compare.

A small network learns to tell two spirals apart, in plain Python, so that nothing has to be installed there.
Everything that the next step depends on is in the state, and the random states are saved along with it.

    python3 demo_training.py STEPS PAUSE_S
"""

from __future__ import annotations

import json
import math
import os
import random
import sys
import time
from typing import Any

from gpubroker import checkpoint

_HIDDEN, _BATCH, _RATE = 12, 8, 0.02
_EVERY = 20


class Training:
    """Two inputs, one hidden layer, one output; stochastic gradient descent."""

    def __init__(self) -> None:
        random.seed(1)
        self.step = 0
        self.loss = 1.0
        self.hidden = [[random.gauss(0, 1) for _ in range(3)] for _ in range(_HIDDEN)]
        self.output = [random.gauss(0, 1) for _ in range(_HIDDEN + 1)]

    def advance(self) -> None:
        """One step on a few random points."""
        total = sum(self._learn(*_point()) for _ in range(_BATCH))
        self.loss += 0.02 * (total / _BATCH - self.loss)
        self.step += 1

    def _learn(self, x: float, y: float, wanted: int) -> float:
        made = [math.tanh(a * x + b * y + c) for a, b, c in self.hidden]
        told = 1 / (1 + math.exp(-sum(w * h for w, h in zip(self.output, [*made, 1.0]))))
        error = told - wanted
        for n, h in enumerate(made):
            back = _RATE * error * self.output[n] * (1 - h * h)
            self.hidden[n] = [w - back * v for w, v in zip(self.hidden[n], (x, y, 1.0))]
        self.output = [w - _RATE * error * h for w, h in zip(self.output, [*made, 1.0])]
        return -math.log(max(1e-12, told if wanted else 1 - told))

    @property
    def state(self) -> dict[str, Any]:
        """All of it."""
        return {name: getattr(self, name) for name in ("step", "loss", "hidden", "output")}

    @property
    def weights(self) -> str:
        """To the last bit."""
        return json.dumps([[w.hex() for w in row] for row in (*self.hidden, self.output)])


def _point() -> tuple[float, float, int]:
    which, turn = random.randrange(2), random.random() * 6
    angle = turn + which * math.pi
    return turn * math.cos(angle) / 2, turn * math.sin(angle) / 2, which


def whole(steps: int) -> str:
    """The weights after so many steps, without an interruption."""
    training = Training()
    for _ in range(steps):
        training.advance()
    return training.weights


def main() -> None:
    """On the node."""
    steps, pause_s = int(sys.argv[1]), float(sys.argv[2])
    training = Training()
    for name, value in (checkpoint.load_latest() or {}).items():
        setattr(training, name, value)
    print(f"begins at {training.step}", flush=True)
    while training.step < steps:
        training.advance()
        time.sleep(pause_s)
        if checkpoint.should_save():
            checkpoint.save(training.state, training.step)
        if training.step % _EVERY == 0:
            print(f"step {training.step} loss {training.loss:.4f}", flush=True)
    checkpoint.wait()
    os.makedirs("out", exist_ok=True)
    with open("out/weights", "w", encoding="utf-8") as file:
        file.write(training.weights)


if __name__ == "__main__":
    main()
