"""The chapters in a folder of the reader's own: `python -m gclib course FOLDER`. Nothing of theirs is written over.

A wheel carries the notebooks beside the library (`share/gclib/notebooks`), a checkout has them in `notebooks/`.
"""

import shutil
from dataclasses import dataclass
from pathlib import Path

from gclib.course.chapters import NOTEBOOKS
from gclib.support.validation import refuse


@dataclass(frozen=True)
class Handout:
    """Files of the course by their place in the folder: written now; left as they are, since they differ from ours."""

    folder: Path
    written: tuple[str, ...]
    differing: tuple[str, ...]

    def report(self) -> str:
        """What was done, and what to type next."""
        lines = [f"{len(self.written)} files of the course were written to {self.folder}."]
        if self.differing:
            lines.append(f"Left as they are, because they differ from the course's: {', '.join(self.differing)}.")
            lines.append("To have these as the course has them, name another folder.")
        return "\n".join([*lines, f"Next: jupyter lab {self.folder / '00_start_here.ipynb'}"])


def hand_out(folder: str | Path, source: Path = NOTEBOOKS) -> Handout:
    """Copy chapters, answers, glossary and pictures into `folder`; a file that is there already is never touched.

    Raises ValueError where `folder` is a file, or this installation has no chapters.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise refuse("folder", "must be a folder, or not be there yet", folder)
    paths = [path for pattern in ("*.ipynb", "*.md", "*/*.ipynb", "*/*.png") for path in sorted(source.glob(pattern))]
    paths = [path for path in paths if ".ipynb_checkpoints" not in path.parts]
    if not paths:
        raise refuse("source", "must hold the course's notebooks: install gclib from its wheel or its folder", source)
    written, differing = [], []
    for path in paths:
        name = path.relative_to(source).as_posix()
        target = folder / name
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
            written.append(name)
        elif target.read_bytes() != path.read_bytes():
            differing.append(name)
    return Handout(folder, tuple(written), tuple(differing))
