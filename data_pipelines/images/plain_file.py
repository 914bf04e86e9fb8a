"""Files of others, opened without being caught: by a pipe that nobody writes to, or a device."""

import errno
import os
import stat

NOT_PLAIN = "a pipe, a device or a socket, not a file"


def open_plain(path: str | os.PathLike[str]) -> int:
    """A descriptor of a plain file, for reading.

    Raises:
        OSError: it cannot be opened, or is something else: a pipe would be waited for, and a device
            read without end.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    mode = os.fstat(descriptor).st_mode
    if stat.S_ISREG(mode):
        return descriptor
    os.close(descriptor)
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    raise OSError(errno.EINVAL, NOT_PLAIN)


# The data files of CIFAR are 184 MB at most; the largest photo of ImageNet has 16 MB.
LARGEST_MEMBER = 256 * 2**20
