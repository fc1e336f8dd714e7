"""What the supervisor runs on the node, one JSON line on standard output each:

python3 gpubroker-node.pyz start|run|container|look|stop|notice|end|checkpoints CONFIG
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from typing import Any

from gpubroker.node import generations
from gpubroker.node.agent import Busy, open_agent
from gpubroker.node.config import BadConfig, Config, open_store, read_config
from gpubroker.node.ending import NotEnded, end_node
from gpubroker.node.files import read_json
from gpubroker.node.look import ask, is_running, look
from gpubroker.node.store import Missing, StoreFailed

COMMANDS = {
    "start": "Begin, or go on with what runs, apart from this terminal.",
    "container": "Run the job's image by docker: what the agent starts where there is one.",
    "run": "The same in this terminal.",
    "look": "Renew the lease; the last heartbeat, and whether the agent is alive.",
    "stop": "Ask the job to save, then end it; a finished agent goes.",
    "notice": "The node will be taken: ask the job to save.",
    "end": "End the node, now, by its own means.",
    "checkpoints": "Verify what the store holds: the newest good checkpoint, and what is bad and why.",
}


def main(argv: list[str] | None = None) -> int:
    """0 done; 2 the configuration is wrong; `run` says how the job ended."""
    parser = argparse.ArgumentParser(prog="gpubroker-node")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in COMMANDS.items():
        command = commands.add_parser(name, help=text)
        command.add_argument("config")
        if name == "notice":
            command.add_argument("--seconds", type=float, default=None)
    asked = parser.parse_args(argv)
    try:
        if asked.command == "container":
            return _container(asked.config)
        config = read_config(asked.config)
        if asked.command == "start":
            return _start(config)
        if asked.command == "run":
            return _run(config)
        _print(_answer(asked, config))
    except (BadConfig, OSError, StoreFailed, Missing, NotEnded) as error:
        _print({"error": str(error)})
        return 2
    return 0


def _answer(asked: argparse.Namespace, config: Config) -> dict[str, Any]:
    if asked.command == "look":
        return look(config.folder)
    if asked.command == "checkpoints":
        return _checkpoints(config)
    if asked.command == "end":
        return _end(config)
    seconds = getattr(asked, "seconds", None)
    ask(config.folder, asked.command, "" if seconds is None else str(seconds))
    return {asked.command: "asked", "agent": is_running(config.folder)}


def _end(config: Config) -> dict[str, Any]:
    if config.end is None:
        raise NotEnded("a node of this vendor cannot end itself")
    end_node(config.end)
    return {"end": "asked", "agent": is_running(config.folder)}


def _checkpoints(config: Config) -> dict[str, Any]:
    if config.store is None:
        raise BadConfig("store: the job has none")
    found = generations.pick(open_store(config.store), config.job)
    newest = found.generation
    return {
        "newest": None if newest is None else {**newest._asdict(), "files": len(newest.files)},
        "rejected": [rejected._asdict() for rejected in found.rejected],
    }


def _run(config: Config) -> int:
    try:
        agent = open_agent(config)
    except Busy:
        _print(_running(config))
        return 0
    agent.begin()
    return agent.run()


def _running(config: Config) -> dict[str, Any]:
    beat = read_json(os.path.join(config.folder, "heartbeat.json")) or {}
    return {"state": "running", "agent_pid": beat.get("agent_pid"), "adopted": False}


def _container(path: str) -> int:
    """Its working folder is the job's, and the paths in the configuration begin at the agent's."""
    from gpubroker.node import container  # what no other command needs

    os.chdir(os.path.dirname(os.path.abspath(path)))
    return container.run(read_config(os.path.basename(path)))


def _start(config: Config) -> int:
    """Twice forked, so that it belongs to no terminal and no SSH session."""
    told, tell = os.pipe()
    child = os.fork()
    if child:
        os.close(tell)
        os.waitpid(child, 0)
        with os.fdopen(told, "rb") as pipe:
            line = pipe.read()
        answer = json.loads(line.decode()) if line else {"error": "the agent did not start: see agent.log"}
        _print(answer)
        return 2 if "error" in answer else 0
    os.close(told)
    os.setsid()
    if os.fork():
        os._exit(0)
    code = 1
    try:
        os.makedirs(config.folder, exist_ok=True)
        _leave_terminal(os.path.join(config.folder, "agent.log"))
        code = _begin(config, tell)
    finally:
        os._exit(code)


def _leave_terminal(log: str) -> None:
    nothing = os.open(os.devnull, os.O_RDWR)
    try:
        errors = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    except OSError:
        errors = nothing
    os.dup2(nothing, 0)
    os.dup2(nothing, 1)
    os.dup2(errors, 2)


def _begin(config: Config, tell: int) -> int:
    with os.fdopen(tell, "wb") as pipe:
        try:
            agent = open_agent(config)
            how = agent.begin(close_fds=[tell])
            answer: dict[str, Any] = {"state": how, "agent_pid": os.getpid(), "adopted": how == "adopted"}
        except Busy:
            agent, answer = None, _running(config)
        except Exception as error:
            agent, answer = None, {"error": f"{type(error).__name__}: {error}"}
        pipe.write(json.dumps(answer).encode())
    return 0 if agent is None else agent.run()


def _print(told: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(told) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
