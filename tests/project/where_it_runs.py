# Is the course's library here? Where it is missing, this cell says what to type.
import sys
from importlib.util import find_spec


class NotHere(ModuleNotFoundError):
    def _render_traceback_(self):  # what IPython shows in place of a traceback
        return [str(self)]


if find_spec("gclib") is None:
    words = f"""gclib, the course's library, is missing in Python {sys.version.split()[0]}, {sys.executable}.
If you have it elsewhere: Kernel > Change Kernel, or start JupyterLab from the project's folder, as its README says.
To put it here (Python 3.11 or newer), type in a cell, with the project's folder, written out, for FOLDER:
    %pip install -e "FOLDER[course]"
Then Kernel > Restart Kernel, and run this cell again."""
    if "google.colab" in sys.modules:
        words = """Colab has no gclib yet. Type in a cell, with the project's address on GitHub for OWNER/NAME:
    %pip install "gclib[course] @ git+https://github.com/OWNER/NAME"\nThen run this cell again."""
    if sys.platform == "emscripten":
        words = "This Python runs in your browser, and PyTorch does not. Open the notebook in JupyterLab on a computer."
    raise NotHere(words)
