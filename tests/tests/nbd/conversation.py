# The conversation of a client that asks for everything, and for what is not allowed; for libnbd's nbdsh, which has the handle `h`.
# The export has 64 MiB.
import errno
import os

size = 64 << 20
uri = os.environ["URI"]


def refused(code, call, *args, **kwargs):
    try:
        call(*args, **kwargs)
    except nbd.Error as error:
        assert error.errnum in code, (call, error.errnum, error.string)
    else:
        raise AssertionError(f"{call} {args} {kwargs} was accepted")


# Options, before an export is chosen.
h.set_opt_mode(True)
h.set_full_info(True)
h.add_meta_context("base:allocation")
h.connect_uri(uri)
assert h.get_protocol() == "newstyle-fixed"
assert h.get_structured_replies_negotiated()
exports = []
h.opt_list(lambda name, description: exports.append(name))
assert exports == ["d"], exports
contexts = []
h.opt_list_meta_context(contexts.append)
assert contexts == ["base:allocation"], contexts
h.set_export_name("none")
refused([errno.ENOENT], h.opt_info)
h.set_export_name("d")
h.opt_info()
assert h.get_size() == size
assert not h.is_read_only() and h.can_flush() and h.can_fua() and h.can_trim() and h.can_zero() and h.can_fast_zero()
assert h.can_df() and h.can_cache() and not h.can_multi_conn()
assert h.get_block_size(nbd.SIZE_MAXIMUM) == 32 << 20
h.opt_go()
assert h.can_meta_context("base:allocation")

# What libnbd would refuse by itself goes to the server.
h.set_strict_mode(0)
refused([errno.EINVAL], h.pread, 512, size)
refused([errno.EINVAL], h.pread, 1024, size - 512)
refused([errno.EINVAL, errno.ENOSPC], h.pwrite, bytes(1024), size - 512)
refused([errno.EINVAL, errno.ENOSPC], h.zero, 1024, size - 512)
refused([errno.EINVAL, errno.ENOSPC], h.trim, 1 << 31, size - 512)
refused([errno.EINVAL], h.block_status, 1024, size - 512, lambda *_: 0)
refused([errno.EINVAL], h.pwrite, bytes(512), 0, flags=0x4000)
refused([errno.EINVAL], h.flush, flags=0x4000)
refused([errno.EINVAL], h.pread, 512, (1 << 63) - 512)

# Everything that is allowed.
h.pwrite(b"\x11" * 65536, 0)
h.pwrite(b"\x22" * 512, 1 << 20, flags=nbd.CMD_FLAG_FUA)
h.zero(4096, 4096)
h.zero(4096, 16384, flags=nbd.CMD_FLAG_NO_HOLE)
h.trim(4096, 32768)
h.cache(65536, 0)
h.flush()
assert h.pread(4096, 0) == b"\x11" * 4096
assert h.pread(4096, 4096) == bytes(4096)
assert h.pread(4096, 16384) == bytes(4096)
assert h.pread(512, 1 << 20, flags=nbd.CMD_FLAG_DF) == b"\x22" * 512
chunks = []
h.pread_structured(1 << 20, 0, lambda data, offset, kind, error: chunks.append((offset, len(data))))
assert sum(length for _, length in chunks) <= 1 << 20
extents = []
h.block_status(size, 0, lambda context, offset, entries, error: extents.extend(entries))
assert sum(extents[::2]) == size, extents
one = []
h.block_status(size, 0, lambda context, offset, entries, error: one.extend(entries), flags=nbd.CMD_FLAG_REQ_ONE)
assert len(one) == 2, one

# Many requests at a time; each answer is the right one, in whatever order they come.
writes = [h.aio_pwrite(nbd.Buffer.from_bytearray(bytearray([at % 251] * 4096)), (2 << 20) + at * 4096) for at in range(1000)]
while any(not h.aio_command_completed(cookie) for cookie in writes[-1:]) or h.aio_in_flight() > 0:
    h.poll(-1)
buffers = [nbd.Buffer(4096) for _ in range(1000)]
for at in reversed(range(1000)):
    h.aio_pread(buffers[at], (2 << 20) + at * 4096)
while h.aio_in_flight() > 0:
    h.poll(-1)
for at, buffer in enumerate(buffers):
    assert bytes(buffer.to_bytearray()) == bytes([at % 251] * 4096), at
h.shutdown()
print("all answered as the specification says")
