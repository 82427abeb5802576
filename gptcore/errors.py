"""Everything that a user can cause and that we refuse in one sentence.

GptcoreError            the root: its text is one sentence with the value, the limit and the way out
├── InvalidInput        a prompt, a setting or a file is not what it must be
│   ├── InvalidSpec     a shape contradicts itself or is out of range
│   ├── InvalidWeights  a weight file is damaged, foreign, dangerous, or does not match its shape
│   ├── ContextOverflow the prompt and the new tokens do not fit into the model's context
│   └── UnknownModel    no model of that name or path
├── DoesNotFit          the model needs more memory than the device has free
├── DeviceAbsent        the device is not on this machine, or this build cannot use it
├── DeviceBusy          another process holds the device
├── NumericalError      the model produced NaN or infinity
├── HostLost            the process that owned the device ended in the middle of the work
├── Cancelled           the user, or the end of their browser session, stopped the work
├── StoreError          the database cannot be used: locked, full, read-only, corrupt, newer
└── NetworkError        a hub could not be reached or answered with an error
"""

from __future__ import annotations


class GptcoreError(Exception):
    """The root of what a user can cause; ``kind`` names it in statistics and on the wire."""

    kind = "error"


class InvalidInput(GptcoreError):
    """A prompt, a setting or a file is not what it must be."""

    kind = "invalid_input"


class InvalidSpec(InvalidInput):
    """A model shape contradicts itself or is out of range."""

    kind = "invalid_spec"


class InvalidWeights(InvalidInput):
    """A weight file is damaged, foreign, dangerous, or does not match its shape."""

    kind = "invalid_weights"


class ContextOverflow(InvalidInput):
    """The prompt and the new tokens do not fit into the model's context."""

    kind = "context_overflow"


class UnknownModel(InvalidInput):
    """There is no model of that name or at that path."""

    kind = "unknown_model"


class DoesNotFit(GptcoreError):
    """The model needs more memory than the device has free."""

    kind = "does_not_fit"


class DeviceAbsent(GptcoreError):
    """The device is not on this machine, or this build of torch cannot use it."""

    kind = "device_absent"


class DeviceBusy(GptcoreError):
    """Another process holds the device."""

    kind = "device_busy"


class NumericalError(GptcoreError):
    """The model produced NaN or infinity."""

    kind = "numerical_error"


class HostLost(GptcoreError):
    """The process that owned the device ended in the middle of the work."""

    kind = "host_lost"


class Cancelled(GptcoreError):
    """The user, or the end of their browser session, stopped the work."""

    kind = "cancelled"


class StoreError(GptcoreError):
    """The database cannot be used: locked, full, read-only, corrupt or newer."""

    kind = "store_error"


class NetworkError(GptcoreError):
    """A hub could not be reached or answered with an error."""

    kind = "network_error"


def internal_error(error: Exception) -> tuple[str, str]:
    """Return kind and sentence for an error that is ours; the log has the rest."""
    last = f"{type(error).__name__}: {error}"
    return "internal_error", f"An error of this program, not yours: {last}. The log has more."


def _all_kinds(root: type[GptcoreError]) -> dict[str, type[GptcoreError]]:
    found = {root.kind: root}
    for child in root.__subclasses__():
        found |= _all_kinds(child)
    return found


KINDS = _all_kinds(GptcoreError)
"""Every class by its ``kind``, so that an error keeps its class across a pipe."""
