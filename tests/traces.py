"""Small made-up traces and policies for the tests of gpubroker/policy."""

from gpubroker.policy.traces import Trace, timeline


def trace(pattern, *, price=1.0, prices=None, on_demand=3.0, step_s=3600, zone="z", group="g"):
    """'1101' -> available, available, not, available; prices one a step, or the same for all."""
    return Trace(
        name=f"{group}-{zone}",
        group=group,
        zone=zone,
        step_s=step_s,
        on_demand_usd_per_hour=on_demand,
        available=tuple(letter == "1" for letter in pattern),
        spot_usd_per_hour=tuple(prices or [price] * len(pattern)),
    )


def line(*patterns, **terms):
    """A timeline with a zone for each pattern: z0, z1, ..."""
    return timeline([trace(pattern, zone=f"z{n}", **terms) for n, pattern in enumerate(patterns)])


class Scripted:
    """Answers from a list, the last one for ever."""

    def __init__(self, *answers):
        self.answers = answers
        self.seen = []

    def reset(self, job):
        self.job = job

    def step(self, obs):
        self.seen.append(
            (
                obs.step,
                obs.state,
                obs.zone,
                obs.preempted,
                round(obs.work_done_h, 6),
                round(obs.delay_left_h, 6),
            )
        )
        return self.answers[min(obs.step, len(self.answers) - 1)]
