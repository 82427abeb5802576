"""Our own decode step for CPUs: a whole token in one call, compiled on first use.

``adopt`` looks at a loaded model once, moves its quantized layers into the step's format, and
returns the step, or the reason why torch decodes.
"""

from __future__ import annotations

from gptcore.kernels.library import unavailable

__all__ = ["unavailable"]
