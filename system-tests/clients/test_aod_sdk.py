"""The published client, aod-sdk, unmodified: every method, every typed error, streams, and the nastiest output there is.

Runs against the stack that AOD_READY describes.
"""

import asyncio
import json
import os
import signal
import subprocess
import time
import uuid
from contextlib import contextmanager
from pathlib import Path

import pytest
from aod import (
    AodHTTPError,
    AsyncClient,
    AuthError,
    Client,
    ConflictError,
    NotFoundError,
    RateLimitError,
    ServerError,
    ValidationError,
)

READY = Path(os.environ["AOD_READY"])
NOBODY = "00000000-0000-4000-8000-000000000000"


def ready():
    return json.loads(READY.read_text())


@pytest.fixture(scope="module")
def client():
    with Client(token=ready()["api_key"], base_url=ready()["api_url"]) as client:
        yield client


@pytest.fixture(scope="module")
def shell(client):
    return client.agents.create(name="shell", model="none", runtime="shell")


def name():
    return f"test-{uuid.uuid4()}"


def follow(client, session, **since):
    with client.sessions.stream(session, **since) as events:
        return list(events)


def run(client, agent, script, **options):
    ack = client.sessions.create(agent_id=agent.id, prompt=script, timeout=60, **options)
    return ack, follow(client, ack.id)


def text(events, stream="stdout"):
    return "".join(event.extra["data"] for event in events if event.type == "output" and event.extra["stream"] == stream)


def admin(*args, **options):
    command = [os.environ["AOD_BIN"], "admin", "--data-dir", str(READY.parent), "--output", "json", *args]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True, timeout=30, **options).stdout)


# --- agents --------------------------------------------------------------------------------------


def test_agents(client):
    environment = client.environments.create(name=name())
    skills = [
        {"name": "greet", "description": "how to greet", "content": "# Say hello\n"},
        {"type": "github", "source": "owner/repo", "description": "some", "name": "some"},
    ]
    servers = [
        {"name": "docs", "type": "url", "url": "https://docs.example/mcp", "headers": {"Authorization": "Bearer s3cret"}},
        {"name": "files", "type": "stdio", "command": "npx", "args": ["files"], "env": {"TOKEN": "s3cret"}},
    ]
    agent = client.agents.create(
        name="first",
        model="claude-sonnet-4-5",
        runtime="claude",
        system="Be brief.",
        description="Writes",
        environment_id=environment.id,
        skills=skills,
        mcp_servers=servers,
        metadata={"team": "x", "empty": ""},
    )
    assert (agent.name, agent.version, agent.model, agent.runtime) == ("first", 1, "anthropic/claude-sonnet-4-5", "claude")
    assert (agent.system, agent.description, agent.environment_id) == ("Be brief.", "Writes", environment.id)
    assert agent.skills == skills and agent.metadata == {"team": "x", "empty": ""} and agent.archived_at is None
    shown = [server.model_dump(exclude_none=True) for server in agent.mcp_servers]
    assert "s3cret" not in str(shown) and [(server["name"], server["type"]) for server in shown] == [("docs", "url"), ("files", "stdio")]
    assert client.agents.get(agent.id) == agent
    assert agent.id == client.agents.list()[0].id

    same = client.agents.update(agent.id, version=1, name="first", metadata={"team": "x"}, mcp_servers=servers)
    assert same.version == 1 and same == agent
    changed = client.agents.update(agent.id, version=1, metadata={"team": "", "new": "y"}, system="")
    assert (changed.version, changed.metadata, changed.system) == (2, {"empty": "", "new": "y"}, None)
    assert changed.updated_at > agent.updated_at
    # `***` keeps what is stored; another value replaces it: only the latter is a change.
    kept = [{**servers[0], "headers": {"Authorization": "***"}}, servers[1]]
    assert client.agents.update(agent.id, version=2, mcp_servers=kept).version == 2
    kept[1] = {**servers[1], "env": {"TOKEN": "other"}}
    assert client.agents.update(agent.id, version=2, mcp_servers=kept).version == 3
    with pytest.raises(ConflictError) as refused:
        client.agents.update(agent.id, version=1, name="late")
    assert refused.value.detail == "Version mismatch: expected 3, got 1"
    versions = client.agents.versions(agent.id)
    assert [version.version for version in versions] == [3, 2, 1]
    assert versions[2].system == "Be brief." and {version.id for version in versions} == {agent.id}

    archived = client.agents.archive(agent.id)
    assert archived.archived_at is not None and archived.version == 3
    for call, detail in [
        (lambda: client.agents.archive(agent.id), "Agent is already archived"),
        (lambda: client.agents.update(agent.id, version=3, name="x"), "Cannot update an archived agent"),
        (lambda: client.sessions.create(agent_id=agent.id, prompt="x"), "Cannot create session with archived agent"),
    ]:
        with pytest.raises(ConflictError) as refused:
            call()
        assert refused.value.detail == detail
    assert agent.id not in [listed.id for listed in client.agents.list()]
    assert client.agents.get(agent.id).archived_at == archived.archived_at


def test_environments(client, shell):
    called = name()
    environment = client.environments.create(
        name=called,
        packages={"pip": ["requests>=2,<3"], "apt": ["jq"]},
        env_vars={"SECRET": "s3cret", "EMPTY": ""},
        setup_script="true",
        networking={"type": "limited", "allowed_hosts": ["*.example.org", "example.org"]},
    )
    assert environment.packages == {"apt": ["jq"], "pip": ["requests>=2,<3"]} and environment.setup_script == "true"
    assert environment.networking.type == "limited" and environment.networking.allowed_hosts == ["*.example.org", "example.org"]
    assert client.environments.get(environment.id) == environment
    assert environment.id in [listed.id for listed in client.environments.list()]
    with pytest.raises(ConflictError) as refused:
        client.environments.create(name=called)
    assert refused.value.detail == f"An active environment named '{called}' exists."

    same = client.environments.update(environment.id, version=1, env_vars={"EMPTY": "", "SECRET": "s3cret"}, packages=environment.packages)
    assert same.version == 1
    assert client.environments.update(environment.id, version=1, env_vars={"SECRET": "other"}).version == 2
    open_to_all = client.environments.update(environment.id, version=2, networking={"type": "unrestricted"}, packages={})
    assert (open_to_all.version, open_to_all.packages, open_to_all.networking.type) == (3, {}, "unrestricted")
    assert [version.version for version in client.environments.versions(environment.id)] == [3, 2, 1]
    with pytest.raises(ConflictError) as refused:
        client.environments.update(environment.id, version=9)
    assert refused.value.detail == "Version mismatch: expected 3, got 9"

    # Pinned: a later edit changes nothing for a session's next turn.
    ack, events = run(client, shell, 'echo "$SECRET"', environment_id=environment.id)
    assert text(events) == "other\n" and ack.environment_id == environment.id
    with pytest.raises(ConflictError) as refused:
        client.environments.delete(environment.id)
    assert refused.value.detail == "Cannot delete environment with existing sessions"
    client.environments.archive(environment.id)
    for call, detail in [
        (lambda: client.environments.archive(environment.id), "Environment is already archived"),
        (lambda: client.environments.update(environment.id, version=3, name="x"), "Cannot update an archived environment"),
        (lambda: run(client, shell, "true", environment_id=environment.id), "Cannot create session with archived environment"),
        (lambda: client.agents.update(shell.id, version=1, environment_id=environment.id), "Cannot assign an archived environment to an agent"),
    ]:
        with pytest.raises(ConflictError) as refused:
            call()
        assert refused.value.detail == detail
    # An archived name is free again.
    client.environments.delete(client.environments.create(name=called).id)
    client.sessions.delete(ack.id)
    client.environments.delete(environment.id)
    with pytest.raises(NotFoundError):
        client.environments.get(environment.id)


# --- sessions ------------------------------------------------------------------------------------


def test_sessions(client, shell):
    ack = client.sessions.create(agent_id=shell.id, prompt="echo one; echo wrong >&2; exit 0", timeout=30)
    assert (ack.status, ack.current_turn, ack.stream_url) == ("pending", 1, f"/sessions/{ack.id}/stream")
    live = follow(client, ack.id)
    assert live[0].type == "start" and live[0].id is None and live[0].extra["session_id"] == str(ack.id)
    stages = [(event.extra["stage"], event.extra["state"]) for event in live if event.type == "stage"]
    assert stages == [("create_sprite", "started"), ("create_sprite", "done"), ("env_file", "started"), ("env_file", "done"), ("runtime_start", "started")]
    assert (text(live), text(live, "stderr")) == ("one\n", "wrong\n")
    assert live[-1].type == "exit" and live[-1].extra["code"] == 0
    ids = [event.id for event in live if event.type not in ("start", "turn_start")]
    assert ids == sorted(set(ids))
    session = client.sessions.get(ack.id)
    assert (session.status, session.exit_code, session.turn_count, session.current_turn) == ("completed", 0, 1, 1)
    assert session.agent_id == shell.id and ack.id in [listed.id for listed in client.sessions.list()]

    # Replayed, from the start and from each event.
    assert [(event.type, event.id, event.extra) for event in follow(client, ack.id)] == [(event.type, event.id, event.extra) for event in live]
    for at, event in enumerate(live):
        if event.type in ("start", "turn_start"):
            continue
        rest = [(later.type, later.id) for later in follow(client, ack.id, since=event.id) if later.type not in ("start", "turn_start")]
        assert rest == [(later.type, later.id) for later in live[at + 1 :] if later.type != "turn_start"]

    second = client.sessions.prompt(ack.id, prompt="echo two; exit 3", timeout=30)
    assert (second.status, second.current_turn) == ("pending", 2)
    both = follow(client, ack.id)
    assert [event.extra["turn"] for event in both if event.type == "turn_start"] == [1, 2]
    assert [event.type for event in both].count("exit") == 1 and both[-1].extra["code"] == 3
    turns = client.sessions.turns(ack.id)
    assert [(turn.turn_number, turn.prompt, turn.status, turn.exit_code) for turn in turns] == [
        (1, "echo one; echo wrong >&2; exit 0", "completed", 0),
        (2, "echo two; exit 3", "failed", 3),
    ]
    assert all(turn.started_at and turn.ended_at for turn in turns)
    with pytest.raises(ConflictError) as refused:
        client.sessions.prompt(ack.id, prompt="x")
    assert refused.value.detail == "Session has failed and cannot be resumed. Start a new session."

    assert client.sessions.terminate(ack.id).status == "terminated"
    with pytest.raises(ConflictError) as refused:
        client.sessions.terminate(ack.id)
    assert refused.value.detail == "Session is already terminated"
    with pytest.raises(ConflictError) as refused:
        client.sessions.prompt(ack.id, prompt="x")
    assert refused.value.detail == "Session has been terminated"
    assert follow(client, ack.id)[-1].type == "terminated"
    client.sessions.delete(ack.id)
    with pytest.raises(NotFoundError) as refused:
        client.sessions.get(ack.id)
    assert refused.value.detail == "Session not found"


def test_states_refuse_what_they_must(client, shell):
    ack = client.sessions.create(agent_id=shell.id, prompt="echo begun; sleep 60", timeout=70)
    with client.sessions.stream(ack.id) as events:
        assert any(event.type == "output" for event in events)
    # A stream is ahead of the status by a moment.
    for _ in range(300):
        if client.sessions.get(ack.id).status == "running":
            break
        time.sleep(0.1)
    with pytest.raises(ConflictError) as refused:
        client.sessions.prompt(ack.id, prompt="x")
    assert refused.value.detail == "Session is already running"
    with pytest.raises(ConflictError) as refused:
        client.sessions.delete(ack.id)
    assert refused.value.detail == "Cannot delete an active session"
    # An open stream hears of it.
    with client.sessions.stream(ack.id) as events:
        next(events)
        client.sessions.terminate(ack.id)
        assert [event.type for event in events][-1] == "terminated"
    client.sessions.delete(ack.id)


def test_a_repository_is_echoed_and_a_failed_clone_says_why(client, shell):
    resource = {"type": "github_repository", "url": "https://github.com/o/r.git", "authorization_token": "s3cret"}
    ack, events = run(client, shell, "true", resources=[resource])
    assert [item.model_dump(exclude_none=True) for item in ack.resources] == [
        {"type": "github_repository", "url": "https://github.com/o/r", "mount_path": "/workspace/r"}
    ]
    assert client.sessions.get(ack.id).resources == ack.resources
    assert events[-1].type == "error" and "cloning https://github.com/o/r" in events[-1].extra["message"]
    assert "s3cret" not in str(events)


# --- errors --------------------------------------------------------------------------------------


def test_typed_errors(client, shell):
    for call, error, detail in [
        (lambda: Client(token="aod_wrong", base_url=ready()["api_url"]).agents.list(), AuthError, "Invalid API key"),
        (lambda: client.agents.get(NOBODY), NotFoundError, "Agent not found"),
        (lambda: client.environments.get("x"), NotFoundError, "Environment not found"),
        (lambda: client.sessions.turns(NOBODY), NotFoundError, "Session not found"),
        (lambda: follow(client, NOBODY), NotFoundError, "Session not found"),
        (lambda: client.sessions.create(agent_id=NOBODY, prompt="x"), NotFoundError, "Agent not found"),
        (lambda: client.sessions.create(agent_id=shell.id, prompt="x", environment_id=NOBODY), NotFoundError, "Environment not found"),
        (
            lambda: client.agents.create(name="x", model="openai/o3", runtime="claude"),
            ValidationError,
            "Runtime claude cannot serve model openai/o3: provider openai not in ['anthropic']",
        ),
        (lambda: follow(client, shell.id, since=-1), AodHTTPError, "since must be an integer"),
    ]:
        with pytest.raises(error) as refused:
            call() if error is not AodHTTPError else follow(client, run(client, shell, "true")[0].id, since=-1)
        assert refused.value.detail == detail
    with pytest.raises(ValidationError) as refused:
        client.sessions.create(agent_id=shell.id, prompt="x", timeout=9)
    assert refused.value.detail == [
        {"type": "greater_than_equal", "loc": ["timeout"], "msg": "Input should be greater than or equal to 10", "input": 9}
    ]


def test_the_quota_is_a_typed_error(client):
    user = name()
    admin("user", "create", user)
    admin("quota", "set", user, "1")
    admin("credential", "set", user, "backend:sprites", input=ready()["sprites_token"])
    with Client(token=admin("key", "create", user)["key"], base_url=ready()["api_url"]) as other:
        agent = other.agents.create(name="a", model="none", runtime="shell")
        # Another user's agent is not found.
        with pytest.raises(NotFoundError):
            client.agents.get(agent.id)
        first = other.sessions.create(agent_id=agent.id, prompt="sleep 60", timeout=70)
        with pytest.raises(RateLimitError) as refused:
            other.sessions.create(agent_id=agent.id, prompt="true")
        assert (refused.value.limit, refused.value.active) == (1, 1)
        assert refused.value.detail.startswith("Concurrent session limit reached (1/1).")
        other.sessions.terminate(first.id)
        run(other, agent, "true")
        admin("user", "disable", user)
        import time

        time.sleep(1)
        with pytest.raises(AuthError) as refused:
            other.agents.list()
        assert refused.value.detail == "API key is inactive"


@contextmanager
def stopped(service):
    pids = [process["pid"] for process in ready()["services"][service]]
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGCONT)


def test_a_part_that_is_down_is_a_typed_error_and_no_hang(client):
    with stopped("scheduler"), pytest.raises(ServerError) as refused:
        client.agents.list()
    assert refused.value.status_code == 503
    assert client.health()["status"] == "ok"


# --- output of every kind ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        (r"printf '\342\200\250|\342\200\251|\302\205|\v\f\034\035\036|\r\n|\r'", "\u2028|\u2029|\x85|\v\f\x1c\x1d\x1e|\r\n|\r"),
        (r"for byte in 360 237 230 200; do printf \\$byte; sleep 0.15; done", "😀"),
        (r"printf 'a\377b\300\257c\355\240\200d\360\237'", "a\ufffdb\ufffd\ufffdc\ufffd\ufffd\ufffdd\ufffd"),
        (r"printf 'a\000b\000'", "a\0b\0"),
        (r"""printf '%s' '{"type":"exit"}' 'data: x' '"\u0041' '</script>'""", '{"type":"exit"}data: x"\\u0041</script>'),
        (r"printf 'e\314\201\342\200\215\360\237\221\251\342\200\215\360\237\232\200\357\273\277\342\200\256'", "e\u0301\u200d👩\u200d🚀\ufeff\u202e"),
        (r"head -c 300000 /dev/zero | tr '\0' '\n'", "\n" * 300_000),
    ],
)
def test_output_arrives_as_it_was_written(client, shell, script, expected):
    ack, live = run(client, shell, script)
    assert text(live) == expected
    assert text(follow(client, ack.id)) == expected


# --- the async client ----------------------------------------------------------------------------


def test_every_method_of_the_async_client():
    async def everything():
        async with AsyncClient(token=ready()["api_key"], base_url=ready()["api_url"]) as client:
            assert (await client.health())["status"] == "ok"
            environment = await client.environments.create(name=name(), env_vars={"A": "1"})
            environment = await client.environments.update(environment.id, version=1, env_vars={"A": "2"})
            assert (await client.environments.get(environment.id)).version == 2
            assert len(await client.environments.versions(environment.id)) == 2
            agent = await client.agents.create(name="async", model="none", runtime="shell", environment_id=environment.id)
            agent = await client.agents.update(agent.id, version=1, name="renamed")
            assert (await client.agents.get(agent.id)).name == "renamed"
            assert len(await client.agents.versions(agent.id)) == 2
            assert agent.id in [listed.id for listed in await client.agents.list()]
            assert environment.id in [listed.id for listed in await client.environments.list()]
            ack = await client.sessions.create(agent_id=agent.id, prompt="echo $A", timeout=60)
            async with client.sessions.stream(ack.id) as events:
                live = [event async for event in events]
            assert text(live) == "2\n" and live[-1].type == "exit"
            await client.sessions.prompt(ack.id, prompt="echo again")
            async with client.sessions.stream(ack.id, since=live[-1].id) as events:
                assert text([event async for event in events]) == "again\n"
            assert len(await client.sessions.turns(ack.id)) == 2
            assert (await client.sessions.get(ack.id)).status == "completed"
            assert ack.id in [listed.id for listed in await client.sessions.list()]
            assert (await client.sessions.terminate(ack.id)).status == "terminated"
            await client.sessions.delete(ack.id)
            with pytest.raises(NotFoundError):
                async with client.sessions.stream(ack.id) as events:
                    async for _ in events:
                        pass
            await client.agents.archive(agent.id)
            await client.environments.archive(environment.id)
            await client.environments.delete(environment.id)

    asyncio.run(everything())


def test_twenty_sessions_at_once():
    async def session(client, agent, number):
        ack = await client.sessions.create(agent_id=agent.id, prompt=f"for i in $(seq 200); do echo {number}-$i; done", timeout=60)
        async with client.sessions.stream(ack.id) as events:
            live = [event async for event in events]
        assert text(live) == "".join(f"{number}-{i}\n" for i in range(1, 201)), number
        assert live[-1].type == "exit"

    async def all_of_them():
        async with AsyncClient(token=ready()["api_key"], base_url=ready()["api_url"]) as client:
            agent = await client.agents.create(name="many", model="none", runtime="shell")
            await asyncio.gather(*(session(client, agent, number) for number in range(20)))

    asyncio.run(all_of_them())
