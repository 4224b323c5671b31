"""The documentation says what is so: generated pages are fresh and links lead somewhere."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def test_configuration_reference_is_up_to_date() -> None:
    result = subprocess.run(
        [sys.executable, "tools/write_configuration_reference.py", "--check"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr


def test_links_lead_somewhere() -> None:
    broken = [
        f"{page.name}: {target}"
        for page in PAGES
        for target in re.findall(r'(?:\]\(|src=")([^)"#\s]+)', page.read_text(encoding="utf-8"))
        if not target.startswith(("http://", "https://")) and not (page.parent / target).exists()
    ]
    assert not broken


def test_named_files_exist() -> None:
    """A file of this repository in backquotes is there."""
    folders = r"(?:megatron_entropic|tests|tools|docs|examples|requirements|slurm)"
    missing = [
        f"{page.name}: {name}"
        for page in PAGES
        for name in re.findall(rf"`(?:bash |python )?({folders}/[\w./]+)", page.read_text(encoding="utf-8"))
        if not (ROOT / name.rstrip("./")).exists()
    ]
    assert not missing


def test_every_variable_of_the_launcher_is_documented() -> None:
    page = (ROOT / "docs/clusters.md").read_text(encoding="utf-8")
    scripts = "".join(path.read_text(encoding="utf-8") for path in sorted((ROOT / "slurm").glob("*.sh")))
    names = set(re.findall(r"\bME_[A-Z_]+\b", scripts)) | set(
        re.findall(r"^#SBATCH (--[a-z-]+)", scripts, re.MULTILINE)
    )
    missing = sorted(name for name in names if f"`{name}" not in page)
    assert not missing
