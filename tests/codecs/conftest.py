"""How hypothesis runs here: no deadlines, since machines are shared; a failing example prints what reproduces it."""

from __future__ import annotations

from hypothesis import settings

settings.register_profile("codecs", deadline=None, max_examples=50, print_blob=True)
settings.load_profile("codecs")
