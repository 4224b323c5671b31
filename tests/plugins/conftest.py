"""Tests that run inside other trainers, which lie in a folder of their own: `.venv/hosts`, see tools/environment.sh.

`tests/processes/test_plugins.py` runs each of these files in a process of its own. By hand:

    bash tests/run.sh -n 0 tests/plugins/test_trl.py
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

HOSTS = Path(sys.prefix) / "hosts"

# First on the path, as nothing has imported antlr4 yet, of which they need another version.
sys.path.insert(0, str(HOSTS))
os.environ["PYTHONPATH"] = os.pathsep.join([str(HOSTS), *filter(None, [os.environ.get("PYTHONPATH")])])
