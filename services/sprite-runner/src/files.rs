//! Files of a session: writes its user's files into the sandbox before a turn, and stores the
//! agent's files after one.
//!
//! Bytes go between the sandbox and the store of files; the scheduler knows what they are.

use std::{collections::BTreeSet, time::Duration};

use ::files::Files;
use bus::RpcError;
use bytes::Bytes;
use contract::{
    rpc,
    scheduler::{BeginOutputRequest, CommitOutputRequest, File, TurnSpec},
};
use futures::{Stream, StreamExt as _, TryStreamExt as _};
use serde::{Deserialize, Serialize};
use sprites::{Error, ExecRequest, Sprite};
use types::{
    ErrorCode, FileId, SessionId,
    file::{OUTPUTS, OUTPUTS_OF_SESSION_MAX, is_filename, mime_of},
};
use uuid::Uuid;

use crate::{Runner, stopped::Stopped};

/// The manifest of files in a sandbox. Its agent may change it.
const MANIFEST: &str = "/var/lib/aod/session-files.json";
/// Of all the files that a session may have, with their paths.
const MANIFEST_BYTES_MAX: usize = 2 << 20;
/// It makes the folder of outputs, which the agent writes to.
const MARKER: &str = "/mnt/session/outputs/.aod";
const MARKER_NAME: &str = ".aod";
const DEADLINE: Duration = Duration::from_secs(10);
const LIST_MAX: Duration = Duration::from_secs(30);
/// Of a turn: its end waits for its outputs.
const OUTPUTS_TIME_MAX: Duration = Duration::from_secs(300);
const ATTEMPTS: u32 = 3;
const PATH_BYTES_MAX: usize = 1024;
/// Of a page of the list of outputs: what a command prints at most.
const LIST_BYTES_MAX: usize = 60_000;
const LIST_PAGES_MAX: usize = 16;

/// Why files could not be written into a sandbox.
#[derive(Debug)]
pub enum NotMounted {
    /// Another attempt may.
    Released(String),
    Failed(String),
}

impl From<Error> for NotMounted {
    fn from(error: Error) -> Self {
        Self::Released(format!("its sandbox does not take the session's files: {error}"))
    }
}

impl From<NotMounted> for Stopped {
    fn from(error: NotMounted) -> Self {
        match error {
            NotMounted::Released(reason) => Self::Released(reason),
            NotMounted::Failed(message) => Self::failed("files", message),
        }
    }
}

/// A file as a sandbox has it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
struct Mounted {
    id: String,
    path: String,
}

/// What has to be done so that a sandbox has the files that it should: paths to remove, then files
/// to write.
fn differences<'a>(has: &[Mounted], wanted: &'a [File]) -> (Vec<String>, Vec<&'a File>) {
    let known: BTreeSet<&str> = has.iter().map(|file| file.id.as_str()).collect();
    let kept: BTreeSet<&str> = wanted.iter().map(|file| file.file_id.as_str()).collect();
    let removed = has
        .iter()
        .filter(|file| !kept.contains(file.id.as_str()))
        .map(|file| file.path.clone())
        .collect();
    (removed, wanted.iter().filter(|file| !known.contains(file.file_id.as_str())).collect())
}

/// Gives a sandbox the session's files, and takes those that the session no longer has. Safe to
/// interrupt and rerun.
pub async fn mount(
    runner: &Runner,
    sprite: &Sprite,
    spec: &TurnSpec,
    is_new: bool,
) -> Result<(), NotMounted> {
    if is_new && spec.collects_outputs {
        sprite.write(MARKER, Vec::new(), 0o644).await?;
    }
    if !spec.had_files {
        return Ok(());
    }
    let has: Vec<Mounted> = match sprite.read_at_most(MANIFEST, MANIFEST_BYTES_MAX).await {
        Ok(manifest) => {
            manifest.and_then(|manifest| serde_json::from_slice(&manifest).ok()).unwrap_or_default()
        }
        Err(Error::NotFound { .. }) => Vec::new(),
        Err(error) => return Err(error.into()),
    };
    let (removed, new) = differences(&has, &spec.files);
    if removed.is_empty() && new.is_empty() {
        return Ok(());
    }
    if !removed.is_empty() {
        let argv: Vec<&str> =
            ["rm", "-f", "--"].into_iter().chain(removed.iter().map(String::as_str)).collect();
        sprite
            .run(&ExecRequest { argv: &argv, dir: "/", ..ExecRequest::default() }, LIST_MAX)
            .await?;
    }
    let Some(store) = &runner.files else {
        return Err(NotMounted::Failed(
            "The session has files, and this runner has no AOD_FILES_URL".to_owned(),
        ));
    };
    for file in new {
        put(store, sprite, file).await?;
    }
    let manifest: Vec<Mounted> = spec
        .files
        .iter()
        .map(|file| Mounted { id: file.file_id.clone(), path: file.path.clone() })
        .collect();
    let manifest =
        serde_json::to_vec(&manifest).map_err(|error| NotMounted::Failed(error.to_string()))?;
    Ok(sprite.write(MANIFEST, manifest, 0o600).await?)
}

async fn put(store: &Files, sprite: &Sprite, file: &File) -> Result<(), NotMounted> {
    let object: Uuid = file
        .object_id
        .parse()
        .map_err(|_| NotMounted::Failed("A file has no object".to_owned()))?;
    let mut attempt = 1;
    loop {
        let chunks = store.read(object).await.map_err(|error| {
            NotMounted::Released(format!("the file {} cannot be read: {error}", file.filename))
        })?;
        match sprite
            .write_stream(&file.path, chunks.map_err(std::io::Error::other), file.size_bytes, 0o444)
            .await
        {
            Ok(()) => return Ok(()),
            Err(error) if attempt < ATTEMPTS => {
                tracing::info!(%error, attempt, "failed to write a file into a sandbox; will retry")
            }
            Err(error) => return Err(error.into()),
        }
        attempt += 1;
    }
}

// --- outputs ---

/// A file that the agent wrote.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Found {
    size: u64,
    modified_us: i64,
    path: String,
}

/// A page of the list of outputs, after so many of them. It begins with a NUL, which is missing
/// where its beginning was cut off.
fn list_script(after: usize) -> String {
    format!(
        "printf '\\0'; [ -d {OUTPUTS} ] || exit 0; find {OUTPUTS} -type f -printf '%s\\t%T@\\t%P\\0' 2>/dev/null | \
         LC_ALL=C sort -z -t $'\\t' -k3 | tail -z -n +{} | head -c {LIST_BYTES_MAX}",
        after + 1
    )
}

/// What a page of the list holds.
#[derive(Debug, Default, PartialEq, Eq)]
struct Listed {
    /// How many entries were read, whatever they are.
    entries: usize,
    found: Vec<Found>,
    /// Files whose names cannot be kept: no text, or with control characters.
    unnameable: usize,
    is_last: bool,
}

/// Reads a page of the list. None: its beginning is missing.
fn read_list(list: &[u8]) -> Option<Listed> {
    let list = list.strip_prefix(b"\0")?;
    // The last entry may be cut.
    let whole = list
        .iter()
        .rposition(|byte| *byte == 0)
        .and_then(|end| list.get(..end))
        .unwrap_or_default();
    let mut listed = Listed { is_last: list.len() < LIST_BYTES_MAX, ..Listed::default() };
    let entry = |entry: &[u8]| {
        let mut parts = std::str::from_utf8(entry).ok()?.splitn(3, '\t');
        let (size, modified, path) = (parts.next()?.parse().ok()?, parts.next()?, parts.next()?);
        let (seconds, fraction) = modified.split_once('.').unwrap_or((modified, ""));
        let micros: String = fraction.chars().chain("000000".chars()).take(6).collect();
        let modified_us = seconds
            .parse::<i64>()
            .ok()?
            .checked_mul(1_000_000)?
            .checked_add(micros.parse().ok()?)?;
        let is_good = path.len() <= PATH_BYTES_MAX && path.split('/').all(is_filename);
        is_good.then(|| Found { size, modified_us, path: path.to_owned() })
    };
    for bytes in whole.split(|byte| *byte == 0).filter(|bytes| !bytes.is_empty()) {
        listed.entries += 1;
        match entry(bytes) {
            Some(found) if found.path == MARKER_NAME => {}
            Some(found) => listed.found.push(found),
            None => listed.unnameable += 1,
        }
    }
    Some(listed)
}

/// Lists what the agent wrote: one more than is kept, at most.
async fn list(sprite: &Sprite) -> Result<Listed, String> {
    let mut all = Listed::default();
    for _ in 0..LIST_PAGES_MAX {
        let script = list_script(all.entries);
        let request =
            ExecRequest { argv: &["bash", "-c", &script], dir: "/", ..ExecRequest::default() };
        let printed = sprite
            .run(&request, LIST_MAX)
            .await
            .map_err(|error| format!("the outputs cannot be listed: {error}"))?;
        let page = read_list(&printed.stdout)
            .ok_or("the outputs cannot be listed: the list is not whole")?;
        all.entries += page.entries;
        all.unnameable += page.unnameable;
        // Files may have moved within the list meanwhile.
        all.found.extend(
            page.found
                .into_iter()
                .filter(|found| all.found.iter().all(|known| known.path != found.path))
                .collect::<Vec<_>>(),
        );
        if page.is_last || page.entries == 0 || all.found.len() > OUTPUTS_OF_SESSION_MAX {
            break;
        }
    }
    all.found.truncate(OUTPUTS_OF_SESSION_MAX + 1);
    Ok(all)
}

/// Keeps what the agent wrote and what was not kept before. What cannot be kept is logged, and
/// tried again after the next turn: a turn does not fail by it.
pub async fn collect(
    runner: &Runner,
    sprite: &Sprite,
    (session, turn): (SessionId, u32),
    spec: &TurnSpec,
) {
    let Some(store) = runner.files.as_ref().filter(|_| spec.collects_outputs) else { return };
    let kept = tokio::time::timeout(
        OUTPUTS_TIME_MAX,
        collect_all(runner, store, sprite, (session, turn), spec),
    )
    .await;
    let problem = match kept {
        Ok(Ok(())) => return,
        Ok(Err(problem)) => problem,
        Err(_) => format!("not done after {} s", OUTPUTS_TIME_MAX.as_secs()),
    };
    metrics::counter!("aod_outputs_failed_total").increment(1);
    tracing::warn!(%session, turn, problem, "failed to keep what the agent wrote");
}

async fn collect_all(
    runner: &Runner,
    store: &Files,
    sprite: &Sprite,
    (session, turn): (SessionId, u32),
    spec: &TurnSpec,
) -> Result<(), String> {
    let Listed { found, unnameable, .. } = list(sprite).await?;
    let is_kept = |found: &Found| {
        let same = |file: &File| {
            file.path == found.path
                && file.size_bytes == found.size
                && file.modified_us == found.modified_us
        };
        spec.outputs.iter().any(same)
    };
    let mut problem = (unnameable > 0).then(|| {
        format!("the names of {unnameable} files are no text, or hold control characters")
    });
    for found in found.iter().filter(|found| !is_kept(found)) {
        if found.size > runner.file_bytes_max {
            problem =
                Some(format!("{} is larger than {} bytes", found.path, runner.file_bytes_max));
        } else if let Err(why) =
            keep(runner, store, sprite, (session, turn, spec.epoch), found).await
        {
            problem = Some(format!("{}: {why}", found.path));
        }
    }
    problem.map_or(Ok(()), Err)
}

async fn keep(
    runner: &Runner,
    store: &Files,
    sprite: &Sprite,
    (session, turn, epoch): (SessionId, u32, u32),
    found: &Found,
) -> Result<(), String> {
    let told = |failure: RpcError| failure.message.to_string();
    let begin = BeginOutputRequest {
        session_id: session.to_string(),
        turn,
        epoch,
        file_id: FileId::new().to_string(),
        path: found.path.clone(),
        mime_type: mime_of(&found.path).to_owned(),
        size_bytes: found.size,
        modified_us: found.modified_us,
    };
    let file = runner.bus.call::<rpc::BeginOutput>(&begin, DEADLINE).await.map_err(told)?;
    let object: Uuid = file.object_id.parse().map_err(|_| "it has no object".to_owned())?;
    let chunks = sprite
        .read_from(&format!("{OUTPUTS}/{}", found.path), 0)
        .await
        .map_err(|error| error.to_string())?;
    // Where it fails, the scheduler gives the file up. What is added meanwhile is of the next turn:
    // there may be no room for it.
    let written = store
        .write(object, found.size, Box::pin(first(chunks, found.size)))
        .await
        .map_err(|error| error.to_string())?;
    let commit = CommitOutputRequest {
        session_id: session.to_string(),
        turn,
        epoch,
        file_id: file.file_id,
        size_bytes: written.bytes,
        sha256: written.sha256,
    };
    let committed = runner.bus.call::<rpc::CommitOutput>(&commit, DEADLINE).await;
    if committed
        .as_ref()
        .is_err_and(|failure| matches!(failure.code, ErrorCode::Conflict | ErrorCode::NotFound))
    {
        // Of any other failure it is not known whether the file was committed.
        let _ = store.delete(object).await;
    }
    committed.map(drop).map_err(told)
}

/// The first bytes of a stream.
fn first<E>(
    chunks: impl Stream<Item = Result<Bytes, E>> + Unpin,
    bytes: u64,
) -> impl Stream<Item = Result<Bytes, E>> {
    futures::stream::unfold((chunks, bytes), |(mut chunks, left)| async move {
        if left == 0 {
            return None;
        }
        let next = chunks.next().await?;
        let next = next.map(|mut chunk| {
            chunk.truncate(usize::try_from(left).unwrap_or(usize::MAX));
            chunk
        });
        let left = next.as_ref().map_or(0, |chunk| left - chunk.len() as u64);
        Some((next, (chunks, left)))
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn files_are_added_to_and_removed_from_a_sandbox() {
        let has = |id: &str| Mounted { id: id.to_owned(), path: format!("/{id}") };
        let wanted = |id: &str| File { file_id: id.to_owned(), ..File::default() };
        let files = [wanted("a"), wanted("c")];
        let (removed, new) = differences(&[has("a"), has("b")], &files);
        assert_eq!((removed, new), (vec!["/b".to_owned()], vec![&files[1]]));
    }

    #[test]
    fn a_list_is_read_and_one_whose_beginning_is_missing_is_not() {
        let list = b"\x005\t1700000000.1234567890\tout/a b.txt\x000\t1700000001\tu\x007\t1.0\t.aod\x007\tx\ty\x007\t1.0\ta\nb\x001\t1.0\tbad\xff\x007\t1.0\tcu";
        let found =
            |size, modified_us, path: &str| Found { size, modified_us, path: path.to_owned() };
        let listed = read_list(list).unwrap();
        assert_eq!(
            listed.found,
            [found(5, 1_700_000_000_123_456, "out/a b.txt"), found(0, 1_700_000_001_000_000, "u")]
        );
        assert_eq!(
            (listed.entries, listed.unnameable, listed.is_last),
            (6, 3, true),
            "the last entry is cut"
        );
        assert_eq!(read_list(b"\0"), Some(Listed { is_last: true, ..Listed::default() }));
        assert_eq!(read_list(b"700000000.0\tx\0"), None);
    }

    /// The script itself, on a folder of this machine.
    #[test]
    fn outputs_of_any_number_are_listed_page_by_page() {
        let folder = tempfile::tempdir().unwrap();
        let long = folder.path().join("x".repeat(200));
        std::fs::create_dir(&long).unwrap();
        for number in 0..400 {
            std::fs::write(long.join(format!("report-{number:03}.txt")), "x").unwrap();
        }
        let (mut paths, mut entries) = (BTreeSet::new(), 0);
        for pages in 1.. {
            let script =
                list_script(entries).replace(OUTPUTS, &folder.path().display().to_string());
            let printed =
                std::process::Command::new("bash").args(["-c", &script]).output().unwrap();
            assert!(printed.stdout.len() <= 64 << 10, "more than is kept of what a command prints");
            let page = read_list(&printed.stdout).unwrap();
            entries += page.entries;
            paths.extend(page.found.into_iter().map(|found| found.path));
            if page.is_last {
                assert!(pages > 1);
                break;
            }
        }
        assert_eq!((paths.len(), entries), (400, 400));
    }

    #[tokio::test]
    async fn an_output_that_grows_is_read_up_to_the_size_that_was_found() {
        let chunks = || {
            futures::stream::iter(
                [&b"abc"[..], b"def", b"ghi"].map(|chunk| Ok::<_, ()>(Bytes::from_static(chunk))),
            )
        };
        for (bytes, expected) in [(0, ""), (2, "ab"), (3, "abc"), (5, "abcde"), (100, "abcdefghi")]
        {
            let read: Vec<Bytes> = first(chunks(), bytes).try_collect().await.unwrap();
            assert_eq!(read.concat(), expected.as_bytes());
        }
    }

    proptest! {
        #[test]
        fn no_list_panics(list in proptest::collection::vec(any::<u8>(), 0..200)) {
            let list = [b"\0".to_vec(), list].concat();
            for found in read_list(&list).unwrap().found {
                prop_assert!(!found.path.contains("..") || found.path.split('/').all(|part| part != ".."));
            }
        }
    }
}
