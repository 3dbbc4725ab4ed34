"""What pages need after they are rendered: docstrings name other objects by Sphinx roles."""

import re
from typing import Any

_ROLE = re.compile(r":(?:func|class|mod|meth|attr|data|exc):<code>~?([^<]+)</code>")


def on_page_content(html: str, **_: Any) -> str:
    """Leave of ``:func:`name``` the name."""
    return _ROLE.sub(r"<code>\1</code>", html)
