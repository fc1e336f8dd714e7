"""Packs what a node needs into one file that its Python runs: python3 gpubroker-node.pyz start CONFIG.

The file is also what the job imports gpubroker.checkpoint from: the agent puts it on PYTHONPATH. A gpubroker
that is installed there stays whole, for the package inside only adds to it.
"""

from __future__ import annotations

import functools
import io
import zipfile
from pathlib import Path

NAME = "gpubroker-node.pyz"
_PACKAGE = Path(__file__).resolve().parent.parent
_LONG_AGO = (1980, 1, 1, 0, 0, 0)
_INIT = "from pkgutil import extend_path\n\n__path__ = extend_path(__path__, __name__)\n"
# A look is asked for every few seconds, and imports little.
_MAIN = """import sys

if sys.argv[1:2] == ["look"]:
    from gpubroker.node.look import main
else:
    from gpubroker.node.__main__ import main

sys.exit(main())
"""


@functools.cache
def bundle() -> bytes:
    """The same bytes for the same sources.

    Packed once a process, which then sends its own version for as long as it lives, and twice to every node.
    """
    texts = {"__main__.py": _MAIN, "gpubroker/__init__.py": _INIT}
    for path in [_PACKAGE / "checkpoint.py", *sorted((_PACKAGE / "node").glob("*.py"))]:
        if path.name != Path(__file__).name:
            texts[f"gpubroker/{path.relative_to(_PACKAGE).as_posix()}"] = path.read_text(encoding="utf-8")
    packed = io.BytesIO()
    packed.write(b"#!/usr/bin/env python3\n")
    with zipfile.ZipFile(packed, "a", zipfile.ZIP_DEFLATED) as archive:
        for name, text in texts.items():
            entry = zipfile.ZipInfo(name, _LONG_AGO)
            entry.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(entry, text)
    return packed.getvalue()
