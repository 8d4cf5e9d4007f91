"""fastddr: train graders of diabetic retinopathy from fundus photographs, as fast as the hardware allows."""

from __future__ import annotations

__version__ = "0.1.0"
