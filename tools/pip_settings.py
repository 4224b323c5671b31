"""Prints pip's settings of where packages come from as exports of uv's variables, for `eval` in a shell.

pip merges its configuration files (global, user, site, PIP_CONFIG_FILE) and lets PIP_* variables win. uv knows none of
them, so they are read here the way pip reads them; a variable of uv's own that is already set is left alone.
Standard library only: it runs before anything is installed, on an interpreter that may lack pip.
"""

from __future__ import annotations

import configparser
import os
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path

OPTIONS = ("index-url", "extra-index-url", "find-links", "no-index", "trusted-host", "cert", "proxy", "timeout")


def configuration_files(environment: Mapping[str, str]) -> list[Path]:
    """pip's configuration files in the order it reads them; a later one wins.

    Args:
        environment: The process environment; PIP_CONFIG_FILE set to the null device means no files at all.
    """
    chosen = environment.get("PIP_CONFIG_FILE")
    if chosen == os.devnull:
        return []
    # Where nobody set HOME, pip too takes the user's own from the system's list of users.
    home = Path(environment.get("HOME") or os.path.expanduser("~"))
    shared = [Path(folder) for folder in environment.get("XDG_CONFIG_DIRS", "/etc/xdg").split(":") if folder]
    user = Path(environment.get("XDG_CONFIG_HOME") or home / ".config")
    files = [folder / "pip/pip.conf" for folder in reversed(shared)]
    files += [Path("/etc/pip.conf"), home / ".pip/pip.conf", user / "pip/pip.conf", Path(sys.prefix) / "pip.conf"]
    return [*files, Path(chosen)] if chosen else files


def pip_settings(environment: Mapping[str, str], files: list[Path]) -> dict[str, str]:
    """Merged values of OPTIONS: files in order, [global] before [install], then PIP_* variables.

    Raises:
        configparser.Error: if a file is not a configuration file; pip refuses it too.
    """
    settings: dict[str, str] = {}
    for file in files:
        parser = configparser.RawConfigParser()
        parser.read(file, encoding="utf-8")
        for section in ("global", "install"):
            if parser.has_section(section):
                settings |= {key: value for key, value in parser.items(section) if key in OPTIONS}
    for option in OPTIONS:
        value = environment.get("PIP_" + option.upper().replace("-", "_"))
        if value:
            settings[option] = value
    return settings


def uv_variables(settings: Mapping[str, str]) -> dict[str, str]:
    """The same settings in uv's words: lists of indexes are separated by blanks, lists of folders by commas."""
    variables = {
        "UV_DEFAULT_INDEX": settings.get("index-url", ""),
        "UV_INDEX": " ".join(settings.get("extra-index-url", "").split()),
        "UV_FIND_LINKS": ",".join(settings.get("find-links", "").split()),
        "UV_INSECURE_HOST": " ".join(settings.get("trusted-host", "").split()),
        "UV_NO_INDEX": "1" if settings.get("no-index", "").lower() in ("1", "true", "yes", "on") else "",
        "UV_HTTP_TIMEOUT": settings.get("timeout", "").partition(".")[0],
        "SSL_CERT_FILE": settings.get("cert", ""),
        "HTTPS_PROXY": settings.get("proxy", ""),
    }
    return {name: value for name, value in variables.items() if value}


def main() -> None:
    """Writes one `export NAME=value` a line."""
    environment = os.environ
    variables = uv_variables(pip_settings(environment, configuration_files(environment)))
    for name, value in variables.items():
        if not environment.get(name):
            sys.stdout.write(f"export {name}={shlex.quote(value)}\n")


if __name__ == "__main__":
    main()
