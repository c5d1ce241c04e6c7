"""Variables with names that are almost right, which would otherwise change nothing, without a word."""

import difflib
import logging
import os
from typing import Set

_logger = logging.getLogger("syncbn")

OF_WORKERS = frozenset(
    """
    SYNCBN_ADDRESS SYNCBN_CLIENT_CERT_FILE SYNCBN_CLIENT_KEY_FILE SYNCBN_CLIENT_TRUSTED_CA_FILE SYNCBN_DESCRIPTION
    SYNCBN_GENERATION SYNCBN_GROUP SYNCBN_HTTP_ADDRESS SYNCBN_INSPECTION_TOKEN SYNCBN_JOB SYNCBN_JOIN_TIMEOUT SYNCBN_LIBRARY
    SYNCBN_MIN_WORKERS SYNCBN_ON_WORKER_LOST SYNCBN_REJOIN_GRACE SYNCBN_SHARED_MEMORY SYNCBN_SHARED_MEMORY_DIR
    SYNCBN_STREAM_ORDERED SYNCBN_TARGET SYNCBN_TIMEOUT SYNCBN_TOKEN
    """.split()
)
# The flags of syncbn-master: they may be set for a whole host.
OF_MASTERS = frozenset(
    """
    SYNCBN_ADDRESS SYNCBN_AUTO_TLS SYNCBN_CERT_FILE SYNCBN_CLIENT_CERT_AUTH SYNCBN_CONFIG_FILE SYNCBN_EXIT_TIMEOUT
    SYNCBN_HTTP_ADDRESS SYNCBN_IDENTITY_TEMPLATE SYNCBN_INSECURE SYNCBN_INSPECTION SYNCBN_INSPECTION_TOKEN
    SYNCBN_INSPECTION_TOKEN_FILE SYNCBN_KEY_FILE SYNCBN_LOG_FORMAT SYNCBN_LOG_LEVEL SYNCBN_MAX_CHANNELS SYNCBN_MAX_CONNECTIONS
    SYNCBN_MAX_CONNECTIONS_PER_ADDRESS SYNCBN_MAX_GROUPS SYNCBN_MAX_LIFETIME SYNCBN_MAX_RETAINED_BYTES SYNCBN_MAX_WORKERS
    SYNCBN_METRICS_MAX_RANKS SYNCBN_REFLECTION SYNCBN_SHARED_MEMORY SYNCBN_SHARED_MEMORY_DIR SYNCBN_STATE_DIR SYNCBN_TOKEN
    SYNCBN_TOKEN_FILE SYNCBN_TRUSTED_CA_FILE SYNCBN_WATCHDOG
    """.split()
)
# The part of two names that has to be alike: "SYNCBN_TRAGET" is meant for SYNCBN_TARGET, and the SYNCBN_PORT that Kubernetes
# sets for a service "syncbn" is not meant for anything here.
_ALIKE = 0.86
_told: Set[str] = set()


def warn_of_misspelled() -> None:
    """Logs a warning for each variable that is almost one of these; once in a process."""
    known = OF_WORKERS | OF_MASTERS
    for name in sorted(os.environ):
        if not name.startswith("SYNCBN") or name in known or name in _told:
            continue
        nearest = difflib.get_close_matches(name, sorted(known), 1, _ALIKE)
        if nearest:
            _told.add(name)
            _logger.warning("the variable %s is not known, and changes nothing; %s is", name, nearest[0])
