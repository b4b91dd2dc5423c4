//! The bytes of files by object id. The scheduler stores their metadata (docs/adr/0120-files.md).
//!
//! The store is a directory or a bucket. An object is written whole or not at all, and never changed. Services that share one store share
//! nothing else of it.

mod s3;

use std::{path::PathBuf, pin::pin, sync::Arc, time::Duration};

use bytes::Bytes;
use futures::{Stream, StreamExt as _, TryStreamExt as _};
use object_store::{
    ObjectStore, ObjectStoreExt as _, buffered::BufWriter, local::LocalFileSystem, path::Path,
    prefix::PrefixStore,
};
use settings::Env;
use sha2::{Digest as _, Sha256};
use tokio::io::AsyncWriteExt as _;
use url::Url;
use uuid::Uuid;

pub use self::s3::S3Settings;

/// How much of an object is in memory while it is written: two parts.
const PART_BYTES: usize = 5 << 20;
const PARTS_AT_A_TIME: usize = 1;
/// How long the first request to a bucket may take, with its retries.
const CHECK_MAX: Duration = Duration::from_secs(30);
/// Parts of an object whose writer died are removed after this time.
const ABANDONED_AFTER: Duration = Duration::from_secs(24 * 60 * 60);

/// A store of objects. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Files {
    store: Arc<dyn ObjectStore>,
    place: Place,
}

/// Where a store is.
#[derive(Clone, Debug)]
enum Place {
    Directory(PathBuf),
    /// A bucket, and how it was reached.
    Bucket(String),
}

/// What was written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Written {
    pub bytes: u64,
    pub sha256: Vec<u8>,
}

/// Why an object was not written.
#[derive(Debug, thiserror::Error)]
pub enum NotWritten<E> {
    #[error("it is larger than {0} bytes")]
    TooLarge(u64),
    /// Its source failed.
    #[error("its source failed")]
    Source(E),
    #[error("the store failed: {0}")]
    Store(#[from] std::io::Error),
}

/// Why a store cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum Unusable {
    #[error("must be a URL like file:///var/lib/aod/files or s3://BUCKET/PREFIX")]
    NotAUrl,
    #[error("{0}")]
    Store(#[from] object_store::Error),
    #[error("the directory cannot be created: {0}")]
    Directory(#[from] std::io::Error),
}

/// Why a bucket cannot be used.
#[derive(Debug, thiserror::Error)]
#[error(
    "AOD_FILES_URL: cannot list {bucket}: {why}; check the AOD_FILES_S3_ settings, and that the \
     bucket exists and its access key may list, read, write and delete in it"
)]
pub struct Unreachable {
    bucket: String,
    why: String,
}

impl Files {
    /// Reads `AOD_FILES_URL`. None: the deployment has no files.
    pub fn from_env(env: &mut Env) -> Option<Self> {
        let url = env.optional(
            "AOD_FILES_URL",
            "where files are stored, shared by gateways, schedulers and runners: file:///DIRECTORY or s3://BUCKET[/PREFIX]; empty: no files",
        );
        let is_bucket = url.as_ref().is_some_and(|url| url.starts_with("s3:"));
        let s3 = S3Settings::from_env(env, is_bucket);
        let opened = match (url?, s3) {
            (url, Some(s3)) => Self::open_bucket(&url, &s3),
            // What is missing was said.
            (_, None) if is_bucket => return None,
            (url, None) => Self::open(&url),
        };
        match opened {
            Ok(files) => Some(files),
            Err(error) => {
                env.refuse(format!("AOD_FILES_URL: {error}"));
                None
            }
        }
    }

    /// Opens a directory; one that is not there is created.
    ///
    /// # Errors
    /// [`Unusable`].
    pub fn open(url: &str) -> Result<Self, Unusable> {
        let url = Url::parse(url).map_err(|_| Unusable::NotAUrl)?;
        let path = url.to_file_path().map_err(|()| Unusable::NotAUrl)?;
        std::fs::create_dir_all(&path)?;
        let store = LocalFileSystem::new_with_prefix(&path)?.with_fsync(true);
        Ok(Self { store: Arc::new(store), place: Place::Directory(path) })
    }

    /// Opens `s3://BUCKET/PREFIX`, without a request to it.
    ///
    /// # Errors
    /// [`Unusable`].
    pub fn open_bucket(url: &str, s3: &S3Settings) -> Result<Self, Unusable> {
        let url = Url::parse(url).map_err(|_| Unusable::NotAUrl)?;
        let is_plain = url.scheme() == "s3"
            && url.username().is_empty()
            && url.port().is_none()
            && url.query().is_none()
            && url.fragment().is_none();
        let bucket = url.host_str().filter(|name| is_plain && is_bucket_name(name));
        let bucket = bucket.ok_or(Unusable::NotAUrl)?;
        let prefix = Path::from_url_path(url.path()).map_err(|_| Unusable::NotAUrl)?;
        let store = PrefixStore::new(s3.open(bucket)?, prefix);
        let place = match &s3.endpoint {
            Some(endpoint) => format!("{url} at {endpoint}"),
            None => format!("{url} at AWS in {}", s3.region),
        };
        Ok(Self { store: Arc::new(store), place: Place::Bucket(place) })
    }

    /// Asks a bucket for its first object: before a service depends on it.
    ///
    /// # Errors
    /// When the bucket cannot be reached, does not exist, or may not be listed.
    pub async fn check(&self) -> Result<(), Unreachable> {
        let Place::Bucket(bucket) = &self.place else { return Ok(()) };
        let first = Path::from(FOLDER);
        let mut objects = self.store.list(Some(&first));
        let why = match tokio::time::timeout(CHECK_MAX, objects.next()).await {
            Ok(None | Some(Ok(_))) => return Ok(()),
            Ok(Some(Err(error))) => error.to_string(),
            Err(_) => format!("no answer in {} s", CHECK_MAX.as_secs()),
        };
        Err(Unreachable { bucket: bucket.clone(), why })
    }

    /// Writes an object from its chunks, at most `bytes_max` of them. Nothing is left of one that
    /// fails.
    ///
    /// # Errors
    /// [`NotWritten`].
    pub async fn write<E>(
        &self,
        object: Uuid,
        bytes_max: u64,
        chunks: impl Stream<Item = Result<Bytes, E>>,
    ) -> Result<Written, NotWritten<E>> {
        let mut writer = BufWriter::with_capacity(self.store.clone(), path(object), PART_BYTES)
            .with_max_concurrency(PARTS_AT_A_TIME);
        match fill(&mut writer, bytes_max, chunks).await {
            Ok(written) => {
                writer.shutdown().await.map_err(NotWritten::Store)?;
                Ok(written)
            }
            Err(error) => {
                // What stays behind is removed as abandoned.
                let _ = writer.abort().await;
                Err(error)
            }
        }
    }

    /// Reads an object.
    ///
    /// # Errors
    /// When it is not there, or the store fails.
    pub async fn read(
        &self,
        object: Uuid,
    ) -> Result<
        impl Stream<Item = Result<Bytes, object_store::Error>> + Send + Unpin + use<>,
        object_store::Error,
    > {
        Ok(self.store.get(&path(object)).await?.into_stream())
    }

    /// Deletes an object; one that is not there is no error.
    ///
    /// # Errors
    /// When the store fails.
    pub async fn delete(&self, object: Uuid) -> Result<(), object_store::Error> {
        match self.store.delete(&path(object)).await {
            Ok(()) | Err(object_store::Error::NotFound { .. }) => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// Objects that were written at least so long ago, a chunk at a time.
    pub fn older_than(
        &self,
        age: Duration,
        chunk: usize,
    ) -> impl Stream<Item = Result<Vec<Uuid>, object_store::Error>> + Send + Unpin {
        let objects = self.store.list(Some(&Path::from(FOLDER)));
        let old = objects.try_filter_map(move |meta| {
            let written = std::time::SystemTime::from(meta.last_modified);
            let is_old = written.elapsed().is_ok_and(|since| since >= age);
            std::future::ready(Ok(if is_old {
                meta.location.filename().and_then(|name| name.parse().ok())
            } else {
                None
            }))
        });
        old.try_chunks(chunk).map_err(|error| error.1).boxed()
    }

    /// Removes parts of objects whose writers died. A bucket does it itself, by a rule for
    /// multipart uploads (docs/deploy.md).
    ///
    /// # Errors
    /// When the directory cannot be read.
    pub async fn remove_abandoned(&self) -> std::io::Result<u64> {
        let Place::Directory(directory) = self.place.clone() else { return Ok(0) };
        // A walk over files: it would hold up others.
        let removed = tokio::task::spawn_blocking(move || {
            remove_abandoned(&directory.join(FOLDER), ABANDONED_AFTER)
        });
        removed.await.map_err(std::io::Error::other)?
    }
}

const FOLDER: &str = "objects";

/// As all stores have them; the dots of some names do not matter here.
fn is_bucket_name(name: &str) -> bool {
    let is_allowed = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || "-._".contains(c);
    (3..=63).contains(&name.len()) && name.chars().all(is_allowed)
}

/// In folders by the id's last digits: its first are a time.
fn path(object: Uuid) -> Path {
    let name = object.simple().to_string();
    let folder = name.get(name.len() - 2..).unwrap_or_default().to_owned();
    Path::from_iter([FOLDER, folder.as_str(), name.as_str()])
}

async fn fill<E>(
    writer: &mut BufWriter,
    bytes_max: u64,
    chunks: impl Stream<Item = Result<Bytes, E>>,
) -> Result<Written, NotWritten<E>> {
    let (mut bytes, mut digest, mut chunks) = (0, Sha256::new(), pin!(chunks));
    while let Some(chunk) = chunks.next().await {
        let chunk = chunk.map_err(NotWritten::Source)?;
        bytes += chunk.len() as u64;
        if bytes > bytes_max {
            return Err(NotWritten::TooLarge(bytes_max));
        }
        digest.update(&chunk);
        writer.put(chunk).await.map_err(std::io::Error::from)?;
    }
    Ok(Written { bytes, sha256: digest.finalize().to_vec() })
}

/// The directory's store writes `name#number` until the object is whole.
fn remove_abandoned(folder: &std::path::Path, age: Duration) -> std::io::Result<u64> {
    let mut removed = 0;
    let folders = match std::fs::read_dir(folder) {
        Ok(folders) => folders,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(0),
        Err(error) => return Err(error),
    };
    for folder in folders {
        for entry in std::fs::read_dir(folder?.path())?.flatten() {
            let is_part = entry.file_name().to_string_lossy().contains('#');
            let is_old = || {
                entry
                    .metadata()
                    .and_then(|metadata| metadata.modified())
                    .is_ok_and(|at| at.elapsed().is_ok_and(|since| since >= age))
            };
            if is_part && is_old() && std::fs::remove_file(entry.path()).is_ok() {
                removed += 1;
            }
        }
    }
    Ok(removed)
}

#[cfg(test)]
mod tests {
    use futures::stream;

    use super::*;

    fn store() -> (tempfile::TempDir, Files) {
        let directory = tempfile::tempdir().unwrap();
        let files = Files::open(&format!("file://{}/files", directory.path().display())).unwrap();
        (directory, files)
    }

    fn chunks(chunks: &[&[u8]]) -> impl Stream<Item = Result<Bytes, ()>> + use<> {
        stream::iter(
            chunks.iter().map(|chunk| Ok(Bytes::copy_from_slice(chunk))).collect::<Vec<_>>(),
        )
    }

    async fn content(files: &Files, object: Uuid) -> Option<Vec<u8>> {
        let read = files.read(object).await.ok()?;
        Some(read.try_collect::<Vec<_>>().await.unwrap().concat())
    }

    async fn all(files: &Files) -> Vec<Uuid> {
        files.older_than(Duration::ZERO, 10).try_concat().await.unwrap()
    }

    #[tokio::test]
    async fn an_object_is_read_as_it_was_written_until_it_is_deleted() {
        let (_directory, files) = store();
        let (empty, large) = (Uuid::now_v7(), Uuid::now_v7());
        assert_eq!(files.write(empty, 0, chunks(&[])).await.unwrap().bytes, 0);
        let part = vec![7_u8; 3 << 20];
        let written =
            files.write(large, 20 << 20, chunks(&[&part, b"x", &part, &part])).await.unwrap();
        assert_eq!(
            written,
            Written {
                bytes: (9 << 20) + 1,
                sha256: Sha256::digest([&part[..], b"x", &part, &part].concat()).to_vec()
            }
        );
        assert_eq!(content(&files, large).await.unwrap(), [&part[..], b"x", &part, &part].concat());
        assert_eq!(content(&files, empty).await.unwrap(), b"");
        let mut listed = all(&files).await;
        listed.sort();
        assert_eq!(listed, [empty, large]);
        assert!(files.older_than(Duration::from_secs(60), 10).next().await.is_none());
        for _ in 0..2 {
            files.delete(large).await.unwrap();
        }
        assert_eq!((content(&files, large).await, all(&files).await), (None, vec![empty]));
    }

    #[tokio::test]
    async fn nothing_is_left_of_an_object_that_is_too_large_or_whose_source_fails() {
        let (directory, files) = store();
        let object = Uuid::now_v7();
        let part = vec![7_u8; 6 << 20];
        assert!(matches!(
            files.write(object, 7 << 20, chunks(&[&part, &part])).await,
            Err(NotWritten::TooLarge(_))
        ));
        let broken = stream::iter([Ok(Bytes::from(part)), Err("gone")]);
        assert!(matches!(
            files.write(object, u64::MAX, broken).await,
            Err(NotWritten::Source("gone"))
        ));
        assert_eq!((content(&files, object).await, all(&files).await), (None, Vec::<Uuid>::new()));
        // What a writer leaves that is killed.
        let folder = directory.path().join("files/objects/ab");
        std::fs::create_dir_all(&folder).unwrap();
        std::fs::write(folder.join("x#1"), "part").unwrap();
        assert_eq!(files.remove_abandoned().await.unwrap(), 0, "it may still be written");
        assert_eq!(
            remove_abandoned(&directory.path().join("files/objects"), Duration::ZERO).unwrap(),
            1
        );
        assert_eq!(all(&files).await, Vec::<Uuid>::new());
    }

    #[test]
    fn only_what_can_be_used_is_opened() {
        for bad in ["", "x", "/tmp/x", "https://example.com/x", "file://host/x"] {
            assert!(Files::open(bad).is_err(), "{bad}");
        }
    }
}
