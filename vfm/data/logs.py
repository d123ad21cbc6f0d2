"""Logs of a small service, written by a procedure: a source of log-like text that needs no files."""

from collections.abc import Mapping

import numpy as np

from vfm.data.records import check_split, stream
from vfm.errors import UserError

HOSTS = ("web-01", "web-02", "web-03", "db-01", "db-02", "cache-01", "batch-01")
USERS = ("alice", "bob", "carol", "dave", "erin", "frank", "grace", "heidi", "ivan", "judy", "mallory", "oscar")
PATHS = ("/", "/login", "/cart", "/search", "/items/{n}", "/items/{n}/reviews", "/users/{n}", "/app.js", "/health")
JOBS = ("backup", "reindex", "report", "cleanup", "billing")
LEVELS = {"request": "INFO", "login": "INFO", "refused": "WARN", "job": "INFO", "query": "DEBUG", "disk": "WARN"}
SHARES = {"request": 0.5, "login": 0.1, "refused": 0.06, "job": 0.12, "query": 0.16, "disk": 0.06}


class Logs:
    """Logs of `lines` lines each, of a service with users, requests, queries and jobs. No real system wrote them.

    What a reader can learn, from easy to hard: the template of a line, the order of time stamps, which host does what,
    few paths and users that are frequent (Zipf), that who has logged in makes requests from the same address until the
    log ends, that a job's last line has the number and the host of its first and takes the time that has passed, that
    a failed request is followed by an error with its identifier, and that sums of bytes add up.
    sizes: {split: items}. Item i of a split is a pure function of (seed, split, i): text str.
    """

    def __init__(self, split: str, sizes: Mapping[str, int] | None = None, lines: int = 40, seed: int = 0):
        sizes = {"train": 2000, "validation": 200, "test": 200, **(sizes or {})}
        self.split = check_split(split, sizes, "source 'logs'")
        if lines < 1 or sizes[split] < 1:
            raise UserError(f"source 'logs': lines={lines} and sizes.{split}={sizes[split]} must be at least 1")
        self.size, self.lines, self.seed = int(sizes[split]), lines, seed
        self.labels = None

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict:
        index = range(self.size)[index]
        return {"text": _write(stream(self.seed, "logs", self.split, index), self.lines)}


def _write(rng: np.random.Generator, count: int) -> str:
    zipf = lambda options: options[min(int(rng.pareto(1.1)), len(options) - 1)]
    one_of = lambda options: options[int(rng.integers(len(options)))]
    clock = int(rng.integers(86_400_000))  # milliseconds of the day
    date = f"2024-{rng.integers(1, 13):02d}-{rng.integers(1, 29):02d}"
    sessions: list[list] = []  # [user, address, bytes so far]
    jobs: list[tuple] = []
    lines: list[str] = []

    def say(level: str, host: str, text: str) -> None:
        ms = clock % 86_400_000
        time = f"{ms // 3_600_000:02d}:{ms // 60_000 % 60:02d}:{ms // 1000 % 60:02d}.{ms % 1000:03d}"
        lines.append(f"{date} {time} {level:5} {host} {text}")

    while len(lines) < count:
        clock += 1 + int(rng.exponential(400))
        kind = str(rng.choice(tuple(SHARES), p=tuple(SHARES.values())))
        level, number = LEVELS[kind], int(rng.integers(100, 1000))
        if kind == "login" or (kind == "request" and not sessions):
            address = f"10.{rng.integers(4)}.{rng.integers(256)}.{rng.integers(1, 255)}"
            sessions.append([zipf(USERS), address, 0])
            say("INFO", one_of(HOSTS[:3]), f"auth: session opened for {sessions[-1][0]} from {address}")
        elif kind == "request":
            session, host, size = one_of(sessions), one_of(HOSTS[:3]), int(rng.lognormal(6, 1))
            path, failed = zipf(PATHS).replace("{n}", str(number)), rng.random() < 0.08
            session[2] += 0 if failed else size
            status = 500 if failed else 200
            request, who = f"{int(rng.integers(16**6)):06x}", f"{session[0]} {session[1]}"
            say(level, host, f"http: {who} GET {path} {status} {size} total={session[2]} id={request}")
            if failed:
                clock += 1
                say("ERROR", host, f"http: id={request} upstream {one_of(HOSTS[3:5])} timed out for {path}")
        elif kind == "refused":
            say(level, one_of(HOSTS[:3]), f"auth: password refused for {zipf(USERS)}, try {rng.integers(1, 4)} of 3")
        elif kind == "query":
            took = int(rng.lognormal(2, 1))
            say(level, one_of(HOSTS[3:5]), f"sql: SELECT * FROM items WHERE id={number} took {took} ms rows={took % 7}")
        elif kind == "job" and jobs and rng.random() < 0.6:
            name, job, host, began = jobs.pop(0)
            say(level, host, f"job: {name} #{job} finished after {clock - began} ms")
        elif kind == "job":
            jobs.append((one_of(JOBS), number, HOSTS[6], clock))
            say(level, HOSTS[6], f"job: {jobs[-1][0]} #{number} started")
        else:
            free = int(rng.integers(1, 20))
            say(level, one_of(HOSTS), f"disk: /var is {100 - free}% full, {free}% free")
    return "\n".join(lines[:count]) + "\n"
