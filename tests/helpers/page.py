"""What a widget shows, read as a person or a screen reader would."""

import re
from html import unescape


def text_of(shown):
    """The words of an HTML widget."""
    return unescape(re.sub(r"<[^>]+>", "", shown.value))


def alt_of(lab):
    """The alt text of a widget's picture."""
    if hasattr(lab.picture, "alt"):
        return lab.picture.alt
    return unescape(re.search(r'alt="([^"]*)"', lab.picture.value)[1])
