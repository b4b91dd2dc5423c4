"""Measures a server that speaks the Managed Agents API, with the unmodified Python package `anthropic`.

    BASE_URL=http://127.0.0.1:8777 API_KEY=aod_… python peers.py [--only accept,first] [--json FILE]

See README.md beside this file. Exits with 1 if a case fails.
"""

import argparse
import asyncio
import json
import os
import platform
import re
import statistics
import sys
import time
import uuid

import anthropic
from anthropic import AsyncAnthropic

TIME = re.compile(r"\b1\d{9}\.\d{3,9}\b")
LINES = 20
CASES = {}


def case(name):
    def register(function):
        CASES[name] = function
        return function

    return register


def message(text):
    return {"type": "user.message", "content": [{"type": "text", "text": text}]}


def is_end(event):
    """An idle that ends a turn."""
    return event.type == "session.status_idle" and event.stop_reason.type != "requires_action"


def text_of(event):
    blocks = getattr(event, "content", None) or []
    return "".join(getattr(block, "text", None) or "" for block in blocks)


def percentiles(seconds):
    """Of durations in seconds: median and 99th percentile, in milliseconds."""
    ordered = sorted(seconds)
    p99 = ordered[min(len(ordered) - 1, len(ordered) * 99 // 100)]
    return {"p50_ms": round(statistics.median(ordered) * 1e3, 1), "p99_ms": round(p99 * 1e3, 1), "count": len(ordered)}


class Follower:
    """A stream that is read in the background, with the time at which each event came."""

    def __init__(self, client, session):
        self.client, self.session = client, session
        self.events, self.error = [], None
        self.changed = asyncio.Condition()
        self.opened = asyncio.Event()
        self.task = asyncio.create_task(self._read())

    async def _read(self):
        try:
            # A busy server may refuse some of many streams for a moment.
            events = self.client.with_options(max_retries=5).beta.sessions.events
            async with await events.stream(self.session) as stream:
                self.opened.set()
                async for event in stream:
                    async with self.changed:
                        self.events.append((time.time(), event))
                        self.changed.notify_all()
        except Exception as error:  # noqa: BLE001: passed to the waiting thread
            self.error = error
        self.opened.set()
        async with self.changed:
            self.changed.notify_all()

    async def until(self, fits, after, seconds):
        """The first event from `after` on that fits, with its time and its place."""
        async def wait():
            async with self.changed:
                checked = after
                while True:
                    for place in range(checked, len(self.events)):
                        at, event = self.events[place]
                        if fits(event):
                            return at, event, place
                    checked = len(self.events)
                    if self.task.done() or self.error:
                        raise RuntimeError(f"the stream ended: {self.error}")
                    await self.changed.wait()

        try:
            return await asyncio.wait_for(wait(), seconds)
        except TimeoutError:
            kinds = [event.type for _, event in self.events[after:]]
            raise RuntimeError(f"not seen within {seconds} s; there was {kinds}") from None

    async def close(self):
        self.task.cancel()
        await asyncio.gather(self.task, return_exceptions=True)


class World:
    """The server, and one agent of it."""

    def __init__(self, args):
        self.args = args
        self.client = AsyncAnthropic(base_url=args.base_url, api_key=args.api_key, max_retries=0, timeout=args.patience)
        self.sessions = []

    async def begin(self):
        beta = self.client.beta
        metadata = dict(pair.split("=", 1) for pair in self.args.metadata)
        fields = {"metadata": metadata} if metadata else {}
        if not self.args.no_tools:
            fields["tools"] = [{"type": "agent_toolset_20260401"}]
        self.environment = (await beta.environments.create(name=f"peers-{uuid.uuid4()}")).id
        self.agent = (await beta.agents.create(name="peers", model=self.args.model, **fields)).id

    async def session(self):
        made = await self.client.beta.sessions.create(agent=self.agent, environment_id=self.environment)
        self.sessions.append(made.id)
        return made.id

    async def follow(self, session):
        follower = Follower(self.client, session)
        await follower.opened.wait()
        return follower

    async def send(self, session, text):
        begun = time.time()
        await self.client.beta.sessions.events.send(session, events=[message(text)])
        return begun

    async def turn(self, session, follower, text):
        """Sends a message and waits for the end of its turn: when it was sent, and the events with their times."""
        start = len(follower.events)
        begun = await self.send(session, text)
        _, _, end = await follower.until(is_end, start, self.args.patience)
        return begun, follower.events[start : end + 1]

    async def listed(self, session):
        return [event async for event in self.client.beta.sessions.events.list(session, limit=1000)]

    async def end(self):
        for session in self.sessions:
            try:
                await self.client.beta.sessions.delete(session)
            except anthropic.APIError:
                pass  # One that runs is left to the server.


def after(begun, events, fits):
    """Seconds from `begun` to the first event that fits."""
    return next((at - begun for at, event in events if fits(event)), None)


@case("accept")
async def accept(world):
    """Sessions created, by 16 callers at a time."""
    times, until = [], time.monotonic() + world.args.seconds

    async def caller():
        while time.monotonic() < until:
            begun = time.monotonic()
            await world.session()
            times.append(time.monotonic() - begun)

    begun = time.monotonic()
    await asyncio.gather(*[caller() for _ in range(16)])
    return {"per_second": round(len(times) / (time.monotonic() - begun), 1), **percentiles(times)}


@case("first")
async def first(world):
    """From a message's POST to the first events on an open stream: of a new session, and of a follow-up."""
    marks = {
        "running": lambda event: event.type == "session.status_running",
        "agent": lambda event: event.type.startswith("agent."),
        "end": is_end,
    }
    times = {f"{turn}_{mark}": [] for turn in ["new", "follow_up"] for mark in marks}
    for _ in range(world.args.runs):
        session = await world.session()
        follower = await world.follow(session)
        for turn in ["new", "follow_up"]:
            begun, events = await world.turn(session, follower, world.args.say)
            for mark, fits in marks.items():
                if (seconds := after(begun, events, fits)) is not None:
                    times[f"{turn}_{mark}"].append(seconds)
        await follower.close()
    return {name: percentiles(seconds) for name, seconds in times.items() if seconds}


@case("latency")
async def latency(world):
    """From a command that prints the time, in the sandbox, to the event that shows it. Both clocks have to agree."""
    session = await world.session()
    follower = await world.follow(session)
    times = []
    for _ in range(world.args.runs):
        _, events = await world.turn(session, follower, world.args.run.replace("{command}", "date +%s.%N"))
        shown = ((at, TIME.search(text_of(event))) for at, event in events if event.type.startswith("agent."))
        found = next(((at, match) for at, match in shown if match), None)
        if found is None:
            raise RuntimeError("no event shows what the command printed")
        times.append(found[0] - float(found[1].group()))
    await follower.close()
    return percentiles(times)


@case("readers")
async def readers(world):
    """The end of a turn at many readers of one session: after the message, and after the first reader."""
    session = await world.session()
    opening = time.monotonic()
    followers = await asyncio.gather(*[world.follow(session) for _ in range(world.args.readers)])
    opened = time.monotonic() - opening
    refused = [follower.error for follower in followers if follower.error]
    if refused:
        await asyncio.gather(*[follower.close() for follower in followers])
        raise RuntimeError(f"{len(refused)} of {len(followers)} streams were refused: {refused[0]}")
    begun = await world.send(session, world.args.say)
    ends = await asyncio.gather(*[follower.until(is_end, 0, world.args.patience) for follower in followers])
    ids = [[event.id for _, event in follower.events[: place + 1]] for follower, (_, _, place) in zip(followers, ends)]
    await asyncio.gather(*[follower.close() for follower in followers])
    if any(each != ids[0] for each in ids):
        raise RuntimeError("the readers did not see the same events")
    times = [at for at, _, _ in ends]
    return {
        "readers": len(times),
        "opened_ms": round(opened * 1e3, 1),
        "first_end_ms": round((min(times) - begun) * 1e3, 1),
        "last_after_first_ms": round((max(times) - min(times)) * 1e3, 1),
    }


@case("list")
async def list_events(world):
    """A list of events, 1,000 a page, after as many turns as it takes."""
    session = await world.session()
    follower = await world.follow(session)
    # An event that waits is shown again when the agent has it.
    while len({event.id for _, event in follower.events}) < world.args.events:
        await world.turn(session, follower, world.args.say)
    await follower.close()
    begun = time.monotonic()
    listed = await world.listed(session)
    seconds = time.monotonic() - begun
    ids = [event.id for event in listed]
    shown = {event.id for _, event in follower.events}
    if len(ids) != len(set(ids)) or shown - set(ids):
        raise RuntimeError(f"{len(ids) - len(set(ids))} events are listed twice, {len(shown - set(ids))} are missing")
    return {"events": len(ids), "per_second": round(len(ids) / seconds)}


@case("kill")
async def kill(world):
    """A command kills a part of the server in the middle of a turn that prints numbered lines: what is lost then."""
    if not world.args.kill_command:
        return None
    session = await world.session()
    follower = await world.follow(session)
    command = f"for i in $(seq {LINES}); do echo line-$i.; sleep 0.5; done"
    start = len(follower.events)
    await world.send(session, world.args.run.replace("{command}", command))
    await follower.until(lambda event: event.type in ("agent.tool_use", "session.status_running"), start, world.args.patience)
    await asyncio.sleep(2)
    begun = time.monotonic()
    killer = await asyncio.create_subprocess_shell(world.args.kill_command)
    if await killer.wait() != 0:
        raise RuntimeError(f"the kill command failed with {killer.returncode}")
    # Whatever became of the stream, the list says how the turn ended.
    ended, broken = None, 0
    while ended is None:
        if time.monotonic() - begun > world.args.patience:
            raise RuntimeError(f"the turn has not ended {world.args.patience} s after the kill")
        await asyncio.sleep(0.2)
        try:
            listed = await world.listed(session)
            ended = next((event for event in listed if is_end(event) or event.type == "session.status_terminated"), None)
        except anthropic.APIError:
            broken += 1
    seconds = time.monotonic() - begun
    await follower.close()
    ids = [event.id for event in listed]
    text = "".join(text_of(event) for event in listed if event.type == "agent.message")
    lost = [number for number in range(1, LINES + 1) if f"line-{number}." not in text]
    return {
        "ended_after_s": round(seconds, 1),
        "stop_reason": getattr(getattr(ended, "stop_reason", None), "type", ended.type),
        "requests_refused_meanwhile": broken,
        "lines_lost": len(lost),
        "events_listed_twice": len(ids) - len(set(ids)),
    }


def rows(name, result):
    """A result as lines of the table."""
    if result is None:
        return [(name, "-")]
    plain = {key: value for key, value in result.items() if not isinstance(value, dict)}
    lines = [(f"{name}: {key}", describe(value)) for key, value in result.items() if isinstance(value, dict)]
    return ([(name, describe(plain))] if plain else []) + lines


def describe(values):
    return ", ".join(f"{key} {value}" for key, value in values.items())


async def main(args):
    world = World(args)
    await world.begin()
    results, failed = {}, False
    names = args.only.split(",") if args.only else list(CASES)
    for name in names:
        try:
            results[name] = await CASES[name](world)
        except (RuntimeError, anthropic.APIError) as error:
            failed = True
            results[name] = {"failed": str(error)}
        for what, values in rows(name, results[name]):
            print(f"{what:<28} {values}", flush=True)
    await world.end()
    if args.json:
        about = {"base_url": args.base_url, "model": args.model, "metadata": args.metadata, "anthropic": anthropic.__version__, "python": platform.python_version()}
        with open(args.json, "w") as file:
            json.dump({**about, "load": os.getloadavg(), "results": results}, file, indent=2)
            file.write("\n")
    return 1 if failed else 0


def parse():
    parser = argparse.ArgumentParser(description="Measure a server that speaks the Managed Agents API")
    parser.add_argument("--base-url", default=os.environ.get("BASE_URL"), help="URL of the server (default: $BASE_URL)")
    parser.add_argument("--api-key", default=os.environ.get("API_KEY"), help="key of the server (default: $API_KEY)")
    parser.add_argument("--model", default="claude-sonnet-4-5", help="model of the agent")
    parser.add_argument("--metadata", action="append", default=[], metavar="KEY=VALUE", help="metadata of the agent; may be repeated")
    parser.add_argument("--no-tools", action="store_true", help="create the agent without a toolset")
    parser.add_argument("--say", default="Say hello.", help="message of a short turn")
    parser.add_argument("--run", default="Run this command with bash, and answer with its output alone: {command}", help="message that makes the agent run {command}")
    parser.add_argument("--only", help=f"cases with commas between, of {','.join(CASES)}")
    parser.add_argument("--runs", type=int, default=10, help="sessions and commands whose times are measured")
    parser.add_argument("--seconds", type=float, default=5, help="how long sessions are created")
    parser.add_argument("--readers", type=int, default=200, help="readers of one session")
    parser.add_argument("--events", type=int, default=500, help="events to be listed, at least")
    parser.add_argument("--kill-command", help="shell command that kills a part of the server in the middle of a turn; without it that case is left out")
    parser.add_argument("--patience", type=float, default=180, help="seconds after which a turn or a request is given up")
    parser.add_argument("--json", metavar="FILE", help="write the results to this file")
    args = parser.parse_args()
    if not args.base_url or not args.api_key:
        parser.error("set BASE_URL and API_KEY, or --base-url and --api-key")
    unknown = [name for name in (args.only or "").split(",") if name and name not in CASES]
    if unknown:
        parser.error(f"no such case: {', '.join(unknown)}")
    return args


if __name__ == "__main__":
    sys.exit(asyncio.run(main(parse())))
