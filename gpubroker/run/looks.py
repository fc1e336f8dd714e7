"""When a job of this machine was last looked after: the time of a file that its supervisor touches.

`gpubroker run` -> touch at each tick -> `gpubroker sweep`: nobody has looked for as long as makes the job's
own node give up, so whatever still bills there is nobody's. Of a job of another machine nothing is known.
"""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

_FILE = "looked"


def job_folder(job_id: str) -> Path:
    """Where this machine keeps what it needs to go on with a job."""
    from platformdirs import user_data_path

    return user_data_path("gpubroker") / "jobs" / job_id


def touch(job_id: str) -> None:
    """Somebody looks after it now."""
    folder = job_folder(job_id)
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    (folder / _FILE).touch()


def is_forsaken(job_id: str, now: datetime, within_s: float) -> bool:
    """Whether it ran here and nobody has looked after it for so long."""
    try:
        looked_s = (job_folder(job_id) / _FILE).stat().st_mtime
    except OSError:
        return False
    return now.timestamp() - looked_s > within_s
