// The whole surface of @fly/sprites, unmodified, against local-sprites.
import assert from 'node:assert/strict';
import { randomBytes } from 'node:crypto';
import net from 'node:net';
import { after, before, test } from 'node:test';
import { setTimeout as sleep } from 'node:timers/promises';
import { SpritesClient } from '@fly/sprites';

const client = new SpritesClient(process.env.SPRITES_TOKEN, { baseURL: process.env.SPRITES_URL });
const name = () => `js-${randomBytes(6).toString('hex')}`;
let sprite;
before(async () => { sprite = await client.createSprite(name()); });
after(async () => { await sprite.delete(); });

async function eventually(check, what) {
  for (let n = 0; n < 200; n++) {
    const result = await check();
    if (result) return result;
    await sleep(50);
  }
  assert.fail(`not in time: ${what}`);
}
const collect = async (stream) => { const all = []; for await (const item of stream) all.push(item); return all; };
const sh = (script, options) => sprite.execFile('bash', ['-c', script], options);

test('sprites are made, found, changed, watched and deleted', async () => {
  const own = name();
  const watch = await client.watchSprites({ prefix: own });
  const made = await client.createSprite(own, { labels: ['a'], environment: { FROM_CREATE: 'yes' }, config: { ramMB: 512, storageGB: 1 } });
  assert.equal(made.status, 'running');
  assert.equal((await watch.next()).name, own);
  watch.close();
  assert.equal((await made.exec('printenv FROM_CREATE')).stdout, 'yes\n');
  await assert.rejects(client.createSprite(own), (error) => error.statusCode === 409);
  assert.deepEqual((await client.updateSprite(own, { labels: ['b', 'c'] })).labels, ['b', 'c']);
  await client.updateURLSettings(own, { auth: 'public' });
  assert.equal((await client.getSprite(own)).urlSettings.auth, 'public');
  assert.deepEqual((await client.listAllSprites(own)).map((listed) => listed.name), [own]);
  const page = await client.listSprites({ prefix: own, maxResults: 1 });
  assert.equal(page.hasMore, false);
  await made.upgrade();
  assert.equal((await made.check()).status, 'ok');
  await made.execFile('touch', ['/home/sprite/stays']);
  assert.equal((await made.restart()).spriteName, own);
  assert.equal((await made.execFile('ls', ['/home/sprite'])).stdout, 'stays\n');
  await made.delete();
  await assert.rejects(client.getSprite(own));
  await assert.rejects(new SpritesClient('wrong', { baseURL: process.env.SPRITES_URL }).listSprites(), (error) => error.statusCode === 401);
});

test('commands', async () => {
  assert.equal((await sprite.exec('echo hello world')).stdout, 'hello world\n');
  const failed = await sh('echo out; echo err >&2; exit 7').catch((error) => error);
  assert.deepEqual([failed.exitCode, failed.stdout, failed.stderr], [7, 'out\n', 'err\n']);
  assert.equal((await sprite.execFile('sh', ['-c', 'pwd; echo $A'], { cwd: '/usr', env: { A: 'a b+c' } })).stdout, '/usr\na b+c\n');
  const big = await sh('head -c 8000000 /dev/zero', { encoding: 'buffer' });
  assert.equal(big.stdout.length, 8000000);
  await assert.rejects(sh('yes', { maxBuffer: 100000 }), /maxBuffer/);
  const spawned = sprite.spawn('bash', ['-c', 'read line; echo got $line; cat; exit 3']);
  let out = '';
  spawned.stdout.on('data', (data) => { out += data; });
  await new Promise((open) => spawned.on('spawn', open));
  spawned.stdin.write('one\n');
  spawned.stdin.end('two\n');
  assert.equal(await spawned.wait(), 3);
  assert.equal(out, 'got one\ntwo\n');
  const signalled = sprite.spawn('bash', ['-c', 'trap "exit 9" USR1; echo ready; while true; do sleep 0.05; done']);
  signalled.stdout.once('data', () => signalled.kill('SIGUSR1'));
  assert.equal(await signalled.wait(), 9);
});

test('commands over HTTP', async () => {
  for (let n = 0; n < 10; n++) {
    const done = await sprite.execFileHTTP('bash', ['-c', 'echo out; echo err >&2; sleep 0.02; echo more']);
    assert.deepEqual([done.stdout, done.stderr, done.exitCode], ['out\nmore\n', 'err\n', 0]);
  }
  assert.equal((await sprite.execFileHTTP('cat', [], { input: 'x'.repeat(200000) })).stdout.length, 200000);
  const large = await sprite.execFileHTTP('seq', ['1', '100000']);
  assert.deepEqual([large.stdout.length, large.stdout.endsWith('\n100000\n')], [588895, true]);
  const failed = await sprite.execFileHTTP('sh', ['-c', 'exit 5']).catch((error) => error);
  assert.equal(failed.exitCode, 5);
});

test('a terminal', async () => {
  const shell = sprite.createSession('bash', ['--norc'], { tty: true, rows: 30, cols: 90 });
  let screen = '';
  shell.stdout.on('data', (data) => { screen += data; });
  await new Promise((spawned) => shell.on('spawn', spawned));
  shell.stdin.write('stty size; tty\n');
  await eventually(() => /30 90\r\n\/dev\/pts\/\d/.test(screen), screen);
  shell.resize(120, 40);
  shell.stdin.write('stty size\n');
  await eventually(() => screen.includes('40 120'), 'the new size');
  shell.stdin.write('sleep 1000\n');
  await sleep(300);
  shell.stdin.write('\x03');
  shell.stdin.write('echo status $?\n');
  await eventually(() => screen.includes('status 130'), 'Ctrl-C');
  // Detached from, found, and attached to again.
  shell.wsCmd.close?.();
  const [session] = (await sprite.listSessions()).filter((listed) => listed.tty);
  const again = sprite.attachSession(session.id);
  let replayed = '';
  again.stdout.on('data', (data) => { replayed += data; });
  await new Promise((spawned) => again.on('spawn', spawned));
  await eventually(() => replayed.includes('status 130'), 'a replay');
  again.stdin.write('exit 4\n');
  assert.equal(await again.wait(), 1); // this client knows zero from the rest, and no more
});

test('sessions go on when they are left, and are killed', async () => {
  const left = sprite.spawn('bash', ['-c', 'echo begun; sleep 1; echo survived > /tmp/survived'], { maxRunAfterDisconnect: '10s' });
  left.on('error', () => {});
  await new Promise((begun) => left.stdout.once('data', begun));
  left.wsCmd.close?.();
  await eventually(async () => (await sh('cat /tmp/survived || true')).stdout === 'survived\n', 'it survives');
  const running = sprite.spawn('sleep', ['1000']);
  running.on('error', () => {});
  const [session] = await eventually(async () => {
    const found = (await sprite.listSessions()).filter((listed) => listed.command.includes('1000'));
    return found.length && found;
  }, 'a session');
  const told = await collect(await sprite.killSession(session.id, 'SIGTERM', '5s'));
  assert.deepEqual(told.map((line) => line.type), ['signal', 'exited', 'complete']);
  assert.equal(told.at(-1).exitCode, 143);
  assert.equal(await running.wait(), 143);
});

test('files', async () => {
  const fs = sprite.filesystem('/home/sprite');
  await fs.writeFile('d/e/f.txt', 'hello', { mode: 0o600 });
  assert.equal(await fs.readFile('d/e/f.txt', 'utf8'), 'hello');
  await fs.appendFile('d/e/f.txt', '!');
  await fs.writeJSON('j.json', { a: 1 });
  assert.deepEqual(await fs.readJSON('j.json'), { a: 1 });
  assert.deepEqual(await fs.readdir('d'), ['e']);
  assert.deepEqual((await fs.readdir('d', { withFileTypes: true })).map((entry) => [entry.name, entry.isDirectory()]), [['e', true]]);
  assert.deepEqual(await fs.readdir('d', { recursive: true, pattern: '*.txt' }), ['f.txt']);
  assert.deepEqual(await fs.readdir('/srv'), []);
  const stats = await fs.stat('d/e/f.txt');
  assert.deepEqual([stats.size, stats.isFile()], [6, true]);
  assert.equal(await fs.exists('nothing'), false);
  await fs.mkdir('one');
  await fs.mkdir('a/b/c', { recursive: true });
  assert.equal((await sh('ls -d one a/b/c')).stdout, 'a/b/c\none\n');
  await fs.rename('d/e/f.txt', 'g.txt');
  await fs.copyFile('g.txt', 'h.txt');
  await fs.copyFile('a', 'copied', { recursive: true });
  await fs.chmod('a', 0o700, { recursive: true });
  await fs.chown('h.txt', { uid: 0, gid: 0 });
  assert.equal((await sh('stat -c "%a %U" a/b h.txt')).stdout, '700 sprite\n644 root\n');
  await assert.rejects(fs.rm('a'), (error) => error.code === 'ENOTEMPTY');
  await fs.rm('a', { recursive: true });
  await fs.rm('a', { force: true });
  await assert.rejects(fs.readFile('a'), (error) => error.code === 'ENOENT');
});

test('changes of files are told', async () => {
  const fs = sprite.filesystem('/home/sprite');
  await fs.mkdir('watched');
  const watcher = await fs.watch('watched', { recursive: true });
  assert.equal((await watcher.next()).type, 'subscribed');
  await sh('echo x > watched/new; mkdir watched/sub; sleep 0.3; echo y > watched/sub/deep; rm watched/new');
  const seen = new Set();
  while (!seen.has('remove /home/sprite/watched/new')) {
    const event = await watcher.next();
    seen.add(`${event.event} ${event.path}`);
  }
  for (const wanted of ['create /home/sprite/watched/new', 'write /home/sprite/watched/new', 'create /home/sprite/watched/sub/deep']) {
    assert.ok(seen.has(wanted), [...seen].join());
  }
  watcher.close();
});

test('ports are watched and reached', async () => {
  const watcher = await sprite.watchPorts();
  assert.deepEqual(await watcher.next(), { type: 'port_list', ports: [] });
  const server = sprite.spawn('python3', ['-u', '-c', 'import socket\ns=socket.create_server(("127.0.0.1",0))\nprint(s.getsockname()[1])\nwhile 1:\n c=s.accept()[0]\n c.sendall(b"hello "+c.recv(100)); c.close()']);
  server.on('error', () => {});
  const port = Number(await new Promise((printed) => server.stdout.once('data', printed)));
  const opened = await watcher.next();
  assert.deepEqual([opened.type, opened.port, opened.address], ['port_opened', port, '127.0.0.1']);
  const free = await new Promise((found) => { const probe = net.createServer().listen(0, () => { const p = probe.address().port; probe.close(() => found(p)); }); });
  const proxy = await sprite.proxyPort(free, port);
  const said = await new Promise((done, fail) => {
    const socket = net.connect(free, 'localhost', () => socket.write('there'));
    let text = '';
    socket.on('data', (data) => { text += data; }).on('end', () => done(text)).on('error', fail);
  });
  assert.equal(said, 'hello there');
  proxy.close();
  server.kill('SIGKILL');
  assert.equal((await watcher.next()).type, 'port_closed');
  watcher.close();
});

test('checkpoints', async () => {
  await sh('echo one > state');
  assert.equal((await collect(await sprite.createCheckpoint('c'))).at(-1).type, 'complete');
  const [checkpoint] = (await sprite.listCheckpoints()).slice(-1);
  assert.deepEqual([checkpoint.comment, (await sprite.getCheckpoint(checkpoint.id)).id], ['c', checkpoint.id]);
  await sh('echo two > state');
  assert.equal((await collect(await sprite.restoreCheckpoint(checkpoint.id))).at(-1).type, 'complete');
  assert.equal((await sh('cat state')).stdout, 'one\n');
  await assert.rejects(sprite.getCheckpoint('v99'));
});

test('services', async () => {
  const told = await collect(await sprite.createService('s', { cmd: 'sh', args: ['-c', 'echo up; sleep 1000'], env: { A: 'b' } }, '500ms'));
  assert.deepEqual(told.map((event) => event.type), ['started', 'stdout', 'complete']);
  assert.equal(told[1].data, 'up\n');
  assert.equal(typeof told[0].timestamp, 'number');
  assert.deepEqual((await sprite.listServices()).map((service) => [service.name, service.state.status]), [['s', 'running']]);
  await sprite.signalService('s', 'TERM');
  await eventually(async () => (await sprite.getService('s')).state.restartCount === 1, 'a restart');
  await eventually(async () => (await sprite.getService('s')).state.status === 'running', 'it runs again');
  const outputs = async () => (await collect(await sprite.getServiceLogs('s', { lines: 10 }))).filter((event) => event.type === 'stdout');
  await eventually(async () => (await outputs()).length === 2, 'it wrote again');
  assert.equal((await collect(await sprite.restartService('s', '300ms'))).at(-1).type, 'complete');
  assert.deepEqual((await outputs()).map((event) => event.data), ['up\n', 'up\n', 'up\n']);
  assert.ok((await collect(await sprite.stopService('s', '5s'))).some((event) => event.type === 'stopped'));
  await assert.rejects(sprite.stopService('s'));
  assert.ok((await collect(await sprite.startService('s', '200ms'))).some((event) => event.type === 'started'));
  await sprite.deleteService('s');
  await assert.rejects(sprite.getService('s'));
});

test('policies', async () => {
  assert.deepEqual((await sprite.getNetworkPolicy()).rules, []);
  await sprite.updatePrivilegesPolicy({ profile: 'minimal' });
  assert.equal((await sprite.getPrivilegesPolicy()).profile, 'minimal');
  assert.match((await sh('grep CapEff /proc/self/status; touch /usr/x 2>&1 || true')).stdout, /CapEff:\t0+\n.*Permission denied/s);
  await sprite.deletePrivilegesPolicy();
  assert.match((await sh('grep CapEff /proc/self/status')).stdout, /a80425fb/);
  await sprite.updateResourcesPolicy({ memory: { limitMB: 100, limit_mb: 100 } });
  const hungry = await sh('python3 -c "x = bytearray(300 << 20)"').catch((error) => error);
  assert.equal(hungry.exitCode, 137);
  await sprite.deleteResourcesPolicy();
  await sh('python3 -c "x = bytearray(300 << 20)"');
  await sprite.updateNetworkPolicy({ rules: [{ include: 'defaults' }] });
  assert.equal((await sh('curl -s -o /dev/null -m 5 -w "%{http_code}" http://example.org/ || true')).stdout, '403');
  await assert.rejects(sprite.updateNetworkPolicy({ rules: [{ include: 'nonsense' }] }), /Invalid policy/);
  await sprite.updateNetworkPolicy({ rules: [] });
});

test('control mode falls back', async () => {
  const controlled = new SpritesClient(process.env.SPRITES_TOKEN, { baseURL: process.env.SPRITES_URL, controlMode: true });
  assert.equal((await controlled.sprite(sprite.name).exec('echo x')).stdout, 'x\n');
});
