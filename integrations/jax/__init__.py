"""JAX: `attach` watches a Flax Linen model or a function; `tap` marks the head of a hand-written net."""

from gwa_logging.integrations.jax.accumulate import AlignmentState
from gwa_logging.integrations.jax.adapter import JaxAdapter, attach, subject
from gwa_logging.integrations.jax.find_head import describe
from gwa_logging.integrations.jax.probe import tap

SEVERAL_HEADS = False
"""Whether head= takes a list: each step returns the scores of one head."""

__all__ = ["AlignmentState", "JaxAdapter", "attach", "describe", "subject", "tap"]
