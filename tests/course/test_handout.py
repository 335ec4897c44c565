"""The course in a reader's folder: whole, and never over their work."""

import pytest

from gclib.__main__ import main
from gclib.course.chapters import NOTEBOOKS
from gclib.course.handout import hand_out


def test_chapters_answers_and_pictures_are_copied_whole(tmp_path, capsys):
    assert main(["course", str(tmp_path / "course")]) == 0
    written = {path.relative_to(tmp_path / "course") for path in (tmp_path / "course").rglob("*") if path.is_file()}
    ours = {path.relative_to(NOTEBOOKS) for path in NOTEBOOKS.rglob("*") if path.suffix in (".ipynb", ".md", ".png")}
    assert written == {path for path in ours if ".ipynb_checkpoints" not in path.parts}
    assert all((tmp_path / "course" / path).read_bytes() == (NOTEBOOKS / path).read_bytes() for path in written)
    assert f"jupyter lab {tmp_path / 'course' / '00_start_here.ipynb'}" in capsys.readouterr().out


def test_a_readers_work_is_never_written_over_and_is_named(tmp_path):
    mine = tmp_path / "01_in_batch_negatives.ipynb"
    mine.write_text("my answers")
    first = hand_out(tmp_path)
    again = hand_out(tmp_path)
    assert mine.read_text() == "my answers"
    assert first.differing == again.differing == (mine.name,) and again.written == () != first.written
    assert f"Left as they are, because they differ from the course's: {mine.name}." in again.report()


def test_a_file_for_a_folder_and_an_installation_without_chapters_are_refused(tmp_path, capsys):
    (tmp_path / "taken").touch()
    with pytest.raises(SystemExit):
        main(["course", str(tmp_path / "taken")])
    assert "folder must be a folder, or not be there yet" in capsys.readouterr().err
    with pytest.raises(ValueError, match="source must hold the course's notebooks"):
        hand_out(tmp_path / "new", tmp_path)
    assert not (tmp_path / "new").exists()
