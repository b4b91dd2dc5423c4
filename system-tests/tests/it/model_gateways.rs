//! Two model gateways behind one address, of which one is killed in the middle of a response.

use std::{
    collections::VecDeque,
    net::SocketAddr,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use reqwest::Url;
use rustix::process::Signal;
use serde_json::{Value, json};
use system_tests::{Options, RUNTIMES, Stack, for_each_agent};
use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
    sync::mpsc,
    task::JoinSet,
};

/// The model answers it by a word each 200 ms.
const PROMPT: &str = "slowly";
const SENTENCE: &str = "One word after the other, as slowly as a model that thinks it over.";
/// In its middle.
const WORD: &[u8] = b"other,";
/// Of each request, as the scripted model reports.
const INPUT_TOKENS: u64 = 100;
/// In each request that an agent works with. CLIs also ask for a title and the like.
const TOOLS: &[u8] = b"\"tools\"";

/// Passes each connection on to the gateway that is next in turn, or to the other one where that
/// one is gone.
struct Balancer {
    gateways: Mutex<VecDeque<SocketAddr>>,
    /// Gateways that are answering an agent's own request.
    amid: mpsc::Sender<SocketAddr>,
}

impl Balancer {
    async fn serve(self: Arc<Self>, listener: TcpListener) {
        let mut relays = JoinSet::new();
        while let Ok((client, _)) = listener.accept().await {
            relays.spawn(self.clone().relay(client));
        }
    }

    async fn relay(self: Arc<Self>, mut client: TcpStream) {
        let Some((gateway, mut server)) = self.connect().await else { return };
        let (mut from_client, mut to_client) = client.split();
        let (mut from_server, mut to_server) = server.split();
        let works = AtomicBool::new(false);
        let down = pass_on(&mut from_server, &mut to_client, |bytes| {
            if holds(bytes, WORD) && works.load(Ordering::Relaxed) {
                let _ = self.amid.try_send(gateway);
            }
        });
        let up = pass_on(&mut from_client, &mut to_server, |bytes| {
            works.fetch_or(holds(bytes, TOOLS), Ordering::Relaxed);
        });
        tokio::select! {
            () = down => {}
            () = up => {}
        }
    }

    async fn connect(&self) -> Option<(SocketAddr, TcpStream)> {
        for _ in 0..2 {
            let gateway = {
                let mut gateways = self.gateways.lock().unwrap();
                gateways.rotate_left(1);
                *gateways.front()?
            };
            if let Ok(server) = TcpStream::connect(gateway).await {
                return Some((gateway, server));
            }
        }
        None
    }
}

async fn pass_on(
    from: &mut (impl AsyncRead + Unpin),
    to: &mut (impl AsyncWrite + Unpin),
    look: impl Fn(&[u8]),
) {
    let mut buffer = vec![0; 64 * 1024];
    loop {
        let count = from.read(&mut buffer).await.unwrap_or(0);
        look(&buffer[..count]);
        if count == 0 || to.write_all(&buffer[..count]).await.is_err() {
            return;
        }
    }
}

fn holds(bytes: &[u8], text: &[u8]) -> bool {
    bytes.windows(text.len()).any(|part| part == text)
}

fn gateways(stack: &Stack) -> Vec<SocketAddr> {
    let urls = stack.ready("/model_gateway_urls");
    let address = |url: &Value| {
        let url: Url = url.as_str().unwrap().parse().unwrap();
        url.socket_addrs(|| None).unwrap()[0]
    };
    urls.as_array().unwrap().iter().map(address).collect()
}

async fn events(stack: &Stack, session: &str) -> Vec<Value> {
    let page = stack.get(&format!("/sessions/{session}/events")).await.unwrap();
    page.body["data"].as_array().unwrap().clone()
}

/// The end of the first turn behind an event.
async fn turn(stack: &Stack, session: &str, since: u64) -> Value {
    stack.stream(session, since).await.unwrap().all().await.unwrap().pop().unwrap()
}

/// Waits until an agent's own request is answered, kills the gateway that answers it, and returns
/// the turn's end.
async fn killed_amid(stack: &Stack, amid: &mut mpsc::Receiver<SocketAddr>, session: &str) -> Value {
    let answering = tokio::time::timeout(Duration::from_secs(60), amid.recv()).await.unwrap();
    let index = gateways(stack).iter().position(|gateway| Some(*gateway) == answering).unwrap();
    let pid = stack.pids("model-gateway")[index];
    Stack::signal(&[pid], Signal::KILL);
    let end = turn(stack, session, 0).await;
    testkit::eventually("the gateway is back", async || {
        stack.pids("model-gateway").get(index).is_some_and(|now| *now != pid)
    })
    .await;
    while amid.try_recv().is_ok() {}
    end
}

#[tokio::test]
async fn a_turn_survives_a_model_gateway_that_is_killed_in_mid_stream_and_is_counted_once() {
    let listener = TcpListener::bind(("127.0.0.1", testkit::free_port().unwrap())).await.unwrap();
    let address = listener.local_addr().unwrap();
    let options = Options { scripted_model: true, replicas: 2, ..Options::default() };
    let options = options
        .reaching(&[address.port()])
        .with("AOD_MODEL_GATEWAY_URL", format!("http://{address}"));
    let stack = Stack::start(options).await.unwrap();
    let (sender, mut amid) = mpsc::channel(16);
    let balancer = Balancer { gateways: Mutex::new(gateways(&stack).into()), amid: sender };
    let mut serving = JoinSet::new();
    serving.spawn(Arc::new(balancer).serve(listener));
    let mut survived = Vec::new();
    for (runtime, model, ..) in RUNTIMES {
        let agent = json!({ "name": runtime, "model": model, "runtime": runtime });
        let agent = stack.post("/agents", agent).await.unwrap().text("id").to_owned();
        let session = stack.post("/sessions", json!({ "agent_id": agent, "prompt": PROMPT })).await;
        let session = session.unwrap().text("id").to_owned();
        let end = killed_amid(&stack, &mut amid, &session).await;
        if runtime == "gemini" {
            // It does not repeat a request whose response breaks off (docs/budgets.md).
            assert_eq!(end["code"], 1, "{end}");
            let turns = stack.get(&format!("/sessions/{session}/turns")).await.unwrap();
            assert_eq!(turns.body["data"][0]["usage"]["input_tokens"], 0, "{turns:?}");
            continue;
        }
        assert_eq!((&end["type"], &end["code"]), (&json!("exit"), &json!(0)), "{runtime}: {end}");
        let said: Vec<String> = events(&stack, &session)
            .await
            .iter()
            .filter(|event| event["type"] == "agent.message")
            .map(|event| event["content"][0]["text"].as_str().unwrap().to_owned())
            .collect();
        assert_eq!(said, [SENTENCE], "{runtime}");
        survived.push((runtime, session, end["id"].as_u64().unwrap()));
    }
    let database = sqlx::PgPool::connect(&stack.ready_text("/database_url")).await.unwrap();
    testkit::eventually("the requests of killed gateways are settled", async || {
        let open = "select count(*) from scheduler.model_request where status = 'open'";
        sqlx::query_scalar::<_, i64>(open).fetch_one(&database).await.unwrap() == 0
    })
    .await;
    for_each_agent(survived, async |(runtime, session, since)| {
        // What was settled after the turn is in the log with the next one.
        let next = json!({ "prompt": "say the mark" });
        stack.post(&format!("/sessions/{session}/prompt"), next).await.unwrap();
        assert_eq!(turn(&stack, &session, since).await["code"], 0, "{runtime}");
        let events = events(&stack, &session).await;
        let of = |kind: &str| -> Vec<&Value> {
            events.iter().filter(|event| event["type"] == kind).collect()
        };
        let (starts, ends) = (of("span.model_request_start"), of("span.model_request_end"));
        for start in &starts {
            let ends = ends.iter().filter(|end| end["model_request_start_id"] == start["id"]);
            assert_eq!(ends.count(), 1, "{runtime}: {events:#?}");
        }
        let (unknown, counted): (Vec<&Value>, Vec<&Value>) =
            ends.into_iter().partition(|end| end["model_usage"].is_null());
        assert_eq!(unknown.len(), 1, "{runtime}: {events:#?}");
        assert_eq!(unknown[0]["error"], "The model gateway that sent it is gone", "{runtime}");
        assert_eq!(counted.len() + 1, starts.len(), "{runtime}: {events:#?}");
        let turns = stack.get(&format!("/sessions/{session}/turns")).await.unwrap();
        let used = turns.body["data"].as_array().unwrap().iter();
        let used: u64 = used.filter_map(|turn| turn["usage"]["input_tokens"].as_u64()).sum();
        assert_eq!(used, INPUT_TOKENS * counted.len() as u64, "{runtime}: {turns:?}");
    })
    .await;
}
