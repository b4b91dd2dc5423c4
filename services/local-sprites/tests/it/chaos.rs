//! Our own client against what the real service is known to do.

use std::time::{Duration, Instant};

use sprites::{Error, ExecEvent, ExecRequest};

use crate::server::{Server, bash, said};

#[tokio::test]
async fn trouble_with_calls_is_outlived() {
    let server = Server::start(&[("LOCAL_SPRITES_CHAOS", "spurious=9,slow-create=0.5")]).await;
    for number in 0..4 {
        let sprite = server.sprite(&format!("t-{number}")).await;
        for file in 0..5 {
            let path = format!("/home/sprite/{file}");
            let content = format!("{number}-{file}");
            // Three spurious 404 for one call are believed: once in tens of thousands of calls
            // here.
            sprite.write(&path, content, 0o600).await.unwrap();
        }
        assert_eq!(said(&sprite, "cat 0 4").await, format!("{number}-0{number}-4"));
    }
}

#[tokio::test]
async fn a_creation_limit_is_reported_with_retry_after() {
    let server =
        Server::start(&[("LOCAL_SPRITES_CHAOS", "creates-per-minute=1,long-url=2000")]).await;
    let sprite = server.sprite("first").await;
    let refused = sprites::http_client()
        .unwrap()
        .post(format!("{}/v1/sprites", server.url()))
        .bearer_auth(crate::server::TOKEN);
    let response = refused.body(r#"{"name":"second"}"#).send().await.unwrap();
    assert_eq!(response.status(), 429);
    let after: u64 = response.headers()["retry-after"].to_str().unwrap().parse().unwrap();
    let body: serde_json::Value = response.json().await.unwrap();
    assert_eq!(
        (&body["error"], body["retry_after_seconds"].as_u64()),
        (&"sprite_creation_rate_limited".into(), Some(after))
    );
    // An over-long request line is refused once, not tried again.
    let long = "x".repeat(3000);
    let request = ExecRequest { argv: &["echo", &long], ..ExecRequest::default() };
    let begun = Instant::now();
    let error = sprite.run(&request, Duration::from_secs(30)).await.unwrap_err();
    assert!(matches!(&error, Error::Rejected { status, .. } if status.as_u16() == 414), "{error}");
    assert!(begun.elapsed() < Duration::from_secs(20));
}

#[tokio::test]
async fn a_dropped_socket_is_not_an_end() {
    let server = Server::start(&[("LOCAL_SPRITES_CHAOS", "drop-sockets=100")]).await;
    let sprite = server.sprite("dropped").await;
    let request = ExecRequest { argv: &["sleep", "30"], ..ExecRequest::default() };
    assert!(matches!(sprite.exec(&request).await.unwrap().finish().await, Err(Error::Interrupted)));
}

#[tokio::test]
async fn output_is_lost_behind_a_size_and_files_are_whole() {
    let server = Server::start(&[("LOCAL_SPRITES_CHAOS", "lose-output=65536")]).await;
    let sprite = server.sprite("lossy").await;
    let request =
        ExecRequest { argv: &["bash", "-c", "seq 1 500000 | tee all"], ..ExecRequest::default() };
    let mut exec = sprite.exec(&request).await.unwrap();
    let mut bytes = 0;
    let code = loop {
        match exec.next().await.unwrap() {
            ExecEvent::Stdout(data) => bytes += data.len(),
            ExecEvent::Stderr(_) => {}
            ExecEvent::Exit(code) => break code,
        }
    };
    let whole = sprite.read("/home/sprite/all").await.unwrap();
    assert_eq!((code, whole.len()), (0, 3_388_895));
    assert!(bytes < whole.len(), "{bytes}");
}

#[tokio::test]
async fn an_idle_sprite_pauses_and_wakes() {
    let server = Server::start(&[("LOCAL_SPRITES_CHAOS", "pause=1,cold=3")]).await;
    let sprite = server.sprite("sleepy").await;
    let client = sprites::http_client().unwrap();
    let status = async || {
        let request = client
            .get(format!("{}/v1/sprites/sleepy", server.url()))
            .bearer_auth(crate::server::TOKEN);
        let body: serde_json::Value = request.send().await.unwrap().json().await.unwrap();
        body["status"].as_str().unwrap().to_owned()
    };
    bash(&sprite, "echo disk > kept; (setsid sh -c 'while true; do date +%s%N > beat; sleep 0.05; done' >/dev/null 2>&1 &)").await;
    let request = ExecRequest { argv: &["sleep", "60"], ..ExecRequest::default() };
    let quiet = sprite.exec(&request).await.unwrap();
    testkit::eventually("it pauses", async || status().await == "warm").await;
    assert!(matches!(quiet.finish().await, Err(Error::Interrupted)), "its connections are cut");
    // A call wakes it where it was.
    let beat = "x=$(stat -c %y beat); sleep 0.3; [ \"$(stat -c %y beat)\" != \"$x\" ] && echo beats; pgrep -c '^sleep$' >/dev/null && echo same";
    assert_eq!(said(&sprite, beat).await, "beats\nsame\n");
    // A task holds it awake.
    bash(&sprite, r#"sprite-env curl -X PUT -d '{"expire":4}' /v1/tasks/busy"#).await;
    tokio::time::sleep(Duration::from_secs(2)).await;
    assert_eq!(status().await, "running");
    testkit::eventually("it goes cold", async || status().await == "cold").await;
    // Its disk is there, its processes are not.
    assert_eq!(
        said(&sprite, "cat kept; pgrep -f 'date [+]' >/dev/null || echo alone").await,
        "disk\nalone\n"
    );
}
