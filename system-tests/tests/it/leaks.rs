//! Secrets stay where they belong: sentinels in every place where a user can put one, then a search
//! of everything that the stack wrote, said, and ran.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    process::Command,
    sync::{Arc, Mutex},
};

use base64::{Engine as _, engine::general_purpose::STANDARD as BASE64};
use reqwest::Method;
use serde_json::{Value, json};
use system_tests::{Options, Stack};

use crate::{
    git::PrivateGitHub,
    runtimes::mcp_over_http,
    v1::{Client, created, ours},
};

/// What no place but the Sprite may hold. Their first characters are what a hint may show: the last
/// four are told by the contract.
const SENTINELS: [(&str, &str); 13] = [
    ("provider:anthropic", "sk-ant-SENTINELcredential0001"),
    ("provider:openai", "sk-oai-SENTINELopenai0002"),
    ("provider:google", "AIzaSENTINELgoogle0008"),
    ("runtime_token:claude-oauth", "sk-ant-oat-SENTINELsubscription0009"),
    ("env_vars", "SENTINELenvironmentvariable0003"),
    ("session env", "SENTINELsessionvariable0004"),
    ("repository token", "ghp_SENTINELrepositorytoken0005"),
    ("mcp header", "SENTINELmcpheader0006"),
    ("mcp env", "SENTINELmcpenv0007"),
    ("vault bearer", "SENTINELvaultbearer0010"),
    ("vault variable", "SENTINELvaultvariable0011"),
    ("api key", ""),
    ("sprites token", ""),
];

/// What the model gateway keeps out of Sprites as well: credentials for models, and secrets of
/// routes.
const MODEL_CREDENTIALS: [&str; 4] =
    ["provider:anthropic", "provider:openai", "provider:google", "runtime_token:claude-oauth"];
const ROUTED: [&str; 3] = ["repository token", "mcp header", "vault bearer"];
/// What the sandbox server keeps out of them.
const OUTSIDE: &str = "vault variable";

/// How tokens for the model gateway begin.
const TOKEN: &[u8] = b"aod_session_";

/// What all of them but the generated ones have in common.
const MARK: &[u8] = b"SENTINEL";

struct Search {
    needles: Vec<(String, Vec<u8>)>,
    found: Vec<String>,
    places: usize,
}

impl Search {
    fn new(stack: &Stack) -> Self {
        let generated = |name: &str| match name {
            "api key" => stack.ready_text("/api_key"),
            "sprites token" => stack.ready_text("/sprites_token"),
            _ => String::new(),
        };
        let mut needles = Vec::new();
        for (name, value) in SENTINELS {
            let value = if value.is_empty() { generated(name) } else { value.to_owned() };
            assert!(value.len() > 12, "{name}");
            needles.push((name.to_owned(), value.clone().into_bytes()));
            // As Postgres' bytea, and as basic authentication, would show it.
            needles.push((
                format!("{name} in hex"),
                value.bytes().map(|byte| format!("{byte:02x}")).collect::<String>().into_bytes(),
            ));
        }
        Self { needles, found: Vec::new(), places: 0 }
    }

    fn look(&mut self, place: &str, bytes: &[u8]) {
        self.places += 1;
        for (name, needle) in &self.needles {
            if memchr(bytes, needle) {
                self.found.push(format!("{name} in {place}"));
            }
        }
        if memchr(bytes, MARK) {
            self.found.push(format!("a part of a sentinel in {place}"));
        }
    }

    fn look_in(&mut self, dir: &Path, leave_out: &[PathBuf]) {
        for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
            let path = entry.path();
            if leave_out.contains(&path) {
                continue;
            }
            match entry.file_type() {
                Ok(kind) if kind.is_dir() => self.look_in(&path, leave_out),
                Ok(kind) if kind.is_file() => self
                    .look(&path.display().to_string(), &std::fs::read(&path).unwrap_or_default()),
                _ => {}
            }
        }
    }

    /// Command lines and environments of the machine's processes, but for those inside of Sprites.
    fn look_at_processes(&mut self) {
        let namespace = |pid: &str| std::fs::read_link(format!("/proc/{pid}/ns/pid")).ok();
        let own = namespace("self");
        for entry in std::fs::read_dir("/proc").unwrap().flatten() {
            let pid = entry.file_name().to_string_lossy().into_owned();
            // This test itself has the sentinels in its memory, not in its arguments.
            if !pid.bytes().all(|byte| byte.is_ascii_digit()) || namespace(&pid) != own {
                continue;
            }
            for file in ["cmdline", "environ"] {
                let bytes = std::fs::read(format!("/proc/{pid}/{file}")).unwrap_or_default();
                self.look(
                    &format!(
                        "{file} of {pid} ({})",
                        std::fs::read_to_string(format!("/proc/{pid}/comm"))
                            .unwrap_or_default()
                            .trim()
                    ),
                    &bytes,
                );
            }
        }
    }
}

fn memchr(haystack: &[u8], needle: &[u8]) -> bool {
    haystack.windows(needle.len()).any(|window| window == needle)
}

/// What the API says about everything there is.
async fn everything_told(stack: &Stack, sessions: &[String]) -> Vec<(String, String)> {
    let mut told = Vec::new();
    let mut paths: Vec<String> = [
        "/agents",
        "/environments",
        "/sessions",
        "/credentials",
        "/api-keys",
        "/health",
        "/openapi.json",
    ]
    .map(str::to_owned)
    .into();
    for session in sessions {
        paths.extend([format!("/sessions/{session}"), format!("/sessions/{session}/turns")]);
    }
    for list in ["/agents", "/environments"] {
        for item in stack.get(list).await.unwrap().body["data"].as_array().unwrap() {
            let id = item["id"].as_str().unwrap();
            paths.extend([format!("{list}/{id}"), format!("{list}/{id}/versions")]);
        }
    }
    for path in paths {
        let answer = stack.get(&path).await.unwrap();
        told.push((path, format!("{:?} {}", answer.headers, answer.body)));
    }
    told
}

#[tokio::test]
async fn no_secret_is_anywhere_but_in_its_sprite() {
    let of = |name: &str| SENTINELS.iter().find(|(known, _)| *known == name).unwrap().1;
    let token = |name: &str| Arc::new(Mutex::new(of(name).to_owned()));
    let (by_header, by_vault) =
        (mcp_over_http(token("mcp header")).await, mcp_over_http(token("vault bearer")).await);
    let github = PrivateGitHub::start(&[("acme/cloned", of("repository token"))]).await;
    let settings = &[("RUST_LOG", "trace"), ("DEFAULT_TIMEOUT", "180")];
    let options = Options { scripted_model: true, runners: 2, settings, ..Options::default() };
    let stack = Stack::start(
        options.with("AOD_GITHUB_URL", github.url()).reaching(&[by_header.1, by_vault.1]),
    )
    .await
    .unwrap();
    for kind in MODEL_CREDENTIALS {
        let stored = stack
            .call(Method::PUT, &format!("/credentials/{kind}"), Some(json!({ "value": of(kind) })))
            .await
            .unwrap();
        assert!(stored.status < 300, "{stored:?}");
    }
    // The user's own token for the Sprites API; local-sprites knows this one.
    let sprites = json!({ "value": stack.ready_text("/sprites_token") });
    assert!(
        stack
            .call(Method::PUT, "/credentials/backend:sprites", Some(sprites))
            .await
            .unwrap()
            .status
            < 300
    );

    let environment = json!({ "name": "leaks", "env_vars": { "FROM_ENVIRONMENT": of("env_vars") }, "setup_script": "test -n \"$FROM_ENVIRONMENT\"" });
    let environment = stack.post("/environments", environment).await.unwrap();
    assert_eq!(environment.status, 201, "{environment:?}");
    let mcp_servers = json!([
        { "name": "remote", "type": "url", "url": by_header.0, "headers": { "Authorization": format!("Bearer {}", of("mcp header")) } },
        { "name": "local", "type": "stdio", "command": "true", "env": { "TOKEN": of("mcp env") } },
    ]);
    let mut sessions = Vec::new();
    for (runtime, model, prompt) in [
        ("claude", "claude-sonnet-4-5", "hello"),
        // The prompt sees what the agent sees, and says only that it does.
        (
            "shell",
            "none",
            "test ${#FROM_ENVIRONMENT} -gt 20 && test ${#FROM_SESSION} -gt 20 &&
             cd /workspace/cloned && git commit -q --allow-empty -m x && git push -q && echo all there; sleep 3",
        ),
        ("codex", "gpt-5.2-codex", "hello"),
        ("gemini", "gemini-2.5-pro", "hello"),
        ("opencode", "anthropic/claude-sonnet-4-5", "hello"),
    ] {
        let agent = json!({ "name": runtime, "model": model, "runtime": runtime, "mcp_servers": mcp_servers });
        let agent = stack.post("/agents", agent).await.unwrap();
        assert_eq!(agent.status, 201, "{agent:?}");
        let mut body = json!({ "agent_id": agent.text("id"), "prompt": prompt });
        // Codex writes its variables into a file of its own that every user of its Sprite can read
        // (docs/security.md).
        if ["claude", "shell"].contains(&runtime) {
            body["environment_id"] = environment.text("id").into();
            body["secret_env_vars"] = json!({ "FROM_SESSION": of("session env") });
            let url = "https://github.com/acme/cloned";
            let repository = json!({ "type": "github_repository", "url": url, "authorization_token": of("repository token") });
            body["resources"] = json!([repository]);
        }
        let session = stack.post("/sessions", body).await.unwrap();
        assert_eq!(session.status, 202, "{session:?}");
        sessions.push(session.text("id").to_owned());
    }
    let of_vault = (of("vault bearer"), of(OUTSIDE));
    sessions.push(session_with_vault(&stack, &by_vault.0, of_vault).await);
    let mut search = Search::new(&stack);
    let mut shell = stack.stream(&sessions[1], 0).await.unwrap();
    shell.until_output("all there").await.unwrap();
    search.look_at_processes();
    for session in &sessions {
        let events = stack.stream(session, 0).await.unwrap().all().await.unwrap();
        assert_eq!(events.last().unwrap()["code"], 0, "{events:?}");
    }
    // The CLIs' processes are still there. Providers' keys are not, in any file, argument or
    // variable; tokens of sessions are.
    let outside: Vec<(&str, String)> = MODEL_CREDENTIALS
        .into_iter()
        .chain(ROUTED)
        .chain([OUTSIDE])
        .map(|name| (name, of(name).to_owned()))
        .collect();
    let as_password = BASE64.encode(format!("x-access-token:{}", of("repository token")));
    let (inside, with_token) = search_inside_sprites(
        &stack,
        &[outside, vec![("repository token as a password", as_password)]].concat(),
    );
    assert!(inside.is_empty(), "{inside:#?}");
    for kind in ["mcp", "git"] {
        let passed = format!("aod_model_routed_requests_total{{kind=\"{kind}\",outcome=\"200\"}}");
        assert!(
            model_gateway_metrics(&stack).await.contains(&passed),
            "nothing of {kind} went through the model gateway"
        );
    }
    assert!(
        with_token >= 4,
        "{with_token} files and processes hold a token: the search would not find a key where one is"
    );
    for provider in ["anthropic", "openai", "google"] {
        let passed = format!("aod_model_requests_total{{provider=\"{provider}\",outcome=\"200\"}}");
        assert!(
            model_gateway_metrics(&stack).await.contains(&passed),
            "nothing went to {provider} through the model gateway"
        );
    }
    // A second turn, and one that fails while its repository is cloned: no server is there to
    // refuse the token.
    let second = stack
        .post(&format!("/sessions/{}/prompt", sessions[0]), json!({ "prompt": "hello again" }))
        .await
        .unwrap();
    assert_eq!(second.status, 202, "{second:?}");
    let agent = stack.agent("shell").await.unwrap();
    let url = "https://github.com/acme/private";
    let repository = json!({ "type": "github_repository", "url": url, "authorization_token": of("repository token") });
    let failing = stack
        .post(
            "/sessions",
            json!({ "agent_id": agent, "prompt": "true", "resources": [repository] }),
        )
        .await
        .unwrap();
    assert_eq!(failing.status, 202, "{failing:?}");
    sessions.push(failing.text("id").to_owned());
    let mut streams = BTreeMap::new();
    for session in &sessions {
        let events = stack.stream(session, 0).await.unwrap().all().await.unwrap();
        streams.insert(session.clone(), events);
    }
    let failed = streams[sessions.last().unwrap()]
        .iter()
        .any(|event| event["type"] == "error" || event["state"] == "failed");
    assert!(failed, "{:?}", streams[sessions.last().unwrap()]);
    // Wrong bodies with secrets in them: what is told is what is wrong, not what was sent.
    let wrong = json!({ "agent_id": agent, "prompt": 5, "secret_env_vars": { "1 bad name": of("session env") }, "resources": [{ "type": "x", "authorization_token": of("repository token") }] });
    let wrong = stack.post("/sessions", wrong).await.unwrap();
    assert_eq!(wrong.status, 422);
    search.look("a 422", wrong.body.to_string().as_bytes());

    for (path, answer) in everything_told(&stack, &sessions).await {
        search.look(&format!("GET {path}"), answer.as_bytes());
    }
    for (session, events) in &streams {
        search.look(
            &format!("the stream of {session}"),
            Value::Array(events.clone()).to_string().as_bytes(),
        );
    }
    search.look("what aod dev printed", without_the_key(&stack).as_bytes());
    for service in [
        "gateway",
        "auth",
        "credential-vault",
        "scheduler",
        "sprite-runner",
        "model-gateway",
        "local-sprites",
    ] {
        for pid in stack.pids(service) {
            let port = listening_ports(pid);
            for port in port {
                if let Ok(answer) =
                    stack.http.get(format!("http://127.0.0.1:{port}/metrics")).send().await
                {
                    search.look(
                        &format!("the metrics of {service}"),
                        answer.text().await.unwrap_or_default().as_bytes(),
                    );
                }
            }
        }
    }
    let dump = Command::new("sh")
        .args([
            "-c",
            "PATH=$(ls -d /usr/lib/postgresql/*/bin | tail -1):$PATH; exec pg_dump \"$0\"",
            &stack.ready_text("/database_url"),
        ])
        .output()
        .unwrap();
    assert!(dump.status.success(), "{}", String::from_utf8_lossy(&dump.stderr));
    assert!(
        memchr(&dump.stdout, b"COPY vault.secret") && memchr(&dump.stdout, b"COPY scheduler.event"),
        "the dump holds nothing"
    );
    search.look("the dump of Postgres", &dump.stdout);

    // The stack's own keys are in files of its own; the Sprites' own files are where secrets
    // belong.
    let data = stack.data_dir().to_owned();
    let own: Vec<PathBuf> =
        ["secrets", "secrets.json", "sprites", "ready.json", "running.json", "dev.log"]
            .iter()
            .map(|name| data.join(name))
            .collect();
    search.look_in(&data, &own);
    assert!(search.places > 100, "{} places", search.places);
    assert!(search.found.is_empty(), "{:#?}", search.found);

    // And there, only its owner reads them.
    let mut in_sprites = Vec::new();
    for root in roots_of_sprites(&data.join("sprites/sprites")) {
        for own in ["home", "root", "tmp", "var", "workspace"] {
            modes_of_files_with_secrets(&root.join(own), &mut in_sprites);
        }
    }
    assert!(!in_sprites.is_empty(), "the search would not find a secret where one is");
    let readable: Vec<_> = in_sprites.iter().filter(|(_, mode)| mode & 0o077 != 0).collect();
    assert!(readable.is_empty(), "{readable:?}");
}

/// A session of `/v1` whose MCP server's token is in a vault, with one turn. Returns the original
/// API's id.
async fn session_with_vault(stack: &Stack, url: &str, (token, variable): (&str, &str)) -> String {
    let vault = created(stack, "/v1/vaults", json!({ "display_name": "v" })).await;
    let auth = json!({ "type": "static_bearer", "mcp_server_url": url, "token": token });
    created(stack, &format!("/v1/vaults/{vault}/credentials"), json!({ "auth": auth })).await;
    let networking = json!({ "type": "limited", "allowed_hosts": ["api.example.com"] });
    let auth = json!({ "type": "environment_variable", "secret_name": "OUTSIDE", "secret_value": variable, "networking": networking });
    created(stack, &format!("/v1/vaults/{vault}/credentials"), json!({ "auth": auth })).await;
    let client = Client::new(
        stack,
        json!({
            "name": "v",
            "model": "claude-sonnet-4-5",
            "tools": [{ "type": "agent_toolset_20260401" }, { "type": "mcp_toolset", "mcp_server_name": "kept" }],
            "mcp_servers": [{ "type": "url", "name": "kept", "url": url }],
        }),
    )
    .await;
    let session = client.session(json!({ "vault_ids": [vault] })).await;
    let message =
        json!({ "type": "user.message", "content": [{ "type": "text", "text": "hello" }] });
    let sent = stack
        .post(&format!("/v1/sessions/{session}/events"), json!({ "events": [message] }))
        .await
        .unwrap();
    assert_eq!(sent.status, 200, "{sent:?}");
    ours(&session)
}

async fn model_gateway_metrics(stack: &Stack) -> String {
    let url = format!("{}/metrics", stack.ready_text("/services/model-gateway/0/admin_url"));
    stack.http.get(url).send().await.unwrap().text().await.unwrap()
}

/// Looks for values in every file of every Sprite, and in every process there, as root; and counts
/// where a token of a session is.
fn search_inside_sprites(stack: &Stack, values: &[(&str, String)]) -> (Vec<String>, usize) {
    let (mut found, mut with_token) = (Vec::new(), 0);
    let mut look = |place: String, bytes: &[u8]| {
        let is_marked = memchr(bytes, MARK);
        let may_hold = |value: &str| is_marked || !value.contains("SENTINEL");
        let held =
            values.iter().filter(|(_, value)| may_hold(value) && memchr(bytes, value.as_bytes()));
        found.extend(held.map(|(name, _)| format!("{name} in {place}")));
        with_token += usize::from(memchr(bytes, TOKEN));
    };
    let roots = roots_of_sprites(&stack.data_dir().join("sprites/sprites"));
    assert!(!roots.is_empty());
    let mut namespaces = Vec::new();
    for root in &roots {
        for own in ["etc", "home", "root", "run", "tmp", "var", "workspace", "dev/shm", ".sprite"] {
            each_file(&root.join(own), &mut look);
        }
        namespaces.extend(std::fs::read_link(root.with_file_name("ns/pid")).ok());
    }
    for entry in std::fs::read_dir("/proc").unwrap().flatten() {
        let process = entry.path();
        if !std::fs::read_link(process.join("ns/pid"))
            .is_ok_and(|namespace| namespaces.contains(&namespace))
        {
            continue;
        }
        for file in ["cmdline", "environ"] {
            let place = format!(
                "{file} of {}",
                std::fs::read_to_string(process.join("comm")).unwrap_or_default().trim()
            );
            look(place, &std::fs::read(process.join(file)).unwrap_or_default());
        }
    }
    (found, with_token)
}

fn each_file(dir: &Path, look: &mut impl FnMut(String, &[u8])) {
    for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
        match entry.file_type() {
            Ok(kind) if kind.is_dir() => each_file(&entry.path(), look),
            Ok(kind) if kind.is_file() => look(
                entry.path().display().to_string(),
                &std::fs::read(entry.path()).unwrap_or_default(),
            ),
            _ => {}
        }
    }
}

/// `aod dev` shows the key that it made, once, to the user who started it.
fn without_the_key(stack: &Stack) -> String {
    stack.log().replace(&stack.ready_text("/api_key"), "")
}

/// Their disks are images, seen from inside of the Sprites alone.
fn roots_of_sprites(sprites: &Path) -> Vec<PathBuf> {
    let records = std::fs::read_dir(sprites)
        .unwrap()
        .flatten()
        .map(|entry| std::fs::read(entry.path().join("sprite.json")).unwrap());
    let holders = records.map(|record| {
        serde_json::from_slice::<Value>(&record).unwrap()["holder"]["process"]["pid"].clone()
    });
    holders.map(|pid| PathBuf::from(format!("/proc/{pid}/root"))).collect()
}

fn modes_of_files_with_secrets(dir: &Path, found: &mut Vec<(PathBuf, u32)>) {
    use std::os::unix::fs::PermissionsExt as _;
    for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
        match entry.file_type() {
            Ok(kind) if kind.is_dir() => modes_of_files_with_secrets(&entry.path(), found),
            Ok(kind)
                if kind.is_file()
                    && memchr(&std::fs::read(entry.path()).unwrap_or_default(), MARK) =>
            {
                found.push((entry.path(), entry.metadata().unwrap().permissions().mode()));
            }
            _ => {}
        }
    }
}

/// The ports that a process listens on, as the kernel tells.
fn listening_ports(pid: u32) -> Vec<u16> {
    let sockets: Vec<String> = std::fs::read_dir(format!("/proc/{pid}/fd"))
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|fd| {
            Some(
                std::fs::read_link(fd.path())
                    .ok()?
                    .to_str()?
                    .strip_prefix("socket:[")?
                    .trim_end_matches(']')
                    .to_owned(),
            )
        })
        .collect();
    let table = std::fs::read_to_string(format!("/proc/{pid}/net/tcp")).unwrap_or_default();
    let lines = table.lines().skip(1).map(|line| line.split_whitespace().collect::<Vec<_>>());
    let listening =
        lines.filter(|fields| fields[3] == "0A" && sockets.iter().any(|inode| inode == fields[9]));
    listening
        .filter_map(|fields| u16::from_str_radix(fields[1].split(':').nth(1)?, 16).ok())
        .collect()
}

#[tokio::test]
async fn secrets_that_an_agent_prints_are_masked_where_that_is_wanted() {
    let settings = &[("AOD_MASK_SECRETS", "true")];
    let stack = Stack::start(Options { settings, ..Options::default() }).await.unwrap();
    let agent = stack.agent("shell").await.unwrap();
    let secret = "SENTINELsessionvariable0004";
    // Whole, cut into pieces with pauses between them, on stderr, and as the last thing there is.
    let prompt = "echo whole $S; printf '%s' \"${S:0:9}\"; sleep 0.7; printf '%s' \"${S:9:5}\"; sleep 0.7; echo \"${S:14}\"; \
                  echo \"err $S\" >&2; printf 'SENTINELsession and then '; sleep 0.5; printf '%s' \"$S\"";
    let body = json!({ "agent_id": agent, "prompt": prompt, "secret_env_vars": { "S": secret } });
    let session = stack.post("/sessions", body).await.unwrap().text("id").to_owned();
    let events = stack.stream(&session, 0).await.unwrap().all().await.unwrap();
    let text = |stream: &str| -> String {
        events
            .iter()
            .filter(|event| event["stream"] == stream)
            .filter_map(|event| event["data"].as_str())
            .collect()
    };
    assert_eq!(text("stdout"), "whole ***\n***\nSENTINELsession and then ***", "{events:?}");
    assert_eq!(text("stderr"), "err ***\n");
}
