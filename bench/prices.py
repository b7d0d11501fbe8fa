"""List prices of AWS in dollars a million, on demand, without any free tier.

This is the one place for them in the benchmark. They are those of us-east-1 in June 2026;
DynamoDB's hold since November 2024.
"""

from __future__ import annotations

from typing import Final

WRITE_UNITS: Final = 0.625
READ_UNITS: Final = 0.125
SQS_REQUESTS: Final = 0.40
SQS_FIFO_REQUESTS: Final = 0.50
SNS_REQUESTS: Final = 0.50  # deliveries to SQS cost nothing
