"""EpochBackup: the state of either of the last two epochs can be loaded, whatever was killed in between."""

import pytest

from gwa_logging.epoch_backup import EpochBackup


def test_the_states_after_the_last_two_epochs_can_be_loaded(tmp_path, caplog):
    backup = EpochBackup(tmp_path / "new folder" / "gwa.json")
    for epochs in (1, 2, 3):
        backup.save(epochs, {"epoch": epochs})
    assert [backup.load(epochs) for epochs in (2, 3)] == [{"epoch": 2}, {"epoch": 3}]
    assert caplog.text == ""
    assert backup.load(1) is None
    assert "GWA starts again from zero" in caplog.text
    assert "the state at the end of epoch 0" in caplog.text
    backup.save(3, {"epoch": "again"})  # a repeated epoch does not displace the one before
    assert backup.load(2) == {"epoch": 2}
    assert backup.load(3) == {"epoch": "again"}
    backup.remove()
    backup.remove()
    assert list((tmp_path / "new folder").iterdir()) == []


@pytest.mark.parametrize("contents", ["", '{"epochs": 2, "sta', "[]"])
def test_a_damaged_file_counts_as_missing(contents, tmp_path, caplog):
    backup = EpochBackup(tmp_path / "gwa.json")
    backup.save(1, {"epoch": 1})
    backup.save(2, {"epoch": 2})
    backup.path.write_text(contents)
    assert backup.load(2) is None
    assert backup.load(1) == {"epoch": 1}


def test_a_write_that_fails_leaves_the_earlier_states(tmp_path):
    backup = EpochBackup(tmp_path / "gwa.json")
    backup.save(1, {"epoch": 1})
    with pytest.raises(TypeError):
        backup.save(2, {"epoch": object()})
    assert backup.load(1) == {"epoch": 1}
