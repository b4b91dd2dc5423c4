"""The whole surface of sprites-py, unmodified, against local-sprites."""

import asyncio
import io
import os
import threading
import time
import uuid

import pytest
from sprites import AsyncSpritesClient, SpritesClient
from sprites import checkpoint as checkpoints
from sprites import policy as policies
from sprites import services as service_api
from sprites import session as sessions
from sprites.exceptions import APIError, AuthenticationError, FileNotFoundError_, IsADirectoryError_, NotFoundError, SpriteError
from sprites.types import ListOptions, NetworkPolicy, PolicyRule, URLSettings

URL, TOKEN = os.environ["SPRITES_URL"], os.environ["SPRITES_TOKEN"]


@pytest.fixture(scope="session")
def client():
    with SpritesClient(TOKEN, base_url=URL) as client:
        yield client


@pytest.fixture
def sprite(client):
    sprite = client.create_sprite(f"py-{uuid.uuid4().hex[:12]}")
    yield sprite
    try:
        sprite.delete()
    except NotFoundError:
        pass


def bash(sprite, script, **options):
    return sprite.run("bash", "-c", script, capture_output=True, timeout=60, **options)


def eventually(check, what, seconds=10):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if result := check():
            return result
        time.sleep(0.05)
    raise AssertionError(f"not in time: {what}")


class InThread(threading.Thread):
    """A blocking command beside the test."""

    def __init__(self, run):
        super().__init__(daemon=True)
        self.run_it, self.result = run, None
        self.start()

    def run(self):
        self.result = self.run_it()

    def end(self):
        self.join(30)
        assert not self.is_alive()
        return self.result


def test_sprites_are_made_found_changed_and_deleted(client):
    name = f"py-{uuid.uuid4().hex[:12]}"
    made = client.create_sprite(name, labels=["a", "b"])
    assert (made.name, client.get_sprite(name).status) == (name, "running")
    with pytest.raises(SpriteError, match=r"\(status 409\)"):
        client.create_sprite(name)
    changed = client.update_sprite(name, labels=["c"])
    assert changed.labels == ["c"]
    client.update_url_settings(name, URLSettings(auth="public"))
    assert client.get_sprite(name).url_settings.auth == "public"
    client.upgrade_sprite(name)
    made.delete()
    for gone in (lambda: client.get_sprite(name), lambda: client.delete_sprite(name), lambda: client.sprite(name).list_sessions()):
        with pytest.raises((NotFoundError, APIError, SpriteError)):
            gone()
    with pytest.raises(SpriteError, match="DNS label"):
        client.create_sprite("Not A Name")
    with pytest.raises(AuthenticationError):
        SpritesClient("wrong", base_url=URL).list_sprites()


def test_lists_have_pages(client):
    prefix = f"page-{uuid.uuid4().hex[:8]}"
    names = [f"{prefix}-{number}" for number in range(5)]
    for name in names:
        client.create_sprite(name)
    first = client.list_sprites(ListOptions(prefix=prefix, max_results=2))
    assert [sprite.name for sprite in first.sprites] == names[:2] and first.has_more and first.next_continuation_token
    rest = client.list_sprites(ListOptions(prefix=prefix, max_results=50, continuation_token=first.next_continuation_token))
    assert [sprite.name for sprite in rest.sprites] == names[2:] and not rest.has_more
    assert [sprite.name for sprite in client.list_all_sprites(prefix)] == names
    for name in names:
        client.destroy_sprite(name)


def test_commands(sprite):
    done = bash(sprite, "echo out; echo err >&2; exit 3")
    assert (done.returncode, done.stdout, done.stderr) == (3, b"out\n", b"err\n")
    assert sprite.command("pwd", cwd="/usr").output() == b"/usr\n"
    assert sprite.command("sh", "-c", "echo $A $HOME", env={"A": "a b+c&d"}).output() == b"a b+c&d /home/sprite\n"
    assert sprite.command("sh", "-c", "echo a; echo b >&2").combined_output() in (b"a\nb\n", b"b\na\n")
    missing = sprite.run("no-such-program", capture_output=True)
    assert missing.returncode == 127 and b"no-such-program" in missing.stderr
    nowhere = sprite.run("true", cwd="/no/such/dir", capture_output=True)
    assert nowhere.returncode != 0 and b"/no/such/dir" in nowhere.stderr
    assert bash(sprite, "kill -9 $$").returncode == 137
    assert sprite.command("cat", stdin=io.BytesIO(b"x" * 300_000)).output() == b"x" * 300_000
    assert bash(sprite, "id -un; id -u; sudo id -u").stdout == b"sprite\n1001\n0\n"


def test_no_output_is_lost(sprite):
    done = bash(sprite, "seq 1 2000000; echo end >&2")
    lines = done.stdout.split(b"\n")
    assert (len(lines), lines[0], lines[-2], done.stderr) == (2_000_001, b"1", b"2000000", b"end\n")


def test_input_and_output_do_not_wait_for_each_other(sprite):
    data = b"x" * 20_000_000
    assert sprite.command("cat", stdin=io.BytesIO(data), timeout=60).output() == data


def test_a_terminal(sprite):
    done = sprite.run("bash", "-c", "stty size; tty; test -t 1 && exit 4", tty=True, tty_rows=33, tty_cols=101, capture_output=True)
    assert (done.returncode, done.stdout.split()) == (4, [b"33", b"101", b"/dev/pts/0"]), done


def test_sessions_are_listed_attached_to_and_killed(sprite):
    first = InThread(lambda: bash(sprite, "echo begun; sleep 2; echo done"))
    session = eventually(lambda: next((s for s in sprite.list_sessions() if "begun" in s.command), None), "a session")
    assert isinstance(session.id, str) and session.workdir == "/home/sprite" and session.tty is False
    time.sleep(0.3)
    assert sprite.attach_session(session.id).output() == b"begun\ndone\n"
    assert first.end().returncode == 0
    stubborn = InThread(lambda: bash(sprite, "trap '' TERM; echo begun; while true; do sleep 0.1; done"))
    session = eventually(lambda: next((s for s in sessions.list_sessions(sprite) if "while" in s.command), None), "a session")
    time.sleep(0.3)
    told = [message.type for message in sessions.kill_session(sprite, session.id, "SIGTERM", 1)]
    assert told == ["signal", "timeout", "killed", "complete"]
    assert stubborn.end().returncode == 137
    with pytest.raises(APIError) as gone:
        sessions.kill_session(sprite, session.id)
    assert gone.value.status_code == 410
    with pytest.raises(APIError):
        sprite.attach_session("999999").run()


def test_an_idle_shell_survives_an_attach(sprite):
    """sprites-py sends an end of input before it knows that it is attached to a terminal."""

    def shell():
        command = sprite.command("bash", "--norc", tty=True)
        try:
            command.run()
        except Exception:
            pass

    InThread(shell)
    session = eventually(lambda: next((s for s in sprite.list_sessions() if s.tty), None), "a terminal")
    InThread(lambda: pytest.raises(Exception, sprite.attach_session(session.id).run))
    time.sleep(1)
    assert [s.id for s in sprite.list_sessions() if s.tty] == [session.id]
    list(sessions.kill_session(sprite, session.id, "SIGKILL", 2))


def test_files(sprite):
    fs = sprite.filesystem("/home/sprite")
    note = fs / "dir/sub/note.txt"
    note.write_text("hello", mode=0o600)
    assert note.read_text() == "hello" and note.exists() and note.is_file() and not note.is_dir()
    assert (note.stat().size, note.stat().mode) == (5, "0600")
    assert bash(sprite, "stat -c '%U %a' dir/sub/note.txt dir").stdout == b"sprite 600\nsprite 755\n"
    assert (fs / "dir").listdir() == ["sub"] and [path.name for path in (fs / "dir").iterdir()] == ["sub"]
    note.chmod(0o640)
    note.rename("/home/sprite/dir/moved.txt")
    moved = fs / "dir/moved.txt"
    assert moved.read_bytes() == b"hello" and not note.exists()
    moved.copy_to("/home/sprite/copy.txt")
    (fs / "dir").copy_to("/home/sprite/tree", recursive=True)
    assert (fs / "tree/moved.txt").read_text() == "hello" and (fs / "copy.txt").read_text() == "hello"
    (fs / "made").mkdir()
    assert bash(sprite, "test -d made && ls -A made").stdout == b""
    (fs / "a/b/c").mkdir(parents=True)
    (fs / "touched").touch()
    assert (fs / "touched").stat().size == 0
    with pytest.raises(FileNotFoundError_):
        (fs / "missing").read_text()
    with pytest.raises(FileNotFoundError_):
        (fs / "missing").unlink()
    (fs / "missing").unlink(missing_ok=True)
    with pytest.raises(Exception):
        (fs / "dir").rmdir()
    (fs / "dir").rmtree()
    (fs / "copy.txt").unlink()
    assert not (fs / "dir").exists()
    with pytest.raises(IsADirectoryError_):
        (fs / "tree").read_bytes()
    big = os.urandom(5_000_000)
    (fs / "big").write_bytes(big)
    assert (fs / "big").read_bytes() == big


def test_checkpoints(sprite):
    fs = sprite.filesystem()
    (fs / "/home/sprite/kept").write_text("first")
    bash(sprite, "echo x | sudo tee /etc/changed /usr/local/bin/changed >/dev/null")
    told = list(sprite.create_checkpoint("the first"))
    assert told[-1].type == "complete" and "v0" in told[-1].data, told
    (fs / "/home/sprite/kept").write_text("second")
    bash(sprite, "sudo rm /etc/changed; touch /home/sprite/new")
    assert [m.type for m in checkpoints.create_checkpoint(sprite, "the second")][-1] == "complete"
    listed = sprite.list_checkpoints()
    assert [(c.id, c.comment) for c in listed] == [("v0", "the first"), ("v1", "the second")]
    assert checkpoints.get_checkpoint(sprite, "v1").comment == "the second" and sprite.get_checkpoint("v0").create_time
    running = InThread(lambda: bash(sprite, "sleep 60"))
    eventually(lambda: sprite.list_sessions(), "a session")
    told = list(sprite.restore_checkpoint("v0"))
    assert told[-1].type == "complete" and told[-1].data == "Restored to v0", told
    assert running.end().returncode == 137
    assert bash(sprite, "cat kept; cat /etc/changed; ls new").stdout == b"firstx\n"
    assert list(checkpoints.restore_checkpoint(sprite, "v1"))[-1].type == "complete"
    assert bash(sprite, "cat kept; ls /etc/changed new").stdout == b"secondnew\n"
    with pytest.raises(Exception):
        sprite.get_checkpoint("v9")
    with pytest.raises(Exception):
        sprite.restore_checkpoint("../../x")


def test_services(sprite):
    web = ["-m", "http.server", "18999", "--bind", "127.0.0.1"]
    told = [event.type for event in sprite.create_service("base", "sh", ["-c", "echo ready; exec sleep 1000"], duration=1)]
    assert told[0] == "started" and "stdout" in told and told[-1] == "complete", told
    list(sprite.create_service("web", "python3", web, needs=["base"], http_port=18999, duration=0.5, env={"A": "b"}, dir="/usr"))
    state = sprite.get_service("web")
    assert (state.state.status, state.args, state.needs, state.http_port, state.env, state.dir) == (
        "running", web, ["base"], 18999, {"A": "b"}, "/usr",
    )
    with pytest.raises(APIError) as conflict:
        service_api.create_service(sprite, "other", "sleep", ["9"], http_port=1, duration=0.1)
    assert conflict.value.status_code == 409
    assert sorted(service.name for service in sprite.list_services()) == ["base", "web"]
    sprite.signal_service("base", "KILL")
    eventually(lambda: sprite.get_service("base").state.restart_count == 1, "a restart")
    eventually(lambda: sprite.get_service("base").state.status == "running", "it runs again")
    told = [event.type for event in sprite.stop_service("web", timeout=3)]
    assert told[0] == "stopping" and "stopped" in told, told
    assert sprite.get_service("web").state.status == "stopped"
    with pytest.raises(Exception):
        sprite.stop_service("web")
    assert "started" in [event.type for event in sprite.start_service("web", duration=0.5)]
    log = bash(sprite, "cat /.sprite/logs/services/base.log").stdout.decode().splitlines()
    assert len(log) == 2 and all("[stdout] ready" in line for line in log), log
    sprite.delete_service("web")
    with pytest.raises(APIError):
        service_api.get_service(sprite, "web")
    with pytest.raises(APIError):
        service_api.signal_service(sprite, "base", "NONSENSE")
    # A restart of the Sprite's environment brings them back.
    list(sprite.create_checkpoint())
    list(sprite.restore_checkpoint("v0"))
    eventually(lambda: sprite.get_service("base").state.status == "running", "services come back")


def test_network_policy(sprite):
    assert sprite.get_network_policy().rules == []
    rules = [PolicyRule(domain="example.com", action="allow"), PolicyRule(domain="*", action="deny")]
    sprite.update_network_policy(NetworkPolicy(rules=rules))
    assert [(rule.domain, rule.action) for rule in policies.get_network_policy(sprite).rules] == [("example.com", "allow"), ("*", "deny")]
    port = URL.rsplit(":", 1)[1]
    refused = bash(sprite, f"curl -sS -m 5 http://127.0.0.1:{port}/; curl -sS -m 5 --noproxy '*' http://127.0.0.1:{port}/")
    assert refused.returncode != 0 and b"cannot be reached" in refused.stdout + refused.stderr
    refused = bash(sprite, "curl -sS -m 5 http://not-allowed.example.org/")
    assert b"not allowed" in refused.stdout + refused.stderr
    assert b"example.com" in bash(sprite, "cat /.sprite/policy/network.json").stdout
    with pytest.raises(Exception):
        sprite.update_network_policy(NetworkPolicy(rules=[PolicyRule(domain="a b", action="allow")]))
    policies.update_network_policy(sprite, NetworkPolicy(rules=[]))
    assert bash(sprite, f"curl -sS -m 5 http://127.0.0.1:{port}/").stdout == b"", "this machine's loopback is not the Sprite's"
    assert b"inet 192.0.0.2" in bash(sprite, "ip address show").stdout, "it has a way out again"


def test_control_mode_falls_back():
    with SpritesClient(TOKEN, base_url=URL, control_mode=True) as client:
        sprite = client.create_sprite(f"py-{uuid.uuid4().hex[:12]}")
        assert sprite.run("sh", "-c", "echo x; exit 5", capture_output=True).returncode == 5
        sprite.delete()


def test_the_asynchronous_client():
    async def use():
        async with AsyncSpritesClient(TOKEN, base_url=URL) as client:
            sprite = await client.create_sprite(f"py-{uuid.uuid4().hex[:12]}")
            done = await sprite.run("sh", "-c", "echo async; exit 2", capture_output=True)
            assert (done.returncode, done.stdout) == (2, b"async\n")
            path = sprite.filesystem() / "/tmp/x"
            await path.write_text("y")
            assert await path.read_text() == "y"
            both = await asyncio.gather(*(sprite.run("sh", "-c", f"sleep 0.2; echo {n}", capture_output=True) for n in range(20)))
            assert [done.stdout for done in both] == [f"{n}\n".encode() for n in range(20)]
            await sprite.delete()

    asyncio.run(use())


def test_inside_a_sprite(sprite):
    tasks = bash(sprite, """sprite-env curl -X POST -d '{"name":"a","expire":"5m"}' -w ' %{http_code}' /v1/tasks; echo
        sprite-env curl -X POST -d '{"name":"a","expire":60}' -o /dev/null -w '%{http_code} ' /v1/tasks
        sprite-env curl -X PUT -d '{"expire":"2m"}' -o /dev/null -w '%{http_code} ' /v1/tasks/b
        sprite-env curl -X PUT -d '{"expire":"2h"}' -o /dev/null -w '%{http_code} ' /v1/tasks/b
        sprite-env tasks | grep -o '"name":"[a-z]*"' | tr '\\n' ' '
        sprite-env curl -X DELETE -o /dev/null -w '%{http_code} ' /v1/tasks/a
        sprite-env curl -X DELETE -o /dev/null -w '%{http_code} ' /v1/tasks/a
        sprite-env curl -X PUT -d '{"cmd":"sleep","args":["100"]}' -o /dev/null -w '%{http_code} ' '/v1/services/own?duration=100ms'
        sprite-env services | grep -o '"status":"[a-z]*"' | tr '\\n' ' '
        sprite-env curl -X POST -d '{}' /v1/checkpoint | grep -o 'v0 created'
        sprite-env curl -o /dev/null -w '%{http_code}' /v1/sprites""").stdout.decode().splitlines()
    assert tasks[0].startswith('{"name":"a"') and tasks[0].endswith(" 201"), tasks
    assert tasks[1] == '409 200 400 "name":"a" "name":"b" 204 404 200 "status":"running" v0 created', tasks
    assert tasks[2] == "404", tasks


def test_what_other_workers_rely_on(sprite):
    """Places that can be written to, daemons that outlive their command, a file that is secret from the start."""
    assert bash(sprite, "mkdir -p /workspace/x && touch /run/x.lock /var/log/x /workspace/x/y && /usr/bin/python3 -c 'print(1)'").stdout == b"1\n"
    assert bash(sprite, "(setsid sh -c 'sleep 1; echo late > /tmp/late' >/dev/null 2>&1 &)").returncode == 0
    eventually(lambda: bash(sprite, "cat /tmp/late 2>/dev/null").stdout == b"late\n", "a daemon")
