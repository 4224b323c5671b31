"""tools/pip_settings.py: what pip was told, in uv's words."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
SCRIPT = ROOT / "tools/pip_settings.py"
CONFIGURATION = """
[global]
index-url = https://index.example/simple
extra-index-url = https://one.example/simple
    https://two.example/simple
find-links = wheels
cert = bundle.pem
timeout = 30.0

[install]
find-links = first second
"""


def shell_values(environment: dict[str, str], *names: str) -> list[str]:
    """What the named variables are in a shell that evaluated the script's output."""
    shown = " ".join(f'"${{{name}:-}}"' for name in names)
    command = f'settings=$("{sys.executable}" "{SCRIPT}") && eval "$settings" && printf "%s\\n" {shown}'
    result = subprocess.run(
        ["bash", "-c", command],
        env={"PATH": os.environ["PATH"], **environment},
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    return result.stdout.split("\n")[: len(names)]


def test_a_configuration_file_is_read_as_pip_reads_it(tmp_path: Path) -> None:
    folder = tmp_path / ".config/pip"
    folder.mkdir(parents=True)
    (folder / "pip.conf").write_text(CONFIGURATION)
    # The file named by PIP_CONFIG_FILE is read last, so what this machine's own files say is overruled.
    environment = {"HOME": str(tmp_path), "PIP_CONFIG_FILE": str(folder / "pip.conf")}
    values = shell_values(
        environment, "UV_DEFAULT_INDEX", "UV_INDEX", "UV_FIND_LINKS", "SSL_CERT_FILE", "UV_HTTP_TIMEOUT"
    )
    assert values == [
        "https://index.example/simple",
        "https://one.example/simple https://two.example/simple",
        "first,second",
        "bundle.pem",
        "30",
    ]


def test_variables_win_over_files_and_uv_over_both(tmp_path: Path) -> None:
    configuration = tmp_path / "pip.conf"
    configuration.write_text(CONFIGURATION)
    environment = {
        "HOME": str(tmp_path),
        "PIP_CONFIG_FILE": str(configuration),
        "PIP_FIND_LINKS": "from variable",
        "PIP_INDEX_URL": "https://variable.example/simple",
        "UV_DEFAULT_INDEX": "https://uv.example/simple",
    }
    values = shell_values(environment, "UV_FIND_LINKS", "UV_DEFAULT_INDEX")
    assert values == ["from,variable", "https://uv.example/simple"]


def test_no_configuration_exports_nothing(tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, str(SCRIPT)],
        env={"HOME": str(tmp_path), "PIP_CONFIG_FILE": os.devnull},
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert result.stdout == ""


def test_values_survive_the_shell(tmp_path: Path) -> None:
    value = 'a folder/$(touch gone)/"wheels"'
    environment = {"HOME": str(tmp_path), "PIP_CONFIG_FILE": os.devnull, "PIP_CERT": value}
    assert shell_values(environment, "SSL_CERT_FILE") == [value]


def test_without_home_the_users_own_folder_is_looked_into_as_pip_does() -> None:
    program = (
        "import os, pwd; from pathlib import Path; import pip_settings;"
        "own = Path(pwd.getpwuid(os.getuid()).pw_dir) / '.config/pip/pip.conf';"
        "assert own in pip_settings.configuration_files({}), pip_settings.configuration_files({})"
    )
    subprocess.run(
        [sys.executable, "-c", program],
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(SCRIPT.parent)},
        check=True,
        timeout=60,
    )
