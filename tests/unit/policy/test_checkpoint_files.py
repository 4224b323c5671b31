"""Which directories count as checkpoints, and what happens to those that do not."""

import errno
import hashlib
import json
from pathlib import Path

import pytest
import torch

from megatron_entropic.checkpoints.run_checkpoints import (
    MANIFEST,
    STATE,
    CheckpointError,
    begin_checkpoint,
    changed_files,
    checkpoint_path,
    complete_checkpoints,
    finish_checkpoint,
    intact_checkpoint,
    latest_checkpoint,
    prune_checkpoints,
    read_state,
    share_of_rank,
    verify_checkpoint,
)
from megatron_entropic.errors import RunError, UserError
from megatron_entropic.policy.state.checkpoint_writer import HostCopies


def save(root: Path, step: int, content: str = "tensors") -> Path:
    directory = checkpoint_path(root, step)
    partial = begin_checkpoint(directory)
    (partial / "data").mkdir()
    (partial / "data" / "0.bin").write_text(content)
    finish_checkpoint(directory, {"step": step, "nothing": None, "third": 1 / 3})
    return directory


def test_a_finished_checkpoint_is_found_and_read(tmp_path):
    directory = save(tmp_path, 7)
    assert latest_checkpoint(tmp_path) == directory
    assert read_state(directory) == {"step": 7, "nothing": None, "third": 1 / 3}
    assert (directory / "data" / "0.bin").read_text() == "tensors"
    assert [path.name for path in tmp_path.iterdir()] == [directory.name]


def test_nothing_there_is_none(tmp_path):
    assert latest_checkpoint(tmp_path) is None
    assert latest_checkpoint(tmp_path / "missing") is None


def test_steps_are_ordered_as_numbers(tmp_path):
    for step in (99_999_999, 5, 100_000_000):
        save(tmp_path, step)
    assert [path.name for path in complete_checkpoints(tmp_path)] == [
        "step_00000005",
        "step_99999999",
        "step_100000000",
    ]


def test_what_is_not_complete_is_invisible(tmp_path):
    complete = save(tmp_path, 1)
    (begin_checkpoint(checkpoint_path(tmp_path, 2)) / "half").write_text("half")
    unmarked = save(tmp_path, 3)
    (unmarked / "COMPLETE").unlink()
    (tmp_path / "step_00000009").write_text("a file")
    assert complete_checkpoints(tmp_path) == [complete]


def test_an_interrupted_save_is_started_afresh(tmp_path):
    (begin_checkpoint(checkpoint_path(tmp_path, 2)) / "old").write_text("old")
    directory = save(tmp_path, 2)
    assert not (directory / "old").exists()


def test_a_writer_that_outlived_its_run_does_not_meddle(tmp_path):
    directory = checkpoint_path(tmp_path, 2)
    (begin_checkpoint(directory, "old") / "0.bin").write_text("half")
    (begin_checkpoint(directory, "new") / "0.bin").write_text("whole")
    finish_checkpoint(directory, {"step": 2}, writer="new")
    prune_checkpoints(tmp_path, 2)
    assert (directory / "0.bin").read_text() == "whole"
    with pytest.raises(FileNotFoundError):
        finish_checkpoint(directory, {"step": 2}, writer="old")
    assert intact_checkpoint(tmp_path, lambda error: None) == directory


def test_saving_a_step_again_replaces_it(tmp_path):
    save(tmp_path, 2, "first")
    directory = save(tmp_path, 2, "second")
    assert (directory / "data" / "0.bin").read_text() == "second"
    assert [path.name for path in tmp_path.iterdir()] == [directory.name]


def test_a_state_that_cannot_be_written_leaves_the_earlier_checkpoint(tmp_path):
    save(tmp_path, 2)
    begin_checkpoint(checkpoint_path(tmp_path, 2))
    with pytest.raises(TypeError, match="not JSON serializable"):
        finish_checkpoint(checkpoint_path(tmp_path, 2), {"bad": object()})
    assert read_state(checkpoint_path(tmp_path, 2))["step"] == 2


@pytest.mark.parametrize("damage", ["truncate", "remove"])
def test_damage_is_named(tmp_path, damage):
    directory = save(tmp_path, 4)
    victim = directory / "data" / "0.bin"
    if damage == "truncate":
        victim.write_text("ten")
    else:
        victim.unlink()
    with pytest.raises(CheckpointError, match=r"step_00000004 is damaged: data/0\.bin has [03] bytes instead of 7"):
        read_state(directory)


def test_a_directory_that_is_no_checkpoint_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="is not a complete checkpoint"):
        read_state(tmp_path)


def test_only_the_newest_are_kept(tmp_path):
    for step in range(1, 6):
        save(tmp_path, step)
    begin_checkpoint(checkpoint_path(tmp_path, 6))
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "step_x").mkdir()
    prune_checkpoints(tmp_path, 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes.txt", "step_00000004", "step_00000005", "step_x"]


def test_keeping_none_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="keep_last must be at least 1"):
        prune_checkpoints(tmp_path, 0)


def test_every_nth_is_kept_for_ever(tmp_path):
    for step in range(1, 8):
        save(tmp_path, step)
    prune_checkpoints(tmp_path, 1, keep_every=3)
    assert complete_checkpoints(tmp_path) == [checkpoint_path(tmp_path, step) for step in (3, 6, 7)]
    prune_checkpoints(tmp_path, 1, keep_steps={3})
    assert complete_checkpoints(tmp_path) == [checkpoint_path(tmp_path, step) for step in (3, 7)]


def test_a_changed_byte_is_found_and_the_checkpoint_before_is_used(tmp_path):
    good, bad = save(tmp_path, 3), save(tmp_path, 4)
    (bad / "data" / "0.bin").write_text("tensorz")  # the same size
    warnings: list[CheckpointError] = []
    assert intact_checkpoint(tmp_path, warnings.append) == good
    assert "step_00000004 is damaged: data/0.bin changed after it was written" in str(warnings[0])
    assert complete_checkpoints(tmp_path) == [good]
    assert bad.with_name("step_00000004.damaged").is_dir()
    assert intact_checkpoint(tmp_path, warnings.append) == good
    assert len(warnings) == 1


FILES = [f"__{rank}_{part}.distcp" for rank in range(4) for part in range(2)] + [".metadata", "common.pt", "state.json"]


def save_of_ranks(root: Path, step: int) -> Path:
    directory = checkpoint_path(root, step)
    partial = begin_checkpoint(directory)
    for name in FILES:
        (partial / name).write_text(f"content of {name}")
    finish_checkpoint(directory, {"step": step})
    return directory


@pytest.mark.parametrize("ranks", [1, 2, 4, 6])
def test_every_file_is_read_by_one_rank_and_by_the_one_that_wrote_it_if_there_are_as_many(tmp_path, ranks):
    """The driver alone read and hashed all of a checkpoint: 3.3 TB of a 235B on one node, before anything started."""
    shares = [share_of_rank(FILES, rank, ranks) for rank in range(ranks)]
    assert sorted(name for share in shares for name in share) == sorted(FILES)
    if ranks == 4:
        for rank, share in enumerate(shares):
            assert [name for name in share if name.endswith(".distcp")] == [f"__{rank}_0.distcp", f"__{rank}_1.distcp"]
    directory = save_of_ranks(tmp_path, 3)
    for name in FILES[3], ".metadata":
        (directory / name).write_text(f"tnetnoc of {name}")
    found = [changed_files(directory, rank, ranks) for rank in range(ranks)]
    assert sorted(name for changed in found for name in changed) == sorted([FILES[3], ".metadata"])


def test_what_ranks_find_is_told_and_set_aside_as_what_the_driver_finds(tmp_path):
    good, bad = save_of_ranks(tmp_path, 3), save_of_ranks(tmp_path, 4)
    (bad / FILES[3]).write_text(f"tnetnoc of {FILES[3]}")
    read = []

    def both_ranks(directory: Path) -> list[str]:
        read.append(directory.name)
        return [name for rank in range(2) for name in changed_files(directory, rank, 2)]

    warnings: list[CheckpointError] = []
    assert intact_checkpoint(tmp_path, warnings.append, find_changed=both_ranks) == good
    assert read == [bad.name, good.name]
    assert "step_00000004 is damaged: __1_1.distcp changed after it was written" in str(warnings[0])


def test_a_node_without_the_file_system_damages_no_checkpoint(tmp_path):
    save_of_ranks(tmp_path, 3)

    def rank_without_it(directory: Path) -> list[str]:
        raise RunError("changed_files: policy rank 1: FileNotFoundError: __1_0.distcp")

    with pytest.raises(RunError, match="policy rank 1: FileNotFoundError"):
        intact_checkpoint(tmp_path, lambda error: pytest.fail(str(error)), find_changed=rank_without_it)
    assert complete_checkpoints(tmp_path) == [checkpoint_path(tmp_path, 3)]


def test_a_bad_part_of_a_disk_is_damage(tmp_path, monkeypatch):
    directory = save_of_ranks(tmp_path, 3)

    def fail(file, name):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(hashlib, "file_digest", fail)
    with pytest.raises(CheckpointError, match=r"is damaged: .*common\.pt.* changed after it was written"):
        verify_checkpoint(directory)


def test_without_an_intact_checkpoint_nothing_is_touched_and_every_file_is_named(tmp_path):
    for step in (1, 2):
        (save(tmp_path, step) / "data" / "0.bin").unlink()
    before = sorted(path.name for path in tmp_path.iterdir())
    warnings: list[CheckpointError] = []
    with pytest.raises(CheckpointError, match="no checkpoint in") as caught:
        intact_checkpoint(tmp_path, warnings.append)
    for step in (1, 2):
        assert f"step_0000000{step} is damaged: data/0.bin has 0 bytes instead of 7" in str(caught.value)
    assert "run.output_dir" in str(caught.value)
    assert not warnings
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_a_run_whose_only_checkpoints_were_set_aside_does_not_start_over(tmp_path):
    assert intact_checkpoint(tmp_path, lambda error: None) is None
    save(tmp_path, 3).rename(tmp_path / "step_00000003.damaged")
    with pytest.raises(CheckpointError, match=r"step_00000003\.damaged was set aside before"):
        intact_checkpoint(tmp_path, lambda error: None)


def test_a_checkpoint_without_sums_is_taken_only_when_told_to(tmp_path):
    save(tmp_path, 3)
    older = save(tmp_path, 4)
    manifest = json.loads((older / "COMPLETE").read_text())
    del manifest["sha256"]
    (older / "COMPLETE").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match=r"step_00000004 was written without checksums: .*accept_unverified=true"):
        intact_checkpoint(tmp_path, lambda error: None)
    assert intact_checkpoint(tmp_path, lambda error: None, accept_unverified=True) == older
    (older / "data" / "0.bin").unlink()
    assert intact_checkpoint(tmp_path, lambda error: None) == checkpoint_path(tmp_path, 3), "missing files are damage"


def test_known_sums_are_not_computed_again_and_count(tmp_path):
    directory = checkpoint_path(tmp_path, 5)
    (begin_checkpoint(directory) / "0.bin").write_text("tensors")
    finish_checkpoint(directory, {"step": 5}, {"0.bin": "0" * 64})
    with pytest.raises(CheckpointError, match=r"step_00000005 is damaged: 0\.bin changed"):
        intact_checkpoint(tmp_path, lambda error: None)


def rewrite_state(directory: Path, state: object, *, manifest: bool = True) -> None:
    """As another version of the package would have written it."""
    (directory / STATE).write_text(json.dumps(state))
    content = json.loads((directory / MANIFEST).read_text())
    content["files"][STATE] = (directory / STATE).stat().st_size
    content["sha256"][STATE] = hashlib.sha256((directory / STATE).read_bytes()).hexdigest()
    (directory / MANIFEST).write_text(json.dumps(content if manifest else {"of": "another form"}))


def test_a_checkpoint_of_before_there_were_versions_is_read(tmp_path):
    directory = save(tmp_path, 4)
    assert json.loads((directory / STATE).read_text())["format_version"] == 1
    rewrite_state(directory, {"step": 4})
    assert read_state(directory) == {"step": 4}
    assert intact_checkpoint(tmp_path, lambda error: pytest.fail(str(error))) == directory


@pytest.mark.parametrize("manifest", [True, False])
def test_a_checkpoint_of_a_newer_version_is_refused_and_left_as_it_is(tmp_path, manifest):
    """It was taken for a damaged one, set aside, and the run went on from the one before."""
    save(tmp_path, 3)
    directory = save(tmp_path, 4)
    rewrite_state(directory, {"format_version": 2, "step": 4}, manifest=manifest)
    words = r"step_00000004/state\.json: written by a newer megatron_entropic \(checkpoint format 2; .* use the version"
    for read in (read_state, verify_checkpoint):
        with pytest.raises(UserError, match=words):
            read(directory)
    with pytest.raises(UserError, match=words):
        intact_checkpoint(tmp_path, lambda error: pytest.fail(str(error)))
    assert directory.is_dir()


@pytest.mark.parametrize("state", [[1], {"format_version": "1"}, {"format_version": 0}, 5])
def test_a_state_of_another_form_is_no_checkpoint(tmp_path, state):
    directory = save(tmp_path, 4)
    rewrite_state(directory, state)
    with pytest.raises(CheckpointError, match="is not a complete checkpoint"):
        read_state(directory)


def test_a_save_copies_into_the_memory_of_the_one_before():
    copies, tensor = HostCopies(), torch.arange(6.0)
    first = copies.copy("a", tensor[:3])
    tensor += 1
    assert first.tolist() == [0, 1, 2], "training goes on with the tensor"
    again = copies.copy("a", tensor[:3])
    assert again.tolist() == [1, 2, 3]
    assert again.data_ptr() == first.data_ptr()
    assert copies.copy("b", tensor[:3]).data_ptr() != again.data_ptr()
    assert copies.copy("a", tensor).tolist() == tensor.tolist(), "another shape has memory of its own"
