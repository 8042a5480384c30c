"""Shows the user a line that is neither a warning nor an error, such as where the journal is."""

import logging
import sys

from gwa_logging._epoch_bar import clear_bars

logger = logging.getLogger("gwa_logging")


def announce(text: str) -> None:
    """Shows a line to the user: through logging if that is set up for it, else on stderr."""
    if logger.level != logging.NOTSET or logger.isEnabledFor(logging.INFO):
        logger.info("gwa_logging: %s", text)
    else:
        clear_bars()
        sys.stderr.write(f"gwa_logging: {text}\n")
