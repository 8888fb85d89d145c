"""A project's rates as OpenAI's `x-ratelimit-*` headers."""

import math

from tunery.traffic.rates import Bucket, Standing


def of(standing: Standing) -> dict[str, str]:
    """Returns the headers of an answer. A rate without a limit has none."""
    named = {"requests": standing.requests, "tokens": standing.tokens}
    return {
        f"x-ratelimit-{what}-{unit}": value
        for unit, bucket in named.items()
        if bucket.limit is not None
        for what, value in _of_bucket(bucket, bucket.limit).items()
    }


def _of_bucket(bucket: Bucket, limit: int) -> dict[str, str]:
    left = max(0, math.floor(bucket.left))
    return {"limit": str(limit), "remaining": str(left), "reset": spell(bucket.seconds_until(limit))}


def spell(seconds: float) -> str:
    """Returns a duration as OpenAI spells it: 20ms, 1s, 6m0s."""
    if seconds < 1:
        return f"{math.ceil(seconds * 1000)}ms"
    whole = math.ceil(seconds)
    return f"{whole}s" if whole < 60 else f"{whole // 60}m{whole % 60}s"
