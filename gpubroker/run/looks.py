"""When a job of this machine was last looked after: the time of a file that its supervisor touches.

`gpubroker run` -> touch at each tick -> `gpubroker sweep`: nobody has looked for as long as makes the job's
own node give up, so whatever still bills there is nobody's. Of a job of another machine nothing is known.
"""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

_FILE = "looked"


def job_folder(jobs_dir: Path, job_id: str) -> Path:
    """Where what is needed to go on with a job is kept."""
    return jobs_dir / job_id


def touch(folder: Path) -> None:
    """Somebody looks after the job with this folder now."""
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    (folder / _FILE).touch()


def is_forsaken(folder: Path, now: datetime, within_s: float) -> bool:
    """Whether the job with this folder ran here and nobody has looked after it for so long."""
    try:
        looked_s = (folder / _FILE).stat().st_mtime
    except OSError:
        return False
    return now.timestamp() - looked_s > within_s
