//! A session's stream, event by event.

use std::time::Duration;

use anyhow::{Context as _, bail};
use bytes::Bytes;
use futures::{Stream, StreamExt as _};
use serde_json::Value;

/// Longer than any silence of a stream that works.
const SILENCE_MAX: Duration = Duration::from_secs(40);

pub struct Events {
    body: std::pin::Pin<Box<dyn Stream<Item = reqwest::Result<Bytes>> + Send>>,
    buffer: Vec<u8>,
}

impl Events {
    pub(crate) fn new(response: reqwest::Response) -> Self {
        Self { body: response.bytes_stream().boxed(), buffer: Vec::new() }
    }

    /// The next event; none at the end of the stream.
    ///
    /// # Errors
    /// When the stream breaks off or falls silent.
    pub async fn next(&mut self) -> anyhow::Result<Option<Value>> {
        loop {
            if let Some(end) = self.buffer.windows(2).position(|pair| pair == b"\n\n") {
                let block: Vec<u8> = self.buffer.drain(..end + 2).collect();
                let text = std::str::from_utf8(&block)?;
                match text.lines().find_map(|line| line.strip_prefix("data: ")) {
                    Some(data) => return Ok(Some(serde_json::from_str(data)?)),
                    None => continue,
                }
            }
            match tokio::time::timeout(SILENCE_MAX, self.body.next())
                .await
                .context("the stream fell silent")?
            {
                Some(Ok(bytes)) => self.buffer.extend_from_slice(&bytes),
                Some(Err(error)) => bail!("the stream broke off: {error}"),
                None => return Ok(None),
            }
        }
    }

    /// All events to the end of the stream.
    ///
    /// # Errors
    /// As [`Self::next`].
    pub async fn all(mut self) -> anyhow::Result<Vec<Value>> {
        let mut events = Vec::new();
        while let Some(event) = self.next().await? {
            events.push(event);
        }
        Ok(events)
    }

    /// Reads until output holds a text; gives all output so far.
    ///
    /// # Errors
    /// When the stream ends before.
    pub async fn until_output(&mut self, text: &str) -> anyhow::Result<String> {
        let mut output = String::new();
        while !output.contains(text) {
            let event = self
                .next()
                .await?
                .with_context(|| format!("{text:?} never came; there was {output:?}"))?;
            output.push_str(event.get("data").and_then(Value::as_str).unwrap_or_default());
        }
        Ok(output)
    }
}
