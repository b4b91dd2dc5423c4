//! Commands over plain HTTP (docs/sprites-api.md §4.3): frames without lengths, separated by the
//! chunks in which they are sent.
//!
//! Clients read a frame with one read of their socket. So a frame is small, and each waits until
//! the one before it was read.

use std::{convert::Infallible, time::Duration};

use axum::{
    body::{Body, Bytes},
    extract::{Path, State},
    http::{StatusCode, header},
    response::{IntoResponse, Response},
};
use futures::StreamExt as _;
use tokio::{sync::mpsc, time::Instant};

use super::{Api, ErrorResponse, Query, exec, failure};
use crate::run::exec::{Event, ExecSession, Stream};

const FRAME_BYTES_MAX: usize = 32 * 1024;
/// Between two frames. At 5 ms no client was seen to read two at once on a machine at rest.
const PACE: Duration = Duration::from_millis(15);
/// Before the exit frame: read together with output, it would be taken for output.
const EXIT_PACE: Duration = Duration::from_millis(50);
const EXIT: u8 = 3;

pub async fn run(
    State(api): State<Api>,
    Path(name): Path<String>,
    query: Query,
    body: Body,
) -> Result<Response, ErrorResponse> {
    let sprite = api.registry.get(&name)?;
    let request = exec::request(&query, false)?;
    let takes_input = request.stdin;
    let holder = api.registry.wake(&sprite).await?;
    let started =
        ExecSession::start(sprite.start_of(holder, &request), request, &api.registry.lifecycle);
    let (session, output) =
        started.map_err(|error| failure(StatusCode::INTERNAL_SERVER_ERROR, &error.to_string()))?;
    let (lifecycle, stop) = (&api.registry.lifecycle, api.registry.lifecycle.stop_token());
    if takes_input {
        let feed = async move {
            let mut body = body.into_data_stream();
            while let Some(Ok(bytes)) = body.next().await {
                session.feed(Some(bytes)).await;
            }
            session.feed(None).await;
        };
        let stop = stop.clone();
        lifecycle.tracker().spawn(async move { stop.run_until_cancelled(feed).await });
    }
    let (sender, receiver) = mpsc::channel(1);
    lifecycle.tracker().spawn(async move { stop.run_until_cancelled(pace(output, sender)).await });
    // Where the command's end is not known, the reply breaks off without an exit frame.
    let frames = futures::stream::unfold(receiver, |mut frames| async move {
        Some((Ok::<_, Infallible>(frames.recv().await?), frames))
    });
    Ok(([(header::CONTENT_TYPE, "application/octet-stream")], Body::from_stream(frames))
        .into_response())
}

/// Output not sent yet, of each stream.
#[derive(Default)]
struct Pending {
    stdout: Vec<u8>,
    stderr: Vec<u8>,
}

impl Pending {
    fn add(&mut self, frame: &Bytes) {
        let is_stderr = frame.first() == Some(&(Stream::Stderr as u8));
        let stream = if is_stderr { &mut self.stderr } else { &mut self.stdout };
        stream.extend_from_slice(&frame[1..]);
    }

    fn is_empty(&self) -> bool {
        self.stdout.is_empty() && self.stderr.is_empty()
    }

    fn is_full(&self) -> bool {
        self.stdout.len().max(self.stderr.len()) > 4 * FRAME_BYTES_MAX
    }

    /// The next frame; of the stream that has more waiting.
    fn take(&mut self) -> Bytes {
        let (kind, stream) = match self.stderr.len() > self.stdout.len() {
            true => (Stream::Stderr, &mut self.stderr),
            false => (Stream::Stdout, &mut self.stdout),
        };
        let rest = stream.split_off(stream.len().min(FRAME_BYTES_MAX));
        let mut frame = vec![kind as u8];
        frame.append(stream);
        *stream = rest;
        frame.into()
    }
}

async fn pace(mut output: mpsc::Receiver<Event>, frames: mpsc::Sender<Bytes>) {
    let mut pending = Pending::default();
    let mut next = Instant::now() + PACE;
    let code = loop {
        tokio::select! {
            event = output.recv(), if !pending.is_full() => match event {
                Some(Event::Output(frame)) => pending.add(&frame),
                Some(Event::Exit(code)) => break code,
                None => return,
            },
            () = tokio::time::sleep_until(next), if !pending.is_empty() => {
                if frames.send(pending.take()).await.is_err() {
                    return;
                }
                next = Instant::now() + PACE;
            }
            () = frames.closed() => return,
        }
    };
    while !pending.is_empty() {
        tokio::time::sleep_until(next).await;
        if frames.send(pending.take()).await.is_err() {
            return;
        }
        next = Instant::now() + PACE;
    }
    tokio::time::sleep(EXIT_PACE).await;
    let _ = frames.send(Bytes::copy_from_slice(&[EXIT, code])).await;
}
