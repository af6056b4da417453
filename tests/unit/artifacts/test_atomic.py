"""Files that are replaced whole or not at all."""

import pytest

from cppo_verl.artifacts.atomic import replacing


def test_the_files_take_their_places_when_the_body_ends(tmp_path):
    targets = [tmp_path / "a.json", tmp_path / "b.json"]
    targets[0].write_text("old")
    with replacing(*targets) as files:
        for file in files:
            file.write_text("new")
        assert targets[0].read_text() == "old"
        assert not targets[1].exists()
    assert [target.read_text() for target in targets] == ["new", "new"]
    assert sorted(tmp_path.iterdir()) == targets


def test_a_body_that_raises_changes_nothing_and_leaves_nothing(tmp_path):
    target = tmp_path / "a.json"
    target.write_text("old")
    with pytest.raises(ZeroDivisionError), replacing(target) as (file,):
        file.write_text("half of it")
        raise ZeroDivisionError
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_two_writers_with_the_same_process_id_do_not_meet(tmp_path):
    # on a folder that two machines share, where process ids repeat
    target = tmp_path / "a.json"
    with replacing(target) as (first,):
        first.write_text("first")
        with replacing(target) as (second,):
            second.write_text("second")
        assert target.read_text() == "second"
    assert target.read_text() == "first"


def test_the_new_file_is_as_readable_as_any_other(tmp_path):
    (tmp_path / "plain").touch()
    with replacing(tmp_path / "a.json") as (file,):
        file.touch()
    assert (tmp_path / "a.json").stat().st_mode == (tmp_path / "plain").stat().st_mode
