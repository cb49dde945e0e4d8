"""How much a key may ask for: requests a minute and megapixel-steps an hour, counted in Redis for all gateways.

`gateway/cost.py` says what a request costs. Both quotas are token buckets: full at first, refilled evenly over the
window, by the clock of Redis. A request takes from both or from none.
"""

from __future__ import annotations

from dataclasses import dataclass

from gateway.keys import ApiKey
from gateway.state import State
from services.errors import QuotaExceeded

MINUTE_S, HOUR_S = 60.0, 3600.0


@dataclass(frozen=True, slots=True)
class Quotas:
    """The quotas of every key, shared by all gateways of one Redis."""

    state: State

    async def take(self, key: ApiKey, cost: float) -> None:
        """Counts one request of that cost.

        Raises:
            QuotaExceeded: says which quota, and when there will be enough; nothing was counted then.
            StateStoreDown: Redis does not answer.
        """
        allowances = _allowances(key, 1.0, cost)
        if not allowances:
            return
        if 0 < key.cost_per_hour < cost:
            raise QuotaExceeded(
                f"the request costs {cost:.6g} megapixel-steps (width * height * frames * steps / 10^6): key "
                f"{key.name!r} may never use more than its {key.cost_per_hour:.6g} an hour at once"
            )
        wait_s, number = await self.state.charge(key.id, allowances)
        if wait_s > 0:
            spent = allowances[number]
            what = "requests a minute" if spent[2] == MINUTE_S else "megapixel-steps an hour"
            asked = "" if spent[2] == MINUTE_S else f", and this request costs {cost:.6g}"
            raise QuotaExceeded(
                f"key {key.name!r} has used its {spent[1]:.6g} {what}{asked}: try again in {wait_s:.1f} s",
                retry_after_s=wait_s,
            )

    async def give_back(self, key: ApiKey, cost: float) -> None:
        """Undoes `take` for a request that was not stored."""
        if allowances := _allowances(key, -1.0, -cost):
            await self.state.charge(key.id, allowances)


def _allowances(key: ApiKey, requests: float, cost: float) -> list[tuple[float, float, float]]:
    """(amount, limit, window in seconds) of each quota that the key has."""
    both = ((requests, key.requests_per_minute, MINUTE_S), (cost, key.cost_per_hour, HOUR_S))
    return [allowance for allowance in both if allowance[1] > 0]
