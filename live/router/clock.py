"""The router's clock, which never jumps; finer than the event loop's own."""

import time

now_s = time.monotonic
