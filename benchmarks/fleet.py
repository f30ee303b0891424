"""A simulation of many hosts that serve the 2B model: who balances, on what signal, what fails first, what it costs.

    python benchmarks/fleet.py --hosts 100 --seconds 30 --load 0.7,0.9,1.1
    python benchmarks/fleet.py --hosts 100 --seconds 90 --load 0.7 --fault slow,stalled,lost

Each host is an engine with 256 sequences. The time of its steps and the rate of its prefills were measured on an H100
(`results/2026-11-26-h100-front-ends.md`, `results/2026-11-25-h100-model.md`). Arrivals are random (Poisson); lengths
are log-normal around `--prompt-tokens` and `--output-tokens`. A load of 1 is what all hosts can do together.

Balancers, each but the last with its own knowledge only:

    random         a host at random
    round_robin    each of 100 clients takes its hosts in turn, as gRPC clients do
    least_request  each of 8 proxies takes the one of two random hosts with fewer of its own requests, as Envoy does
    reported       each proxy takes the one of two random hosts whose load, as reported each second, is lower
    picker         one process takes the best of all hosts, with their queues as scraped each 50 ms
    ideal          the best of all hosts, with their queues as they are

Faults happen to host 0 at 10 s: `slow` (a quarter of the speed), `stalled` (no progress; health reports it after
60 s, as by `--stall-seconds`) and `lost` (its connections end at once). A host that refuses or has died is tried again
once, on another host.
"""

import argparse
import heapq
import random
import statistics
from bisect import bisect_right
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

SEQUENCES = 256
QUEUE_LIMIT = 8 * SEQUENCES
STEPS = ((1, 2.3e-3), (64, 4.1e-3), (256, 9.7e-3))
"""Seconds of a step at a number of sequences."""
PREFILL_RATE = 130_000.0
"""Prompt tokens a second."""
CLIENTS = 100
PROXIES = 8
REPORT_SECONDS = 1.0
SCRAPE_SECONDS = 0.05
FAULT_TIME = 10.0
WARM_UP = 8.0
"""Seconds before the first request that is measured."""
STALL_SECONDS = 60.0
COLUMNS = (
    " load ",
    " fault ",
    " balancer ",
    " TTFT p50 / p99, ms ",
    " ITL p50 / p99, ms ",
    " requests of a host: least / median / most ",
    " failed ",
    " overdue ",
    " tokens/s of a host ",
    " price of a million ",
)


@dataclass(eq=False)
class Request:
    """A request and what happens to it; times are in seconds.

    Attributes:
        source: the client or proxy that sends it.
        outcome: empty for a finished request.
    """

    source: int
    arrival: float
    prompt: int
    output: int
    tries: int = 0
    first_token: float = 0.0
    end: float = 0.0
    outcome: str = "unfinished"


def step_seconds(sequences: int) -> float:
    """Return the time of a step, from the measured ones."""
    right = min(max(1, bisect_right(STEPS, (sequences, 1.0))), len(STEPS) - 1)
    (x0, y0), (x1, y1) = STEPS[right - 1 : right + 1]
    return y0 + (y1 - y0) * (sequences - x0) / (x1 - x0)


@dataclass(eq=False)
class Host:
    """An engine. All running sequences get a token a step; a prompt that is prefilled stops them meanwhile."""

    number: int
    factor: float = 1.0
    is_listed: bool = True
    clock: float = 0.0  # steps so far
    time: float = 0.0
    busy_until: float = 0.0  # with prefills, or forever
    running: list[tuple[float, int, Request]] = field(default_factory=list)  # by the step of their end
    waiting: deque[Request] = field(default_factory=deque)
    version: int = 0

    @property
    def load(self) -> int:
        """Number of running and waiting requests."""
        return len(self.running) + len(self.waiting)

    def advance(self, now: float) -> None:
        """Compute the steps until a time."""
        decoding = max(0.0, now - max(self.time, self.busy_until))
        if self.running:
            self.clock += decoding / (step_seconds(len(self.running)) * self.factor)
        self.time = now

    def admit(self, now: float) -> None:
        """Start waiting requests while there is room."""
        while self.waiting and len(self.running) < SEQUENCES:
            request = self.waiting.popleft()
            self.busy_until = max(self.busy_until, now) + self.factor * request.prompt / PREFILL_RATE
            request.first_token = self.busy_until + self.factor * step_seconds(len(self.running) + 1)
            heapq.heappush(self.running, (self.clock + request.output, id(request), request))

    def next_end(self) -> float:
        """Return the time at which the next running request ends."""
        steps = self.running[0][0] - self.clock
        return max(self.time, self.busy_until) + max(0.0, steps) * step_seconds(len(self.running)) * self.factor

    def finished(self) -> Iterator[Request]:
        """Remove and yield the requests that have ended."""
        while self.running and self.running[0][0] <= self.clock + 1e-6:
            yield heapq.heappop(self.running)[2]


class Policy(Protocol):
    """Chooses a host for a request."""

    def __call__(self, fleet: "Fleet", request: Request, hosts: Sequence[Host]) -> Host:
        """Return one of the hosts."""


def choose_random(fleet: "Fleet", request: Request, hosts: Sequence[Host]) -> Host:
    """Choose any."""
    return fleet.random.choice(hosts)


def choose_round_robin(fleet: "Fleet", request: Request, hosts: Sequence[Host]) -> Host:
    """Choose the next in the order of the client."""
    client = request.source % CLIENTS
    fleet.turns[client] += 1
    return hosts[(client * 37 + fleet.turns[client]) % len(hosts)]


def choose_least_request(fleet: "Fleet", request: Request, hosts: Sequence[Host]) -> Host:
    """Choose the one of two with fewer requests of this proxy."""
    own = fleet.sent[request.source % PROXIES]
    return min(fleet.random.choice(hosts), fleet.random.choice(hosts), key=lambda host: own[host.number])


def choose_reported(fleet: "Fleet", request: Request, hosts: Sequence[Host]) -> Host:
    """Choose the one of two that has reported the lower load."""
    return min(fleet.random.choice(hosts), fleet.random.choice(hosts), key=lambda host: fleet.reports[host.number])


def choose_picker(fleet: "Fleet", request: Request, hosts: Sequence[Host]) -> Host:
    """Choose the best by the last scrape and what was sent since."""
    best = min(hosts, key=lambda host: fleet.scrapes[host.number])
    fleet.scrapes[best.number] += 1
    return best


def choose_ideal(fleet: "Fleet", request: Request, hosts: Sequence[Host]) -> Host:
    """Choose the best."""
    return min(hosts, key=lambda host: host.load)


CHOOSERS: dict[str, Policy] = {
    "random": choose_random,
    "round_robin": choose_round_robin,
    "least_request": choose_least_request,
    "reported": choose_reported,
    "picker": choose_picker,
    "ideal": choose_ideal,
}


class Fleet:
    """Hosts, a balancer in front of them, and the requests so far."""

    def __init__(self, hosts: int, policy: str, fault: str, seed: int) -> None:
        self.random = random.Random(seed)
        self.hosts = [Host(number) for number in range(hosts)]
        self.turns = [0] * CLIENTS
        self.sent = [[0] * hosts for _ in range(PROXIES)]
        self.reports, self.scrapes = [0.0] * hosts, [0.0] * hosts
        self.requests: list[Request] = []
        self._choose = CHOOSERS[policy]
        self._fault = fault
        self._events: list[tuple[float, int, str, int]] = []  # the last is a version or a host's number
        self._count = 0

    def run(self, rate: float, seconds: float, prompt_tokens: int, output_tokens: int) -> None:
        """Send requests, `rate` a second."""
        self._push(0.0, "arrival", 0)
        self._push(0.0, "report", 0)
        self._push(0.0, "scrape", 0)
        if self._fault:
            self._push(FAULT_TIME, "fault", 0)
        if self._fault == "stalled":
            self._push(FAULT_TIME + STALL_SECONDS, "unlist", 0)
        while self._events and self._events[0][0] < seconds:
            now, _, kind, detail = heapq.heappop(self._events)
            match kind:
                case "arrival":
                    self._send(now, self._arrive(now, prompt_tokens, output_tokens))
                    self._push(now + self.random.expovariate(rate), "arrival", 0)
                case "end":
                    self._end(now, *divmod(detail, 1 << 40))
                case "report":
                    self.reports = [float(host.load) for host in self.hosts]
                    self._push(now + REPORT_SECONDS, "report", 0)
                case "scrape":
                    self.scrapes = [float(host.load) for host in self.hosts]
                    self._push(now + SCRAPE_SECONDS, "scrape", 0)
                case "fault":
                    self._fail(now)
                case "unlist":
                    self.hosts[0].is_listed = False

    def _push(self, time: float, kind: str, detail: int) -> None:
        self._count += 1
        heapq.heappush(self._events, (time, self._count, kind, detail))

    def _arrive(self, now: float, prompt_tokens: int, output_tokens: int) -> Request:
        prompt, output = self._length(prompt_tokens), self._length(output_tokens)
        request = Request(self.random.randrange(CLIENTS * PROXIES), now, prompt, output)
        self.requests.append(request)
        return request

    def _length(self, mean: int) -> int:
        return max(1, round(mean * self.random.lognormvariate(-0.32, 0.8)))

    def _send(self, now: float, request: Request) -> None:
        host = self._choose(self, request, [each for each in self.hosts if each.is_listed])
        request.tries += 1
        if host.load >= QUEUE_LIMIT:
            self._retry(now, request, "refused")
            return
        self.sent[request.source % PROXIES][host.number] += 1
        host.advance(now)
        host.waiting.append(request)
        host.admit(now)
        self._plan_end(host)

    def _retry(self, now: float, request: Request, outcome: str) -> None:
        if request.tries < 2:
            self._send(now, request)
        else:
            request.outcome = outcome

    def _plan_end(self, host: Host) -> None:
        host.version += 1
        if host.running and (end := host.next_end()) != float("inf"):
            self._push(end, "end", host.number << 40 | host.version)

    def _end(self, now: float, number: int, version: int) -> None:
        host = self.hosts[number]
        if host.version != version:
            return
        host.advance(now)
        for request in host.finished():
            request.end, request.outcome = now, ""
            self.sent[request.source % PROXIES][number] -= 1
        host.admit(now)
        self._plan_end(host)

    def _fail(self, now: float) -> None:
        host = self.hosts[0]
        host.advance(now)
        if self._fault == "slow":
            host.factor = 4.0
        else:
            host.busy_until = float("inf")
        if self._fault == "lost":
            self._lose(now, host)
        self._plan_end(host)

    def _lose(self, now: float, host: Host) -> None:
        """End the streams of a host; only requests without a first token may be sent again."""
        host.is_listed = False
        requests = [*(request for _, _, request in host.running), *host.waiting]
        host.running.clear()
        host.waiting.clear()
        for request in requests:
            self.sent[request.source % PROXIES][host.number] -= 1
            if request.first_token and request.first_token <= now:
                request.outcome = "lost"
            else:
                self._retry(now, request, "lost")


def capacity(prompt_tokens: int, output_tokens: int) -> float:
    """Return the requests that a host can finish in a second."""
    decode = output_tokens * STEPS[-1][1] / SEQUENCES
    return 1 / (decode + prompt_tokens / PREFILL_RATE)


def percentile(values: Sequence[float], share: float) -> float:
    """Return a percentile; 0 without values."""
    return sorted(values)[min(len(values) - 1, int(share * len(values)))] if values else 0.0


def row_of(fleet: Fleet, seconds: float, price: float) -> str:
    """Return the figures of the requests that arrived after the warm-up, as cells of a Markdown table.

    Args:
        seconds: the simulated time.
        price: the price of a host for an hour.
    """
    requests = [request for request in fleet.requests if request.arrival >= WARM_UP]
    started = [request.first_token - request.arrival for request in requests if 0 < request.first_token < seconds]
    ended = [request for request in requests if not request.outcome]
    paces = [(request.end - request.first_token) / (request.output - 1) for request in ended if request.output > 8]
    lost = sum(request.outcome in ("refused", "lost") for request in requests)
    overdue = sum(request.outcome == "unfinished" and request.arrival < seconds - 20 for request in requests)
    tokens = sum(request.output for request in ended) / (seconds - WARM_UP) / len(fleet.hosts)
    loads = [host.load for host in fleet.hosts]
    cells = (
        f"{1e3 * percentile(started, 0.5):,.0f} / {1e3 * percentile(started, 0.99):,.0f}",
        f"{1e3 * percentile(paces, 0.5):.1f} / {1e3 * percentile(paces, 0.99):.1f}",
        f"{min(loads)} / {statistics.median(loads):.0f} / {max(loads)}",
        f"{lost / len(requests):.2%}",
        f"{overdue / len(requests):.2%}",
        f"{tokens:,.0f}",
        f"{price / (tokens * 3600) * 1e6:.3f}",
    )
    return " | ".join(cells)


def main() -> None:
    """Print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hosts", type=int, default=100, metavar="N")
    parser.add_argument("--seconds", type=float, default=30, metavar="S", help="simulated time (default: 30)")
    parser.add_argument("--load", default="0.7,0.9,1.1", metavar="L,L", help="default: 0.7,0.9,1.1")
    parser.add_argument("--policy", default=",".join(CHOOSERS), metavar="P,P")
    parser.add_argument("--fault", default="", metavar="F,F", help="to host 0: slow, stalled, lost")
    parser.add_argument("--prompt-tokens", type=int, default=512, metavar="N", help="mean (default: 512)")
    parser.add_argument("--output-tokens", type=int, default=256, metavar="N", help="mean (default: 256)")
    parser.add_argument("--price", type=float, default=2.5, metavar="P", help="of a host for an hour (default: 2.5)")
    parser.add_argument("--seed", type=int, default=0, metavar="N")
    arguments = parser.parse_args()
    each = capacity(arguments.prompt_tokens, arguments.output_tokens)
    print("|".join(["", *COLUMNS, ""]), "| --- " * len(COLUMNS) + "|", sep="\n")
    for load in map(float, arguments.load.split(",")):
        for fault in arguments.fault.split(","):
            for policy in arguments.policy.split(","):
                fleet = Fleet(arguments.hosts, policy, fault, arguments.seed)
                lengths = (arguments.prompt_tokens, arguments.output_tokens)
                fleet.run(load * each * arguments.hosts, arguments.seconds, *lengths)
                row = row_of(fleet, arguments.seconds, arguments.price)
                print(f"| {load} | {fault or 'none'} | {policy} | {row} |", flush=True)


if __name__ == "__main__":
    main()
