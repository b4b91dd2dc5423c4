//! Files of a session: what its user gave it is put into its sandbox before a turn, what its agent wrote is kept after one.
//!
//! Bytes go between the sandbox and the store of files; the scheduler knows what they are.

use std::{collections::BTreeSet, time::Duration};

use ::files::Files;
use bus::Failure;
use contract::{
    rpc,
    scheduler::{BeginOutputRequest, CommitOutputRequest, File, TurnSpec},
};
use futures::TryStreamExt as _;
use serde::{Deserialize, Serialize};
use sprites::{Error, ExecRequest, Sprite};
use types::{
    FileId, SessionId,
    file::{OUTPUTS, OUTPUTS_OF_SESSION_MAX, is_filename, mime_of},
};
use uuid::Uuid;

use crate::Runner;

/// Where a sandbox says which files it was given.
const MANIFEST: &str = "/var/lib/aod/session-files.json";
/// It makes the folder of outputs, which the agent writes to.
const MARKER: &str = "/mnt/session/outputs/.aod";
const MARKER_NAME: &str = ".aod";
const DEADLINE: Duration = Duration::from_secs(10);
const LIST_MAX: Duration = Duration::from_secs(30);
/// Of a turn: its end waits for its outputs.
const OUTPUTS_TIME_MAX: Duration = Duration::from_secs(300);
const ATTEMPTS: u32 = 3;
const PATH_BYTES_MAX: usize = 1024;

/// Why a sandbox was not given its files.
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

/// A file as a sandbox has it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
struct Mounted {
    id: String,
    path: String,
}

/// What has to be done so that a sandbox has the files that it should: paths to remove, then files to write.
fn differences<'a>(has: &[Mounted], wanted: &'a [File]) -> (Vec<String>, Vec<&'a File>) {
    let known: BTreeSet<&str> = has.iter().map(|file| file.id.as_str()).collect();
    let kept: BTreeSet<&str> = wanted.iter().map(|file| file.file_id.as_str()).collect();
    let removed = has.iter().filter(|file| !kept.contains(file.id.as_str())).map(|file| file.path.clone()).collect();
    (removed, wanted.iter().filter(|file| !known.contains(file.file_id.as_str())).collect())
}

/// Gives a sandbox the session's files, and takes those that the session no longer has. Safe to interrupt and rerun.
pub async fn mount(runner: &Runner, sprite: &Sprite, spec: &TurnSpec, is_new: bool) -> Result<(), NotMounted> {
    if is_new && spec.collects_outputs {
        sprite.write(MARKER, Vec::new(), 0o644).await?;
    }
    if !spec.had_files {
        return Ok(());
    }
    let has: Vec<Mounted> = match sprite.read(MANIFEST).await {
        Ok(manifest) => serde_json::from_slice(&manifest).unwrap_or_default(),
        Err(Error::NotFound { .. }) => Vec::new(),
        Err(error) => return Err(error.into()),
    };
    let (removed, new) = differences(&has, &spec.files);
    if removed.is_empty() && new.is_empty() {
        return Ok(());
    }
    if !removed.is_empty() {
        let argv: Vec<&str> = ["rm", "-f", "--"].into_iter().chain(removed.iter().map(String::as_str)).collect();
        sprite.run(&ExecRequest { argv: &argv, dir: "/", ..ExecRequest::default() }, LIST_MAX).await?;
    }
    let Some(store) = &runner.files else {
        return Err(NotMounted::Failed("The session has files, and this runner has no AOD_FILES_URL".to_owned()));
    };
    for file in new {
        put(store, sprite, file).await?;
    }
    let manifest: Vec<Mounted> = spec.files.iter().map(|file| Mounted { id: file.file_id.clone(), path: file.path.clone() }).collect();
    let manifest = serde_json::to_vec(&manifest).map_err(|error| NotMounted::Failed(error.to_string()))?;
    Ok(sprite.write(MANIFEST, manifest, 0o600).await?)
}

async fn put(store: &Files, sprite: &Sprite, file: &File) -> Result<(), NotMounted> {
    let object: Uuid = file.object_id.parse().map_err(|_| NotMounted::Failed("A file has no object".to_owned()))?;
    let mut attempt = 1;
    loop {
        let chunks = store
            .read(object)
            .await
            .map_err(|error| NotMounted::Released(format!("the file {} cannot be read: {error}", file.filename)))?;
        match sprite.write_stream(&file.path, chunks.map_err(std::io::Error::other), file.size_bytes, 0o444).await {
            Ok(()) => return Ok(()),
            Err(error) if attempt < ATTEMPTS => tracing::info!(%error, attempt, "failed to write a file into a sandbox; will retry"),
            Err(error) => return Err(error.into()),
        }
        attempt += 1;
    }
}

// --- outputs ---------------------------------------------------------------------------------------

/// A file that the agent wrote.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Found {
    size: u64,
    modified_us: i64,
    path: String,
}

/// The list begins with a NUL, which is missing where its beginning was cut off.
fn list_script() -> String {
    format!(
        "printf '\\0'; [ -d {OUTPUTS} ] || exit 0; find {OUTPUTS} -type f -printf '%s\\t%T@\\t%P\\0' 2>/dev/null | head -z -n {}",
        OUTPUTS_OF_SESSION_MAX + 1
    )
}

/// Reads a list. None: it is not whole.
fn read_list(list: &[u8]) -> Option<Vec<Found>> {
    let list = list.strip_prefix(b"\0")?;
    let found = |entry: &[u8]| {
        let mut parts = std::str::from_utf8(entry).ok()?.splitn(3, '\t');
        let (size, modified, path) = (parts.next()?.parse().ok()?, parts.next()?, parts.next()?);
        let (seconds, fraction) = modified.split_once('.').unwrap_or((modified, ""));
        let micros: String = fraction.chars().chain("000000".chars()).take(6).collect();
        let modified_us = seconds.parse::<i64>().ok()?.checked_mul(1_000_000)?.checked_add(micros.parse().ok()?)?;
        let is_good = path.len() <= PATH_BYTES_MAX && path.split('/').all(is_filename) && path != MARKER_NAME;
        is_good.then(|| Found { size, modified_us, path: path.to_owned() })
    };
    Some(list.split(|byte| *byte == 0).filter(|entry| !entry.is_empty()).filter_map(found).collect())
}

/// Keeps what the agent wrote and what was not kept before. What cannot be kept is logged, and tried again after the next turn: a turn does
/// not fail by it.
pub async fn collect(runner: &Runner, sprite: &Sprite, (session, turn): (SessionId, u32), spec: &TurnSpec) {
    let Some(store) = runner.files.as_ref().filter(|_| spec.collects_outputs) else { return };
    let kept = tokio::time::timeout(OUTPUTS_TIME_MAX, collect_all(runner, store, sprite, (session, turn), spec)).await;
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
    let script = list_script();
    let request = ExecRequest { argv: &["bash", "-c", &script], dir: "/", ..ExecRequest::default() };
    let listed = sprite.run(&request, LIST_MAX).await.map_err(|error| format!("the outputs cannot be listed: {error}"))?;
    let found = read_list(&listed.stdout).ok_or("there are too many outputs to list")?;
    let is_kept = |found: &Found| {
        let same = |file: &File| file.path == found.path && file.size_bytes == found.size && file.modified_us == found.modified_us;
        spec.outputs.iter().any(same)
    };
    let mut problem = None;
    for found in found.iter().filter(|found| !is_kept(found)) {
        if found.size > runner.file_bytes_max {
            problem = Some(format!("{} is larger than {} bytes", found.path, runner.file_bytes_max));
        } else if let Err(why) = keep(runner, store, sprite, (session, turn, spec.epoch), found).await {
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
    let told = |failure: Failure| failure.message.to_string();
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
    let chunks = sprite.read_from(&format!("{OUTPUTS}/{}", found.path), 0).await.map_err(|error| error.to_string())?;
    // Where it fails, the scheduler gives the file up.
    let written = store.write(object, runner.file_bytes_max, chunks).await.map_err(|error| error.to_string())?;
    let commit = CommitOutputRequest {
        session_id: session.to_string(),
        turn,
        epoch,
        file_id: file.file_id,
        size_bytes: written.bytes,
        sha256: written.sha256,
    };
    runner.bus.call::<rpc::CommitOutput>(&commit, DEADLINE).await.map_err(told)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_sandbox_is_given_what_it_lacks_and_relieved_of_the_rest() {
        let has = |id: &str| Mounted { id: id.to_owned(), path: format!("/{id}") };
        let wanted = |id: &str| File { file_id: id.to_owned(), ..File::default() };
        let files = [wanted("a"), wanted("c")];
        let (removed, new) = differences(&[has("a"), has("b")], &files);
        assert_eq!((removed, new), (vec!["/b".to_owned()], vec![&files[1]]));
    }

    #[test]
    fn a_list_is_read_and_one_that_was_cut_is_not() {
        let list = b"\x005\t1700000000.1234567890\tout/a b.txt\x000\t1700000001\tu\x007\t1.0\t.aod\x007\tx\ty\x007\t1.0\ta\nb\0";
        let found = |size, modified_us, path: &str| Found { size, modified_us, path: path.to_owned() };
        assert_eq!(read_list(list).unwrap(), [found(5, 1_700_000_000_123_456, "out/a b.txt"), found(0, 1_700_000_001_000_000, "u")]);
        assert_eq!(read_list(b"\0"), Some(vec![]));
        assert_eq!(read_list(b"700000000.0\tx\0"), None);
    }

    proptest! {
        #[test]
        fn no_list_panics(list in proptest::collection::vec(any::<u8>(), 0..200)) {
            let list = [b"\0".to_vec(), list].concat();
            for found in read_list(&list).unwrap() {
                prop_assert!(!found.path.contains("..") || found.path.split('/').all(|part| part != ".."));
            }
        }
    }
}
