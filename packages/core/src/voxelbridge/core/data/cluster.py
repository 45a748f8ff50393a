"""Where the cases are computed: in processes of this machine or on a dask cluster."""

import logging
from collections.abc import Iterator
from concurrent.futures import Executor
from contextlib import contextmanager

from voxelbridge.core.errors import ConfigError, DataError

LOCAL = "local"
DASK = "dask:"
CONNECT_SECONDS = 10  # a scheduler that does not answer by then is not there


@contextmanager
def open_executor(spec: str) -> Iterator[Executor | None]:
    """The executor for `map_cases`: None for "local", a dask client's for "dask:ADDRESS".

    ADDRESS is the scheduler's ("tcp://host:8786" or "host:8786"). The workers must have this
    package installed and see the same folders under the same paths. A case whose worker dies is
    given to another one. Raises ConfigError for anything else and where dask is not installed,
    DataError where no scheduler answers within 10 seconds.
    """
    address = spec.removeprefix(DASK)
    if spec == LOCAL:
        yield None
        return
    if not spec.startswith(DASK) or not address.strip():
        raise ConfigError(f"executor {spec!r}: expected 'local' or 'dask:ADDRESS'")
    try:
        from distributed import Client
    except ImportError as error:
        raise ConfigError(
            f"executor {spec!r}: dask is not installed; install voxelbridge-core[cluster]"
        ) from error
    # Its own retries are told by one line of ours; the log lines would stand between progress.
    logging.getLogger("distributed").setLevel(logging.CRITICAL)
    try:
        client = Client(address, timeout=CONNECT_SECONDS, set_as_default=False)
    except (OSError, TimeoutError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(
            f"executor {spec!r}: no dask scheduler answers ({reason}); start one with "
            "'dask scheduler' or correct the address"
        ) from error
    try:
        if not client.scheduler_info()["workers"]:
            raise DataError(f"executor {spec!r}: the scheduler has no worker; start 'dask worker'")
        # pure=False: equal arguments are still separate cases with effects on the disk
        yield client.get_executor(pure=False)
    finally:
        client.close()
