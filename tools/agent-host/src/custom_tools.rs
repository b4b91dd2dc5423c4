//! Custom tools: the session's user runs them. The host offers them to its CLI as an MCP server.
//!
//! The CLI starts the server (`agent-host tools NAME`), which speaks MCP with the CLI and lines of
//! JSON with the host: the host is the one that waits for results, so that a call outlives the
//! runner.

use std::{
    collections::HashMap,
    io::{self, BufRead as _, BufReader, Read as _, Write as _},
    os::{
        linux::net::SocketAddrExt as _,
        unix::net::{SocketAddr, UnixListener, UnixStream},
    },
    process::ExitCode,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use contract::host::CustomTool;
use serde_json::{Value, json};

/// What the CLIs know the server by, and what each of them puts in front of its tools, in part.
pub const SERVER: &str = "aod_tools";
pub const PREFIX: &str = "aod_tools_";
/// What the model reads where its turn has ended.
pub const ENDED: &str = "The turn has ended";
/// How long a CLI waits for a result, if that can be configured: 23 days, close to the maximum of
/// JavaScript timers.
pub const TIMEOUT_SECONDS: u64 = 2_000_000;
/// A line holds a result, which is an input of the host.
const LINE_BYTES_MAX: usize = 8 << 20;
/// What a server that does not read may leave unread: more than the results of all calls that can
/// be open.
const UNREAD_BYTES_MAX: usize = 64 << 20;
/// CLIs wait on while progress is reported.
const PROGRESS: Duration = Duration::from_secs(10);

/// Where the servers of a host's CLI connect to: a name that no file system has, so that it is the
/// same for every user of the sandbox.
pub fn listen() -> io::Result<(UnixListener, String)> {
    let name = format!("aod-tools-{}", crate::random_hex());
    let listener = UnixListener::bind_addr(&SocketAddr::from_abstract_name(&name)?)?;
    listener.set_nonblocking(true)?;
    Ok((listener, name))
}

/// The command of the server; empty where this program has no path any more.
pub fn command(name: &str) -> Vec<String> {
    match std::fs::read_link(crate::process::SELF) {
        Ok(path) => vec![path.to_string_lossy().into_owned(), "tools".to_owned(), name.to_owned()],
        Err(_) => Vec::new(),
    }
}

/// The host's first message to a server: the answer to `tools/list`.
pub fn listed(tools: &[CustomTool]) -> Value {
    let tools = tools.iter().map(|tool| {
        let schema = serde_json::from_str::<Value>(&tool.input_schema_json)
            .unwrap_or_else(|_| json!({ "type": "object" }));
        json!({ "name": tool.name, "description": tool.description, "inputSchema": schema })
    });
    json!({ "tools": tools.collect::<Vec<_>>() })
}

/// A server that is connected to the host.
pub struct Client {
    pub stream: UnixStream,
    /// Tells its calls apart from those of others.
    pub number: u64,
    incoming: Vec<u8>,
    outgoing: Vec<u8>,
}

/// What a server says.
pub enum Told {
    Called { call: String, name: String, input_json: String },
    Cancelled { call: String },
}

impl Client {
    pub fn new(stream: UnixStream, number: u64, tools: &[CustomTool]) -> io::Result<Self> {
        stream.set_nonblocking(true)?;
        let mut client = Self { stream, number, incoming: Vec::new(), outgoing: Vec::new() };
        client.tell(&listed(tools));
        Ok(client)
    }

    pub fn has_more(&self) -> bool {
        !self.outgoing.is_empty()
    }

    fn tell(&mut self, line: &Value) {
        self.outgoing.extend_from_slice(line.to_string().as_bytes());
        self.outgoing.push(b'\n');
        self.write();
    }

    /// The result of a call; calls of other servers are ignored.
    pub fn answer(&mut self, call: &str, text: &str, is_error: bool) {
        if let Some(id) = call.strip_prefix(&format!("{}:", self.number)) {
            self.tell(&json!({ "call": id, "text": text, "is_error": is_error }));
        }
    }

    /// Writes what the socket takes.
    pub fn write(&mut self) {
        while !self.outgoing.is_empty() {
            match self.stream.write(&self.outgoing) {
                Ok(written) => drop(self.outgoing.drain(..written)),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                // Its end is read next.
                Err(_) => return self.outgoing.clear(),
            }
        }
    }

    /// What was said since; `None`: the server is gone, or says what is no line of ours.
    pub fn read(&mut self) -> Option<Vec<Told>> {
        if self.outgoing.len() > UNREAD_BYTES_MAX {
            return None;
        }
        let mut buffer = vec![0; 64 << 10];
        match self.stream.read(&mut buffer) {
            Ok(0) => return None,
            Ok(bytes) => self.incoming.extend_from_slice(buffer.get(..bytes).unwrap_or_default()),
            Err(error)
                if matches!(
                    error.kind(),
                    io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted
                ) =>
            {
                return Some(Vec::new());
            }
            Err(_) => return None,
        }
        let mut told = Vec::new();
        while let Some(end) = self.incoming.iter().position(|byte| *byte == b'\n') {
            let line: Vec<u8> = self.incoming.drain(..=end).collect();
            told.push(self.parse(&line)?);
        }
        (self.incoming.len() <= LINE_BYTES_MAX).then_some(told)
    }

    fn parse(&self, line: &[u8]) -> Option<Told> {
        let line: Value = serde_json::from_slice(line).ok()?;
        let call = |name: &str| Some(format!("{}:{}", self.number, line.get(name)?.as_str()?));
        if let Some(call) = call("cancel") {
            return Some(Told::Cancelled { call });
        }
        let name = line.get("name")?.as_str()?.to_owned();
        Some(Told::Called { call: call("call")?, name, input_json: line.get("input")?.to_string() })
    }
}

// --- the server --------------------------------------------------------------------------------

/// Calls without a result: by the request's id as JSON, the token of its progress.
type Calls = Arc<Mutex<HashMap<String, Option<Value>>>>;

fn locked(calls: &Calls) -> std::sync::MutexGuard<'_, HashMap<String, Option<Value>>> {
    calls.lock().unwrap_or_else(PoisonError::into_inner)
}

/// `agent-host tools NAME`: serves MCP on standard input and output until its CLI or its host is
/// gone.
pub fn serve(name: &str) -> ExitCode {
    let connected =
        SocketAddr::from_abstract_name(name).and_then(|address| UnixStream::connect_addr(&address));
    match connected.and_then(|host| serve_on(&host)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("agent-host: {error}");
            ExitCode::FAILURE
        }
    }
}

fn say(line: &Value) {
    let mut stdout = io::stdout().lock();
    let _ = writeln!(stdout, "{line}");
    let _ = stdout.flush();
}

fn serve_on(host: &UnixStream) -> io::Result<()> {
    let mut told = BufReader::new(host.try_clone()?);
    let mut line = String::new();
    told.read_line(&mut line)?;
    let tools: Value = serde_json::from_str(&line)?;
    let calls = Calls::default();
    let (answered, progressing) = (calls.clone(), calls.clone());
    std::thread::spawn(move || {
        for line in told.lines().map_while(Result::ok) {
            let Ok(line) = serde_json::from_str::<Value>(&line) else { break };
            let id = line.get("call").and_then(Value::as_str).unwrap_or_default();
            if locked(&answered).remove(id).is_none() {
                continue;
            }
            let content = json!([{ "type": "text", "text": line.get("text") }]);
            let result = json!({ "content": content, "isError": line.get("is_error") });
            say(
                &json!({ "jsonrpc": "2.0", "id": serde_json::from_str::<Value>(id).unwrap_or_default(), "result": result }),
            );
        }
        // Without its host no call is answered.
        std::process::exit(0);
    });
    std::thread::spawn(move || {
        for progress in 1_u64.. {
            std::thread::sleep(PROGRESS);
            let tokens: Vec<Value> = locked(&progressing).values().flatten().cloned().collect();
            for token in tokens {
                let params = json!({ "progressToken": token, "progress": progress });
                say(
                    &json!({ "jsonrpc": "2.0", "method": "notifications/progress", "params": params }),
                );
            }
        }
    });
    let mut host = host;
    for line in io::stdin().lock().lines() {
        let Ok(request) = serde_json::from_str::<Value>(&line?) else { continue };
        if let Some(line) = handle(&request, &tools, &calls) {
            host.write_all(format!("{line}\n").as_bytes())?;
        }
    }
    Ok(())
}

/// Answers a request of the CLI, or returns the message for the host.
fn handle(request: &Value, tools: &Value, calls: &Calls) -> Option<Value> {
    let method = request.get("method").and_then(Value::as_str)?;
    let params = request.get("params").unwrap_or(&Value::Null);
    let Some(id) = request.get("id") else {
        let cancelled =
            params.get("requestId").filter(|_| method == "notifications/cancelled")?.to_string();
        return locked(calls).remove(&cancelled).map(|_| json!({ "cancel": cancelled }));
    };
    let answer = |result: Value| {
        say(&json!({ "jsonrpc": "2.0", "id": id, "result": result }));
        None
    };
    match method {
        "initialize" => {
            let version =
                params.get("protocolVersion").cloned().unwrap_or_else(|| "2025-06-18".into());
            let server = json!({ "name": SERVER, "version": env!("CARGO_PKG_VERSION") });
            answer(
                json!({ "protocolVersion": version, "capabilities": { "tools": {} }, "serverInfo": server }),
            )
        }
        "ping" => answer(json!({})),
        "tools/list" => answer(tools.clone()),
        "tools/call" => {
            locked(calls).insert(id.to_string(), params.pointer("/_meta/progressToken").cloned());
            let input = params.get("arguments").cloned().unwrap_or_else(|| json!({}));
            Some(json!({ "call": id.to_string(), "name": params.get("name"), "input": input }))
        }
        _ => {
            let error = json!({ "code": -32601, "message": "Method not found" });
            say(&json!({ "jsonrpc": "2.0", "id": id, "error": error }));
            None
        }
    }
}
