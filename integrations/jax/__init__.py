"""JAX: `attach` watches a model of Flax, Equinox, Haiku or Keras, or a function; `tap` marks the head of a hand-written net."""

from gwa_logging.integrations.jax.accumulate import AlignmentState
from gwa_logging.integrations.jax.adapter import JaxAdapter, attach, subject
from gwa_logging.integrations.jax.find_head import describe
from gwa_logging.integrations.jax.linear_cross_entropy import linear_cross_entropy
from gwa_logging.integrations.jax.probe import tap

SEVERAL_HEADS = False
"""`watch(head=)` does not accept a list: each step returns the scores of one head."""

__all__ = ["AlignmentState", "JaxAdapter", "attach", "describe", "linear_cross_entropy", "subject", "tap"]
