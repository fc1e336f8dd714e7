"""`python -m benchmarks NAME [--quick] --format json`; `--list` names them; `all` runs every one."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable

import click

from benchmarks.agent_idle import agent_idle
from benchmarks.backtest_greedy import backtest_greedy
from benchmarks.checkpoint_pause import checkpoint_pause
from benchmarks.checkpoint_publish import checkpoint_publish
from benchmarks.harness import Result
from benchmarks.history_bytes import history_bytes
from benchmarks.history_export import history_export
from benchmarks.history_memory import history_memory
from benchmarks.history_p50 import history_p50
from benchmarks.launch_overhead import launch_overhead
from benchmarks.plan_coverage import plan_coverage
from benchmarks.plan_rank import plan_rank
from benchmarks.policy_adaptive import policy_adaptive
from benchmarks.quote_cold import quote_cold
from benchmarks.store_poll import store_poll
from benchmarks.supervise_loss import supervise_loss
from benchmarks.supervise_many import supervise_many
from benchmarks.testcloud_nodes import testcloud_nodes

BENCHMARKS: dict[str, Callable[[bool], Result]] = {
    "agent-idle": agent_idle,
    "backtest-greedy": backtest_greedy,
    "checkpoint-pause": checkpoint_pause,
    "checkpoint-publish": checkpoint_publish,
    "history-bytes": history_bytes,
    "history-export": history_export,
    "history-memory": history_memory,
    "history-p50": history_p50,
    "launch-overhead": launch_overhead,
    "plan-coverage": plan_coverage,
    "plan-rank": plan_rank,
    "policy-adaptive": policy_adaptive,
    "quote-cold": quote_cold,
    "store-poll": store_poll,
    "supervise-loss": supervise_loss,
    "supervise-many": supervise_many,
    "testcloud-nodes": testcloud_nodes,
}


@click.command()
@click.argument("name", type=click.Choice(["all", *BENCHMARKS]), required=False)
@click.option("--quick", is_flag=True, help="5 pairs instead of 15; history-*: a month, not a year.")
@click.option("--list", "list_names", is_flag=True, help="Name the benchmarks.")
@click.option("--format", "output", type=click.Choice(["table", "json"]), default="table")
def run(name: str | None, *, quick: bool, list_names: bool, output: str) -> None:
    """Measure one benchmark, or all, and say whether it keeps its limit."""
    if list_names or name is None:
        print("\n".join(BENCHMARKS))
        return
    results = [BENCHMARKS[n](quick) for n in (BENCHMARKS if name == "all" else [name])]
    if output == "json":
        records = [r.record() for r in results]
        print(json.dumps(records if name == "all" else records[0]))
    else:
        for r in results:
            print(
                f"{r.name}: {r.figure} {r.unit} against {r.baseline}: ratio {r.ratio} "
                f"(at most {r.limit}) {'ok' if r.ok else 'TOO SLOW'}  {dict(r.detail)}"
            )
    sys.exit(0 if all(r.ok for r in results) else 1)


if __name__ == "__main__":
    run()
