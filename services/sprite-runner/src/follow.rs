//! Reading the spool to its end, and putting it on record without a gap.
//!
//! The live way is an exec whose frames carry offsets and checksums; whatever it loses or garbles is noticed. Then the spool is read
//! again by offset through the file API, and the exec is started anew. While one event is on its way to the stream more output comes
//! in, so that events grow as the load does.

use std::{
    collections::VecDeque,
    time::{Duration, Instant},
};

use bytes::{Buf as _, Bytes, BytesMut};
use futures::StreamExt as _;
use sprites::{Client, Error, Exec, ExecEvent, ExecRequest, Sprite};
use tokio::sync::mpsc;
use types::{Backoff, limits::OUTPUT_EVENT_BYTES_MAX};

use crate::{
    agent::Agent,
    job::Status,
    record::{Fenced, Record},
    turn::Stopped,
};

/// The follower gives a sign of life every 5 s.
const SILENCE_MAX: Duration = Duration::from_secs(20);
/// Between attempts; how long they go on is decided by [`Contact`].
const RETRY: Backoff = Backoff { base: Duration::from_millis(200), max: Duration::from_secs(15), attempts: u32::MAX };
/// Chunks between the reader and the record: a slow record slows the reader, and through it the follower.
const CHUNKS: usize = 32;
/// A frame's header is shorter than this.
const HEADER_BYTES_MAX: usize = 80;
const FRAME_BYTES_MAX: usize = 1024 * 1024;

/// A Sprite that was in contact under this claim is tried again for so long before another runner tries, with a fresh lease.
const OUT_OF_CONTACT_MAX: Duration = Duration::from_secs(120);
/// A Sprite that never was in contact under this claim is given up after so long.
const NEVER_IN_CONTACT_MAX: Duration = Duration::from_secs(60);

/// When a Sprite last let itself be followed under this claim. Measured in time: long silences and often cut sockets are no failures.
#[derive(Debug)]
pub struct Contact {
    claimed: Instant,
    last: Option<Instant>,
    attempt: u32,
}

/// What an interruption means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Next {
    Retry(Duration),
    /// A fresh lease, or another runner, may do better.
    Release,
    Fail,
}

impl Contact {
    pub fn new() -> Self {
        Self { claimed: Instant::now(), last: None, attempt: 0 }
    }

    /// A frame came.
    fn made(&mut self, now: Instant) {
        (self.last, self.attempt) = (Some(now), 0);
    }

    /// `unauthorized`: the credentials were refused, which more attempts with the same do not change.
    fn interrupted(&mut self, now: Instant, unauthorized: bool) -> Next {
        let attempt = self.attempt;
        self.attempt += 1;
        match self.last {
            Some(_) if unauthorized => Next::Release,
            Some(last) if now.duration_since(last) > OUT_OF_CONTACT_MAX => Next::Release,
            None if now.duration_since(self.claimed) > NEVER_IN_CONTACT_MAX => Next::Fail,
            // The first time is most often a socket that was dropped: no wait.
            _ => Next::Retry(if attempt == 0 { Duration::ZERO } else { RETRY.jittered(attempt) }),
        }
    }
}

#[derive(Debug)]
struct Chunk {
    stderr: bool,
    data: Bytes,
}

/// Why the live way ended before the agent did.
#[derive(Debug, thiserror::Error)]
enum Broken {
    #[error(transparent)]
    Sprites(#[from] Error),
    #[error("the follower fell silent")]
    Silent,
    #[error("the follower's output was garbled")]
    Garbled,
    #[error("the follower ended with status {code}: {said}")]
    Ended { code: u8, said: String },
    /// Nobody takes the chunks any more: the record refused them.
    #[error("the record is closed")]
    Unread,
}

/// Follows the agent until its exit status is known and all its output is on record.
pub async fn to_the_end(
    client: &Client,
    sprite: &Sprite,
    agent: &Agent,
    record: &mut Record,
    contact: &mut Contact,
) -> Result<Status, Stopped> {
    loop {
        let before = progress(record);
        let (sender, chunks) = mpsc::channel(CHUNKS);
        let offsets = (record.checkpoint.stdout_offset, record.checkpoint.stderr_offset);
        let command = agent.follow_command(offsets.0, offsets.1);
        let (read, published) = tokio::join!(read_live(sprite, &command, Frames::new(offsets), sender, contact), publish(record, chunks));
        let halves = published?;
        let broken = match read {
            Ok(status) => {
                // What waited for more: none will come.
                for (stderr, rest) in [false, true].into_iter().zip(halves) {
                    let mut rest = Bytes::from(rest);
                    while let Some(piece) = record.masker.next(&mut rest, true) {
                        record.output(stderr, piece).await?;
                    }
                }
                return Ok(status);
            }
            // What was read and held back is not on record: it is read again.
            Err(broken) => broken,
        };
        if matches!(broken, Broken::Sprites(Error::NotFound { .. })) && matches!(client.exists(sprite.name()).await, Ok(false)) {
            return Err(lost("The sandbox disappeared while the agent was running".to_owned()));
        }
        match catch_up(sprite, agent, record).await {
            Ok(()) => {}
            Err(CatchUp::Fenced(fenced)) => return Err(fenced.into()),
            Err(CatchUp::Unreadable(error)) => tracing::info!(%error, "spool cannot be read now"),
        }
        if progress(record) > before {
            contact.made(Instant::now());
        }
        wait_after(contact, &broken).await.map_err(|gone| match gone {
            Gone::Released(reason) => Stopped::Released(reason),
            Gone::Failed(why) => lost(format!("The agent can no longer be followed: {why}")),
        })?;
    }
}

/// Why a job is not followed any more by this runner.
#[derive(Debug)]
pub enum Gone {
    Released(String),
    Failed(String),
}

/// Waits before the next attempt, where there is to be one.
async fn wait_after(contact: &mut Contact, broken: &Broken) -> Result<(), Gone> {
    let unauthorized = matches!(broken, Broken::Sprites(Error::Unauthorized { .. }));
    let next = contact.interrupted(Instant::now(), unauthorized);
    tracing::info!(%broken, ?next, "following was interrupted");
    metrics::counter!("aod_follow_interruptions_total").increment(1);
    match next {
        Next::Retry(delay) => {
            tokio::time::sleep(delay).await;
            Ok(())
        }
        Next::Release => Err(Gone::Released(format!("its sandbox can no longer be followed: {broken}"))),
        Next::Fail => Err(Gone::Failed(broken.to_string())),
    }
}

/// Starts a job if it was not started, and waits for its end. What it prints stays in its spool.
pub async fn job(client: &Client, sprite: &Sprite, command: &str, contact: &mut Contact) -> Result<Status, Gone> {
    loop {
        let (sender, _chunks) = mpsc::channel(1);
        let broken = match read_live(sprite, command, Frames::new((0, 0)), sender, contact).await {
            Ok(status) => return Ok(status),
            Err(broken) => broken,
        };
        if matches!(broken, Broken::Sprites(Error::NotFound { .. })) && matches!(client.exists(sprite.name()).await, Ok(false)) {
            return Err(Gone::Failed("the sandbox disappeared".to_owned()));
        }
        wait_after(contact, &broken).await?;
    }
}

fn progress(record: &Record) -> u64 {
    record.checkpoint.stdout_offset + record.checkpoint.stderr_offset
}

fn lost(message: String) -> Stopped {
    Stopped::Failed { stage: "sandbox".to_owned(), message }
}

async fn read_live(
    sprite: &Sprite,
    command: &str,
    frames: Frames,
    chunks: mpsc::Sender<Chunk>,
    contact: &mut Contact,
) -> Result<Status, Broken> {
    let request = ExecRequest { argv: &["bash", "-c", command], dir: "/", max_run_after_disconnect: Some(Duration::from_secs(1)) };
    let mut exec = sprite.exec(&request).await?;
    let status = read_frames(&mut exec, frames, &chunks, contact).await;
    exec.close().await;
    status
}

async fn read_frames(exec: &mut Exec, mut frames: Frames, chunks: &mpsc::Sender<Chunk>, contact: &mut Contact) -> Result<Status, Broken> {
    let mut said = Vec::new();
    loop {
        let event = tokio::time::timeout(SILENCE_MAX, exec.next()).await.map_err(|_| Broken::Silent)??;
        match event {
            ExecEvent::Stdout(data) => frames.push(&data),
            ExecEvent::Stderr(data) => said.extend_from_slice(data.get(..data.len().min(500)).unwrap_or_default()),
            ExecEvent::Exit(code) => return Err(Broken::Ended { code, said: String::from_utf8_lossy(&said).trim().to_owned() }),
        }
        while let Some(frame) = frames.next()? {
            contact.made(Instant::now());
            match frame {
                Frame::Output(chunk) => chunks.send(chunk).await.map_err(|_| Broken::Unread)?,
                Frame::Alive => {}
                Frame::End(status) => return Ok(status),
            }
        }
    }
}

#[derive(Debug)]
enum Frame {
    Output(Chunk),
    Alive,
    End(Status),
}

/// Takes frames out of a byte stream, and refuses what does not continue the spool.
#[derive(Debug)]
struct Frames {
    buffer: BytesMut,
    stdout_offset: u64,
    stderr_offset: u64,
}

impl Frames {
    fn new((stdout_offset, stderr_offset): (u64, u64)) -> Self {
        Self { buffer: BytesMut::new(), stdout_offset, stderr_offset }
    }

    fn push(&mut self, data: &[u8]) {
        self.buffer.extend_from_slice(data);
    }

    fn next(&mut self) -> Result<Option<Frame>, Broken> {
        let Some(end) = self.buffer.iter().take(HEADER_BYTES_MAX).position(|byte| *byte == b'\n') else {
            return if self.buffer.len() < HEADER_BYTES_MAX { Ok(None) } else { Err(Broken::Garbled) };
        };
        let header = self.buffer.get(..end).and_then(|header| std::str::from_utf8(header).ok()).ok_or(Broken::Garbled)?;
        let (tag, offset, length, checksum) = parse_header(header).ok_or(Broken::Garbled)?;
        if length > FRAME_BYTES_MAX {
            return Err(Broken::Garbled);
        }
        if self.buffer.len() < end + 1 + length {
            return Ok(None);
        }
        self.buffer.advance(end + 1);
        let data = self.buffer.split_to(length).freeze();
        let sum = data.iter().fold(0_u32, |sum, byte| sum.wrapping_add(u32::from(*byte)));
        if sum != checksum {
            return Err(Broken::Garbled);
        }
        let expected = match tag {
            b'O' => &mut self.stdout_offset,
            b'E' => &mut self.stderr_offset,
            b'T' => return Ok(Some(Frame::Alive)),
            b'X' => {
                // The spool wins: an end before its last byte is none.
                if offset != self.stdout_offset + self.stderr_offset {
                    return Err(Broken::Garbled);
                }
                let status = std::str::from_utf8(&data).ok().and_then(Status::parse).ok_or(Broken::Garbled)?;
                return Ok(Some(Frame::End(status)));
            }
            _ => return Err(Broken::Garbled),
        };
        if offset != *expected {
            return Err(Broken::Garbled);
        }
        *expected += length as u64;
        Ok(Some(Frame::Output(Chunk { stderr: tag == b'E', data })))
    }
}

fn parse_header(header: &str) -> Option<(u8, u64, usize, u32)> {
    let mut fields = header.split(' ');
    let tag = fields.next()?;
    let parsed = (*tag.as_bytes().first()?, fields.next()?.parse().ok()?, fields.next()?.parse().ok()?, fields.next()?.parse().ok()?);
    (tag.len() == 1 && fields.next().is_none()).then_some(parsed)
}

/// Puts chunks on record until the reader is done; neighbours of one stream go together. Gives what was held back at the ends.
async fn publish(record: &mut Record, mut chunks: mpsc::Receiver<Chunk>) -> Result<[Vec<u8>; 2], Fenced> {
    let mut pending: VecDeque<Chunk> = VecDeque::new();
    let mut carry = [Vec::new(), Vec::new()];
    loop {
        let first = match pending.pop_front() {
            Some(chunk) => chunk,
            None => match chunks.recv().await {
                Some(chunk) => chunk,
                None => break,
            },
        };
        let [stdout, stderr] = &mut carry;
        let mut data = std::mem::take(if first.stderr { stderr } else { stdout });
        data.extend_from_slice(&first.data);
        while data.len() < OUTPUT_EVENT_BYTES_MAX {
            match pending.pop_front().or_else(|| chunks.try_recv().ok()) {
                Some(chunk) if chunk.stderr == first.stderr => data.extend_from_slice(&chunk.data),
                Some(other) => {
                    pending.push_front(other);
                    break;
                }
                None => break,
            }
        }
        let mut data = Bytes::from(data);
        while let Some(piece) = record.masker.next(&mut data, false) {
            record.output(first.stderr, piece).await?;
        }
        if first.stderr {
            *stderr = data.into();
        } else {
            *stdout = data.into();
        }
    }
    Ok(carry)
}

enum CatchUp {
    Fenced(Fenced),
    Unreadable(Error),
}

/// Reads what the spool holds beyond the record, through the file API.
async fn catch_up(sprite: &Sprite, agent: &Agent, record: &mut Record) -> Result<(), CatchUp> {
    for stderr in [false, true] {
        let offset = if stderr { record.checkpoint.stderr_offset } else { record.checkpoint.stdout_offset };
        let mut file = match sprite.read_from(&agent.spool(stderr), offset).await {
            Ok(file) => file,
            Err(Error::NotFound { .. }) => continue,
            Err(error) => return Err(CatchUp::Unreadable(error)),
        };
        let mut carry = Vec::new();
        while let Some(chunk) = file.next().await {
            carry.extend_from_slice(&chunk.map_err(CatchUp::Unreadable)?);
            let mut data = Bytes::from(std::mem::take(&mut carry));
            while let Some(piece) = record.masker.next(&mut data, false) {
                record.output(stderr, piece).await.map_err(CatchUp::Fenced)?;
            }
            carry = data.into();
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Frames with something wrong in them: cut, changed, repeated, in another order.
    fn damaged_frames() -> impl Strategy<Value = Vec<u8>> {
        let piece = prop_oneof![
            (0_u64..40, "[a-z]{0,12}").prop_map(|(offset, data)| frame('O', offset, &data)),
            (0_u64..40, "[a-z]{0,12}").prop_map(|(offset, data)| frame('E', offset, &data)),
            Just(frame('T', 0, "")),
            (0_u64..80).prop_map(|offset| frame('X', offset, "exit 0")),
            proptest::collection::vec(any::<u8>(), 0..30),
            "[OETX] [0-9]{1,25} [0-9]{1,25} [0-9]{1,12}\n".prop_map(String::into_bytes),
        ];
        proptest::collection::vec(piece, 0..12).prop_map(|pieces| pieces.concat())
    }

    proptest! {
        #[test]
        fn whatever_comes_only_what_continues_the_spool_is_taken(bytes in damaged_frames(), cut in 1_usize..64) {
            let mut frames = Frames::new((0, 0));
            let (mut stdout, mut stderr) = (0, 0);
            'all: for part in bytes.chunks(cut) {
                frames.push(part);
                loop {
                    match frames.next() {
                        Ok(Some(Frame::Output(chunk))) if chunk.stderr => stderr += chunk.data.len() as u64,
                        Ok(Some(Frame::Output(chunk))) => stdout += chunk.data.len() as u64,
                        Ok(Some(Frame::Alive)) => {}
                        Ok(Some(Frame::End(_))) | Err(_) => break 'all,
                        Ok(None) => break,
                    }
                }
                prop_assert!(frames.buffer.len() <= FRAME_BYTES_MAX + HEADER_BYTES_MAX);
            }
            prop_assert_eq!((frames.stdout_offset, frames.stderr_offset), (stdout, stderr));
        }
    }

    fn frame(tag: char, offset: u64, data: &str) -> Vec<u8> {
        let sum: u32 = data.bytes().map(u32::from).sum();
        format!("{tag} {offset} {} {sum}\n{data}", data.len()).into_bytes()
    }

    fn collect(frames: &mut Frames) -> Result<String, Broken> {
        let mut text = String::new();
        while let Some(frame) = frames.next()? {
            match frame {
                Frame::Output(chunk) => text.push_str(std::str::from_utf8(&chunk.data).unwrap()),
                Frame::Alive => text.push('.'),
                Frame::End(status) => text.push_str(&format!("{status:?}")),
            }
        }
        Ok(text)
    }

    #[test]
    fn a_healthy_turn_outlives_cut_sockets_and_refused_credentials() {
        let begun = Instant::now();
        let at = |seconds| begun + Duration::from_secs(seconds);
        let mut contact = Contact { claimed: begun, last: None, attempt: 0 };
        assert_eq!(contact.interrupted(at(0), false), Next::Retry(Duration::ZERO));
        for second in 1..60 {
            assert!(matches!(contact.interrupted(at(second), second % 2 == 0), Next::Retry(_)), "{second}");
        }
        assert_eq!(contact.interrupted(at(61), false), Next::Fail, "never in contact");
        assert_eq!(contact.interrupted(at(61), true), Next::Fail);
        for round in 0..50 {
            contact.made(at(100 + round));
            assert_eq!(contact.interrupted(at(101 + round), false), Next::Retry(Duration::ZERO), "cut again and again");
        }
        assert!(matches!(contact.interrupted(at(269), false), Next::Retry(_)));
        assert_eq!(contact.interrupted(at(270), false), Next::Release);
        contact.made(at(300));
        assert_eq!(contact.interrupted(at(301), true), Next::Release, "a fresh lease may be good");
    }

    #[test]
    fn frames_are_found_however_the_bytes_are_cut() {
        let bytes: Vec<u8> = [frame('O', 5, "one\n"), frame('T', 0, ""), frame('O', 9, "two"), frame('X', 12, "exit 3")].concat();
        for cut in 1..bytes.len() {
            let mut frames = Frames::new((5, 0));
            let mut text = String::new();
            for part in bytes.chunks(cut) {
                frames.push(part);
                text.push_str(&collect(&mut frames).unwrap());
            }
            assert_eq!(text, "one\n.twoExited { code: 3, dropped: 0 }", "cut {cut}");
        }
    }

    #[test]
    fn lost_bytes_are_noticed() {
        let whole: Vec<u8> = [frame('O', 0, "aaaaaaaaaaaaaaaa"), frame('O', 16, "bbbb"), frame('X', 20, "exit 0")].concat();
        for from in 0..whole.len() - 12 {
            let damaged: Vec<u8> = [&whole[..from], &whole[from + 4..]].concat();
            let mut frames = Frames::new((0, 0));
            frames.push(&damaged);
            let read = collect(&mut frames);
            assert!(
                !matches!(&read, Ok(text) if text.ends_with("Exited { code: 0, dropped: 0 }")),
                "bytes {from}.. lost unnoticed: {read:?}"
            );
        }
    }

    #[test]
    fn an_end_before_the_last_byte_is_none() {
        let mut frames = Frames::new((0, 0));
        frames.push(&frame('X', 7, "exit 0"));
        assert!(matches!(frames.next(), Err(Broken::Garbled)));
    }

    #[test]
    fn a_gap_is_refused() {
        let mut frames = Frames::new((0, 0));
        frames.push(&frame('O', 4, "late"));
        assert!(matches!(frames.next(), Err(Broken::Garbled)));
    }
}
