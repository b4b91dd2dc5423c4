"""What an unmodified `anthropic` sees of a server that speaks the Managed Agents API, one check per number.

    BASE_URL=http://127.0.0.1:8777 API_KEY=aod_… python suite.py --runtimes claude,shell [--only 16,19] [--json FILE]

Checks without a runtime run once, the others once for each runtime. Exits with 1 if one fails.
"""

import argparse
import concurrent.futures
import functools
import http.server
import json
import os
import sys
import threading
import time
import traceback
import urllib.error
import urllib.parse
import urllib.request
import uuid

import anthropic
from anthropic import Anthropic

BASE_URL, API_KEY = os.environ["BASE_URL"].rstrip("/"), os.environ["API_KEY"]
PATIENCE = float(os.environ.get("PATIENCE", "90"))
TOOLS = [{"type": "agent_toolset_20260401"}]
MODELS = {
    "claude": ("claude-sonnet-4-5", {}),
    "codex": ("gpt-5.2-codex", {}),
    "gemini": ("gemini-2.5-pro", {}),
    "opencode": ("openai/gpt-5.2", {"aod.runtime": "opencode"}),
    "shell": ("claude-sonnet-4-5", {"aod.runtime": "shell"}),
}
# Releases before 1.0 leave out of streams what they do not know.
LEFT_OUT = set()
if int(anthropic.__version__.split(".")[0]) < 1:
    LEFT_OUT = {"session.thread_status_running", "session.thread_status_idle", "session.usage", "session.updated"}
CHECKS = {}


class NotHere(Exception):
    """The check does not concern this runtime or this release."""


def check(number, title, per_runtime=False):
    def register(function):
        CHECKS[number] = (title, per_runtime, function)
        return function

    return register


class Counter:
    """Counts the requests that reach the wire."""

    def __init__(self):
        self.requests = []

    def client(self, **options):
        try:
            http = anthropic.DefaultHttpxClient(event_hooks={"request": [lambda request: self.requests.append(request)]})
            return Anthropic(api_key=API_KEY, base_url=BASE_URL, http_client=http, **options)
        except AttributeError:
            return Anthropic(api_key=API_KEY, base_url=BASE_URL, **options)


def new_client(key=API_KEY):
    return Anthropic(api_key=key, base_url=BASE_URL)


def raises(error, call, **expected):
    try:
        call()
    except error as raised:
        for name, value in expected.items():
            assert getattr(raised, name, None) == value, (name, getattr(raised, name, None), value)
        return raised
    raise AssertionError(f"no {error.__name__}")


def message(text):
    return {"type": "user.message", "content": [{"type": "text", "text": text}]}


def raw(method, path, body=None, headers=None):
    """A request without an SDK: status, headers, body."""
    data = body if isinstance(body, (bytes, type(None))) else json.dumps(body).encode()
    request = urllib.request.Request(BASE_URL + path, data=data, method=method)
    request.add_header("Content-Type", "application/json")
    for name, value in (headers or {"Authorization": f"Bearer {API_KEY}"}).items():
        request.add_header(name, value)
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.status, answer.headers, answer.read()
    except urllib.error.HTTPError as refused:
        return refused.code, refused.headers, refused.read()


class Follower:
    """A stream that is read in the background."""

    def __init__(self, client, session, **options):
        self.events, self.error, self.ended = [], None, False
        self.changed = threading.Condition()
        begun = time.monotonic()
        self.stream = client.beta.sessions.events.stream(session, **options)
        self.opened_after = time.monotonic() - begun
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self):
        try:
            for event in self.stream:
                with self.changed:
                    self.events.append(event)
                    self.changed.notify_all()
        except Exception as error:  # noqa: BLE001: passed to the waiting thread
            self.error = error
        with self.changed:
            self.ended = True
            self.changed.notify_all()

    def until(self, what, after=0, seconds=None):
        """The events from `after` up to one that fits."""
        fits = what if callable(what) else (lambda event: event.type == what)
        deadline = time.monotonic() + (seconds or PATIENCE)
        with self.changed:
            while True:
                for index, event in enumerate(self.events[after:], after):
                    if fits(event):
                        return self.events[after : index + 1]
                if self.ended or time.monotonic() > deadline:
                    raise AssertionError(f"no {what} in {[event.type for event in self.events[after:]]} {self.error or ''}")
                self.changed.wait(1)

    def close(self):
        self.stream.close()


def is_end(event):
    """An idle that ends a turn."""
    return event.type == "session.status_idle" and event.stop_reason.type != "requires_action"


class World:
    """What the checks of one runtime share."""

    def __init__(self, runtime):
        self.runtime = runtime
        self.client = new_client()
        self.model, self.metadata = MODELS[runtime]
        self.environment = self.client.beta.environments.create(name=f"conformance-{uuid.uuid4()}").id
        self.agent = self.new_agent().id

    def new_agent(self, **fields):
        defaults = {"name": "hello", "model": self.model, "tools": TOOLS, "metadata": self.metadata}
        if self.runtime == "shell":
            defaults.pop("tools")
        return self.client.beta.agents.create(**{**defaults, **fields})

    def new_session(self, **fields):
        return self.client.beta.sessions.create(**{"agent": self.agent, "environment_id": self.environment, **fields})

    def say(self, text):
        return {"shell": f"echo 'You said: {text}'"}.get(self.runtime, text)

    def run(self, command):
        return command if self.runtime == "shell" else f"run: {command}"

    def turn(self, session, text, follower=None):
        """One turn: its events, from the message to the end."""
        follower = follower or Follower(self.client, session)
        start = len(follower.events)
        sent = self.client.beta.sessions.events.send(session, events=[message(text)])
        events = follower.until(is_end, start)
        return sent.data[0].id, events, follower

    def list(self, session, **options):
        return list(self.client.beta.sessions.events.list(session, **options))

    def interrupt(self, session):
        self.client.beta.sessions.events.send(session, events=[{"type": "user.interrupt"}])


def said(events):
    return "".join(block.text for event in events if event.type == "agent.message" for block in event.content)


def printed(events):
    return said(events) + "".join(
        block.text for event in events if event.type == "agent.tool_result" for block in (event.content or []) if block.type == "text"
    )


def types(events):
    return [event.type for event in events]


def in_order(names, wanted):
    """Whether `wanted` is a subsequence of `names`."""
    rest = iter(names)
    return all(name in rest for name in wanted)


# --- tier 1 ----------------------------------------------------------------------------------


@check(1, "a wrong key")
def wrong_key(world):
    error = raises(anthropic.AuthenticationError, lambda: new_client("wrong").beta.agents.list())
    assert error.body["error"]["type"] == "authentication_error", error.body
    assert error.request_id and error.request_id.startswith("req_"), error.request_id


@check(2, "both headers, any version, with and without beta")
def headers(world):
    for path in ["/v1/agents", "/v1/agents?beta=true"]:
        for auth in [{"X-Api-Key": API_KEY}, {"Authorization": f"Bearer {API_KEY}"}]:
            for more in [{}, {"anthropic-version": "2023-06-01"}, {"anthropic-version": "2026-10-21", "anthropic-beta": "managed-agents-2026-04-01"}]:
                status, answered, _ = raw("GET", path, headers={**auth, **more})
                assert status == 200 and answered["request-id"], (path, auth.keys(), more, status)


@check(3, "environments.create")
def create_environment(world):
    config = {"type": "cloud", "networking": {"type": "limited", "allowed_hosts": ["example.com"]}}
    made = world.client.beta.environments.create(name=f"e-{uuid.uuid4()}", config=config)
    assert made.type == "environment" and made.id.startswith("env_"), made
    assert made.config.networking.allow_mcp_servers is False and made.config.packages.pip == [], made


@check(4, "packages need package managers")
def packages(world):
    config = {
        "type": "cloud",
        "networking": {"type": "limited", "allowed_hosts": [], "allow_package_managers": False},
        "packages": {"type": "packages", "pip": ["requests"]},
    }
    error = raises(anthropic.BadRequestError, lambda: world.client.beta.environments.create(name=f"e-{uuid.uuid4()}", config=config))
    assert error.body["error"]["type"] == "invalid_request_error", error.body


@check(5, "environments.retrieve, update, list")
def environments(world):
    environments = world.client.beta.environments
    made = environments.create(name=f"e-{uuid.uuid4()}", metadata={"k": "v", "l": "w"})
    assert environments.retrieve(made.id).metadata == {"k": "v", "l": "w"}
    assert environments.update(made.id, metadata={"k": None}).metadata == {"l": "w"}
    assert made.id in [each.id for each in environments.list()]


@check(6, "agents.create", per_runtime=True)
def create_agent(world):
    made = world.new_agent(system="Be brief.")
    assert made.version == 1 and made.model.id == world.model and made.model.effort, made
    if world.runtime != "shell":
        assert made.tools[0].default_config.permission_policy.type == "always_allow", made.tools
    assert made.mcp_servers == [] and made.archived_at is None and made.system == "Be brief.", made
    assert {key: value for key, value in made.metadata.items() if not key.startswith("aod.")} == {}, made.metadata


@check(7, "agents.update with versions")
def update_agent(world):
    agents = world.client.beta.agents
    made = world.new_agent()
    assert agents.update(made.id, version=1, description="x").version == 2
    assert agents.update(made.id, version=2, description="x").version == 2
    counter = Counter()
    error = raises(anthropic.ConflictError, lambda: counter.client().beta.agents.update(made.id, version=1, description="y"))
    assert error.response.headers["x-should-retry"] == "false" and len(counter.requests) <= 1, len(counter.requests)


@check(8, "earlier versions of an agent")
def versions(world):
    agents = world.client.beta.agents
    made = world.new_agent(description="one")
    agents.update(made.id, version=1, description="two")
    assert agents.retrieve(made.id, version=1).description == "one"
    assert sorted(each.version for each in agents.versions.list(made.id)) == [1, 2]


@check(9, "agents that are refused")
def refused_agents(world):
    servers = [{"type": "url", "name": "x", "url": "https://example.com/mcp"}]
    for fields in [{"name": ""}, {"tools": [{"type": "nope"}]}, {"mcp_servers": servers}]:
        raises(anthropic.BadRequestError, lambda: world.new_agent(**fields))


@check(10, "an agent that does not exist")
def no_agent(world):
    raises(anthropic.NotFoundError, lambda: world.client.beta.agents.retrieve("agent_none"))


@check(11, "paging over agents")
def page_agents(world):
    made = {world.new_agent().id for _ in range(3)}
    ids = [each.id for each in world.client.beta.agents.list(limit=1)]
    assert len(ids) == len(set(ids)) and made <= set(ids), ids
    page = world.client.beta.agents.list(limit=100)
    while page.next_page:
        page = page.get_next_page()
    assert not page.next_page


@check(12, "sessions.create", per_runtime=True)
def create_session(world):
    world.client.beta.agents.update(world.agent, version=1, description="second") if world.client.beta.agents.retrieve(world.agent).version == 1 else None
    begun = time.monotonic()
    made = world.new_session(title="t", metadata={"a": "b"})
    assert time.monotonic() - begun < 3
    assert made.status == "idle" and made.type == "session" and made.id.startswith("sesn_"), made
    assert made.agent.type == "agent" and made.agent.version == 2 and made.agent.id == world.agent, made.agent
    assert made.usage is not None and made.stats is not None and made.resources == [] and made.vault_ids == [], made
    assert made.title == "t" and made.metadata["a"] == "b", made


@check(13, "a pinned version", per_runtime=True)
def pinned(world):
    made = world.new_session(agent={"type": "agent", "id": world.agent, "version": 1})
    assert made.agent.version == 1, made.agent


@check(14, "the stream opens at once", per_runtime=True)
def opens(world):
    follower = Follower(world.client, world.new_session().id)
    assert follower.opened_after < 3, follower.opened_after
    follower.close()


@check(15, "the same id in the answer and on the stream", per_runtime=True)
def same_id(world):
    sent, events, _ = world.turn(world.new_session().id, world.say("hello"))
    assert sent.startswith("sevt_") and sent in [event.id for event in events], (sent, events)


@check(16, "a plain turn", per_runtime=True)
def plain(world):
    _, events, _ = world.turn(world.new_session().id, world.say("hello"))
    order = ["user.message", "session.status_running", "session.thread_status_running", "span.model_request_start"]
    if world.runtime == "shell":
        order = order[:3]
    else:
        order += ["agent.message", "span.model_request_end"]
    order = [name for name in [*order, "session.thread_status_idle", "session.usage", "session.status_idle"] if name not in LEFT_OUT]
    assert in_order(types(events), order), types(events)
    assert LEFT_OUT or events[-2].type == "session.usage", events[-2:]
    assert events[-1].stop_reason.type == "end_turn", events[-1]
    assert type(events[-1]).__module__.startswith("anthropic."), type(events[-1])
    times = [event.processed_at for event in events if getattr(event, "processed_at", None)]
    assert times == sorted(set(times)), times
    if world.runtime != "shell":
        assert "hello" in said(events), said(events)


@check(17, "a turn with tools", per_runtime=True)
def tools(world):
    if world.runtime == "shell":
        raise NotHere
    _, events, _ = world.turn(world.new_session().id, world.run("echo tool-42"))
    uses = {event.id: event for event in events if event.type == "agent.tool_use"}
    assert any(event.name == "bash" for event in uses.values()), [event.name for event in uses.values()]
    results = [event for event in events if event.type == "agent.tool_result"]
    assert results, types(events)
    ids = [event.id for event in events]
    for result in results:
        assert result.tool_use_id in uses and ids.index(result.tool_use_id) < ids.index(result.id), result
    assert "tool-42" in printed(events), printed(events)


@check(18, "retrieve after the idle event", per_runtime=True)
def retrieve(world):
    session = world.new_session().id
    _, events, _ = world.turn(session, world.say("hello"))
    got = world.client.beta.sessions.retrieve(session)
    assert got.status == "idle", got.status
    if LEFT_OUT:
        return
    usage = [event for event in events if event.type == "session.usage"][-1].usage
    if world.runtime != "shell":
        assert got.usage.output_tokens > 0
    assert (got.usage.input_tokens, got.usage.output_tokens) == (usage.input_tokens, usage.output_tokens), (got.usage, usage)


@check(19, "history is the stream", per_runtime=True)
def history(world):
    session = world.new_session().id
    _, _, follower = world.turn(session, world.say("hello"))
    world.turn(session, world.say("again"), follower)
    seen = [event for event in follower.events if getattr(event, "processed_at", None)]
    listed = world.list(session)
    ids = [event.id for event in listed]
    streamed = [event for event in listed if event.type not in LEFT_OUT]
    assert [event.id for event in streamed] == [event.id for event in seen] and len(ids) == len(set(ids)), (types(listed), types(seen))
    assert [event.to_dict() for event in streamed] == [event.to_dict() for event in seen]
    assert [event.id for event in world.list(session, order="desc")] == ids[::-1]
    assert [event.id for event in world.list(session, limit=2)] == ids
    assert [event.id for event in world.list(session, limit=2, order="desc")] == ids[::-1]
    if LEFT_OUT:
        return
    only = world.list(session, types=["session.status_idle"])
    assert types(only) == ["session.status_idle"] * 2, types(only)
    middle = listed[len(listed) // 2]
    after = world.list(session, created_at_gt=middle.processed_at)
    assert [event.id for event in after] == ids[ids.index(middle.id) + 1 :], len(after)
    raises(anthropic.BadRequestError, lambda: world.client.beta.sessions.events.list(session, types=["nope"]))
    raises(anthropic.BadRequestError, lambda: world.client.beta.sessions.events.list(session, page="page_x"))


@check(20, "the next turn remembers", per_runtime=True)
def remembers(world):
    session = world.new_session().id
    _, _, follower = world.turn(session, world.run("echo kept >/workspace/kept; echo first"))
    if world.runtime != "shell":
        _, events, _ = world.turn(session, "what was my first message?", follower)
        assert "Your first message was: run: echo kept" in said(events), said(events)
    _, events, _ = world.turn(session, world.run("grep -q kept /workspace/kept && echo still-here"), follower)
    assert events[-1].stop_reason.type == "end_turn", events[-1]
    assert world.runtime == "shell" or "still-here" in printed(events), printed(events)


@check(21, "messages queue", per_runtime=True)
def queues(world):
    session = world.new_session().id
    follower = Follower(world.client, session)
    send = world.client.beta.sessions.events.send
    send(session, events=[message(world.run("sleep 2; echo one"))])
    second = send(session, events=[message(world.say("two"))]).data[0]
    assert second.processed_at is None, second
    queued = follower.until(lambda event: getattr(event, "id", None) == second.id)
    assert queued[-1].processed_at is None and not any(map(is_end, queued)), types(queued)
    assert second.id in [event.id for event in world.list(session)], "the queued message is listed"
    first = follower.until(is_end)
    rest = follower.until(is_end, len(first))
    assert in_order(types(rest), ["user.message", "session.status_running", "session.status_idle"]), types(rest)
    processed = [event for event in rest if event.id == second.id and event.processed_at]
    assert len(processed) == 1, types(rest)
    assert [event.id for event in world.list(session)].count(second.id) == 1


@check(22, "an interrupt", per_runtime=True)
def interrupt(world):
    session = world.new_session().id
    follower = Follower(world.client, session)
    world.client.beta.sessions.events.send(session, events=[message(world.run("timeout 60 tail -f /dev/null; echo no"))])
    started = "session.status_running" if world.runtime in ("shell", "opencode") else "agent.tool_use"
    follower.until(started)
    time.sleep(1)
    begun = time.monotonic()
    world.interrupt(session)
    events = follower.until(is_end)
    assert time.monotonic() - begun < 20 and events[-1].stop_reason.type == "end_turn", events[-1]
    assert any(event.type == "user.interrupt" and event.processed_at for event in events), types(events)
    uses = {event.id for event in events if event.type == "agent.tool_use"}
    results = {event.tool_use_id: event for event in events if event.type == "agent.tool_result"}
    assert uses <= set(results), (uses, results)
    _, events, _ = world.turn(session, world.say("usable"), follower)
    assert events[-1].stop_reason.type == "end_turn", events[-1]


@check(23, "an interrupt and a message in one batch", per_runtime=True)
def interrupt_and_message(world):
    session = world.new_session().id
    follower = Follower(world.client, session)
    world.client.beta.sessions.events.send(session, events=[message(world.run("timeout 60 tail -f /dev/null; echo no"))])
    follower.until("session.status_running")
    time.sleep(1)
    batch = [{"type": "user.interrupt"}, message(world.say("instead"))]
    sent = world.client.beta.sessions.events.send(session, events=batch)
    first = follower.until(is_end)
    rest = follower.until(is_end, len(first))
    assert sent.data[1].id in [event.id for event in rest], types(rest)
    assert rest[-1].stop_reason.type == "end_turn", rest[-1]


@check(24, "initial_events", per_runtime=True)
def initial_events(world):
    made = world.new_session(initial_events=[message(world.say("hello"))])
    assert made.status == "running", made.status
    first = world.list(made.id)[0]
    assert first.type == "user.message", first
    deadline = time.monotonic() + PATIENCE
    while world.client.beta.sessions.retrieve(made.id).status != "idle":
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert types(world.list(made.id))[-1] == "session.status_idle"


@check(25, "archive and delete while running")
def archive_running(world):
    sessions = world.client.beta.sessions
    session = world.new_session().id
    follower = Follower(world.client, session)
    sessions.events.send(session, events=[message(world.run("sleep 5; echo on"))])
    follower.until("session.status_running")
    raises(anthropic.BadRequestError, lambda: sessions.archive(session))
    raises(anthropic.BadRequestError, lambda: sessions.delete(session))
    events = follower.until(is_end)
    assert events[-1].stop_reason.type == "end_turn", events[-1]


@check(26, "a stream that is dropped and reopened", per_runtime=True)
def reopened(world):
    session = world.new_session().id
    follower = Follower(world.client, session)
    world.client.beta.sessions.events.send(session, events=[message(world.run("sleep 2; echo one"))])
    follower.until("session.status_running")
    follower.close()
    seen = {event.id: event.type for event in follower.events}
    again = Follower(world.client, session)
    for event in world.list(session):
        seen.setdefault(event.id, event.type)
    again.until(is_end)
    for event in again.events:
        seen.setdefault(event.id, event.type)
    assert set(seen) == {event.id for event in world.list(session) if event.id in seen or event.type not in LEFT_OUT}
    # Beyond the reference: a stream resumes behind any event, by its id.
    listed = world.list(session)
    for index in [0, len(listed) // 2, len(listed) - 2]:
        resumed = Follower(world.client, session, extra_query={"after_id": listed[index].id})
        events = resumed.until(is_end)
        rest = [event.id for event in listed[index + 1 :] if event.type not in LEFT_OUT]
        assert [event.id for event in events] == rest, (index, types(events))
        resumed.close()


@check(27, "two readers, one slow")
def two_readers(world):
    session = world.new_session().id
    slow, fast = world.client.beta.sessions.events.stream(session), Follower(world.client, session)
    world.turn(session, world.say("hello"), fast)
    late = []
    for event in slow:
        late.append(event.id)
        if is_end(event):
            break
        time.sleep(0.05)
    assert late == [event.id for event in fast.events], (late, types(fast.events))


@check(28, "the provider refuses", per_runtime=True)
def refused_by_provider(world):
    if world.runtime == "shell":
        text = "exit 3"
    elif world.runtime == "codex":
        text = "fail with 401"
    else:
        text = "fail with 400"
    session = world.new_session().id
    _, events, follower = world.turn(session, text)
    errors = [event for event in events if event.type == "session.error"]
    assert errors and errors[-1].error.retry_status.type == "exhausted", types(events)
    assert events[-1].stop_reason.type == "retries_exhausted", events[-1]
    assert world.client.beta.sessions.retrieve(session).status == "idle"
    # Claude Code sends the unanswered message along with the next one: the script must not find the first again.
    _, events, _ = world.turn(session, world.say("my first message"), follower)
    assert events[-1].stop_reason.type == "end_turn", events[-1]


@check(29, "sessions.update")
def update_session(world):
    sessions = world.client.beta.sessions
    session = world.new_session(title="t", metadata={"a": "b", "c": "d"}).id
    follower = Follower(world.client, session)
    updated = sessions.update(session, title="u", metadata={"a": None})
    assert updated.title == "u" and updated.metadata == {"c": "d"}, updated
    if LEFT_OUT:
        return
    event = follower.until("session.updated")[-1]
    assert event.title == "u" and event.metadata == {"c": "d"} and getattr(event, "agent", None) is None, event
    assert sessions.retrieve(session).title == "u"


@check(30, "sessions.list")
def list_sessions(world):
    sessions = world.client.beta.sessions
    agent = world.new_agent().id
    made = [world.new_session(agent=agent).id for _ in range(3)]
    assert [each.id for each in sessions.list(agent_id=agent, statuses=["idle"], limit=1)] == made[::-1]
    assert [each.id for each in sessions.list(agent_id=agent, order="asc")] == made
    first = sessions.list(agent_id=agent, limit=1)
    second = sessions.list(agent_id=agent, limit=1, page=first.next_page)
    assert second.data[0].id == made[1] and second.prev_page, second
    back = sessions.list(agent_id=agent, limit=1, page=second.prev_page)
    assert back.data[0].id == made[2], back
    raises(anthropic.BadRequestError, lambda: sessions.list(agent_id=agent, order="asc", page=first.next_page))
    assert list(sessions.list(agent_id=agent, statuses=["running"])) == []


@check(31, "sessions.archive")
def archive(world):
    sessions = world.client.beta.sessions
    session = world.new_session().id
    follower = Follower(world.client, session)
    world.turn(session, world.say("hello"), follower)
    archived = sessions.archive(session)
    assert archived.status == "terminated" and archived.archived_at, archived
    follower.until("session.status_terminated")
    raises(anthropic.BadRequestError, lambda: sessions.events.send(session, events=[message("x")]))
    assert types(world.list(session))[-1] == "session.status_terminated"
    assert session not in [each.id for each in sessions.list(agent_id=world.agent)]
    assert session in [each.id for each in sessions.list(agent_id=world.agent, include_archived=True)]


@check(32, "sessions.delete")
def delete(world):
    sessions = world.client.beta.sessions
    session = world.new_session().id
    follower = Follower(world.client, session)
    world.turn(session, world.say("hello"), follower)
    deleted = sessions.delete(session)
    assert deleted.type == "session_deleted" and deleted.id == session, deleted
    follower.until("session.deleted")
    deadline = time.monotonic() + 10
    while not follower.ended and time.monotonic() < deadline:
        time.sleep(0.05)
    assert follower.ended and follower.error is None, follower.error
    raises(anthropic.NotFoundError, lambda: sessions.retrieve(session))


@check(33, "sessions that are refused")
def refused_sessions(world):
    agents, environments = world.client.beta.agents, world.client.beta.environments
    agent = world.new_agent().id
    agents.archive(agent)
    raises(anthropic.BadRequestError, lambda: world.new_session(agent=agent))
    environment = environments.create(name=f"e-{uuid.uuid4()}").id
    environments.archive(environment)
    error = raises(anthropic.BadRequestError, lambda: world.new_session(environment_id=environment))
    assert error.body["error"]["details"]["error_code"] == "environment_archived", error.body
    raises(anthropic.NotFoundError, lambda: world.new_session(agent="agent_none"))
    raises(anthropic.NotFoundError, lambda: world.new_session(environment_id="env_none"))


@check(34, "a repository as a resource")
def repository(world):
    resource = {"type": "github_repository", "url": "https://github.com/octocat/Hello-World", "authorization_token": "ghp_conformance_secret"}
    made = world.new_session(resources=[resource])
    assert made.resources[0].mount_path == "/workspace/Hello-World" and made.resources[0].type == "github_repository", made.resources
    _, _, body = raw("GET", f"/v1/sessions/{made.id}")
    assert b"ghp_conformance_secret" not in body


@check(35, "a silent stream sends heartbeats")
def heartbeats(world):
    session = world.new_session().id
    request = urllib.request.Request(f"{BASE_URL}/v1/sessions/{session}/events/stream", headers={"X-Api-Key": API_KEY})
    with urllib.request.urlopen(request, timeout=15) as stream:
        assert stream.headers["content-type"].startswith("text/event-stream"), stream.headers["content-type"]
        assert stream.headers["x-accel-buffering"] == "no"
        lines = []
        while len(lines) < 2:
            line = stream.readline()
            assert line, "the stream ended"
            if line.startswith(b":"):
                lines.append(line)


@check(36, "bad bodies")
def bad_bodies(world):
    session = world.new_session().id
    path = f"/v1/sessions/{session}/events"
    image = {"type": "user.message", "content": [{"type": "image", "source": {"type": "url", "url": "https://example.com/x.png"}}]}
    for body in [{"events": [{"type": "nope"}]}, {"events": []}, b"{", b"", [], {"events": [image]}, {"events": [message("ok"), {"type": "nope"}]}]:
        status, answered, text = raw("POST", path, body)
        envelope = json.loads(text)
        assert status == 400 and envelope["error"]["type"] == "invalid_request_error", (body, status, text)
        assert answered["request-id"] == envelope["request_id"], text
    assert world.list(session) == [], "nothing of a refused batch takes effect"
    raises(anthropic.APIStatusError, lambda: world.client.beta.sessions.events.send(session, events=[message("x" * (33 << 20))]), status_code=413)


@check(37, "requests without a body")
def no_body(world):
    agent, environment, session = world.new_agent().id, world.client.beta.environments.create(name=f"e-{uuid.uuid4()}").id, world.new_session().id
    for method, path in [
        ("POST", f"/v1/agents/{agent}/archive"),
        ("POST", f"/v1/environments/{environment}/archive"),
        ("POST", f"/v1/sessions/{session}/archive"),
        ("DELETE", f"/v1/sessions/{session}"),
        ("DELETE", f"/v1/environments/{environment}"),
    ]:
        status, _, text = raw(method, path, b"")
        assert status == 200, (method, path, status, text)


@check(38, "another user's ids")
def other_tenant(world):
    key = os.environ.get("OTHER_API_KEY")
    if not key:
        raise NotHere
    other = new_client(key)
    session = world.new_session().id
    raises(anthropic.NotFoundError, lambda: other.beta.agents.retrieve(world.agent))
    raises(anthropic.NotFoundError, lambda: other.beta.sessions.retrieve(session))
    raises(anthropic.NotFoundError, lambda: other.beta.sessions.events.list(session))
    raises(anthropic.NotFoundError, lambda: other.beta.sessions.events.stream(session))
    raises(anthropic.NotFoundError, lambda: other.beta.sessions.events.send(session, events=[message("x")]))


# --- tier 2 ----------------------------------------------------------------------------------


def asking_agent(world):
    policy = {"name": "bash", "permission_policy": {"type": "always_ask"}}
    return world.new_agent(tools=[{"type": "agent_toolset_20260401", "configs": [policy]}])


def asked(event):
    return event.type == "session.status_idle" and event.stop_reason.type == "requires_action"


def confirm(world, session, tool_use_id, result, **more):
    event = {"type": "user.tool_confirmation", "tool_use_id": tool_use_id, "result": result, **more}
    return world.client.beta.sessions.events.send(session, events=[event])


@check(39, "a tool that asks", per_runtime=True)
def asks(world):
    if world.runtime == "shell":
        raise NotHere
    session = world.new_session(agent=asking_agent(world).id).id
    follower = Follower(world.client, session)
    # Not only what Gemini CLI runs without asking.
    world.client.beta.sessions.events.send(session, events=[message(world.run("touch /tmp/asked; echo allowed-42"))])
    events = follower.until(asked)
    use = [event for event in events if event.type == "agent.tool_use"][-1]
    assert use.evaluated_permission == "ask" and events[-1].stop_reason.event_ids == [use.id], (use, events[-1])
    assert world.client.beta.sessions.retrieve(session).status == "idle"
    confirm(world, session, use.id, "allow")
    rest = follower.until(is_end, len(events))
    assert in_order(types(rest), ["user.tool_confirmation", "session.status_running", "session.status_idle"]), types(rest)
    assert world.runtime == "gemini" or "allowed-42" in printed(rest), printed(rest)
    events = follower.events
    world.client.beta.sessions.events.send(session, events=[message(world.run("touch /tmp/asked; echo denied-42"))])
    start = len(events)
    asking = follower.until(asked, start)
    use = [event for event in asking if event.type == "agent.tool_use"][-1]
    confirm(world, session, use.id, "deny", **({"deny_message": "not today"} if world.runtime == "claude" else {}))
    rest = follower.until(is_end, start + len(asking))
    results = [event for event in rest if event.type == "agent.tool_result" and event.tool_use_id == use.id]
    assert results and results[0].is_error, types(rest)
    assert world.runtime != "claude" or "not today" in printed(rest), printed(rest)


@check(41, "confirmations that are refused")
def refused_confirmations(world):
    session = world.new_session(agent=asking_agent(world).id).id
    follower = Follower(world.client, session)
    world.client.beta.sessions.events.send(session, events=[message(world.run("echo once"))])
    use = follower.until(asked)[-1].stop_reason.event_ids[0]
    sent = follower.events[0].id
    raises(anthropic.BadRequestError, lambda: confirm(world, session, sent, "allow"))
    raises(anthropic.BadRequestError, lambda: confirm(world, session, "sevt_none", "allow"))
    raises(anthropic.BadRequestError, lambda: confirm(world, session, use, "allow", deny_message="x"))
    confirm(world, session, use, "allow")
    raises(anthropic.BadRequestError, lambda: confirm(world, session, use, "allow"))
    follower.until(is_end)


ASK = {
    "type": "custom",
    "name": "ask",
    "description": "Asks the client a question",
    "input_schema": {"type": "object", "properties": {"question": {"type": "string"}}, "required": ["question"]},
}


def answer(world, session, tool_use_id, text, **more):
    content = [{"type": "text", "text": text}]
    event = {"type": "user.custom_tool_result", "custom_tool_use_id": tool_use_id, "content": content, **more}
    return world.client.beta.sessions.events.send(session, events=[event])


@check(43, "a custom tool", per_runtime=True)
def custom_tool(world):
    if world.runtime == "shell":
        raises(anthropic.BadRequestError, lambda: world.new_agent(tools=[ASK]))
        return
    session = world.new_session(agent=world.new_agent(tools=TOOLS + [ASK]).id).id
    follower = Follower(world.client, session)
    world.client.beta.sessions.events.send(session, events=[message("ask the client: how many?")])
    events = follower.until(asked)
    use = [event for event in events if event.type == "agent.custom_tool_use"][-1]
    assert (use.name, use.input) == ("ask", {"question": "how many?"}), use
    assert events[-1].stop_reason.event_ids == [use.id], events[-1]
    assert world.client.beta.sessions.retrieve(session).status == "idle"
    raises(anthropic.BadRequestError, lambda: confirm(world, session, use.id, "allow"))
    sent = answer(world, session, use.id, "forty-two").data[0]
    assert sent.custom_tool_use_id == use.id, sent
    raises(anthropic.BadRequestError, lambda: answer(world, session, use.id, "twice"))
    rest = follower.until(is_end, len(events))
    assert in_order(types(rest), ["user.custom_tool_result", "session.status_running", "agent.message", "session.status_idle"]), types(rest)
    assert sent.id in [event.id for event in rest if event.type == "user.custom_tool_result" and event.processed_at], types(rest)
    assert "forty-two" in said(rest), said(rest)
    hidden = [event for event in follower.events if event.type in ("agent.tool_result", "agent.mcp_tool_use", "agent.mcp_tool_result")]
    assert not [event for event in hidden if "forty-two" in str(event) or getattr(event, "mcp_server_name", "")], types(follower.events)


@check(44, "a result sent before the idle")
def result_at_once(world):
    session = world.new_session(agent=world.new_agent(tools=TOOLS + [ASK]).id).id
    follower = Follower(world.client, session)
    world.client.beta.sessions.events.send(session, events=[message("ask the client: how many?")])
    use = follower.until("agent.custom_tool_use")[-1]
    answer(world, session, use.id, "it failed", is_error=True)
    events = follower.until(is_end)
    assert "it failed" in said(events), said(events)


@check(45, "an agent with overrides")
def overrides(world):
    override = {"type": "agent_with_overrides", "id": world.agent, "system": "Overridden."}
    made = world.new_session(agent=override)
    assert made.agent.system == "Overridden." and made.agent.id == world.agent, made.agent
    assert world.client.beta.agents.retrieve(world.agent).system != "Overridden."


@check(46, "event_deltas")
def deltas(world):
    session = world.new_session().id
    follower = Follower(world.client, session, event_deltas=["agent.message"])
    _, events, _ = world.turn(session, world.say("hello"), follower)
    [start] = [event for event in events if event.type == "event_start"]
    message = next(event for event in events if getattr(event, "id", None) == start.event.id)
    parts = [event.delta.content.text for event in events if event.type == "event_delta" and event.event_id == start.event.id]
    assert parts and message.content[0].text.startswith("".join(parts)), (parts, message)
    order = [event.type for event in events]
    assert order.index("event_start") < order.index("event_delta") < order.index("agent.message"), order
    assert not {"event_start", "event_delta"} & set(types(world.list(session)))
    assert message.id in [event.id for event in world.list(session)]
    raises(anthropic.BadRequestError, lambda: world.client.beta.sessions.events.stream(session, event_deltas=["x"]))


@check(47, "vaults and a credential")
def vaults(world):
    vaults = world.client.beta.vaults
    vault = vaults.create(display_name="v")
    auth = {"type": "environment_variable", "secret_name": "CONFORMANCE", "secret_value": "s3cr3t-value", "networking": {"type": "unrestricted"}}
    credential = vaults.credentials.create(vault.id, auth=auth)
    assert credential.auth.secret_name == "CONFORMANCE" and "s3cr3t-value" not in str(credential), credential
    error = raises(anthropic.ConflictError, lambda: vaults.credentials.create(vault.id, auth=auth))
    assert error.response.headers["x-should-retry"] == "false"
    session = world.new_session(vault_ids=[vault.id])
    assert session.vault_ids == [vault.id]
    assert vaults.archive(vault.id).archived_at
    raises(anthropic.BadRequestError, lambda: world.new_session(vault_ids=[vault.id]))
    assert vaults.delete(vault.id).type == "vault_deleted"


@check(48, "a vault's variable in the sandbox", per_runtime=True)
def vault_variable(world):
    vaults = world.client.beta.vaults
    vault = vaults.create(display_name="v")
    auth = {"type": "environment_variable", "secret_name": "CONFORMANCE", "secret_value": "four", "networking": {"type": "unrestricted"}}
    credential = vaults.credentials.create(vault.id, auth=auth)
    session = world.new_session(vault_ids=[vault.id]).id
    write = world.run("printf %s ${#CONFORMANCE} >/mnt/session/outputs/length")
    world.turn(session, write)
    assert output_of(world, session, "length") == b"4"
    # 49: a rotated value reaches the session with its next turn.
    vaults.credentials.update(credential.id, vault_id=vault.id, auth={"type": "environment_variable", "secret_value": "longer"})
    world.turn(session, write)
    assert output_of(world, session, "length") == b"6"


@check(49, "credentials and vaults that are archived")
def archived_vaults(world):
    vaults = world.client.beta.vaults
    vault = vaults.create(display_name="v", metadata={"a": "b"})
    assert vaults.update(vault.id, metadata={"a": None}).metadata == {}
    auth = {"type": "static_bearer", "mcp_server_url": "https://mcp.example/x", "token": "s3cr3t-token"}
    credential = vaults.credentials.create(vault.id, auth=auth, display_name="c")
    assert "s3cr3t-token" not in str(vaults.credentials.retrieve(credential.id, vault_id=vault.id))
    assert vaults.credentials.archive(credential.id, vault_id=vault.id).archived_at
    assert list(vaults.credentials.list(vault.id)) == []
    assert len(list(vaults.credentials.list(vault.id, include_archived=True))) == 1
    again = vaults.credentials.create(vault.id, auth=auth)
    assert vaults.credentials.delete(again.id, vault_id=vault.id).type == "vault_credential_deleted"
    vaults.archive(vault.id)
    raises(anthropic.BadRequestError, lambda: vaults.credentials.create(vault.id, auth=auth))
    assert vault.id in [each.id for each in vaults.list(include_archived=True)]


def output_of(world, session, name):
    listed = world.client.beta.files.list(scope_id=session, betas=["managed-agents-2026-04-01"])
    found = [file for file in listed if file.filename == name]
    assert len(found) == 1, list(listed)
    return world.client.beta.files.download(found[0].id).read()


class McpServer(http.server.BaseHTTPRequestHandler):
    """A server with one tool, for whoever shows a token, and its token endpoint."""

    protocol_version = "HTTP/1.1"
    lock = threading.Lock()
    tokens = {"t0ken-of-the-vault"}
    # Each is good once.
    refresh_tokens = set()

    def do_POST(self):
        sent = self.rfile.read(int(self.headers["content-length"]))
        if self.path == "/token":
            return self.refresh(dict(urllib.parse.parse_qsl(sent.decode())))
        sent = json.loads(sent)
        if (self.headers["authorization"] or "").removeprefix("Bearer ") not in self.tokens:
            return self.answer(401)
        if "id" not in sent:
            return self.answer(202)
        schema = {"type": "object", "properties": {"text": {"type": "string"}}, "required": ["text"]}
        params = sent.get("params") or {}
        result = {
            "initialize": lambda: {"protocolVersion": params["protocolVersion"], "capabilities": {"tools": {}}, "serverInfo": {"name": "echo", "version": "1"}},
            "tools/list": lambda: {"tools": [{"name": "say", "description": "Says it again", "inputSchema": schema}]},
            "tools/call": lambda: {"content": [{"type": "text", "text": params["arguments"]["text"] + " over HTTP"}]},
        }.get(sent["method"], dict)()
        self.answer(200, json.dumps({"jsonrpc": "2.0", "id": sent["id"], "result": result}).encode())

    def do_GET(self):
        self.answer(405)

    def answer(self, status, body=b""):
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


    def refresh(self, form):
        with self.lock:
            is_client = (form["grant_type"], form["client_id"], form["client_secret"]) == ("refresh_token", "c", "s3cr3t/+")
            if not is_client or form["refresh_token"] not in self.refresh_tokens:
                return self.answer(400, b'{"error": "invalid_grant"}')
            self.refresh_tokens.remove(form["refresh_token"])
            access, refresh = f"access-{uuid.uuid4()}", f"refresh-{uuid.uuid4()}"
            self.tokens.add(access)
            self.refresh_tokens.add(refresh)
        answer = {"access_token": access, "token_type": "Bearer", "expires_in": 3600, "refresh_token": refresh}
        self.answer(200, json.dumps(answer).encode())


MCP_SERVING = threading.Lock()


@functools.cache
def serve_mcp(port):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", port), McpServer)
    threading.Thread(target=server.serve_forever, daemon=True).start()


def mcp_origin(world):
    # A port of this machine that sandboxes reach.
    port = os.environ.get("MCP_PORT")
    if world.runtime == "shell" or not port:
        raise NotHere
    with MCP_SERVING:
        serve_mcp(int(port))
    return f"http://127.0.0.1:{port}"


def says_by_mcp(world, url, vault, word):
    """A session's tool use of the server, which its user allows. Returns all of the session's events."""
    tools = TOOLS + [{"type": "mcp_toolset", "mcp_server_name": "echo"}]
    agent = world.new_agent(tools=tools, mcp_servers=[{"type": "url", "name": "echo", "url": url}]).id
    session = world.new_session(agent=agent, vault_ids=[vault]).id
    # Codex does not wait for a server in its first turn.
    world.turn(session, world.say("hello"))
    follower = Follower(world.client, session)
    world.client.beta.sessions.events.send(session, events=[message(f"echo by MCP: {word}")])
    events = follower.until(asked)
    use = [event for event in events if event.type == "agent.mcp_tool_use"][-1]
    assert (use.mcp_server_name, use.name, use.evaluated_permission) == ("echo", "say", "ask"), use
    assert events[-1].stop_reason.event_ids == [use.id], events[-1]
    confirm(world, session, use.id, "allow")
    rest = follower.until(is_end, len(events))
    [result] = [event for event in rest if event.type == "agent.mcp_tool_result"]
    assert result.mcp_tool_use_id == use.id and f"{word} over HTTP" in result.content[0].text, result
    assert f"{word} over HTTP" in said(rest), said(rest)
    return follower.events


@check(50, "an MCP server with a static_bearer", per_runtime=True)
def mcp_server(world):
    url = f"{mcp_origin(world)}/mcp"
    vault = world.client.beta.vaults.create(display_name="v").id
    world.client.beta.vaults.credentials.create(vault, auth={"type": "static_bearer", "mcp_server_url": url, "token": "t0ken-of-the-vault"})
    assert "t0ken-of-the-vault" not in str(says_by_mcp(world, url, vault, "seven"))


@check(66, "an MCP server with an mcp_oauth that is refreshed", per_runtime=True)
def mcp_server_with_oauth(world):
    origin = mcp_origin(world)
    vault, credentials = world.client.beta.vaults.create(display_name="v").id, world.client.beta.vaults.credentials
    first = f"refresh-{uuid.uuid4()}"
    McpServer.refresh_tokens.add(first)
    refresh = {
        "client_id": "c",
        "refresh_token": first,
        "token_endpoint": f"{origin}/token",
        "token_endpoint_auth": {"type": "client_secret_post", "client_secret": "s3cr3t/+"},
    }
    auth = {"type": "mcp_oauth", "mcp_server_url": f"{origin}/mcp", "access_token": "access-0", "expires_at": "2020-01-01T00:00:00Z", "refresh": refresh}
    credential = credentials.create(vault, auth=auth)
    # A second session uses what the refresh for the first one brought.
    for word in ["eight", "nine"]:
        events = str(says_by_mcp(world, f"{origin}/mcp", vault, word))
        assert "access-" not in events and "refresh-" not in events, events
        assert first not in McpServer.refresh_tokens
    raises(anthropic.ConflictError, lambda: credentials.create(vault, auth={"type": "static_bearer", "mcp_server_url": f"{origin}/mcp", "token": "t"}))
    shown = credentials.retrieve(credential.id, vault_id=vault)
    assert shown.auth.type == "mcp_oauth" and shown.auth.refresh.token_endpoint_auth.type == "client_secret_post", shown
    assert not any(secret in str(shown) for secret in ["s3cr3t", "access-", "refresh-"]), shown


@check(51, "files into and out of a sandbox", per_runtime=True)
def files(world):
    try:
        uploaded = world.client.beta.files.upload(file=("in.txt", b"from the client", "text/plain"))
    except TypeError:
        raise NotHere from None
    assert uploaded.filename == "in.txt" and uploaded.size_bytes == 15 and uploaded.mime_type == "text/plain", uploaded
    made = world.new_session(resources=[{"type": "file", "file_id": uploaded.id, "mount_path": "in.txt"}])
    assert made.resources[0].file_id != uploaded.id and made.resources[0].mount_path == "/mnt/session/uploads/in.txt", made.resources
    world.turn(made.id, world.run("cat /mnt/session/uploads/in.txt /mnt/session/uploads/in.txt >/mnt/session/outputs/out.txt"))
    assert output_of(world, made.id, "out.txt") == b"from the clientfrom the client"
    assert world.client.beta.files.retrieve_metadata(uploaded.id).id == uploaded.id
    assert world.client.beta.files.delete(uploaded.id).type == "file_deleted"
    raises(anthropic.NotFoundError, lambda: world.client.beta.files.retrieve_metadata(uploaded.id))


@check(52, "resources of a session")
def session_resources(world):
    uploaded = world.client.beta.files.upload(file=("in.txt", b"x", "text/plain"))
    session, resources = world.new_session().id, world.client.beta.sessions.resources
    added = resources.add(session, type="file", file_id=uploaded.id)
    assert added.mount_path == f"/mnt/session/uploads/{uploaded.id}", added
    assert [resource.id for resource in resources.list(session)] == [added.id]
    assert resources.retrieve(added.id, session_id=session).file_id == added.file_id
    assert resources.delete(added.id, session_id=session).type == "session_resource_deleted"
    assert list(resources.list(session)) == []
    raises(anthropic.NotFoundError, lambda: resources.add(session, type="file", file_id="file_none"))
    made = world.new_session(resources=[{"type": "github_repository", "url": "https://github.com/acme/none", "authorization_token": "one"}])
    changed = resources.update(made.resources[0].id, session_id=made.id, authorization_token="two")
    assert changed.id == made.resources[0].id and changed.mount_path == "/workspace/none", changed
    assert changed.updated_at > changed.created_at and "two" not in changed.to_json(), changed
    raises(anthropic.BadRequestError, lambda: resources.update(changed.id, session_id=made.id, authorization_token=""))


@check(55, "budgets are refused, not ignored")
def no_budget(world):
    budget = {"type": "limit", "max_list_cost": {"amount": "1", "currency": "USD"}}
    error = raises(anthropic.BadRequestError, lambda: world.new_session(budget=budget))
    assert "budget" in error.body["error"]["message"], error.body


@check(56, "tools of a session's agent")
def session_tools(world):
    sessions = world.client.beta.sessions
    session = world.new_session().id
    follower = Follower(world.client, session)
    policy = {"name": "bash", "permission_policy": {"type": "always_ask"}}
    tools = [{"type": "agent_toolset_20260401", "configs": [policy]}]
    sessions.events.send(session, events=[message(world.run("sleep 3; echo on"))])
    follower.until("session.status_running")
    raises(anthropic.BadRequestError, lambda: sessions.update(session, agent={"tools": tools}))
    events = follower.until(is_end)
    updated = sessions.update(session, agent={"tools": tools})
    [bash] = [config for config in updated.agent.tools[0].configs if config.name == "bash"]
    assert bash.permission_policy.type == "always_ask" and updated.agent.id == world.agent, updated.agent
    assert world.client.beta.agents.retrieve(world.agent).tools[0].default_config.permission_policy.type == "always_allow"
    if not LEFT_OUT:
        told = follower.until("session.updated", len(events))[-1]
        assert told.agent.tools == updated.agent.tools and getattr(told, "title", None) is None, told
    sessions.events.send(session, events=[message(world.run("touch /tmp/asked"))])
    use = follower.until(asked, len(events))[-1].stop_reason.event_ids[0]
    confirm(world, session, use, "allow")
    follower.until(is_end, len(events))


@check(57, "an error of the model that passes")
def transient(world):
    session = world.new_session().id
    _, events, _ = world.turn(session, f"{uuid.uuid4()}: fail for a while with 529")
    errors = [event.error for event in events if event.type == "session.error"]
    assert errors and {error.retry_status.type for error in errors} == {"retrying"}, types(events)
    assert {error.type for error in errors} <= {"model_overloaded_error", "model_request_failed_error"}, errors
    order = ["session.status_running", "session.error", "session.status_rescheduled", "session.status_running", "session.status_idle"]
    assert in_order(types(events), order), types(events)
    assert events[-1].stop_reason.type == "end_turn" and "It works now." in said(events), events[-1]
    assert world.client.beta.sessions.retrieve(session).status == "idle"


@check(65, "what is not built is refused")
def not_built(world):
    for method, path in [
        *((method, path) for path in ["/v1/deployments", "/v1/deployment_runs", "/v1/memory_stores", "/v1/skills", "/v1/dreams"] for method in ["GET", "POST"]),
        ("GET", "/v1/environments/env_none/work/poll"),
        ("POST", "/v1/messages"),
    ]:
        status, answered, text = raw(method, path, {} if method == "POST" else None)
        assert status == 404 and json.loads(text)["error"]["type"] == "not_found_error" and answered["request-id"], (method, path, status, text)
    for field, value in [("skills", [{"type": "custom", "skill_id": "skill_x"}]), ("multiagent", {"type": "coordinator", "agents": []})]:
        status, _, text = raw("POST", "/v1/agents", {"name": "a", "model": world.model, field: value})
        assert status == 400 and field in json.loads(text)["error"]["message"], (field, status, text)
    session = world.new_session().id
    for kind in ["user.define_outcome", "user.tool_result", "system.message"]:
        status, _, text = raw("POST", f"/v1/sessions/{session}/events", {"events": [{"type": kind, "content": []}]})
        assert status == 400, (kind, status, text)


@check(62, "an Idempotency-Key sends once")
def idempotent(world):
    session = world.new_session().id
    follower = Follower(world.client, session)
    options = {"events": [message(world.say("hello"))], "extra_headers": {"Idempotency-Key": str(uuid.uuid4())}}
    one, two = (world.client.beta.sessions.events.send(session, **options) for _ in range(2))
    assert one.data[0].id == two.data[0].id
    follower.until(is_end)
    time.sleep(0.5)
    assert types(world.list(session)).count("user.message") == 1


@check(64, "events.tool_runner")
def tool_runner(world):
    import asyncio

    try:
        from anthropic import AsyncAnthropic, beta_async_tool
        AsyncAnthropic(api_key=API_KEY, base_url=BASE_URL).beta.sessions.events.tool_runner
    except (ImportError, AttributeError):
        raise NotHere
    questions = []

    @beta_async_tool
    async def ask(question: str) -> str:
        """Asks the client a question.

        Args:
            question: The question.
        """
        questions.append(question)
        return "forty-two"

    session = world.new_session(agent=world.new_agent(tools=[ASK]).id).id
    follower = Follower(world.client, session)

    async def run():
        client = AsyncAnthropic(api_key=API_KEY, base_url=BASE_URL)
        await client.beta.sessions.events.send(session, events=[message("ask the client: how many?")])
        async for _ in client.beta.sessions.events.tool_runner(session, tools=[ask], max_idle=2):
            pass

    asyncio.run(asyncio.wait_for(run(), PATIENCE))
    assert questions == ["how many?"], questions
    assert "forty-two" in said(follower.until(is_end)), types(follower.events)


@check(63, "the primary thread")
def threads(world):
    session = world.new_session().id
    world.turn(session, world.say("hello"))
    threads = list(world.client.beta.sessions.threads.list(session))
    assert len(threads) == 1 and threads[0].parent_thread_id is None and threads[0].session_id == session, threads
    got = world.client.beta.sessions.threads.retrieve(threads[0].id, session_id=session)
    assert got.status == "idle", got
    listed = list(world.client.beta.sessions.threads.events.list(threads[0].id, session_id=session))
    assert [event.id for event in listed] == [event.id for event in world.list(session)]


# --- running them ----------------------------------------------------------------------------


def run_one(number, world):
    _, _, function = CHECKS[number]
    begun = time.monotonic()
    try:
        function(world)
        result = "pass"
    except NotHere:
        result = "-"
    except (TypeError, AttributeError) as error:
        # The SDK is older than a parameter or a resource.
        is_older = LEFT_OUT and ("unexpected keyword argument" in str(error) or "'Sessions' object has no attribute" in str(error))
        result = "-" if is_older else "FAIL"
        print(f"{number} {function.__name__} {world.runtime}: {error}", file=sys.stderr)
    except Exception:  # noqa: BLE001: a check that fails says how
        result = "FAIL"
        lines = traceback.format_exc().strip().splitlines()
        print(f"{number} {function.__name__} {world.runtime}: {lines[-1][:600]}\n    {lines[-3].strip() if len(lines) > 3 else ''}", file=sys.stderr)
    return number, world.runtime, result, round(time.monotonic() - begun, 2)


def main():
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--runtimes", default="claude")
    options.add_argument("--only", default="")
    options.add_argument("--skip", default="", help="numbers of checks that are left out")
    options.add_argument("--json", default="")
    options.add_argument("--parallel", type=int, default=6)
    options = options.parse_args()
    numbers = lambda text: {int(number) for number in text.split(",") if number}
    wanted = (numbers(options.only) or set(CHECKS)) - numbers(options.skip)
    worlds = [World(runtime) for runtime in options.runtimes.split(",")]
    jobs = [
        (number, world)
        for number in sorted(wanted)
        for world in (worlds if CHECKS[number][1] else worlds[:1])
    ]
    results = {}
    with concurrent.futures.ThreadPoolExecutor(options.parallel) as pool:
        for number, runtime, result, seconds in pool.map(lambda job: run_one(*job), jobs):
            title, per_runtime, _ = CHECKS[number]
            row = results.setdefault(number, {"number": number, "title": title, "per_runtime": per_runtime, "runtimes": {}})
            row["runtimes"][runtime] = {"result": result, "seconds": seconds}
    report = {"client": f"anthropic {anthropic.__version__}", "checks": list(results.values())}
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump(report, file, indent=1)
    failed = [row["number"] for row in report["checks"] if any(cell["result"] == "FAIL" for cell in row["runtimes"].values())]
    passed = sum(cell["result"] == "pass" for row in report["checks"] for cell in row["runtimes"].values())
    print(f"{report['client']}: {passed} passed; failed: {failed or 'none'}")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
