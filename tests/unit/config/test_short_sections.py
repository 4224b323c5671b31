"""`environment: NAME`: a text in place of a section."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_entropic.config.load import ConfigError, load_config

FILE = "model: {{hf_dir: m}}\ndata: {{train_files: t.parquet}}\n{}"


@pytest.mark.parametrize(
    ("text", "overrides"),
    [
        ("environment: guess\n", []),
        ("environment:\n  name: guess\n", []),
        ("", ["environment=guess"]),
        ("environment: calculator\n", ["environment=guess"]),
        ("environment: {name: calculator}\n", ["environment.name=guess"]),
        ("", ["environment={name: guess}"]),
    ],
)
def test_a_name_alone_is_the_name_of_the_section(tmp_path: Path, text: str, overrides: list[str]) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(FILE.format(text))
    assert load_config(path, overrides).environment.name == "guess"


@pytest.mark.parametrize("overrides", [["environment=guess", "environment.max_turns=3"], ["environment.max_turns=3"]])
def test_other_keys_go_beside_a_name_alone(tmp_path: Path, overrides: list[str]) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(FILE.format("environment: guess\n"))
    environment = load_config(path, overrides).environment
    assert (environment.name, environment.max_turns) == ("guess", 3)


def test_nothing_is_no_environment(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(FILE.format("environment:\n"))
    assert load_config(path).environment.section is None


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["environment=gues"], "did you mean guess"),
        (["environment.max_turns=3"], "environment.max_turns has no use without environment.name"),
        (["environment=guess", "environment.max_turn_tokens=9000"], "more than rollout.max_response_tokens"),
        (["reward=math"], "reward"),
    ],
)
def test_what_cannot_be_is_told(tmp_path: Path, overrides: list[str], words: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(FILE.format(""))
    with pytest.raises(ConfigError, match=words):
        load_config(path, overrides)


SETTINGS = {
    "environment: {name: guess, settings: {cost: 0.2, deep: {list: [1, a]}, words: 'yes', none: null}}\n": [],
    "environment: guess\n": [
        "environment.settings.cost=0.2",
        "environment.settings.deep.list=[1, a]",
        "environment.settings.words=yes",
        "environment.settings.none=null",
    ],
    "": ["environment={name: guess, settings: {cost: 0.2, deep: {list: [1, a]}, words: yes, none: ~}}"],
}


@pytest.mark.parametrize("text", list(SETTINGS))
def test_arguments_of_an_environment_are_what_yaml_says_they_are(tmp_path: Path, text: str) -> None:
    """A number was a text when it came from the command line, and the game failed in its first turn."""
    path = tmp_path / "run.yaml"
    path.write_text(FILE.format(text))
    settings = load_config(path, SETTINGS[text]).environment.settings
    assert settings == {"cost": 0.2, "deep": {"list": [1, "a"]}, "words": "yes", "none": None}
    quoted = load_config(path, [*SETTINGS[text], 'environment.settings.cost="0.2"', "environment.settings.on=true"])
    assert (quoted.environment.settings["cost"], quoted.environment.settings["on"]) == ("0.2", True)
