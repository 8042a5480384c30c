"""Assigns sample ids to forward passes of the head.

`Monitor.tag` puts the ids here, and the head's next counted forward pass takes them. While the model's forward runs
(`begin_forward` to `end_forward`), every call of the head gets the same ids.

The compiler traces `take_next`, `begin_forward` and `end_forward`. It guards on the booleans that they read, so these must
have the same values at the start of every pass. It does not guard on the tags.
"""

from threading import get_ident

from gwa_logging.ledger import TaggedBatch


class Tag:
    """The ids of one pass, or None; wrapped in an object, because the compiler would guard on tensors."""

    def __init__(self, samples: TaggedBatch | None) -> None:
        self.samples = samples


UNTAGGED = Tag(None)


class Tags:
    """The ids that wait for a pass.

    Attributes:
        paused: True between `pause` and `resume`, while no pass takes ids.
    """

    def __init__(self) -> None:
        self.paused = False
        self._next = UNTAGGED
        self._held = UNTAGGED  # what was in `_next` before `pause`
        self._in_forward = False
        self._is_taken = False
        self._thread = get_ident()
        self._by_thread: dict[int, Tag] | None = None  # once two threads have tagged at the same time

    def put(self, samples: TaggedBatch) -> None:
        """Sets the ids of the next counted pass of this thread."""
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
        """Takes the ids of the running eager pass."""
        if self._by_thread is not None:
            return self._by_thread.pop(get_ident(), UNTAGGED)
        return self.take_next()

    def take_next(self) -> Tag:
        """Takes the ids of the running pass, in any thread."""
        tag = self._next
        if self._in_forward:
            self._is_taken = True
        else:
            self._next = UNTAGGED
        return tag

    def give_back(self, tag: Tag) -> None:
        """Keeps the ids of a pass that was not counted for the next pass, unless that has ids already."""
        if self._by_thread is not None:
            self._by_thread.setdefault(get_ident(), tag)
        elif self.paused:
            self._held = tag if self._held is UNTAGGED else self._held
        elif self._next is UNTAGGED:
            self._next = tag

    def use(self, tag: Tag) -> None:
        """Marks the ids as used by a counted pass, so that `give_back` does not give them to another pass."""
        if self._next is tag and not self._in_forward:
            self._next = UNTAGGED

    def begin_forward(self) -> None:
        """Marks the beginning of the model's forward, in which all calls of the head get the same ids."""
        self._in_forward = True
        self._is_taken = False

    def end_forward(self) -> None:
        """Marks the end of the model's forward."""
        self._in_forward = False
        if self._is_taken:
            self._next = UNTAGGED
        self._is_taken = False

    def pause(self) -> None:
        """Holds ids back. Compiled passes take what is in `_next`, so that is emptied."""
        self.paused = True
        self._held, self._next = self._next, UNTAGGED

    def resume(self) -> None:
        """Lets passes take ids again."""
        self.paused = False
        self._held, self._next = UNTAGGED, self._held
