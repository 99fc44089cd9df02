"""Where recorded results are."""

from runner import RESULTS as RESULTS
