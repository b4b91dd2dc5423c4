//! Files in a bucket of a real S3 server, which is killed, restarted and made to say nothing.

#![expect(clippy::unwrap_used, reason = "tests")]

use std::time::Duration;

use bytes::Bytes;
use files::{Files, NotWritten, S3Settings, Written};
use futures::{Stream, StreamExt as _, TryStreamExt as _, stream};
use sha2::{Digest as _, Sha256};
use testkit::{
    S3,
    s3::{ACCESS_KEY_ID, SECRET_ACCESS_KEY},
};
use tokio::task::JoinSet;
use uuid::Uuid;

const BUCKET: &str = "aod-files";
const PART: usize = 3 << 20;

fn settings(endpoint: &str) -> S3Settings {
    S3Settings {
        endpoint: Some(endpoint.parse().unwrap()),
        region: "us-east-1".to_owned(),
        path_style: true,
        silence_max: Duration::from_secs(5),
        access_key_id: ACCESS_KEY_ID.into(),
        secret_access_key: SECRET_ACCESS_KEY.into(),
    }
}

fn open(s3: &S3, path: &str) -> Files {
    Files::open_bucket(&format!("s3://{BUCKET}{path}"), &settings(&s3.endpoint())).unwrap()
}

/// Bytes that differ from part to part.
fn parts(count: usize) -> Vec<Bytes> {
    (0..count).map(|part| Bytes::from(vec![u8::try_from(part % 251).unwrap(); PART])).collect()
}

fn chunks(parts: Vec<Bytes>) -> impl Stream<Item = Result<Bytes, ()>> {
    stream::iter(parts.into_iter().map(Ok))
}

async fn content(files: &Files, object: Uuid) -> Option<Vec<u8>> {
    let read = files.read(object).await.ok()?;
    Some(read.try_collect::<Vec<_>>().await.unwrap().concat())
}

async fn all(files: &Files) -> Vec<Uuid> {
    let mut all: Vec<Uuid> = files.older_than(Duration::ZERO, 10).try_concat().await.unwrap();
    all.sort();
    all
}

#[tokio::test]
async fn an_object_is_read_as_it_was_written_until_it_is_deleted() {
    let s3 = S3::start(BUCKET).unwrap();
    let files = open(&s3, "/one deployment/+ü%23%25é~!'()=&;");
    files.check().await.unwrap();
    let (empty, small, large) = (Uuid::now_v7(), Uuid::now_v7(), Uuid::now_v7());
    for (object, parts) in
        [(empty, vec![]), (small, vec![Bytes::from_static(b"small")]), (large, parts(7))]
    {
        let whole = parts.concat();
        let written = files.write(object, 100 << 20, chunks(parts)).await.unwrap();
        let expected =
            Written { bytes: whole.len() as u64, sha256: Sha256::digest(&whole).to_vec() };
        assert_eq!(written, expected);
        assert!(content(&files, object).await.is_some_and(|content| content == whole));
    }
    assert_eq!(all(&files).await, [empty, small, large]);
    assert!(files.older_than(Duration::from_secs(60), 10).next().await.is_none());
    // Another deployment in the same bucket.
    assert!(all(&open(&s3, "")).await.is_empty());
    for _ in 0..2 {
        files.delete(large).await.unwrap();
    }
    assert_eq!((content(&files, large).await, all(&files).await), (None, vec![empty, small]));
    assert_eq!(files.remove_abandoned().await.unwrap(), 0);
}

#[tokio::test]
async fn nothing_is_left_of_an_object_that_is_too_large_or_whose_source_fails() {
    let s3 = S3::start(BUCKET).unwrap();
    let files = open(&s3, "");
    let before = s3.stored().unwrap();
    let object = Uuid::now_v7();
    let too_large = files.write(object, 10 << 20, chunks(parts(5))).await;
    assert!(matches!(too_large, Err(NotWritten::TooLarge(_))));
    let broken = stream::iter(parts(4).into_iter().map(Ok).chain([Err("gone")]));
    let broken = files.write(object, u64::MAX, broken).await;
    assert!(matches!(broken, Err(NotWritten::Source("gone"))));
    assert_eq!(s3.stored().unwrap(), before);
}

#[tokio::test]
async fn an_upload_and_a_download_survive_a_restart_of_the_store() {
    let mut s3 = S3::start(BUCKET).unwrap();
    let files = open(&s3, "");
    let (object, whole) = (Uuid::now_v7(), parts(12).concat());
    let (restart, restarted) = tokio::sync::oneshot::channel();
    let sent = {
        let (before, after) = (parts(12)[..6].to_vec(), parts(12)[6..].to_vec());
        chunks(before).chain(
            stream::once(async move { restarted.await.unwrap() })
                .flat_map(move |()| chunks(after.clone())),
        )
    };
    let files_of_writer = files.clone();
    let mut writer = JoinSet::new();
    writer.spawn(async move { files_of_writer.write(object, u64::MAX, Box::pin(sent)).await });
    testkit::eventually("parts are stored", || async { s3.stored().unwrap().len() > 1 }).await;
    s3.restart().unwrap();
    restart.send(()).unwrap();
    assert_eq!(writer.join_next().await.unwrap().unwrap().unwrap().bytes, whole.len() as u64);

    let mut read = files.read(object).await.unwrap();
    let mut content = read.next().await.unwrap().unwrap().to_vec();
    s3.restart().unwrap();
    while let Some(chunk) = read.next().await {
        content.extend_from_slice(&chunk.unwrap());
    }
    assert!(content == whole, "{} of {} bytes", content.len(), whole.len());
}

#[tokio::test]
async fn an_upload_and_a_download_fail_when_the_store_is_gone_for_good() {
    let mut s3 = S3::start(BUCKET).unwrap();
    let files = open(&s3, "");
    let object = Uuid::now_v7();
    files.write(object, u64::MAX, chunks(parts(12))).await.unwrap();
    let mut read = files.read(object).await.unwrap();
    read.next().await.unwrap().unwrap();
    s3.kill();
    let failed = tokio::time::timeout(Duration::from_secs(60), async {
        let read = read.try_fold(0, |bytes, chunk| async move { Ok(bytes + chunk.len()) }).await;
        (read, files.write(object, u64::MAX, chunks(parts(4))).await, files.delete(object).await)
    });
    let (read, written, deleted) = failed.await.unwrap();
    assert!(read.is_err() && deleted.is_err());
    let Err(NotWritten::Store(error)) = written else { panic!("{written:?}") };
    assert!(error.to_string().contains("Connection refused"), "{error}");
}

#[tokio::test]
async fn a_bucket_that_cannot_be_used_is_named_with_the_reason() {
    let mut s3 = S3::start(BUCKET).unwrap();
    let right = settings(&s3.endpoint());
    let why = async |settings: &S3Settings, bucket: &str| {
        let files = Files::open_bucket(&format!("s3://{bucket}/p"), settings).unwrap();
        let error = files.check().await.unwrap_err().to_string();
        assert!(!error.contains(SECRET_ACCESS_KEY), "{error}");
        assert!(error.contains(&format!("s3://{bucket}/p at http://127.0.0.1:")), "{error}");
        error
    };
    let no_bucket = why(&right, "aod-other").await;
    assert!(no_bucket.contains("NoSuchBucket"), "{no_bucket}");
    let wrong_key = S3Settings { secret_access_key: "wrong".into(), ..right.clone() };
    let refused = why(&wrong_key, BUCKET).await;
    assert!(refused.contains("SignatureDoesNotMatch"), "{refused}");
    s3.kill();
    let gone = why(&right, BUCKET).await;
    assert!(gone.contains("Connection refused"), "{gone}");
}

#[tokio::test]
async fn a_store_that_does_not_answer_holds_up_no_one_for_ever() {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let endpoint = format!("http://{}", listener.local_addr().unwrap());
    let mut silent = JoinSet::new();
    silent.spawn(async move {
        let mut connections = Vec::new();
        while let Ok(connection) = listener.accept().await {
            connections.push(connection);
        }
    });
    let settings = S3Settings { silence_max: Duration::from_millis(200), ..settings(&endpoint) };
    let files = Files::open_bucket(&format!("s3://{BUCKET}"), &settings).unwrap();
    let all = tokio::time::timeout(Duration::from_secs(60), async {
        let checked = files.check().await;
        let read = files.read(Uuid::now_v7()).await.map(drop);
        (checked, read, files.write(Uuid::now_v7(), u64::MAX, chunks(parts(4))).await)
    });
    let (checked, read, written) = all.await.unwrap();
    assert!(checked.is_err() && read.is_err(), "{checked:?} {read:?}");
    assert!(matches!(written, Err(NotWritten::Store(_))));
}
