"""The process beside process 0 that the others meet at; started by `vfm.distributed`, run as a file.

It holds the coordination service of `jax.distributed`, and one TCP connection from every process. The
kernel closes the sockets of a dead process at once, so the others are told which one it was. It is a
process of its own so that it outlives process 0: a lost coordination service aborts every process within a
millisecond, before it can say why.

Lines from a process: "<token> <process> <host>" first, then "bye" or "failing". To a process: "failing",
when another one is about to stop because of an error of its own, and "stopped <process> <host>". It ends
when process 0 has closed its standard input and no connection is left.
"""

import contextlib
import json
import os
import secrets
import selectors
import signal
import socket
import sys
import time

FAILING_SECONDS = 2  # a process with the same error of its own may tell it before a peer's end stops it
_PORT_SECONDS = 10  # until the coordinator of an earlier run has left the port


class Link:
    """One connection, read in lines."""

    def __init__(self, sock: socket.socket):
        self.sock, self.rest, self.said = sock, b"", []

    def read(self) -> bool:
        """Takes what has come into `said`; False when the other end is closed."""
        try:
            data = self.sock.recv(4096)
        except OSError:
            data = b""
        *lines, self.rest = (self.rest + data).split(b"\n")
        self.said += [line.decode(errors="replace") for line in lines]
        return bool(data)

    def write(self, line: str) -> None:
        with contextlib.suppress(OSError):
            self.sock.sendall(line.encode() + b"\n")


def listen(port: int = 0) -> socket.socket:
    """A server socket on all addresses, IPv6 too where there is any."""
    if socket.has_dualstack_ipv6():
        with contextlib.suppress(OSError):
            return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", port))


def wait_for_port(port: int) -> None:
    """Waits until nothing listens on the port: gRPC would share it with another service, and mix two runs."""
    deadline = time.monotonic() + _PORT_SECONDS
    while True:
        try:
            return listen(port).close()
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)


def watch(server: socket.socket, token: str) -> None:
    """Tells every process of the end of any other, until nobody is left."""
    selector = selectors.DefaultSelector()
    selector.register(server, selectors.EVENT_READ)
    selector.register(sys.stdin.fileno(), selectors.EVENT_READ)
    names: dict[Link, str] = {}  # "<process> <host>" of those that have said hello
    announce: list[tuple[float, str]] = []  # (time, name) of the lost
    open_stdin = True

    def tell(line: str) -> None:
        for link in names:
            link.write(line)

    while names or open_stdin:
        pause = max(0, min(when for when, _ in announce) - time.monotonic()) if announce else None
        for key, _ in selector.select(pause):
            if key.fileobj is server:
                link = Link(server.accept()[0])
                selector.register(link.sock, selectors.EVENT_READ, link)
            elif key.data is None:
                open_stdin = bool(os.read(key.fd, 4096))
                if not open_stdin:
                    selector.unregister(key.fileobj)
            else:
                link = key.data
                alive = link.read()
                if link not in names and link.said:
                    hello, _, name = link.said[0].partition(" ")
                    alive = alive and hello == token
                    if alive:
                        names[link] = name
                if alive:
                    continue
                selector.unregister(link.sock)
                link.sock.close()
                name = names.pop(link, None)  # without a name it is a stranger
                if name and "bye" not in link.said:
                    failing = "failing" in link.said
                    if failing:
                        tell("failing")
                    announce.append((time.monotonic() + FAILING_SECONDS * failing, name))
        for entry in [entry for entry in announce if entry[0] <= time.monotonic()]:
            announce.remove(entry)
            tell(f"stopped {entry[1]}")


def main() -> None:
    # A signal to the whole job is for the processes that compute; this one ends after them.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    address, count, options = json.loads(sys.argv[1])
    try:
        wait_for_port(int(address.rpartition(":")[2]))
        from jaxlib import _jax

        service = _jax.get_distributed_runtime_service(address, count, **options)
        server = listen()
    except Exception as error:
        print(f"error {address}: {error}", flush=True)
        return
    token = secrets.token_hex(16)  # a stray connection must not look like a process that died
    print(f"ready {server.getsockname()[1]} {token}", flush=True)
    watch(server, token)
    service.shutdown()


if __name__ == "__main__":
    main()
