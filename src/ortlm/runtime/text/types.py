"""Types of what chat templates are given; whoever names them need not load jinja2."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Message = Mapping[str, Any]
