# SPDX-License-Identifier: Apache-2.0
"""How many files may be open, and how many maps of files are kept."""

import resource

# maps of an index's files, of a cache's, and of clusters' that are kept open; each holds a file
# descriptor
MAPS = 512


def allow_open_files(num_files: int) -> None:
    """Raise the soft limit on open files where the reader, which opens every archive, needs it.

    Raises:
        RuntimeError: the hard limit is too low.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    # the limit is for the process: leave room for other loaders, sockets and libraries
    needed = 2 * num_files + 3 * MAPS + 1024
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise RuntimeError(
            f"data: {num_files} archives need a limit of {needed} open files; the hard "
            f"limit is {hard}; raise it (ulimit -Hn {needed}) or use fewer, larger shards"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
