"""The published clients, unmodified: aod-sdk against the gateway, sprites-py against local-sprites."""

import os
import threading
import time

from aod import AuthError, Client, ConflictError, NotFoundError
from sprites import SpritesClient
from sprites.session import kill_session

client = Client()


def follow(session, **since):
    with client.sessions.stream(session, **since) as events:
        return list(events)


assert client.health()["status"] == "ok"

agent = client.agents.create(name="sdk", model="claude-sonnet-4-5", runtime="claude", metadata={"team": "x"})
assert agent.model == "anthropic/claude-sonnet-4-5" and agent.version == 1, agent
assert client.agents.get(agent.id).id == agent.id
assert agent.id in [listed.id for listed in client.agents.list()]

ack = client.sessions.create(agent_id=str(agent.id), prompt="write a haiku", timeout=60)
assert ack.status == "pending"
live = follow(str(ack.id))
assert [event.type for event in live][:2] == ["start", "stage"], live[:2]
assert live[-1].type == "exit" and live[-1].extra["code"] == 0, live[-1]
assert "frog" in "".join(event.extra.get("data", "") for event in live if event.type == "output")

session = client.sessions.get(str(ack.id))
assert (session.status, session.exit_code, session.turn_count) == ("completed", 0, 1), session
assert [(event.type, event.id) for event in follow(str(ack.id))] == [(event.type, event.id) for event in live]

second = client.sessions.prompt(str(ack.id), prompt="what was my first message?")
assert second.current_turn == 2
said = "".join(event.extra.get("data", "") for event in follow(str(ack.id), since=live[-1].id) if event.type == "output")
assert "Your first message was: write a haiku" in said, said
assert [turn.status for turn in client.sessions.turns(str(ack.id))] == ["completed", "completed"]

assert client.sessions.terminate(str(ack.id)).status == "terminated"
for refused, error in [
    (lambda: client.sessions.terminate(str(ack.id)), ConflictError),
    (lambda: client.sessions.prompt(str(ack.id), prompt="more"), ConflictError),
    (lambda: client.sessions.get("00000000-0000-4000-8000-000000000000"), NotFoundError),
    (lambda: Client(token="aod_wrong", base_url=os.environ["AOD_API_URL"]).agents.list(), AuthError),
]:
    try:
        refused()
    except error:
        continue
    raise AssertionError(f"no {error.__name__}")

sprites = SpritesClient(os.environ["SPRITES_TOKEN"], base_url=os.environ["SPRITES_URL"])
sprite = sprites.create_sprite("sdk-test")
done = sprite.run("bash", "-c", "echo out; echo err >&2; ls /root /home; exit 3", capture_output=True)
assert (done.returncode, done.stderr) == (3, b"err\n"), done
assert done.stdout == b"out\n/home:\nsprite\n\n/root:\n", done.stdout
big = sprite.run("bash", "-c", "head -c 3000000 /dev/zero | tr '\\0' x", capture_output=True)
assert len(big.stdout) == 3_000_000

# Sessions: listed, attached to with a replay, killed.
def start(script):
    codes = []
    thread = threading.Thread(target=lambda: codes.append(sprite.run("bash", "-c", script, capture_output=True).returncode))
    thread.start()
    # What runs now: a shell becomes its last command.
    while not (sessions := [session for session in sprite.list_sessions() if "sleep" in session.command]):
        time.sleep(0.05)
    return thread, codes, sessions[0]


thread, codes, session = start("echo begun; sleep 1; echo done")
time.sleep(0.3)
assert sprite.attach_session(session.id).output() == b"begun\ndone\n"
thread.join()
assert codes == [0], codes
thread, codes, session = start("echo begun; sleep 60")
lines = list(kill_session(sprite, session.id))
thread.join()
assert codes == [143], codes
assert sprite.list_sessions() == []

files = sprite.filesystem("/home/sprite")
path = files / "dir" / "file.txt"
path.parent.mkdir(parents=True)
path.write_text("héllo")
assert path.read_text() == "héllo" and path.exists() and not (files / "nothing").exists()
path.unlink()
sprite.delete()
print("ok")
