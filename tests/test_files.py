"""Files that appear whole, or not at all."""

import pytest

from course_utils.files import replacing


def test_a_reader_sees_the_old_file_until_the_new_one_is_whole(tmp_path):
    path = tmp_path / "folders that" / "are missing" / "file.txt"
    for old, new in ((None, "first"), ("first", "second")):
        with replacing(path) as partial:
            partial.write_text(new)
            assert (path.read_text() if path.exists() else None) == old
        assert path.read_text() == new
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("interruption", [ValueError, KeyboardInterrupt])
def test_an_interruption_leaves_what_was_there(tmp_path, interruption):
    path = tmp_path / "file.txt"
    path.write_text("old")
    with pytest.raises(interruption), replacing(path) as partial:
        partial.write_text("half")
        raise interruption
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
