"""Ends with 0 when HAProxy answers on the Unix socket of the argument: its host may have the shared address then."""

import socket
import sys

#: Less than what keepalived gives it.
SECONDS = 3


def main() -> int:
    with socket.socket(socket.AF_UNIX) as asked:
        asked.settimeout(SECONDS)
        try:
            asked.connect(sys.argv[1])
            asked.sendall(b"GET / HTTP/1.0\r\n\r\n")
            return 0 if b" 200 " in asked.recv(64) else 1
        except OSError as error:
            print(error, file=sys.stderr)
            return 1


if __name__ == "__main__":
    sys.exit(main())
