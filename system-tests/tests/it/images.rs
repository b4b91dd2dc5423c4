//! Sessions that begin with the packages that an earlier one installed.

use std::{
    path::PathBuf,
    process::Command,
    time::{Duration, Instant},
};

use rustix::process::Signal;
use serde_json::{Value, json};
use system_tests::{Options, Stack};
use testkit::eventually;

const PROMPT: &str = "hello; python3 -c 'import six; print(six.__version__)'";
const EXPECTED: &str = "Hello, world!\n1.17.0\n";
/// What the journal, the set-up and the prompt of a session have, and an image must not.
const SENTINEL: &str = "sentinel-5f0c9e21";

/// A user of the stack, by its key.
struct User<'a> {
    stack: &'a Stack,
    key: String,
}

/// How a session's packages came to it.
#[derive(Debug)]
struct Prepared {
    restored: bool,
    packages_ms: u64,
    /// From its creation to its end.
    took: Duration,
    session: String,
}

impl User<'_> {
    async fn call(&self, method: reqwest::Method, path: &str, body: Value) -> Value {
        let url = format!("{}{path}", self.stack.ready_text("/api_url"));
        let request = self.stack.http.request(method, url).bearer_auth(&self.key).json(&body);
        let response = request.send().await.unwrap().error_for_status().unwrap();
        response.json().await.unwrap_or_default()
    }

    async fn created(&self, path: &str, body: Value) -> String {
        let made = self.call(reqwest::Method::POST, path, body).await;
        made["id"].as_str().unwrap().to_owned()
    }

    async fn environment(&self) -> String {
        let body = json!({
            "name": "packages",
            "packages": { "apt": ["hello"], "pip": ["six==1.17.0"] },
            "setup_script": format!("echo {SENTINEL}-of-the-script >~/set-up"),
        });
        self.created("/environments", body).await
    }

    async fn begin(&self, environment: &str, prompt: &str, more: Value) -> String {
        let agent = json!({ "name": "a", "model": "claude-sonnet-4-5", "runtime": "shell" });
        let agent = self.created("/agents", agent).await;
        let mut body =
            json!({ "agent_id": agent, "environment_id": environment, "prompt": prompt });
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        self.created("/sessions", body).await
    }

    async fn events(&self, session: &str) -> Vec<Value> {
        let url = format!("{}/sessions/{session}/stream", self.stack.ready_text("/api_url"));
        let stream = self.stack.http.get(url).bearer_auth(&self.key).send().await.unwrap();
        let text = stream.text().await.unwrap();
        let lines = text.lines().filter_map(|line| line.strip_prefix("data: "));
        lines.map(|data| serde_json::from_str(data).unwrap()).collect()
    }

    async fn ended(&self, session: String, begun: Instant) -> Prepared {
        let events = self.events(&session).await;
        let took = begun.elapsed();
        let output: String = events.iter().filter_map(|event| event["data"].as_str()).collect();
        assert!(output.ends_with(EXPECTED), "{output} {:?}", events.last());
        let done = |stage: &str| {
            let is_done = |event: &&Value| event["stage"] == stage && event["state"] == "done";
            events.iter().filter(is_done).collect::<Vec<_>>()
        };
        let packages = done("packages");
        assert_eq!((packages.len(), done("provision_setup").len()), (1, 1), "{events:?}");
        Prepared {
            restored: packages[0]["restored"] == true,
            packages_ms: packages[0]["duration_ms"].as_u64().unwrap(),
            took,
            session,
        }
    }

    async fn run(&self, environment: &str, more: Value) -> Prepared {
        let begun = Instant::now();
        let prompt = format!("cat ~/set-up >/dev/null; sync; : {SENTINEL}-of-the-prompt; {PROMPT}");
        let session = self.begin(environment, &prompt, more).await;
        self.ended(session, begun).await
    }
}

/// The images that the stack's sandbox server keeps.
fn images(stack: &Stack) -> Vec<PathBuf> {
    let below = |dir: PathBuf| {
        std::fs::read_dir(dir).into_iter().flatten().flatten().map(|entry| entry.path())
    };
    let all = below(stack.data_dir().join("sprites/images")).flat_map(below);
    all.filter(|image| image.join("image.json").exists()).collect()
}

async fn images_become(stack: &Stack, number: usize) {
    eventually("the images are kept", async || images(stack).len() == number).await;
}

fn holds(path: &std::path::Path, text: &str) -> bool {
    let mut grep = Command::new("grep");
    grep.args(["-r", "-a", "-q", "-F", "-e", text]).arg(path).status().unwrap().success()
}

fn admin(stack: &Stack, args: &[&str]) -> Value {
    let data = stack.data_dir().to_str().unwrap();
    let args = [&["--output", "json", "admin", "--data-dir", data], args].concat();
    let output = stack.aod(&args).unwrap().output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap_or_default()
}

/// By the real managers from their own registries.
#[tokio::test]
async fn packages_are_installed_once_for_a_version_of_a_users_environment() {
    let options = Options { runners: 2, ..Options::default() };
    let stack = Stack::start(options.with("LOCAL_SPRITES_DISK_MB", "768".to_owned())).await;
    let stack = stack.unwrap();
    let user = User { stack: &stack, key: stack.ready_text("/api_key") };
    let environment = user.environment().await;
    let first = user.run(&environment, json!({})).await;
    assert!(!first.restored, "{first:?}");
    images_become(&stack, 1).await;

    let disk = images(&stack).remove(0).join("disk.img");
    if disk.exists() {
        let own = std::fs::read_dir(stack.data_dir().join("sprites/sprites")).unwrap().flatten();
        let own: Vec<PathBuf> = own.map(|entry| entry.path().join("disk.img")).collect();
        assert!(own.iter().any(|own| holds(own, SENTINEL)), "the session's own disk has them");
    }
    for secret in [SENTINEL, "aod_session_", &first.session] {
        assert!(!holds(&images(&stack)[0], secret), "{secret}");
    }

    let second = user.run(&environment, json!({})).await;
    println!("packages installed: {first:?}\npackages restored: {second:?}");
    assert!(second.restored && second.packages_ms < first.packages_ms);
    assert!(second.took < first.took);
    // The installer did not run: it says what it does.
    let output = async |session: &str| {
        let path = format!("/sessions/{session}/events?limit=1000");
        user.call(reqwest::Method::GET, &path, json!(null)).await.to_string()
    };
    assert!(output(&first.session).await.contains("Setting up hello"));
    assert!(!output(&second.session).await.contains("Setting up hello"));

    // A session with a variable of its own has its packages installed for itself.
    let own = user.run(&environment, json!({ "secret_env_vars": { "MINE": "1" } })).await;
    assert!(!own.restored, "{own:?}");
    // So has another user.
    admin(&stack, &["user", "create", "mallory"]);
    let key = admin(&stack, &["key", "create", "mallory"])["key"].as_str().unwrap().to_owned();
    let other = User { stack: &stack, key };
    let token = json!({ "value": stack.ready_text("/sprites_token") });
    other.call(reqwest::Method::PUT, "/credentials/backend:sprites", token).await;
    let theirs = other.run(&other.environment().await, json!({})).await;
    assert!(!theirs.restored, "{theirs:?}");
    images_become(&stack, 2).await;

    // And a new version; also where runners die while it is prepared, and while it is used.
    let change =
        json!({ "version": 1, "packages": { "apt": ["hello"], "pip": ["six==1.17.0", "idna"] } });
    user.call(reqwest::Method::PUT, &format!("/environments/{environment}"), change).await;
    for (restored, stage) in [(false, "packages"), (true, "create_sprite"), (true, "packages")] {
        let begun = Instant::now();
        let session = user.begin(&environment, PROMPT, json!({})).await;
        let mut events = stack.stream(&session, 0).await.unwrap();
        while events.next().await.unwrap().unwrap()["stage"] != stage {}
        if let Ok(runner) = stack.runner_of(&session).await {
            Stack::signal(&[runner], Signal::KILL);
        }
        let taken_over = user.ended(session, begun).await;
        assert_eq!(taken_over.restored, restored, "{stage}: {taken_over:?}");
        images_become(&stack, 3).await;
    }
}
