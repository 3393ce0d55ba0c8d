import pytest

from hub_upload.new_folder import new_folder


def test_it_gets_its_name_when_it_is_whole(tmp_path):
    with new_folder(tmp_path / "out") as folder:
        (folder / "a").write_text("b")
        assert not (tmp_path / "out").exists()
    assert (tmp_path / "out" / "a").read_text() == "b"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_failure_leaves_nothing_behind(tmp_path):
    with pytest.raises(KeyError), new_folder(tmp_path / "out") as folder:
        (folder / "a").write_text("b")
        raise KeyError
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("out", "error"), [("there", FileExistsError), ("none/out", FileNotFoundError)])
def test_nothing_is_overwritten_and_no_parent_is_made(tmp_path, out, error):
    (tmp_path / "there").mkdir()
    with pytest.raises(error, match=str(tmp_path)), new_folder(tmp_path / out):
        pytest.fail("entered")
    assert [path.name for path in tmp_path.iterdir()] == ["there"]
