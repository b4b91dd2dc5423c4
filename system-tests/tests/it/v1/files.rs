//! Files of `/v1` on the whole stack.

use reqwest::Method;
use serde_json::{Value, json};
use system_tests::{Options, Stack};

use super::{Client, foreign_key, status_for};

const LIMITED: Options = Options {
    scripted_model: false,
    runners: 1,
    replicas: 1,
    nats_servers: 1,
    no_restart: false,
    settings: &[("AOD_FILE_MAX_BYTES", "1000000"), ("AOD_USER_FILES_MAX_BYTES", "2500000")],
};

/// A form with one file, as `requests` and `fetch` send it.
async fn upload(stack: &Stack, key: &str, name: &str, content: &[u8], more: &str) -> (u16, Value) {
    let boundary = "----------boundary";
    let mut body = format!(
        "--{boundary}\r\nContent-Disposition: form-data; name=\"file\"; filename=\"{name}\"\r\nContent-Type: application/octet-stream\r\n\r\n"
    )
    .into_bytes();
    body.extend_from_slice(content);
    body.extend_from_slice(format!("\r\n{more}--{boundary}--\r\n").as_bytes());
    let url = format!("{}/v1/files", stack.ready_text("/api_url"));
    let request = stack
        .http
        .post(url)
        .bearer_auth(key)
        .header("content-type", format!("multipart/form-data; boundary={boundary}"));
    let answer = request.body(body).send().await.unwrap();
    (answer.status().as_u16(), answer.json().await.unwrap())
}

async fn uploaded(stack: &Stack, name: &str, content: &[u8]) -> String {
    let (status, file) = upload(stack, &stack.ready_text("/api_key"), name, content, "").await;
    assert_eq!((status, &file["size_bytes"]), (200, &json!(content.len())), "{file}");
    file["id"].as_str().unwrap().to_owned()
}

async fn content(stack: &Stack, key: &str, file: &str) -> (u16, Vec<u8>) {
    let url = format!("{}/v1/files/{file}/content", stack.ready_text("/api_url"));
    let answer = stack.http.get(url).bearer_auth(key).send().await.unwrap();
    (answer.status().as_u16(), answer.bytes().await.unwrap().to_vec())
}

/// How many objects the store has.
fn objects(stack: &Stack) -> usize {
    let folders = std::fs::read_dir(stack.data_dir().join("files/objects"));
    folders
        .into_iter()
        .flatten()
        .flatten()
        .map(|folder| std::fs::read_dir(folder.path()).unwrap().count())
        .sum()
}

#[tokio::test]
async fn files_reach_sandboxes_and_what_an_agent_writes_outlives_its_sandbox() {
    let stack = Stack::start(Options::default()).await.unwrap();
    use_files(&stack, || objects(&stack)).await;
}

#[tokio::test]
async fn files_in_a_bucket_reach_sandboxes_and_outlive_them_as_those_in_a_directory_do() {
    let s3 = testkit::S3::start("aod-files").unwrap();
    let options = Options::default()
        .with("AOD_FILES_URL", "s3://aod-files/a/deployment".to_owned())
        .with("AOD_FILES_S3_ENDPOINT", s3.endpoint())
        .with("AOD_FILES_S3_ACCESS_KEY_ID", testkit::s3::ACCESS_KEY_ID.to_owned())
        .with("AOD_FILES_S3_SECRET_ACCESS_KEY", testkit::s3::SECRET_ACCESS_KEY.to_owned());
    let stack = Stack::start(options).await.unwrap();
    // Of an upload whose client goes no part stays: no list of objects would show it.
    let before = s3.stored().unwrap().len();
    let client = begin_upload(&stack).await;
    testkit::eventually("a part is stored", || async { s3.stored().unwrap().len() > before + 1 })
        .await;
    drop(client);
    testkit::eventually("no part is left", || async { s3.stored().unwrap().len() == before }).await;

    use_files(&stack, || {
        let stored = s3.stored().unwrap();
        let folder = std::path::Path::new("aod-files/a/deployment/objects");
        let is_object =
            |path: &&std::path::PathBuf| path.ancestors().any(|parent| parent.ends_with(folder));
        stored.iter().filter(is_object).count()
    })
    .await;
    assert!(!stack.data_dir().join("files").exists(), "nothing is beside the bucket");
}

/// Sends the first 12 MB of a larger file.
async fn begin_upload(stack: &Stack) -> tokio::net::TcpStream {
    use tokio::io::AsyncWriteExt as _;
    let (url, key) = (stack.ready_text("/api_url"), stack.ready_text("/api_key"));
    let host = url.trim_start_matches("http://").trim_end_matches('/');
    let mut client = tokio::net::TcpStream::connect(host).await.unwrap();
    let head = format!(
        "POST /v1/files HTTP/1.1\r\nhost: {host}\r\nauthorization: Bearer {key}\r\ncontent-length: 20000000\r\ncontent-type: multipart/form-data; boundary=b\r\n\r\n--b\r\nContent-Disposition: form-data; name=\"file\"; filename=\"x\"\r\n\r\n"
    );
    client.write_all(head.as_bytes()).await.unwrap();
    client.write_all(&vec![b'x'; 12_000_000]).await.unwrap();
    client
}

async fn use_files(stack: &Stack, objects: impl Fn() -> usize) {
    let key = stack.ready_text("/api_key");
    let client = Client::shell(stack).await;
    let large: Vec<u8> = (0..9_000_000_u32).map(|n| (n % 251) as u8).collect();
    let (one, two) = (
        uploaded(stack, "one.txt", b"first file").await,
        uploaded(stack, "large.bin", &large).await,
    );
    assert_eq!(content(stack, &key, &two).await, (200, large));
    let file = |id: &str, path: Option<&str>| match path {
        Some(path) => json!({ "type": "file", "file_id": id, "mount_path": path }),
        None => json!({ "type": "file", "file_id": id }),
    };
    let session = client.session(json!({ "resources": [file(&one, Some("data/one.txt"))] })).await;
    let resources = format!("/v1/sessions/{session}/resources");
    let given = stack.get(&resources).await.unwrap().body["data"].clone();
    assert_eq!(given[0]["mount_path"], "/mnt/session/uploads/data/one.txt");
    assert_ne!(given[0]["file_id"], json!(one), "the session has a copy");
    assert_eq!(
        stack.get(&format!("/v1/sessions/{session}")).await.unwrap().body["resources"],
        given
    );
    // Deleted while it is in use: the session keeps its copy.
    assert_eq!(
        stack.call(Method::DELETE, &format!("/v1/files/{one}"), None).await.unwrap().text("type"),
        "file_deleted"
    );
    assert_eq!(stack.get(&format!("/v1/files/{one}")).await.unwrap().status, 404);
    let write = "cat /mnt/session/uploads/data/one.txt; cd /mnt/session/outputs && mkdir -p sub && printf report >sub/report.csv && \
                 printf x >later; ln -s /etc/passwd link";
    assert_eq!(client.turn(&session, write).await, "first file");

    // Added and removed on a living session.
    let added = stack.post(&resources, file(&two, None)).await.unwrap();
    assert_eq!(
        (added.status, added.body["mount_path"].as_str()),
        (200, Some(&*format!("/mnt/session/uploads/{two}"))),
        "{added:?}"
    );
    let first = given[0]["id"].as_str().unwrap();
    let removed = stack.call(Method::DELETE, &format!("{resources}/{first}"), None).await.unwrap();
    assert_eq!(removed.text("type"), "session_resource_deleted", "{removed:?}");
    assert_eq!(stack.get(&format!("{resources}/{first}")).await.unwrap().status, 404);
    let look = format!(
        "[ -e /mnt/session/uploads/data/one.txt ] || stat -c '%s %a' /mnt/session/uploads/{two}; printf changed >/mnt/session/outputs/later"
    );
    assert_eq!(client.turn(&session, &look).await, "9000000 444");

    // The newest of each path, without the symlink.
    let listed = stack.get(&format!("/v1/files?scope_id={session}")).await.unwrap();
    let mut outputs: Vec<(String, String, String)> = Vec::new();
    for file in listed.body["data"].as_array().unwrap() {
        assert_eq!(file["scope"], json!({ "type": "session", "id": session }), "{file}");
        let text =
            String::from_utf8(content(stack, &key, file["id"].as_str().unwrap()).await.1).unwrap();
        outputs.push((
            file["filename"].as_str().unwrap().to_owned(),
            file["mime_type"].as_str().unwrap().to_owned(),
            text,
        ));
    }
    outputs.sort();
    let expected = [
        ("later", "application/octet-stream", "changed"),
        ("sub/report.csv", "text/csv", "report"),
    ];
    assert_eq!(
        outputs,
        expected.map(|(name, mime, text)| (name.to_owned(), mime.to_owned(), text.to_owned()))
    );

    // The sandbox goes with the session's end; the files stay until the session is deleted.
    assert_eq!(
        stack.post(&format!("/v1/sessions/{session}/archive"), json!({})).await.unwrap().status,
        200
    );
    let report = listed.body["data"]
        .as_array()
        .unwrap()
        .iter()
        .find(|file| file["filename"] == "sub/report.csv")
        .unwrap();
    let report = report["id"].as_str().unwrap();
    assert_eq!(content(stack, &key, report).await, (200, b"report".to_vec()));
    assert_eq!(
        stack.post(&resources, file(&two, None)).await.unwrap().status,
        400,
        "it is archived"
    );
    assert_eq!(
        stack.call(Method::DELETE, &format!("/v1/sessions/{session}"), None).await.unwrap().status,
        200
    );
    assert_eq!(content(stack, &key, report).await.0, 404);
    // Of all the bytes those of the one file that is left.
    testkit::eventually("the bytes are deleted", || async { objects() == 1 }).await;
    assert_eq!(
        stack.call(Method::DELETE, &format!("/v1/files/{two}"), None).await.unwrap().status,
        200
    );
    testkit::eventually("the last bytes are deleted", || async { objects() == 0 }).await;
}

#[tokio::test]
async fn files_are_limited_paged_and_their_users_own() {
    let stack = Stack::start(LIMITED).await.unwrap();
    let key = stack.ready_text("/api_key");
    let client = Client::shell(&stack).await;
    let mut files = Vec::new();
    for number in 0..3 {
        files.push(uploaded(&stack, &format!("{number}.txt"), b"text").await);
    }
    let (mut listed, mut page) = (Vec::new(), String::new());
    loop {
        let answer = stack.get(&format!("/v1/files?limit=1{page}")).await.unwrap();
        listed.extend(
            answer.body["data"]
                .as_array()
                .unwrap()
                .iter()
                .map(|file| file["id"].as_str().unwrap().to_owned()),
        );
        let Some(next) = answer.body["next_page"].as_str() else { break };
        page = format!("&page={next}");
    }
    assert_eq!(listed.iter().rev().collect::<Vec<_>>(), files.iter().collect::<Vec<_>>());
    let two = stack
        .get(&format!("/v1/files?ids[]={}&ids[]={}&ids[]=file_none", files[0], files[2]))
        .await
        .unwrap();
    assert_eq!(two.body["data"].as_array().unwrap().len(), 2, "{two:?}");

    // Another user's.
    let foreign = foreign_key(&stack);
    let path = format!("/v1/files/{}", files[0]);
    for (method, path) in [
        (Method::GET, path.clone()),
        (Method::GET, format!("{path}/content")),
        (Method::DELETE, path.clone()),
    ] {
        assert_eq!(
            status_for(&stack, &foreign, method.clone(), &path, None).await,
            404,
            "{method} {path}"
        );
    }
    let (status, theirs) = upload(&stack, &foreign, "theirs", b"x", "").await;
    assert_eq!(status, 200, "{theirs}");
    let wanted = |id: &Value| json!([{ "type": "file", "file_id": id }]);
    let body = json!({ "agent": client.agent, "environment_id": client.environment, "resources": wanted(&theirs["id"]) });
    let refused = stack.post("/v1/sessions", body).await.unwrap();
    assert_eq!(
        (refused.status, refused.body["error"]["details"]["error_code"].as_str()),
        (404, Some("file_not_found")),
        "{refused:?}"
    );
    let session = client.session(json!({})).await;
    let refused = stack
        .post(&format!("/v1/sessions/{session}/resources"), wanted(&theirs["id"])[0].clone())
        .await
        .unwrap();
    assert_eq!(refused.status, 404, "{refused:?}");

    // Too large, alone and together.
    let (status, refused) = upload(&stack, &key, "large", &vec![0; 1_000_001], "").await;
    assert_eq!(
        (status, refused["error"]["type"].as_str()),
        (413, Some("request_too_large")),
        "{refused}"
    );
    for _ in 0..2 {
        uploaded(&stack, "mb", &vec![0; 1_000_000]).await;
    }
    let (status, refused) = upload(&stack, &key, "mb", &vec![0; 1_000_000], "").await;
    assert_eq!(
        (status, refused["error"]["details"]["error_code"].as_str()),
        (400, Some("storage_quota_exceeded")),
        "{refused}"
    );
    // What an agent writes beyond the limits is left; its turn is none the worse.
    let write = "cd /mnt/session/outputs; head -c 1000001 /dev/zero >large; head -c 900000 /dev/zero >second; printf small >a; echo done";
    assert_eq!(client.turn(&session, write).await, "done");
    let kept = stack.get(&format!("/v1/files?scope_id={session}")).await.unwrap();
    let kept: Vec<&str> = kept.body["data"]
        .as_array()
        .unwrap()
        .iter()
        .map(|file| file["filename"].as_str().unwrap())
        .collect();
    assert_eq!(kept, ["a"]);

    // Wrong forms name the part.
    let part = |name: &str, value: &str| {
        format!(
            "------------boundary\r\nContent-Disposition: form-data; name=\"{name}\"\r\n\r\n{value}\r\n"
        )
    };
    for (name, more, field) in [
        ("a/b", String::new(), "file"),
        ("a", part("expires_in_seconds", "1"), "expires_in_seconds"),
        ("a", part("nope", "1"), "nope"),
        ("a", part("file", "1"), "file"),
    ] {
        let (status, refused) = upload(&stack, &key, name, b"x", &more).await;
        let told = refused["error"]["message"].as_str().unwrap_or_default();
        assert!(status == 400 && told.starts_with(field), "{name} {more}: {refused}");
    }
    let (status, expiring) =
        upload(&stack, &key, "a", b"x", &part("expires_in_seconds", "3600")).await;
    assert!(status == 200 && expiring["expires_at"].is_string(), "{expiring}");
    assert_eq!(stack.post("/v1/files", json!({})).await.unwrap().status, 400, "it is no form");
    // Nothing is left of what was refused.
    testkit::eventually("refused bytes are deleted", || async { objects(&stack) == 8 }).await;
}
