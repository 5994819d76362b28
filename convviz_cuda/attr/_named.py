"""What a method is called."""

from __future__ import annotations

import re


class Named:
    """A method whose name is its class's, in words."""

    @classmethod
    def get_name(cls) -> str:
        """Such as "Layer Grad Cam", as Captum's methods have it."""
        return re.sub(r"(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", " ", cls.__name__)
