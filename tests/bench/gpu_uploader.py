"""A client in a process of its own, started before anything is timed: for each line "PORT NAME FILE" on standard input
it uploads the file as that adapter, and answers with a line of JSON: when it began, had sent it all, and ended, and the
status.

Times are of the clock that all processes of a machine share.
"""

from __future__ import annotations

import http.client
import json
import sys
import time
from pathlib import Path


def main() -> None:
    for line in sys.stdin:
        port, name, file = line.split()
        connection = http.client.HTTPConnection("127.0.0.1", int(port), timeout=120)
        with Path(file).open("rb") as body:
            began = time.perf_counter()
            connection.request("PUT", f"/v1/adapters/{name}", body=body)
            sent = time.perf_counter()
            reply = connection.getresponse()
            answer = reply.read().decode()
        times = {"began": began, "sent": sent, "ended": time.perf_counter(), "status": reply.status}
        print(json.dumps(times | {"answer": answer[:500]}), flush=True)


if __name__ == "__main__":
    main()
