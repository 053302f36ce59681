"""The client of the activation cache: ask a `sagsae serve` for stores, follow its jobs, lease and pin.

from shared.service import Client
"""

from shared.service.client import Client

__all__ = ["Client"]
