"""Which ids belong to which forward pass of the head.

`Monitor.tag` leaves the ids here, and the head's next counted forward pass takes them. While the model's own forward runs
(`begin_forward` to `end_forward`), every call of the head gets the same ids.

The compiler traces `take_next`, `begin_forward` and `end_forward`. It compares the booleans that they read, so these must
have the same value at the start of every pass, but it does not compare the tags.
"""

from threading import get_ident

from gwa_logging.ledger import TaggedBatch


class Tag:
    """The ids of one pass, or None: a box, since the compiler looks at tensors, not into boxes."""

    def __init__(self, samples: TaggedBatch | None) -> None:
        self.samples = samples


UNTAGGED = Tag(None)


class Tags:
    """The ids that wait for a pass.

    Attributes:
        paused: True while no pass takes any: set by `pause` and `resume`.
    """

    def __init__(self) -> None:
        self.paused = False
        self._next = UNTAGGED
        self._held = UNTAGGED  # while paused, what was in `_next`
        self._in_forward = False
        self._is_taken = False
        self._thread = get_ident()
        self._by_thread: dict[int, Tag] | None = None  # once two threads have tagged at the same time

    def put(self, samples: TaggedBatch) -> None:
        """Leaves the ids of the next counted pass of this thread."""
        tag, thread = Tag(samples), get_ident()
        if thread != self._thread and self._by_thread is None:
            waits = (self._held if self.paused else self._next) is not UNTAGGED
            if waits and not self._is_taken:  # another thread's pass has not begun yet
                self._by_thread = {self._thread: self._held if self.paused else self._next}
                self._next = self._held = UNTAGGED
            self._thread = thread
        if self._by_thread is not None:
            self._by_thread[thread] = tag
        elif self.paused:
            self._held = tag
        else:
            self._next = tag
        self._is_taken = False

    def take(self) -> Tag:
        """The ids of the eager pass that is running."""
        if self._by_thread is not None:
            return self._by_thread.pop(get_ident(), UNTAGGED)
        return self.take_next()

    def take_next(self) -> Tag:
        """The ids of the pass that is running, whichever thread it is in."""
        tag = self._next
        if self._in_forward:
            self._is_taken = True
        else:
            self._next = UNTAGGED
        return tag

    def give_back(self, tag: Tag) -> None:
        """Keeps the ids of a pass that was not counted for the next one, unless that has ids already."""
        if self._by_thread is not None:
            self._by_thread.setdefault(get_ident(), tag)
        elif self.paused:
            self._held = tag if self._held is UNTAGGED else self._held
        elif self._next is UNTAGGED:
            self._next = tag

    def use(self, tag: Tag) -> None:
        """Notes that a pass with these ids was counted, so that no other one gets them by `give_back`."""
        if self._next is tag and not self._in_forward:
            self._next = UNTAGGED

    def begin_forward(self) -> None:
        """The model's forward begins: all of the head's calls in it get the same ids."""
        self._in_forward = True
        self._is_taken = False

    def end_forward(self) -> None:
        """The model's forward has ended."""
        self._in_forward = False
        if self._is_taken:
            self._next = UNTAGGED
        self._is_taken = False

    def pause(self) -> None:
        """Ids wait from now on. Compiled passes take what `_next` holds, so that is emptied."""
        self.paused = True
        self._held, self._next = self._next, UNTAGGED

    def resume(self) -> None:
        """Passes take ids again."""
        self.paused = False
        self._held, self._next = UNTAGGED, self._held
