"""The database: runs with their tokens, variants, measurements, and readings of the machine."""

from gptcore.store.store import Store, open_store
from gptcore.store.timeline import Latencies, Percentiles, Rates, Series

__all__ = ["Latencies", "Percentiles", "Rates", "Series", "Store", "open_store"]
