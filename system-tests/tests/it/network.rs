//! Environments with `limited` networking: what is allowed is reached by name, through the proxy;
//! nothing else is, in any way.

use rustix::process::Signal;
use serde_json::{Value, json};
use system_tests::{Options, Stack};

async fn limited(stack: &Stack, runtime: &str, prompt: &str, hosts: Value) -> (Vec<Value>, String) {
    let body = json!({ "name": format!("e-{}", fastrand::u64(..)), "networking": { "type": "limited", "allowed_hosts": hosts } });
    let environment = stack.post("/environments", body).await.unwrap();
    assert_eq!(environment.status, 201, "{environment:?}");
    let agent = stack.agent(runtime).await.unwrap();
    let body =
        json!({ "agent_id": agent, "environment_id": environment.text("id"), "prompt": prompt });
    let session = stack.post("/sessions", body).await.unwrap();
    assert_eq!(session.status, 202, "{session:?}");
    let events = stack.stream(session.text("id"), 0).await.unwrap().all().await.unwrap();
    let output = events.iter().filter_map(|event| event["data"].as_str()).collect();
    (events, output)
}

#[tokio::test]
async fn only_what_is_allowed_is_reached() {
    let stack = Stack::start(Options { scripted_model: true, ..Options::default() }).await.unwrap();
    let model = stack.ready_text("/model_url");
    let gateway = stack.ready_text("/api_url");
    let tell = "tell() { \"$@\" >/tmp/said 2>&1; echo \"$?:$(tail -1 /tmp/said)\"; }; get() { tell curl -sS -m 5 \"$@\"; };";
    let probes = [
        // By the proxy, as a request and as a tunnel.
        format!("get -o /dev/null -w 'reached %{{http_code}}' {model}/"),
        format!("get -o /dev/null -w 'reached %{{http_code}}' --proxytunnel {model}/"),
        // Another of the machine's own services, by each of its names: they are the sandbox's own.
        // And an unnamed host.
        format!("get -f {gateway}/livez"),
        format!("get -f --proxytunnel {gateway}/livez"),
        format!("get -f {}", gateway.replace("127.0.0.1", "localhost")),
        "get -f http://example.org/".to_owned(),
        "get https://example.org/".to_owned(),
        // Around the proxy.
        format!("get --noproxy '*' {model}/"),
        format!("get --noproxy '*' {gateway}/livez"),
        "tell timeout 5 bash -c 'echo x > /dev/tcp/93.184.216.34/443'".to_owned(),
        "tell timeout 5 bash -c 'echo x > /dev/udp/93.184.216.34/53'".to_owned(),
        // The rules, as the Sprite can read them.
        "grep -o '\"domain\":\"[^\"]*\"' /.sprite/policy/network.json | tr '\\n' ' '; echo"
            .to_owned(),
    ];
    let prompt = format!("{tell} {}", probes.join("; "));
    let (events, output) =
        limited(&stack, "shell", &prompt, json!(["127.0.0.1", "localhost", "*.example.com"])).await;
    let said: Vec<&str> = output.lines().collect();
    let (refused, said): (Vec<&str>, Vec<&str>) =
        said.into_iter().partition(|line| line.starts_with("refused by the network policy: "));
    assert_eq!(said.len(), 12, "{output}\n{events:?}");
    assert!(
        refused.iter().any(|line| line.ends_with(" example.org:80")) && refused.len() == 2,
        "{refused:?} {said:?}"
    );
    assert!(said[0].starts_with("0:reached") && said[1].starts_with("0:reached"), "{output}");
    for (probe, said) in probes.iter().zip(&said).skip(2).take(9) {
        assert!(!said.starts_with("0:"), "{probe}: {said}");
    }
    assert!(said[2].contains("502") && said[5].contains("403"), "{output}");
    assert!(said[11].contains("\"*.example.com\""), "{output}");
    let stages: Vec<_> = events.iter().filter(|event| event["stage"] == "network_policy").collect();
    assert!(stages.iter().any(|event| event["state"] == "done"), "{events:?}");
}

/// A real agent works behind the proxy, and its second turn does, also when the sandbox server was
/// restarted in between.
#[tokio::test]
async fn an_agent_reaches_its_model_and_continues_after_a_restart_of_the_sandbox_server() {
    let stack = Stack::start(Options { scripted_model: true, ..Options::default() }).await.unwrap();
    let (events, output) = limited(&stack, "claude", "hello", json!([])).await;
    assert_eq!(events.last().unwrap()["code"], 0, "{events:?}");
    assert!(output.contains("You said: hello"), "{output}");

    let model = stack.ready_text("/model_url");
    let body = json!({ "name": "again", "networking": { "type": "limited", "allowed_hosts": ["127.0.0.1"] } });
    let environment = stack.post("/environments", body).await.unwrap();
    let agent = stack.agent("shell").await.unwrap();
    let prompt = format!(
        "echo begun; for i in $(seq 60); do curl -sf -m 5 -o /dev/null -w '%{{http_code}} ' {model}/ || echo -n 'cut '; sleep 0.1; done; echo; curl -s -o /dev/null -w 'last %{{http_code}}' {model}/"
    );
    let body =
        json!({ "agent_id": agent, "environment_id": environment.text("id"), "prompt": prompt });
    let session = stack.post("/sessions", body).await.unwrap();
    let mut events = stack.stream(session.text("id"), 0).await.unwrap();
    events.until_output("begun").await.unwrap();
    // Told to stop, then killed.
    let before = stack.pids("local-sprites");
    Stack::signal(&before, Signal::TERM);
    testkit::eventually("another server", async || {
        stack.pids("local-sprites") != before && !stack.pids("local-sprites").is_empty()
    })
    .await;
    Stack::signal(&stack.pids("local-sprites"), Signal::KILL);
    let events = events.all().await.unwrap();
    let output: String = events.iter().filter_map(|event| event["data"].as_str()).collect();
    assert!(output.contains("last ") && !output.ends_with("last 000"), "{output}");
}
