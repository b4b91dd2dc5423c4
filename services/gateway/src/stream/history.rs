//! Pages of a session's event log in Postgres, bounded in bytes.

use bus::{Bus, RpcError};
use bytes::{Bytes, BytesMut};
use contract::{
    rpc,
    scheduler::{ReadEventsReply, ReadEventsRequest, RecordedEvent},
};
use types::SessionId;

use crate::RPC_DEADLINE;

const PAGE_EVENTS: u32 = 2000;
pub const PAGE_BYTES: u32 = 256 * 1024;
const PAGE_BYTES_MIN: u32 = 32 * 1024;
/// Pages of all readers together are bounded by about this much, as long as [`PAGE_BYTES_MIN`] is
/// enough for each.
const ALL_PAGES_BYTES: u32 = 128 * 1024 * 1024;

/// Bytes of a page when so many streams are open.
pub fn page_bytes(streams: usize) -> u32 {
    let streams = u32::try_from(streams.max(1)).unwrap_or(u32::MAX);
    (ALL_PAGES_BYTES / streams).clamp(PAGE_BYTES_MIN, PAGE_BYTES)
}

/// Whether a reader of a page may hold the next one beside it: the page was full, and two of each
/// of so many streams are within the bound of all.
pub fn has_room_ahead(streams: usize, page: &[RecordedEvent]) -> bool {
    let is_full = page.len() >= PAGE_EVENTS as usize
        || page.iter().map(|event| event.payload.len()).sum::<usize>() >= PAGE_BYTES as usize;
    is_full && streams <= (ALL_PAGES_BYTES / PAGE_BYTES / 2) as usize
}

/// Reads the events after one.
///
/// # Errors
/// When the scheduler or its database is away.
pub async fn read_page(
    bus: &Bus,
    session: SessionId,
    after: u64,
    max_bytes: u32,
) -> Result<ReadEventsReply, RpcError> {
    read(bus, &ReadEventsRequest { after, ..request(session, max_bytes) }).await
}

/// Reads the events after one, but for raw output.
///
/// # Errors
/// When the scheduler or its database is away.
pub async fn read_shown(
    bus: &Bus,
    session: SessionId,
    after: u64,
    max_bytes: u32,
) -> Result<ReadEventsReply, RpcError> {
    read(bus, &ReadEventsRequest { after, without_output: true, ..request(session, max_bytes) })
        .await
}

/// As [`read_shown`], at most so many.
///
/// # Errors
/// When the scheduler or its database is away.
pub async fn read_shown_entries(
    bus: &Bus,
    session: SessionId,
    after: u64,
    limit: usize,
    max_bytes: u32,
) -> Result<ReadEventsReply, RpcError> {
    let limit = u32::try_from(limit).unwrap_or(PAGE_EVENTS).min(PAGE_EVENTS);
    read(
        bus,
        &ReadEventsRequest { after, without_output: true, limit, ..request(session, max_bytes) },
    )
    .await
}

/// Reads the last events before one but for raw output, newest first, at most so many. A scheduler
/// of an earlier release returns all.
///
/// # Errors
/// When the scheduler or its database is away.
pub async fn read_shown_entries_before(
    bus: &Bus,
    session: SessionId,
    before: u64,
    limit: usize,
    max_bytes: u32,
) -> Result<ReadEventsReply, RpcError> {
    let limit = u32::try_from(limit).unwrap_or(PAGE_EVENTS).min(PAGE_EVENTS);
    let (before, without_output_before) = (Some(before), true);
    read(
        bus,
        &ReadEventsRequest { before, without_output_before, limit, ..request(session, max_bytes) },
    )
    .await
}

/// Reads the events before one, newest first.
///
/// # Errors
/// When the scheduler or its database is away.
pub async fn read_page_before(
    bus: &Bus,
    session: SessionId,
    before: u64,
    max_bytes: u32,
) -> Result<ReadEventsReply, RpcError> {
    read(bus, &ReadEventsRequest { before: Some(before), ..request(session, max_bytes) }).await
}

fn request(session: SessionId, max_bytes: u32) -> ReadEventsRequest {
    ReadEventsRequest {
        session_id: session.to_string(),
        limit: PAGE_EVENTS,
        max_bytes,
        ..ReadEventsRequest::default()
    }
}

async fn read(bus: &Bus, request: &ReadEventsRequest) -> Result<ReadEventsReply, RpcError> {
    let mut reply = bus.call::<rpc::ReadEvents>(request, RPC_DEADLINE).await?;
    detach(&mut reply.events);
    Ok(reply)
}

/// Copies payloads out of the connection's buffer, which they would hold in memory, into one of
/// their size.
fn detach(events: &mut [RecordedEvent]) {
    let mut buffer = BytesMut::with_capacity(events.iter().map(|event| event.payload.len()).sum());
    for event in events {
        buffer.extend_from_slice(&event.payload);
        event.payload = buffer.split().freeze();
    }
}

/// The newest persisted event of a session; 0 where it has none. `None` where the session was
/// deleted.
///
/// # Errors
/// When the scheduler or its database is away.
pub async fn newest(bus: &Bus, session: SessionId) -> Result<Option<u64>, RpcError> {
    let reply = read_page(bus, session, u64::MAX, 1).await?;
    Ok((!reply.session_deleted).then(|| reply.newest.map_or(0, |event| event.event_id)))
}

/// An event that is decoded when it is sent.
#[derive(Clone, Debug)]
pub struct Stored {
    pub id: u64,
    pub payload: Bytes,
}

impl From<RecordedEvent> for Stored {
    fn from(event: RecordedEvent) -> Self {
        Self { id: event.event_id, payload: event.payload }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_shrink_when_many_read() {
        assert_eq!(
            (page_bytes(0), page_bytes(512), page_bytes(16_384)),
            (PAGE_BYTES, PAGE_BYTES, PAGE_BYTES_MIN)
        );
        assert_eq!(page_bytes(1024), 128 * 1024);
    }

    #[test]
    fn the_next_page_is_read_ahead_of_a_full_one_while_few_read() {
        let page = |events: usize, bytes: usize| {
            let payload = Bytes::from(vec![0; bytes]);
            (0..events)
                .map(|_| RecordedEvent { event_id: 1, payload: payload.clone() })
                .collect::<Vec<_>>()
        };
        let few = PAGE_EVENTS as usize - 1;
        assert!(has_room_ahead(1, &page(few + 1, 1)) && has_room_ahead(1, &page(2, 128 * 1024)));
        assert!(!has_room_ahead(1, &page(few, 1)) && !has_room_ahead(1, &[]));
        assert!(has_room_ahead(256, &page(few + 1, 1)) && !has_room_ahead(257, &page(few + 1, 1)));
    }
}
