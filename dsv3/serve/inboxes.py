"""Who waits for the events of which request."""

import asyncio

from dsv3.infer.events import FinishReason, TokenEvent
from dsv3.serve.messages import Refused

Inbox = asyncio.Queue[TokenEvent | Refused]


class Inboxes:
    """A queue of events for each request that has not ended."""

    def __init__(self) -> None:
        self._inboxes: dict[str, Inbox] = {}

    def __len__(self) -> int:
        return len(self._inboxes)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._inboxes

    @property
    def ids(self) -> list[str]:
        """Of all requests that have not ended."""
        return list(self._inboxes)

    def open(self, request_id: str) -> Inbox:
        """Return a new queue, which is closed by the last event or by `close`."""
        self._inboxes[request_id] = asyncio.Queue()
        return self._inboxes[request_id]

    def deliver(self, event: TokenEvent | Refused) -> None:
        """Give an event to whoever waits for it; if nobody does, it is dropped."""
        is_last = isinstance(event, Refused) or event.finish_reason is not None
        inbox = self._inboxes.pop(event.id, None) if is_last else self._inboxes.get(event.id)
        if inbox is not None:
            inbox.put_nowait(event)

    def fail(self, request_id: str, error: str) -> None:
        """Tell whoever waits that there is no more to come."""
        self.deliver(TokenEvent(id=request_id, finish_reason=FinishReason.FAILED, error=error))

    def close(self, ids: list[str]) -> list[str]:
        """Forget requests; return those of them that had not ended."""
        return [request_id for request_id in ids if self._inboxes.pop(request_id, None) is not None]
