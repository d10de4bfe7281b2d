"""The plots: of one run (``run``), and of a study (``study``, ``cost``, ``weights``)."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
import textwrap
import warnings
from contextlib import chdir
from pathlib import Path
from unittest.mock import patch


def _import_matplotlib() -> None:
    """Import matplotlib; leave out the user's settings, with a note, where they make the import fail."""
    try:
        importlib.import_module("matplotlib")
    except (OSError, ValueError) as error:  # matplotlibrc is not UTF-8; MPLBACKEND is no backend
        why = textwrap.shorten(str(error), 160, placeholder=" …")
        warnings.warn(f"your settings of matplotlib are left out: {why}", stacklevel=2)
        spec = importlib.util.find_spec("matplotlib")
        assert spec is not None
        assert spec.origin is not None
        for name in [name for name in sys.modules if name.startswith("matplotlib.")]:
            del sys.modules[name]  # half of it was imported
        with patch.dict(os.environ), chdir(Path(spec.origin).parent / "mpl-data"):  # of its own matplotlibrc
            os.environ.pop("MPLBACKEND", None)
            importlib.import_module("matplotlib")


_import_matplotlib()
