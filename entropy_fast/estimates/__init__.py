"""What may be concluded from the influence kernel: the estimate and its standard errors."""

from entropy_fast.estimates.two_batch import TwoBatchEstimate, two_batch_estimate
from entropy_fast.estimates.u_statistic import UEstimate, u_estimate

__all__ = ["TwoBatchEstimate", "UEstimate", "two_batch_estimate", "u_estimate"]
